"""networks.py and dit.py: CM trains on networks other than the U-Net."""
import numpy as np
import pytest
import torch
from conftest import assert_equal, call, ckpt_of, pixels, randomize, read_log, refuses
from torch.testing import assert_close

import disk
import prune_probe
import sample
import train
from probes import capacity
from variants.dit import Block, DiT

SMALL = {"channels": 1, "num_classes": 10, "size": 8, "ch": 16, "depth": 3, "patch": 2}
DIT = ("--network", "dit", "--depth", 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny):
    """A DiT trained with CM for a few steps: the run's folder."""
    out = tmp_path_factory.mktemp("dit") / "run"
    call(train.main, *tiny, *DIT, "--base", "ddpm", "--steps", 60, "--log-every", 20,
         "--lr", 0.003, "--warmup", 0, "--out", out)
    return out


def inputs(n=4):
    """x_t, t, y of n images of SMALL; the last label is Null."""
    g = torch.Generator().manual_seed(0)
    x_t = torch.randn(n, 1, 8, 8, generator=g)
    return x_t, torch.arange(n) * 200, torch.tensor([*range(n - 1), -1])


def test_the_halves_and_what_they_depend_on():
    net = randomize(DiT(**SMALL), scale=0.2)
    x_t, t, y = inputs()
    eps = net(x_t, t, y)
    assert eps.shape == x_t.shape
    assert torch.equal(net.decode(*net.encode(x_t, t, y)), eps)
    for other in ((x_t + 1, t, y), (x_t, t + 1, y), (x_t, t, y.roll(1))):
        assert ((net(*other) - eps).abs().flatten(1).amax(1) > 1e-4).all()
    # Patches are where they were: with the blocks off, a pixel moves its own patch only
    for block in (*net.encoder.blocks, *net.decoder.blocks):
        torch.nn.init.zeros_(block.condition.weight)
        torch.nn.init.zeros_(block.condition.bias)
    moved = x_t.clone()
    moved[:, :, 2, 7] += 1
    where = (net(moved, t, y) - net(x_t, t, y)).abs()[0, 0] > 1e-6
    assert where.nonzero().amin(0).tolist() == [2, 6] and where.nonzero().amax(0).tolist() == [3, 7]


def literal_block(block, x, emb, mask):
    """adaLN-Zero as Peebles and Xie's Fig. 3 has it, of torch's own layers; mask: dropout."""
    ch = x.shape[2]
    shift1, scale1, gate1, shift2, scale2, gate2 = block.condition(
        torch.nn.functional.silu(emb))[:, None].chunk(6, 2)
    attention = torch.nn.MultiheadAttention(ch, ch // 64, batch_first=True)
    attention.in_proj_weight, attention.in_proj_bias = block.qkv.weight, block.qkv.bias
    attention.out_proj = block.proj
    norm = torch.nn.LayerNorm(ch, eps=1e-6, elementwise_affine=False)
    h = norm(x) * (1 + scale1) + shift1
    x = x + gate1 * attention(h, h, h, need_weights=False)[0]
    h = norm(x) * (1 + scale2) + shift2
    h = block.mlp2(torch.nn.GELU("tanh")(block.mlp1(h)))
    return x + gate2 * h * mask


def test_a_block_is_adaln_zero():
    g = torch.Generator().manual_seed(0)
    block = randomize(Block(128, 2, 20, dropout=0.75), scale=0.1)
    x = torch.randn(3, 9, 128, generator=g) / 100               # so that the norm's constant counts
    emb, mask = torch.randn(3, 20, generator=g), torch.rand(3, 9, 128, generator=g) < 0.25
    assert_close(block(x, emb, mask), literal_block(block, x, emb, 4 * mask), atol=2e-5, rtol=1e-5)
    assert_close(block(x, emb), literal_block(block, x, emb, 1), atol=2e-5, rtol=1e-5)


def test_an_untrained_network_predicts_zero_and_its_blocks_do_nothing():
    net = DiT(**SMALL)
    x_t, t, y = inputs()
    assert (net(x_t, t, y) == 0).all()
    tokens, emb, _ = net.encode(x_t, t, y)
    assert torch.equal(net.decoder.blocks[0](tokens, emb), tokens)
    assert (len(net.encoder.blocks), len(net.decoder.blocks)) == (1, 2)     # of 3
    assert [block.heads for block in DiT(**{**SMALL, "ch": 128}).encoder.blocks] == [2]


@pytest.mark.parametrize("more", ["--base oc", "--base cbdm --ada 0.12", "--base consistency",
                                  "--base ddpm --lora --init-from RUN"])
def test_cm_trains_on_it(more, run, tmp_path, tiny):
    flags = more.replace("RUN", str(run / "ckpt.pt")).split()
    call(train.main, *tiny, *DIT, *flags, "--steps", 2, "--out", tmp_path)
    assert read_log(tmp_path)[-1]["step"] == 2


def test_it_learns_and_allocates(run):
    log = read_log(run)
    assert log[-1]["base"] < 0.5 < log[0]["base"]
    assert log[-1]["D_Few"] > 1e-4              # it was 0 before the first step


def test_every_other_script_takes_it(run, tmp_path):
    common = ("--ckpt", run / "ckpt.pt", "--device", "cpu")
    call(sample.main, *common, "--export", tmp_path / "merged.pt")
    for ckpt, out in ((run / "ckpt.pt", "full"), (tmp_path / "merged.pt", "merged")):
        call(sample.main, "--ckpt", ckpt, "--device", "cpu", "--num", 10, "--steps", 3,
             "--out", tmp_path / out)
    assert np.array_equal(pixels(tmp_path / "full"), pixels(tmp_path / "merged"))
    probe = (*common, "--out", tmp_path / "probe")
    call(capacity.main, "allocation", *probe)
    call(prune_probe.main, *probe, "--repeats", 1)


def test_a_checkpoint_of_an_unknown_network(run, tmp_path, capsys):
    ckpt = ckpt_of(run)
    disk.save(tmp_path / "x.pt", {**ckpt, "network": {**ckpt["network"], "network": "mine"}})
    refuses(capsys, sample.main, "--ckpt", tmp_path / "x.pt", "--device", "cpu", says=["--plugin"])


@pytest.mark.parametrize("network", ["unet", "dit --depth 3"])
def test_recompute_saves_memory_and_changes_no_bit(network, tmp_path, tiny):
    saved = {}
    for name, more in {"as usual": [], "recomputed": ["--recompute"]}.items():
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            call(train.main, *tiny, "--network", *network.split(), *more, "--steps", 3,
                 "--warmup", 0, "--out", tmp_path / name)
        saved[name] = sum(sizes.values())
    assert_equal(*(ckpt_of(tmp_path / name)["model"] for name in saved))
    assert saved["recomputed"] < 0.7 * saved["as usual"], saved
