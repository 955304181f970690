"""sample.py: the samplers against diffusers', per-image seeds, output files, export."""
import json
import math
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (ROOT, TINY, assert_equal, call, ckpt_of, pixels, randomize, refuses,
                      tiny_net)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

import disk
import evaluate
import networks
import runtime
import sample
import samplers
from cm_layers import merge, reserved
from model import UNet, UNetConfig, make_alphas_bar
from runtime import UserError

AB = make_alphas_bar()
SHAPE = (1, 8, 8)           # of a digit


def test_timesteps():
    quad = samplers.make_timesteps(AB, 50, "quad")
    assert quad[-1] == 0 and quad[0] in (799, 800) and sorted(quad, reverse=True) == quad
    assert all(abs(t - (i / 49) ** 2 * 800) <= 1 for i, t in enumerate(quad[::-1]))
    for grid in ("uniform", "logsnr"):
        with pytest.raises(UserError, match="--steps"):
            samplers.make_timesteps(AB, 1001, grid)
    assert samplers.Sampling("dpm", 4).timesteps(AB) == [800, 600, 400, 200]
    assert samplers.Sampling("dpm++", 4).timesteps(AB) == [750, 500, 250, 0]
    assert samplers.Sampling("dpm", 999).timesteps(AB) == list(range(999, 0, -1))


def test_the_logsnr_grid():
    """Equal parts of log(alpha / sigma), as near as whole timesteps come to them."""
    t = samplers.make_timesteps(AB, 15, "logsnr")
    log_snr = (AB[t] / (1 - AB[t])).log() / 2
    assert (t[0], t[-1]) == (999, 0)
    widths = log_snr.diff()
    assert (widths[:-2] / widths.mean() - 1).abs().max() < 0.02     # at 8, 2 and 0 it is coarser
    assert (widths / widths.mean() - 1).abs().max() < 0.15
    many = samplers.make_timesteps(AB, 200, "logsnr")                 # many fall on one timestep
    assert many == sorted(set(many), reverse=True) and len(many) == 200
    assert many[0] == 999 and many[-50:] == list(range(49, -1, -1))


def test_settings_of_the_default_command():
    def record(kind):
        return sample.sampling_of(args, {"kind": kind, "config": {}}).record()
    parser = sample.make_parser()
    args = parser.parse_args(["--ckpt", "ckpt.pt"])
    settings = {"seed": 0, "sampler": "ddim", "grid": "uniform", "eta": 0.0, "guidance": 1.5,
                "steps": 50, "clip": True}
    assert record("diffusion") == settings
    assert record("latent") == {**settings, "clip": False}
    assert record("consistency") == {
        **settings, "sampler": "consistency", "steps": 2, "guidance": 0.0, "clip": False}
    assert (args.branch, args.weights, args.num) == ("full", "ema", 100)
    args = parser.parse_args(["--ckpt", "ckpt.pt", "--sampler", "dpm", "--no-clip"])
    changed = {"sampler": "dpm", "steps": 15, "clip": False, "order": 3}
    assert record("diffusion") == {**settings, **changed}


@pytest.mark.parametrize("kind, flag, others", [
    ("latent", "--clip", []), ("diffusion", "--sampler consistency", []),
    ("consistency", "--sampler ddim", []), ("consistency", "--guidance 1", []),
    ("consistency", "--steps 40", []), ("diffusion", "--steps 1000", ["--sampler", "dpm"]),
    ("diffusion", "--grid quad", ["--sampler", "dpm"]), ("diffusion", "--order 2", []),
    ("diffusion", "--eta 0.5", ["--sampler", "ddpm"])])
def test_settings_that_a_sampler_has_no_use_for(kind, flag, others):
    flag = flag.split()
    args = sample.make_parser().parse_args(["--ckpt", "ckpt.pt", *flag, *others])
    with pytest.raises(UserError, match=flag[0]):
        sample.sampling_of(args, {"kind": kind, "config": {}})


