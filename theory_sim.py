"""Simulate the gradient model behind Theorems 2.1, 3.1, F.1 and F.2 and lay it against each closed form.

    python theory_sim.py            # out/theory: table.md, theory.json, theory.png, theory.pdf; about ten seconds

The model (Assumption F.1): a sample of class y contributes g ~ N(mu_y, sigma^2 I) to the gradient of a weight matrix,
with ||mu_y|| = mu; the update points to class 1 rather than to class K where it has the larger product with mu_1
(Sec. F.2). Sums of N_y samples are drawn as one Gaussian N(N_y mu_y, N_y sigma^2 I), which is their law. For the
theorems with a low-rank part (Assumption F.2), the update is grad_g / ||E grad_g|| + alpha_r grad_e / ||E grad_e||, where
grad_e is the sum over class K, drawn once: its samples reach both W^g and W^e.
"""
import math
import time
from pathlib import Path

import matplotlib
import numpy as np
from scipy.stats import binomtest, norm

import runtime
from runtime import Parser, integer, run

matplotlib.use("Agg")
from matplotlib import pyplot as plt        # noqa: E402, after the backend is chosen
from matplotlib.ticker import NullFormatter, ScalarFormatter        # noqa: E402

DIMENSION = 32          # of a weight matrix; only the span of the means matters


# ----------------------------------------------------------------------------------------------------------------------
# Closed forms

def theorem_2_1(a, N, ratio, angle):
    """Pi_maj = Phi((2a - 1) sqrt(2N (1 - cos angle)) / (2 ratio)), Eq. (F.7): ratio = sigma / mu, angle in radians."""
    return norm.cdf((2 * a - 1) * math.sqrt(2 * N * (1 - math.cos(angle))) / (2 * ratio))


def theorem_3_1(alpha, N, ratio, angle):
    """The bound Phi((1 - alpha) sqrt(2N (1 - cos angle)) / (2 ratio)) of Theorem 3.1, and with class K's angle F.2's (F.17)."""
    return norm.cdf((1 - alpha) * math.sqrt(2 * N * (1 - math.cos(angle))) / (2 * ratio))


def exact_3_1(alpha, counts, means, sigma):
    """Pi of the model of Theorems 3.1 and F.2 itself, without their inequalities: counts (K,), means (K, D), sigma.

    Z = Delta W . (mu_1 - mu_K) is normal. With e = sum_k N_k mu_k and class K's samples in both parts,
    E Z = (e / ||e|| + alpha mu_K / mu) . (mu_1 - mu_K), and Var Z = sigma^2 ||mu_1 - mu_K||^2
    ((N - N_K) / ||e||^2 + N_K (1 / ||e|| + alpha / (N_K mu))^2).
    """
    e, last, mu = counts @ means, counts[-1], np.linalg.norm(means[0])
    size, difference = np.linalg.norm(e), means[0] - means[-1]
    mean = (e / size + alpha * means[-1] / mu) @ difference
    variance = sigma ** 2 * (difference @ difference) * (
        (counts.sum() - last) / size ** 2 + last * (1 / size + alpha / (last * mu)) ** 2)
    return norm.cdf(mean / math.sqrt(variance))


def theorem_f1(counts, means, sigma):
    """Pi of class K overwhelmed by class 1 with the cross term, Eq. (F.15): counts (K,), means (K, D), sigma."""
    mu, cosine, N = np.linalg.norm(means[0]), cos_1K(means), counts.sum()
    cross = (counts[1:-1] @ means[1:-1]) @ (means[0] - means[-1])
    return norm.cdf(((counts[0] - counts[-1]) * mu ** 2 * (1 - cosine) + cross)
                    / math.sqrt(2 * N * sigma ** 2 * mu ** 2 * (1 - cosine)))


def theorem_f1_simplified(counts, means, sigma):
    """The same without the cross term, Eq. (F.16)."""
    mu, cosine, N = np.linalg.norm(means[0]), cos_1K(means), counts.sum()
    return norm.cdf((counts[0] - counts[-1]) * mu * math.sqrt(1 - cosine) / (math.sqrt(2 * N) * sigma))


def cos_1K(means):
    """The cosine between the means of the first class and of the last."""
    return means[0] @ means[-1] / (np.linalg.norm(means[0]) * np.linalg.norm(means[-1]))


# ----------------------------------------------------------------------------------------------------------------------
# Simulation

def two_means(angle, mu=1.0):
    """Means (2, DIMENSION) of norm mu at an angle."""
    means = np.zeros((2, DIMENSION))
    means[0, 0], means[1, 0], means[1, 1] = mu, mu * math.cos(angle), mu * math.sin(angle)
    return means


