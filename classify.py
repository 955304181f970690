"""Classification with ResNet-18: long-tailed recognition with and without CM (Sec. G.11), what generated images are worth
(Sec. G.5), and the feature networks that stand in for Inception.

    python classify.py --dataset cifar100 --ir 100 --loss ldam --drw [--cm]     # Table G.13
    python classify.py --dataset cifar100 --ir 100 --extra out/NAME/samples/samples.npz         # Table G.8
    python classify.py --dataset digits                                         # the demo's feature network, half a minute

It trains on the long-tailed draw (--ir; 1: every image) and reports top-1 accuracy, macro precision and recall on the
balanced test set. The folder of a run holds ckpt.pt (a plain ResNet-18, CM merged: what `evaluate.py --features` takes),
result.json, confusion.png and TensorBoard events; the same command resumes a stopped run.
"""
import math
import shlex
import sys
import time
from argparse import BooleanOptionalAction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from torchvision.models.resnet import BasicBlock, ResNet

import runtime
from cm_layers import general_only, merge, reserve
from data import Batches, ImageSet, add_data_flags, load, load_long_tailed, splits, to_classes, to_float
from losses import class_weights, cm
from readers import NoSuchSplit
from runtime import Parser, UserError, integer, number, run

PRESETS = {     # the field's recipe, and what digits get instead
    "paper": dict(epochs=200, weight_decay=2e-4, schedule="steps", nesterov=False, width=64),
    "digits": dict(epochs=30, weight_decay=5e-4, schedule="onecycle", nesterov=True, width=16),
}
STAGES = ("layer1", "layer2", "layer3", "layer4")
FREE = {"device", "out", "data_dir", "pack_dir", "compile", "if_needed"}


# ----------------------------------------------------------------------------------------------------------------------
# The network

class NormedLinear(nn.Linear):
    """LDAM's last layer: scale times the cosine between the features and each class's weight."""

    def __init__(self, features, classes, scale=30.0):
        super().__init__(features, classes, bias=False)
        self.scale = scale

    def forward(self, x):
        """x (B, features) -> (B, classes) in [-scale, scale]."""
        return self.scale * F.linear(F.normalize(x), F.normalize(self.weight))


def make_resnet(channels, num_classes, width=64, normed=False):
    """ResNet-18 for small images: a 3x3 stem without max-pool, torchvision's blocks and keys, `width` ... 8 x width wide.

    normed: a NormedLinear at the end, for LDAM.
    """
    net = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    net.inplanes = width
    net.conv1, net.bn1 = nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
    net.maxpool = nn.Identity()
    for stage in range(4):
        layer = net._make_layer(BasicBlock, width << stage, 2, stride=2 if stage else 1)
        setattr(net, f"layer{stage + 1}", layer)
    net.fc = NormedLinear(8 * width, num_classes) if normed else nn.Linear(8 * width, num_classes)
    return net


def features_and_logits(net, x):
    """Penultimate features (N, 8 width) and logits (N, num_classes) of images x (N, C, H, W) in [-1, 1]."""
    *body, fc = net.children()
    features = nn.Sequential(*body)(x).flatten(1)
    return features, fc(features)


def load_classifier(path, device, flag="--features"):
    """The network of a checkpoint in eval mode and its record {"data", "config", "accuracy"}. Raises UserError."""
    ckpt = runtime.load(path, ["classifier"], flag)
    net = make_resnet(**ckpt["network"])
    net.load_state_dict(ckpt["model"])
    return net.to(device).eval().requires_grad_(False), ckpt


def random_shift(x, pad, g):
    """Shift each image by up to `pad` pixels either way, filling with the background -1: x (N, C, H, W)."""
    N, _, H, W = x.shape
    padded = F.pad(x, (pad,) * 4, value=-1.0)
    dy, dx = torch.randint(2 * pad + 1, (2, N, 1, 1), generator=g, device=x.device)
    rows, columns = torch.arange(H, device=x.device)[:, None] + dy, torch.arange(W, device=x.device) + dx
    return padded[torch.arange(N, device=x.device)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)



