"""The network and the forward process: the DDPM U-Net of CBDM, OC and the paper, in two halves.

    net = UNet(UNetConfig(num_classes=100))           # the paper's network: 35,797,507 parameters
    eps = net(x_t, t, y)                              # = net.decode(*net.encode(x_t, t, y))

The two halves make CM cheap: capacity is reserved in the up-sampling half only (Sec. G.1), so
theta and theta^g share `encode`, and only `decode` runs twice. Dropout masks are an argument, made
by `draw_masks`: both predictions of Eq. (2) see the same masks, a step is a pure function of its
random numbers, and without masks there is no dropout, whatever the train() or eval() mode.

Symbols: x_0 image in [-1, 1], x_t noisy image, t in {0 ... T-1}, eps noise, alphas_bar cumulative
product (Sec. A). Shapes: N images, C channels, H x W pixels.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variants.fused_norm import conv_plus_emb, norm_silu


# --------------------------------------------------------------------------------------------------
# Forward process (Sec. A): x_t = sqrt(alphas_bar_t) x_0 + sqrt(1 - alphas_bar_t) eps

def make_alphas_bar(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Tensor:
    """alphas_bar_t = prod_{i<=t} (1 - beta_i) of the linear schedule (Sec. G.1).

    Returns float64 (T,), strictly decreasing.
    """
    betas = torch.linspace(beta_1, beta_T, T, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)


def signal_and_sigma(alphas_bar: Tensor) -> tuple[Tensor, Tensor]:
    """(sqrt(alphas_bar), sqrt(1 - alphas_bar)), (T,) each: roots in float64, kept in float32."""
    return alphas_bar.sqrt().float(), (1 - alphas_bar).sqrt().float()


def extract(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """values[t], shaped (N, 1, ..., 1) to multiply x (N, ...); values (T,), t (N,) int64."""
    return values[t].view(-1, *[1] * (x.dim() - 1))


def q_sample(x_0: Tensor, t: Tensor, eps: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """x_t of q(x_t | x_0) (Sec. A), given its noise.

    x_0, eps: (N, C, H, W). t: (N,) int64. signal, sigma: (T,). Returns x_t (N, C, H, W).
    """
    return extract(signal, t, x_0) * x_0 + extract(sigma, t, x_0) * eps


def distance(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||^2 / (C H W) per image, for a and b (N, C, H, W): (N,).

    The paper's squared norm as a mean over elements.
    """
    return (a - b).square().flatten(1).mean(1)


def stratified_timesteps(n: int, repeats: int, T: int = 1000) -> Tensor:
    """Timesteps (n, repeats) int64 that cover 0 ... T - 1 evenly for every image.

    Each image gets one timestep in every repeats-th of the range, at a position that moves with the
    image: multiples of the golden ratio spread any number of images evenly.
    """
    offset = (torch.arange(n, dtype=torch.float64) * 0.6180339887498949) % 1
    part = torch.arange(repeats)[None] + offset[:, None]
    return (part * T / repeats).long()


# --------------------------------------------------------------------------------------------------
# Building blocks

def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with min(32, channels / 4) groups: at least four channels per group.

    With one channel per group the norm removes an embedding added to that channel exactly, and the
    output of a narrow network would not depend on t and y. Raises ValueError where the groups do
    not divide the channels.
    """
    groups = min(32, max(1, channels // 4))
    if channels % groups:
        raise ValueError(f"group norm cannot split {channels} channels into {groups} groups")
    return nn.GroupNorm(groups, channels)


def drop(h: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """h / (1 - dropout) where the mask, a bool of h's shape, is True, else 0; no mask: h itself."""
    return h if mask is None else h * mask * (1 / (1 - dropout))