def orthogonal_means(K, tilt=0.0):
    """Means (K, DIMENSION) of norm 1; the middle classes tilted by `tilt` radians from orthogonal towards mu_1 - mu_K."""
    means = np.eye(K, DIMENSION)
    direction = (means[0] - means[-1]) / math.sqrt(2)
    means[1:-1] = math.cos(tilt) * means[1:-1] + math.sin(tilt) * direction
    return means


def sums(counts, means, sigma, trials, rng, literal=False):
    """Sums of each class's gradients, (K, trials, DIMENSION): one Gaussian of N_k times the variance, or literally N_k draws."""
    result = []
    for n, mean in zip(counts, means):
        if literal:
            total = np.zeros((trials, DIMENSION))
            for _ in range(int(n)):
                total += mean + sigma * rng.standard_normal((trials, DIMENSION))
        else:
            total = n * mean + math.sqrt(n) * sigma * rng.standard_normal((trials, DIMENSION))
        result.append(total)
    return np.stack(result)


def simulate(counts, means, sigma, trials, rng, alpha=None, literal=False):
    """In how many of `trials` the update points to class 1 rather than to class K; alpha: with a low-rank part."""
    counts = np.asarray(counts, float)
    classes = sums(counts, means, sigma, trials, rng, literal)
    update = classes.sum(0)
    if alpha is not None:
        update = update / np.linalg.norm(counts @ means) + alpha * classes[-1] / np.linalg.norm(counts[-1] * means[-1])
    return int((update @ (means[0] - means[-1]) > 0).sum())


def point(sweep, x, hits, trials, **theory):
    """One row of the results: the simulated share with its exact 95 % binomial interval beside the closed forms."""
    interval = binomtest(hits, trials).proportion_ci(0.95, "exact")
    return {"sweep": sweep, "x": float(x), "simulated": hits / trials, "low": float(interval.low), "high": float(interval.high),
            "hits": hits, "trials": trials, **{k: float(v) for k, v in theory.items()}}


BASE = {"a": 0.7, "N": 100, "ratio": 3.0, "angle": math.pi / 2}
SWEEPS = {      # Theorem 2.1, one parameter at a time
    "a": ("majority ratio a", np.linspace(0.5, 0.95, 10)), "angle": ("angle (degrees)", np.linspace(10, 180, 10)),
    "ratio": ("sigma / mu", np.geomspace(1.3, 20, 10)), "N": ("samples N", np.geomspace(10, 600, 10).round())}
LONG_TAIL = np.array([50.0, 28, 12, 7, 3])


def results(trials, seed):
    """All points of all sweeps: a list of dicts of `point`, each with its closed form `theory` or its `bound`."""
    points, index = [], iter(range(10 ** 6))

    def rng():
        return np.random.default_rng([seed, next(index)])
    for name, (_, values) in SWEEPS.items():
        for x in values:
            s = {**BASE, name: math.radians(x) if name == "angle" else x}
            n_1 = round(s["a"] * s["N"])        # whole samples, and a as they give it
            counts, means = [n_1, s["N"] - n_1], two_means(s["angle"])
            theory = theorem_2_1(n_1 / s["N"], s["N"], s["ratio"], s["angle"])
            points.append(point(f"Theorem 2.1: {name}", x, simulate(counts, means, s["ratio"], trials, rng()), trials, theory=theory))
    for name, values, setting in (("alpha_r", np.linspace(0, 1, 11), lambda x: (x, 10)),
                                  ("N_2 at alpha_r = 0.3", np.array([1, 2, 5, 10, 20, 30, 40, 45, 49, 50]), lambda x: (0.3, x)),
                                  ("N_2 at alpha_r = 1", np.array([1, 5, 10, 20, 30, 40, 45, 50]), lambda x: (1.0, x))):
        for x in values:
            alpha, n_2 = setting(x)
            counts, means = np.array([100.0 - n_2, n_2]), two_means(math.pi / 2)
            points.append(point(f"Theorem 3.1: {name}", x, simulate(counts, means, 8.0, trials, rng(), alpha), trials,
                                theory=exact_3_1(alpha, counts, means, 8.0), bound=theorem_3_1(alpha, 100, 8.0, math.pi / 2)))
    for x in np.linspace(-75, 75, 11):
        means = orthogonal_means(5, math.radians(x))
        points.append(point("Theorem F.1: tilt of the middle classes (degrees)", x, simulate(LONG_TAIL, means, 4.0, trials, rng()), trials,
                            theory=theorem_f1(LONG_TAIL, means, 4.0), simplified=theorem_f1_simplified(LONG_TAIL, means, 4.0)))
    for name, tilt in (("orthogonal", 0), ("tilted by 75 degrees", 75)):
        means = orthogonal_means(5, math.radians(tilt))
        for x in np.linspace(0, 1, 11):
            points.append(point(f"Theorem F.2: alpha_r, middle classes {name}", x, simulate(LONG_TAIL, means, 8.0, trials, rng(), x),
                                trials, theory=exact_3_1(x, LONG_TAIL, means, 8.0), bound=theorem_3_1(x, 100, 8.0, math.pi / 2)))
    return points