# ----------------------------------------------------------------------------------------------------------------------
# Losses: loss(logits (B, C), y (B,), o) -> (B,), with o.counts (C,) the images a class in training

def ce(logits, y, o):
    """Cross-entropy."""
    return F.cross_entropy(logits, y, reduction="none")


def ldam_margins(counts, largest=0.5):
    """LDAM's margins (Cao et al., 2019), proportional to n^(-1/4), the largest of them 0.5: (C,)."""
    margins = counts.float() ** -0.25
    return largest * margins / margins.max()


def ldam(logits, y, o):
    """LDAM: cross-entropy of 30 (cos - margin of the true class); logits are 30 cos, from NormedLinear."""
    shift = 30.0 * o.margins[y]
    return F.cross_entropy(logits - F.one_hot(y, logits.shape[1]) * shift[:, None], y, reduction="none")


def la(logits, y, o):
    """Logit adjustment (Menon et al., 2021): cross-entropy of logits + tau log prior; at test the bare logits decide."""
    return F.cross_entropy(logits + o.tau * (o.counts / o.counts.sum()).log(), y, reduction="none")


LOSSES = {"ce": ce, "ldam": ldam, "la": la}


def effective_number_weights(counts, beta=0.9999):
    """DRW's class weights (Cui et al., 2019): (1 - beta) / (1 - beta^n), with mean 1 over the classes: (C,)."""
    weights = (1 - beta) / (1 - beta ** counts.double())
    return (weights / weights.mean()).float()


class Labels(NamedTuple):
    """What losses.cm looks at in a batch."""
    y: torch.Tensor


class Objective(nn.Module):
    """The training loss of a ResNet, with L_CM where stages are reserved: forward(x, y, reweigh) -> (total, {name: term}).

    L_CM is Eq. (2)-(4) with D = ||p - p_g||^2, p and p_g the softmax of the logits of theta and theta^g at one input
    (--distance logits: the mean squared difference of the logits instead). The paper gives no form; probabilities are
    bounded, so that the divergence term is, and no --div-bound is needed. The trunk below the first reserved stage runs
    once. theta^g's pass uses the batch's statistics and leaves batch norm's running ones to theta.
    """

    def __init__(self, net, loss, counts, tau=1.0, reserved=(), lam=1.0, w_con=1.0, w_div=1.0, div_bound=0.0, distance="probs"):
        super().__init__()
        counts = torch.as_tensor(counts)
        self.net, self.loss, self.tau, self.distance = net, LOSSES[loss], tau, distance
        self.lam, self.w_con, self.w_div, self.div_bound, self.reserved = lam, w_con, w_div, div_bound, tuple(reserved)
        w_con_y, w_div_y = class_weights(counts)
        for name, value in {"counts": counts.float(), "margins": ldam_margins(counts), "w_con_y": w_con_y.float(),
                            "w_div_y": w_div_y.float(), "drw": effective_number_weights(counts)}.items():
            self.register_buffer(name, value, persistent=False)

    def split(self):
        """(the layers below the first reserved stage, those from it on): lists that together are the network."""
        names = [n for n, _ in self.net.named_children()]
        first = min((names.index(s) for s in self.reserved), default=len(names))
        layers = list(self.net.children())
        return layers[:first], layers[first:]

    def forward(self, x, y, reweigh=False):
        """x (B, C, H, W) in [-1, 1], y (B,) int64; reweigh: by effective number (DRW) -> (scalar, {name: scalar})."""
        trunk, rest = self.split()
        for layer in trunk:
            x = layer(x) if layer is not self.net.fc else layer(x.flatten(1))
        logits = self.run(rest, x)
        each = self.loss(logits, y, self)
        terms = {"base": (each * self.drw[y]).sum() / self.drw[y].sum() if reweigh else each.mean()}
        total = terms["base"]
        if self.reserved and self.lam:
            with general_only(self.net), frozen_statistics(rest):
                general = self.run(rest, x)
            if self.distance == "probs":
                D = (logits.softmax(1) - general.softmax(1)).square().sum(1)
            else:
                D = (logits - general).square().mean(1)
            terms.update(cm(D, Labels(y), self))
            total = total + self.lam * (self.w_con * terms["con"] + self.w_div * terms["div"])
        return total, terms         # not detached: see losses.Objective

    def run(self, layers, x):
        """x through the last layers of the network, to float32 logits."""
        for layer in layers:
            x = layer(x.flatten(1)) if layer is self.net.fc else layer(x)
        return x.float()


