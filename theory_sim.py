"""Simulate the gradient model of Theorems 2.1, 3.1, F.1, F.2; compare it with the closed forms.

    python theory_sim.py        # out/theory: table.md, theory.json and two figures; ten seconds

The model (Assumption F.1): a sample of class y contributes g ~ N(mu_y, sigma^2 I) to the gradient
of a weight matrix, with ||mu_y|| = mu. The update points to class 1 rather than to class K where
its product with mu_1 is larger than that with mu_K (Sec. F.2). The sum over N_y samples is drawn as
one Gaussian N(N_y mu_y, N_y sigma^2 I), which is its distribution.

For the theorems with a low-rank part (Assumption F.2), the update is
grad_g / ||E grad_g|| + alpha_r grad_e / ||E grad_e||. Here grad_e is the sum over class K. It is
drawn once and used in both parts, because the samples of class K reach both W^g and W^e.
"""
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, norm

import disk
from runtime import Parser, integer, run

DIMENSION = 32          # of a weight matrix; only the span of the means matters


# --------------------------------------------------------------------------------------------------
# Closed forms

def theorem_2_1(a, N, ratio, angle):
    """Pi_maj = Phi((2a - 1) sqrt(2N (1 - cos angle)) / (2 ratio)), Eq. (F.7).

    ratio = sigma / mu, angle in radians.
    """
    return norm.cdf((2 * a - 1) * math.sqrt(2 * N * (1 - math.cos(angle))) / (2 * ratio))


def theorem_3_1(alpha, N, ratio, angle):
    """The bound of Theorem 3.1, Phi((1 - alpha) sqrt(2N (1 - cos angle)) / (2 ratio)).

    With the angle between the means of classes 1 and K it is the bound of Theorem F.2, Eq. (F.17).
    """
    return norm.cdf((1 - alpha) * math.sqrt(2 * N * (1 - math.cos(angle))) / (2 * ratio))


def line_of_f14(alpha, N, N_2, ratio, angle):
    """The last line but one of Eq. (F.14), a tighter bound than Theorem 3.1's, with N_2 in it.

    Phi((1 - alpha) sqrt(1 - cos angle) / (ratio sqrt(2 (1 / N + alpha^2 / N_2)))); at alpha = 0 it
    is the printed bound. For Theorem F.2, whose proof is not printed, N_2 is N_K.
    """
    spread = ratio * math.sqrt(2 * (1 / N + alpha ** 2 / N_2))
    return norm.cdf((1 - alpha) * math.sqrt(1 - math.cos(angle)) / spread)


def exact_3_1(alpha, counts, means, sigma):
    """Pi of the model of Theorems 3.1 and F.2, without the inequalities in their proofs.

    counts (K,), means (K, D). Z = Delta W . (mu_1 - mu_K) is normal. With e = sum_k N_k mu_k and
    the samples of class K in both parts,
        E Z = (e / ||e|| + alpha mu_K / mu) . (mu_1 - mu_K),
        Var Z = sigma^2 ||mu_1 - mu_K||^2
                ((N - N_K) / ||e||^2 + N_K (1 / ||e|| + alpha / (N_K mu))^2).
    """
    e = counts @ means
    e_norm = np.linalg.norm(e)
    mu = np.linalg.norm(means[0])
    N_K = counts[-1]
    difference = means[0] - means[-1]
    mean = (e / e_norm + alpha * means[-1] / mu) @ difference
    other_classes = (counts.sum() - N_K) / e_norm ** 2
    class_K = N_K * (1 / e_norm + alpha / (N_K * mu)) ** 2
    variance = sigma ** 2 * (difference @ difference) * (other_classes + class_K)
    return norm.cdf(mean / math.sqrt(variance))


