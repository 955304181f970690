"""baselines.py, augment.py and re-sampling: each against a literal version, its limits, and one training run."""
import copy
import math

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_FLAGS, call, randomize, tiny_net
from test_losses import AB, mse, predictions, setup
from test_mistakes import refuses
from test_train import read_log
from torch.testing import assert_close
from torchvision.transforms import functional as tv

import augment
import baselines
import runtime
import sample
import train
from cm_layers import reserve
from data import Batches

# ----------------------------------------------------------------------------------------------------------------------
# Losses


def test_focal(digits):
    o, b = setup(digits, "focal", rank_ratio=None, focal_gamma=1.5)
    errors = mse(predictions(o, b, b.y_in), b.eps.numpy())
    weights = (1 - np.exp(-errors)) ** 1.5
    assert o(b)[0].item() == pytest.approx((weights * errors).mean(), rel=1e-4)
    o.focal_gamma = 0.0
    assert o(b)[0].item() == pytest.approx(errors.mean(), rel=1e-4)


def test_overlap(digits):
    o, b = setup(digits, "rop", rank_ratio=None, rop_margin=0.05, rop_weight=0.3)
    own, other = predictions(o, b, b.y_in), predictions(o, b, b.y_prime)
    betas = np.linspace(1e-4, 0.02, 1000)
    alphas_bar, kl = np.cumprod(1 - betas), []
    for beta, ab in zip(betas, alphas_bar):         # KL of two Gaussians of variance beta whose means differ as eps does
        shift = beta / math.sqrt(1 - ab) / math.sqrt(1 - beta)
        kl.append(shift ** 2 / (2 * beta))
    weights = np.array(kl) / np.mean(kl)
    hinge = np.maximum(0, 0.05 - mse(own, other)) * (b.y_in.numpy() >= 0) * (b.y_prime.numpy() != b.y.numpy())
    total, terms, _ = o(b)
    expected = np.mean(weights[b.t.numpy()] * hinge)
    assert expected > 0 and terms["overlap"].item() == pytest.approx(expected, rel=1e-3)
    assert total.item() == pytest.approx(terms["base"].item() + 0.3 * expected, rel=1e-4)
    o.rop_margin = 1e-12                             # nothing is pushed beyond the margin
    assert o(b)[1]["overlap"].item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("base", ["ddpm", "cbdm", "oc", "focal", "rop", "consistency"])
@pytest.mark.parametrize("more", [["--cm"], ["--cm", "--resample", "0.5"], ["--cm", "--ada", "0.12"], ["--no-cm", "--experts", "group"],
                                  ["--cm", "--lam", "0"], ["--w-con", "0"], ["--w-div", "0"]], ids=" ".join)
def test_every_pair_trains(tmp_path, data_dir, base, more):
    """CM on any base, with re-sampling, with augmentation; its ablations; group experts: ten steps each, learning."""
    call(train.main, *TINY_FLAGS, "--base", base, *more, "--steps", 10, "--log-every", 5, "--lr", 0.003, "--warmup", 0, "--data-dir", data_dir,
         "--out", tmp_path)
    first, last = read_log(tmp_path)
    assert last["base"] < first["base"]
    assert ("con" in last) == ("--no-cm" not in more and "0" not in more[2:] and more != ["--cm", "--lam", "0"])


# ----------------------------------------------------------------------------------------------------------------------
# Experts and LoRA

def test_group_experts_route_by_label():
    """Each image is computed with the plain network of its own group's W^g + B_k A_k; Null with W^g."""
    counts = [148, 106, 76, 54, 39, 28, 20, 14, 10, 7]
    net = randomize(sample.build_network({**TINY, "dropout": 0.0}, 0.3, counts))
    y, t, x = torch.tensor([0, 4, 9, -1, 2]), torch.tensor([10, 300, 500, 700, 900]), torch.randn(5, 1, 8, 8)
    mixed = net(x, t, y)
    state = net.state_dict()
    for i, group in enumerate([0, 1, 2, None, 0]):
        plain = {}
        for name, value in state.items():
            if name.endswith(".layer.weight"):
                A, B = (state[name.replace(".layer.weight", "." + f)] for f in "AB")
                low = 0 if group is None else (B[group] @ A.chunk(3)[group].flatten(1)).view(value.shape)
                plain[name.replace(".layer.weight", ".weight")] = value + low
            elif not name.endswith((".A", ".B")):
                plain[name.replace(".layer.bias", ".bias")] = value
        alone = sample.build_network({**TINY, "dropout": 0.0}, None)
        alone.load_state_dict(plain)
        assert_close(mixed[i:i + 1], alone(x[i:i + 1], t[i:i + 1], y[i:i + 1]), atol=1e-5, rtol=1e-4)
    ranks = {(len(m.B), m.B.shape[2]) for m in net.modules() if isinstance(m, baselines.GroupExperts)}
    assert all(groups == 3 for groups, _ in ranks) and max(r for _, r in ranks) == int(0.3 * 32) // 3