class frozen_statistics:
    """Within, batch norms in train mode normalise by the batch and do not touch their running statistics."""

    def __init__(self, layers):
        self.norms = [m for layer in layers for m in layer.modules() if isinstance(m, nn.BatchNorm2d)]

    def __enter__(self):
        self.before = [m.track_running_stats for m in self.norms]
        for m in self.norms:
            m.track_running_stats = not m.training

    def __exit__(self, *_):
        for m, b in zip(self.norms, self.before):
            m.track_running_stats = b


def learning_rate(step, total, steps_per_epoch, args):
    """The learning rate of a step. "steps": five epochs of linear warm-up, then x 0.01 from 80 % and x 0.0001 from 90 % of
    the training on (epochs 160 and 180 of 200, as LDAM's code); "onecycle": torch's OneCycleLR without its momentum."""
    if args.schedule == "steps":
        warmup = min(5 * steps_per_epoch, total // 4)
        factor = 1e-4 if step >= 0.9 * total else 1e-2 if step >= 0.8 * total else 1.0
        return args.lr * factor * min(1.0, (step + 1) / max(1, warmup))
    rise = 0.3 * (total + 1) - 1
    cosine = lambda a, b, share: b + (a - b) / 2 * (1 + math.cos(math.pi * share))
    if step <= rise:
        return cosine(args.lr / 25, args.lr, step / rise)
    return cosine(args.lr, args.lr / 25e4, (step - rise) / (total - rise))


# ----------------------------------------------------------------------------------------------------------------------
# Data

def with_extra(images, path, per_class, seed):
    """`images` and the generated ones of an .npz (arr_0 N x H x W x 3 uint8, arr_1 labels), a number of each class.

    Where sample.py left its .json beside the file, the classes are matched by their names.
    per_class: "all", a number at most, or "balance": as many as fill the class up to the largest. Raises UserError.
    """
    try:
        with np.load(path) as f:
            extra, labels = f["arr_0"], f["arr_1"]
    except (OSError, ValueError, KeyError, EOFError, runtime.zipfile.BadZipFile) as e:
        raise UserError(f"--extra {path}: not an .npz with arr_0 (images) and arr_1 (labels): {e}")
    size, C = images.images.shape[1:3], len(images.class_names)
    right = extra.ndim == 4 and extra.dtype == np.uint8 and extra.shape[1:3] == size and extra.shape[3] in (images.images.shape[3], 3)
    if not right or labels.shape != (len(extra),) or not len(extra) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"--extra {path}: arr_0 is {extra.dtype} of shape {list(extra.shape)}; it must be uint8, N x {size[0]} x {size[1]} "
                        f"x 3, with N labels, whole numbers")
    names = runtime.read_record(path).get("data", {}).get("class_names")
    labels = to_classes(labels, names, images.class_names, f"--extra {path}")
    wanted = {"all": np.full(C, len(labels)), "balance": images.counts.max() - images.counts}.get(per_class)
    wanted = np.full(C, int(per_class)) if wanted is None else wanted
    rng = np.random.RandomState(seed)
    rows = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in enumerate(wanted)]).astype(int)
    channels = images.images.shape[3]
    joined = np.concatenate([images.images, extra[rows][..., :channels]])
    return ImageSet(images.name, joined, np.concatenate([images.labels, labels[rows]]), images.class_names, images.flip, images.provenance)


