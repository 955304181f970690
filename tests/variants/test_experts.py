"""experts.py: group experts against plain networks, LoRA's frozen weights; resuming, refusals."""
import torch
from conftest import COUNTS, TINY, assert_equal, call, ckpt_of, randomize, read_log, refuses
from torch.testing import assert_close

import disk
import networks
import sample
import train
from variants import experts, fused_norm


def expert_net(counts):
    """A small random UNet with three group experts in its decoder."""
    return randomize(networks.build({**TINY, "dropout": 0.0}, 0.3, counts))


def plain_network_of(state, group):
    """The plain UNet with W^g + B_k A_k of a group k, or with W^g where the group is None."""
    plain = {}
    for name, value in state.items():
        if name.endswith(".layer.weight"):
            layer = name.removesuffix(".layer.weight")
            plain[layer + ".weight"] = value
            if group is not None:
                A = state[layer + ".A"].chunk(3)[group].flatten(1)
                B = state[layer + ".B"][group]
                plain[layer + ".weight"] = value + (B @ A).view(value.shape)
        elif not name.endswith((".A", ".B")):
            plain[name.replace(".layer.bias", ".bias")] = value
    net = networks.build({**TINY, "dropout": 0.0}, None)
    net.load_state_dict(plain)
    return net


def test_group_experts_route_by_label():
    """An image is computed with the plain network of its own group's W^g + BA; Null with W^g."""
    net = expert_net(COUNTS)
    x = torch.randn(5, 1, 8, 8)
    t = torch.tensor([10, 300, 500, 700, 900])
    y = torch.tensor([0, 4, 9, -1, 2])
    mixed = net(x, t, y)
    for i, group in enumerate([0, 1, 2, None, 0]):
        own = slice(i, i + 1)
        alone = plain_network_of(net.state_dict(), group)
        assert_close(mixed[own], alone(x[own], t[own], y[own]), atol=1e-5, rtol=1e-4)
    layers = [m for m in net.modules() if isinstance(m, experts.GroupExperts)]
    assert all(len(layer.B) == 3 for layer in layers)
    assert max(layer.B.shape[2] for layer in layers) == int(0.3 * 32) // 3


def test_experts_compute_the_same_where_compiled_for_cuda(monkeypatch):
    """They have no single weight, so that their biases are not joined with those of others."""
    net = expert_net(COUNTS)
    inputs = torch.randn(3, 1, 8, 8), torch.tensor([5, 300, 900]), torch.tensor([0, 4, 9])
    expected = net(*inputs)
    monkeypatch.setattr(fused_norm, "compiled_for_cuda", lambda x: True)
    assert_close(net(*inputs), expected, atol=1e-5, rtol=1e-4)


def test_experts_resume_sample_and_do_not_merge(tmp_path, tiny, capsys):
    flags = (*tiny, "--base", "ddpm", "--experts", "group", "--out", tmp_path)
    call(train.main, *flags, "--steps", 3)
    call(train.main, *flags, "--steps", 5)
    ckpt = ckpt_of(tmp_path)
    assert ckpt["step"] == 5 and ckpt["experts"] == COUNTS
    common = ("--ckpt", tmp_path / "ckpt.pt", "--device", "cpu")
    call(sample.main, *common, "--num", 10, "--steps", 2)
    refuses(capsys, sample.main, *common, "--export", tmp_path / "m.pt", says=["--export"])
    refuses(capsys, sample.main, *common, "--branch", "general", says=["--branch general"])


def test_lora_trains_low_rank_parts_only(tmp_path, tiny, capsys):
    full, lora = tmp_path / "full", tmp_path / "lora"
    call(train.main, *tiny, "--base", "cbdm", "--no-cm", "--steps", 20, "--out", full)
    flags = (*tiny, "--base", "cbdm", "--lora", "--init-from", full / "ckpt.pt", "--out", lora)
    refuses(capsys, train.main, *flags, "--ch", 32, says=["--init-from"])     # another network
    refuses(capsys, train.main, *flags, "--class-order", "9-9,1-8,0",
            says=["--init-from", "--class-order"])
    call(train.main, *flags, "--steps", 5)
    call(train.main, *flags, "--steps", 8)                              # and resumes
    # Finished is not said where that file is another one now
    source = ckpt_of(full)
    disk.save(full / "ckpt.pt", {**source, "step": 21})
    refuses(capsys, train.main, *flags, "--steps", 8, says=["--init-from"])
    (full / "ckpt.pt").rename(full / "moved.pt")                        # not needed any more
    call(train.main, *flags, "--steps", 8)
    after = ckpt_of(lora)["model"]
    plain = {k.replace("parametrizations.weight.original", "weight"): v for k, v in after.items()}
    # What it started from is what it was, and every B has moved
    assert_equal({k: plain[k] for k in source["ema"]}, source["ema"])
    low_rank = [v for k, v in after.items() if k.endswith(".B")]
    assert low_rank and all(B.abs().max() > 0 for B in low_rank)
    assert "con" not in read_log(lora)[-1]
    # The classes stay in the order of what it starts from
    source["data"]["class_names"] = list("9123456780")
    disk.save(full / "ckpt.pt", source)
    call(train.main, *flags[:-1], tmp_path / "ordered", "--steps", 1)
    assert ckpt_of(tmp_path / "ordered")["data"]["class_names"] == list("9123456780")
    call(sample.main, "--ckpt", lora / "ckpt.pt", "--num", 10, "--steps", 2, "--device", "cpu")