def test_experts_resume_sample_and_do_not_merge(tmp_path, data_dir, capsys):
    flags = (*TINY_FLAGS, "--base", "ddpm", "--experts", "group", "--data-dir", data_dir, "--out", tmp_path / "run")
    call(train.main, *flags, "--steps", 3)
    call(train.main, *flags, "--steps", 5)
    ckpt = runtime.load(tmp_path / "run/ckpt.pt", ["diffusion"])
    assert ckpt["step"] == 5 and ckpt["experts"][:2] == [148, 106]
    call(sample.main, "--ckpt", tmp_path / "run/ckpt.pt", "--num", 10, "--steps", 2, "--device", "cpu")
    refuses(capsys, sample.main, "--ckpt", tmp_path / "run/ckpt.pt", "--export", tmp_path / "m.pt", "--device", "cpu", says=["--export"])
    refuses(capsys, sample.main, "--ckpt", tmp_path / "run/ckpt.pt", "--branch", "general", "--device", "cpu", says=["--branch general"])


def test_lora_trains_low_rank_parts_only(tmp_path, data_dir, capsys):
    common = (*TINY_FLAGS, "--data-dir", data_dir)
    call(train.main, *common, "--base", "cbdm", "--no-cm", "--steps", 20, "--out", tmp_path / "full")
    lora = (*common, "--base", "cbdm", "--lora", "--init-from", tmp_path / "full/ckpt.pt", "--out", tmp_path / "lora")
    call(train.main, *lora, "--steps", 5)
    assert "frozen" in capsys.readouterr().out
    call(train.main, *lora, "--steps", 8)                                       # and resumes
    before, after = (runtime.load(tmp_path / d / "ckpt.pt", ["diffusion"]) for d in ("full", "lora"))
    plain = {k.replace("parametrizations.weight.original", "weight"): v for k, v in after["model"].items()}
    assert all(torch.equal(plain[k], v) for k, v in before["ema"].items())      # what it started from has not moved
    moved = [k for k in after["model"] if k.endswith(".B") and after["model"][k].abs().max() > 0]
    assert len(moved) == len([k for k in after["model"] if k.endswith(".B")]) > 0
    assert "con" not in read_log(tmp_path / "lora")[-1]
    call(sample.main, "--ckpt", tmp_path / "lora/ckpt.pt", "--num", 10, "--steps", 2, "--device", "cpu")
    refuses(capsys, train.main, *common, "--lora", "--out", tmp_path / "x", says=["--lora", "--init-from"])
    refuses(capsys, train.main, *common, "--init-from", tmp_path / "none.pt", "--out", tmp_path / "x", says=["--init-from", "no such file"])
    refuses(capsys, train.main, *common, "--ch", 32, "--init-from", tmp_path / "full/ckpt.pt", "--out", tmp_path / "x",
            says=["--init-from", "another one", "--ch"])


# ----------------------------------------------------------------------------------------------------------------------
# Re-sampling

@pytest.mark.parametrize("q", [0.0, 0.5, 1.0])
def test_resampling_frequencies(digits, q):
    batches = Batches(digits, 64, 0, "cpu", resample=q)
    drawn = np.bincount(np.concatenate([digits.labels[batches.rows(s)] for s in range(800)]), minlength=10)
    law = digits.counts.astype(float) ** q
    expected = drawn.sum() * law / law.sum()
    assert (np.abs(drawn - expected) < 5 * np.sqrt(expected) + 1).all()
    again = Batches(digits, 64, 0, "cpu", resample=q)
    assert np.array_equal(again.rows(17), batches.rows(17))


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation

def parameters(n=1, **values):
    names = augment.draw_parameters(1, 0.0, torch.Generator()).keys()
    return {k: torch.full((n,), float(values.get(k, 0))) for k in names}


