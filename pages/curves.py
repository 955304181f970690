"""Curves against training time: when, and for what, does CM pay?

    python -m pages.curves --curve "DDPM=out/a/ddpm-seed*/eval-*.json" \\
        --curve "CM on DDPM=out/a/cm-ddpm-seed*/eval-*.json" --cost 1.7 --out out/curves.md

The files are evaluate.py's, of checkpoints that train.py kept (--keep-every). There is a panel for
each width and guidance, and in it a curve for each method: the mean over seeds, where each has been
measured, and a band from the lowest seed to the highest. Time counts in steps of the first curve's
method: --cost says how many of these a step of another one takes. The table has the differences to
the first curve, paired by seed, where both were measured at the same time (within 3 %), with 95 % t
intervals. Bold: p is below 0.05, corrected for the number of intervals in the table (Holm, 1979).
"""
import glob
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

import disk
from pages import page
from pages.page import escaped, markdown_table, named
from pages.report import holm, title_of, value_of
from runtime import Parser, UserError, number, run

COLUMNS = ["fid", "Many fid", "Medium fid", "Few fid", "Few recall"]


def read_curve(text):
    """(name, {panel: {step: {seed: result}}}) of "NAME=FILES". panel: (width, guidance).

    Raises UserError, also where a group was not measured.
    """
    name, pattern = named(text, "--curve")
    panels = defaultdict(lambda: defaultdict(dict))
    for path in sorted(glob.glob(pattern)):
        result = disk.read_json(path)
        if None in [value_of(result, column) for column in COLUMNS]:
            raise UserError(f"--curve {text}: {path} lacks Many, Medium or Few; evaluate.py says "
                            "why")
        s = result["settings"]
        panels[s["config"]["ch"], s["guidance"]][s["step"]][s["config"]["seed"]] = result
    if not panels:
        raise UserError(f"--curve {text}: no such file")
    return name, panels


def titles_of(curves):
    """{column: its title, "Few FD"} of COLUMNS."""
    result = next(result for _, panels in curves for steps in panels.values()
                  for seeds in steps.values() for result in seeds.values())
    return {column: title_of(result, column) for column in COLUMNS}


def draw(curves, costs, column, title, path):
    """Write the picture as PNG and PDF: a row of panels per width, a column per guidance.

    Of those with a curve: more than one time of some method.
    """
    plt = disk.pyplot()
    panels = sorted({panel for _, found in curves for panel in found if len(found[panel]) > 1})
    if not panels:
        raise UserError("--curve: measured at one time only; measure more of --keep-every's files")
    widths, omegas = (sorted({panel[i] for panel in panels}) for i in (0, 1))
    fig, axes = plt.subplots(len(widths), len(omegas), squeeze=False, constrained_layout=True,
                             figsize=(4 * len(omegas), 3 * len(widths)), sharey="row")
    for panel in panels:
        ax = axes[widths.index(panel[0]), omegas.index(panel[1])]
        for k, (name, found) in enumerate(curves):
            at = found.get(panel, {})
            steps = sorted(s for s in at if len(at[s]) == max(map(len, at.values())))
            values = [[value_of(r, column) for r in at[s].values()] for s in steps]
            time = [s * costs[k] for s in steps]
            ax.plot(time, [np.mean(v) for v in values], f"C{k}o-", label=name)
            ax.fill_between(time, [min(v) for v in values], [max(v) for v in values],
                            color=f"C{k}", alpha=0.2, linewidth=0)
        ax.set(title=f"width {panel[0]}, guidance {panel[1]:g}", yscale="log", xlim=(0, None),
               xlabel=f"training time, in steps of {curves[0][0]}", ylabel=title)
        ax.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(plt.NullFormatter())
    axes[0, 0].legend()
    disk.save_figure(fig, path, ("png", "pdf"))


def compare(curves, costs):
    """The differences to the first curve: [(panel, time, name, gain of each seed)] by COLUMNS."""
    (_, first), *others = curves
    found = []
    for (name, panels), cost in zip(others, costs[1:]):
        for panel in sorted(set(panels) & set(first)):
            for step, results in sorted(panels[panel].items()):
                time = min(first[panel], key=lambda s: abs(s - step * cost))
                base = first[panel][time]
                seeds = sorted(set(results) & set(base))
                if abs(time / (step * cost) - 1) > 0.03 or len(seeds) < 2:
                    continue
                found += [(panel, time, name,
                           np.array([value_of(results[s], column) - value_of(base[s], column)
                                     for s in seeds])) for column in COLUMNS]
    return found


def table_of(gains, titles):
    """Markdown of what `compare` found: a row per panel, time and method, a column per title."""
    p = holm([stats.ttest_1samp(gain, 0).pvalue for *_, gain in gains])
    rows = defaultdict(list)
    for (panel, time, name, gain), corrected in zip(gains, p):
        mean, half = gain.mean(), stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain)
        mark = "**" if corrected < 0.05 else ""
        rows[panel, time, name, len(gain)].append(
            f"{mark}{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f}){mark}")
    lines = [[escaped(name), width, f"{omega:g}", f"{time:,}", seeds, *cells]
             for ((width, omega), time, name, seeds), cells in rows.items()]
    head = ["difference", "width", "guidance", "time", "seeds", *titles]
    return markdown_table(head, lines)


def main():
    """Write the page that the flags ask for."""
    parser = Parser(__doc__)
    parser.add_argument("--curve", action="append", required=True, metavar="NAME=FILES",
                        help="results of one method, wildcards allowed; repeatable")
    parser.add_argument("--cost", action="append", type=number(above=0), default=[],
                        help="time of a step in steps of the first --curve: one for each other")
    parser.add_argument("--out", default="out/curves.md", help="the page (default: out/curves.md)")
    args = parser.parse_args()
    if len(args.cost) != len(args.curve) - 1:
        raise UserError("--cost: give one for each --curve but the first")
    curves, costs = [read_curve(text) for text in args.curve], [1.0, *args.cost]
    titles = titles_of(curves)
    picture = Path(args.out).with_suffix(".png")
    draw(curves, costs, "Few fid", titles["Few fid"], picture)
    page.write(args.out, "\n\n".join([
        f"# {titles['Few fid']} against training time", f"![curves]({picture.name})",
        "The band goes from the lowest to the highest seed.",
        table_of(compare(curves, costs), titles.values())]))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
