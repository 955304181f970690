"""train.py --latents: class labels on latents, by the same loop, sampler and metrics as pixels."""
import shutil

import numpy as np
import pytest
import torch
from conftest import call, pixels, read_log, refuses, write_colour_classifier
from torch.testing import assert_close

import disk
import evaluate
import sample
import samplers
import train
from data import load, to_uint8
from latent.autoencoder import load_autoencoder
from networks import load_merged

KIND = ["latent diffusion"]
SMALL = ["--dataset", "folder", "--resolution", 16, "--base", "ddpm", "--ch", 16, "--ch-mult", 1, 2,
         "--num-res-blocks", 1, "--batch-size", 4, "--warmup", 0, "--log-every", 1,
         "--sample-every", 0, "--device", "cpu", "--dtype", "float32"]
SAMPLE = ["--num", 6, "--steps", 3, "--device", "cpu"]


@pytest.fixture(scope="module")
def flags(pictures, autoencoder):
    return [*SMALL, "--data-dir", pictures, "--pack-dir", autoencoder[1], "--latents",
            autoencoder[0]]


@pytest.fixture(scope="module")
def whole(flags, classifier, tmp_path_factory):
    """A run of 4 steps with CM, with a grid and distances."""
    out = tmp_path_factory.mktemp("run") / "cm"
    write_colour_classifier(classifier, out.parent / "colour.pt", resolution=16)
    call(train.main, *flags, "--steps", 4, "--sample-every", 4, "--eval-every", 4,
         "--eval-num", 9, "--features", out.parent / "colour.pt", "--out", out)
    return out


def test_a_batch_is_latents_of_its_images(flags, pictures, autoencoder, tmp_path, monkeypatch):
    """Drawn as pixels are, encoded as they lie; what decode makes of them is near the images."""
    found = []
    monkeypatch.setattr(train, "loop", lambda training, *_: found.append(training))
    call(train.main, *flags, "--resample", 0.5, "--out", tmp_path)
    training, own = found[0], load_autoencoder(str(autoencoder[0]), "cpu")
    images = load("folder", pictures, resolution=16, pack_dir=autoencoder[1])
    plain = train.Batches(images, 4, 0, "cpu", resample=0.5)
    x_0, y, _ = training.batches.at(3)
    rows = plain.rows(3)
    assert y.tolist() == images.labels[rows].tolist() and not training.objective.flip
    pixels = plain.at(3)[0]
    assert (own.decode(x_0) - pixels).square().mean() < 0.3 * pixels.var()


def test_a_resumed_run_is_the_uninterrupted_one(whole, flags, tmp_path):
    for steps in (2, 4):
        call(train.main, *flags, "--steps", steps, "--out", tmp_path)
    parts, once = (disk.load(out / "ckpt.pt", KIND) for out in (tmp_path, whole))
    assert parts["network"]["channels"] == 4 and parts["rank_ratio"] == 0.1
    for key in ("model", "ema"):
        assert_close(parts[key], once[key], rtol=0, atol=0)
    assert (whole / "grid-0000004.png").exists() and read_log(whole)[-1]["FD"] > 0


def test_samples_are_decoded(whole, autoencoder, tmp_path, cpu):
    """Not clipped on the way; and those of an export, wherever the autoencoder is."""
    call(sample.main, "--ckpt", whole / "ckpt.pt", *SAMPLE, "--out", tmp_path / "a")
    ckpt = disk.load(whole / "ckpt.pt", KIND)
    y = torch.tensor([0, 1, 2] * 2)
    z = sample.sample_batch(load_merged(ckpt), y, range(6), (4, 8, 8), cpu,
                            samplers.Sampling(steps=3))
    own = load_autoencoder(str(autoencoder[0]), "cpu")
    found = pixels(tmp_path / "a")
    assert z.abs().max() > 1 and np.array_equal(found, to_uint8(own.decode(z)).numpy())

    call(sample.main, "--ckpt", whole / "ckpt.pt", "--export", tmp_path / "plain.pt")
    shutil.copy(autoencoder[0], tmp_path / "elsewhere.pt")
    call(sample.main, "--ckpt", tmp_path / "plain.pt", *SAMPLE, "--out", tmp_path / "b",
         "--latents", tmp_path / "elsewhere.pt")
    assert np.array_equal(pixels(tmp_path / "b"), found)


def test_evaluate(whole, tmp_path):
    call(evaluate.main, "--ckpt", whole / "ckpt.pt", "--features", whole.parent / "colour.pt",
         "--num", 6, "--steps", 2, "--device", "cpu", "--out-json", tmp_path / "eval.json")
    assert disk.read_json(tmp_path / "eval.json")["fd"] > 0
    assert pixels(next(tmp_path.glob("eval-samples-*"))).shape == (6, 16, 16, 3)


def test_a_dit_on_latents_of_diffusers(pictures, tiny_sd, tmp_path):
    """An AutoencoderKL alone and that of a whole Stable Diffusion are the same one."""
    data = ["--data-dir", pictures, "--pack-dir", tmp_path / "packs"]
    for name in ("vae", "."):
        call(train.main, "--dataset", "folder", *data, "--resolution", 16, "--network", "dit",
             "--ch", 16, "--depth", 2, "--no-cm", "--batch-size", 4, "--steps", 1,
             "--sample-every", 0, "--device", "cpu", "--latents", tiny_sd / name,
             "--out", tmp_path / name / "run")
    assert len(list((tmp_path / "packs").glob("*latents*"))) == 1
    call(sample.main, "--ckpt", tmp_path / "vae/run/ckpt.pt", *SAMPLE, "--out", tmp_path / "a")
    assert pixels(tmp_path / "a").shape == (6, 16, 16, 3)


def test_another_autoencoder_is_refused(whole, flags, autoencoder, cm_run, tmp_path, capsys):
    """And one that is gone, and one for a network of pixels."""
    ckpt, changed = ["--ckpt", whole / "ckpt.pt"], tmp_path / "changed.pt"
    saved = disk.load(autoencoder[0], ["autoencoder"])
    disk.save(changed, {**saved, "scale": 2 * saved["scale"]})
    refuses(capsys, sample.main, *ckpt, *SAMPLE, "--latents", changed,
            says=["--latents", "another"])
    refuses(capsys, evaluate.main, *ckpt, "--latents", tmp_path / "gone.pt",
            says=["--latents", "gone.pt"])
    refuses(capsys, sample.main, "--ckpt", cm_run / "ckpt.pt", *SAMPLE, "--latents", changed,
            says=["--latents"])
    refuses(capsys, train.main, *flags, "--steps", 5, "--latents", changed, "--out", whole,
            says=["--latents"])
    refuses(capsys, train.main, *flags, "--latents", changed, "--init-from", whole / "ckpt.pt",
            "--out", tmp_path / "run", says=["--latents"])


@pytest.mark.parametrize("more, named", [
    (["--flip"], "--flip"), (["--ada", 0.1], "--ada"), (["--base", "consistency"], "--base"),
    (["--resolution", 17], "--resolution"), (["--ch-mult", 1, 1, 1, 1, 1], "--ch-mult")])
def test_mistakes(more, named, flags, tmp_path, capsys):
    refuses(capsys, train.main, *flags, *more, "--out", tmp_path / "run", says=[named])
    assert not (tmp_path / "run").exists()


def test_grey_images_are_refused(autoencoder, data_dir, tmp_path, capsys):
    refuses(capsys, train.main, "--dataset", "digits", "--data-dir", data_dir, "--device", "cpu",
            "--latents", autoencoder[0], "--out", tmp_path / "run", says=["--dataset", "grey"])
