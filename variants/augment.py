"""+ADA: augmentation (Karras et al., 2020) in its non-leaky form (Karras et al., 2022).

    x_0, a = augment(x_0, p=0.12, generator=g)          # a (N, 9): what was done; zeros: nothing
    eps = net.decode(*net.encode(x_t, t, y, masks, a))  # the network gets a

The network gets `a` in training. At sampling a = 0, so it generates plain images.

The paper names ADA without its settings. These are the operations, strengths and rates of the 2022
paper on CIFAR-10 (EDM), which CBDM's code has too: geometric ones only. An image is mirrored left
to right with probability 1/2; each other operation is applied with probability p, independently of
the others. All but the mirrors are one affine resampling, as in the 2020 paper: the image is
doubled by the wavelet sym6, sampled bilinearly and halved by sym6, and mirrored at its border.
"""
import math
from functools import cache

import torch
from torch.nn import functional as F

DIM = 9                 # numbers in the vector that the network gets
SCALE_STD = 0.2         # standard deviations: of log2 of the scale,
STRETCH_STD = 0.2       # of log2 of the stretch along one axis, and the shrinking along the other,
SHIFT_STD = 0.125       # and of each shift, as a part of the image's size
SYM6 = (                # the low-pass filter of the wavelet "sym6" (as PyWavelets has it)
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)
CENTRE = sum(k * h for k, h in enumerate(SYM6)) / sum(SYM6)


# --------------------------------------------------------------------------------------------------
# Parameters

def draw_parameters(n, p, generator):
    """Random parameters of n images, {name: (n,)}; each is that of the identity unless chosen.

    "scale", "stretch" and the shifts are in standard deviations, angles in radians. The order of
    the lines below is the order of the random numbers.
    """
    device = generator.device

    def uniform():
        return torch.rand(n, generator=generator, device=device)

    def normal():
        return torch.randn(n, generator=generator, device=device)

    def chosen(value):
        return torch.where(uniform() < p, value, 0)

    params = {
        "mirror_x": (uniform() < (0.5 if p else 0)).float(),
        "mirror_y": chosen((uniform() < 0.5).float()),
        "scale": chosen(normal()),
        "turn": chosen((uniform() * 2 - 1) * math.pi),
        "stretch": chosen(normal()),
        # Half of the stretches are along x, the others along any axis
        "axis": (uniform() * 2 - 1) * math.pi * (uniform() < 0.5),
    }
    shifted = uniform() < p
    params["shift_x"] = torch.where(shifted, normal(), 0)
    params["shift_y"] = torch.where(shifted, normal(), 0)
    return params


def vector(params):
    """The parameters as the network gets them, (N, DIM) float32: all zero for the identity."""
    return torch.stack([
        params["mirror_x"],
        params["mirror_y"],
        params["scale"],
        params["turn"].cos() - 1,
        params["turn"].sin(),
        params["stretch"] * params["axis"].cos(),
        params["stretch"] * params["axis"].sin(),
        params["shift_x"],
        params["shift_y"],
    ], 1)


# --------------------------------------------------------------------------------------------------
# Geometry

def matrices_2x2(a, b, c, d):
    """Numbers (N,) -> matrices [[a, b], [c, d]], (N, 2, 2)."""
    return torch.stack([torch.stack([a, b], 1), torch.stack([c, d], 1)], 1)


def inverse_rotation(angle):
    """Inverses (N, 2, 2) of counter-clockwise rotations by angle (N,), where y points down."""
    return matrices_2x2(angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def inverse_linear(params):
    """The matrices (N, 2, 2) from output to input positions, relative to the image's centre.

    An image is scaled by 2^(0.2 scale), turned counter-clockwise, then stretched by 2^(0.2 stretch)
    along an axis and shrunk by the same across it.
    """
    zero = torch.zeros_like(params["scale"])
    scale = 2 ** (-SCALE_STD * params["scale"])
    stretch = 2 ** (-STRETCH_STD * params["stretch"])
    to_axis = inverse_rotation(params["axis"])
    back = inverse_rotation(-params["axis"])
    along = back @ matrices_2x2(stretch, zero, zero, 1 / stretch) @ to_axis
    return matrices_2x2(scale, zero, zero, scale) @ inverse_rotation(params["turn"]) @ along


@cache
def kernel(device, dtype):
    """The outer product of sym6 with itself, (1, 1, 12, 12)."""
    h = torch.tensor(SYM6, device=device, dtype=dtype)
    return (h[:, None] * h)[None, None]


def resample(x, linear, shift):
    """Images x (N, C, S, S) moved: position p of the result is linear (p - shift) of x.

    linear: (N, 2, 2). shift: (N, 2), pixels. Positions (x, y) are relative to the image's centre.
    Sample n of a doubled image lies at pixel (n - CENTRE) / 2, since sym6 keeps straight lines.
    """
    N, C, S, _ = x.shape
    both = kernel(x.device, x.dtype)
    margin = min(6, S - 1)
    padded = F.pad(x.reshape(N * C, 1, S, S), [margin] * 4, mode="reflect")
    doubled = F.conv_transpose2d(padded, 2 * both, stride=2)
    D = doubled.shape[-1]

    M = 2 * S + len(SYM6) - 2                               # samples that the result is made of
    line = (torch.arange(M, device=x.device, dtype=x.dtype) - CENTRE) / 2 - (S - 1) / 2
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), 2)              # (M, M, 2)
    points = points.view(1, M * M, 2) - shift[:, None]
    pixels = points @ linear.transpose(1, 2) + (S - 1) / 2                          # (N, M M, 2)
    last = max(S - 1, 1)
    pixels = pixels.abs() % (2 * last)
    pixels = torch.minimum(pixels, 2 * last - pixels)       # mirrored at the outermost pixels
    where = (2 * (pixels + margin) + CENTRE) / (D - 1) * 2 - 1
    moved = F.grid_sample(doubled.view(N, C, D, D), where.view(N, M, M, 2), mode="bilinear",
                          padding_mode="border", align_corners=True)
    return F.conv2d(moved.view(N * C, 1, M, M), both / 2, stride=2).view(x.shape)


def geometry(x, params):
    """All operations on x (N, C, S, S), of any range.

    An image to which none applies comes back bit for bit, one that is mirrored only is exact.
    """
    def given(name):
        return (params[name] != 0)[:, None, None, None]
    x = torch.where(given("mirror_x"), x.flip(3), x)
    x = torch.where(given("mirror_y"), x.flip(2), x)
    shift = torch.stack([params["shift_x"], params["shift_y"]], 1) * SHIFT_STD * x.shape[3]
    moved = resample(x, inverse_linear(params), shift)
    moves = given("scale") | given("turn") | given("stretch") | given("shift_x") | given("shift_y")
    return torch.where(moves, moved, x)


# --------------------------------------------------------------------------------------------------
# All operations on a batch

@torch.no_grad()
def augment(x_0, p, generator):
    """Augment images x_0 (N, C, S, S) in [-1, 1], each operation with probability p.

    Returns the images, which may leave the range by a little at edges, and their vectors (N, DIM).
    """
    params = draw_parameters(len(x_0), p, generator)
    return geometry(x_0, params), vector(params)
