"""ResNet-18 for small images: the network of classify.py, its losses, and CM on it (Sec. G.11).

    net = make_resnet(channels=3, num_classes=100)      # torchvision's blocks and keys
    loss = ClassifierLoss(net=net, loss="ldam", counts=counts, reserved=("layer4",))
    net, ckpt = load_classifier("out/NAME/ckpt.pt", device)         # a feature network

The paper does not say how L_CM is applied to a classifier; ClassifierLoss says what is done here,
by default as in the authors' release.
"""
import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

import disk
from cm_layers import general_only, reserve
from losses import CMConfig, class_weights, cm_terms
from runtime import UserError, generator

STAGES = ("conv1", "layer1", "layer2", "layer3", "layer4")      # all convolutions; conv1: the stem
NORMS = ("apart", "shared")     # batch norm of theta and theta^g


# --------------------------------------------------------------------------------------------------
# The network

class NormedLinear(nn.Linear):
    """LDAM's last layer: scale times the cosine of the features and the weight of each class."""

    def __init__(self, features, classes, scale=30.0):
        super().__init__(features, classes, bias=False)
        self.scale = scale

    def forward(self, x):
        """x (B, features) -> (B, classes) in [-scale, scale]."""
        return self.scale * F.linear(F.normalize(x), F.normalize(self.weight))


def make_resnet(channels, num_classes, width=64, normed=False):
    """ResNet-18 for small images: a 3x3 stem without max-pool, torchvision's blocks and keys.

    Its stages have width, 2 width, 4 width and 8 width channels. normed: the last layer is a
    NormedLinear, for LDAM.
    """
    net = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    net.inplanes = width
    net.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    net.bn1 = nn.BatchNorm2d(width)
    net.maxpool = nn.Identity()
    for stage in range(4):
        layer = net._make_layer(BasicBlock, width << stage, 2, stride=2 if stage else 1)
        setattr(net, f"layer{stage + 1}", layer)
    last = NormedLinear if normed else nn.Linear
    net.fc = last(8 * width, num_classes)
    return net


class TwoNorms(nn.BatchNorm2d):
    """Batch norm of theta, and in `general` one of its own for theta^g."""

    def __init__(self, channels):
        super().__init__(channels)
        self.general = nn.BatchNorm2d(channels)
        self.general_only = False

    def forward(self, x):
        """x (N, C, H, W), normalised by that of the branch."""
        return self.general(x) if self.general_only else super().forward(x)


def make_reserved(network, stages, rank_ratio, scale=1.0, form="flat", norms="shared"):
    """A ResNet, network = make_resnet's arguments, with these of STAGES, or fc, reserved for CM.

    scale: a factor of BA. form: see LowRank. norms: one of NORMS; "apart" makes a TwoNorms of each
    batch norm that theta^g passes by itself, of whose keys theta's are the plain ones.
    """
    net = make_resnet(**network)
    for stage in stages:
        reserve(getattr(net, stage), rank_ratio, form, scale=scale)
    if norms == "apart":
        _, apart = shared_and_apart(net, stages)
        own = {module for layer in apart for module in layer.modules()}
        for name, norm in list(net.named_modules()):
            if isinstance(norm, nn.BatchNorm2d) and norm in own:
                net.set_submodule(name, TwoNorms(norm.num_features))
    return net


def shared_and_apart(net, stages):
    """The layers of a ResNet, those before the first of these stages and those from it on.

    The first ones run once for theta and theta^g.
    """
    names, layers = zip(*net.named_children())
    first = min((names.index(stage) for stage in stages), default=len(names))
    return layers[:first], layers[first:]


def features_and_logits(net, x):
    """Penultimate features (N, 8 width) and logits (N, num_classes).

    x (N, C, H, W): images in [-1, 1].
    """
    *body, fc = net.children()
    features = nn.Sequential(*body)(x).flatten(1)
    return features, fc(features)


def load_classifier(path, device, flag="--features"):
    """The network of a checkpoint, in eval mode, and the checkpoint itself. Raises UserError."""
    ckpt = disk.load(path, ["classifier"], flag)
    net = make_resnet(**ckpt["network"])
    net.load_state_dict(ckpt["model"])
    refuse_narrow(ckpt["network"]["width"], device, f"{flag} {path}: --width")
    return net.to(device).eval().requires_grad_(False), ckpt


