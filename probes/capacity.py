"""Where the capacity of a trained network goes: dominance of its gradients, allocation of its BA.

    python -m probes.capacity dominance --ckpt out/NAME/ckpt.pt      # with or without CM
    python -m probes.capacity allocation --ckpt out/NAME/ckpt.pt     # with CM

dominance tests Theorem 2.1 on real gradients: to which class's mean gradient does the aggregated
gradient of each parameter matrix point? It takes the gradient of L_DDPM (whatever base the
checkpoint was trained with), and of L_CM where it has it, over the long-tailed set, on fixed noise
and timesteps, for class 1 (the largest), class K (the smallest), Many and Few.

allocation measures the size of the reserved part, ||BA|| / ||W||, the effective rank of BA, and the
distance of the two predictions inside Eq. (2), per group and timestep.
"""
import math
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import norm

import disk
import runtime
from cm_layers import general_only, is_reserved, reserved
from data import class_groups, reference_images, to_float, training_images
from losses import CMConfig, Masks, Objective, bind
from model import distance, make_alphas_bar, q_sample, signal_and_sigma, stratified_timesteps
from networks import load_unmerged
from runtime import Parser, UserError, integer, run
from sample import dtype_of

KINDS = ("W", "W^g", "B", "A")      # of parameter matrices, in the order of the output
GRID = [int(t) for t in np.linspace(0, 999, 11)]        # the timesteps of allocation


# --------------------------------------------------------------------------------------------------
# Dominance: gradients

class Gradients(NamedTuple):
    """Gradients of the training loss over n examples, for each of M parameter matrices.

    An example is an image with a timestep and noise. G_b is the sum of the b gradients of a batch.
    """
    sums: list              # M tensors: the sum of all examples' gradients
    n: int
    squares: torch.Tensor   # (M,) float64: the sum over batches of ||G_b||^2 / b
    batches: int            # their number


def kind_of(name):
    """The kind of a parameter: W^g, A and B are parts of a reserved weight, W is a plain weight."""
    if name.endswith("parametrizations.weight.original"):
        return "W^g"
    return name[-1] if name.endswith((".A", ".B")) else "W"


