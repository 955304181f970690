"""Turn the JSON files of evaluate.py into a page: one table, one figure, the sample grids.

    python report.py --out out/demo/report.md --row DDPM=out/demo/ddpm/samples/eval.json --row CM=... \\
                     --pair out/demo/cm/samples-general/samples.npz out/demo/cm/samples/samples.npz

--pair sets the same noise drawn by theta^g and by theta side by side (Fig. G.4).
"""
import shutil
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import runtime
from evaluate import read_samples
from runtime import Parser, UserError, run
from sample import grid_image

matplotlib.use("Agg")
from matplotlib import pyplot as plt        # noqa: E402, after the backend is chosen


def read_row(text):
    """("NAME", the JSON of evaluate.py) from "NAME=FILE"; raises UserError."""
    name, equals, path = text.partition("=")
    result = runtime.read_json(path) if equals else None
    if result is None or "fd" not in result or "floor" not in result:
        raise UserError(f"--row {text}: give NAME=FILE, with a JSON file that evaluate.py wrote with a classifier and --floor")
    return name, result


def table(rows):
    """Markdown: one line a row, FD and accuracy overall and per split; first the floor, real against real."""
    groups = list(rows[0][1]["splits"])
    head = ["", "guidance", "FD"] + [f"FD {g}" for g in groups] + ["accuracy"] + [f"acc. {g}" for g in groups]
    floors = [part["floor"] for part in (rows[0][1], *rows[0][1]["splits"].values())]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1),
             ["real against real", ""] + [f"{v:.2f}" for v in floors] + [""] * (len(groups) + 1)]
    for name, r in rows:
        parts = [r, *r["splits"].values()]
        lines.append([name, f"{r['settings']['guidance']:g}"] + [f"{p['fd']:.2f}" for p in parts]
                     + [f"{p['accuracy']:.1%}" for p in parts])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(rows, path):
    """Bars of FD per split (log scale), one panel a guidance strength, one colour a method; the floor as a dashed line."""
    groups, strengths = list(rows[0][1]["splits"]), sorted({r["settings"]["guidance"] for _, r in rows})
    fig, axes = plt.subplots(1, len(strengths), figsize=(5.2 * len(strengths), 3.8), sharey=True, squeeze=False,
                             constrained_layout=True)
    for ax, strength in zip(axes[0], strengths):
        methods = [(name, r) for name, r in rows if r["settings"]["guidance"] == strength]
        width, x = 0.8 / len(methods), np.arange(len(groups))
        for k, (name, r) in enumerate(methods):
            bars = ax.bar(x + (k - (len(methods) - 1) / 2) * width, [r["splits"][g]["fd"] for g in groups], width, label=name)
            ax.bar_label(bars, fmt="%.3g", fontsize=7)
        for g, part in enumerate(rows[0][1]["splits"].values()):
            ax.hlines(part["floor"], g - 0.45, g + 0.45, "black", "dashed", label=None if g else "real against real")
        ax.set(yscale="log", title=f"guidance {strength:g}")
        ax.set_xticks(x, groups)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("FD (classifier features), lower is better")
    axes[0, 0].legend(fontsize=8)
    runtime.write_atomic(path, lambda p: fig.savefig(p, dpi=120, format="png"))
    plt.close(fig)


def side_by_side(general, full, path, columns=6):
    """theta^g at the left, theta at the right: the same classes, labels and noise, image by image."""
    (a, labels, record), (b, labels_b, record_b) = read_samples(general), read_samples(full)
    same = [{k: v for k, v in r["settings"].items() if k != "branch"} for r in (record, record_b)]
    if same[0] != same[1] or (labels != labels_b).any():
        raise UserError("--pair: the two files were not drawn with the same settings and noise")
    names = record["data"]["class_names"]
    pictures = [grid_image(x, labels, names, columns=columns) for x in (a, b)]
    title, gap = 30, 24
    page = Image.new("RGB", (sum(p.width for p in pictures) + gap, pictures[0].height + title), "white")
    pen, x = ImageDraw.Draw(page), 0
    for picture, words in zip(pictures, ("theta_g alone: the general branch", "theta = theta_g + BA, the same noise")):
        page.paste(picture, (x, title))
        pen.text((x + picture.width // 2, title // 2), words, fill="black", anchor="mm", font=ImageFont.load_default(15))
        x += picture.width + gap
    runtime.write_atomic(path, lambda p: page.save(p, format="png"))


def conditions(rows):
    """One line on how the numbers came about, from the first row's settings."""
    s = rows[0][1]["settings"]
    return (f"{s['dataset']}, checkpoints at step {s['step']:,}; {s['sampler']} with {s['steps']} steps, "
            f"{s['weights']} weights, seed {s['seed']}; {rows[0][1]['num']:,} class-balanced samples "
            f"against {rows[0][1]['num_real']:,} real images ({s['reference']}).")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--row", action="append", required=True, metavar="NAME=FILE", help="a row of the table; repeatable")
    parser.add_argument("--pair", nargs=2, metavar=("GENERAL", "FULL"), help="samples.npz of theta^g and of theta")
    parser.add_argument("--out", default="out/report.md", help="the page; its pictures go beside it (default: out/report.md)")
    args = parser.parse_args()
    rows, page = [read_row(text) for text in args.row], Path(args.out)
    folder = page.parent
    text = ["# Samples per split\n", conditions(rows) + "\n", table(rows) + "\n",
            "FD is a Frechet distance in the features of a small classifier, not FID. Real against real compares the "
            "halves of the reference; having fewer images on either side, it lies above the true floor. Accuracy is the share of "
            "samples that the classifier takes for the class asked for.\n"]
    figure(rows, folder / "splits.png")
    text.append("![FD and accuracy per split](splits.png)\n")
    if args.pair:
        side_by_side(*args.pair, folder / "theta_g_theta.png")
        text.append("## The same noise, drawn by theta_g and by theta\n\n![theta_g and theta](theta_g_theta.png)\n")
    for name, r in rows:
        grid, copy = Path(r["settings"].get("samples", "")).parent / "grid.png", f"grid-{len(text)}.png"
        if grid.exists():
            runtime.write_atomic(folder / copy, lambda p: shutil.copyfile(grid, p))
            title = f"{name}, guidance {r['settings']['guidance']:g}"
            text.append(f"## {title}\n\n![{title}, one class a row]({copy})\n")
    runtime.write_atomic(page, lambda p: p.write_text("\n".join(text)))
    print(table(rows) + f"\nwrote {page}")


if __name__ == "__main__":
    run(main)