def refuse_narrow(width, device, flag="--width"):
    """Raise UserError for widths with which torch's CPU convolutions corrupt memory.

    oneDNN's 1 x 1 convolutions of stride 2, channels last, of 2 to 6 channels.
    """
    if torch.device(device).type == "cpu" and width < 8:
        raise UserError(f"{flag} {width}: torch's convolutions so narrow corrupt memory on a CPU; "
                        "take at least 8")


# --------------------------------------------------------------------------------------------------
# Losses: loss(logits (B, C), y (B,), obj) -> (B,). obj is the ClassifierLoss, with its constants

def ce(logits, y, obj):
    """Cross-entropy."""
    return F.cross_entropy(logits, y, reduction="none")


def ldam_margins(counts, largest=0.5):
    """LDAM's margins (Cao et al., 2019): proportional to n^(-1/4), at most `largest`: (C,)."""
    margins = counts.float() ** -0.25
    return largest * margins / margins.max()


def ldam(logits, y, obj):
    """LDAM: cross-entropy of 30 (cos - margin of the true class).

    The logits are 30 cos, from NormedLinear.
    """
    shift = 30.0 * obj.margins[y]
    shifted = logits - F.one_hot(y, logits.shape[1]) * shift[:, None]
    return F.cross_entropy(shifted, y, reduction="none")


def la(logits, y, obj):
    """Logit adjustment (Menon et al., 2021): cross-entropy of logits + tau log prior.

    At test the unadjusted logits decide.
    """
    return F.cross_entropy(adjusted(logits, obj), y, reduction="none")


def adjusted(logits, obj):
    """logits + tau log prior."""
    return logits + obj.tau * (obj.counts / obj.counts.sum()).log()


LOSSES = {"ce": ce, "ldam": ldam, "la": la}


def effective_number_weights(counts, beta=0.9999):
    """DRW's class weights (Cui et al., 2019): (1 - beta) / (1 - beta^n), with mean 1: (C,)."""
    weights = (1 - beta) / (1 - beta ** counts.double())
    return (weights / weights.mean()).float()


# --------------------------------------------------------------------------------------------------
# A step's images

class Images(NamedTuple):
    """One part of a step's images, with what loop.py looks at."""
    x: Tensor               # (B, C, H, W) in [-1, 1]
    y: Tensor               # (B,) int64
    reweigh: bool = False   # whether classes are weighed by effective number (DRW)
    cm_weight: None = None  # of L_CM: every image counts once


def random_shift(x, pad, g):
    """Shift each image by up to `pad` pixels in all directions; x (N, C, H, W), g the generator.

    What enters at the border is the background, -1.
    """
    N, _, H, W = x.shape
    padded = F.pad(x, (pad,) * 4, value=-1.0)
    dy, dx = torch.randint(2 * pad + 1, (2, N, 1, 1), generator=g, device=x.device)
    image = torch.arange(N, device=x.device)[:, None, None]
    row = torch.arange(H, device=x.device)[:, None] + dy
    column = torch.arange(W, device=x.device) + dx
    return padded[image, :, row, column].permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------------------------
# The training loss, with CM

UNBOUNDED = CMConfig(div_bound=0.0)     # the squared distance of probabilities is at most 2


def distance_of_probs(logits, general, obj):
    """||p - p_g||^2 per image, of the two softmaxes: (B, C), (B, C) -> (B,)."""
    return (logits.softmax(1) - general.softmax(1)).square().sum(1)


def distance_of_logits(logits, general, obj):
    """Mean squared difference per image: (B, C), (B, C) -> (B,)."""
    return (logits - general).square().mean(1)


def kl(logits, general, obj, temperature=1.5):
    """The authors' release: KL(softmax(z / 1.5) || softmax(z_g / 1.5)) / C: (B, C), (B, C) -> (B,).

    z are theta's logits, adjusted as in `la` where that is the loss, and z_g those of theta^g.
    """
    z = adjusted(logits, obj) if obj.loss is la else logits
    log_p = (z / temperature).log_softmax(1)
    log_p_g = (general / temperature).log_softmax(1)
    return (log_p.exp() * (log_p - log_p_g)).mean(1)


DISTANCES = {"kl": kl, "probs": distance_of_probs, "logits": distance_of_logits}