def test_the_noise_of_eta_is_equation_16s():
    """Song et al.: sigma^2 = eta^2 (1 - ab_next) / (1 - ab) (1 - ab / ab_next), on a wide step."""
    x = torch.ones(1, dtype=torch.float64)
    ab, ab_0 = float(AB[600]), float(AB[200])
    sigma = 0.5 * math.sqrt((1 - ab_0) / (1 - ab) * (1 - ab / ab_0))
    x_200 = math.sqrt(ab_0 / ab) + 2 * sigma
    got = samplers.ddim(lambda x, t: 0 * x, x, AB, [600, 200], lambda: 2 * x, eta=0.5)
    assert_close(got, x * x_200 / math.sqrt(ab_0))


def network(cm_run, **options):
    """The merged network of a run."""
    return sample.load_merged(ckpt_of(cm_run), **options)


@pytest.mark.parametrize("changed", [
    {}, {"guidance": 0.0}, {"guidance": 3.0}, {"clip": True}, {"eta": 0.7}, {"grid": "quad"},
    {"seed": 4}, {"sampler": "ddpm", "steps": 5}, {"sampler": "dpm++", "grid": "logsnr"},
    {"sampler": "dpm", "order": 2, "clip": True}, {"alphas_bar": AB[:500]}], ids=",".join)
def test_a_batch_is_what_its_settings_say(changed, cpu):
    """The sampler called by hand, with noise from (seed, number of the image)."""
    net = tiny_net(None)
    y, numbers = torch.tensor([3, 3, 7]), [5, 8, 2]
    given = {"steps": 4, **changed}
    ab = given.pop("alphas_bar", AB)
    sampling = samplers.Sampling(**given)
    got = sample.sample_batch(net, y, numbers, SHAPE, cpu, sampling, ab)
    generators = [runtime.generator("cpu", sampling.seed, "image", i) for i in numbers]

    def noise():
        return torch.stack([torch.randn(SHAPE, generator=g) for g in generators])
    own = {name: changed[name] for name in ("eta", "order") if name in changed}
    with torch.no_grad():
        expected = samplers.SAMPLERS[sampling.sampler](
            sample.guided(net, y, sampling.guidance, cpu), noise(), ab, sampling.timesteps(ab),
            noise, samplers.to_range if sampling.clip else None, **own)
    assert_close(got, expected, atol=1e-4, rtol=1e-4)
    plain = sample.sample_batch(net, y, numbers, SHAPE, cpu, samplers.Sampling(steps=4))
    assert torch.allclose(got, plain, atol=0.01, rtol=0) == (not changed)


def test_guidance(cm_run, cpu):
    net = network(cm_run)
    y = torch.tensor([3, 4])
    x = torch.randn(2, *SHAPE)
    t = torch.tensor([100, 100])
    cond = net(x, t, y)
    null = net(x, t, torch.tensor([-1, -1]))
    guided = sample.guided(net, y, 1.5, cpu)(x, 100)
    assert torch.allclose(guided, cond + 1.5 * (cond - null))
    labels = []

    def watched(x, t, y):
        labels.append(y.tolist())
        return net(x, t, y)
    assert torch.equal(sample.guided(watched, y, 0, cpu)(x, 100), cond)
    assert labels == [[3, 4]]           # half the time: no pass for Null


@pytest.mark.parametrize("weights, branch", [("ema", "full"), ("ema", "general"), ("raw", "full")])
def test_load_merged_is_load_unmerged_merged(cm_run, weights, branch):
    """And that has the tensors of the checkpoint itself: W^g, A and B."""
    ckpt = ckpt_of(cm_run)
    unmerged = networks.load_unmerged(ckpt, weights)
    assert_equal(unmerged.state_dict(), ckpt["model" if weights == "raw" else "ema"])
    assert all(part.B.abs().max() > 0 for _, _, part in reserved(unmerged.decoder))
    loaded = sample.load_merged(ckpt, weights, branch)
    assert_equal(loaded.state_dict(), merge(unmerged, branch).state_dict())
    assert not list(reserved(loaded)) and not any(p.requires_grad for p in loaded.parameters())