def theorem_f1(counts, means, sigma):
    """Pi that class 1 dominates class K, with the cross term, Eq. (F.15).

    counts (K,), means (K, D).
    """
    mu = np.linalg.norm(means[0])
    cosine = cos_1K(means)
    own = (counts[0] - counts[-1]) * mu ** 2 * (1 - cosine)
    cross = (counts[1:-1] @ means[1:-1]) @ (means[0] - means[-1])
    variance = 2 * counts.sum() * sigma ** 2 * mu ** 2 * (1 - cosine)
    return norm.cdf((own + cross) / math.sqrt(variance))


def theorem_f1_simplified(counts, means, sigma):
    """The same without the cross term, Eq. (F.16)."""
    mu = np.linalg.norm(means[0])
    numerator = (counts[0] - counts[-1]) * mu * math.sqrt(1 - cos_1K(means))
    return norm.cdf(numerator / (math.sqrt(2 * counts.sum()) * sigma))


def cos_1K(means):
    """The cosine of the angle between the means of the first and of the last class."""
    return means[0] @ means[-1] / (np.linalg.norm(means[0]) * np.linalg.norm(means[-1]))


# --------------------------------------------------------------------------------------------------
# Simulation

def two_means(angle):
    """Two means (2, DIMENSION) of norm 1 with this angle between them."""
    means = np.zeros((2, DIMENSION))
    means[0, 0] = 1
    means[1, :2] = math.cos(angle), math.sin(angle)
    return means


def orthogonal_means(K, tilt=0.0):
    """Means (K, DIMENSION) of norm 1, orthogonal to each other where tilt is 0.

    tilt: the angle in radians by which the means of the middle classes are turned from there
    towards mu_1 - mu_K.
    """
    means = np.eye(K, DIMENSION)
    direction = (means[0] - means[-1]) / math.sqrt(2)
    means[1:-1] = math.cos(tilt) * means[1:-1] + math.sin(tilt) * direction
    return means


def sums(counts, means, sigma, trials, rng):
    """The sum of each class's gradients, (K, trials, DIMENSION): one Gaussian for each sum."""
    return np.stack([n * mean + math.sqrt(n) * sigma * rng.standard_normal((trials, DIMENSION))
                     for n, mean in zip(counts, means)])


def simulate(counts, means, sigma, trials, rng, alpha=None):
    """In how many of `trials` the update points to class 1 rather than to class K.

    alpha: the strength alpha_r of the low-rank part; None leaves that part out.
    """
    classes = sums(counts, means, sigma, trials, rng)
    update = classes.sum(0)
    if alpha is not None:
        general = update / np.linalg.norm(counts @ means)
        update = general + alpha * classes[-1] / np.linalg.norm(counts[-1] * means[-1])
    return int((update @ (means[0] - means[-1]) > 0).sum())


# --------------------------------------------------------------------------------------------------
# The sweeps: one parameter varies, the others stay at their default

class Case(NamedTuple):
    """One setting of the model, with what the theorem says about it."""
    sweep: str                  # "Theorem T: the parameter that varies"
    x: float                    # that parameter's value
    counts: np.ndarray          # (K,)
    means: np.ndarray           # (K, DIMENSION)
    sigma: float
    closed_forms: dict          # "theory", the exact value; "bound" and "tighter", or "simplified"
    alpha: float | None = None  # of the low-rank part, where there is one


BASE = {"a": 0.7, "N": 100, "ratio": 3.0, "angle": math.pi / 2}
SWEEPS = {      # Theorem 2.1. name: (label, values)
    "a": ("majority ratio a", np.linspace(0.5, 0.95, 10)),
    "angle": ("angle (degrees)", np.linspace(10, 180, 10)),
    "ratio": ("sigma / mu", np.geomspace(1.3, 20, 10)),
    "N": ("samples N", np.geomspace(10, 600, 10).round()),
}
MINORITY_SIZES = {      # Theorem 3.1. alpha_r: values of N_2, of 100 samples in all
    0.3: [1, 2, 5, 10, 20, 30, 40, 45, 49, 50],
    1.0: [1, 5, 10, 20, 30, 40, 45, 50],
}
LONG_TAIL = np.array([50.0, 28, 12, 7, 3])      # class sizes in Theorems F.1 and F.2


