"""Capacity reservation (Sec. 3.1): a module's weights become W = W^g + BA, Eq. (1), and merge back.

    reserve(net.decoder, rank_ratio=0.1)      # W^g is the old weight, B is zero: no change yet
    with general_only(net.decoder):           # theta^g: the same module without its BA
        eps_g = net.decode(...)
    merge(net.decoder)                        # W = W^g + BA written out: plain module, plain keys

It is a parametrization (torch.nn.utils.parametrize) of weights that exist, not a second set of
layer classes. So it works on every Linear, convolution and nn.MultiheadAttention, also where a
layer reads its weight without calling a forward, as attention does with `in_proj_weight`. W^g stays
trainable: CM is not fine-tuning.

Keys in the state dict while reserved: `NAME.parametrizations.weight.original` (W^g) and
`NAME.parametrizations.weight.0.A` and `.B`.
"""
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint as recompute

WEIGHTS = {     # which parameters are matrices W of Eq. (1): no biases, norms or embeddings
    nn.Linear: ("weight",),
    nn.modules.conv._ConvNd: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
FORMS = ("flat", "kernel")


class LowRank(nn.Module):
    """W^g -> W^g + BA, Eq. (1): B in R^{d x r} starts at zero, A in R^{r x k} Kaiming-uniform.

    weight:     W^g, of any shape (out, in, kernel ...).
    rank_ratio: r = max(1, floor(rank_ratio x full rank)), in (0, 1].
    form:       how a convolution becomes a matrix.
                "flat": d = out, k = in * kh * kw, full rank min(d, k).
                "kernel", the authors' release: B is (out kh) x (r kh), A is (r kh) x (in kw),
                full rank min(out, in), and A is Kaiming-normal. The shapes for a Linear are the
                same.
    rank:       r itself, at most the full rank, in place of the ratio.
    scale:      a factor of BA.
    Raises ValueError where the ratio or the form is out of range.
    """

    def __init__(self, weight: Tensor, rank_ratio: float = 0.1, form: str = "flat",
                 rank: int | None = None, scale: float = 1.0):
        super().__init__()
        if not 0 < rank_ratio <= 1:
            raise ValueError(f"rank_ratio must be in (0, 1], not {rank_ratio}")
        if form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, not {form!r}")
        out, inner, *kernel = weight.shape
        if form == "kernel" and kernel:
            copies, full = kernel[0], min(out, inner)
        else:
            copies, full = 1, min(out, inner * math.prod(kernel))
        d = out * copies
        k = inner * math.prod(kernel) // copies
        if rank is None:
            # 0.29 x 100 is 28.999...: the floor of what was meant
            rank = max(1, math.floor(rank_ratio * full + 1e-9))
        self.rank = min(rank, full)
        self.scale = scale
        self.A = nn.Parameter(weight.new_empty(self.rank * copies, k))
        self.B = nn.Parameter(weight.new_zeros(d, self.rank * copies))
        kaiming = nn.init.kaiming_uniform_ if form == "flat" else nn.init.kaiming_normal_
        kaiming(self.A, a=math.sqrt(5))
        self.general_only = False
        # For what stands below the line at the end of this file
        self.was_general = False    # whether theta^g has been computed since the start
        self.pinned = False         # whether general_only is that of a call of `checkpoint`
        self.order = []             # the names of the layer's parameters, for merge

    def forward(self, W_g: Tensor) -> Tensor:
        """W^g -> W^g + BA, or W^g itself under general_only; both of W^g's shape."""
        if not torch.compiler.is_compiling():
            refuse_unknown_branch(self)
        if self.general_only:
            return W_g
        BA = self.B @ self.A
        return W_g + (BA if self.scale == 1 else self.scale * BA).view(W_g.shape)


def reserved(module: nn.Module) -> Iterator[tuple[nn.Module, str, LowRank]]:
    """Yield (owner, parameter name, LowRank) for every weight in `module` that is reserved."""
    for owner in module.modules():
        for name, chain in getattr(owner, "parametrizations", {}).items():
            for part in chain:
                if isinstance(part, LowRank):
                    yield owner, name, part


def is_reserved(module: nn.Module) -> bool:
    """Whether any weight in `module` is reserved."""
    return any(True for _ in reserved(module))


def weight_matrices(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """The weights of `module` that Eq. (1) can split: (layer's dotted name, layer, parameter)."""
    found = []
    for name, layer in module.named_modules():
        for kind, parameters in WEIGHTS.items():
            if isinstance(layer, kind):
                found += [(name, layer, p) for p in parameters if getattr(layer, p) is not None]
    return found


def reserve(module: nn.Module, rank_ratio: float = 0.1, form: str = "flat",
            where: Callable = lambda name, layer: True, rank: int | None = None,
            scale: float = 1.0) -> nn.Module:
    """Split every weight matrix in `module`, itself included, by Eq. (1), in place; return it.

    The function that the module computes does not change (B = 0).
    where(name, layer): picks layers by their dotted name and themselves. A group convolution's
    weight is (out, in / groups, ...) and is split as it is.
    rank: that of every BA, in place of the ratio. scale: a factor of every BA.
    Of a weight that is parametrized already, W^g is the value that it has.
    Warns of layers with matrices of a kind that it does not know. Raises ValueError where nothing
    can be reserved, or it is reserved already, or a weight is computed by a hook, or PEFT has
    merged an adapter that it can take out again, or the ratio or form is out of range.
    """
    if is_reserved(module):
        raise ValueError("this module is reserved already")
    refuse_merged_adapters(module)
    chosen = [found for found in weight_matrices(module) if where(*found[:2])]
    if not chosen:
        raise ValueError("found no Linear, convolution or attention weight to reserve")
    for name, layer, p in chosen:
        if not hasattr(layer, "parametrizations") and p not in layer._parameters:
            raise ValueError(f"{name}.{p} is computed by a hook (the older weight_norm, "
                             "spectral_norm or prune): remove that first")
    unknown = [name for name, layer in unknown_layers(module) if where(name, layer)]
    if unknown:
        warnings.warn(f"not reserved, of an unknown kind: {', '.join(unknown)}", stacklevel=2)
    orders = {layer: list(layer._parameters) for _, layer, _ in chosen}
    for _, layer, p in chosen:
        part = LowRank(getattr(layer, p), rank_ratio, form, rank, scale)
        part.order = orders[layer]
        parametrize.register_parametrization(layer, p, part)
    return module


@contextmanager
def general_only(module: nn.Module) -> Iterator[nn.Module]:
    """Let `module` compute with theta^g alone: every reserved weight is W^g, without BA.

    Raises ValueError inside torch's parametrize.cached(), which would give theta once more.
    """
    if parametrize._cache_enabled:
        raise ValueError("general_only inside parametrize.cached() would compute with theta; enter "
                         "cached() within general_only")
    parts = [low_rank for _, _, low_rank in reserved(module)]
    before = [p.general_only for p in parts]
    try:
        for p in parts:
            p.general_only = p.was_general = True
        yield module
    finally:
        for p, b in zip(parts, before):
            p.general_only = b


@torch.no_grad()
def merge(module: nn.Module, branch: str = "full") -> nn.Module:
    """Write theta = theta^g + theta^e (Sec. 3.2, Inference) as plain weights, in place; return it.

    branch "general" keeps W^g and drops BA instead. Afterwards keys, their order, shapes and speed
    are a plain module's. A weight that was tied to another one is not any more: the two differ by
    BA (before transformers saves such a network, set its config.tie_word_embeddings to False, or
    loading ties them again). On a module without reserved weights it does nothing, so it can be
    called twice. Raises ValueError for another branch, and where PEFT has merged an adapter before.
    """
    if branch not in ("full", "general"):
        raise ValueError(f"branch must be 'full' or 'general', not {branch!r}")
    if is_reserved(module):
        refuse_merged_adapters(module)
    for owner, name, low_rank in list(reserved(module)):
        low_rank.general_only = branch == "general"
        give_own_class(owner)
        chain = owner.parametrizations[name]
        if hasattr(chain, "original"):
            # A tensor of its own, since torch writes the merged weight into it
            W_g = chain.original
            chain.original = nn.Parameter(W_g.clone(), W_g.requires_grad)
        parametrize.remove_parametrizations(owner, name)
        order = [p for p in low_rank.order if p in owner._parameters]
        owner._parameters.update({p: owner._parameters.pop(p) for p in order})
    return module


# --------------------------------------------------------------------------------------------------
# Beside others' code: recomputation in the backward pass, PEFT, deep copies, layers of other kinds
#
# Where a part of the network is recomputed in the backward pass, use `checkpoint` of this file
# (diffusers: net.enable_gradient_checkpointing(partial(checkpoint, net))): torch's own would
# recompute theta^g's pass with theta, and is refused.
#
# Merge PEFT's adapters after this file's parts, not before: PEFT writes into a weight that a
# reserved layer computes anew in every call, so the adapter is lost. merge refuses it while PEFT's
# layers are there; after PEFT's merge_and_unload nothing tells.

def checkpoint(module: nn.Module, function: Callable, *args: Any) -> Any:
    """function(*args), computed anew in the backward pass, with the branch of this call.

    module: what `function` computes with. torch.utils.checkpoint alone would recompute a pass of
    theta^g after general_only has ended, and so with theta.
    """
    parts = [low_rank for _, _, low_rank in reserved(module)]
    general = [p.general_only for p in parts]

    def call(*args):
        before = [(p.general_only, p.pinned) for p in parts]
        try:
            for p, g in zip(parts, general):
                p.general_only, p.pinned = g, True
            return function(*args)
        finally:
            for p, b in zip(parts, before):
                p.general_only, p.pinned = b
    return recompute(call, *args, use_reentrant=False)


def refuse_unknown_branch(low_rank: LowRank) -> None:
    """Raise RuntimeError where a call is repeated in the backward pass by others' code.

    It may have been one of theta^g, and general_only has ended.
    """
    in_backward = torch._C._current_graph_task_id() != -1
    if in_backward and low_rank.was_general and not low_rank.pinned:
        raise RuntimeError("a reserved layer is recomputed in the backward pass, with theta or "
                           "theta^g is not known; use cm_layers.checkpoint in place of torch's")


def refuse_merged_adapters(module: nn.Module) -> None:
    """Raise ValueError where a layer of PEFT says that its adapter is in the weight.

    PEFT cannot add it to a reserved weight, nor take it out of one.
    """
    for name, layer in module.named_modules():
        if getattr(layer, "merged_adapters", None):
            raise ValueError(f"{name}: PEFT has merged an adapter, which a reserved weight does "
                             "not keep; call unmerge_adapter(), and merge PEFT's after this one")


def give_own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    Deep copies share the class that carries the parametrized property, and removing the property
    from one of them would break the others.
    """
    shared = type(module)
    own = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, own)


def unknown_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (dotted name, layer) with matrices of its own that WEIGHTS does not list.

    Embeddings are left out on purpose: their rows belong to single words or classes.
    """
    known = (*WEIGHTS, nn.Embedding, nn.EmbeddingBag, parametrize.ParametrizationList)
    for name, layer in module.named_modules():
        own = [p for p in layer.parameters(recurse=False) if p.dim() > 1]
        if own and not isinstance(layer, known):
            yield name, layer
