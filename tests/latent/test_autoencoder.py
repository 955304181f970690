"""autoencoder.py: images to latents and back, encoded once; the small one that is trained here."""
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import randomize
from torch.nn import functional as F
from torch.testing import assert_close

from latent import stable_diffusion as sd
from latent.autoencoder import (Autoencoder, KLAutoencoder, LatentBatches, Pixels, Reconstruction,
                                encode_once, latent_scale)
from runtime import generator


def test_latents_round_trip(tiny_sd, monkeypatch):
    """encode, and decode in parts, are the autoencoder's own, times its scaling factor."""
    model = sd.Model(str(tiny_sd), torch.device("cpu"))
    images = np.random.RandomState(0).randint(0, 256, (5, 16, 16, 3), np.uint8)
    moments = torch.from_numpy(model.encode(images))
    assert moments.shape == (5, 2, *model.latent_shape(16)) == (5, 2, 4, 8, 8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    whole = model.vae.encode(x).latent_dist
    scaled = model.vae.config.scaling_factor * torch.stack([whole.mean, whole.std], 1)
    assert_close(moments, scaled, rtol=1e-4, atol=1e-5)
    decoded = model.vae.decode(whole.mean).sample
    monkeypatch.setattr("latent.autoencoder.BATCH", 2)
    assert_close(model.decode(moments[:, 0]), decoded, rtol=1e-3, atol=1e-4)


def kl_autoencoder():
    return Autoencoder(randomize(KLAutoencoder(ch=16, factor=2), scale=0.1), "cpu")


def image_set(n=40, **changes):
    """What encode_once looks at in a set of images."""
    images = np.random.RandomState(0).randint(0, 256, (n, 8, 8, 3), np.uint8)
    return SimpleNamespace(**{"images": images, "sha256": "a", "rows": None, **changes})


def test_encoded_once(tmp_path, cpu, monkeypatch):
    """Another run reads what one has kept; other content has a file of its own."""
    args = Namespace(dataset="folder", data_dir=tmp_path / "x", pack_dir=tmp_path / "pack")
    found = encode_once(kl_autoencoder(), image_set(), args, cpu)
    assert isinstance(found, np.memmap) and found.dtype == np.float32
    assert_close(torch.tensor(found), torch.from_numpy(kl_autoencoder().encode(image_set().images)),
                 rtol=1e-4, atol=1e-5)
    encode_once(kl_autoencoder(), image_set(sha256="b"), args, cpu)
    encode_once(kl_autoencoder(), image_set(rows=np.arange(40)), args, cpu)
    encode_once(Autoencoder(KLAutoencoder(ch=16, factor=2), "cpu"), image_set(), args, cpu)
    assert len(list((tmp_path / "pack").iterdir())) == 4
    monkeypatch.setattr(Autoencoder, "encode", None)
    assert np.array_equal(encode_once(kl_autoencoder(), image_set(), args, cpu), found)


@pytest.mark.parametrize("limit", [0, None])
def test_latents_are_drawn_anew_in_every_step(digits, limit, monkeypatch):
    """mean + std noise of (seed, step), whether the moments are on the device or on the disk."""
    if limit is not None:
        monkeypatch.setattr("data.device_limit", lambda device: limit)
    moments = np.random.RandomState(0).rand(len(digits.labels), 2, 4, 3, 3).astype(np.float32)
    batches = LatentBatches(digits, moments, 8, 5, torch.device("cpu"))
    assert batches.on_device == (limit is None)
    x_0, y, condition = batches.at(3)
    rows = batches.rows(3)
    noise = torch.randn(8, 4, 3, 3, generator=generator("cpu", 5, "latent", 3))
    mean, std = torch.from_numpy(moments[rows]).unbind(1)
    assert_close(x_0, mean + std * noise)
    assert y.tolist() == digits.labels[rows].tolist() and condition is None


def test_shapes_and_moments():
    net = randomize(KLAutoencoder(ch=16, factor=4), scale=0.1)
    x = torch.randn(3, 3, 16, 16)
    latent = net.encode(x).latent_dist
    assert latent.mean.shape == latent.std.shape == (3, 4, 4, 4) and latent.std.min() > 0
    assert net.decode(latent.mean).sample.shape == x.shape
    mean, log_var = net.to_moments(F.silu(net.norm_down(net.down(x)))).chunk(2, dim=1)
    assert_close(latent.mean, mean)
    assert_close(latent.std, log_var.exp().sqrt())
    eps = torch.randn(3, 4, 4, 4)
    y, mean, std = net(x, eps)
    assert_close(y, net.decode(mean + std * eps).sample)


def test_reconstruction_is_the_error_and_the_divergence():
    net = randomize(KLAutoencoder(ch=16, factor=2), scale=0.1)
    x, eps = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
    total, terms, D = Reconstruction(net)(Pixels(x, eps, torch.zeros(2, dtype=int)))
    y, mean, std = net(x, eps)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).mean()
    assert_close(terms["kl"], kl)
    assert_close(terms["base"], (x - y).square().mean())
    assert_close(total, terms["base"] + 1e-4 * kl)
    assert D.tolist() == [0, 0]


def test_the_scale_gives_latents_of_variance_1():
    torch.manual_seed(0)
    net = randomize(KLAutoencoder(ch=16, factor=2), scale=0.1)
    x = torch.randn(512, 3, 8, 8)
    scale = latent_scale(net, dict(net.named_parameters()), x)
    latent = net.encode(x).latent_dist
    z = scale * (latent.mean + latent.std * torch.randn_like(latent.std))
    assert abs(z.var().item() - 1) < 0.05
