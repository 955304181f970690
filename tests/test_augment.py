"""+ADA (augment.py) against torchvision, its limits and rates; +RS, re-sampling by class."""
import math

import numpy as np
import pytest
import torch
from conftest import tiny_net
from test_losses import AB
from torch.testing import assert_close
from torchvision.transforms import functional as tv

import augment
from data import Batches, to_float
from losses import Objective, bind, draw_batch


# --------------------------------------------------------------------------------------------------
# Re-sampling

@pytest.mark.parametrize("q", [0.0, 0.5, 1.0])
def test_resampling_frequencies(digits, q):
    batches = Batches(digits, 64, 0, "cpu", resample=q)
    labels = np.concatenate([digits.labels[batches.rows(step)] for step in range(800)])
    seen = np.bincount(labels, minlength=10)
    proportions = digits.counts.astype(float) ** q
    expected = seen.sum() * proportions / proportions.sum()
    assert (np.abs(seen - expected) < 5 * np.sqrt(expected) + 1).all()
    again = Batches(digits, 64, 0, "cpu", resample=q)
    assert np.array_equal(again.rows(17), batches.rows(17))


# --------------------------------------------------------------------------------------------------
# Augmentation: rates and limits

def parameters(n=1, **values):
    """The parameters of n images: those of the identity but for `values`."""
    names = augment.draw_parameters(1, 0.0, torch.Generator()).keys()
    return {name: torch.full((n,), float(values.get(name, 0))) for name in names}


def smooth(n=2, size=32, channels=3, seed=0):
    """Random smooth images in [0.05, 0.95]."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 5, 5, generator=g)
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    return fine.clamp(0.05, 0.95)


def augmented(x, p):
    """augment.augment with seed 0."""
    return augment.augment(x, p, torch.Generator().manual_seed(0))


def test_p_0_is_the_identity_and_p_1_is_not():
    x = smooth(8) * 2 - 1
    same, a = augmented(x, 0.0)
    assert torch.equal(same, x)
    assert (a == 0).all()
    assert a.shape == (8, augment.DIM)
    other, a = augmented(x, 1.0)
    assert ((other - x).abs().flatten(1).max(1).values > 0.1).all()
    assert (a != 0).any(0).all()
    grey, _ = augmented(x[:, :1], 1.0)
    assert grey.shape == (8, 1, 32, 32)
    assert grey.isfinite().all()


def test_each_operation_has_its_probability():
    params = augment.draw_parameters(20000, 0.12, torch.Generator().manual_seed(0))
    rates = (augment.vector(params) != 0).float().mean(0)
    expected = torch.full((augment.DIM,), 0.12)
    expected[:2] = 0.12 / 2             # half of the mirrors are none
    expected[2:4] = 0.12 * 0.75         # a quarter of the turns are by 0; sin(pi) is not exactly 0
    assert (rates - expected).abs().max() < 0.012


# --------------------------------------------------------------------------------------------------
# Augmentation: the operations

def middle(x, margin=8):
    """Images without their border, where torchvision pads otherwise."""
    return x[..., margin:-margin, margin:-margin]


@pytest.mark.parametrize("mine, theirs", [
    pytest.param({"mirror_x": 1}, tv.hflip, id="mirror_x"),
    pytest.param({"mirror_y": 1}, tv.vflip, id="mirror_y"),
    pytest.param({"quarter_turns": 1}, lambda x: torch.rot90(x, 1, (2, 3)), id="turn_1"),
    pytest.param({"quarter_turns": 3}, lambda x: torch.rot90(x, 3, (2, 3)), id="turn_3"),
])
def test_exact_geometry(mine, theirs):
    x = smooth()
    assert_close(augment.geometry(x, parameters(2, **mine)), theirs(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mine, angle, shift, scale", [
    ({"turn": math.radians(20)}, -20, [0, 0], 1),
    ({"shift_x": 0.125, "shift_y": -0.0625}, 0, [4, -2], 1),
    ({"log2_scale": 0.3}, 0, [0, 0], 2 ** 0.3),
    ({"turn": math.radians(-10), "log2_scale": 0.2}, 10, [0, 0], 2 ** 0.2),
])
def test_geometry_is_torchvisions(mine, angle, shift, scale):
    x = smooth()
    theirs = tv.affine(x, angle, shift, scale, [0.0, 0.0],
                       interpolation=tv.InterpolationMode.BILINEAR)
    got = augment.geometry(x, parameters(2, **mine))
    assert_close(middle(got), middle(theirs), atol=2e-3, rtol=0)
    assert (middle(theirs) - middle(x)).abs().max() > 0.05


@pytest.mark.parametrize("mine, theirs", [
    pytest.param({"log2_brightness": -0.3}, lambda x: tv.adjust_brightness(x, 2 ** -0.3),
                 id="brightness"),
    pytest.param({"log2_contrast": -0.5}, lambda x: tv.adjust_contrast(x, 2 ** -0.5),
                 id="contrast"),
    pytest.param({"log2_saturation": -0.7}, lambda x: tv.adjust_saturation(x, 2 ** -0.7),
                 id="saturation"),
    pytest.param({"hue": 0.21}, lambda x: tv.adjust_hue(x, 0.21), id="hue"),
    pytest.param({"hue": -0.4}, lambda x: tv.adjust_hue(x, -0.4), id="hue back"),
])
def test_colour_is_torchvisions(mine, theirs):
    x = smooth()
    got = augment.colour(x, parameters(2, **mine))
    assert_close(got, theirs(x), atol=1e-4, rtol=0)
    assert (got - x).abs().max() > 0.02


# --------------------------------------------------------------------------------------------------
# Augmentation: in training

def test_the_network_gets_the_vector_and_samples_are_plain():
    net = tiny_net(None, augment_dim=augment.DIM)
    inputs = torch.randn(3, 1, 8, 8), torch.tensor([5, 500, 900]), torch.tensor([1, -1, 3])
    a = torch.randn(3, augment.DIM)
    plain = net(*inputs)
    assert torch.equal(plain, net.decode(*net.encode(*inputs, (), torch.zeros_like(a))))
    difference = net.decode(*net.encode(*inputs, (), a)) - plain
    assert (difference.abs().flatten(1).max(1).values > 1e-4).all()


def test_augmentation_is_the_same_for_parts_of_a_batch(digits):
    objective = Objective(net=tiny_net(None, augment_dim=augment.DIM, dropout=0.0), base=bind("oc"),
                          counts=digits.counts, alphas_bar=AB, ada=0.5)
    x_0 = to_float(torch.from_numpy(digits.images[:12]))
    y = torch.from_numpy(digits.labels[:12])
    whole = draw_batch(x_0, y, objective, seed=0, step=3)
    halves = [draw_batch(x_0, y, objective, seed=0, step=3, part=k, parts=2) for k in range(2)]
    assert torch.equal(whole.x_0, torch.cat([half.x_0 for half in halves]))
    assert torch.equal(whole.a, torch.cat([half.a for half in halves]))
    assert torch.equal(whole.pool_x_0, halves[1].pool_x_0)
    assert not torch.equal(whole.x_0, x_0)
