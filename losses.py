"""The training losses: DDPM, CBDM (Eq. D.1), OC (Eq. D.2-D.4) and capacity manipulation (Eq. 2-4).

    objective = Objective(net, "oc", counts, make_alphas_bar())     # net: a UNet whose decoder is reserved
    total, terms, D = objective(draw(x_0, y, objective, seed=0, step=12))
    total.backward()

Every loss has one signature, loss(p, b, o) -> {name: scalar}, of unweighted terms:
    p  Predictions: p.eps, what theta predicts; p.general(), what theta^g predicts; p.under(y), under other labels
    b  Batch: everything random of this step, drawn by `draw` from (seed, step) alone
    o  Objective: the constants (class counts, alphas_bar, options)
A base loss is an entry of BASES; `Objective` adds L_CM and the weights. It is one module with one forward, so that
DistributedDataParallel and torch.compile see both predictions as one call.
"""
from typing import NamedTuple

import torch
from torch import nn

from augment import augment
from cm_layers import general_only, reserved
from model import per_image, q_sample
from runtime import generator


class Batch(NamedTuple):
    """One part (B of G images) of a step's global batch, and everything random about it."""
    x_0: torch.Tensor           # (B, C, H, W) float32 in [-1, 1]
    y: torch.Tensor             # (B,) int64, the true class: what Eq. (3) and OC's gate look at
    y_in: torch.Tensor          # (B,) int64, the label the network is given: y, or -1 (Null) where it is dropped
    t: torch.Tensor             # (B,) int64 in [0, T)
    eps: torch.Tensor           # (B, C, H, W), standard normal
    y_prime: torch.Tensor       # (B,) int64, CBDM's other class y'
    pool_x_0: torch.Tensor      # (G, C, H, W), the whole global batch: OC's reference samples
    pool_y: torch.Tensor        # (G,) int64
    gumbel: torch.Tensor        # (B, G), standard Gumbel: OC's draw of a reference
    masks_encode: list          # dropout masks of model.draw_masks, for encode,
    masks_decode: list          # for decode with theta,
    masks_general: list         # and for decode with theta^g: the same tensors unless they are independent
    a: torch.Tensor             # (B, augment.DIM), what was done to the images; None without augmentation
    t_below: torch.Tensor       # (B,) int64, the timestep below t of a base that compares two,
    weight: torch.Tensor        # and (B,) the weights of such pairs; else None


