"""consistency.py against literal versions, its boundary and the exact solution of a Gaussian; training, samples, refusals."""
import math

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, call
from scipy.stats import chisquare, norm
from test_losses import AB, setup
from test_mistakes import refuses

import capacity_probe
import consistency
import evaluate
import prune_probe
import runtime
import sample
import train
from losses import Predictions, draw
from model import q_sample

SIGMA = [math.sqrt((1 - a) / a) for a in AB.tolist()]


def literal_f(F, x_ve, sigma):
    """Song et al., 2023, App. C, in the variance-exploding terms in which it is printed: x_ve = x_0 + sigma eps."""
    skip = 0.25 / ((sigma - SIGMA[0]) ** 2 + 0.25)
    out = 0.5 * (sigma - SIGMA[0]) / math.sqrt(sigma ** 2 + 0.25)
    return skip * x_ve + out * F


def interval_law(N):
    """The grid of N intervals, the chance of each, and its iCT weight over the mean effect of such weights on F."""
    grid = [j * 999 // N for j in range(N + 1)]
    pairs = list(zip(grid, grid[1:]))
    law = np.array([norm.cdf((math.log(SIGMA[b]) + 1.1) / 2) - norm.cdf((math.log(SIGMA[a]) + 1.1) / 2) for a, b in pairs])
    law /= law.sum()
    weights = np.array([1 / (SIGMA[b] - SIGMA[a]) for a, b in pairs])
    return grid, law, weights / sum(p * w * literal_f(1, 0, SIGMA[b]) for p, w, (_, b) in zip(law, weights, pairs))


def test_loss(digits):
    o, b = setup(digits, "consistency", rank_ratio=None, ct_double=1)           # step 3: 80 intervals
    grid, _, weights = interval_law(80)
    expected = []
    for x_0, eps, t, s, y in zip(b.x_0.double(), b.eps.double(), b.t.tolist(), b.t_below.tolist(), b.y_in):
        f = []
        for u in (t, s):
            x_ve = x_0 + SIGMA[u] * eps
            with torch.no_grad():
                F = o.net((x_ve * math.sqrt(AB[u]))[None].float(), torch.tensor([u]), y[None])[0].double()
            f.append(literal_f(F, x_ve, SIGMA[u]))
        D = f[0].numel()
        huber = math.sqrt((f[0] - f[1]).square().sum() + 0.00054 ** 2 * D) - 0.00054 * math.sqrt(D)     # as iCT prints it
        assert grid[grid.index(t) - 1] == s
        expected.append(huber / math.sqrt(D) * weights[grid.index(s)])
    total, terms, _ = o(b)
    assert total.item() == pytest.approx(np.mean(expected), rel=1e-3) and set(terms) == {"base"}


def test_only_the_noisier_prediction_is_trained(digits):
    """The gradient is that of the loss with the target as a constant."""
    o, b = setup(digits, "consistency", rank_ratio=None)
    o(b)[0].backward()
    got = torch.cat([p.grad.flatten() for p in o.net.parameters() if p.grad is not None])
    o.zero_grad()

    def f(t):
        x_t = q_sample(b.x_0, t, b.eps, AB)
        return consistency.to_x_0(o.net(x_t, t, b.y_in), x_t, t, AB)
    error = (f(b.t) - f(b.t_below).detach()).square().flatten(1).mean(1)
    (b.weight * ((error + 0.00054 ** 2).sqrt() - 0.00054)).mean().backward()
    torch.testing.assert_close(got, torch.cat([p.grad.flatten() for p in o.net.parameters() if p.grad is not None]), rtol=1e-3, atol=1e-5)


def test_boundary():
    """At t = 0 the function is the identity, whatever the network says."""
    x, t = torch.randn(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(consistency.to_x_0(torch.randn_like(x) * 100, x, t, AB), x / math.sqrt(AB[0]))


def test_curriculum(digits):
    assert [consistency.intervals(s, 500) for s in (0, 499, 500, 1000, 2999, 3000, 10 ** 6)] == [10, 10, 20, 40, 320, 640, 640]
    o, _ = setup(digits, "consistency", rank_ratio=None, ct_double=100)
    for step, N in ((0, 10), (250, 40), (900, 640)):
        grid, law, weights = interval_law(N)
        g = torch.Generator().manual_seed(step)
        t, below, weight = consistency.draw_pairs(o, 20_000, step, g)
        assert set(zip(t.tolist(), below.tolist())) <= set(zip(grid[1:], grid[:-1]))
        np.testing.assert_allclose(weight.numpy(), weights[np.searchsorted(grid, below.numpy())], rtol=1e-5)
        expected = 20_000 * law
        seen, kept = np.array([(below == a).sum() for a in grid[:-1]]), expected > 5
        assert chisquare(seen[kept], expected[kept] * seen[kept].sum() / expected[kept].sum()).pvalue > 1e-3


def gaussian_F(x, t, mean=0.3, std=0.5):
    """The output F whose f is the exact solution for data N(mean, std^2) of the probability-flow ODE, down to sigma_0."""
    sigma = SIGMA[t]
    x_ve = x / math.sqrt(AB[t])
    f = mean + math.sqrt((std ** 2 + SIGMA[0] ** 2) / (std ** 2 + sigma ** 2)) * (x_ve - mean)
    return (f - literal_f(0, x_ve, sigma)) / literal_f(1, 0, sigma)


def test_the_gradient_in_F_does_not_grow_with_the_curriculum(digits):
    """So that L_CM and the clipping keep their share: per image the mean of |d base / d F| is the same at 10 and at 640 intervals."""
    norms = []
    for step in (0, 6):
        o, _ = setup(digits, "consistency", rank_ratio=None, ct_double=1)
        x_0 = torch.randn(512, 1, 8, 8) / 2
        b = draw(x_0, torch.arange(512) % 10, o, seed=0, step=step)
        p = Predictions(o.net, b, q_sample(b.x_0, b.t, b.eps, AB))
        norms.append(torch.autograd.grad(consistency.consistency(p, b, o)["base"] * 512, p.eps)[0].flatten(1).norm(dim=1).mean().item() * 8)
    assert norms == pytest.approx([1, 1], rel=0.25)            # rms Huber: a unit vector over sqrt(64), times c_out w


@pytest.mark.parametrize("steps", [1, 2, 5, 31])
def test_sampler_draws_a_gaussian(steps):
    g = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(20_000, 1, 1, 1, generator=g, dtype=torch.float64)
    timesteps = consistency.make_timesteps(1000, steps)
    assert timesteps[0] == 999 and len(timesteps) == steps and timesteps == sorted(set(timesteps), reverse=True)
    calls = []
    x = consistency.sample(lambda x, t: calls.append(t) or gaussian_F(x, t), noise(), AB, timesteps, noise)
    assert calls == timesteps and abs(x.mean() - 0.3) < 0.015 and abs(x.std() - 0.5) < 0.015


def test_resampling_leaves_the_last_noise_alone():
    """Of one constant image, however many steps: what is left is sigma_0, not more."""
    g = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(20_000, 1, 1, 1, generator=g, dtype=torch.float64)
    for steps in (1, 2, 31):
        x = consistency.sample(lambda x, t: gaussian_F(x, t, std=1e-9), noise(), AB, consistency.make_timesteps(1000, steps), noise)
        assert x.std() == pytest.approx(SIGMA[0], rel=0.03)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir):
    """The folders of a short consistency run with and without CM."""
    out = tmp_path_factory.mktemp("consistency")
    for name, flag in (("plain", "--no-cm"), ("cm", "--cm")):
        call(train.main, *TINY_FLAGS, "--base", "consistency", flag, "--steps", 12, "--ct-double", 4, "--data-dir", data_dir, "--out", out / name,
             "--sample-every", 12)
    return out


def test_a_run_resumes_bit_for_bit(runs, tmp_path, data_dir):
    for steps in (5, 12):
        call(train.main, *TINY_FLAGS, "--base", "consistency", "--cm", "--steps", steps, "--ct-double", 4, "--data-dir", data_dir, "--out", tmp_path)
    a, b = (runtime.load(p / "ckpt.pt", ["consistency"]) for p in (runs / "cm", tmp_path))
    assert all(torch.equal(a["ema"][n], b["ema"][n]) for n in a["ema"]) and a["step"] == b["step"] == 12


def test_the_curriculum_is_that_of_the_steps_at_the_start(tmp_path, data_dir):
    for steps in (8, 12):                   # trained longer, it stays what it was
        call(train.main, *TINY_FLAGS, "--base", "consistency", "--no-cm", "--steps", steps, "--data-dir", data_dir, "--out", tmp_path)
        assert runtime.load(tmp_path / "ckpt.pt", ["consistency"])["config"]["ct_double"] == 2


def test_samples_and_metrics(runs, tmp_path, data_dir, classifier, capsys):
    assert (runs / "cm/grid-0000012.png").exists()
    for name, branch in (("plain", "full"), ("cm", "full"), ("cm", "general")):
        call(sample.main, "--ckpt", runs / name / "ckpt.pt", "--branch", branch, "--num", 20, "--out", tmp_path / name, "--device", "cpu")
        settings = runtime.read_json(tmp_path / name / "samples.json")["settings"]
        assert (settings["sampler"], settings["steps"], settings["guidance"]) == ("consistency", 2, 0)
    call(evaluate.main, "--ckpt", runs / "cm/ckpt.pt", "--num", 40, "--steps", 1, "--data-dir", data_dir, "--features", classifier, "--device", "cpu",
         "--out-json", tmp_path / "e.json")
    assert runtime.read_json(tmp_path / "e.json")["settings"]["steps"] == 1


def test_mistakes(runs, cm_run, tmp_path, data_dir, capsys):
    ckpt = runs / "plain/ckpt.pt"
    refuses(capsys, sample.main, "--ckpt", ckpt, "--sampler", "ddim", says=["--sampler ddim", "consistency"])
    refuses(capsys, sample.main, "--ckpt", cm_run / "ckpt.pt", "--sampler", "consistency", says=["--sampler consistency", "diffusion"])
    refuses(capsys, sample.main, "--ckpt", ckpt, "--guidance", 1.5, says=["--guidance"])
    refuses(capsys, sample.main, "--ckpt", ckpt, "--steps", 32, says=["--steps 32"])
    refuses(capsys, sample.main, "--ckpt", ckpt, "--grid", "quad", says=["--grid"])
    refuses(capsys, sample.main, "--ckpt", ckpt, "--eta", 0.5, says=["--eta", "ddim"])
    refuses(capsys, prune_probe.main, "--ckpt", ckpt, says=["--ckpt", "not a diffusion"])
    refuses(capsys, capacity_probe.main, "dominance", "--ckpt", ckpt, says=["--ckpt", "not a diffusion"])
    refuses(capsys, train.main, *TINY_FLAGS, "--base", "ddpm", "--no-cm", "--steps", 15, "--data-dir", data_dir, "--out", runs / "plain",
            says=["--base ddpm", "consistency"])
    refuses(capsys, train.main, *TINY_FLAGS, "--base", "ddpm", "--lora", "--init-from", ckpt, "--data-dir", data_dir, "--out", tmp_path / "x",
            says=["--init-from", "not a diffusion"])
