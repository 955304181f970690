"""A small KL autoencoder, for machines and images without Stable Diffusion's: images to latents.

    net = KLAutoencoder(ch=64, factor=4)            # 32 x 32 pixels to 4 x 8 x 8 latents
    z = net.encode(x).latent_dist.mean              # the methods of diffusers' AutoencoderKL
    x = net.decode(z).sample

Residual blocks, between which images are halved. It is trained by the squared error of pixels and a
small KL divergence from the standard normal, without the perceptual and adversarial losses of
Rombach et al. (2022), which need other networks: its images are blurred. text_to_image.py trains
it.
"""
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

from model import Down, Up, conv, distance, group_norm, norm_silu
from runtime import generator

CHANNELS = 4            # of latents, as Stable Diffusion's
KL_WEIGHT = 1e-4        # beside a mean squared error, both per number


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
    latents are multiplied by to have variance 1. Raises ValueError where the sizes do not fit.
    """

    def __init__(self, ch=64, factor=8, scale=1.0):
        super().__init__()
        halvings = factor.bit_length() - 1
        if factor < 2 or factor != 2 ** halvings:
            raise ValueError(f"--factor {factor}: images are halved; take 2, 4, 8 or 16")
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

    def moments(self, x):
        """Images -> means and standard deviations of their latents, (N, 4, h, w) each."""
        mean, log_var = self.to_moments(norm_silu(self.norm_down, self.down(x))).chunk(2, dim=1)
        return mean, log_var.clamp(-30, 20).mul(0.5).exp()

    def encode(self, x):
        """As diffusers': an object with latent_dist.mean and latent_dist.std."""
        mean, std = self.moments(x)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=std))

    def decode(self, z):
        """As diffusers': an object with sample, the images."""
        return SimpleNamespace(sample=self.to_pixels(norm_silu(self.norm_up, self.up(z))))

    def forward(self, x, eps):
        """Images and noise (N, 4, h, w) -> (reconstruction, means, standard deviations)."""
        mean, std = self.moments(x)
        return self.decode(mean + std * eps).sample, mean, std


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
