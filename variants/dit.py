"""A small diffusion transformer (DiT; Peebles and Xie, 2023), cut in two as CM needs it.

    net = DiT(num_classes=10, size=32)      # 4.6 million parameters; --network dit of train.py
    eps = net(x_t, t, y)                    # = net.decode(*net.encode(x_t, t, y))

Patches of the image are tokens; t and y shift, scale and gate every block (adaLN-Zero). The blocks
are cut in the middle: capacity is reserved in the second half, which runs twice, as with the U-Net.
The embedding of t and y, and dropout masks as an argument, are the U-Net's (model.py). In place of
class labels there may be texts, to which every block attends (latent/text_to_image.py).
"""
import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from model import Embedding, drop, dropout_masks, init_layer


def positions(side, ch):
    """Sines and cosines of a token's row and column, (side^2, ch) float32; ch divisible by 4."""
    freqs = 10000 ** (-torch.arange(ch // 4) / (ch // 4))
    angles = torch.arange(side)[:, None] * freqs                        # (side, ch / 4)
    one = torch.cat([angles.sin(), angles.cos()], 1)                    # (side, ch / 2)
    rows = one[:, None].expand(side, side, -1)
    columns = one[None].expand(side, side, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


def modulation(emb_ch, out_ch):
    """A Linear that starts at zero: each block begins as the identity."""
    return init_layer(nn.Linear(emb_ch, out_ch), gain=0.0)


def modulate(x, shift, scale):
    """LayerNorm of tokens x (N, T, ch), without weights of its own, then x (1 + scale) + shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class CrossAttention(nn.Module):
    """Attention of tokens x (N, T, ch) to a text (N, L, text_ch): (N, T, ch); it starts as zero."""

    def __init__(self, ch, heads, text_ch):
        super().__init__()
        self.heads = heads
        self.q = init_layer(nn.Linear(ch, ch))
        self.kv = init_layer(nn.Linear(text_ch, 2 * ch))
        self.proj = init_layer(nn.Linear(ch, ch), gain=0.0)

    def forward(self, x, text):
        q = self.q(F.layer_norm(x, x.shape[-1:], eps=1e-6))
        q = q.unflatten(2, (self.heads, -1)).transpose(1, 2)            # (N, heads, T, ch / heads)
        k, v = self.kv(text).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, then an MLP, both residual: tokens (N, T, ch) -> (N, T, ch).

    dropout: the share of a mask that is False. text_ch: the width of texts, which come in between
    by cross-attention; None: there are none.
    """

    def __init__(self, ch, heads, emb_ch, dropout=0.0, text_ch=None):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = init_layer(nn.Linear(ch, 3 * ch))
        self.proj = init_layer(nn.Linear(ch, ch))
        self.mlp1 = init_layer(nn.Linear(ch, 4 * ch))
        self.mlp2 = init_layer(nn.Linear(4 * ch, ch))
        self.condition = modulation(emb_ch, 6 * ch)
        self.cross = CrossAttention(ch, heads, text_ch) if text_ch else None

    def forward(self, x, emb, mask=None, text=None):
        condition = self.condition(F.silu(emb))[:, None].chunk(6, dim=2)    # each (N, 1, ch)
        x = x + condition[2] * self.attend(modulate(x, *condition[:2]))
        if self.cross is not None:
            x = x + self.cross(x, text)
        h = self.mlp1(modulate(x, *condition[3:5]))
        h = self.mlp2(F.gelu(h, approximate="tanh"))
        return x + condition[5] * drop(h, mask, self.dropout)

    def attend(self, x):
        """Attention with several heads: (N, T, ch) -> (N, T, ch)."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(*qkv)                        # (N, heads, T, ch / heads)
        return self.proj(h.transpose(1, 2).flatten(2))


def run_blocks(blocks, x, emb, masks, text=None):
    """Tokens x (N, T, ch) through blocks one after the other, with their masks, if there are."""
    masks = iter(masks)
    for block in blocks:
        x = block(x, emb, next(masks, None), text)
    return x


class Encoder(nn.Module):
    """The half that theta and theta^g share: embedding, patches, the first blocks.

    texts: the module that makes texts (N, L, text_ch) of y, or None for class labels.
    """

    def __init__(self, channels, size, patch, ch, blocks, embedding, texts=None):
        super().__init__()
        self.embedding = embedding
        self.texts = texts
        self.patches = init_layer(nn.Conv2d(channels, ch, patch, stride=patch))
        self.register_buffer("positions", positions(size // patch, ch), persistent=False)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x_t, t, y, masks, a=None):
        emb = self.embedding(t, y, a)
        x = self.patches(x_t).flatten(2).transpose(1, 2) + self.positions   # (N, T, ch)
        text = None if self.texts is None else self.texts(y)
        return run_blocks(self.blocks, x, emb, masks, text), emb, text


class Decoder(nn.Module):
    """The second half of the blocks, in which capacity is reserved; tokens back to pixels."""

    def __init__(self, channels, patch, ch, blocks):
        super().__init__()
        self.patch = patch
        self.blocks = nn.ModuleList(blocks)
        self.condition = modulation(4 * ch, 2 * ch)
        self.out = init_layer(nn.Linear(ch, channels * patch ** 2), gain=0.0)

    def forward(self, x, emb, text, masks):
        x = run_blocks(self.blocks, x, emb, masks, text)
        x = modulate(x, *self.condition(F.silu(emb))[:, None].chunk(2, dim=2))
        x = self.out(x).transpose(1, 2)                                 # (N, C patch^2, T)
        side = math.isqrt(x.shape[2])
        return F.pixel_shuffle(x.unflatten(2, (side, side)), self.patch)    # (N, C, H, W)


def check_sizes(size, ch, depth, patch):
    """Raise ValueError where a network of these sizes cannot be built."""
    if size % patch:
        raise ValueError(f"{size} pixels have no patches of {patch}; take another --patch")
    if ch % 4 or ch > 64 and ch % 64:
        raise ValueError(f"--ch {ch} has no heads of 64; take a multiple of 64")
    if depth < 2:
        raise ValueError("--depth 1 cannot be cut in two; take at least 2")


def heads_of(ch):
    """How many heads a width has: 64 channels each."""
    return max(1, ch // 64)


class DiT(nn.Module):
    """eps_theta(x_t, t, y), as model.UNet: x_t (N, channels, size, size), t (N,), y (N,) or -1.

    ch: the width; 64 channels a head. depth: blocks, half of them in either half. patch: pixels of
    a token's side. augment_dim: see model.UNetConfig. texts: a module that makes texts
    (N, L, text_ch) of y, beside num_classes 0. Raises ValueError where sizes do not fit.
    """

    def __init__(self, channels=3, num_classes=100, size=32, ch=128, depth=8, patch=2, dropout=0.1,
                 augment_dim=0, texts=None, text_ch=None):
        super().__init__()
        check_sizes(size, ch, depth, patch)
        self.side = size // patch
        self.ch = ch
        self.dropout = dropout
        cfg = SimpleNamespace(ch=ch, num_classes=num_classes, augment_dim=augment_dim)
        blocks = [Block(ch, heads_of(ch), 4 * ch, dropout, text_ch) for _ in range(depth)]
        half = depth // 2
        self.encoder = Encoder(channels, size, patch, ch, blocks[:half], Embedding(cfg), texts)
        self.decoder = Decoder(channels, patch, ch, blocks[half:])

    def encode(self, x_t, t, y, masks=(), a=None):
        """x_t, t, y -> (tokens, emb, texts or None), what decode takes; see UNet.encode."""
        return self.encoder(x_t, t, y, masks, a)

    def decode(self, x, emb, text, masks=()):
        """encode's result -> eps (N, channels, size, size)."""
        return self.decoder(x, emb, text, masks)

    def forward(self, x_t, t, y):
        return self.decode(*self.encode(x_t, t, y))

    def draw_masks(self, n, size, generator):
        """Dropout masks of the MLPs' outputs, bools (N, T, ch): (for encode, for decode)."""
        if not self.dropout:
            return [], []
        shape = (n, self.side, self.side, self.ch)

        def masks_of(half):
            masks = dropout_masks([shape] * len(half.blocks), self.dropout, generator)
            return [mask.flatten(2).transpose(1, 2) for mask in masks]
        return masks_of(self.encoder), masks_of(self.decoder)
