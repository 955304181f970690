"""Which classes depend on small weights: diffusion loss per class, before and after pruning.

    python prune_probe.py --ckpt out/A/ckpt.pt --fraction 0.1           # writes to out/A/prune/
    python prune_probe.py --ckpt out/A/ckpt.pt out/B/ckpt.pt --fractions 0.1,0.2,0.3 --out out/prune

This is the experiment of Sec. 2.2, Figures 1(b), G.1 and G.2. The weights of smallest magnitude are
set to zero (in memory: the file is not touched). The loss E ||eps_theta - eps||^2 is measured per
class on the long-tailed training images, as the paper measures "the original training loss"
(Sec. G.2); `--images balanced` measures it on images of which the network has not seen most of the
rare classes'. Both times are the same images, noise and timesteps: R timesteps per image, one in
each R-th of 0 ... T - 1, labels on, no dropout, EMA weights, CM merged, in float32: bfloat16 rounds
by more than what a tenth of the weights changes. Intervals are bootstraps over images.

"10 % of its parameters with the smallest L1-norm" is read as single numbers, all in one order. The
paper does not say which tensors they come from: `--tensors weights` takes the weights of
convolutions and linear layers, `--tensors all` every parameter; `--scope layer` orders each alone.
"""
import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

import disk
import runtime
from data import class_groups, reference_images, to_float, training_images
from model import distance, make_alphas_bar, q_sample, signal_and_sigma, stratified_timesteps
from networks import load_merged
from runtime import Parser, UserError, integer, number, run
from sample import dtype_of

CHUNK = 256     # images whose noise is drawn at once, whatever --batch-size is: it changes nothing
BARS = {        # one figure of bars for each: its name, and what its y axis shows
    "relative": "relative loss change (%)",
    "absolute": "absolute loss change",
    "raw": "raw loss",
}


# --------------------------------------------------------------------------------------------------
# Pruning

def prunable(net, tensors="weights"):
    """The parameters that take part, {name: parameter}.

    tensors: "weights" of convolutions and Linears only, or "all" parameters.
    """
    if tensors == "all":
        return dict(net.named_parameters())
    return {f"{name}.weight": module.weight for name, module in net.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))}


@torch.no_grad()
def prune(net, fraction, scope="global", tensors="weights"):
    """Set the `fraction` of smallest |w| to zero, in place.

    scope: one threshold for all tensors together ("global"), or one for each tensor ("layer").
    Exactly floor(fraction n) of n entries are set to zero; ties are broken by position.
    """
    params = list(prunable(net, tensors).values())
    together = [params] if scope == "global" else [[p] for p in params]
    for group in together:
        flat = torch.cat([p.abs().flatten() for p in group])
        n = math.floor(fraction * len(flat) + 1e-9)     # 0.29 x 100 is 28.999...
        smallest = flat.argsort(stable=True)[:n]
        keep = torch.ones_like(flat, dtype=torch.bool)
        keep[smallest] = False
        for p, kept in zip(group, keep.split([p.numel() for p in group])):
            p.mul_(kept.view(p.shape))


# --------------------------------------------------------------------------------------------------
# Losses on fixed images, noise and timesteps

@torch.no_grad()
def per_image_losses(net, images, labels, repeats, rt, seed=0, batch_size=500, title="losses"):
    """||eps_theta - eps||^2 / (C H W) per image, the mean over `repeats` timesteps: (N,) float64.

    images (N, H, W, C) uint8, labels (N,). Noise follows from seed and position alone.
    """
    roots = [values.to(rt.device) for values in signal_and_sigma(make_alphas_bar())]
    times = stratified_timesteps(len(images), repeats)
    result = np.zeros(len(images))
    with runtime.progress(total=len(images) * repeats, desc=title, unit="img") as bar:
        for first in range(0, len(images), CHUNK):
            chunk = slice(first, first + CHUNK)
            x_0 = to_float(torch.from_numpy(np.array(images[chunk])).to(rt.device))
            y = torch.from_numpy(labels[chunk]).to(rt.device)
            for r in range(repeats):
                g = runtime.generator("cpu", seed, "probe", first, r)
                eps = torch.randn(x_0.shape, generator=g).to(rt.device)
                t = times[chunk, r].to(rt.device)
                x_t = q_sample(x_0, t, eps, *roots)
                x_t = x_t.contiguous(memory_format=torch.channels_last)
                errors = []
                for rows in torch.arange(len(x_t), device=rt.device).split(batch_size):
                    with rt.autocast():
                        predicted = net(x_t[rows], t[rows], y[rows]).float()
                    errors.append(distance(predicted, eps[rows]))
                result[chunk] += torch.cat(errors).cpu().numpy() / repeats
                bar.update(len(x_0))
    return result


