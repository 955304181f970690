"""What the paper compares CM with, beyond CBDM and OC (losses.py): focal loss, overlap optimisation, LoRA, group experts.

    python train.py --base focal --no-cm                        # +Focal of Table 2; any base also takes --cm
    python train.py --base rop --no-cm                          # Overlap Opt. of Table G.12
    python train.py --base cbdm --init-from CKPT --lora         # CBDM (LoRA) of Table 1
    python train.py --base ddpm --no-cm --experts group         # Group-Expert LoRA of Table E.2

The paper gives none of these losses' forms; each docstring says which was chosen, and why.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from cm_layers import matrices
from data import splits
from losses import BASES, ddpm, distance

# ----------------------------------------------------------------------------------------------------------------------
# Losses, with the signature of losses.py: loss(p, b, o) -> {name: scalar}


def focal(p, b, o):
    """Focal loss (Lin et al., 2017, -(1 - p)^gamma log p) for regression: E (1 - e^-l)^gamma l, the weight not differentiated.

    l is an image's squared error, a negative log-likelihood up to constants, so e^-l stands for p. gamma = 0 is the DDPM
    loss. As in the original nothing is normalised over the batch, so that cutting it into parts changes nothing; Adam
    does not mind the scale, but beside L_CM the base loss weighs less, and --lam may want to be smaller.
    """
    error = distance(p.eps, b.eps)
    return {"base": ((1 - (-error.detach()).exp()) ** o.focal_gamma * error).mean()}


def rop_time_weights(alphas_bar):
    """The weight of ||eps_i - eps_j||^2 in KL(p(x_{t-1} | x_t, i) || p(x_{t-1} | x_t, j)), divided by its mean: (T,).

    Both are Gaussians of variance beta_t, with means sqrt(1 / alpha_t) (x_t - beta_t / sqrt(1 - alphas_bar_t) eps), so
    the weight is beta_t / (2 alpha_t (1 - alphas_bar_t)): largest at small t.
    """
    alphas = alphas_bar / torch.cat([alphas_bar.new_ones(1), alphas_bar[:-1]])
    weights = (1 - alphas) / (2 * alphas * (1 - alphas_bar))
    return weights / weights.mean()


def rop(p, b, o):
    """Overlap optimisation (Yan et al., 2024): the DDPM loss, and `overlap`, which drives the classes' predictions apart.

    overlap = E w_t max(0, m - ||eps(y) - eps(y')||^2) at one x_t, with another label y', the KL divergence's time
    weights and a margin m, beyond which nothing is pushed; images whose label is dropped, or with y' = y, have none.
    eps(y') is held fixed: each image's own class moves away from a uniformly drawn one. Their paper (arXiv 2402.10821)
    has the KL, the hinge and a time-dependent weighting; the KL's own weights and the one-sided gradient are choices.
    """
    with torch.no_grad():
        other = p.under(b.y_prime)
    hinge = (o.rop_margin - distance(p.eps, other)).clamp(min=0)
    active = (b.y_in >= 0) & (b.y_prime != b.y)
    return {**ddpm(p, b, o), "overlap": (rop_time_weights(o.alphas_bar).float()[b.t] * active * hinge).mean()}


BASES.update(focal=focal, rop=rop)


# ----------------------------------------------------------------------------------------------------------------------
# LoRA fine-tuning, and experts per group

def freeze_all_but_low_rank(net):
    """CBDM (LoRA) of Table 1: of a network whose decoder is reserved, only the A and B are trained; return it."""
    for name, p in net.named_parameters():
        p.requires_grad_(name.rsplit(".", 1)[-1] in ("A", "B") and "parametrizations" in name)
    return net


class GroupExperts(nn.Module):
    """A Linear or Conv2d whose weight is W^g + B_k A_k for an image of group k: E.4's mixture with a fixed router.

    Each image's low-rank part acts on its activations, as a layer of rank r and one of kernel 1, so that a batch may
    mix groups. Images without a group (the label Null) get W^g alone. rank: of each expert.
    """

    def __init__(self, layer, groups, rank, router):
        super().__init__()
        out, inner, *kernel = layer.weight.shape
        self.layer, self.router = layer, [router]               # in a list: the router is not a part of this module
        self.A = nn.Parameter(layer.weight.new_empty(groups * rank, inner, *kernel))     # group by group
        self.B = nn.Parameter(layer.weight.new_zeros(groups, out, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        y, up = self.layer(x), self.B.permute(1, 0, 2).flatten(1)                       # up: (out, groups rank)
        own = self.router[0].one_hot.repeat_interleave(self.B.shape[2], 1).to(y.dtype)   # (N, groups rank)
        if isinstance(self.layer, nn.Linear):
            return y + F.linear(F.linear(x, self.A) * own, up)
        c = self.layer
        h = F.conv2d(x, self.A, None, c.stride, c.padding, c.dilation, c.groups) * own[:, :, None, None]
        return y + F.conv2d(h, up[:, :, None, None])


class Router(nn.Module):
    """Which group each image of the batch belongs to, by its label; -1 (Null) to none."""

    def __init__(self, group_of):
        super().__init__()
        self.register_buffer("group_of", torch.as_tensor(group_of), persistent=False)
        self.groups, self.one_hot = int(self.group_of.max()) + 1, None

    def set(self, y):
        """Remember the groups of labels y (N,) for the decoder's next pass."""
        self.one_hot = F.one_hot(self.group_of[y.clamp(min=0)], self.groups) * (y >= 0)[:, None]


def add_group_experts(net, class_counts, rank_ratio):
    """Give every convolution and Linear of a UNet's decoder one expert per Many / Medium / Few group; return the UNet.

    class_counts (C,): the training set's, at least three classes. The three experts share the rank that CM would reserve,
    max(1, floor(rank_ratio min(d, k))): a third each, at least 1.
    """
    groups = list(splits(class_counts).values())
    group_of = [next(g for g, classes in enumerate(groups) if c in classes) for c in range(len(class_counts))]
    # encode sees the labels first. The router hangs on the encoder, so that a deep copy's hook finds the copy's own
    net.encoder.router = Router(group_of)
    net.encoder.register_forward_pre_hook(lambda encoder, args: encoder.router.set(args[2]))
    for name, layer, _ in matrices(net.decoder):
        full = min(layer.weight.shape[0], layer.weight[0].numel())
        rank = max(1, max(1, int(rank_ratio * full)) // len(groups))
        parent, _, child = name.rpartition(".")
        setattr(net.decoder.get_submodule(parent), child, GroupExperts(layer, len(groups), rank, net.encoder.router))
    return net
