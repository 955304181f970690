"""The training losses: DDPM, CBDM (Eq. D.1), OC (Eq. D.2-D.4), CM (Eq. 2-4) and other baselines.

    objective = Objective(net=net, base=bind("oc"), counts=counts, alphas_bar=make_alphas_bar())
    batch = objective.draw_batch(x_0, y, seed=0, step=12)
    total, terms, D = objective(batch)
    total.backward()

A base loss is a function loss(pred, batch, obj) -> (scalar to minimise, {name: scalar to log}):

    pred   Predictions: pred.x_t; pred.eps, what theta predicts; each by one more pass:
           pred.general(), what theta^g predicts; pred.under(y), theta under other labels
    batch  Batch: everything random of this step, made by `draw_batch` from (seed, step) alone
    obj    Objective: what no step changes: obj.counts (C,), obj.signal and obj.sigma (T,), which
           are sqrt(alphas_bar) and sqrt(1 - alphas_bar), the Base's own constants, obj.net

Its own hyper-parameters are keyword-only arguments with a default. Every base loss is an entry of
BASES, and every hyper-parameter a flag of train.py by its entry in FLAGS. `Objective` adds L_CM. It
is one module with one forward, so that DistributedDataParallel and torch.compile see both
predictions as one call.
"""
import inspect
from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from cm_layers import general_only, is_reserved
from model import distance, extract, q_sample, signal_and_sigma
from runtime import add_with_defaults, generator, integer, number, one_of
from variants import consistency
from variants.augment import augment


# --------------------------------------------------------------------------------------------------
# One step's batch

class Masks(NamedTuple):
    """Dropout masks, lists of the network's draw_masks."""
    encode: list        # for encode, which theta and theta^g share,
    decode: list        # for decode with theta,
    general: list       # and with theta^g: the same tensors unless they are independent
    general_encode: list | None = None      # where theta^g does not share encode: for its own


class Pool(NamedTuple):
    """OC's reference samples: the whole global batch of G images, whatever part of it B are."""
    x_0: Tensor         # (G, C, H, W)
    y: Tensor           # (G,) int64
    gumbel: Tensor      # (B, G), standard Gumbel: the random choice of a reference


class Batch(NamedTuple):
    """One part (B of G images) of a step's global batch, and everything random about it."""
    x_0: Tensor                     # (B, C, H, W) float32 in [-1, 1]
    y: Tensor                       # (B,) int64, the true class: for Eq. (3) and OC's gate
    y_cond: Tensor                  # (B,) int64, what the network gets for it: y, or the number of
                                    # the image's text; -1 (Null) if dropped
    t: Tensor                       # (B,) int64 in [0, T)
    eps: Tensor                     # (B, C, H, W), standard normal
    masks: Masks
    augmentation: Tensor | None     # (B, augment.DIM), what was done to the images; None: nothing
    cm_weight: Tensor | None        # (m,): theta^g sees the first m images alone, with these
                                    # weights in L_CM; None: it sees all
    # What some bases alone look at
    y_other: Tensor                 # (B,) int64, another class y': CBDM, overlap optimisation
    y_other_cond: Tensor            # (B,) int64, what the network gets for it
    pool: Pool                      # OC
    pair: tuple                     # what the base's draw_t gave besides t, (B,) each


class Predictions:
    """theta's prediction `eps`, made at once, and what else a loss may ask of the network.

    theta and theta^g share one `encode`.
    """

    def __init__(self, net: nn.Module, batch: Batch, x_t: Tensor):
        self.net = net
        self.batch = batch
        self.x_t = x_t
        self.encoded = net.encode(x_t, batch.t, batch.y_cond, batch.masks.encode,
                                  batch.augmentation)
        self.eps = net.decode(*self.encoded, batch.masks.decode).float()

    def general(self) -> Tensor:
        """eps_{theta^g}(x_t, t, y) float32: (B, C, H, W), or (m, C, H, W), see Batch.cm_weight."""
        b = self.batch
        m = None if b.cm_weight is None else len(b.cm_weight)

        def first(tree):
            return tree if m is None else tree_map_only(Tensor, lambda values: values[:m], tree)
        if b.masks.general_encode is None:
            encoded = first(self.encoded)
        else:
            encoded = self.net.encode(*first((self.x_t, b.t, b.y_cond, b.masks.general_encode,
                                              b.augmentation)))
        with general_only(self.net.decoder):
            return self.net.decode(*encoded, first(b.masks.general)).float()

    def under(self, y: Tensor) -> Tensor:
        """eps_theta(x_t, t, y) for other labels y (B,), the same dropout masks: (B, C, H, W)."""
        b = self.batch
        encoded = self.net.encode(self.x_t, b.t, y, b.masks.encode, b.augmentation)
        return self.net.decode(*encoded, b.masks.decode).float()