def measure(net, images, labels, fractions, args, rt, name):
    """Losses per image of one network: (N,) as it is, and {fraction: (N,)} pruned."""
    losses = {}
    for fraction in (0, *fractions):
        pruned = copy.deepcopy(net)
        prune(pruned, fraction, args.scope, args.tensors)
        losses[fraction] = per_image_losses(pruned, images, labels, args.repeats, rt, args.seed,
                                            args.batch_size, f"{name}: {fraction:g} pruned")
    return losses.pop(0), losses


# --------------------------------------------------------------------------------------------------
# From losses per image to numbers per class and group

def bootstrap(raw, pruned, resamples=1000, seed=0):
    """Absolute and relative change of a mean loss, each [value, low, high].

    raw, pruned (n,): losses of the same images. low and high bound a 95 % interval over the images;
    None where there is one image only, which says nothing about others.
    """
    n = len(raw)
    if n == 1:
        change = float(pruned[0] - raw[0])
        return [change, None, None], [change / float(raw[0]), None, None]
    rng = np.random.RandomState(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), resamples) / n
    means = weights @ np.stack([raw, pruned], 1)        # (resamples, 2): the same images in both
    absolute = pruned.mean() - raw.mean(), means[:, 1] - means[:, 0]
    relative = pruned.mean() / raw.mean() - 1, means[:, 1] / means[:, 0] - 1
    return tuple([float(x) for x in (value, *np.percentile(samples, [2.5, 97.5]))]
                 for value, samples in (absolute, relative))


def changes(raw, pruned, labels, class_names, counts):
    """All numbers of one checkpoint and fraction: a dict of "classes", "groups" and "spearman".

    raw, pruned (N,): losses of images with these labels; counts (C,): training images per class.
    "spearman" is the rank correlation of a class's change with its number of training images; None
    where it is undefined.
    """
    classes = {}
    for c, name in enumerate(class_names):
        before, after = raw[labels == c], pruned[labels == c]
        absolute, relative = bootstrap(before, after, seed=c)
        classes[name] = {"train_images": int(counts[c]), "images": len(before),
                         "raw": float(before.mean()), "pruned": float(after.mean()),
                         "absolute": absolute, "relative": relative}
    groups = {name: {} for name in class_groups(counts)}
    spearman = {}
    for kind in ("absolute", "relative"):
        values = np.array([c[kind][0] for c in classes.values()])
        # Undefined where all classes have the same size, or change alike, or are only two
        defined = len(values) > 2 and np.ptp(counts) and np.ptp(values)
        rho, p = map(float, spearmanr(values, counts)) if defined else (None, None)
        spearman[kind] = {"rho": rho, "p": p}
        for name, members in class_groups(counts).items():
            groups[name][kind] = float(values[members].mean())
    return {"classes": classes, "groups": groups, "spearman": spearman}


# --------------------------------------------------------------------------------------------------
# Figures

def correlation(spearman):
    """Spearman's rho and p in words, such as "+0.50 (p = 0.04)", or "undefined"."""
    rho, p = spearman["rho"], spearman["p"]
    return "undefined" if rho is None else f"{rho:+.2f} (p = {p:.2g})"