def smooth(n=2, size=32, channels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.interpolate(torch.rand(n, channels, 5, 5, generator=g), (size, size), mode="bicubic").clamp(0.05, 0.95)


def test_p_0_is_the_identity_and_p_1_is_not():
    x = smooth(8) * 2 - 1
    same, told = augment.augment(x, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(same, x) and (told == 0).all() and told.shape == (8, augment.DIM)
    other, told = augment.augment(x, 1.0, torch.Generator().manual_seed(0))
    assert ((other - x).abs().flatten(1).max(1).values > 0.1).all() and (told != 0).any(0).all()
    grey, _ = augment.augment(x[:, :1], 1.0, torch.Generator().manual_seed(0))
    assert grey.shape == (8, 1, 32, 32) and grey.isfinite().all()


def test_each_operation_has_its_probability():
    told = augment.vector(augment.draw_parameters(20000, 0.12, torch.Generator().manual_seed(0)))
    rates = (told != 0).float().mean(0)
    expected = torch.full((augment.DIM,), 0.12)
    expected[:2] /= 2                                       # half of the mirrors are none
    expected[2], expected[3] = 0.12 * 0.75, 0.12 * 0.75     # a quarter of the turns are by 0; sin(pi) is not exactly 0
    assert (rates - expected).abs().max() < 0.012


def middle(x, margin=8):
    return x[..., margin:-margin, margin:-margin]


@pytest.mark.parametrize("mine, theirs", [
    ({"mirror_x": 1}, tv.hflip), ({"mirror_y": 1}, tv.vflip), ({"quarter_turns": 1}, lambda x: torch.rot90(x, 1, (2, 3))),
    ({"quarter_turns": 3}, lambda x: torch.rot90(x, 3, (2, 3)))], ids=["mirror_x", "mirror_y", "turn_1", "turn_3"])
def test_exact_geometry(mine, theirs):
    x = smooth()
    assert_close(augment.geometry(x, parameters(2, **mine)), theirs(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mine, angle, shift, scale", [
    ({"turn": math.radians(20)}, -20, [0, 0], 1), ({"shift_x": 0.125, "shift_y": -0.0625}, 0, [4, -2], 1),
    ({"log2_scale": 0.3}, 0, [0, 0], 2 ** 0.3), ({"turn": math.radians(-10), "log2_scale": 0.2}, 10, [0, 0], 2 ** 0.2)])
def test_geometry_is_torchvisions(mine, angle, shift, scale):
    x = smooth()
    theirs = tv.affine(x, angle, shift, scale, [0.0, 0.0], interpolation=tv.InterpolationMode.BILINEAR)
    assert_close(middle(augment.geometry(x, parameters(2, **mine))), middle(theirs), atol=2e-3, rtol=0)
    assert (middle(theirs) - middle(x)).abs().max() > 0.05


@pytest.mark.parametrize("mine, theirs", [
    ({"log2_brightness": -0.3}, lambda x: tv.adjust_brightness(x, 2 ** -0.3)),
    ({"log2_contrast": -0.5}, lambda x: tv.adjust_contrast(x, 2 ** -0.5)),
    ({"log2_saturation": -0.7}, lambda x: tv.adjust_saturation(x, 2 ** -0.7)),
    ({"hue": 0.21}, lambda x: tv.adjust_hue(x, 0.21)), ({"hue": -0.4}, lambda x: tv.adjust_hue(x, -0.4))],
    ids=["brightness", "contrast", "saturation", "hue", "hue back"])
def test_colour_is_torchvisions(mine, theirs):
    x = smooth()
    got = augment.colour(x, parameters(2, **mine))
    assert_close(got, theirs(x), atol=1e-4, rtol=0)
    assert (got - x).abs().max() > 0.02


def test_the_network_is_told_and_samples_are_plain():
    net = tiny_net(None, augment_dim=augment.DIM)
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([5, 500, 900]), torch.tensor([1, -1, 3])
    told = torch.randn(3, augment.DIM)
    plain = net(x, t, y)
    assert torch.equal(plain, net.decode(*net.encode(x, t, y, (), torch.zeros_like(told))))
    assert ((net.decode(*net.encode(x, t, y, (), told)) - plain).abs().flatten(1).max(1).values > 1e-4).all()


def test_augmentation_is_the_same_for_parts_of_a_batch(digits):
    from data import to_float
    from losses import Objective, draw
    o = Objective(tiny_net(None, augment_dim=augment.DIM, dropout=0.0), "oc", digits.counts, AB, ada=0.5)
    x_0, y = to_float(torch.from_numpy(digits.images[:12])), torch.from_numpy(digits.labels[:12])
    whole, halves = draw(x_0, y, o, 0, 3), [draw(x_0, y, o, 0, 3, k, 2) for k in range(2)]
    assert torch.equal(whole.x_0, torch.cat([h.x_0 for h in halves])) and torch.equal(whole.a, torch.cat([h.a for h in halves]))
    assert torch.equal(whole.pool_x_0, halves[1].pool_x_0) and not torch.equal(whole.x_0, x_0)


def test_a_copy_of_group_experts_routes_by_its_own_labels():
    net = randomize(sample.build_network({**TINY, "dropout": 0.0}, 0.3, [9, 8, 7, 6, 5, 5, 4, 3, 2, 1]))
    twin, x, t = copy.deepcopy(net), torch.randn(3, 1, 8, 8), torch.tensor([5, 6, 7])
    net(x, t, torch.tensor([9, 9, 9]))
    assert_close(twin(x, t, torch.tensor([0, 4, 9])), net(x, t, torch.tensor([0, 4, 9])))
    assert twin(x[:1], t[:1], torch.tensor([0])).shape == (1, 1, 8, 8)