# --------------------------------------------------------------------------------------------------
# Base losses: loss(pred, batch, obj) -> (scalar to minimise, {name: scalar to log})

Terms = dict[str, Tensor]


def ddpm(pred: Predictions, batch: Batch, obj: "Objective") -> tuple[Tensor, Terms]:
    """E ||eps_theta(x_t, t, y) - eps||^2: the simple loss of Sec. 3.2 and A."""
    base = distance(pred.eps, batch.eps).mean()
    return base, {"base": base}


def cbdm(pred: Predictions, batch: Batch, obj: "Objective", *, cbdm_tau: float = 1e-3,
         cbdm_gamma: float = 0.25) -> tuple[Tensor, Terms]:
    """Class-balancing diffusion, Eq. (D.1): base + tau cb, which brings predictions together.

    cb = E t (||eps(y) - sg eps(y')||^2 + gamma ||sg eps(y) - eps(y')||^2), eps(y) for
    eps_theta(x_t, t, y) and sg for "no gradient". One y' per image stands for the mean over Y, t
    counts from 0, and images whose label is dropped have no cb.
    """
    other = pred.under(batch.y_other_cond)
    pull = distance(pred.eps, other.detach()) + cbdm_gamma * distance(pred.eps.detach(), other)
    base, _ = ddpm(pred, batch, obj)
    cb = (batch.t * (batch.y_cond >= 0) * pull).mean()
    return base + cbdm_tau * cb, {"base": base, "cb": cb}


def oc_target(x_t: Tensor, batch: Batch, obj: "Objective") -> Tensor:
    """The target of oriented calibration, eps_hat of Eq. (D.3), corrected: (B, C, H, W).

    Each x_t chooses a reference (x_ref, y_ref) from the whole global batch with the probabilities
    of Eq. (D.4), proportional to q(x_t | x_ref) = N(sqrt(ab) x_ref, (1 - ab) I). Where the
    reference's class is at least as large as the image's own, the target is the noise that leads
    from x_ref to x_t, (x_t - sqrt(ab) x_ref) / sqrt(1 - ab), else eps. (The paper prints
    x_t / sqrt(a_t) - x_ref, which is not eps even for x_ref = x_0.) cdist adds in another order
    than a plain sum, and is 20 times less exact (3e-6), which moves no chance by 0.002.
    """
    signal = extract(obj.signal, batch.t, x_t)
    sigma = extract(obj.sigma, batch.t, x_t)
    gap = torch.cdist((x_t / signal).flatten(1), batch.pool.x_0.flatten(1),
                      compute_mode="donot_use_mm_for_euclid_dist")
    log_q = -0.5 * ((signal / sigma).flatten(1) * gap).square()     # (B, G), up to a row's constant
    chosen = (log_q + batch.pool.gumbel).argmax(1)                  # with chances softmax(log_q)
    target = (x_t - signal * batch.pool.x_0[chosen]) / sigma
    transfers = obj.counts[batch.pool.y[chosen]] >= obj.counts[batch.y]         # q(y_ref) >= q(y)
    return torch.where(transfers[:, None, None, None], target, batch.eps)


def oc(pred: Predictions, batch: Batch, obj: "Objective") -> tuple[Tensor, Terms]:
    """Oriented calibration, Eq. (D.2): E ||eps_theta(x_t, t, y) - eps_hat||^2."""
    base = distance(pred.eps, oc_target(pred.x_t, batch, obj)).mean()
    return base, {"base": base}


