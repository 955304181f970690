"""Where the capacity of a trained network goes: the theorems' quantity on real gradients, and what the reserved part does.

    python capacity_probe.py dominance --ckpt out/NAME/ckpt.pt      # which class the update of each matrix points to
    python capacity_probe.py allocation --ckpt out/NAME/ckpt.pt     # size, rank and effect of BA; a CM checkpoint

dominance takes the gradient of the training loss (L_DDPM, and L_CM where the checkpoint has it) over the long-tailed set,
on fixed noise and timesteps, for class 1 (the largest), class K (the smallest), Many and Few, and asks of each parameter
matrix whose mean gradient the aggregated one points to: the question of Theorem 2.1. allocation measures ||BA|| / ||W||, the
effective rank of BA, and the distance of the two predictions inside Eq. (2) per split and timestep.
"""
import math
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from scipy.stats import norm

import runtime
from cm_layers import LowRank, general_only, reserved
from data import load, load_reference, long_tail, splits, to_classes, to_float
from losses import Objective, draw
from model import make_alphas_bar, q_sample
from prune_probe import timesteps_of
from runtime import Parser, UserError, integer, run
from sample import build_network, dtype_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt        # noqa: E402, after the backend is chosen


def unmerged(ckpt, weights, device):
    """The network of a checkpoint with W^g and BA apart (as it was trained), in eval mode."""
    net = build_network(ckpt["network"], ckpt["rank_ratio"], ckpt["experts"])
    net.load_state_dict(ckpt["ema" if weights == "ema" else "model"])
    return net.to(device, memory_format=torch.channels_last).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Dominance

def kind_of(name):
    """"W^g", "A" and "B" for a reserved weight's parts, "W" for a plain one; None for biases, norms and embeddings."""
    if name.endswith("parametrizations.weight.original"):
        return "W^g"
    return name[-1] if name.endswith((".A", ".B")) else "W"


