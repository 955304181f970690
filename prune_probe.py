"""Which classes live on small weights: each class's diffusion loss before and after pruning (Sec. 2.2, Fig. 1(b), G.1, G.2).

    python prune_probe.py --ckpt out/A/ckpt.pt --fraction 0.1               # out/A/prune/
    python prune_probe.py --ckpt out/A/ckpt.pt out/B/ckpt.pt --fractions 0.05,0.1,0.2,0.3 --out out/prune

The weights of smallest magnitude are set to zero (in memory: the file is not touched) and the loss E ||eps_theta - eps||^2
is measured per class on the same images, noise and timesteps as before: R timesteps an image, one in each R-th of 0 ... T - 1,
labels on, no dropout, EMA weights, CM merged. Intervals are bootstraps over images.
"""
import copy
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

import runtime
from data import load_reference, splits, to_classes, to_float
from model import make_alphas_bar, q_sample
from runtime import Parser, UserError, integer, number, run
from sample import dtype_of, load_network

matplotlib.use("Agg")
from matplotlib import pyplot as plt        # noqa: E402, after the backend is chosen

CHUNK = 256             # images whose noise is drawn together: not the batch size, so that this changes nothing


# ----------------------------------------------------------------------------------------------------------------------
# Pruning

def prunable(net, tensors="weights"):
    """The parameters that take part, {name: parameter}: "weights" of convolutions and Linears, or "all" of them."""
    if tensors == "all":
        return dict(net.named_parameters())
    return {f"{name}.weight": m.weight for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


@torch.no_grad()
def prune(net, fraction, scope="global", tensors="weights"):
    """Set the `fraction` of smallest |w| to zero, in place, over all tensors together ("global") or each ("layer").

    Returns {name: share of zeros}. Exactly floor(fraction n) entries of n are zeroed, ties broken by position.
    """
    params = prunable(net, tensors)
    groups = [list(params.values())] if scope == "global" else [[p] for p in params.values()]
    for group in groups:
        flat = torch.cat([p.abs().flatten() for p in group])
        smallest = flat.argsort(stable=True)[:int(fraction * len(flat))]
        keep = torch.ones_like(flat, dtype=torch.bool)
        keep[smallest] = False
        for p, k in zip(group, keep.split([p.numel() for p in group])):
            p.mul_(k.view(p.shape))
    return {name: float((p == 0).float().mean()) for name, p in params.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Losses on fixed images, noise and timesteps

def timesteps_of(n, repeats, T=1000):
    """Timesteps (n, repeats): for each image one in every repeats-th of 0 ... T - 1, at a position that moves with the image."""
    offset = (np.arange(n) * 0.6180339887498949) % 1            # the golden ratio spreads any number of images evenly
    return torch.from_numpy(((np.arange(repeats)[None] + offset[:, None]) * T / repeats).astype(np.int64))


@torch.no_grad()
def losses(net, images, labels, repeats, rt, seed=0, batch_size=500, title="losses"):
    """The mean over timesteps of ||eps_theta(x_t, t, y) - eps||^2 / (C H W) for each image: images (N, H, W, C) uint8 -> (N,)."""
    alphas_bar, result = make_alphas_bar().to(rt.device), np.zeros(len(images))
    times = timesteps_of(len(images), repeats, len(alphas_bar))
    with runtime.progress(total=len(images) * repeats, desc=title, unit="img") as bar:
        for first in range(0, len(images), CHUNK):
            x_0 = to_float(torch.from_numpy(np.array(images[first:first + CHUNK])).to(rt.device))
            y = torch.from_numpy(labels[first:first + CHUNK]).to(rt.device)
            for r in range(repeats):
                eps = torch.randn(x_0.shape, generator=runtime.generator("cpu", seed, "probe", first, r)).to(rt.device)
                t = times[first:first + CHUNK, r].to(rt.device)
                x_t = q_sample(x_0, t, eps, alphas_bar).contiguous(memory_format=torch.channels_last)
                for rows in torch.arange(len(x_0), device=rt.device).split(batch_size):
                    with rt.autocast():
                        predicted = net(x_t[rows], t[rows], y[rows]).float()
                    error = (predicted - eps[rows]).square().flatten(1).mean(1)
                    result[first + rows.cpu().numpy()] += error.cpu().numpy() / repeats
                    bar.update(len(rows))
    return result


def bootstrap(raw, pruned, resamples=1000, seed=0):
    """Absolute and relative change of a mean loss, each (value, low, high) with a 95 % interval over the images (n,)."""
    n = len(raw)
    weights = np.random.RandomState(seed).multinomial(n, np.full(n, 1 / n), resamples) / n
    means = weights @ np.stack([raw, pruned], 1)                # (resamples, 2): the same images in both
    absolute, relative = means[:, 1] - means[:, 0], means[:, 1] / means[:, 0] - 1
    values = pruned.mean() - raw.mean(), pruned.mean() / raw.mean() - 1
    return [[float(v), *map(float, np.percentile(samples, [2.5, 97.5]))] for v, samples in zip(values, (absolute, relative))]


def changes(raw, pruned, labels, class_names, counts):
    """All numbers of one checkpoint and fraction: per class, per split, and Spearman's rank correlation with class size.

    raw, pruned (N,): losses of images with these labels; counts (C,): images a class in training.
    """
    classes = {}
    for c, name in enumerate(class_names):
        mine = labels == c
        absolute, relative = bootstrap(raw[mine], pruned[mine], seed=c)
        classes[name] = {"train_images": int(counts[c]), "images": int(mine.sum()), "raw": float(raw[mine].mean()),
                         "pruned": float(pruned[mine].mean()), "absolute": absolute, "relative": relative}
    result = {"classes": classes, "splits": {}, "spearman": {}}
    for kind in ("absolute", "relative"):
        values = np.array([c[kind][0] for c in classes.values()])
        rho, p = spearmanr(values, counts) if np.ptp(counts) else (0.0, 1.0)       # undefined where all classes are as large
        result["spearman"][kind] = {"rho": float(rho), "p": float(p)}
        for split, members in splits(counts).items():
            result["splits"].setdefault(split, {})[kind] = float(values[members].mean())
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Figures

def figures(runs, fraction, out):
    """relative.png, absolute.png, raw.png: a bar a class, the most populous first, with intervals; checkpoints side by side."""
    for kind, words in (("relative", "relative loss change (pruned - raw) / raw"), ("absolute", "absolute loss change"), ("raw", "raw loss")):
        fig, ax = plt.subplots(figsize=(max(6, 0.09 * len(next(iter(runs.values()))["classes"]) * len(runs) + 3), 3.6), constrained_layout=True)
        for k, (name, result) in enumerate(runs.items()):
            rows = sorted(result["classes"].items(), key=lambda item: -item[1]["train_images"])
            value = np.array([[r[kind]] * 3 if kind == "raw" else r[kind] for _, r in rows])
            x = np.arange(len(rows)) + (k - (len(runs) - 1) / 2) * 0.8 / len(runs)
            error = None if kind == "raw" else [value[:, 0] - value[:, 1], value[:, 2] - value[:, 0]]
            label = name if kind == "raw" else f"{name}: Spearman {result['spearman'][kind]['rho']:+.2f} (p = {result['spearman'][kind]['p']:.1g})"
            ax.bar(x, value[:, 0], 0.8 / len(runs), yerr=error, label=label, error_kw={"linewidth": 0.7})
        step = max(1, len(rows) // 25)
        ax.set_xticks(np.arange(len(rows))[::step], [f"{n} ({r['train_images']})" for n, r in rows][::step], rotation=90, fontsize=7)
        ax.set(ylabel=words, xlabel="class (training images), the most populous first",
               title="" if kind == "raw" else f"{fraction:.0%} of the weights set to zero")
        ax.legend(fontsize=7)
        ax.spines[["top", "right"]].set_visible(False)
        runtime.write_atomic(out / f"{kind}.png", lambda p: fig.savefig(p, dpi=120, format="png"))
        plt.close(fig)


def curve(results, out):
    """curve.png: the relative change of Many, Medium and Few (of each of two classes) against the fraction, one panel a checkpoint."""
    fig, axes = plt.subplots(1, len(results), figsize=(4.2 * len(results), 3.4), constrained_layout=True, squeeze=False, sharey=True)
    for ax, (name, by_fraction) in zip(axes[0], results.items()):
        first = next(iter(by_fraction.values()))
        for group in first["splits"] or first["classes"]:
            values = [r["splits"][group]["relative"] if r["splits"] else r["classes"][group]["relative"][0] for r in by_fraction.values()]
            ax.plot([float(f) for f in by_fraction], [100 * v for v in values], "o-", label=group)
        ax.set(title=name, xlabel="weights set to zero")
        ax.set_xticks([float(f) for f in by_fraction], [f"{float(f):.0%}" for f in by_fraction])
        ax.legend(fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("relative loss change (%), mean over classes")
    runtime.write_atomic(out / "curve.png", lambda p: fig.savefig(p, dpi=120, format="png"))
    plt.close(fig)


def fractions_of(text):
    """A list of fractions in (0, 1) from "0.05,0.1"."""
    return [number(above=0, high=0.999)(word) for word in text.split(",")]


def main():
    """Measure every checkpoint at every fraction; write the numbers and the figures."""
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", nargs="+", required=True, help="checkpoints of one data set, side by side in the figures")
    parser.add_argument("--names", nargs="+", help="what to call them (default: their folders' names)")
    g = parser.add_argument_group("pruning")
    g.add_argument("--fraction", type=number(above=0, high=0.999), default=0.1, help="share of weights set to zero (default: 0.1)")
    g.add_argument("--fractions", type=fractions_of, metavar="F,F", help="several shares: also the curve; the bars show --fraction, "
                   "or the first where it is not among them")
    g.add_argument("--scope", choices=("global", "layer"), default="global", help="one threshold for all tensors, or one each")
    g.add_argument("--tensors", choices=("weights", "all"), default="weights", help="which take part: weights of convolutions and "
                   "linear layers, or also biases, norms and label embeddings (default: weights)")
    g = parser.add_argument_group("measurement")
    g.add_argument("--split", choices=("train", "test"), help="the set's images (default: the balanced reference, as evaluate.py)")
    g.add_argument("--repeats", type=integer(1), default=10, metavar="R", help="timesteps an image (default: 10)")
    g.add_argument("--data-dir", help="where data sets are (default: the checkpoint's)")
    g.add_argument("--weights", choices=("ema", "raw"), default="ema", help="default: ema")
    g.add_argument("--batch-size", type=integer(1), default=256, help="images at a time; changes nothing (default: 256)")
    parser.add_common("folder of probe.json and the figures (default: prune beside the first checkpoint)")
    args = parser.parse_args()
    start, ckpts = time.time(), [runtime.load(path, ["diffusion"]) for path in args.ckpt]
    rt = runtime.setup(args.device, dtype_of(args, ckpts[0]))
    names = args.names or [Path(path).parent.name for path in args.ckpt]
    if len(names) != len(ckpts) or len(set(names)) < len(names):
        names = [str(path) for path in args.ckpt] if args.names is None else names
    if len(set(names)) != len(ckpts):
        raise UserError(f"--names: give {len(ckpts)} different ones, one a checkpoint")
    data, config = ckpts[0]["data"], ckpts[0]["config"]
    if bad := [p for p, c in zip(args.ckpt, ckpts) if any(c["data"][k] != data[k] for k in ("dataset", "class_counts", "class_names", "resolution"))]:
        raise UserError(f"--ckpt {bad[0]}: trained on other data than {args.ckpt[0]}")
    where = (args.data_dir or config["data_dir"], args.split, data["resolution"], config["pack_dir"])
    images, words = load_reference(data["dataset"], *where)
    class_names, counts, pixels = data["class_names"], np.array(data["class_counts"]), images.images
    labels = to_classes(images.labels, images.class_names, class_names, "--data-dir")
    fractions, results = args.fractions or [args.fraction], {}
    out = Path(args.out or Path(args.ckpt[0]).parent / "prune")
    for name, ckpt in zip(names, ckpts):
        net = load_network(ckpt, args.weights, "full", rt.device)
        raw = losses(net, pixels, labels, args.repeats, rt, args.seed, args.batch_size, f"{name}: raw")
        results[name] = {}
        for fraction in fractions:
            pruned_net = copy.deepcopy(net)
            prune(pruned_net, fraction, args.scope, args.tensors)
            pruned = losses(pruned_net, pixels, labels, args.repeats, rt, args.seed, args.batch_size, f"{name}: {fraction:g} pruned")
            results[name][f"{fraction:g}"] = changes(raw, pruned, labels, class_names, counts)
    shown = args.fraction if args.fraction in fractions else fractions[0]
    figures({name: r[f"{shown:g}"] for name, r in results.items()}, shown, out)
    if len(fractions) > 1:
        curve(results, out)
    numel = sum(p.numel() for p in prunable(net, args.tensors).values())
    runtime.write_json(out / "probe.json", {
        "results": results, "settings": {"ckpt": [str(p) for p in args.ckpt], "images": f"{data['dataset']}, {words}", "num": len(labels),
                                         "repeats": args.repeats, "scope": args.scope, "tensors": args.tensors, "pruned_of": numel,
                                         "weights": args.weights, "seed": args.seed, "dtype": str(rt.dtype)},
        "seconds": round(time.time() - start, 1)})
    print(f"{data['dataset']}, {words}: {len(labels):,} images x {args.repeats} timesteps; {args.scope} threshold over {args.tensors} "
          f"({numel:,} numbers)")
    for name, by_fraction in results.items():
        for fraction, r in by_fraction.items():
            split = "  ".join(f"{s} {v['relative']:+.2%}" for s, v in r["splits"].items())
            rho = r["spearman"]["relative"]
            print(f"{name}, {float(fraction):.0%} pruned: relative loss change {split}  Spearman with class size {rho['rho']:+.2f} (p = {rho['p']:.2g})")
    print(f"wrote {out}: probe.json, relative.png, absolute.png, raw.png" + (", curve.png" if len(fractions) > 1 else ""))


if __name__ == "__main__":
    run(main)
