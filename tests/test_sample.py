"""sample.py: the samplers against closed forms, per-image seeds, output files, export."""
import math

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image
from torch.testing import assert_close

import runtime
import sample
from model import UNet, UNetConfig, make_alphas_bar
from runtime import UserError

AB = make_alphas_bar()


def gaussian_eps(x, t, mean=0.3, std=0.5):
    """The exact eps of data N(mean, std^2): sqrt(1 - ab) (x - sqrt(ab) mean) / (ab std^2 + 1 - ab)."""
    a = float(AB[t])
    return math.sqrt(1 - a) * (x - math.sqrt(a) * mean) / (a * std ** 2 + 1 - a)


@pytest.mark.parametrize("name, steps, options, tolerance", [
    ("ddim", 50, {}, 0.06), ("ddim", 1000, {"eta": 1.0}, 0.02), ("ddpm", 1000, {}, 0.02), ("ddpm", 250, {}, 0.03)])
def test_samplers_draw_a_gaussian(name, steps, options, tolerance):
    g = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(20000, generator=g, dtype=torch.float64)
    x = sample.SAMPLERS[name](gaussian_eps, noise(), AB, sample.make_timesteps(1000, steps), noise, **options)
    assert abs(x.mean() - 0.3) < tolerance and abs(x.std() - 0.5) < tolerance


def test_timesteps():
    t = sample.make_timesteps(1000, 50)
    assert t[:2] == [980, 960] and t[-1] == 0 and len(t) == 50
    quad = sample.make_timesteps(1000, 50, "quad")
    assert quad[-1] == 0 and quad[0] in (799, 800) and sorted(quad, reverse=True) == quad
    with pytest.raises(UserError, match="--steps"):
        sample.make_timesteps(1000, 1001)


def test_ddpm_is_algorithm_c1():
    x = torch.tensor([0.7], dtype=torch.float64)
    z = iter([torch.tensor([0.5], dtype=torch.float64)])
    predict = lambda x, t: 0.1 * x + t
    got = sample.ddpm(predict, x, AB[:2], [1, 0], lambda: next(z))
    beta, alpha = [1 - float(AB[0]), 1 - float(AB[1] / AB[0])], [float(AB[0]), float(AB[1] / AB[0])]
    x1 = (x - beta[1] / math.sqrt(1 - float(AB[1])) * predict(x, 1)) / math.sqrt(alpha[1]) + math.sqrt(beta[1]) * 0.5
    x0 = (x1 - beta[0] / math.sqrt(1 - float(AB[0])) * predict(x1, 0)) / math.sqrt(alpha[0])
    assert torch.allclose(got, x0)


def network(cm_run, **k):
    return sample.load_network(runtime.load(cm_run / "ckpt.pt", ["diffusion"]), **k)


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0)])
def test_batch_size_changes_nothing(cm_run, cpu, sampler, eta):
    net, y, settings = network(cm_run), torch.arange(16) % 10, {"sampler": sampler, "steps": 10}
    if sampler == "ddim":
        settings["eta"] = eta
    whole = sample.draw(net, y, range(16), (1, 8, 8), cpu, **settings)
    single = torch.cat([sample.draw(net, y[i:i + 1], [i], (1, 8, 8), cpu, **settings) for i in range(16)])
    assert (whole - single).abs().max() < 1e-4
    a, b = (sample.to_uint8(x).int() for x in (whole, single))
    assert (a - b).abs().max() <= 1
    assert torch.equal(whole, sample.draw(net, y, range(16), (1, 8, 8), cpu, **settings))
    assert not torch.equal(whole, sample.draw(net, y, range(16), (1, 8, 8), cpu, seed=1, **settings))


def test_guidance(cm_run, cpu):
    net, y, x = network(cm_run), torch.tensor([3, 4]), torch.randn(2, 1, 8, 8)
    t = torch.tensor([100, 100])
    cond, null = net(x, t, y), net(x, t, torch.tensor([-1, -1]))
    assert torch.allclose(sample.guided(net, y, 1.5, cpu)(x, 100), cond + 1.5 * (cond - null))
    assert torch.equal(sample.guided(net, y, 0, cpu)(x, 100), cond)


def test_files_and_branches(cm_run, tmp_path):
    common = ("--ckpt", cm_run / "ckpt.pt", "--num", 12, "--classes", "6-9", "--steps", 3, "--device", "cpu")
    call(sample.main, *common, "--png", "--out", tmp_path / "full")
    call(sample.main, *common, "--branch", "general", "--out", tmp_path / "general")
    with np.load(tmp_path / "full/samples.npz") as f:
        images, labels = f["arr_0"], f["arr_1"]
    assert images.shape == (12, 8, 8, 3) and images.dtype == np.uint8 and labels.tolist() == [6, 7, 8, 9] * 3
    pngs = sorted((tmp_path / "full/png").rglob("*.png"))
    assert len(pngs) == 12 and {p.parent.name for p in pngs} == {"0006-6", "0007-7", "0008-8", "0009-9"}
    assert np.array_equal(np.array(Image.open(tmp_path / "full/png/0008-8/000002.png")), images[2, ..., 0])
    assert Image.open(tmp_path / "full/grid.png").height == 4 * 60
    before = (tmp_path / "full/samples.npz").stat().st_mtime_ns
    call(sample.main, *common, "--png", "--out", tmp_path / "full", "--if-needed")
    assert (tmp_path / "full/samples.npz").stat().st_mtime_ns == before
    call(sample.main, *common, "--seed", 1, "--out", tmp_path / "full", "--if-needed")
    assert (tmp_path / "full/samples.npz").stat().st_mtime_ns != before