def test_files_and_branches(from_run, tmp_path, capsys):
    common = (*from_run, "--num", 12, "--classes", "6-9", "--steps", 3)
    full = tmp_path / "full"
    call(sample.main, *common, "--png", "--out", full)
    call(sample.main, *common, "--branch", "general", "--out", tmp_path / "general")
    images, labels = np.load(full / "samples.npz").values()
    assert images.shape == (12, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [6, 7, 8, 9] * 3
    pngs = list((full / "png").rglob("*.png"))
    assert len(pngs) == 12
    assert {p.parent.name for p in pngs} == {"0006-6", "0007-7", "0008-8", "0009-9"}
    assert np.array_equal(Image.open(full / "png/0008-8/000002.png"), images[2, ..., 0])
    assert (full / "grid.png").exists() and (pixels(tmp_path / "general") != images).any()
    # PNGs of an earlier call are replaced, without --png as well; those of another program stay
    call(sample.main, *common, "--num", 4, "--out", full)
    assert len(list((full / "png").rglob("*.png"))) == 4
    before = (full / "samples.npz").read_bytes()
    (full / "png/0006-6/mine.png").write_bytes(b"mine")
    refuses(capsys, sample.main, *common, "--png", "--out", full, says=["--png"])
    assert (full / "png/0006-6/mine.png").read_bytes() == b"mine"
    assert (full / "samples.npz").read_bytes() == before


def test_what_classes_lack_is_filled(from_run, tmp_path, capsys):
    """Up to a number, or to the largest class; the training images count."""
    flags = (*from_run, "--steps", 1, "--guidance", 0, "--out", tmp_path)
    for more, made in ((["--fill-to", 12], [0] * 8 + [2, 5]),
                       (["--classes", "7-8", "--fill-to"], [0] * 7 + [134, 138])):
        call(sample.main, *flags, *more)
        assert np.bincount(np.load(tmp_path / "samples.npz")["arr_1"]).tolist() == made
    for more in (("--fill-to", 7), ("--fill-to", 9, "--classes", "null")):
        refuses(capsys, sample.main, *flags, *more, says=["--fill-to"])
    refuses(capsys, sample.main, *flags, "--fill-to", 9, "--num", 9, says=["--num"])


SHORT = ("--num", 6, "--classes", "6-8", "--steps", 2)


def test_if_needed(from_run, tmp_path):
    """Nothing is done where these settings and this checkpoint made what is there."""
    def made_again(*more):
        npz = tmp_path / "samples.npz"
        before = npz.stat().st_mtime_ns if npz.exists() else None
        call(sample.main, *from_run, *SHORT, "--out", tmp_path, "--if-needed", *more)
        return npz.stat().st_mtime_ns != before
    assert made_again() and not made_again()
    assert made_again("--seed", 1)
    assert made_again("--seed", 1, "--png") and not made_again("--seed", 1, "--png")
    for name in ("grid.png", "samples.json", "samples.npz"):
        (tmp_path / name).unlink()
        assert made_again("--seed", 1), name


@pytest.fixture
def batches(monkeypatch):
    """made: the images' numbers of each batch that is generated; stop: after how many it fails."""
    batches, sample_batch = SimpleNamespace(made=[], stop=None), sample.sample_batch

    def counted(net, y, indices, *args):
        if len(batches.made) == batches.stop:
            raise KeyboardInterrupt
        batches.made.append(indices)
        return sample_batch(net, y, indices, *args)
    monkeypatch.setattr(sample, "sample_batch", counted)
    return batches


def stopped(batches, main, *flags, after):
    """Call a script, which is stopped after some batches."""
    batches.made.clear()
    batches.stop = after
    with pytest.raises(KeyboardInterrupt):
        call(main, *flags)
    batches.made.clear()
    batches.stop = None


def test_a_stopped_call_goes_on(from_run, tmp_path, batches, capsys):
    """The same images to the last bit, those that were finished from the disk."""
    flags = (*from_run, "--num", 23, "--steps", 2, "--batch-size", 6, "--out")
    call(sample.main, *flags, tmp_path / "whole")
    whole = list(batches.made)
    stopped(batches, sample.main, *flags, tmp_path, after=2)
    assert not (tmp_path / "samples.npz").exists()
    (kept,) = (tmp_path / "unfinished").iterdir()
    (kept / ".12-17.npz.1.tmp").write_bytes(b"of a process that was killed")
    call(sample.main, *flags, tmp_path)
    assert batches.made == whole[2:] and "going on from image 12 of 23" in capsys.readouterr().out
    assert np.array_equal(pixels(tmp_path), pixels(tmp_path / "whole"))
    assert not (tmp_path / "unfinished").exists()

    # In other batches those that are not whole are generated again
    stopped(batches, sample.main, *flags, tmp_path, after=2)
    call(sample.main, *flags, tmp_path, "--batch-size", 5)
    assert batches.made == [list(range(10, 15)), list(range(15, 19)), list(range(19, 23))]
    assert np.abs(pixels(tmp_path) - pixels(tmp_path / "whole")).max() <= 1


def test_other_settings_start_anew_and_say_so(from_run, tmp_path, batches, capsys):
    flags = (*from_run, *SHORT, "--batch-size", 2, "--out")
    for out in ("twice", "whole"):
        call(sample.main, *flags, tmp_path / out)
    assert "replaces" not in capsys.readouterr().out
    other = (*flags, tmp_path / "twice", "--guidance", 0, "--classes", "6-7")
    stopped(batches, sample.main, *other, after=1)
    said = capsys.readouterr().out
    assert "guidance 1.5, classes [6, 7, 8]" in said and "steps" not in said
    call(sample.main, *flags, tmp_path / "twice")       # the first settings: images of the second
    assert len(batches.made) == 3 and "removed" in capsys.readouterr().out
    assert np.array_equal(pixels(tmp_path / "twice"), pixels(tmp_path / "whole"))


def test_evaluate_keeps_its_images(from_run, classifier, data_dir, tmp_path, batches, capsys):
    """A stopped call goes on; other metrics of the same images do not generate them again."""
    measure = ("--features", classifier, "--data-dir", data_dir, "--out-json")
    flags = (*from_run, "--num", 30, "--steps", 2, "--batch-size", 10, *measure)
    call(evaluate.main, *flags, tmp_path / "whole/eval.json")
    stopped(batches, evaluate.main, *flags, tmp_path / "eval.json", after=1)
    call(evaluate.main, *flags, tmp_path / "eval.json")
    assert len(batches.made) == 2 and "going on from image 10 of 30" in capsys.readouterr().out
    found = disk.read_json(tmp_path / "eval.json")
    assert found["fd"] == disk.read_json(tmp_path / "whole/eval.json")["fd"]
    call(evaluate.main, *flags, tmp_path / "test.json", "--reference-split", "test")
    assert len(batches.made) == 2
    (kept,) = tmp_path.glob("eval-samples-*/samples.npz")
    call(evaluate.main, "--samples", kept, "--device", "cpu", *measure, tmp_path / "samples.json")
    assert disk.read_json(tmp_path / "samples.json")["fd"] == found["fd"]
    call(evaluate.main, *flags, tmp_path / "other.json", "--guidance", 0)
    assert len(batches.made) == 5


@pytest.mark.slow
def test_a_killed_call_goes_on(from_run, tmp_path):
    """After kill -9 in the middle of a batch, and of its writing."""
    flags = (*from_run, "--num", 400, "--steps", 2, "--batch-size", 4, "--seed", 3, "--out")
    for number in (2, 30, 60):
        p = subprocess.Popen([sys.executable, "sample.py", *map(str, (*flags, tmp_path / "cut"))],
                             cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while not list((tmp_path / "cut").glob(f"unfinished/*/{4 * number}-*.npz")):
            assert p.poll() is None, p.stdout.read()
            time.sleep(0.02)
        p.kill()
        p.communicate()
    call(sample.main, *flags, tmp_path / "cut")
    call(sample.main, *flags, tmp_path / "whole")
    assert np.array_equal(pixels(tmp_path / "cut"), pixels(tmp_path / "whole"))


def test_null(cm_run, from_run, cpu, tmp_path, capsys):
    """p(x | Null): images without labels, of y = -1; guidance moves nothing."""
    flags = (*from_run, "--classes", "null", "--num", 4, "--steps", 2)
    call(sample.main, *flags, "--png", "--out", tmp_path / "null")
    npz = np.load(tmp_path / "null/samples.npz")
    plain = sample.generate(network(cm_run), [-1] * 4, range(4), SHAPE, cpu,
                            samplers.Sampling.of("diffusion", steps=2, guidance=0.0))
    assert npz.files == ["arr_0"] and (npz["arr_0"][..., :1] == plain).all()
    assert [p.name for p in (tmp_path / "null/png").iterdir() if p.is_dir()] == ["null"]
    ckpt = ckpt_of(cm_run)
    disk.save(tmp_path / "ckpt.pt", {**ckpt, "config": {**ckpt["config"], "label_drop": 0.0}})
    refuses(capsys, sample.main, *flags, "--ckpt", tmp_path / "ckpt.pt", says=["--classes null"])


def test_whatever_moves_an_image_is_in_the_record(cm_run, from_run, tmp_path, monkeypatch):
    """--if-needed looks at the record alone: each flag that changes an image changes it."""
    records = []
    monkeypatch.setattr(sample, "load_merged", lambda *_: None)
    monkeypatch.setattr(sample, "make_samples",
                        lambda args, ckpt, rt, record, *_: records.append(record))

    def record(*flags):
        call(sample.main, *from_run, *flags)
        return records[-1]
    first = record()
    assert first == record("--batch-size", 3, "--out", tmp_path)
    for flags in ("--num 12", "--classes 6-9", "--seed 1", "--no-clip", "--branch general",
                  "--weights raw", "--dtype bfloat16"):
        assert record(*flags.split()) != first, flags
    assert record("--sampler", "dpm") != record("--sampler", "dpm", "--order", 2)
    disk.save(tmp_path / "ckpt.pt", {**ckpt_of(cm_run), "note": "more"})
    other = record("--ckpt", tmp_path / "ckpt.pt")
    assert other["ckpt_sha256"] != first["ckpt_sha256"]


def test_class_names_do_not_lead_out_of_the_folder(tmp_path):
    names = ["../../up", "a/b", "..", "nul\0", "x" * 300]
    out = tmp_path / "deep/er/png"
    sample.write_pngs(np.zeros((5, 8, 8, 1), np.uint8), range(5), names, out)
    folders = {path.parent for path in tmp_path.rglob("*.png")}
    assert len(folders) == 5 and all(folder.parent == out for folder in folders)


def test_a_network_that_gives_nan_is_refused(cm_run, tmp_path, capsys):
    state = ckpt_of(cm_run)
    ema = {name: torch.full_like(value, math.nan) for name, value in state["ema"].items()}
    disk.save(tmp_path / "nan.pt", {**state, "ema": ema})
    refuses(capsys, sample.main, "--ckpt", tmp_path / "nan.pt", *SHORT, "--device", "cpu",
            says=["--ckpt"])
    assert not list(tmp_path.rglob("samples.npz"))


def test_what_export_refuses(cm_run, from_run, tmp_path, capsys):
    """A training checkpoint or a file of another kind in its place, and flags of sampling."""
    path = tmp_path / "merged.pt"
    flags = (*from_run, "--export", path)
    for content in ((cm_run / "ckpt.pt").read_bytes(), b"mine"):
        path.write_bytes(content)
        refuses(capsys, sample.main, *flags, says=["--export"])
        assert path.read_bytes() == content
    path.unlink()
    for more in (["--num", 5], ["--png"]):
        refuses(capsys, sample.main, *flags, *more, says=more[:1])
    for _ in range(2):                                  # an export may be replaced
        call(sample.main, *flags)
    refuses(capsys, sample.main, "--ckpt", path, *SHORT, "--weights", "raw", says=["--weights"])


def test_export_is_a_plain_network_that_generates_the_same_images(cm_run, from_run, cpu, tmp_path):
    path = tmp_path / "merged.pt"
    flags = (*from_run, "--export", path)
    call(sample.main, *flags)
    exported = disk.load(path, ["diffusion"])
    plain = UNet(UNetConfig(**exported["network"]))
    plain.load_state_dict(exported["model"], strict=True)
    assert all(w.is_contiguous() for w in exported["model"].values())
    assert exported["command"] == ckpt_of(cm_run)["command"]

    def images(net):
        return sample.sample_batch(net, torch.arange(8), range(8), SHAPE, cpu,
                                   samplers.Sampling(steps=5))
    original = images(network(cm_run))
    assert (images(plain) - original).abs().max() < 1e-4
    assert torch.equal(original, images(sample.load_merged(exported)))
    with pytest.raises(UserError, match="--branch"):
        sample.load_merged(exported, branch="general")
    for option, value in (("branch", "general"), ("weights", "raw")):
        call(sample.main, *flags, f"--{option}", value)
        exported = disk.load(path, ["diffusion"])
        for part in ("model", "ema"):
            assert_equal(exported[part], network(cm_run, **{option: value}).state_dict())


def test_export_to_safetensors_and_back(cm_run, from_run, tmp_path):
    """By the two lines of docs/USING.md; the metadata has the settings."""
    path = tmp_path / "merged.safetensors"
    for branch in ("general", "full"):                  # the second one replaces the first
        call(sample.main, *from_run, "--export", path, "--branch", branch)
    metadata = safe_open(path, "pt").metadata()
    net = networks.build(json.loads(metadata["network"]))
    net.load_state_dict(load_file(path))
    assert_equal(net.state_dict(), network(cm_run).state_dict())
    assert json.loads(metadata["data"]) == ckpt_of(cm_run)["data"]
    assert json.loads(metadata["branch"]) == "full" and metadata["step"] == "30"


# Against diffusers' schedulers, on one fixed function as the network
def bumpy(x, t):
    """A smooth, non-linear function in place of a network."""
    return torch.tanh(0.8 * x + math.sin(t / 150)) + 0.1 * x.flip(-1)


X_T = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LIMITS = pytest.mark.parametrize("limit", [None, samplers.to_range])


@LIMITS
@pytest.mark.parametrize("name, steps", [("ddim", 50), ("ddpm", 1000), ("ddpm", 250),
                                         ("dpm++", 10), ("dpm++", 15)])
def test_samplers_are_diffusers(name, steps, limit):
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
    clip = limit is not None
    theirs = {
        "ddim": DDIMScheduler(clip_sample=clip, set_alpha_to_one=True),
        "ddpm": DDPMScheduler(clip_sample=clip, variance_type="fixed_large"),
        # With sample_max_value 1, its default, thresholding is clipping
        "dpm++": DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero",
            timestep_spacing="leading", thresholding=clip, sample_max_value=1.0)}[name]
    options = {"ddim": {"use_clipped_model_output": clip},
               "ddpm": {"generator": torch.Generator().manual_seed(1)}}.get(name, {})
    theirs.set_timesteps(steps)
    timesteps = theirs.timesteps.tolist()
    assert name == "dpm++" or timesteps == samplers.make_timesteps(AB, steps)
    g = torch.Generator().manual_seed(1)

    def noise():
        return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=g)
    got = samplers.SAMPLERS[name](bumpy, X_T, AB, timesteps, noise, limit)
    expected = X_T
    for t in theirs.timesteps:
        expected = theirs.step(bumpy(expected, int(t)), t, expected, **options).prev_sample
    assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_dpm_pp_does_not_extrapolate_to_t_0():
    """That step is DDIM's: it is much wider than the one before it."""
    seen = []

    def predict(x, t):
        seen.append(x)
        return bumpy(x, t)
    samplers.dpmpp(predict, X_T, AB, [999, 400, 20, 0], None)
    x_0, eps = samplers.predict_x_0(bumpy, seen[2], 20, float(AB[20]), None)
    assert_close(seen[3], AB[0].sqrt() * x_0 + (1 - AB[0]).sqrt() * eps)


