"""The network and the forward process: the DDPM U-Net of CBDM and OC (and so of the paper), cut into encode and decode.

    net = UNet(UNetConfig(num_classes=100))           # the paper's network: 35,797,507 parameters
    eps = net(x_t, t, y)                              # = net.decode(*net.encode(x_t, t, y))

The cut is what makes CM cheap: capacity is reserved in the up-sampling half only (Sec. G.1), so theta and theta^g
share `encode` and only `decode` runs twice. Dropout masks are an argument, drawn by `draw_masks`: the two
predictions of Eq. (2) then see the same masks, a step is a pure function of its draw, and a network that is given
no masks has no dropout, whatever its train() or eval() mode.

Symbols: x_0 image in [-1, 1], x_t noisy image, t in {0 ... T-1}, eps noise, alphas_bar cumulative product (Sec. A).
"""
import math
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn import functional as F


# ----------------------------------------------------------------------------------------------------------------------
# Forward process (Sec. A): x_t = sqrt(alphas_bar_t) x_0 + sqrt(1 - alphas_bar_t) eps

def make_alphas_bar(T=1000, beta_1=1e-4, beta_T=0.02):
    """alphas_bar_t = prod_{i<=t} (1 - beta_i) of the linear schedule, Sec. G.1: float64 (T,), strictly decreasing."""
    return torch.cumprod(1 - torch.linspace(beta_1, beta_T, T, dtype=torch.float64), dim=0)


def per_image(values, t, x):
    """values[t] in x's dtype, shaped (N, 1, ..., 1) to broadcast against x (N, ...); values (T,), t (N,) int64."""
    return values.to(x.device)[t].to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def q_sample(x_0, t, eps, alphas_bar):
    """Sample q(x_t | x_0) given its noise (Sec. A): x_0, eps (N, C, H, W), t (N,) int64, alphas_bar (T,) -> x_t."""
    return per_image(alphas_bar.sqrt(), t, x_0) * x_0 + per_image((1 - alphas_bar).sqrt(), t, x_0) * eps


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks

def group_norm(channels):
    """GroupNorm with min(32, channels / 4) groups: at least four channels a group.

    With one channel a group the norm removes an embedding added to that channel exactly, and a narrow network
    would be blind to t and y. Raises ValueError where the groups do not divide the channels.
    """
    groups = min(32, max(1, channels // 4))
    if channels % groups:
        raise ValueError(f"group norm cannot split {channels} channels into {groups} groups")
    return nn.GroupNorm(groups, channels)


def init_layer(layer, gain=1.0):
    """Xavier-uniform weights, zero bias; gain 1e-5 makes a residual branch start as (almost) nothing."""
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    nn.init.zeros_(layer.bias)
    return layer


def conv(in_ch, out_ch, kernel=3, stride=1, gain=1.0):
    """A padded convolution with the initialisation above."""
    return init_layer(nn.Conv2d(in_ch, out_ch, kernel, stride, padding=kernel // 2), gain)


def sinusoid(t, dim):
    """Sinusoidal embedding of t (N,) -> (N, dim) float32, the frequencies of the DDPM code: 10000^(-2i/dim)."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Embedding(nn.Module):
    """The condition of every block: an MLP of the sinusoid of t, plus a label vector; y = -1 (Null) adds none."""

    def __init__(self, cfg):
        super().__init__()
        self.ch = cfg.ch
        self.linear1 = init_layer(nn.Linear(cfg.ch, 4 * cfg.ch))
        self.linear2 = init_layer(nn.Linear(4 * cfg.ch, 4 * cfg.ch))
        self.label = nn.Embedding(cfg.num_classes, 4 * cfg.ch)
        if cfg.augment_dim:
            self.augment = nn.Linear(cfg.augment_dim, 4 * cfg.ch, bias=False)
            nn.init.zeros_(self.augment.weight)

    def forward(self, t, y, a=None):
        emb = self.linear2(F.silu(self.linear1(sinusoid(t, self.ch))))    # (N, 4 ch)
        emb = emb + self.label(y.clamp(min=0)) * (y >= 0)[:, None]        # (N, 4 ch)
        return emb if a is None else emb + self.augment(a)


class Attention(nn.Module):
    """Single-head self-attention over the H x W positions, with a residual connection: (N, C, H, W) -> same."""

    def __init__(self, ch):
        super().__init__()
        self.norm = group_norm(ch)
        self.q, self.k, self.v = conv(ch, ch, 1), conv(ch, ch, 1), conv(ch, ch, 1)
        self.proj = conv(ch, ch, 1, gain=1e-5)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))  # (N, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class ResBlock(nn.Module):
    """Two 3x3 convolutions, the embedding added between them, optional attention: (N, in, H, W) -> (N, out, H, W)."""

    def __init__(self, in_ch, out_ch, emb_ch, level, attention=False):
        super().__init__()
        self.level, self.out_ch = level, out_ch     # where and how wide this block's dropout mask is
        self.norm1, self.conv1 = group_norm(in_ch), conv(in_ch, out_ch)
        self.emb_proj = init_layer(nn.Linear(emb_ch, out_ch))
        self.norm2, self.conv2 = group_norm(out_ch), conv(out_ch, out_ch, gain=1e-5)
        self.shortcut = conv(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        self.attention = Attention(out_ch) if attention else nn.Identity()

    def forward(self, x, emb, mask=None):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.emb_proj(F.silu(emb))[:, :, None, None]
        h = F.silu(self.norm2(h))
        h = self.conv2(h if mask is None else h * mask)
        return self.attention(self.shortcut(x) + h)


class Down(nn.Module):
    """Halve H and W with a strided convolution."""

    def __init__(self, ch):
        super().__init__()
        self.conv = conv(ch, ch, stride=2)

    def forward(self, x):
        return self.conv(x)


class Up(nn.Module):
    """Double H and W (nearest neighbour), then convolve."""

    def __init__(self, ch):
        super().__init__()
        self.conv = conv(ch, ch)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def run_block(layer, x, emb, masks):
    """Call one layer; a ResBlock also takes emb and the next dropout mask of the iterator `masks`, if it has one."""
    return layer(x, emb, next(masks, None)) if isinstance(layer, ResBlock) else layer(x)


# ----------------------------------------------------------------------------------------------------------------------
# The U-Net

@dataclass
class UNetConfig:
    """What defines the network; plain types, so that it travels in a checkpoint. Defaults: the paper's CIFAR-100."""
    channels: int = 3
    num_classes: int = 100
    ch: int = 128
    ch_mult: tuple = (1, 2, 2, 2)
    attn: tuple = (1,)              # levels with attention: level l works at resolution / 2^l
    num_res_blocks: int = 2
    dropout: float = 0.1
    augment_dim: int = 0            # length of augment.py's vector, where the network is told of augmentations

    def to_dict(self):
        """The same as plain lists and numbers, for JSON and checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


class Encoder(nn.Module):
    """The half that theta and theta^g share: embedding, down-sampling path and middle."""

    def __init__(self, cfg):
        super().__init__()
        emb_ch, ch, last = 4 * cfg.ch, cfg.ch, len(cfg.ch_mult) - 1
        self.embedding = Embedding(cfg)
        self.head = conv(cfg.channels, ch)
        self.down, self.skip_chs = nn.ModuleList(), [ch]
        for level, mult in enumerate(cfg.ch_mult):
            for _ in range(cfg.num_res_blocks):
                self.down.append(ResBlock(ch, cfg.ch * mult, emb_ch, level, level in cfg.attn))
                ch = cfg.ch * mult
                self.skip_chs.append(ch)
            if level < last:
                self.down.append(Down(ch))
                self.skip_chs.append(ch)
        self.middle = nn.ModuleList([ResBlock(ch, ch, emb_ch, last, attention=True), ResBlock(ch, ch, emb_ch, last)])

    def forward(self, x_t, t, y, masks, a=None):
        emb, masks = self.embedding(t, y, a), iter(masks)
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

    def __init__(self, cfg, skip_chs):
        super().__init__()
        emb_ch, ch, skip_chs = 4 * cfg.ch, cfg.ch * cfg.ch_mult[-1], list(skip_chs)
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(cfg.ch_mult))):
            for _ in range(cfg.num_res_blocks + 1):
                self.up.append(ResBlock(ch + skip_chs.pop(), cfg.ch * mult, emb_ch, level, level in cfg.attn))
                ch = cfg.ch * mult
            if level:
                self.up.append(Up(ch))
        self.norm, self.conv = group_norm(ch), conv(ch, cfg.channels, gain=1e-5)

    def forward(self, h, skips, emb, masks):
        skips, masks = list(skips), iter(masks)                 # a copy: decode may run twice on one encoding
        for layer in self.up:
            h = torch.cat([h, skips.pop()], dim=1) if isinstance(layer, ResBlock) else h
            h = run_block(layer, h, emb, masks)
        return self.conv(F.silu(self.norm(h)))                  # (N, channels, H, W)


class UNet(nn.Module):
    """eps_theta(x_t, t, y): x_t (N, channels, H, W), t (N,) int64 in [0, T), y (N,) int64 in [0, num_classes) or -1.

    H and W must be divisible by 2^(len(ch_mult) - 1). Weights are float32; run it under autocast for less.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = UNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in vars(cfg).items()})
        self.encoder = Encoder(self.cfg)
        self.decoder = Decoder(self.cfg, self.encoder.skip_chs)

    def encode(self, x_t, t, y, masks=(), a=None):
        """x_t, t, y -> (h, skips, emb), what decode takes; masks: the first list of draw_masks, or () for none.

        a: what augmentation did to the images, (N, augment_dim); None for nothing.
        """
        factor = 2 ** (len(self.cfg.ch_mult) - 1)
        assert x_t.shape[-1] % factor == 0 and x_t.shape[-2] % factor == 0, f"{tuple(x_t.shape)} not divisible by {factor}"
        return self.encoder(x_t, t, y, masks, a)

    def decode(self, h, skips, emb, masks=()):
        """encode's result -> eps (N, channels, H, W); masks: the second list of draw_masks, or () for none."""
        return self.decoder(h, skips, emb, masks)

    def forward(self, x_t, t, y):
        return self.decode(*self.encode(x_t, t, y))

    def draw_masks(self, n, size, generator, dtype=torch.float32):
        """Dropout masks for n images of `size` pixels a side: (for encode, for decode), lists of one tensor a block.

        A mask is 0 with probability cfg.dropout, else 1 / (1 - dropout); it lives on the generator's device, in the
        dtype in which the network computes, channels last. With dropout 0 the lists are empty.
        """
        return self.draw(self.encoder, n, size, generator, dtype), self.draw(self.decoder, n, size, generator, dtype)

    def draw(self, half, n, size, generator, dtype):
        """The masks of one half, in the order in which its blocks run."""
        if not self.cfg.dropout:
            return []
        scale = torch.tensor(1 / (1 - self.cfg.dropout), dtype=dtype).item()    # what the dtype makes of it: a mask's
        threshold = min(round(65536 / scale) - 32768, 32767)                    # mean stays 1, to 16 bits
        shapes = [(n, size >> m.level, size >> m.level, m.out_ch) for m in half.modules() if isinstance(m, ResBlock)]
        masks = []
        for shape in shapes:
            count = math.prod(shape)
            bits = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
            bits.random_(-2 ** 63, None, generator=generator)                   # one draw makes four 16-bit numbers
            kept = bits.view(torch.int16)[:count].view(shape) < threshold
            masks.append((kept.to(dtype) * scale).permute(0, 3, 1, 2))
        return masks