def cases_2_1():
    """Theorem 2.1: two classes, no low-rank part."""
    for name, (_, values) in SWEEPS.items():
        for x in values:
            a, N, ratio, angle = {**BASE, name: math.radians(x) if name == "angle" else x}.values()
            n_1 = round(a * N)                  # whole samples, and a is the share that they make
            theory = theorem_2_1(n_1 / N, N, ratio, angle)
            counts = np.array([n_1, N - n_1])
            yield Case(f"Theorem 2.1: {name}", x, counts, two_means(angle), ratio,
                       {"theory": theory})


def case_with_bound(sweep, x, counts, means, alpha):
    """A case of Theorem 3.1 or F.2: 100 samples, mu_1 and mu_K orthogonal, sigma = 8 mu."""
    closed_forms = {
        "theory": exact_3_1(alpha, counts, means, 8.0),
        "bound": theorem_3_1(alpha, 100, 8.0, math.pi / 2),
        "tighter": line_of_f14(alpha, 100, counts[-1], 8.0, math.pi / 2),
    }
    return Case(sweep, x, counts, means, 8.0, closed_forms, alpha)


def cases_3_1():
    """Theorem 3.1: two classes and a low-rank part. First alpha_r varies, then N_2."""
    means = two_means(math.pi / 2)
    for alpha in np.linspace(0, 1, 11):
        counts = np.array([90.0, 10.0])
        yield case_with_bound("Theorem 3.1: alpha_r", alpha, counts, means, alpha)
    for alpha, sizes in MINORITY_SIZES.items():
        for n_2 in sizes:
            sweep = f"Theorem 3.1: N_2 at alpha_r = {alpha:g}"
            counts = np.array([100.0 - n_2, n_2])
            yield case_with_bound(sweep, n_2, counts, means, alpha)


def cases_f1():
    """Theorem F.1: five classes, no low-rank part. The means of the middle classes turn."""
    for tilt in np.linspace(-75, 75, 11):
        means = orthogonal_means(5, math.radians(tilt))
        closed_forms = {
            "theory": theorem_f1(LONG_TAIL, means, 4.0),
            "simplified": theorem_f1_simplified(LONG_TAIL, means, 4.0),
        }
        yield Case("Theorem F.1: tilt of the middle classes (degrees)", tilt, LONG_TAIL, means, 4.0,
                   closed_forms)


def cases_f2():
    """Theorem F.2: five classes and a low-rank part. alpha_r varies, for two sets of means."""
    for name, tilt in (("orthogonal", 0), ("tilted by 75 degrees", 75)):
        means = orthogonal_means(5, math.radians(tilt))
        sweep = f"Theorem F.2: alpha_r, middle classes {name}"
        for alpha in np.linspace(0, 1, 11):
            yield case_with_bound(sweep, alpha, LONG_TAIL, means, alpha)


def results(trials, seed):
    """All points of all sweeps: a list of dicts. Each point has its own random numbers.

    "simulated" is a share of `trials`, and "low" to "high" its exact 95 % binomial interval.
    """
    points = []
    for case in (*cases_2_1(), *cases_3_1(), *cases_f1(), *cases_f2()):
        rng = np.random.default_rng([seed, len(points)])
        hits = simulate(case.counts, case.means, case.sigma, trials, rng, case.alpha)
        interval = binomtest(hits, trials).proportion_ci(0.95, "exact")
        points.append({
            "sweep": case.sweep, "x": float(case.x), "simulated": hits / trials,
            "low": float(interval.low), "high": float(interval.high), "hits": hits,
            "trials": trials,
            **{name: float(value) for name, value in case.closed_forms.items()}})
    return points


def violations(points, bound="bound"):
    """Points of Theorems 3.1 and F.2 whose simulated share lies above the "bound" or "tighter".

    The whole interval must lie above it, so that chance alone hardly explains it.
    """
    return [p for p in points if bound in p and p["low"] > p[bound]]