def group_gradients(objective, images, rows, repeats, params, seed, batch_size):
    """The Gradients of the images in `rows`, with respect to `params`.

    Each image makes `repeats` examples, with other noise and another timestep each. The examples
    are shuffled: a batch from one range of timesteps would have a mean of its own.
    """
    device = params[0].device
    sums = [torch.zeros_like(p) for p in params]
    squares = torch.zeros(len(params), dtype=torch.float64)
    times = stratified_timesteps(len(images.labels), repeats)
    examples = np.random.RandomState(seed).permutation(len(rows) * repeats)
    firsts = range(0, len(examples), batch_size)
    for first in firsts:
        part = examples[first:first + batch_size]
        which = rows[part // repeats]
        x_0 = to_float(torch.from_numpy(images.images[which])).to(device)
        y = torch.from_numpy(images.labels[which]).to(device)
        t = times[which, part % repeats].to(device)
        step = int(rows[0]) * 100_003 + first           # another one for each group and batch
        batch = objective.draw_batch(x_0, y, seed=seed, step=step)
        # Fixed timesteps, all labels given, no dropout
        batch = batch._replace(t=t, y_cond=y, masks=Masks([], [], []))
        loss, _, _ = objective(batch)
        gradients = torch.autograd.grad(loss * len(which), params, allow_unused=True)
        for k, g in enumerate(gradients):
            if g is not None:
                sums[k] += g
                squares[k] += float(g.double().square().sum()) / len(which)
    return Gradients(sums, len(examples), squares, len(firsts))


def objective_of(ckpt, net, counts):
    """The Objective of a run as its gradients are taken: of whole batches, all labels given.

    With --cm-fraction below 1 draw_batch would give the images in another order than their labels.
    """
    cm = CMConfig.of(Namespace(**ckpt["config"]))._replace(cm_fraction=1.0)
    return Objective(net=net, base=bind("ddpm"), counts=counts, alphas_bar=make_alphas_bar(),
                     label_drop=0.0, cm=cm)


def together(groups):
    """The sums and the number of examples of several Gradients: (M tensors, n)."""
    sums = [sum(parts) for parts in zip(*(g.sums for g in groups))]
    return sums, sum(g.n for g in groups)


def noise_of(gradients):
    """sigma^2, the variance of one example's gradient, summed over each matrix's entries: (M,).

    It is (sum_b ||G_b||^2 / b - ||G||^2 / n) / (B - 1), from B batches of n examples in all, whose
    sum is G. Raises UserError where there is one batch only.
    """
    if gradients.batches < 2:
        raise UserError("--repeats: the largest class makes one batch only, which says nothing "
                        "about the variance; use more repeats, or a smaller --batch-size")
    norms = [float(g.double().square().sum()) for g in gradients.sums]
    whole = torch.tensor(norms, dtype=torch.float64) / gradients.n
    return ((gradients.squares - whole) / (gradients.batches - 1)).clamp(min=0)


# --------------------------------------------------------------------------------------------------
# Dominance: what Theorem 2.1 is about

def compare(one, last, aggregate, n_1, n_K, s2, repeats):
    """Whether the aggregated gradient of one matrix points to group 1 rather than to group K.

    Returns (whether it does, the cosine of the two groups' means, Theorem 2.1's probability that it
    does, from the same gradients); None where a mean is zero.

    one, last:  the groups' summed gradients, of n_1 and n_K examples, `repeats` of them per image
    aggregate:  the summed gradient of all groups; it points to the mean with the smaller angle
    s2:         the variance of one example, summed over the matrix
    In a class of a few images, noise is most of the squared norm of its mean. So what noise adds,
    s2 / n of each mean, is subtracted from mu^2 (the mean of the two squared norms) and from
    ||m_1 - m_K||^2 = 2 mu^2 (1 - cosine).
    """
    m_1, m_K = one.flatten().double() / n_1, last.flatten().double() / n_K
    g = aggregate.flatten().double()
    norm_1, norm_K = float(m_1.norm()), float(m_K.norm())
    if norm_1 == 0 or norm_K == 0:
        return None
    points = float(g @ m_1) / norm_1 > float(g @ m_K) / norm_K
    noise = s2 / n_1 + s2 / n_K
    mu2 = max(1e-30, (norm_1 ** 2 + norm_K ** 2 - noise) / 2)
    apart = max(0.0, float((m_1 - m_K).square().sum()) - noise)
    cosine = max(-1.0, 1 - apart / (2 * mu2))
    a = n_1 / (n_1 + n_K)
    N = (n_1 + n_K) / repeats                           # the theorem counts images
    sigma = math.sqrt(s2 / g.numel())                   # of one entry
    theory = norm.cdf((2 * a - 1) * math.sqrt(N * apart) / (2 * sigma + 1e-30))
    return points, cosine, float(theory)


def compare_kinds(names, one, last, aggregate, sigma2, repeats):
    """{kind of matrix: the means of what `compare` gives over all matrices of this kind}.

    names: of the M matrices. one, last: (M tensors, n), as `together` returns them. sigma2 (M,).
    """
    found = {kind: [] for kind in KINDS}
    (sums_1, n_1), (sums_K, n_K) = one, last
    for name, m_1, m_K, g, s2 in zip(names, sums_1, sums_K, aggregate, sigma2.tolist()):
        compared = compare(m_1, m_K, g, n_1, n_K, s2, repeats)
        if compared is not None:
            found[kind_of(name)].append(compared)
    result = {}
    for kind, rows in found.items():
        if rows:
            share, cosine, theory = (float(np.mean(column)) for column in zip(*rows))
            result[kind] = {"matrices": len(rows), "share": share, "cosine": cosine,
                            "theorem_2_1": theory}
    return result


def members_of(counts):
    """{name: classes} of the disjoint groups whose gradients are taken.

    Class 1 and class K, and where there are Many, Medium and Few, what remains of them.
    """
    first, *_, last = np.argsort(-counts, kind="stable")
    members = {"class 1": [first], "class K": [last]}
    if groups := class_groups(counts):
        members["rest of Many"] = [c for c in groups["Many"] if c != first]
        members["Medium"] = groups["Medium"]
        members["rest of Few"] = [c for c in groups["Few"] if c != last]
    return members


def dominance(args, rt, ckpt, net):
    """Per pair of groups and kind of matrix: the share that points to the larger group.

    Prints and returns it, the content of dominance.json. Each share comes with Theorem 2.1's
    probability. Raises UserError for group experts, whose matrices are of none of KINDS.
    """
    if ckpt["experts"]:
        raise UserError(f"--ckpt {args.ckpt}: its gradients are also of group experts; use one "
                        "that was trained without --experts")
    images = training_images(ckpt, args.data_dir)
    print(images.table())
    objective = objective_of(ckpt, net, images.counts).to(rt.device)
    matrices = {name: p for name, p in net.named_parameters()
                if p.dim() > 1 and "embedding.label" not in name}
    found = {}
    members = members_of(images.counts)
    for name, classes in runtime.progress(members.items(), desc="gradients", unit="group"):
        rows = np.flatnonzero(np.isin(images.labels, classes))
        found[name] = group_gradients(objective, images, rows, args.repeats,
                                      list(matrices.values()), args.seed, args.batch_size)

    sigma2 = noise_of(found["class 1"])
    aggregate, _ = together(found.values())
    sides = {"class 1 against class K": (["class 1"], ["class K"])}
    if "Medium" in members:
        sides["Many against Few"] = (["class 1", "rest of Many"], ["class K", "rest of Few"])
    pairs = {}
    for words, (larger, smaller) in sides.items():
        one, last = (together([found[name] for name in side]) for side in (larger, smaller))
        pairs[words] = compare_kinds(list(matrices), one, last, aggregate, sigma2, args.repeats)
        for kind, r in pairs[words].items():
            print(f"{words}: {kind:<3} {r['share']:.1%} of {r['matrices']} aggregated gradients "
                  f"point to the larger; Theorem 2.1 gives {r['theorem_2_1']:.1%}; mean cosine of "
                  f"the two means {r['cosine']:+.2f}")
    return {"pairs": pairs, "images": len(images.labels), "repeats": args.repeats}


# --------------------------------------------------------------------------------------------------
# Allocation

@torch.no_grad()
def layers_of(net):
    """Per reserved weight: its layer, ||BA|| / ||W||, the rank r, and the effective rank of BA.

    The effective rank is exp of the entropy of BA's singular values, divided by their sum.
    """
    result = []
    names = {id(module): name for name, module in net.named_modules()}
    for owner, _, part in reserved(net.decoder):
        low = part.B @ part.A
        s = torch.linalg.svdvals(low.double())
        p = (s / s.sum().clamp(min=1e-30)).clamp(min=1e-30)
        entropy = -(p * p.log()).sum()
        result.append({"layer": names[id(owner)], "ratio": float(low.norm() / owner.weight.norm()),
                       "rank": part.rank, "effective_rank": float(entropy.exp())})
    return result


@torch.no_grad()
def distances(net, images, labels, grid, rt, seed, batch_size):
    """D of Eq. (2) per image at each timestep of `grid`: (N, len(grid)) float64.

    D = ||eps_theta - eps_theta_g||^2 / (C H W). images (N, H, W, C) uint8, labels (N,).
    """
    roots = [values.to(rt.device) for values in signal_and_sigma(make_alphas_bar())]
    result = np.zeros((len(labels), len(grid)))
    firsts = range(0, len(labels), batch_size)
    for first in runtime.progress(firsts, desc="distances", unit="batch"):
        rows = slice(first, first + batch_size)
        x_0 = to_float(torch.from_numpy(np.array(images[rows])).to(rt.device))
        y = torch.from_numpy(labels[rows]).to(rt.device)
        for k, step in enumerate(grid):
            g = runtime.generator("cpu", seed, "allocation", first, k)
            eps = torch.randn(x_0.shape, generator=g).to(rt.device)
            t = torch.full_like(y, step)
            with rt.autocast():
                encoded = net.encode(q_sample(x_0, t, eps, *roots), t, y)
                full = net.decode(*encoded).float()
                with general_only(net.decoder):
                    general = net.decode(*encoded).float()
            result[rows, k] = distance(full, general).cpu().numpy()
    return result


def allocation(args, rt, ckpt, net):
    """What the reserved part is (per layer) and does (D per group and timestep).

    Prints and returns it, the content of allocation.json; a checkpoint without groups gets D per
    class. Raises UserError where nothing is reserved.
    """
    if not is_reserved(net):
        raise UserError(f"--ckpt {args.ckpt}: it has no reserved capacity; use one that was "
                        "trained with --cm")
    data = ckpt["data"]
    images, labels, words = reference_images(ckpt, args.data_dir)
    D = distances(net, images.images, labels, GRID, rt, args.seed, args.batch_size)
    groups = (class_groups(data["class_counts"])
              or {name: [c] for c, name in enumerate(data["class_names"])})
    per_group = {name: D[np.isin(labels, classes)].mean(0).tolist()
                 for name, classes in groups.items()}
    layers = layers_of(net)
    ratios = np.array([r["ratio"] for r in layers])
    ranks = np.array([r["effective_rank"] / r["rank"] for r in layers])
    print(f"{len(layers)} reserved weights: ||BA|| / ||W|| median {np.median(ratios):.3f} "
          f"({ratios.min():.3f} to {ratios.max():.3f}); effective rank {np.median(ranks):.0%} of "
          "the reserved one")
    for name, values in per_group.items():
        by_timestep = " ".join(f"{v:.1e}" for v in values)
        print(f"{name:<7} D: mean {np.mean(values):.2e}; by timestep {by_timestep}")
    return {"layers": layers, "timesteps": GRID, "distance": per_group, "images": words,
            "images_sha256": images.sha256, "num": len(labels)}


def read_quality(paths, ckpt):
    """(metric, {group: its Frechet distance with theta and with theta_g}): the two of Table 7.

    paths: evaluate.py's JSON of --branch full, and of --branch general; both of this Checkpoint,
    and measured alike. Raises UserError.
    """
    full, general = results = [disk.read_json(path) or {} for path in paths]
    settings = [result.get("settings", {}) for result in results]
    own = {"branch", "ckpt", "samples", "samples_sha256", "command"}
    a, b = ({name: value for name, value in s.items() if name not in own} for s in settings)
    if ([s.get("branch") for s in settings] != ["full", "general"] or a != b
            or a["ckpt_sha256"] != ckpt.sha256):
        raise UserError("--quality: give evaluate.py's JSON of --branch full, then of --branch "
                        "general, both of --ckpt and otherwise with the same settings")
    key = "fid" if "fid" in full else "fd"
    quality = {name: {"theta": part[key], "theta_g": general["groups"][name][key]}
               for name, part in full["groups"].items()}
    return key, quality


def allocation_figure(result, path, bound=0):
    """Left: the size of each reserved part. Right: D per group over the timesteps.

    bound: --div-bound of the run, shown as a line; 0 for none.
    """
    names = [r["layer"].removeprefix("decoder.") for r in result["layers"]]
    size = (9, max(3.8, 0.17 * len(names) + 1))
    fig, (left, right) = disk.pyplot().subplots(1, 2, figsize=size, constrained_layout=True)
    left.barh(range(len(names)), [r["ratio"] for r in result["layers"]])
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.invert_yaxis()                 # from the middle of the network down to its output
    left.set(xlabel="||BA|| / ||W||, 0 before training", title="size of the reserved parts")
    if bound:
        right.axhline(bound, color="black", linestyle=":", label=f"bound of L_Div, {bound:g}")
    for name, values in result["distance"].items():
        right.plot(result["timesteps"], values, "o-", label=name)
    right.set(xlabel="timestep t", ylabel="D, 0 before training", yscale="log",
              title="what they change in the prediction")
    right.legend(fontsize=8)
    disk.save_figure(fig, path)


# --------------------------------------------------------------------------------------------------

def make_parser():
    """All flags."""
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("dominance", "allocation"), help="what to measure")
    parser.add_argument("--ckpt", required=True, help="a checkpoint of train.py")
    parser.add_argument("--data-dir", help="where data sets are (default: the checkpoint's)")
    parser.add_argument("--repeats", type=integer(1), default=10, metavar="R",
                        help="dominance: timesteps per image (default: 10)")
    parser.add_argument("--batch-size", type=integer(1), default=64,
                        help="images at a time (default: 64)")
    parser.add_argument("--quality", nargs=2, metavar=("FULL", "GENERAL"),
                        help="allocation: evaluate.py's JSON of each branch (Table 7)")
    parser.add_argument("--if-needed", action="store_true",
                        help="do nothing where --out was made with these settings already")
    parser.add_common("folder of dominance.json or allocation.json (default: probe beside the "
                      "checkpoint)")
    return parser