def per_class_argument(text):
    """--extra-per-class: "all", "balance", or a whole number."""
    return text if text in ("all", "balance") else str(integer(1)(text))


def groups_of(counts, rule):
    """{"Many", "Medium", "Few"}: by training images, over 100, 20 to 100, under 20 ("counts"), or thirds (Sec. 4.1)."""
    if rule == "thirds":
        return splits(counts)
    counts = np.asarray(counts)
    parts = {"Many": counts > 100, "Medium": (counts >= 20) & (counts <= 100), "Few": counts < 20}
    return {name: np.flatnonzero(mask).tolist() for name, mask in parts.items() if mask.any()}


# ----------------------------------------------------------------------------------------------------------------------
# Results

@torch.no_grad()
def predict(net, images, rt, batch_size=500):
    """The classes that the network (in eval mode) names for an ImageSet: (N,)."""
    parts = np.array_split(np.arange(len(images.labels)), max(1, len(images.labels) // batch_size))
    return np.concatenate([net(to_float(torch.from_numpy(np.array(images.images[rows])).to(rt.device))).argmax(1).cpu().numpy()
                           for rows in parts])


def scores(predicted, labels, groups, C):
    """Per cent: {"accuracy", "precision", "recall" (both macro), "splits": {name: {"accuracy"}}}, and the confusion matrix.

    A class that is never predicted has precision 0. On a balanced test set accuracy and recall are one.
    """
    matrix = np.bincount(labels * C + predicted, minlength=C * C).reshape(C, C)
    correct, true, named = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    result = {"accuracy": 100 * correct.sum() / true.sum(), "precision": 100 * float(np.mean(correct / np.maximum(named, 1))),
              "recall": 100 * float(np.mean(correct[true > 0] / true[true > 0]))}
    result["splits"] = {n: {"accuracy": 100 * float(correct[c].sum() / true[c].sum())} for n, c in groups.items() if true[c].sum()}
    return {**result, "accuracy": float(result["accuracy"])}, matrix


def confusion_picture(matrix, counts, names, path):
    """confusion.png: rows the true class, the most populous first; columns the named one; each row adds to one."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    order = np.argsort(-np.asarray(counts), kind="stable")
    share = (matrix / np.maximum(1, matrix.sum(1, keepdims=True)))[order][:, order]
    fig, ax = plt.subplots(figsize=(5.4, 4.8), constrained_layout=True)
    drawn = ax.imshow(share, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    fig.colorbar(drawn, label="share of the class")
    every = max(1, len(names) // 20)
    ax.set_yticks(range(0, len(names), every), [f"{names[c]} ({counts[c]})" for c in order[::every]], fontsize=7)
    ax.set_xticks(range(0, len(names), every), [names[c] for c in order[::every]], fontsize=7, rotation=90)
    ax.set(xlabel="named", ylabel="true class (training images)")
    runtime.write_atomic(path, lambda p: fig.savefig(p, dpi=120, format="png"))
    plt.close(fig)


# ----------------------------------------------------------------------------------------------------------------------

def make_parser():
    """All flags; those in PRESETS have their default filled in by `resolve`."""
    parser = Parser(__doc__)
    g = add_data_flags(parser, dataset="digits", ir=1)
    g.add_argument("--extra", metavar="FILE", help="an .npz of generated images, added to the training set")
    g.add_argument("--extra-per-class", type=per_class_argument, default="all", metavar="N", help="how many of each class: all, a number, or "
                   "balance, which fills every class up to the largest (default: all)")
    g = parser.add_argument_group("method")
    g.add_argument("--loss", choices=LOSSES, default="ce", help="cross-entropy, LDAM or logit adjustment (default: ce)")
    g.add_argument("--tau", type=number(0), default=1.0, help="of --loss la (default: 1)")
    g.add_argument("--drw", action="store_true", help="weigh classes by effective number over the last fifth of the training")
    g.add_argument("--cm", action="store_true", help="reserve capacity and add L_CM")
    g.add_argument("--reserve", nargs="+", choices=STAGES, default=["layer3", "layer4"], help="which stages (default: layer3 layer4)")
    g.add_argument("--rank-ratio", type=number(above=0, high=1), default=0.1, help="r / min(d, k) of Eq. (1) (default: 0.1)")
    g.add_argument("--lam", type=number(0), default=1.0, help="lambda of Eq. (4) (default: 1)")
    g.add_argument("--w-con", type=number(0), default=1.0, help="weight of L_Con (default: 1)")
    g.add_argument("--w-div", type=number(0), default=1.0, help="weight of L_Div (default: 1)")
    g.add_argument("--div-bound", type=number(0), default=0.0, metavar="M", help="L_Div saturates at distance M; 0: never (default: 0)")
    g.add_argument("--distance", choices=("probs", "logits"), default="probs", help="D between theta and theta^g (default: probs)")
    g = parser.add_argument_group("training")
    for name, kind, words in (("epochs", integer(1), "passes over the training set"), ("weight_decay", number(0), "SGD's weight decay"),
                              ("width", integer(1), "channels of the first stage; 64 is ResNet-18")):
        own = "; ".join(f"{n}: {p[name]}" for n, p in PRESETS.items() if n != "paper")
        g.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{words} (default: {PRESETS['paper'][name]}; {own})")
    g.add_argument("--schedule", choices=("steps", "onecycle"), help="of the learning rate (default: steps; digits: onecycle)")
    g.add_argument("--nesterov", action=BooleanOptionalAction, default=None, help="Nesterov momentum (default: off; digits: on)")
    g.add_argument("--batch-size", type=integer(1), default=128, help="images a step, over all processes (default: 128)")
    g.add_argument("--lr", type=number(above=0), default=0.1, help="largest learning rate (default: 0.1)")
    g.add_argument("--compile", action=BooleanOptionalAction, default=None, help="torch.compile (default: on CUDA only)")
    g.add_argument("--save-every", type=integer(1), default=10, help="epochs between checkpoints (default: 10)")
    parser.add_argument("--split-rule", choices=("counts", "thirds"), default="counts", help="Many / Medium / Few by training images, over "
                        "100, 20 to 100, under 20, as the field does; or thirds of the classes (default: counts)")
    parser.add_argument("--if-needed", action="store_true", help="do nothing where --out was made with these settings already")
    parser.add_common("folder of the run (default: out/classifier-DATASET, and a name made of the settings unless they are the defaults)")
    return parser


def resolve(args):
    """Fill in the data set's defaults and the run's folder."""
    preset, plain = {**PRESETS["paper"], **PRESETS.get(args.dataset, {})}, make_parser().parse_args([])
    for key, value in preset.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.out is None:
        words = [f"ir{args.ir:g}"] * (args.ir != 1) + [args.loss] * (args.loss != "ce") + ["drw"] * args.drw + ["cm"] * args.cm
        if args.extra:
            words.append("extra" + (runtime.sha256(args.extra)[:8] if Path(args.extra).is_file() else ""))
        words += [f"seed{args.seed}"] * (args.seed != 0)
        named = FREE | {"dataset", "ir", "loss", "drw", "cm", "extra", "seed", "save_every"}
        words += [f"{k}{'_'.join(v) if isinstance(v, list) else v}".replace("/", "_") for k, v in sorted(vars(args).items())
                  if k not in named and v != preset.get(k, getattr(plain, k))]
        args.out = "-".join([f"out/classifier-{args.dataset}", *words])
    for flag, belongs in (("tau", args.loss == "la"), ("extra_per_class", args.extra),
                          *((k, args.cm) for k in ("reserve", "lam", "w_con", "w_div", "div_bound", "distance", "rank_ratio"))):
        if not belongs and getattr(args, flag) != getattr(plain, flag):
            whose = {"tau": "--loss la, which adds the prior", "extra_per_class": "--extra"}.get(flag, "--cm")
            raise UserError(f"--{flag.replace('_', '-')}: belongs to {whose}; leave it out")
    return args


def main():
    """Train, resuming where a run was stopped; then measure the merged network on the test set."""
    args = resolve(make_parser().parse_args())
    start, out, step = time.time(), Path(args.out), 0
    old = runtime.load(out / "ckpt.pt", ["classifier"], "--out") if (out / "ckpt.pt").exists() else None
    rt = runtime.setup(args.device, old["config"]["dtype"] if old and args.dtype == "auto" else args.dtype)
    args.dtype = str(rt.dtype).removeprefix("torch.")       # what auto came to: a run keeps it on any device
    if args.batch_size % rt.world:
        raise UserError(f"--batch-size {args.batch_size}: not divisible by {rt.world} processes; it counts the images of all of them")
    with rt.rank_0_first():
        images = load_long_tailed(args)
        try:
            test = load(args.dataset, args.data_dir, "test", args.resolution, args.class_order, args.pack_dir)
        except NoSuchSplit:
            test = None
    real_counts, C = images.counts, len(images.class_names)
    if args.extra:
        images = with_extra(images, args.extra, args.extra_per_class, args.seed)
    if empty := [n for n, k in zip(images.class_names, images.counts) if not k]:
        raise UserError(f"--dataset {args.dataset}: class {empty[0]} has no training image")
    if test is not None and not test.counts.all():
        raise UserError(f"--dataset {args.dataset}: class {test.class_names[int(np.argmin(test.counts))]} has no test image")
    network = {"channels": images.images.shape[3], "num_classes": C, "width": args.width, "normed": args.loss == "ldam"}
    settings = {**{k: v for k, v in vars(args).items() if k not in FREE}, "extra_sha256": args.extra and runtime.sha256(args.extra)}
    if args.if_needed and runtime.up_to_date(out / "result.json", settings) and (out / "ckpt.pt").exists():
        return rt.print(f"{out}: up to date")

    # Network, optimizer, and where a stopped run was
    torch.manual_seed(runtime.seed_of(args.seed, "init"))
    net = make_resnet(**network)
    if args.cm:
        for stage in args.reserve:
            reserve(getattr(net, stage), args.rank_ratio)
    net.to(rt.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=args.nesterov)
    if old:
        defaults = {**vars(make_parser().parse_args([])), **PRESETS["paper"], **PRESETS.get(args.dataset, {})}
        runtime.refuse_changes(old["config"], settings, out, defaults)
    if old and old["training"]:
        net.load_state_dict(old["training"]["model"])
        optimizer.load_state_dict(old["training"]["optimizer"])
        step = old["training"]["step"]
    objective = Objective(net, args.loss, images.counts, args.tau, args.reserve if args.cm else (), args.lam, args.w_con, args.w_div,
                          args.div_bound, args.distance).to(rt.device)
    batches = Batches(images, args.batch_size, args.seed, rt.device)
    total = max(1, args.epochs * len(images.labels) // args.batch_size)
    steps_per_epoch = max(1, len(images.labels) // args.batch_size)
    own = slice(rt.rank * args.batch_size // rt.world, (rt.rank + 1) * args.batch_size // rt.world)

    def batch(s):
        x, y = batches.at(s)
        g = runtime.generator(rt.device, args.seed, "augment", s)
        x = random_shift(x, max(1, x.shape[-1] // 8), g)
        if images.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, generator=g, device=x.device) < 0.5, x.flip(3), x)
        return x[own].contiguous(memory_format=torch.channels_last), y[own]

    module = objective
    if rt.device.type == "cuda" if args.compile is None else args.compile:
        module = runtime.compile_or_not(objective, lambda m: m(*batch(step))[0], rt)
    if rt.world > 1:
        module = DistributedDataParallel(module, [rt.device] if rt.device.type == "cuda" else None)
    rt.print(f"{images.summary()}; {args.loss}{' + CM on ' + ' '.join(args.reserve) if args.cm else ''}{', DRW' * args.drw}; "
             f"{'resuming at' if step else 'starting at'} step {step} of {total}")

    def save(training):
        plain = make_resnet(**network)
        twin = dict(net.state_dict())
        if args.cm:         # what users get is merged
            for stage in args.reserve:
                reserve(getattr(plain, stage), args.rank_ratio)
        plain.load_state_dict(twin)
        merge(plain)
        runtime.save(out / "ckpt.pt", {"kind": "classifier", "network": network, "model": plain.state_dict(), "config": settings,
                                       "training": training, "data": {"dataset": args.dataset, "class_names": images.class_names,
                                                                      "resolution": images.images.shape[1]}})
        return plain

    board = SummaryWriter(out, purge_step=step + 1) if rt.rank == 0 else None
    stop = runtime.StopSignal()
    net.train()
    with runtime.progress(total=total, initial=step, desc="training the classifier", unit="step", disable=rt.rank > 0) as bar:
        while step < total:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, steps_per_epoch, args)
            x, y = batch(step)
            with rt.autocast():
                loss, terms = module(x, y, args.drw and step >= 0.8 * total)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()
            saves = step % (args.save_every * steps_per_epoch) == 0
            if step % 20 == 0 or saves or step == total:
                if rt.maximum(int(not math.isfinite(value := loss.item()))):
                    raise UserError(f"stopped at step {step}: the loss is not finite; lower --lr")
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                if board:
                    for name, term in {**terms, "lr": torch.tensor(optimizer.param_groups[0]["lr"])}.items():
                        board.add_scalar(name, term.item(), step)
            signal = rt.maximum(stop.number)
            if rt.rank == 0 and (signal or saves) and step < total:
                save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
            if signal:
                rt.print(f"stopped by signal {signal} at step {step}; the same command goes on from there")
                sys.exit(128 + signal)
    if rt.rank > 0:
        return

    # Results, of the merged network
    plain = save(None).to(rt.device).eval()
    train_accuracy = float((predict(plain, images, rt) == images.labels).mean())
    result = {"train_accuracy": 100 * train_accuracy, "settings": {**settings, "command": shlex.join(["python", "classify.py", *sys.argv[1:]])},
              "num": len(images.labels), "num_real": 0, "classes": {}, "splits": {}}
    words = f"accuracy {train_accuracy:.1%} on {len(images.labels):,} training images"
    if test is not None:
        groups = groups_of(real_counts, args.split_rule)
        numbers, matrix = scores(predict(plain, test, rt), test.labels, groups, C)
        result.update(numbers, num_real=len(test.labels))
        confusion_picture(matrix, real_counts, images.class_names, out / "confusion.png")
        for name, value in {"test/accuracy": numbers["accuracy"], **{f"test/{n}": v["accuracy"] for n, v in numbers["splits"].items()}}.items():
            board.add_scalar(name, value, total)
        rule = {"counts": "over 100 / 20 to 100 / under 20 training images", "thirds": "thirds of the classes"}[args.split_rule]
        words += f", {numbers['accuracy'] / 100:.1%} on {len(test.labels):,} test images"
        print("test accuracy " + "  ".join(f"{n} {v['accuracy']:.2f}" for n, v in numbers["splits"].items()) + f"  overall {numbers['accuracy']:.2f}"
              f"  macro precision {numbers['precision']:.2f}  recall {numbers['recall']:.2f}  (%; {rule})")
    else:
        words += "; the set has no test images"
    board.close()
    runtime.write_json(out / "result.json", {**result, "settings": {**settings}, "command": result["settings"]["command"],
                                             "seconds": round(time.time() - start, 1)})
    print(f"wrote {out / 'ckpt.pt'}: {words}")


if __name__ == "__main__":
    run(main)