def group_gradients(objective, images, rows, repeats, params, seed, batch_size):
    """Of the images in `rows`: the sum of their gradients, a list of tensors, and what estimates their spread.

    The spread is per matrix: the sum over batches of ||G_b||^2 / b, with G_b the sum over the b draws of a batch, from
    which `noise_of` gets sigma^2. Each image counts `repeats` times, with other noise and timesteps each time, and the
    draws are shuffled: a batch of one range of timesteps would have a mean of its own.
    """
    total, squares, batches = [torch.zeros_like(p) for p in params], torch.zeros(len(params), dtype=torch.float64), 0
    times = timesteps_of(len(images.labels), repeats)
    draws = np.random.RandomState(seed).permutation(len(rows) * repeats)
    for first in range(0, len(draws), batch_size):
        part, r = rows[draws[first:first + batch_size] // repeats], draws[first:first + batch_size] % repeats
        x_0 = to_float(torch.from_numpy(images.images[part])).to(params[0].device)
        y = torch.from_numpy(images.labels[part]).to(params[0].device)
        b = draw(x_0, y, objective, seed, int(rows[0]) * 100_003 + first)
        b = b._replace(t=times[part, r].to(y.device), y_in=y, masks_encode=[], masks_decode=[], masks_general=[])   # labels on, no dropout
        loss, _, _ = objective(b)
        gradients = torch.autograd.grad(loss * len(part), params, allow_unused=True)
        for k, g in enumerate(gradients):
            if g is not None:
                total[k] += g
                squares[k] += float(g.double().square().sum()) / len(part)
        batches += 1
    return total, squares, batches


def noise_of(total, squares, batches, n):
    """sigma^2 summed over a matrix's entries, from B batches of n images in all: (sum ||G_b||^2 / b - ||G||^2 / n) / (B - 1)."""
    if batches < 2:
        raise UserError("--repeats: the largest class makes one batch only, which says nothing of the spread; take more, or a smaller --batch-size")
    whole = torch.tensor([float(g.double().square().sum()) for g in total], dtype=torch.float64) / n
    return ((squares - whole) / (batches - 1)).clamp(min=0)


def compare(one, last, aggregate, n_1, n_K, sigma2, repeats):
    """For each matrix: whether the aggregate's angle to group 1's mean is smaller than to group K's, the cosine of the two
    means, and Theorem 2.1's probability from the same gradients, (M,) each.

    one, last: summed gradients of n_1 and n_K draws, `repeats` an image; sigma2: variance of one draw, summed over a
    matrix. What noise adds to the squared norms, s2 / n of each mean, is taken off mu^2 (the mean of the two norms squared)
    and off ||m_1 - m_K||^2 = 2 mu^2 (1 - cosine): in a class of a few images it is most of them.
    """
    points, cosines, theory = [], [], []
    for g_1, g_K, g, s2 in zip(one, last, aggregate, sigma2.tolist()):
        m_1, m_K, g = g_1.flatten().double() / n_1, g_K.flatten().double() / n_K, g.flatten().double()
        norm_1, norm_K = float(m_1.norm()), float(m_K.norm())
        if not (norm_1 and norm_K):
            continue
        points.append(float(g @ m_1) / norm_1 > float(g @ m_K) / norm_K)
        noise = s2 / n_1 + s2 / n_K
        mu2 = max(1e-30, (norm_1 ** 2 + norm_K ** 2 - noise) / 2)
        apart = max(0.0, float((m_1 - m_K).square().sum()) - noise)
        cosine = max(-1.0, 1 - apart / (2 * mu2))
        a, N, entries = n_1 / (n_1 + n_K), (n_1 + n_K) / repeats, g.numel()        # the theorem counts images
        argument = (2 * a - 1) * math.sqrt(N * apart) / (2 * math.sqrt(s2 / entries) + 1e-30)
        cosines.append(cosine)
        theory.append(float(norm.cdf(argument)))
    return np.array(points), np.array(cosines), np.array(theory)


def dominance(args, rt, ckpt, net):
    """Print and return, for each kind of matrix, the shares that point to class 1 and to Many, beside Theorem 2.1's."""
    config, data = ckpt["config"], ckpt["data"]
    images = load(data["dataset"], args.data_dir or config["data_dir"], "train", config["resolution"], config["class_order"], config["pack_dir"])
    if config["ir"] != 1:
        images = images.take(long_tail(images.labels, config["ir"], config["split_seed"]))
    if images.counts.tolist() != data["class_counts"]:
        raise UserError(f"--data-dir {args.data_dir or config['data_dir']}: not the images that {args.ckpt} was trained on")
    groups, order = splits(images.counts), np.argsort(-images.counts, kind="stable")
    objective = Objective(net, "ddpm", images.counts, make_alphas_bar(), config["lam"], config["w_con"], config["w_div"], config["div_bound"],
                          label_drop=0.0).to(rt.device)
    named = [(n, p) for n, p in net.named_parameters() if p.dim() > 1 and "embedding.label" not in n]
    names, params = zip(*named)
    members = {"class 1": [order[0]], "class K": [order[-1]]}
    if groups:
        members.update({"rest of Many": [c for c in groups["Many"] if c != order[0]], "Medium": groups["Medium"],
                        "rest of Few": [c for c in groups["Few"] if c != order[-1]]})
    sums, squares, batches, sizes = {}, {}, {}, {}
    for name, classes in runtime.progress(members.items(), desc="gradients", unit="group"):
        rows = np.flatnonzero(np.isin(images.labels, classes))
        sums[name], squares[name], batches[name] = group_gradients(objective, images, rows, args.repeats, params, args.seed, args.batch_size)
        sizes[name] = len(rows) * args.repeats

    def together(*parts):
        return [sum(gs) for gs in zip(*(sums[p] for p in parts))], sum(sizes[p] for p in parts)
    sigma2 = noise_of(sums["class 1"], squares["class 1"], batches["class 1"], sizes["class 1"])
    aggregate, _ = together(*members)
    pairs = {"class 1 against class K": (together("class 1"), together("class K"))}
    if groups:
        pairs["Many against Few"] = (together("class 1", "rest of Many"), together("class K", "rest of Few"))
    result = {}
    for words, ((one, n_1), (last, n_K)) in pairs.items():
        for kind in sorted({kind_of(name) for name in names}, key="W W^g B A".split().index):
            mine = [k for k, name in enumerate(names) if kind_of(name) == kind]
            part = [[gs[k] for k in mine] for gs in (one, last, aggregate)]
            points, cosines, theory = compare(*part, n_1, n_K, sigma2[mine], args.repeats)
            if len(points):
                result.setdefault(words, {})[kind] = {"matrices": len(points), "share": float(points.mean()), "cosine": float(cosines.mean()),
                                                      "theorem_2_1": float(theory.mean())}
    for words, kinds in result.items():
        for kind, r in kinds.items():
            print(f"{words}: {kind:<3} the aggregated gradient points to the larger in {r['share']:.1%} of {r['matrices']} matrices; "
                  f"Theorem 2.1 gives {r['theorem_2_1']:.1%}; mean cosine of the two means {r['cosine']:+.2f}")
    return {"pairs": result, "images": len(images.labels), "repeats": args.repeats}


# ----------------------------------------------------------------------------------------------------------------------
# Allocation

@torch.no_grad()
def layers_of(net):
    """Per reserved weight: its name, ||BA|| / ||W||, the rank reserved and the effective rank of BA (exp of its entropy)."""
    result = []
    names = {id(m): n for n, m in net.named_modules()}
    for owner, _, part in reserved(net.decoder):
        low, whole = part.B @ part.A, owner.weight
        s = torch.linalg.svdvals(low.double())
        p = (s / s.sum().clamp(min=1e-30)).clamp(min=1e-30)
        result.append({"layer": names[id(owner)], "ratio": float(low.norm() / whole.norm()), "rank": part.rank,
                       "effective_rank": float((-(p * p.log()).sum()).exp())})
    return result


@torch.no_grad()
def distances(net, images, labels, grid, rt, seed, batch_size):
    """D of Eq. (2), ||eps_theta - eps_theta_g||^2 / (C H W), for each image at each timestep of `grid`: (N, len(grid))."""
    alphas_bar, result = make_alphas_bar().to(rt.device), np.zeros((len(labels), len(grid)))
    for first in runtime.progress(range(0, len(labels), batch_size), desc="distances", unit="batch"):
        x_0 = to_float(torch.from_numpy(np.array(images[first:first + batch_size])).to(rt.device))
        y = torch.from_numpy(labels[first:first + batch_size]).to(rt.device)
        for k, step in enumerate(grid):
            eps = torch.randn(x_0.shape, generator=runtime.generator("cpu", seed, "allocation", first, k)).to(rt.device)
            t = torch.full_like(y, step)
            with rt.autocast():
                encoded = net.encode(q_sample(x_0, t, eps, alphas_bar), t, y)
                full = net.decode(*encoded).float()
                with general_only(net.decoder):
                    general = net.decode(*encoded).float()
            result[first:first + len(y), k] = (full - general).square().flatten(1).mean(1).cpu().numpy()
    return result


def allocation(args, rt, ckpt, net):
    """Print, draw and return what the reserved part is and does; args.quality: evaluate.py's JSON of theta and of theta^g."""
    if not any(isinstance(m, LowRank) for m in net.modules()):
        raise UserError(f"--ckpt {args.ckpt}: it has no reserved capacity; take one that was trained with --cm")
    config, data, out = ckpt["config"], ckpt["data"], Path(args.out)
    images, words = load_reference(data["dataset"], args.data_dir or config["data_dir"], None, data["resolution"], config["pack_dir"])
    labels = to_classes(images.labels, images.class_names, data["class_names"], "--data-dir")
    layers, grid = layers_of(net), [int(t) for t in np.linspace(0, 999, 11)]
    D = distances(net, images.images, labels, grid, rt, args.seed, args.batch_size)
    groups = splits(data["class_counts"]) or {n: [c] for c, n in enumerate(data["class_names"])}
    per_split = {name: D[np.isin(labels, classes)].mean(0).tolist() for name, classes in groups.items()}
    result = {"layers": layers, "timesteps": grid, "distance": per_split, "images": f"{data['dataset']}, {words}", "num": len(labels)}
    ratios, ranks = np.array([r["ratio"] for r in layers]), np.array([r["effective_rank"] / max(1, r["rank"]) for r in layers])
    print(f"{len(layers)} reserved weights: ||BA|| / ||W|| median {np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f}); "
          f"effective rank {np.median(ranks):.0%} of the reserved one")
    for name, values in per_split.items():
        print(f"{name:<7} D over {len(grid)} timesteps: mean {np.mean(values):.2e}; by timestep " + " ".join(f"{v:.1e}" for v in values))
    if args.quality:
        full, general = (runtime.read_json(p) for p in args.quality)
        if not (full and general and "splits" in full and "splits" in general):
            raise UserError("--quality: give evaluate.py's JSON of --branch full and of --branch general")
        key = "fid" if "fid" in full else "fd"
        result["quality"] = {s: {"theta": full["splits"][s][key], "theta_g": general["splits"][s][key]} for s in full["splits"]}
        print(f"{key.upper()} of theta_g / of theta: " + "  ".join(f"{s} {v['theta_g']:.2f} / {v['theta']:.2f} = {v['theta_g'] / v['theta']:.2f}"
                                                              for s, v in result["quality"].items()))
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    left.bar(range(len(layers)), ratios)
    left.set(xlabel="reserved weights, from the middle to the output", ylabel="||BA|| / ||W||", title="size of the reserved part")
    for name, values in per_split.items():
        right.plot(grid, values, "o-", label=name)
    right.set(xlabel="timestep t", ylabel="D between theta and theta_g", yscale="log", title="what it changes in the prediction")
    right.legend(fontsize=8)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    runtime.write_atomic(out / "allocation.png", lambda p: fig.savefig(p, dpi=120, format="png"))
    plt.close(fig)
    return result


def main():
    """Run one of the two probes and write its JSON."""
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("dominance", "allocation"), help="what to measure")
    parser.add_argument("--ckpt", required=True, help="a checkpoint of train.py")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="default: ema")
    parser.add_argument("--data-dir", help="where data sets are (default: the checkpoint's)")
    parser.add_argument("--repeats", type=integer(1), default=10, metavar="R", help="dominance: timesteps an image (default: 10)")
    parser.add_argument("--batch-size", type=integer(1), default=64, help="images at a time (default: 64)")
    parser.add_argument("--quality", nargs=2, metavar=("FULL", "GENERAL"), help="allocation: evaluate.py's JSON of either branch (Table 7)")
    parser.add_common("folder of dominance.json or allocation.json (default: probe beside the checkpoint)")
    args = parser.parse_args()
    start, ckpt = time.time(), runtime.load(args.ckpt, ["diffusion"])
    rt = runtime.setup(args.device, dtype_of(args, ckpt))
    args.out = args.out or str(Path(args.ckpt).parent / "probe")
    net = unmerged(ckpt, args.weights, rt.device)
    result = {"dominance": dominance, "allocation": allocation}[args.what](args, rt, ckpt, net)
    path = Path(args.out) / f"{args.what}.json"
    runtime.write_json(path, {**result, "ckpt": args.ckpt, "weights": args.weights, "seconds": round(time.time() - start, 1)})
    print(f"wrote {path}" + (" and allocation.png" if args.what == "allocation" else ""))


if __name__ == "__main__":
    run(main)