def bar_figure(kind, results, fraction, path):
    """One bar per class, the most populous class first; the checkpoints' bars side by side.

    kind: one of BARS. results: {name of the checkpoint: what `changes` returned for `fraction`}.
    """
    classes = next(iter(results.values()))["classes"]
    sizes = {name: c["train_images"] for name, c in classes.items()}
    names = sorted(sizes, key=lambda name: -sizes[name])
    n = len(results)
    size = (max(6, 0.09 * len(names) * n + 3), 3.6)
    fig, ax = disk.pyplot().subplots(figsize=size, constrained_layout=True)
    for k, (label, result) in enumerate(results.items()):
        heights, errors = [result["classes"][name][kind] for name in names], None
        if kind != "raw":
            # Where there is no interval, NaN: it is not drawn
            heights, low, high = np.array(heights, float).T * (100 if kind == "relative" else 1)
            errors = heights - low, high - heights
            label += f": Spearman {correlation(result['spearman'][kind])}"
        x = np.arange(len(names)) + (k - (n - 1) / 2) * 0.8 / n
        ax.bar(x, heights, 0.8 / n, yerr=errors, label=label)
    if kind != "raw":
        ax.set_title(f"{100 * fraction:g}% of the weights set to zero; 95 % intervals over images")
    step = max(1, len(names) // 25)                 # no more labels than can be read
    ticks = [f"{name} ({sizes[name]})" for name in names[::step]]
    ax.set_xticks(np.arange(len(names))[::step], ticks, rotation=90, fontsize=7)
    ax.set(ylabel=BARS[kind], xlabel="class (training images), the most populous first")
    ax.legend(fontsize=8)
    disk.save_figure(fig, path)


def curve_figure(results, path):
    """The relative change against the fraction, one panel per checkpoint.

    One line each for Many, Medium and Few, or for each class where there are too few for groups.
    """
    fig, axes = disk.pyplot().subplots(1, len(results), figsize=(4.2 * len(results), 3.4),
                                       constrained_layout=True, squeeze=False, sharey=True)
    for ax, (name, by_fraction) in zip(axes[0], results.items()):
        columns = [{g: v["relative"] for g, v in result["groups"].items()}
                   or {c: v["relative"][0] for c, v in result["classes"].items()}
                   for result in by_fraction.values()]
        percents = [100 * float(f) for f in by_fraction]
        for label in columns[0]:
            ax.plot(percents, [100 * column[label] for column in columns], "o-", label=label)
        ax.set(title=name, xlabel="weights set to zero (%)")
        ax.legend(fontsize=8)
    axes[0, 0].set_ylabel("relative loss change (%), mean over classes")
    disk.save_figure(fig, path)


def write_figures(results, fractions, fraction, out):
    """The bars of `fraction`, and the curve of several fractions."""
    shown = {name: by_fraction[f"{fraction:g}"] for name, by_fraction in results.items()}
    for kind in BARS:
        bar_figure(kind, shown, fraction, out / f"{kind}.png")
    if len(fractions) > 1:
        curve_figure(results, out / "curve.png")


# --------------------------------------------------------------------------------------------------

def fractions_of(text):
    """An argparse type: a list of different fractions in (0, 1) from "0.05,0.1"."""
    fractions = [number(above=0, high=0.999)(word) for word in text.split(",")]
    if len({f"{f:g}" for f in fractions}) < len(fractions):       # as in probe.json
        raise argparse.ArgumentTypeError("must differ")
    return fractions


def make_parser():
    """All flags."""
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", nargs="+", required=True,
                        help="checkpoints of one data set, side by side in the figures")
    parser.add_argument("--names", nargs="+",
                        help="what to call them (default: their folders' names)")
    g = parser.add_argument_group("pruning")
    g.add_argument("--fraction", type=number(above=0, high=0.999), default=0.1,
                   help="share of weights set to zero (default: 0.1)")
    g.add_argument("--fractions", type=fractions_of, metavar="F,F",
                   help="several shares, for the curve; the bars show --fraction, or the first "
                   "share where --fraction is not among them")
    g.add_argument("--scope", choices=("global", "layer"), default="global",
                   help="one threshold for all tensors, or one for each (default: global)")
    g.add_argument("--tensors", choices=("weights", "all"), default="weights",
                   help="which parameters the share is of: weights of convolutions and linear "
                   "layers, or all: also biases, norms and label embeddings (default: weights)")
    g = parser.add_argument_group("measurement")
    g.add_argument("--images", choices=("trained", "balanced", "test"), default="trained",
                   help="those that the network was trained on, evaluate.py's balanced reference, "
                   "or the data set's test images (default: trained)")
    g.add_argument("--repeats", type=integer(1), default=10, metavar="R",
                   help="timesteps per image (default: 10)")
    g.add_argument("--data-dir", help="where data sets are (default: the checkpoint's)")
    g.add_argument("--weights", choices=("ema", "raw"), default="ema", help="default: ema")
    g.add_argument("--batch-size", type=integer(1), default=256,
                   help="images at a time; changes nothing (default: 256)")
    parser.add_argument("--if-needed", action="store_true",
                        help="do nothing where --out was made with these settings already")
    parser.add_common("folder of probe.json and the figures (default: prune beside the first "
                      "checkpoint)")
    parser.set_defaults(dtype="float32")
    return parser


