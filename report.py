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
    if result is None or "settings" not in result:
        raise UserError(f"--row {text}: give NAME=FILE, with a JSON file that evaluate.py wrote")
    return name, result


def table(rows):
    """Markdown: one line a method, FD and accuracy overall and per split; first the floor, real against real."""
    groups = list(rows[0][1]["splits"])
    head = ["", "FD"] + [f"FD {g}" for g in groups] + ["accuracy"] + [f"acc. {g}" for g in groups]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" + " ---: |" * (len(head) - 1)]
    floor = rows[0][1]["floor"]
    lines.append("| real against real | " + " | ".join(f"{v:.2f}" for v in [floor["fd"], *floor["splits"].values()])
                 + " |" + " |" * (len(groups) + 1))
    for name, r in rows:
        parts = [r, *r["splits"].values()]
        lines.append(f"| {name} | " + " | ".join([f"{p['fd']:.2f}" for p in parts]
                                                  + [f"{p['accuracy']:.1%}" for p in parts]) + " |")
    return "\n".join(lines)


def figure(rows, path):
    """Bars of FD (log scale) and accuracy per split, one colour a method; the floor as a dashed line."""
    groups = list(rows[0][1]["splits"])
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    width, x = 0.8 / len(rows), np.arange(len(groups))
    for k, (name, r) in enumerate(rows):
        for ax, key in zip(axes, ("fd", "accuracy")):
            ax.bar(x + (k - (len(rows) - 1) / 2) * width, [r["splits"][g][key] for g in groups], width, label=name)
    for g, value in enumerate(rows[0][1]["floor"]["splits"].values()):
        axes[0].hlines(value, g - 0.45, g + 0.45, "black", "dashed", label="real against real" if g == 0 else None)
    axes[0].set(yscale="log", ylabel="FD (classifier features)", title="Frechet distance per split, lower is better")
    axes[1].set(ylim=(0, 1), ylabel="accuracy", title="samples of the class asked for, higher is better")
    for ax in axes:
        ax.set_xticks(x, groups)
    axes[0].legend(fontsize=8)
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
    return (f"{s['dataset']}, checkpoints at step {s['step']:,}; {s['sampler']} with {s['steps']} steps, guidance "
            f"{s['guidance']:g}, {s['weights']} weights, seed {s['seed']}; {rows[0][1]['num']:,} class-balanced samples "
            f"against {rows[0][1]['num_real']:,} real images (balanced {s['reference_split']} set).")


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
            text.append(f"## {name}\n\n![{name}, one class a row]({copy})\n")
    runtime.write_atomic(page, lambda p: p.write_text("\n".join(text)))
    print(table(rows) + f"\nwrote {page}")


if __name__ == "__main__":
    run(main)
