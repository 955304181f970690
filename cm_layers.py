"""Capacity reservation (Sec. 3.1): any module's weights become W = W^g + BA, Eq. (1), and merge back at no cost.

    reserve(net.decoder, rank_ratio=0.1)      # W^g is the old weight, A Kaiming, B zero: nothing changes yet
    with general_only(net.decoder):           # theta^g: the same module without its BA
        eps_g = net.decode(...)
    merge(net.decoder)                        # W = W^g + BA written out: a plain module with plain keys

It is a parametrization (torch.nn.utils.parametrize) of weights that exist, not a second set of layer classes: it
works on every Linear, convolution and nn.MultiheadAttention, also where a layer reads its weight without calling a
forward, as attention does with `in_proj_weight`. W^g stays trainable: CM is not fine-tuning.

State-dict keys while reserved: `NAME.parametrizations.weight.original` (W^g) and `...weight.0.A`, `...weight.0.B`.
"""
import math
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

WEIGHTS = {     # which parameters of a module are the matrices W of Eq. (1): weights, never biases, norms, embeddings
    nn.Linear: ("weight",),
    nn.modules.conv._ConvNd: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
FORMS = ("flat", "kernel")


class LowRank(nn.Module):
    """W^g -> W^g + BA, Eq. (1), with B in R^{d x r} zero and A in R^{r x k} Kaiming-uniform (a = sqrt 5).

    weight:     W^g, of any shape (out, in, kernel ...).
    rank_ratio: r = max(1, floor(rank_ratio x full rank)), in (0, 1].
    rank:       r itself, cut to the full rank, in place of the ratio.
    form:       how a convolution becomes a matrix. "flat": d = out, k = in * kh * kw, full rank min(d, k).
                "kernel", the authors' release: B is (out kh) x (r kh), A is (r kh) x (in kw), full rank min(out, in).
                For a Linear both are the same.
    """

    def __init__(self, weight, rank_ratio=0.1, form="flat", rank=None):
        super().__init__()
        if not 0 < rank_ratio <= 1:
            raise ValueError(f"rank_ratio must be in (0, 1], not {rank_ratio}")
        if form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, not {form!r}")
        out, inner, *kernel = weight.shape
        if form == "flat" or not kernel:
            d, k, full, copies = out, inner * math.prod(kernel), min(out, inner * math.prod(kernel)), 1
        else:
            d, k, full, copies = out * kernel[0], inner * math.prod(kernel[1:]), min(out, inner), kernel[0]
        self.rank = min(rank, full) if rank else max(1, int(rank_ratio * full))
        r = self.rank * copies
        self.A = nn.Parameter(weight.new_empty(r, k))
        self.B = nn.Parameter(weight.new_zeros(d, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.general_only = False

    def forward(self, W_g):
        return W_g if self.general_only else W_g + (self.B @ self.A).view(W_g.shape)


def reserved(module):
    """Yield (owner, parameter name, LowRank) for every weight in `module` that is reserved."""
    for owner in module.modules():
        for name, chain in getattr(owner, "parametrizations", {}).items():
            for part in chain:
                if isinstance(part, LowRank):
                    yield owner, name, part


def matrices(module):
    """List the weights of `module` that Eq. (1) can split, as (layer's dotted name, layer, parameter name)."""
    return [(name, layer, p) for name, layer in module.named_modules() for kind, names in WEIGHTS.items()
            if isinstance(layer, kind) for p in names if getattr(layer, p) is not None]


def reserve(module, rank_ratio=0.1, form="flat", where=lambda name, layer: True, rank=None):
    """Split every weight matrix in `module`, itself included, by Eq. (1), in place; return `module`.

    `where(name, layer)` picks the layers by their dotted name and themselves; a group convolution's weight is
    (out, in / groups, ...) and is split as it is. The function that the module computes does not change (B = 0).
    rank: that of every BA, in place of the ratio. Of a weight that is parametrized already, W^g is what it amounts to.
    Raises ValueError where nothing can be reserved, or it is reserved already, or the ratio or form is out of range.
    """
    if any(True for _ in reserved(module)):
        raise ValueError("this module is reserved already")
    chosen = [(layer, p) for name, layer, p in matrices(module) if where(name, layer)]
    if not chosen:
        raise ValueError("found no Linear, convolution or attention weight to reserve")
    for layer, p in chosen:
        parametrize.register_parametrization(layer, p, LowRank(getattr(layer, p), rank_ratio, form, rank))
    return module


@contextmanager
def general_only(module):
    """Within, `module` computes with theta^g alone: every reserved weight is W^g, without its BA."""
    parts = [low_rank for _, _, low_rank in reserved(module)]
    before = [p.general_only for p in parts]
    try:
        for p in parts:
            p.general_only = True
        yield module
    finally:
        for p, b in zip(parts, before):
            p.general_only = b


@torch.no_grad()
def merge(module, branch="full"):
    """Write theta = theta^g + theta^e (Sec. 3.2, Inference) into plain weights, in place; return `module`.

    branch "general" keeps W^g and drops BA instead. Afterwards keys, shapes and speed are a plain module's; on a
    module without reserved weights it does nothing, so it can be called twice.
    """
    if branch not in ("full", "general"):
        raise ValueError(f"branch must be 'full' or 'general', not {branch!r}")
    for owner, name, low_rank in list(reserved(module)):
        low_rank.general_only = branch == "general"
        # Deep copies share the class that carries the parametrized property, and removing one would break the others
        shared = type(owner)
        own = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
        owner.__class__ = type(shared.__name__, shared.__bases__, own)
        parametrize.remove_parametrizations(owner, name)
    return module


def count(module):
    """Numbers of parameters, {"general": those of theta^g, "expert": those of the A and B}; they add up to all."""
    expert = sum(p.A.numel() + p.B.numel() for _, _, p in reserved(module))
    return {"general": sum(p.numel() for p in module.parameters()) - expert, "expert": expert}