def main():
    """Measure every checkpoint at every fraction; write the numbers and the figures."""
    args = make_parser().parse_args()
    start = time.time()

    # What is measured, and on which images
    ckpts = [disk.load(path, ["diffusion"]) for path in args.ckpt]
    rt = runtime.setup(args.device, dtype_of(args, ckpts[0]))
    names = args.names or [Path(path).parent.name for path in args.ckpt]
    if len(set(names)) != len(ckpts) or len(names) != len(ckpts):
        raise UserError(f"--names: give {len(ckpts)} different ones, one per checkpoint")
    trained_on = [(ckpt["data"], ckpt["config"]["tail_seed"]) for ckpt in ckpts]
    for path, data in zip(args.ckpt, trained_on):
        if data != trained_on[0]:
            raise UserError(f"--ckpt {path}: trained on other data than {args.ckpt[0]}")
    if args.images == "trained":
        images = training_images(ckpts[0], args.data_dir)
        print(images.table())
        labels = images.labels
        words = f"{images.name}, training images, as long-tailed as they were"
    else:
        split = "test" if args.images == "test" else None
        images, labels, words = reference_images(ckpts[0], args.data_dir, split)
    class_names = ckpts[0]["data"]["class_names"]
    counts = np.array(ckpts[0]["data"]["class_counts"])
    fractions = args.fractions or [args.fraction]
    out = Path(args.out or Path(args.ckpt[0]).parent / "prune")
    disk.check_writable(out / "probe.json")
    shown = args.fraction if args.fraction in fractions else fractions[0]
    settings = {"ckpt": [str(path) for path in args.ckpt], "names": names,
                "ckpt_sha256": [ckpt.sha256 for ckpt in ckpts],
                "images": words, "images_sha256": images.sha256, "num": len(labels),
                "repeats": args.repeats, "scope": args.scope, "tensors": args.tensors,
                "fractions": fractions, "shown": shown, "weights": args.weights,
                "seed": args.seed, "dtype": rt.dtype_name()}
    if args.if_needed and disk.up_to_date(out / "probe.json", settings):
        print(f"{out}: up to date")
        return

    # Measure
    results = {}
    for name, ckpt in zip(names, ckpts):
        net = load_merged(ckpt, args.weights, "full", rt.device)
        raw, pruned = measure(net, images.images, labels, fractions, args, rt, name)
        results[name] = {f"{f:g}": changes(raw, losses, labels, class_names, counts)
                         for f, losses in pruned.items()}

    # Print and write; the JSON last, since it says that all is there
    numel = sum(p.numel() for p in prunable(net, args.tensors).values())
    print(f"{words}: {len(labels):,} images x {args.repeats} timesteps; {args.scope} "
          f"threshold over {args.tensors} ({numel:,} numbers)")
    for name, by_fraction in results.items():
        for fraction, result in by_fraction.items():
            groups = "  ".join(f"{g} {v['relative']:+.2%}" for g, v in result["groups"].items())
            print(f"{name}, {100 * float(fraction):g}% pruned: relative loss change {groups}  "
                  f"Spearman with class size {correlation(result['spearman']['relative'])}")
    write_figures(results, fractions, shown, out)
    disk.write_json(out / "probe.json", {"results": results, "settings": settings,
                                         "pruned_of": numel,
                                         "seconds": round(time.time() - start, 1)})
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