def main():
    """Run one of the two probes; print and write what it found."""
    parser = make_parser()
    args = parser.parse_args()
    other = {"dominance": "quality", "allocation": "repeats"}[args.what]
    runtime.refuse_unused(parser.given, {other: f"{args.what} does not use it"})
    out = Path(args.out or Path(args.ckpt).parent / "probe")

    # What is measured
    ckpt = disk.load(args.ckpt, ["diffusion"])
    metric, quality = read_quality(args.quality, ckpt) if args.quality else ("", {})
    written = out / f"{args.what}.json"
    disk.check_writable(written)
    rt = runtime.setup(args.device, dtype_of(args, ckpt))
    settings = {"ckpt_sha256": ckpt.sha256, "repeats": args.repeats,
                "quality_sha256": [disk.sha256(path) for path in args.quality or []],
                "seed": args.seed, "batch_size": args.batch_size, "dtype": rt.dtype_name()}
    if args.if_needed and disk.up_to_date(written, settings):
        print(f"{written}: up to date")
        return
    net = load_unmerged(ckpt, device=rt.device).eval()

    # Measure, print and write; the JSON last, since it says that all is there
    if args.what == "dominance":
        result = dominance(args, rt, ckpt, net)
    else:
        result = allocation(args, rt, ckpt, net)
        result["quality"] = quality
        for name, v in quality.items():
            print(f"{metric.upper()} of theta_g / of theta: {name} {v['theta_g']:.2f} / "
                  f"{v['theta']:.2f} = {v['theta_g'] / v['theta']:.2f}")
        allocation_figure(result, out / "allocation.png", ckpt["config"].get("div_bound"))
    disk.write_json(written, {**result, "ckpt": args.ckpt, "settings": settings})
    print(f"wrote {written}")


if __name__ == "__main__":
    run(main)
