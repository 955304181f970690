"""+ADA: augmentation (Karras et al., 2020) in its non-leaky form (Karras et al., 2022).

    x_0, a = augment(x_0, p=0.12, generator=g)          # a (N, 14): what was done; zeros: nothing
    eps = net.decode(*net.encode(x_t, t, y, masks, a))  # the network gets a

The network gets `a` in training. At sampling a = 0, so it generates plain images.

The paper names ADA without its settings. p = 0.12 is what the 2022 paper uses on CIFAR-10. Each
operation is applied to an image with probability p, independently of the others. The geometric
operations are one affine resampling (bilinear, mirrored at the border). The colour operations are
those of torchvision, one after the other. At p = 0 images come back unchanged.
"""
import math

import torch
from torch.nn import functional as F

NAMES = (               # of the numbers in the vector that the network gets
    "mirror_x", "mirror_y", "quarter_turn_cos", "quarter_turn_sin", "scale", "turn_cos", "turn_sin",
    "stretch", "shift_x", "shift_y", "brightness", "contrast", "saturation", "hue",
)
DIM = len(NAMES)
GREY = (0.2989, 0.587, 0.114)           # luminance of red, green and blue, as in torchvision


# --------------------------------------------------------------------------------------------------
# Parameters

def draw_parameters(n, p, generator):
    """Random parameters of n images, {name: (n,)}; each is that of the identity unless chosen.

    The order of the lines below is the order of the random numbers.
    """
    device = generator.device

    def uniform():
        return torch.rand(n, generator=generator, device=device)

    def normal():
        return torch.randn(n, generator=generator, device=device)

    def chosen(value):
        return value * (uniform() < p)          # 0 is the identity of every parameter below

    return {
        "mirror_x": chosen((uniform() < 0.5).float()),
        "mirror_y": chosen((uniform() < 0.5).float()),
        "quarter_turns": chosen((uniform() * 4).floor()),
        "log2_scale": chosen(0.2 * normal()),
        "turn": chosen((uniform() * 2 - 1) * math.pi),
        "log2_stretch": chosen(0.2 * normal()),
        "shift_x": chosen(0.125 * normal()),
        "shift_y": chosen(0.125 * normal()),
        "log2_brightness": chosen(0.2 * normal()),
        "log2_contrast": chosen(0.5 * normal()),
        "log2_saturation": chosen(normal()),
        "hue": chosen((uniform() * 2 - 1) / 2),
    }


def vector(params):
    """The parameters as the network gets them, (N, DIM) float32 in the order of NAMES.

    All zero for the identity.
    """
    quarter = params["quarter_turns"] * math.pi / 2
    return torch.stack([
        params["mirror_x"],
        params["mirror_y"],
        quarter.cos() - 1,
        quarter.sin(),
        params["log2_scale"],
        params["turn"].cos() - 1,
        params["turn"].sin(),
        params["log2_stretch"],
        params["shift_x"],
        params["shift_y"],
        params["log2_brightness"],
        params["log2_contrast"],
        params["log2_saturation"],
        2 * params["hue"],
    ], 1)


# --------------------------------------------------------------------------------------------------
# Geometry

def matrices(a, b, c, d):
    """Numbers (N,) -> matrices [[a, b], [c, d]], (N, 2, 2)."""
    return torch.stack([torch.stack([a, b], 1), torch.stack([c, d], 1)], 1)


def diagonal(x, y):
    """Numbers (N,) -> diagonal matrices (N, 2, 2)."""
    zero = torch.zeros_like(x)
    return matrices(x, zero, zero, y)


def inverse_rotation(angle):
    """Inverses (N, 2, 2) of counter-clockwise rotations by angle (N,), where y points down."""
    return matrices(angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def inverse_affine(params):
    """The matrix (2, 3) of each image from output to input coordinates in [-1, 1]: (N, 2, 3).

    It is the inverse of what is done to an image. The image is mirrored, turned by quarters, scaled
    by 2^s, turned by an angle (both turns counter-clockwise), stretched by 2^a along x and 2^-a
    along y, then shifted by a fraction of its size.
    """
    scale = 2 ** -params["log2_scale"]
    stretch = 2 ** params["log2_stretch"]
    mirror = diagonal(1 - 2 * params["mirror_x"], 1 - 2 * params["mirror_y"])
    quarter_turn = inverse_rotation(params["quarter_turns"] * math.pi / 2)
    turn = inverse_rotation(params["turn"])
    linear = mirror @ quarter_turn @ diagonal(scale, scale) @ turn @ diagonal(1 / stretch, stretch)
    shift = torch.stack([2 * params["shift_x"], 2 * params["shift_y"]], 1)[:, :, None]
    return torch.cat([linear, -linear @ shift], 2)


def geometry(x, params):
    """The geometric operations on x (N, C, H, W).

    An image to which none applies comes back bit for bit.
    """
    theta = inverse_affine(params)
    identity = torch.eye(2, 3, device=x.device)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    moved = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    unmoved = (theta == identity).all(2).all(1)
    return torch.where(unmoved[:, None, None, None], x, moved)


# --------------------------------------------------------------------------------------------------
# Colour

def blend(x, other, factor):
    """factor x + (1 - factor) other, with one factor per image (N,)."""
    factor = factor[:, None, None, None]
    return factor * x + (1 - factor) * other


def to_grey(x):
    """The luminance (N, 1, H, W) of RGB x (N, 3, H, W).

    The weights are Python numbers: for a tensor of them the device would wait for a copy.
    """
    return sum(weight * part for weight, part in zip(GREY, x.split(1, 1)))


def hue_turn(x, hue):
    """Turn the hue of RGB x (N, 3, H, W) in [0, 1] in the HSV cylinder.

    hue (N,) is in [-1/2, 1/2]; 1 is a full turn.
    """
    top = x.max(1).values
    chroma = top - x.min(1).values
    safe = chroma.clamp(min=1e-8)       # a divisor that is not zero
    r, g, b = x.unbind(1)
    green_or_blue = torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    h = torch.where(top == r, (g - b) / safe, green_or_blue)        # in sixths of a turn
    h = h + 6 * hue[:, None, None]
    k = torch.stack([(n + h) % 6 for n in (5.0, 3.0, 1.0)], 1)      # of red, green and blue
    return top[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def colour(x, params):
    """The colour operations, torchvision's without its clipping, on x (N, C, H, W) in [0, 1].

    Where C is 1, saturation and hue do nothing.
    """
    rgb = x.shape[1] == 3
    x = blend(x, torch.zeros_like(x), 2 ** params["log2_brightness"])
    grey = to_grey(x) if rgb else x
    x = blend(x, grey.mean((1, 2, 3), keepdim=True), 2 ** params["log2_contrast"])
    if rgb:
        x = blend(x, to_grey(x), 2 ** params["log2_saturation"])
        unturned = params["hue"] == 0
        x = torch.where(unturned[:, None, None, None], x, hue_turn(x, params["hue"]))
    return x


# --------------------------------------------------------------------------------------------------
# All operations on a batch

@torch.no_grad()
def augment(x_0, p, generator):
    """Augment images x_0 (N, C, H, W) in [-1, 1], each operation with probability p.

    Returns the images, not clipped, and their vectors (N, DIM).
    """
    params = draw_parameters(len(x_0), p, generator)
    moved = geometry(x_0, params)
    coloured = colour(moved / 2 + 0.5, params) * 2 - 1
    a = vector(params)
    unchanged = (a == 0).all(1)
    return torch.where(unchanged[:, None, None, None], x_0, coloured), a