def focal(pred: Predictions, batch: Batch, obj: "Objective", *,
          focal_gamma: float = 2.0) -> tuple[Tensor, Terms]:
    """Focal loss (Lin et al., 2017) for regression: E (1 - e^-l)^gamma l.

    The factor (1 - e^-l)^gamma has no gradient. l is an image's squared error: a negative
    log-likelihood up to constants, so e^-l stands for the p of -(1 - p)^gamma log p. gamma = 0 is
    the DDPM loss. The paper gives no form. As in the original nothing is normalised over the batch,
    so that cutting it into parts changes nothing. Adam does not depend on the scale, but the base
    loss weighs less beside L_CM, and --lam may have to be smaller.
    """
    error = distance(pred.eps, batch.eps)
    base = ((1 - (-error.detach()).exp()) ** focal_gamma * error).mean()
    return base, {"base": base}


def rop_constants(alphas_bar: Tensor) -> dict[str, Tensor]:
    """The weight of ||eps_i - eps_j||^2 in KL(p(x_{t-1} | x_t, i) || p(x_{t-1} | x_t, j)), (T,).

    {"time_weights": it, divided by its mean over t}. Both are Gaussians of variance beta_t, with
    means sqrt(1 / alpha_t) (x_t - beta_t / sqrt(1 - alphas_bar_t) eps), so the weight is beta_t /
    (2 alpha_t (1 - alphas_bar_t)): largest at small t.
    """
    alphas = alphas_bar / torch.cat([alphas_bar.new_ones(1), alphas_bar[:-1]])
    weights = (1 - alphas) / (2 * alphas * (1 - alphas_bar))
    return {"time_weights": weights / weights.mean()}


def rop(pred: Predictions, batch: Batch, obj: "Objective", *, rop_weight: float = 0.1,
        rop_margin: float = 0.1) -> tuple[Tensor, Terms]:
    """Overlap optimisation (Yan et al., 2024): base + weight overlap, which pushes classes apart.

    overlap = E w_t max(0, m - ||eps(y) - eps(y')||^2) at one x_t, with another label y', the KL
    divergence's time weights w_t and a margin m, beyond which nothing is pushed. Images whose label
    is dropped, or with y' = y, have none. eps(y') has no gradient: each image's own class moves
    away from a uniformly drawn one. Their paper (arXiv 2402.10821) has the KL, the hinge and a
    time-dependent weighting; the KL's own weights and the one-sided gradient are choices made here.
    """
    with torch.no_grad():
        other = pred.under(batch.y_other_cond)
    hinge = (rop_margin - distance(pred.eps, other)).clamp(min=0)
    base, _ = ddpm(pred, batch, obj)
    active = (batch.y_cond >= 0) & (batch.y_other != batch.y)
    overlap = (obj.time_weights[batch.t] * active * hinge).mean()
    return base + rop_weight * overlap, {"base": base, "overlap": overlap}


def uniform_t(alphas_bar: Tensor, n: int, step: int,
              generator: torch.Generator) -> tuple[Tensor, tuple]:
    """(t, ()): t (n,) uniform in [0, T), on the generator's device."""
    t = torch.randint(len(alphas_bar), (n,), generator=generator, device=generator.device)
    return t, ()


class Base(NamedTuple):
    """An entry of BASES: the loss, how it draws timesteps, what of the schedule it looks at.

    draw_t(alphas_bar, n, step, generator) -> (t (n,), a tuple of what else is drawn, (n,) each).
    constants(alphas_bar) -> {name: (T,)}, computed once in float64; float32 buffers of `obj`.
    """
    loss: Callable
    draw_t: Callable = uniform_t
    constants: Callable = lambda alphas_bar: {}


