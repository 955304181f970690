"""consistency.py against literal versions and the exact solution of a Gaussian; runs, refusals."""
import math

import numpy as np
import pytest
import torch
from conftest import a_step, assert_equal, call, ckpt_of, gradient_of
from scipy.stats import chisquare, norm
from torch import nn
from torch.testing import assert_close

import train
from losses import Predictions
from model import make_alphas_bar, q_sample, signal_and_sigma
from variants import consistency

AB = make_alphas_bar()
ROOTS = signal_and_sigma(AB)
SIGMA = [math.sqrt((1 - a) / a) for a in AB.tolist()]


def literal_f(F, x_ve, sigma):
    """f as Song et al., 2023, App. C, print it: variance-exploding, x_ve = x_0 + sigma eps."""
    skip = 0.25 / ((sigma - SIGMA[0]) ** 2 + 0.25)
    out = 0.5 * (sigma - SIGMA[0]) / math.sqrt(sigma ** 2 + 0.25)
    return skip * x_ve + out * F


def literal_grid(N, kind):
    """The timesteps of N intervals: in equal parts of t, or of sigma^(1/7), without twins."""
    if kind == "uniform":
        return [j * 999 // N for j in range(N + 1)]
    roots = np.array(SIGMA) ** (1 / 7)
    return np.unique([np.abs(roots - r).argmin()
                      for r in np.linspace(roots[0], roots[-1], N + 1)]).tolist()


def intervals_of(N, kind="uniform"):
    """The grid of N intervals, the probability of each, and its weight.

    The weight is iCT's over the mean effect of such weights on F.
    """
    grid = literal_grid(N, kind)
    pairs = list(zip(grid, grid[1:]))
    cdf = norm.cdf([(math.log(SIGMA[t]) + 1.1) / 2 for t in grid])
    probability = np.diff(cdf) / np.diff(cdf).sum()
    weights = np.array([1 / (SIGMA[above] - SIGMA[below]) for below, above in pairs])
    c_out = [literal_f(1, 0, SIGMA[above]) for _, above in pairs]
    return grid, probability, weights / (probability * weights * c_out).sum()


def literal_huber(difference):
    """||.|| as iCT prints it, sqrt(||d||^2 + c^2) - c with c = 0.00054 sqrt(D), over sqrt(D)."""
    D = difference.numel()
    c = 0.00054 * math.sqrt(D)
    return (math.sqrt(difference.square().sum() + c ** 2) - c) / math.sqrt(D)


def test_loss(digits):
    objective, batch = a_step(digits, "consistency", rank_ratio=None, ct_double=1)
    grid, _, weights = intervals_of(80)                         # at step 3
    pairs = list(zip(batch.t.tolist(), batch.pair[0].tolist()))
    expected = []
    for x_0, eps, y, pair in zip(batch.x_0.double(), batch.eps.double(), batch.y_cond, pairs):
        f = []
        for t in pair:
            x_ve = x_0 + SIGMA[t] * eps
            x_t = (x_ve * math.sqrt(AB[t]))[None].float()
            with torch.no_grad():
                F = objective.net(x_t, torch.tensor([t]), y[None])[0].double()
            f.append(literal_f(F, x_ve, SIGMA[t]))
        t, t_below = pair
        assert grid[grid.index(t) - 1] == t_below
        expected.append(literal_huber(f[0] - f[1]) * weights[grid.index(t_below)])
    total, terms, _ = objective(batch)
    assert total.item() == pytest.approx(np.mean(expected), rel=1e-3)
    assert set(terms) == {"base"}


def test_only_the_noisier_prediction_is_trained(digits):
    """The gradient is that of the loss with the target as a constant."""
    objective, batch = a_step(digits, "consistency", rank_ratio=None)

    def f(t):
        x_t = q_sample(batch.x_0, t, batch.eps, *ROOTS)
        factors = objective.x_t_factor, objective.F_factor
        return consistency.to_x_0(objective.net(x_t, t, batch.y_cond), x_t, t, *factors)
    t_below, weight = batch.pair
    error = (f(batch.t) - f(t_below).detach()).square().flatten(1).mean(1)
    expected = (weight * ((error + 0.00054 ** 2).sqrt() - 0.00054)).mean()
    got, expected = (gradient_of(loss, objective.net) for loss in (objective(batch)[0], expected))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_both_points_have_the_same_masks_and_the_same_augmentation(digits):
    """Where t' is t, the two predictions are one: nothing is left of the loss."""
    objective, batch = a_step(digits, "consistency", dropout=0.3)
    net = objective.net
    net.encoder.embedding.augment = nn.Linear(4, 4 * net.cfg.ch, bias=False)
    batch = batch._replace(augmentation=torch.randn(12, 4), pair=(batch.t, batch.pair[1]))
    masks = batch.masks
    assert objective(batch)[1]["base"].item() == 0
    for other in ({"masks": masks._replace(encode=[])}, {"masks": masks._replace(decode=[])},
                  {"augmentation": None}):
        x_t = q_sample(batch.x_0, batch.t, batch.eps, *ROOTS)
        pred = Predictions(net, batch._replace(**other), x_t)
        assert consistency.loss(pred, batch, objective)[0] > 0


@pytest.mark.parametrize("step, N, kind", [(0, 10, "karras"), (250, 40, "uniform"),
                                           (900, 640, "karras")])
def test_pairs_are_drawn_by_noise_level(step, N, kind):
    grid, probability, weights = intervals_of(N, kind)
    g = torch.Generator().manual_seed(step)
    t, (below, weight) = consistency.draw_pairs(AB, 20_000, step, g, ct_double=100, ct_grid=kind)
    assert weight.dtype == torch.float32
    assert set(zip(t.tolist(), below.tolist())) <= set(zip(grid[1:], grid[:-1]))
    intervals = np.searchsorted(grid, below.numpy())
    np.testing.assert_allclose(weight.numpy(), weights[intervals], rtol=1e-5)
    expected = 20_000 * probability
    kept = expected > 5
    seen = np.bincount(intervals, minlength=len(probability))[kept]
    expected = expected[kept] * seen.sum() / expected[kept].sum()
    assert chisquare(seen, expected).pvalue > 1e-3


def gaussian_F(x, t, mean=0.3, std=0.5):
    """The output F whose f is exact for data N(mean, std^2).

    f solves the probability-flow ODE down to sigma_0.
    """
    sigma = SIGMA[t]
    x_ve = x / math.sqrt(AB[t])
    ratio = math.sqrt((std ** 2 + SIGMA[0] ** 2) / (std ** 2 + sigma ** 2))
    f = mean + ratio * (x_ve - mean)
    return (f - literal_f(0, x_ve, sigma)) / literal_f(1, 0, sigma)


def test_noise_between_two_calls():
    """x_0 has sigma_0's noise already, so that sqrt(sigma_t^2 - sigma_0^2) is added."""
    seen = []

    def predict(x, t):
        seen.append(x)
        return torch.zeros_like(x)
    x, z = torch.randn(2, 1, 2, 2, dtype=torch.float64), torch.ones(2, 1, 2, 2).double()
    consistency.sample(predict, x, AB, [999, 249], lambda: z)
    added = math.sqrt(SIGMA[249] ** 2 - SIGMA[0] ** 2)
    x_0 = literal_f(0, x / math.sqrt(AB[999]), SIGMA[999])
    assert_close(seen[1], math.sqrt(AB[249]) * (x_0 + added * z), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 31])
def test_samples_of_a_gaussian_are_gaussian(steps):
    g = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(20_000, 1, 1, 1, generator=g, dtype=torch.float64)
    timesteps = consistency.make_timesteps(1000, steps)
    assert timesteps[0] == 999 and len(timesteps) == steps
    assert timesteps == sorted(set(timesteps), reverse=True)
    x = consistency.sample(gaussian_F, noise(), AB, timesteps, noise)
    assert abs(x.mean() - 0.3) < 0.015 and abs(x.std() - 0.5) < 0.015


def test_a_run_resumes_bit_for_bit(tmp_path, tiny):
    """Its curriculum is that of the steps at the start."""
    flags = (*tiny, "--base", "consistency", "--out")
    call(train.main, *flags, tmp_path / "whole", "--steps", 12, "--ct-double", 2)
    for steps in (8, 12):                                               # --ct-double: a quarter
        call(train.main, *flags, tmp_path / "parts", "--steps", steps)
    a, b = (ckpt_of(tmp_path / name) for name in ("whole", "parts"))
    assert_equal(a["ema"], b["ema"])
    assert b["config"]["ct_double"] == 2
