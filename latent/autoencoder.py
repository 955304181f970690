"""Images to latents and back: Stable Diffusion's autoencoder, or a small one that is trained here.

    autoencoder = Autoencoder(vae, device)                      # diffusers' AutoencoderKL
    autoencoder = Autoencoder(KLAutoencoder(ch=64, factor=4), device)
    moments = encode_once(autoencoder, images, args, rt)        # kept beside the packed images
    x_0, y = LatentBatches(images, moments, 64, seed=0, device=device).at(step=0)

KLAutoencoder is for machines and images without Stable Diffusion's: residual blocks, between which
images are halved. It is trained by the squared error of pixels and a small KL divergence from the
standard normal, without the perceptual and adversarial losses of Rombach et al. (2022), which need
other networks: its images are blurred. text_to_image.py trains it.
"""
import hashlib
import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import disk
from data import Batches, pack_path, to_float
from model import Down, Up, conv, distance, group_norm, make_alphas_bar, norm_silu
from runtime import UserError, generator, progress

BATCH = 16              # images at a time: pixels take more memory than latents
CHANNELS = 4            # of latents, as Stable Diffusion's
KL_WEIGHT = 1e-4        # beside a mean squared error, both per number


# --------------------------------------------------------------------------------------------------
# A small autoencoder

class Settings(dict):
    """A dict whose entries are attributes as well, as diffusers' configurations."""
    __getattr__ = dict.__getitem__


class Residual(nn.Module):
    """Two 3 x 3 convolutions, residual: (N, in_ch, H, W) -> (N, out_ch, H, W)."""

    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.norm1 = group_norm(in_ch)
        self.conv1 = conv(in_ch, out_ch)
        self.norm2 = group_norm(out_ch)
        self.conv2 = conv(out_ch, out_ch, gain=1e-5)
        self.shortcut = conv(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()

    def forward(self, x):
        h = self.conv1(norm_silu(self.norm1, x))
        return self.shortcut(x) + self.conv2(norm_silu(self.norm2, h))


class KLAutoencoder(nn.Module):
    """Images (N, 3, H, W) in [-1, 1] to latents (N, 4, H / factor, W / factor) and back.

    ch: the width at full size, twice that below. factor: a power of two, at least 2. scale: what
    latents are multiplied by to have variance 1.
    """

    def __init__(self, ch=64, factor=8, scale=1.0):
        super().__init__()
        halvings = factor.bit_length() - 1
        widths = [ch] + [2 * ch] * halvings
        self.config = Settings(scaling_factor=scale, latent_channels=CHANNELS,
                               block_out_channels=widths)
        down = [conv(3, ch)]
        for i, o in zip(widths, widths[1:]):
            down += [Residual(i, i), Down(i), Residual(i, o)]
        self.down = nn.Sequential(*down)
        self.norm_down = group_norm(widths[-1])
        self.to_moments = conv(widths[-1], 2 * CHANNELS)

        up = [conv(CHANNELS, widths[-1])]
        for i, o in zip(widths[::-1], widths[-2::-1]):
            up += [Residual(i, i), Up(i), Residual(i, o)]
        self.up = nn.Sequential(*up)
        self.norm_up = group_norm(ch)
        self.to_pixels = conv(ch, 3)

    def encode(self, x):
        """Images -> an object with latent_dist.mean and .std, (N, 4, h, w) each, as diffusers'."""
        mean, log_var = self.to_moments(norm_silu(self.norm_down, self.down(x))).chunk(2, dim=1)
        std = log_var.clamp(-30, 20).mul(0.5).exp()
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=std))

    def decode(self, z):
        """Latents -> an object with sample, the images, as diffusers'."""
        return SimpleNamespace(sample=self.to_pixels(norm_silu(self.norm_up, self.up(z))))

    def forward(self, x, eps):
        """Images and noise (N, 4, h, w) -> (reconstruction, means, standard deviations)."""
        latent = self.encode(x).latent_dist
        return self.decode(latent.mean + latent.std * eps).sample, latent.mean, latent.std


class Pixels(NamedTuple):
    """One part of a step's images, with what loop.py looks at."""
    x: torch.Tensor             # (B, 3, H, W) in [-1, 1]
    eps: torch.Tensor           # (B, 4, h, w), standard normal
    y: torch.Tensor             # (B,) their classes
    cm_weight: None = None      # of L_CM, which there is none of