BASES = {
    "ddpm": Base(ddpm),
    "cbdm": Base(cbdm),
    "oc": Base(oc),
    "focal": Base(focal),
    "rop": Base(rop, constants=rop_constants),
    "consistency": Base(consistency.loss, consistency.draw_pairs, consistency.constants),
}
FLAGS = {       # flags of train.py, {hyper-parameter: (type, help)}; the defaults are above
    "cbdm_tau": (number(0), "tau of Eq. (D.1), t in 0 ... 999"),
    "cbdm_gamma": (number(0), "gamma of Eq. (D.1)"),
    "focal_gamma": (number(0), "gamma of --base focal"),
    "rop_weight": (number(0), "weight of --base rop's overlap term"),
    "rop_margin": (number(above=0), "margin of --base rop"),
    "ct_double": (integer(1), "of --base consistency: steps until its intervals double (default: "
                  "a quarter of --steps)"),
    "ct_grid": (one_of("uniform", "karras"), "of --base consistency: t in equal parts (uniform), "
                "or as iCT's (karras)"),
}


def options_of(functions: Iterable[Callable]) -> dict:
    """{name: default} of the hyper-parameters of a Base: its functions' keyword-only arguments."""
    parameters = [p for f in functions for p in inspect.signature(f).parameters.values()]
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def bind(name: str, options: dict | None = None) -> Base:
    """The entry `name` of BASES, its hyper-parameters taken from `options` where they are given.

    options: {name: value}, such as vars(args); what belongs to other bases is ignored.
    """
    bound = []
    for function in BASES[name]:
        own = options_of([function])
        bound.append(partial(function, **{k: v for k, v in (options or {}).items() if k in own}))
    return Base(*bound)


# --------------------------------------------------------------------------------------------------
# Capacity manipulation

DROPOUT = ("none", "decoder", "all")    # where theta and theta^g see different dropout masks


class CMConfig(NamedTuple):
    """The constants of L_CM: L_Total = L_base + lam (w_con L_Con + w_div L_Div), Eq. (4)."""
    lam: float = 1.0
    w_con: float = 1.0
    w_div: float = 1.0
    div_bound: float = 0.01             # L_Div saturates per image at this distance; 0: never
    independent_dropout: str = "none"   # one of DROPOUT
    cm_fraction: float = 1.0            # of a batch, which theta^g sees
    rank_ratio: float = 0.1             # 0: L_CM without reserved capacity
    equal_weights: bool = False         # each class weighs 1, and not as Eq. (3) has it

    @classmethod
    def of(cls, args: Namespace) -> "CMConfig":
        """The constants that a script's flags give, or the config of a checkpoint."""
        return cls(**{k: v for k, v in vars(args).items() if k in cls._fields})


def add_cm_flags(group, div_bound: float = 0.01):
    """--lam --w-con --w-div --div-bound, the same in every script that trains with CM."""
    defaults = {"lam": 1.0, "w_con": 1.0, "w_div": 1.0, "div_bound": div_bound}
    add_with_defaults(group, defaults, {
        "lam": (number(0), "lambda of Eq. (4); 0 reserves without L_CM"),
        "w_con": (number(0), "weight of L_Con"),
        "w_div": (number(0), "weight of L_Div; release: 0.2"),
        "div_bound": (number(0, 1e6), "L_Div saturates at this distance; 0: never, as printed: it "
                      "diverges")})


def class_weights(counts: ArrayLike) -> tuple[Tensor, Tensor]:
    """Eq. (3): (w_con, w_div), each (C,) float64 with mean 1 over classes.

    counts (C,): training images per class. w_con = C N_y / sum_c N_c and
    w_div = C / (N_y sum_c 1 / N_c). Raises ValueError for a class without images.
    """
    n = torch.as_tensor(counts, dtype=torch.float64)
    if (n < 1).any():
        raise ValueError("a class without images has no weight in Eq. (3)")
    return len(n) * n / n.sum(), len(n) / (n * (1 / n).sum())


def cm_terms(D: Tensor, y: Tensor, w_con_y: Tensor, w_div_y: Tensor, bound: float,
             weight: Tensor | None = None) -> Terms:
    """The two terms of Eq. (2), {"con", "div"}, scalars.

    D (B,): distances between the predictions of theta and theta^g. y (B,): the true classes, also
    where the label is dropped. w_con_y, w_div_y (C,): class_weights. con = E w_con^y D. div = -E
    w_div^y min(D, bound); with bound 0 it is -E w_div^y D, as printed, which has no lower bound:
    training then diverges. weight (B,): a factor of each image (see `choose`), None for 1.
    """
    bounded = D.clamp(max=bound) if bound else D
    pull, push = w_con_y[y], w_div_y[y]         # (B,)
    if weight is not None:
        pull, push = pull * weight, push * weight
    return {"con": (pull * D).mean(), "div": -(push * bounded).mean()}