class ClassifierLoss(nn.Module):
    """The training loss of a ResNet, with L_CM where stages are reserved.

    net:      from make_resnet, with the stages in `reserved` reserved.
    loss:     a key of LOSSES.
    counts:   (C,), training images per class.
    cm:       lambda and the weights of Eq. (4), and the bound of L_Div; lam = 0: no L_CM.
    tau:      of the loss "la".
    distance: a key of DISTANCES, D of Eq. (2); the paper gives no form.
    flip:     whether images are mirrored at random.
    drw_from: the step from which on classes are weighed by effective number (DRW).

    L_CM is Eq. (2)-(4) on the logits of theta and theta^g for the same input; D of probabilities is
    bounded, so that div_bound is not needed. The trunk below the first reserved stage runs once.
    The pass of theta^g has batch norms of its own where they are TwoNorms; else it normalises by
    the statistics of the batch, and only theta updates the running ones.
    """

    def __init__(self, *, net, loss, counts, reserved=(), cm=UNBOUNDED, tau=1.0, distance="probs",
                 flip=False, drw_from=math.inf):
        super().__init__()
        self.net = net
        self.loss = LOSSES[loss]
        self.reserved = tuple(reserved)
        self.cm = cm
        self.tau = tau
        self.distance = DISTANCES[distance]
        self.flip = flip
        self.drw_from = drw_from
        counts = torch.as_tensor(counts)
        w_con_y, w_div_y = class_weights(counts)
        constants = {"counts": counts.float(), "margins": ldam_margins(counts),
                     "w_con_y": w_con_y.float(), "w_div_y": w_div_y.float(),
                     "drw": effective_number_weights(counts)}
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def draw_batch(self, x, y, *, seed, step, part=0, parts=1):
        """One part of a step's Images, shifted at random, and mirrored where `flip`.

        A pure function of the global batch x (G, C, H, W), y (G,), and (seed, step).
        """
        g = generator(x.device, seed, "augment", step)
        x = random_shift(x, max(1, x.shape[-1] // 8), g)
        if self.flip:
            mirrored = torch.rand(len(x), 1, 1, 1, generator=g, device=x.device) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        own = slice(part * len(x) // parts, (part + 1) * len(x) // parts)
        return Images(x[own].contiguous(memory_format=torch.channels_last), y[own],
                      step >= self.drw_from)

    def forward(self, batch):
        """(total loss, {name: unweighted 0-d term}, zeros (B,), train.py's D), of Images."""
        x, y, reweigh, _ = batch
        shared, apart = shared_and_apart(self.net, self.reserved)
        x = self.through(shared, x)
        logits = self.through(apart, x).float()
        losses = self.loss(logits, y, self)
        base = losses.mean()
        if reweigh:
            weights = self.drw[y]
            base = (losses * weights).sum() / weights.sum()
        terms = {"base": base}
        total = base
        if self.reserved and self.cm.lam:
            with general_only(self.net), general_norms(apart):
                general = self.through(apart, x).float()
            D = self.distance(logits, general, self)
            terms.update(cm_terms(D, y, self.w_con_y, self.w_div_y, self.cm.div_bound))
            L_CM = self.cm.w_con * terms["con"] + self.cm.w_div * terms["div"]
            total = total + self.cm.lam * L_CM
        # Not detached: see losses.Objective
        return total, terms, torch.zeros(len(y), device=y.device)

    def through(self, layers, x):
        """x through consecutive layers of the network, flattened before the last one."""
        for layer in layers:
            x = layer(x.flatten(1)) if layer is self.net.fc else layer(x)
        return x


@contextmanager
def general_norms(layers):
    """A block in which TwoNorms are those of theta^g.

    Other batch norms, in train mode, use the batch's statistics and keep their running ones.
    """
    modules = [module for layer in layers for module in layer.modules()]
    two = [module for module in modules if isinstance(module, TwoNorms)]
    norms = [] if two else [m for m in modules if isinstance(m, nn.BatchNorm2d)]
    before = [norm.track_running_stats for norm in norms]
    try:
        for norm in two:
            norm.general_only = True
        for norm in norms:
            norm.track_running_stats = not norm.training
        yield
    finally:
        for norm in two:
            norm.general_only = False
        for norm, tracked in zip(norms, before):
            norm.track_running_stats = tracked