class Reconstruction(nn.Module):
    """E ||x' - x||^2 + 1e-4 KL(N(mean, std^2) || N(0, 1)), means over pixels and latents.

    forward(batch) -> (total, {"base": the squared error, "kl": ...}, zeros (B,)), as an Objective.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net

    @torch.no_grad()
    def draw_batch(self, x, y, *, seed, step, part=0, parts=1):
        """One part of a step's Pixels: a pure function of the global batch and (seed, step)."""
        side = x.shape[-1] >> (len(self.net.config.block_out_channels) - 1)
        g = generator(x.device, seed, "latent", step)
        eps = torch.randn(len(x), CHANNELS, side, side, generator=g, device=x.device)
        own = slice(part * len(x) // parts, (part + 1) * len(x) // parts)
        return Pixels(x[own], eps[own], y[own])

    def forward(self, batch):
        x, mean, std = self.net(batch.x, batch.eps)
        base = distance(x.float(), batch.x).mean()
        var = std.float().square()
        kl = 0.5 * (mean.float().square() + var - 1 - var.log()).mean()
        no_D = torch.zeros_like(batch.y, dtype=torch.float32)
        return base + KL_WEIGHT * kl, {"base": base, "kl": kl}, no_D


@torch.no_grad()
def latent_scale(net, weights, x):
    """1 / standard deviation of the latents of images x under these weights of `net`, a float."""
    eps = torch.zeros(1, device=x.device)
    _, mean, std = torch.func.functional_call(net, weights, (x, eps))
    second = mean.square().mean() + std.square().mean()
    return 1 / (second - mean.mean().square()).sqrt().item()


# --------------------------------------------------------------------------------------------------
# An autoencoder in use

def packages():
    """diffusers and transformers, optional packages. Raises UserError without them."""
    try:
        import diffusers
        import transformers
    except ImportError as e:
        raise UserError("Stable Diffusion's parts need two more packages: pip install diffusers "
                        "transformers") from e
    return diffusers, transformers


def load_part(flag, name, kind, part):
    """An object of a class of diffusers or transformers, from a sub-folder of a Stable Diffusion.

    name: a folder, or a name on the Hugging Face hub. part: the sub-folder, or None. Raises
    UserError, also where weights are missing, which would be random numbers.
    """
    try:
        if not issubclass(kind, nn.Module):
            return kind.from_pretrained(name, subfolder=part)
        net, info = kind.from_pretrained(name, subfolder=part, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"it lacks {sorted(info['missing_keys'])[0]}")
        return net
    except (OSError, ValueError, RuntimeError, TypeError) as e:
        why = " ".join(str(e).split())[:200]
        raise UserError(f"{flag} {name}: cannot be loaded ({why}); name a folder or a hub name of "
                        "a Stable Diffusion in diffusers' layout") from e


def content_hash(modules, alphas_bar, scale):
    """A SHA-256 of all that a model computes with: its weights, its schedule, its scale."""
    digest = hashlib.sha256(repr(scale).encode())
    tensors = [value for module in modules for value in module.state_dict().values()]
    for value in [*tensors, alphas_bar]:
        digest.update(repr(list(value.shape)).encode())
        digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def refuse_other(ckpt, part, sha256, flag):
    """Raise UserError where a checkpoint was trained with another part than `flag` names now.

    ckpt: None for a new run. part: "model", "autoencoder" or "text_encoder".
    """
    if ckpt and ckpt.get(f"{part}_sha256") != sha256:
        raise UserError(f"{flag}: not the one that the checkpoint was trained with (its content is "
                        "another); name that one")


class Autoencoder:
    """Images to latents and back, by diffusers' AutoencoderKL or a network with its methods.

    vae: that network, which becomes frozen, in float32, on `device`. multiple: what the sides of an
    image must be a multiple of. alphas_bar: the noise schedule of a diffusion of its latents.
    """
    alphas_bar = make_alphas_bar()

    def __init__(self, vae, device):
        self.vae = vae.float().to(device).eval().requires_grad_(False)
        self.device = device
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.multiple = self.factor

    @torch.no_grad()
    def encode(self, images):
        """uint8 (N, H, W, 3) -> the latents' distributions, NumPy, float32 (N, 2, C, h, w).

        They are normal: [:, 0] are the means, [:, 1] the standard deviations, both scaled.
        """
        pixels = torch.from_numpy(np.array(images)).to(self.device)
        latent = self.vae.encode(to_float(pixels)).latent_dist
        moments = torch.stack([latent.mean, latent.std], 1)
        return (self.vae.config.scaling_factor * moments.float().cpu()).numpy()

    @torch.no_grad()
    def decode(self, z):
        """Scaled latents (N, C, h, w) -> images (N, 3, H, W), about [-1, 1]; BATCH at a time."""
        scale = self.vae.config.scaling_factor
        parts = [self.vae.decode(part / scale).sample for part in z.split(BATCH)]
        return torch.cat(parts)

    @cached_property
    def encoder_sha256(self):
        """A hash of all that `encode` computes with."""
        config = {k: v for k, v in self.vae.config.items() if not k.startswith("_")}
        return content_hash([self.vae], torch.empty(0), json.dumps(config, sort_keys=True))

    def latent_shape(self, resolution):
        """(C, h, w) of the latents of images of `resolution` pixels per side. Raises UserError."""
        if resolution % self.multiple:
            raise UserError(f"--resolution {resolution}: must be a multiple of {self.multiple}, "
                            "since images are halved")
        size = resolution // self.factor
        return self.vae.config.latent_channels, size, size


def load_autoencoder(name, device, flag="--latents", ckpt=None):
    """An Autoencoder: of a checkpoint of `text_to_image.py autoencoder`, or of Stable Diffusion.

    name: a file; or a folder or hub name in diffusers' layout, of a whole Stable Diffusion or of an
    AutoencoderKL alone. ckpt: a checkpoint that was trained on its latents, or None. Raises
    UserError, also where it is another one than ckpt's.
    """
    if Path(name).is_file() or name.endswith(".pt"):
        saved = disk.load(name, ["autoencoder"], flag)
        vae = KLAutoencoder(**saved["network"], scale=saved["scale"])
        vae.load_state_dict(saved["ema"])
    else:
        kind = packages()[0].AutoencoderKL
        try:
            vae = load_part(flag, name, kind, None)
        except UserError:
            vae = load_part(flag, name, kind, "vae")
    autoencoder = Autoencoder(vae, device)
    refuse_other(ckpt, "autoencoder", autoencoder.encoder_sha256, f"{flag} {name}")
    return autoencoder


# --------------------------------------------------------------------------------------------------
# Latents: encoded once, drawn anew in every step

def encode_once(autoencoder, images, args, rt):
    """The latents' distributions (N, 2, C, h, w), of Autoencoder.encode, memory-mapped.

    They are encoded unless an earlier run has kept them, beside the packed images in
    NAME-latents-HASH.npy, where HASH is that of all they are made from. Each rank encodes every
    rt.world-th batch, rank 0 writes.
    """
    N, resolution, _, channels = images.images.shape
    if channels != 3:
        raise UserError(f"--dataset {args.dataset}: its images are grey, and an autoencoder takes "
                        "colours; take another set")
    shape = (N, 2, *autoencoder.latent_shape(resolution))
    made_from = {
        "images": images.sha256, "resolution": resolution, "encoder": autoencoder.encoder_sha256,
        "rows": None if images.rows is None else hashlib.sha256(images.rows).hexdigest(),
        "scale": autoencoder.vae.config.scaling_factor}
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    base = pack_path(args.dataset, args.data_dir, "train", resolution, args.pack_dir)
    path = base.with_name(f"{base.name}-latents-{digest[:16]}.npy")

    def encoded():
        """Yield the moments of rt.world batches at a time, on rank 0; None elsewhere."""
        for first in progress(range(0, N, BATCH * rt.world), desc="latents", unit="batch",
                              disable=rt.rank > 0):
            own = images.images[first + rt.rank * BATCH:first + (rt.rank + 1) * BATCH]
            yield rt.gather([autoencoder.encode(own)] if len(own) else [])

    def write(f):
        np.lib.format.write_array_header_1_0(
            f, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for moments in encoded():
            f.write(moments.tobytes())
    if rt.maximum(int(rt.rank == 0 and not path.exists())):
        if rt.rank == 0:
            disk.write_atomic(path, write, "--pack-dir")
        else:
            list(encoded())
        rt.maximum(0)           # the file has its name
    return np.load(path, mmap_mode="r")


class LatentBatches(Batches):
    """The training batches of latents, drawn from the distributions of encode_once.

    table: of captions.py, where each image has texts of its own. The rest as Batches.
    """

    def __init__(self, images, moments, batch_size, seed, device, table=None, resample=1.0):
        super().__init__(replace(images, images=moments), batch_size, seed, device,
                         resample=resample)
        self.table = table

    def at(self, step):
        """x_0 (G, C, h, w), y (G,) and the condition: what Objective.draw_batch takes."""
        rows = self.rows(step)
        moments, y = self.take(rows)
        mean, std = moments.unbind(1)
        g = generator(self.device, self.seed, "latent", step)
        eps = torch.randn(mean.shape, generator=g, device=self.device)
        condition = self.table and self.table.condition(rows, self.seed, step)
        return mean + std * eps, y, condition