# --------------------------------------------------------------------------------------------------
# Output

def table(points):
    """A Markdown table: one line per point."""
    lines = [
        "| sweep | x | closed form | simplified / bound | (F.14), tighter | simulated | "
        "95 % interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for p in points:
        other = p.get("bound", p.get("simplified"))
        other, tighter = ("" if value is None else f"{value:.4f}"
                          for value in (other, p.get("tighter")))
        lines.append(f"| {p['sweep']} | {p['x']:.4g} | {p['theory']:.4f} | {other} | {tighter} | "
                     f"{p['simulated']:.4f} | {p['low']:.4f} to {p['high']:.4f} |")
    return "\n".join(lines)


def plot_sweep(ax, sweep, points):
    """One panel: closed form and bound as lines, the simulation as points with intervals."""
    x, y, low, high = (np.array([p[key] for p in points])
                       for key in ("x", "simulated", "low", "high"))
    for key, style, label in (("theory", "-", "closed form"),
                              ("bound", "--", "bound, as printed"),
                              ("tighter", ":", "line before, (F.14)"),
                              ("simplified", "--", "simplified, (F.16)")):
        if key in points[0]:
            ax.plot(x, [p[key] for p in points], style, label=label)
    ax.errorbar(x, y, [y - low, high - y], fmt="k.", capsize=2, label="simulation")
    theorem, _, name = sweep.partition(": ")
    label = SWEEPS[name][0] if name in SWEEPS else name.replace(", ", ",\n")
    ax.set(title=theorem, xlabel=label, ylim=(-0.03, 1.03),
           xscale="log" if name == "N" else "linear")
    ax.legend(fontsize=7)


FIGURES = {     # name: the theorems in it, those without and those with a low-rank part
    "theory": ("Theorem 2.1", "Theorem F.1"),
    "theory_low_rank": ("Theorem 3.1", "Theorem F.2"),
}


def figure(points, path):
    """Plot the five sweeps of these points, one panel each; written as PNG and PDF."""
    fig, axes = disk.pyplot().subplots(2, 3, figsize=(9, 5.4), constrained_layout=True)
    for ax, sweep in zip(axes.flat, dict.fromkeys(p["sweep"] for p in points)):
        plot_sweep(ax, sweep, [p for p in points if p["sweep"] == sweep])
    axes.flat[-1].remove()
    fig.supylabel("share of matrices that class 1 dominates")
    disk.save_figure(fig, path, suffixes=("png", "pdf"))


def main():
    """Simulate every point; write the table, the figure and the JSON."""
    parser = Parser(__doc__)
    parser.add_argument("--trials", type=integer(100), default=20_000,
                        help="weight matrices per point (default: 20,000)")
    parser.add_argument("--seed", type=integer(0), default=0,
                        help="all random numbers depend on it alone (default: 0)")
    parser.add_argument("--out", default="out/theory",
                        help="folder of the results (default: out/theory)")
    args = parser.parse_args()
    out = Path(args.out)
    disk.check_writable(out / "theory.json")
    points = results(args.trials, args.seed)
    text = table(points)
    for name, theorems in FIGURES.items():
        figure([p for p in points if p["sweep"].startswith(theorems)], out / f"{name}.png")
    disk.write_text(out / "table.md", text + "\n")
    settings = {"trials": args.trials, "seed": args.seed}
    disk.write_json(out / "theory.json", {"settings": settings, "points": points})
    gap = max(abs(p["simulated"] - p["theory"]) for p in points)
    print(f"{text}\n\n{len(points)} points, largest gap between closed form and simulation "
          f"{gap:.4f}; of {sum('bound' in p for p in points)} points above the printed bound: "
          f"{len(violations(points))}, above the line before it in (F.14): "
          f"{len(violations(points, 'tighter'))}; wrote {out}")


if __name__ == "__main__":
    run(main)