@LIMITS
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [13, 15])
@pytest.mark.filterwarnings("ignore:.*algorithm_type.*dpmsolver:FutureWarning")
def test_dpm_is_diffusers(steps, order, limit):
    """Each call of the network is at the same point; ours ends without the noise of t = 0.

    Theirs cannot clip (0.42 stops with an error): it gets the eps of a clipped x_0.
    """
    from diffusers import DPMSolverSinglestepScheduler
    theirs = DPMSolverSinglestepScheduler(
        algorithm_type="dpmsolver", solver_order=order, final_sigmas_type="sigma_min",
        lower_order_final=True)

    def eps_of(x, t):
        if limit is None:
            return bumpy(x, t)
        signal, sigma = AB[t].sqrt(), (1 - AB[t]).sqrt()
        return (x - signal * ((x - sigma * bumpy(x, t)) / signal).clamp(-1, 1)) / sigma
    ours = samplers.Sampling("dpm", steps, "logsnr").timesteps(AB)
    theirs.set_timesteps(timesteps=ours)
    assert len(theirs.order_list) == steps
    expected = [X_T]
    for k, t in enumerate(ours):
        # Within a step of order 3 the paper goes to the second point by what diffusers calls heun
        inside = theirs.order_list[k:k + 2] == [2, 3]
        theirs.register_to_config(solver_type="heun" if inside else "midpoint")
        eps = eps_of(expected[-1], t)
        expected.append(theirs.step(eps, t, expected[-1]).prev_sample)
    points = []

    def predict(x, t):
        points.append(x)
        return bumpy(x, t)
    x_0 = samplers.dpm(predict, X_T, AB, ours, None, limit, order=order)
    assert_close(torch.stack(points), torch.stack(expected[:-1]), atol=1e-3, rtol=1e-3)
    last = samplers.ddim(bumpy, expected[-2], AB, ours[-1:], None, limit)
    assert_close(x_0, last, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("steps, order, orders", [
    (15, 3, [3, 3, 3, 3, 2, 1]), (16, 3, [3] * 5 + [1]), (17, 3, [3] * 5 + [1, 1]),
    (15, 2, [2] * 7 + [1]), (16, 2, [2] * 7 + [1, 1]), (3, 1, [1, 1, 1]), (1, 3, [1])])
def test_the_orders_of_dpm_add_up_to_the_calls(steps, order, orders):
    assert samplers.dpm_orders(steps, order) == orders
    assert sum(orders) == steps


def test_a_padded_batch_gives_the_same_images(cpu, monkeypatch):
    """Seven images in fixed batches of three: no more, and the same ones."""
    net = tiny_net(None)
    make = partial(sample.generate, net, [1] * 7, range(7), SHAPE, cpu,
                   samplers.Sampling(steps=2), 3, title=None)
    images = make()
    monkeypatch.setattr(sample, "batches_of", lambda rows, size, fixed, of=sample.batches_of:
                        of(rows, size, True))
    again = make()
    assert again.shape == images.shape == (7, 8, 8, 1)
    assert np.abs(again.astype(int) - images).max() <= 1


@pytest.mark.parametrize("experts", [None, [90, 50, 40, 30, 20, 10, 9, 8, 7, 6]])
def test_weights_cast_once_predict_the_same(experts):
    """In bfloat16 autocast casts the same weights to the same numbers, in every call.

    W^g and BA are added in float32, and autocast rounds their sum.
    """
    rt = runtime.Runtime(torch.device("cpu"), torch.bfloat16)
    net = randomize(networks.build(TINY, 0.3 if experts else None, experts))
    net.requires_grad_(False)
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 9])
    with torch.no_grad():
        before = sample.guided(net, y, 1.5, rt)(x, 500)
        prepared = sample.make_fast(net, rt, SHAPE, 10 ** 6, 100)
        after = sample.guided(prepared, y, 1.5, rt)(x, 500)
    assert torch.equal(before, after) and before.abs().sum() > 0
    assert net.encoder.head.weight.dtype == torch.bfloat16
    assert net.encoder.middle[0].norm1.weight.dtype == torch.float32
    net = tiny_net(0.3)
    sample.make_fast(net, rt, SHAPE, 10, 10)
    for owner, _, part in reserved(net):
        assert owner.parametrizations.weight.original.dtype == part.B.dtype == torch.float32