def choose(importance: Tensor, fraction: float,
           generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random part of a batch that stands for all of it: (order (B,) int64, weight (m,)).

    importance (B,), positive. The images order[:m], m = fraction B rounded and at least 1, are the
    chosen ones. Image i is among them with probability p_i = min(1, c importance_i), where c makes
    the p_i sum to m (systematic sampling: one uniform number shifts m ticks of distance 1 on the
    line of all p_i). weight is m / (B p_i) of the chosen ones, so that the mean of weight_i f_i
    over them has the mean of all f_i as its expectation.
    """
    B = len(importance)
    m = max(1, round(fraction * B))
    largest = importance.double().sort(descending=True).values
    rest = largest.flip(0).cumsum(0).flip(0)                # the sums of largest[k:]
    c = (m - torch.arange(B, device=rest.device)) / rest    # where the k largest are certain
    k = (c * largest <= 1 + 1e-9).int().argmax()            # so many are
    p = (c[k] * importance.double()).clamp(max=1)           # (B,)
    u = torch.rand(1, generator=generator, device=p.device, dtype=torch.float64)
    ticks = u + torch.arange(m, device=p.device)
    chosen = torch.searchsorted(p.cumsum(0), ticks, right=True).clamp(max=B - 1)
    left_out = torch.ones(B, dtype=torch.int8, device=p.device).index_fill(0, chosen, 0)
    order = left_out.argsort(stable=True)
    return order, (m / (B * p[order[:m]])).float()


class Objective(nn.Module):
    """L_Total = L_base + lam (w_con L_Con + w_div L_Div), Eq. (4).

    net:        a network as networks.py describes it; where its decoder is reserved (or
                cm.rank_ratio is 0) and cm.lam is not 0, there is a second pass and L_CM
    base:       the base loss, from `bind`
    counts:     (C,) training images per class
    alphas_bar: (T,) the noise schedule
    cm:         the constants of L_CM (default: CMConfig's)
    label_drop: probability that an image's label is Null
    drop_batch: whether the labels of a batch are Null together, and not each by itself
    flip:       whether each image is mirrored with probability 1/2
    ada:        augment.py's probability; 0: no augmentation
    y_other:    how y' is drawn: "uniform", the mean over Y of Eq. (D.1), or "train", by class
                frequency, as in CBDM's code
    forward(batch) -> (total, a scalar; {name: scalar} of unweighted terms; D detached, of the
    images that theta^g sees, 0 without CM).
    """

    def __init__(self, *, net: nn.Module, base: Base, counts: ArrayLike, alphas_bar: Tensor,
                 cm: CMConfig | None = None, label_drop: float = 0.1, drop_batch: bool = False,
                 flip: bool = False, ada: float = 0.0, y_other: str = "uniform"):
        super().__init__()
        self.net = net
        self.base = base
        self.cm = cm or CMConfig()
        self.label_drop = label_drop
        self.drop_batch = drop_batch
        self.flip = flip
        self.ada = ada
        self.two_passes = self.cm.lam != 0 and (is_reserved(net.decoder) or not self.cm.rank_ratio)
        self.alphas_bar = alphas_bar        # stays on the CPU: some devices have no float64
        counts = torch.as_tensor(counts)
        sizes = torch.ones_like(counts) if self.cm.equal_weights else counts
        w_con_y, w_div_y = class_weights(sizes)
        signal, sigma = signal_and_sigma(alphas_bar)
        buffers = {
            "counts": counts, "w_con_y": w_con_y.float(), "w_div_y": w_div_y.float(),
            "y_other_weights": torch.ones(len(counts)) if y_other == "uniform" else counts.float(),
            "signal": signal, "sigma": sigma,
            **{name: value.float() for name, value in base.constants(alphas_bar).items()}}
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def draw_batch(self, x_0: Tensor, y: Tensor, condition: Callable | None = None, *, seed: int,
                   step: int, part: int = 0, parts: int = 1) -> Batch:
        """One part of a step's Batch: a pure function of the global batch and (seed, step).

        x_0 (G, C, H, W) in [-1, 1] and y (G,) are the whole global batch. Noise, timesteps and the
        rest are drawn for all of it, and the part takes its own, so that cutting it into parts (one
        per process, and per pass of --accumulate) changes nothing. Only dropout masks, and with
        --cm-fraction the images that theta^g sees, are drawn for the part alone, from (seed, step,
        part). condition(y'): what the network gets in place of the classes y and y', (G,) each;
        None: these classes.
        """
        G = len(x_0)
        home = x_0.device
        device = torch.device("cpu") if home.type == "mps" else home    # MPS has no float64
        x_0, y = x_0.to(device), y.to(device)
        g = generator(device, seed, "step", step)
        t, pair = self.base.draw_t(self.alphas_bar, G, step, g)
        eps = torch.randn(x_0.shape, generator=g, device=device)
        dropped = torch.rand(G, generator=g, device=device) < self.label_drop
        if self.drop_batch:
            dropped = dropped[:1]
        mirrored = torch.rand(G, generator=g, device=device) < 0.5
        y_other = torch.multinomial(self.y_other_weights.to(device), G, replacement=True,
                                    generator=g)
        gumbel = -torch.empty(G, G, device=device).exponential_(generator=g).log()
        y_cond, y_other_cond = (y, y_other) if condition is None else condition(y_other)
        y_cond = torch.where(dropped, -1, y_cond)
        if self.flip:
            x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)
        augmentation = None
        if self.ada:
            x_0, augmentation = augment(x_0, self.ada, generator(device, seed, "augment", step))

        B = G // parts
        g = generator(device, seed, "masks", step, part)
        encode, decode = self.net.draw_masks(B, x_0.shape[-1], g)
        masks = Masks(encode, decode, decode)
        if self.cm.independent_dropout != "none":
            general_encode, general = self.net.draw_masks(B, x_0.shape[-1], g)
            apart = self.cm.independent_dropout == "all" and general_encode
            masks = Masks(encode, decode, general, general_encode if apart else None)

        own = torch.arange(part * B, (part + 1) * B, device=device)
        cm_weight = None
        if self.two_passes and self.cm.cm_fraction < 1:
            importance = torch.maximum(self.w_con_y, self.w_div_y).to(device)[y[own]]
            order, cm_weight = choose(importance, self.cm.cm_fraction,
                                      generator(device, seed, "general", step, part))
            own = own[order]
        batch = Batch(
            x_0=x_0[own], y=y[own], y_cond=y_cond[own], t=t[own], eps=eps[own], masks=masks,
            augmentation=None if augmentation is None else augmentation[own], cm_weight=cm_weight,
            y_other=y_other[own], y_other_cond=y_other_cond[own], pool=Pool(x_0, y, gumbel[own]),
            pair=tuple(values[own] for values in pair))
        return batch if device == home else tree_map_only(Tensor, lambda v: v.to(home), batch)

    def forward(self, batch: Batch) -> tuple[Tensor, Terms, Tensor]:
        """(total, terms, D) of one Batch, see the class."""
        x_t = q_sample(batch.x_0, batch.t, batch.eps, self.signal, self.sigma)
        pred = Predictions(self.net, batch, x_t)
        total, terms = self.base.loss(pred, batch, self)
        D = torch.zeros_like(batch.t, dtype=torch.float32)
        if self.two_passes:
            general = pred.general()                # of the first images alone, see Batch.cm_weight
            D = distance(pred.eps[:len(general)], general)
            both = cm_terms(D, batch.y[:len(D)], self.w_con_y, self.w_div_y, self.cm.div_bound,
                            batch.cm_weight)
            total = total + self.cm.lam * self.cm.w_con * both["con"]
            total = total + self.cm.lam * self.cm.w_div * both["div"]
            terms = {**terms, **both}
        # The terms keep their graph: where total is one term, a compiled forward returns the two as
        # one tensor, and detaching the one would detach the other
        return total, terms, D.detach()