def test_export_is_a_plain_network_that_draws_the_same_images(cm_run, cpu, tmp_path):
    call(sample.main, "--ckpt", cm_run / "ckpt.pt", "--export", tmp_path / "merged.pt", "--device", "cpu")
    exported = runtime.load(tmp_path / "merged.pt", ["diffusion"])
    plain = UNet(UNetConfig(**exported["network"]))
    plain.load_state_dict(exported["model"], strict=True)
    y = torch.arange(8)
    images = [sample.draw(n, y, range(8), (1, 8, 8), cpu, steps=5) for n in (plain, network(cm_run))]
    assert (images[0] - images[1]).abs().max() < 1e-4
    assert torch.equal(images[1], sample.draw(sample.load_network(exported), y, range(8), (1, 8, 8), cpu, steps=5))
    with pytest.raises(UserError, match="--branch general"):
        sample.load_network(exported, branch="general")


# ----------------------------------------------------------------------------------------------------------------------
# Against diffusers' schedulers, on one fixed function as the network

def bumpy(x, t):
    """A smooth, non-linear stand-in for a network."""
    return torch.tanh(0.8 * x + math.sin(t / 150)) + 0.1 * x.flip(-1)


def by_diffusers(scheduler, timesteps, x, generator=None):
    for t in timesteps:
        step = scheduler.step(bumpy(x, int(t)), int(t), x, **({"generator": generator} if generator else {}))
        x = step.prev_sample
    return x


def start():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_ddim_is_diffusers():
    from diffusers import DDIMScheduler
    theirs = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)            # its defaults: the linear schedule
    theirs.set_timesteps(50)
    assert theirs.timesteps.tolist() == sample.make_timesteps(1000, 50)
    got = sample.ddim(bumpy, start(), AB, sample.make_timesteps(1000, 50), None)
    assert_close(got, by_diffusers(theirs, theirs.timesteps, start()), atol=1e-3, rtol=1e-3)


def test_ddpm_is_diffusers():
    from diffusers import DDPMScheduler
    theirs = DDPMScheduler(clip_sample=False, variance_type="fixed_large")
    theirs.set_timesteps(1000)
    g1, g2 = (torch.Generator().manual_seed(1) for _ in range(2))
    got = sample.ddpm(bumpy, start(), AB, sample.make_timesteps(1000, 1000),
                      lambda: torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=g1))
    assert_close(got, by_diffusers(theirs, theirs.timesteps, start(), g2), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("steps", [10, 15, 20])
def test_dpmpp_is_diffusers(steps):
    from diffusers import DPMSolverMultistepScheduler
    theirs = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero",
                                         timestep_spacing="leading")
    theirs.set_timesteps(steps)
    ours = [int(t) for t in theirs.timesteps]
    got = sample.dpmpp(bumpy, start(), AB, ours, None)
    assert_close(got, by_diffusers(theirs, theirs.timesteps, start()), atol=1e-3, rtol=1e-3)


def test_dpmpp_beats_ddim_on_the_default_grid():
    """15 steps to t = 0 on narrow modes, whose exact score is known, against a thousand steps of DDIM."""
    g = torch.Generator().manual_seed(0)
    modes, x_T = torch.randn(8, 2, generator=g, dtype=torch.float64), torch.randn(500, 2, generator=g, dtype=torch.float64)

    def predict(x, t):
        variance = AB[t] * 0.05 ** 2 + 1 - AB[t]
        gap = x[:, None] - AB[t].sqrt() * modes
        share = (-gap.square().sum(2) / (2 * variance)).softmax(1)
        return (1 - AB[t]).sqrt() * (share[:, :, None] * gap).sum(1) / variance
    exact = sample.ddim(predict, x_T, AB, sample.make_timesteps(1000, 1000), None)
    second, first = ((f(predict, x_T, AB, sample.make_timesteps(1000, 15), None) - exact).square().mean().sqrt() for f in (sample.dpmpp, sample.ddim))
    assert second < 0.8 * first, (second, first)


def test_dpmpp_is_of_second_order():
    """On a Gaussian, along whose flow (x_t - sqrt(ab) mean) / spread(t) is constant: halving the steps, a quarter of the error."""
    mean, std, N = 0.3, 0.5, 1280
    ab = torch.sigmoid(2 * torch.linspace(3, -3, N + 1, dtype=torch.float64))      # uniform in log(alpha / sigma)
    x_T = torch.tensor([1.3, -0.4], dtype=torch.float64)

    def spread(t):
        return torch.sqrt(ab[t] * std ** 2 + 1 - ab[t])

    def predict(x, t):
        return torch.sqrt(1 - ab[t]) * (x - torch.sqrt(ab[t]) * mean) / spread(t) ** 2

    def error(sampler, steps):
        seen = {}

        def watch(x, t):
            seen[t] = x
            return predict(x, t)
        sampler(watch, x_T, ab, [N * i // steps for i in range(steps, -1, -1)], None)
        exact = torch.sqrt(ab[0]) * mean + spread(0) * (x_T - torch.sqrt(ab[N]) * mean) / spread(N)
        return (seen[0] - exact).abs().max().item()
    second, first = ([error(s, n) for n in (20, 40, 80, 160)] for s in (sample.dpmpp, sample.ddim))
    for errors, order in ((second, 2), (first, 1)):
        assert all(abs(math.log2(a / b) - order) < 0.3 for a, b in zip(errors, errors[1:])), errors
    assert second[-1] < first[-1] / 10