@torch.no_grad()
def draw(x_0, y, o, seed, step, part=0, parts=1, flip=False, dtype=torch.float32):
    """The Batch of one part of a step: a pure function of the global batch (x_0 (G, C, H, W), y (G,)) and (seed, step).

    Noise, timesteps and the rest are drawn for the whole global batch and sliced, so that cutting it into parts (one
    for each process, and for each pass of --accumulate) changes nothing; only dropout masks are drawn for the part
    alone, from (seed, step, part). flip: mirror each image with chance 1/2. dtype: of the masks, the one that the
    network computes in.
    """
    G, device = len(x_0), x_0.device
    g = generator(device, seed, "step", step)
    t, t_below, weight = o.draw_t(o, G, step, g)
    eps = torch.randn(x_0.shape, generator=g, device=device)
    dropped = torch.rand(G, generator=g, device=device) < o.label_drop
    mirrored = torch.rand(G, generator=g, device=device) < 0.5
    y_prime = torch.multinomial(o.y_prime_law, G, replacement=True, generator=g)
    gumbel = -torch.empty(G, G, device=device).exponential_(generator=g).log()
    if flip:
        x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)
    a = None
    if o.ada:
        x_0, a = augment(x_0, o.ada, generator(device, seed, "augment", step))

    own = slice(part * G // parts, (part + 1) * G // parts)
    masks = generator(device, seed, "masks", step, part)
    encode, decode = o.net.draw_masks(G // parts, x_0.shape[-1], masks, dtype)
    general = o.net.draw_masks(G // parts, x_0.shape[-1], masks, dtype)[1] if o.independent_dropout else decode
    return Batch(x_0[own], y[own], torch.where(dropped, -1, y)[own], t[own], eps[own], y_prime[own],
                 x_0, y, gumbel[own], encode, decode, general, None if a is None else a[own],
                 None if t_below is None else t_below[own], None if weight is None else weight[own])


class Predictions:
    """What a loss may ask of the network at one batch; `encode` runs once for theta and theta^g (they share it)."""

    def __init__(self, net, b, x_t):
        self.net, self.b, self.x_t = net, b, x_t
        self.encoded = net.encode(x_t, b.t, b.y_in, b.masks_encode, b.a)
        self.eps = net.decode(*self.encoded, b.masks_decode).float()

    def general(self):
        """eps_{theta^g}(x_t, t, y): (B, C, H, W) float32."""
        with general_only(self.net.decoder):
            return self.net.decode(*self.encoded, self.b.masks_general).float()

    def under(self, y):
        """eps_theta(x_t, t, y) for other labels y (B,), under the same dropout masks: (B, C, H, W) float32."""
        encoded = self.net.encode(self.x_t, self.b.t, y, self.b.masks_encode, self.b.a)
        return self.net.decode(*encoded, self.b.masks_decode).float()


def distance(a, b):
    """||a - b||^2 per image as a mean over elements, (B, C, H, W) -> (B,): the paper's squared norm over C H W."""
    return (a - b).square().flatten(1).mean(1)


# ----------------------------------------------------------------------------------------------------------------------
# Base losses

def ddpm(p, b, o):
    """E ||eps_theta(x_t, t, y) - eps||^2: the simple loss of Sec. 3.2 and A."""
    return {"base": distance(p.eps, b.eps).mean()}


def cbdm(p, b, o):
    """Class-balancing diffusion, Eq. (D.1): the DDPM loss, and `cb`, which draws the classes' predictions together.

    cb = E t (||eps_theta(y) - sg eps_theta(y')||^2 + gamma ||sg eps_theta(y) - eps_theta(y')||^2), weighted by tau;
    one y' an image stands for the mean over Y, t counts from 0, and images whose label is dropped have no cb.
    """
    other = p.under(b.y_prime)
    pull = distance(p.eps, other.detach()) + o.gamma * distance(p.eps.detach(), other)
    return {**ddpm(p, b, o), "cb": (b.t * (b.y_in >= 0) * pull).mean()}


def oc_target(x_t, b, o):
    """The target of oriented calibration, eps_hat of Eq. (D.3), corrected for eps-prediction: (B, C, H, W).

    Each x_t draws a reference (x_ref, y_ref) from the whole global batch with the probabilities of Eq. (D.4),
    proportional to q(x_t | x_ref) = N(sqrt(ab) x_ref, (1 - ab) I). Where the reference's class is at least as large
    as the image's own, the target is the noise that leads from x_ref to x_t, (x_t - sqrt(ab) x_ref) / sqrt(1 - ab),
    else eps. (Printed is x_t / sqrt(a_t) - x_ref, which is not eps even for x_ref = x_0.)
    """
    signal, sigma = per_image(o.alphas_bar.sqrt(), b.t, x_t), per_image((1 - o.alphas_bar).sqrt(), b.t, x_t)
    gap = torch.cdist((x_t / signal).flatten(1), b.pool_x_0.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    log_q = -0.5 * ((signal / sigma).flatten(1) * gap).square()             # (B, G), up to a constant a row
    chosen = (log_q + b.gumbel).argmax(1)                                   # a draw with probabilities softmax(log_q)
    target = (x_t - signal * b.pool_x_0[chosen]) / sigma
    transfers = o.counts[b.pool_y[chosen]] >= o.counts[b.y]                 # q(y_ref) >= q(y)
    return torch.where(transfers[:, None, None, None], target, b.eps)


def oc(p, b, o):
    """Oriented calibration, Eq. (D.2): E ||eps_theta(x_t, t, y) - eps_hat||^2."""
    return {"base": distance(p.eps, oc_target(p.x_t, b, o)).mean()}


def uniform_t(o, G, step, g):
    """(t, t_below, weight) of a step, (G,) each or None: t uniform in [0, T), on the device of the generator g."""
    return torch.randint(len(o.alphas_bar), (G,), generator=g, device=g.device), None, None


BASES = {"ddpm": ddpm, "cbdm": cbdm, "oc": oc}
TIMESTEPS = {}      # base: how it draws timesteps, where not by uniform_t


# ----------------------------------------------------------------------------------------------------------------------
# Capacity manipulation

def class_weights(counts):
    """Eq. (3): (w_con, w_div), each (C,): C N_y / sum_c N_c and C / (N_y sum_c 1 / N_c). Both have mean 1 over classes."""
    n = torch.as_tensor(counts, dtype=torch.float64)
    return len(n) * n / n.sum(), len(n) / (n * (1 / n).sum())


def cm(D, b, o):
    """The two terms of Eq. (2), for the distances D (B,) between the predictions of theta and theta^g.

    con = E w_con^y D. div = -E w_div^y min(D, m) with the bound m (0: none, as printed): without it the term has no
    lower bound, and training diverges. The weights are those of the true class, also where the label is dropped.
    """
    bounded = D.clamp(max=o.div_bound) if o.div_bound else D
    return {"con": (o.w_con_y[b.y] * D).mean(), "div": -(o.w_div_y[b.y] * bounded).mean()}


class Objective(nn.Module):
    """L_Total = L_base + lam (w_con L_Con + w_div L_Div), Eq. (4), for a UNet whose decoder may be reserved.

    forward(Batch) -> (total, a scalar; {name: scalar} of unweighted terms; D (B,) detached, 0 without CM).
    counts (C,): images a class in the training set. tau, gamma, y_prime ("uniform": the mean over Y of Eq. (D.1), or
    "train": by class frequency, CBDM's code) belong to cbdm; ada is augment.py's probability; ct_double belongs to
    consistency.py, the rest to baselines.py. lam = 0, or a net with nothing reserved: no second pass.
    """

    def __init__(self, net, base, counts, alphas_bar, lam=1.0, w_con=1.0, w_div=1.0, div_bound=0.01, label_drop=0.1,
                 independent_dropout=False, tau=1e-3, gamma=0.25, y_prime="uniform", ada=0.0, focal_gamma=2.0,
                 rop_weight=0.1, rop_margin=0.1, ct_double=1):
        super().__init__()
        self.net, self.base, self.draw_t, self.gamma = net, BASES[base], TIMESTEPS.get(base, uniform_t), gamma
        self.div_bound, self.label_drop, self.independent_dropout = div_bound, label_drop, independent_dropout
        self.ada, self.focal_gamma, self.rop_margin, self.ct_double = ada, focal_gamma, rop_margin, ct_double
        self.weights = {"base": 1.0, "cb": tau, "overlap": rop_weight, "con": lam * w_con, "div": lam * w_div}
        self.two_passes = lam != 0 and any(True for _ in reserved(net.decoder))
        counts = torch.as_tensor(counts)
        w_con_y, w_div_y = class_weights(counts)
        law = torch.ones(len(counts)) if y_prime == "uniform" else counts.float()
        for name, value in {"counts": counts, "alphas_bar": alphas_bar, "y_prime_law": law,
                            "w_con_y": w_con_y.float(), "w_div_y": w_div_y.float()}.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, b):
        p = Predictions(self.net, b, q_sample(b.x_0, b.t, b.eps, self.alphas_bar))
        terms = self.base(p, b, self)
        D = torch.zeros_like(b.t, dtype=torch.float32)
        if self.two_passes:
            D = distance(p.eps, p.general())
            terms.update(cm(D, b, self))
        total = sum(self.weights[name] * value for name, value in terms.items())
        # The terms keep their graph: where total is one term, a compiled forward returns the two as one tensor, and
        # detaching the one would detach the other
        return total, terms, D.detach()
