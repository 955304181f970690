"""+ADA: the augmentation of Karras et al. (2020) in its non-leaky form for diffusion models (Karras et al., 2022).

    x_0, a = augment(x_0, p=0.12, generator=g)          # a (N, 14): what was done, zeros where nothing was
    eps = net.decode(*net.encode(x_t, t, y, masks, a))  # the network is told; at sampling a = 0: plain images

The paper names ADA without its settings; p = 0.12 is what the 2022 paper uses on CIFAR-10. Each operation is applied
to an image with probability p on its own; the geometric ones are one affine resampling (bilinear, mirrored at the
border), the colour ones are torchvision's definitions, one after the other. At p = 0 images come back unchanged.
"""
import math

import torch
from torch.nn import functional as F

NAMES = ("mirror_x", "mirror_y", "quarter_turn_cos", "quarter_turn_sin", "scale", "turn_cos", "turn_sin", "stretch",
         "shift_x", "shift_y", "brightness", "contrast", "saturation", "hue")
DIM = len(NAMES)                        # length of the vector that the network is given
GREY = (0.2989, 0.587, 0.114)           # luminance of red, green and blue, as torchvision has it


def draw_parameters(n, p, generator):
    """Random parameters of n images, {name: (n,)}; the identity with probability 1 - p, each operation on its own."""
    device = generator.device

    def uniform():
        return torch.rand(n, generator=generator, device=device)

    def normal():
        return torch.randn(n, generator=generator, device=device)

    def chosen(value):
        return value * (uniform() < p)          # 0 is the identity of every parameter below
    return {
        "mirror_x": chosen((uniform() < 0.5).float()), "mirror_y": chosen((uniform() < 0.5).float()),
        "quarter_turns": chosen((uniform() * 4).floor()), "log2_scale": chosen(0.2 * normal()),
        "turn": chosen((uniform() * 2 - 1) * math.pi), "log2_stretch": chosen(0.2 * normal()),
        "shift_x": chosen(0.125 * normal()), "shift_y": chosen(0.125 * normal()),
        "log2_brightness": chosen(0.2 * normal()), "log2_contrast": chosen(0.5 * normal()),
        "log2_saturation": chosen(normal()), "hue": chosen((uniform() * 2 - 1) / 2)}


def vector(q):
    """What the network is told of the parameters, (N, DIM) float32: all zero for the identity."""
    quarter = q["quarter_turns"] * math.pi / 2
    return torch.stack([q["mirror_x"], q["mirror_y"], quarter.cos() - 1, quarter.sin(), q["log2_scale"], q["turn"].cos() - 1,
                        q["turn"].sin(), q["log2_stretch"], q["shift_x"], q["shift_y"], q["log2_brightness"],
                        q["log2_contrast"], q["log2_saturation"], 2 * q["hue"]], 1)


def inverse_affine(q):
    """For each image the matrix (2, 3) from output to input coordinates in [-1, 1]: mirror, turn, scale, shift, inverted.

    Forwards, an image is mirrored, turned by quarters, scaled by 2^s, turned by an angle (both counter-clockwise),
    stretched by 2^(+-a) along the axes, then shifted by a fraction of its size.
    """
    zero = torch.zeros_like(q["turn"])

    def matrix(a, b, c, d):
        return torch.stack([torch.stack([a, b], 1), torch.stack([c, d], 1)], 1)

    def rotation(angle):                # y points down: the inverse of a counter-clockwise turn
        return matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos())

    def diagonal(x, y):
        return matrix(x, zero, zero, y)
    stretch, scale = 2 ** q["log2_stretch"], 2 ** -q["log2_scale"]
    linear = (diagonal(1 - 2 * q["mirror_x"], 1 - 2 * q["mirror_y"]) @ rotation(q["quarter_turns"] * math.pi / 2)
              @ diagonal(scale, scale) @ rotation(q["turn"]) @ diagonal(1 / stretch, stretch))
    shift = torch.stack([2 * q["shift_x"], 2 * q["shift_y"]], 1)[:, :, None]
    return torch.cat([linear, -linear @ shift], 2)


def geometry(x, q):
    """The geometric operations: x (N, C, H, W); images to which none applies come back bit for bit."""
    theta = inverse_affine(q)
    identity = torch.eye(2, 3, device=x.device)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    moved = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return torch.where((theta == identity).all(2).all(1)[:, None, None, None], x, moved)


def blend(x, other, factor):
    """factor x + (1 - factor) other, an image's own factor (N,)."""
    factor = factor[:, None, None, None]
    return factor * x + (1 - factor) * other


def hue_turn(x, hue):
    """Turn the hue of RGB x (N, 3, H, W) in [0, 1] by `hue` (N,) turns in [-1/2, 1/2], in the HSV cylinder."""
    top, low = x.max(1).values, x.min(1).values
    chroma = top - low
    safe = chroma.clamp(min=1e-8)
    r, g, b = x.unbind(1)
    h = torch.where(top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    h = h + 6 * hue[:, None, None]
    k = torch.stack([(n + h) % 6 for n in (5.0, 3.0, 1.0)], 1)              # of red, green and blue
    return top[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def colour(x, q):
    """The colour operations, torchvision's without its clipping: x (N, C, H, W) in [0, 1]; C = 1 has no saturation or hue."""
    x = blend(x, torch.zeros_like(x), 2 ** q["log2_brightness"])
    def to_grey(x):             # with Python's numbers: a tensor of them would make the device wait for a copy
        return sum(weight * part for weight, part in zip(GREY, x.split(1, 1)))
    grey = to_grey(x) if x.shape[1] == 3 else x
    x = blend(x, grey.mean((1, 2, 3), keepdim=True), 2 ** q["log2_contrast"])
    if x.shape[1] == 3:
        x = blend(x, to_grey(x), 2 ** q["log2_saturation"])
        x = torch.where((q["hue"] == 0)[:, None, None, None], x, hue_turn(x, q["hue"]))
    return x


@torch.no_grad()
def augment(x_0, p, generator):
    """Augment images x_0 (N, C, H, W) in [-1, 1]; returns them, not clipped, and their vectors (N, DIM)."""
    q = draw_parameters(len(x_0), p, generator)
    coloured = colour(geometry(x_0, q) / 2 + 0.5, q) * 2 - 1
    told = vector(q)
    return torch.where((told == 0).all(1)[:, None, None, None], x_0, coloured), told