def init_layer(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    """Xavier-uniform weights, zero bias; gain 1e-5 makes a residual branch start as almost 0."""
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    nn.init.zeros_(layer.bias)
    return layer


def conv(in_ch: int, out_ch: int, kernel: int = 3, stride: int = 1,
         gain: float = 1.0) -> nn.Conv2d:
    """A padded convolution with the initialisation above."""
    layer = nn.Conv2d(in_ch, out_ch, kernel, stride, padding=kernel // 2)
    return init_layer(layer, gain)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of t (N,), with DDPM's frequencies 10000^(-2i/dim): (N, dim) float32."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Embedding(nn.Module):
    """The condition of every block: an MLP of the sinusoid of t, plus a vector per label.

    y = -1 (Null) adds no label vector, and without classes there is none.
    """

    def __init__(self, cfg: "UNetConfig"):
        super().__init__()
        self.ch = cfg.ch
        self.linear1 = init_layer(nn.Linear(cfg.ch, 4 * cfg.ch))
        self.linear2 = init_layer(nn.Linear(4 * cfg.ch, 4 * cfg.ch))
        self.label = nn.Embedding(cfg.num_classes, 4 * cfg.ch) if cfg.num_classes else None
        if cfg.augment_dim:
            self.augment = nn.Linear(cfg.augment_dim, 4 * cfg.ch, bias=False)
            nn.init.zeros_(self.augment.weight)

    def forward(self, t: Tensor, y: Tensor, a: Tensor | None = None) -> Tensor:
        emb = self.linear2(F.silu(self.linear1(sinusoid(t, self.ch))))    # (N, 4 ch)
        if self.label is not None:
            emb = emb + self.label(y.clamp(min=0)) * (y >= 0)[:, None]    # (N, 4 ch)
        return emb if a is None else emb + self.augment(a)


class Attention(nn.Module):
    """Single-head self-attention over the H x W positions, residual: (N, C, H, W) -> same."""

    def __init__(self, ch: int):
        super().__init__()
        self.norm = group_norm(ch)
        self.q = conv(ch, ch, 1)
        self.k = conv(ch, ch, 1)
        self.v = conv(ch, ch, 1)
        self.proj = conv(ch, ch, 1, gain=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu(self.norm, x, silu=False)
        q = self.to_sequence(self.q(h))                             # (N, 1, HW, C)
        k = self.to_sequence(self.k(h))
        v = self.to_sequence(self.v(h))
        h = F.scaled_dot_product_attention(q, k, v)                 # (N, 1, HW, C)
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)           # (N, C, H, W)
        return x + self.proj(h)

    @staticmethod
    def to_sequence(x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 1, HW, C): one head."""
        return x.flatten(2).transpose(1, 2).unsqueeze(1)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, the embedding added between them, and attention where asked for.

    (N, in_ch, H, W) -> (N, out_ch, H, W). level, out_ch: where and how wide the block's dropout
    mask is. dropout: the share of it that is False.
    """

    def __init__(self, in_ch: int, out_ch: int, emb_ch: int, level: int, dropout: float,
                 attention: bool = False):
        super().__init__()
        self.level = level
        self.out_ch = out_ch
        self.dropout = dropout
        self.norm1 = group_norm(in_ch)
        self.conv1 = conv(in_ch, out_ch)
        self.emb_proj = init_layer(nn.Linear(emb_ch, out_ch))
        self.norm2 = group_norm(out_ch)
        self.conv2 = conv(out_ch, out_ch, gain=1e-5)
        self.shortcut = conv(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        self.attention = Attention(out_ch) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor, mask: Tensor | None = None) -> Tensor:
        h = conv_plus_emb(self.conv1, norm_silu(self.norm1, x), self.emb_proj, F.silu(emb))
        h = norm_silu(self.norm2, h)
        h = self.conv2(drop(h, mask, self.dropout))
        return self.attention(self.shortcut(x) + h)


class Down(nn.Module):
    """Halve H and W with a strided convolution."""

    def __init__(self, ch: int):
        super().__init__()
        self.conv = conv(ch, ch, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Up(nn.Module):
    """Double H and W (nearest neighbour), then convolve."""

    def __init__(self, ch: int):
        super().__init__()
        self.conv = conv(ch, ch)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def run_block(layer: nn.Module, x: Tensor, emb: Tensor, masks: Iterator) -> Tensor:
    """Call one layer; a ResBlock also takes emb and the next dropout mask, if there is one."""
    if isinstance(layer, ResBlock):
        return layer(x, emb, next(masks, None))
    return layer(x)


# --------------------------------------------------------------------------------------------------
# The U-Net

@dataclass
class UNetConfig:
    """What defines the network, as plain types for checkpoints. Defaults: the paper's CIFAR-100."""
    channels: int = 3
    num_classes: int = 100
    ch: int = 128
    ch_mult: tuple = (1, 2, 2, 2)
    attn: tuple = (1,)              # levels with attention: level l works at resolution / 2^l
    num_res_blocks: int = 2
    dropout: float = 0.1
    augment_dim: int = 0            # length of augment.py's vector, 0 without augmentation


class Encoder(nn.Module):
    """The half that theta and theta^g share: embedding, down-sampling path and middle."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        emb_ch = 4 * cfg.ch
        last = len(cfg.ch_mult) - 1
        ch = cfg.ch
        self.embedding = Embedding(cfg)
        self.head = conv(cfg.channels, ch)
        self.down = nn.ModuleList()
        self.skip_chs = [ch]                                    # of the tensors that decode takes
        for level, mult in enumerate(cfg.ch_mult):
            for _ in range(cfg.num_res_blocks):
                self.down.append(ResBlock(ch, cfg.ch * mult, emb_ch, level, cfg.dropout,
                                          level in cfg.attn))
                ch = cfg.ch * mult
                self.skip_chs.append(ch)
            if level < last:
                self.down.append(Down(ch))
                self.skip_chs.append(ch)
        self.middle = nn.ModuleList([
            ResBlock(ch, ch, emb_ch, last, cfg.dropout, attention=True),
            ResBlock(ch, ch, emb_ch, last, cfg.dropout)])

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, masks: Sequence[Tensor],
                a: Tensor | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
        emb = self.embedding(t, y, a)
        masks = iter(masks)
        h = self.head(x_t)                                      # (N, ch, H, W)
        skips = [h]
        for layer in self.down:
            h = run_block(layer, h, emb, masks)
            skips.append(h)                                     # (N, ch_l, H / 2^l, W / 2^l)
        for layer in self.middle:
            h = run_block(layer, h, emb, masks)
        return h, skips, emb


class Decoder(nn.Module):
    """The up-sampling half, the part in which CM reserves capacity (Sec. G.1)."""

    def __init__(self, cfg: UNetConfig, skip_chs: list[int]):
        super().__init__()
        emb_ch = 4 * cfg.ch
        ch = cfg.ch * cfg.ch_mult[-1]
        skip_chs = list(skip_chs)
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(cfg.ch_mult))):
            for _ in range(cfg.num_res_blocks + 1):
                in_ch = ch + skip_chs.pop()
                self.up.append(ResBlock(in_ch, cfg.ch * mult, emb_ch, level, cfg.dropout,
                                        level in cfg.attn))
                ch = cfg.ch * mult
            if level:
                self.up.append(Up(ch))
        self.norm = group_norm(ch)
        self.conv = conv(ch, cfg.channels, gain=1e-5)

    def forward(self, h: Tensor, skips: list[Tensor], emb: Tensor,
                masks: Sequence[Tensor]) -> Tensor:
        skips = list(skips)                 # a copy: decode may run twice on one encoding
        masks = iter(masks)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                h = torch.cat([h, skips.pop()], dim=1)
            h = run_block(layer, h, emb, masks)
        return self.conv(norm_silu(self.norm, h))               # (N, channels, H, W)


class UNet(nn.Module):
    """eps_theta(x_t, t, y): x_t (N, channels, H, W), t (N,) int64 in [0, T), y (N,) int64.

    y is in [0, num_classes), or -1 for Null. H and W must be divisible by 2^(len(ch_mult) - 1).
    Weights are float32; run it under autocast for less.
    """

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(cfg).items()}
        self.cfg = UNetConfig(**plain)
        self.encoder = Encoder(self.cfg)
        self.decoder = Decoder(self.cfg, self.encoder.skip_chs)

    def encode(self, x_t: Tensor, t: Tensor, y: Tensor, masks: Sequence[Tensor] = (),
               a: Tensor | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
        """x_t, t, y -> (h, skips, emb), what decode takes.

        masks: the first list of draw_masks, or () for no dropout. a: what augmentation did to the
        images, (N, augment_dim), or None for nothing.
        """
        factor = 2 ** (len(self.cfg.ch_mult) - 1)
        H, W = x_t.shape[-2:]
        assert H % factor == 0 and W % factor == 0, f"{H} x {W} is not divisible by {factor}"
        return self.encoder(x_t, t, y, masks, a)

    def decode(self, h: Tensor, skips: list[Tensor], emb: Tensor,
               masks: Sequence[Tensor] = ()) -> Tensor:
        """encode's result -> eps (N, channels, H, W).

        masks: the second list of draw_masks, or () for no dropout.
        """
        return self.decoder(h, skips, emb, masks)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.decode(*self.encode(x_t, t, y))

    def draw_masks(self, n: int, size: int,
                   generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """Dropout masks for n images of `size` pixels per side: (for encode, for decode).

        Each is a list of one tensor per ResBlock, in the order in which they run. A mask is False
        with probability cfg.dropout, else True; it is on the generator's device, channels last.
        With dropout 0 the lists are empty.
        """
        if not self.cfg.dropout:
            return [], []

        shapes = []
        for half in (self.encoder, self.decoder):
            blocks = [m for m in half.modules() if isinstance(m, ResBlock)]
            shapes.append([(n, size >> m.level, size >> m.level, m.out_ch) for m in blocks])
        masks = dropout_masks(shapes[0] + shapes[1], self.cfg.dropout, generator)
        return masks[:len(shapes[0])], masks[len(shapes[0]):]


def dropout_masks(shapes: Sequence[Sequence[int]], dropout: float,
                  generator: torch.Generator) -> list[Tensor]:
    """Bools of these shapes, (N, H, W, C) in memory and given as (N, C, H, W): a list.

    True with probability 1 - dropout (to 16 bits). All in one draw, since a GPU would wait for
    each. One byte each, where numbers of the network's dtype would be two or four.
    """
    threshold = min(round(65536 * (1 - dropout)) - 32768, 32767)
    counts = [math.prod(shape) for shape in shapes]
    # One random int64 makes four 16-bit numbers; each mask begins with a new one
    lengths = [-(-count // 4) * 4 for count in counts]
    bits = torch.empty(sum(lengths) // 4, dtype=torch.int64, device=generator.device)
    bits.random_(-2 ** 63, None, generator=generator)
    masks = bits.view(torch.int16) < threshold
    return [part[:count].view(shape).permute(0, 3, 1, 2)
            for part, count, shape in zip(masks.split(lengths), counts, shapes)]