def violations(points):
    """Points of Theorems 3.1 and F.2 whose simulated share lies above the bound, the interval's low end included."""
    return [p for p in points if "bound" in p and p["low"] > p["bound"]]


# ----------------------------------------------------------------------------------------------------------------------
# Output

def table(points):
    """Markdown: one line a point."""
    lines = ["| sweep | x | closed form | simplified / bound | simulated | 95 % interval |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    for p in points:
        other = p.get("bound", p.get("simplified"))
        lines.append(f"| {p['sweep']} | {p['x']:.4g} | {p['theory']:.4f} | {'' if other is None else f'{other:.4f}'} | "
                     f"{p['simulated']:.4f} | {p['low']:.4f} to {p['high']:.4f} |")
    return "\n".join(lines)


def figure(points, path):
    """One panel a sweep: closed forms and bounds as lines, the simulation as points with intervals; PNG and PDF."""
    sweeps = list(dict.fromkeys(p["sweep"] for p in points))
    columns = 5
    fig, axes = plt.subplots(-(-len(sweeps) // columns), columns, figsize=(3.5 * columns, 6.4), constrained_layout=True, sharey=True)
    for ax, sweep in zip(axes.flat, sweeps):
        part = [p for p in points if p["sweep"] == sweep]
        x, y = [p["x"] for p in part], np.array([p["simulated"] for p in part])
        ax.plot(x, [p["theory"] for p in part], color="tab:blue", label="closed form")
        if "bound" in part[0]:
            ax.plot(x, [p["bound"] for p in part], color="tab:red", linestyle="--", label="bound, as printed")
        if "simplified" in part[0]:
            ax.plot(x, [p["simplified"] for p in part], color="tab:orange", linestyle="--", label="simplified, (F.16)")
        ax.errorbar(x, y, [y - [p["low"] for p in part], [p["high"] for p in part] - y], fmt="k.", capsize=2, label="simulation")
        theorem, _, name = sweep.partition(": ")
        ax.set(title=theorem, xlabel=SWEEPS.get(name, (name,))[0], ylim=(-0.03, 1.03))
        if name in ("ratio", "N"):
            ax.set_xscale("log")
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.legend(fontsize=7, loc="lower left")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[len(sweeps):]:
        ax.remove()
    fig.supylabel("share of matrices that class 1 dominates")
    for suffix in ("png", "pdf"):
        runtime.write_atomic(path.with_suffix("." + suffix), lambda p: fig.savefig(p, dpi=110, format=suffix))
    plt.close(fig)


def main():
    """Simulate every point; write the table, the figure and the JSON."""
    parser = Parser(__doc__)
    parser.add_argument("--trials", type=integer(100), default=20_000, help="weight matrices a point (default: 20,000)")
    parser.add_argument("--seed", type=integer(0), default=0, help="everything random follows from it (default: 0)")
    parser.add_argument("--out", default="out/theory", help="folder of the results (default: out/theory)")
    args = parser.parse_args()
    start, out = time.time(), Path(args.out)
    points = results(args.trials, args.seed)
    text = table(points)
    figure(points, out / "theory.png")
    runtime.write_atomic(out / "table.md", lambda p: p.write_text(text + "\n"))
    runtime.write_json(out / "theory.json", {"settings": {"trials": args.trials, "seed": args.seed}, "points": points})
    print(text)
    gap = max(abs(p["simulated"] - p["theory"]) for p in points)
    print(f"\n{len(points)} points, largest gap between closed form and simulation {gap:.4f}; {time.time() - start:.0f} s")
    above = violations(points)
    print(f"points above the printed bound: {len(above)} of {sum('bound' in p for p in points)}" + "".join(
        f"\n  {p['sweep']}, {p['x']:.2g}: {p['simulated']:.3f} > {p['bound']:.3f}" for p in above))
    print(f"wrote {out}: table.md, theory.json, theory.png, theory.pdf")


if __name__ == "__main__":
    run(main)
