"""+ADA (augment.py) against torchvision, its rates and strengths."""
import math

import pytest
import torch
from scipy.stats import kstest
from torch.testing import assert_close
from torchvision.transforms import functional as tv

from variants import augment


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
    assert torch.equal(same, x) and (a == 0).all() and a.shape == (8, augment.DIM)
    other, a = augmented(x, 1.0)
    assert ((other - x).abs().flatten(1).max(1).values > 0.1).all()
    assert (a != 0).any(0).all()
    assert other.abs().max() < 1.1


def test_rates_and_strengths_are_edms():
    """Mirrored left to right by half; the others by p each, 44 % of the images by one at least."""
    params = augment.draw_parameters(20000, 0.12, torch.Generator().manual_seed(0))
    a = augment.vector(params)
    rates = (a != 0).float().mean(0)
    expected = torch.full((augment.DIM,), 0.12)
    expected[0] = 0.5
    expected[[1, 6]] = 0.12 / 2         # half of the mirrors are none, of the stretches along x
    assert (rates - expected).abs().max() < 0.012
    assert (a[:, 1:] != 0).any(1).float().mean() == pytest.approx(1 - 0.94 * 0.88 ** 4, abs=0.012)
    for name in ("scale", "stretch", "shift_x", "shift_y"):
        values = params[name][params[name] != 0]
        assert kstest(values, "norm").pvalue > 1e-3, name
    for name in ("turn", "axis"):
        values = params[name][params[name] != 0]
        assert kstest(values / math.pi, "uniform", (-1, 2)).pvalue > 1e-3, name
    assert torch.equal(params["shift_x"] != 0, params["shift_y"] != 0)      # both or none
    assert (augment.SCALE_STD, augment.STRETCH_STD, augment.SHIFT_STD) == (0.2, 0.2, 0.125)


def middle(x, margin=8):
    """Images without their border, where torchvision pads otherwise."""
    return x[..., margin:-margin, margin:-margin]


@pytest.mark.parametrize("mine, theirs, tolerance", [
    pytest.param({}, lambda x: x, 0, id="nothing"),
    pytest.param({"mirror_x": 1}, tv.hflip, 0, id="mirror_x"),
    pytest.param({"mirror_y": 1}, tv.vflip, 0, id="mirror_y"),
    pytest.param({"turn": math.pi / 2}, lambda x: torch.rot90(x, 1, (2, 3)), 0.015, id="turn"),
])
def test_exact_geometry(mine, theirs, tolerance):
    x = smooth()
    got = augment.geometry(x, parameters(2, **mine))
    assert_close(got, theirs(x), atol=tolerance, rtol=0)


@pytest.mark.parametrize("mine, angle, shift, scale", [
    ({"turn": math.radians(20)}, -20, [0, 0], 1),
    ({"shift_x": 1, "shift_y": -0.5}, 0, [4, -2], 1),
    ({"scale": 1.5}, 0, [0, 0], 2 ** 0.3),
    ({"turn": math.radians(-10), "scale": 1}, 10, [0, 0], 2 ** 0.2),
])
def test_geometry_is_torchvisions(mine, angle, shift, scale):
    x = smooth()
    theirs = tv.affine(x, angle, shift, scale, [0.0, 0.0],
                       interpolation=tv.InterpolationMode.BILINEAR)
    got = augment.geometry(x, parameters(2, **mine))
    assert_close(middle(got), middle(theirs), atol=0.02, rtol=0)
    assert (middle(theirs) - middle(x)).abs().max() > 0.05


def stretched(x, factor):
    """x of 32 pixels, stretched along x and shrunk along y."""
    line = (torch.arange(32) - 15.5) / 16
    grid = torch.stack(torch.meshgrid(line / factor, line * factor, indexing="xy"), 2)
    return torch.nn.functional.grid_sample(x, grid.expand(len(x), 32, 32, 2), mode="bicubic",
                                           align_corners=False)


def test_stretching_has_an_axis():
    x = smooth()

    def mine(**values):
        return middle(augment.geometry(x, parameters(2, **values)))
    assert_close(mine(stretch=1), middle(stretched(x, 2 ** 0.2)), atol=0.02, rtol=0)
    assert_close(mine(stretch=1, axis=math.pi / 2), middle(stretched(x, 2 ** -0.2)), atol=0.02,
                 rtol=0)
    diagonal = mine(stretch=1, axis=math.pi / 4)
    assert_close(diagonal, mine(stretch=-1, axis=-math.pi / 4))
    turned = torch.rot90(augment.geometry(torch.rot90(x, 1, (2, 3)), parameters(
        2, stretch=1, axis=-math.pi / 4)), -1, (2, 3))
    assert_close(diagonal, middle(turned), atol=0.02, rtol=0)
