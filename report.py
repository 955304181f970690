"""Turn the JSON files of evaluate.py into a page: one table, one figure, the sample grids.

    python report.py --out out/demo/report.md --row DDPM=out/demo/ddpm/samples/eval.json --row CM=... \\
                     --pair out/demo/cm/samples-general/samples.npz out/demo/cm/samples/samples.npz
    python report.py --paper table2 --setting cifar100-ir100 --row "CM=out/paper/cm-seed*/eval.json" --row ...

Without --paper the rows must have been measured with a classifier and --floor, as in the demo.
--pair sets the same noise drawn by theta^g and by theta side by side (Fig. G.4). --paper makes one of the paper's
tables: mean +- standard deviation over the files of a row (one a seed), the paper's number beside it
(paper_results.json), the best in bold and the second best in italics, and the command behind each row.
"""
import glob
import shutil
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import t

import runtime
from evaluate import read_samples
from runtime import Parser, UserError, run
from sample import grid_image

matplotlib.use("Agg")
from matplotlib import pyplot as plt        # noqa: E402, after the backend is chosen


def read_row(text):
    """("NAME", [the JSON of evaluate.py or classify.py, one a file]) from "NAME=FILE,FILE", with wildcards; raises UserError."""
    name, _, patterns = text.rpartition("=")
    results = [runtime.read_json(path) for pattern in patterns.split(",") for path in sorted(glob.glob(pattern))]
    if not name or not results or any(r is None or "num_real" not in r for r in results):
        raise UserError(f"--row {text}: give NAME=FILE, with a JSON file that evaluate.py wrote")
    return name, results


# ----------------------------------------------------------------------------------------------------------------------
# One of the paper's tables

PAPER = Path(__file__).with_name("paper_results.json")
HIGHER = {"recall", "precision", "is", "accuracy"}          # metrics of which more is better
DIGITS = {"fid": 3, "kid": 4}                               # after the point, as the paper gives them; two for the rest
CLASSIFIERS = {"fid": "fd", "kid": "kd"}                    # what they are called in a classifier's features


def cell_value(result, column):
    """(the name of a metric, its value) of a column such as "fid", "Few fid" or "Male fid"; (name, None) if not measured."""
    *group, metric = column.split()
    part = result if not group else {**result["splits"], **result["classes"]}.get(group[0], {})
    name = metric if "fid" in result else CLASSIFIERS.get(metric, metric)
    return " ".join([*group, name.upper() if name in ("fid", "kid", "fd", "kd", "is") else name]), part.get(name)


def show(mean, std, column):
    """A number with the digits that the paper gives such a metric."""
    digits = DIGITS.get(column.split()[-1], 2)
    return f"{mean:.{digits}f}" + (f" +- {std:.{digits}f}" if std is not None else "")


def paper_value(paper, name, column):
    """The paper's (mean, standard deviation or None) of a row in a setting, or None where it gives no such number."""
    if not paper or name not in paper["rows"] or column not in paper["columns"]:
        return None
    value = paper["rows"][name][paper["columns"].index(column)]
    return value if value is None or isinstance(value, list) else (value, None)


def summarise(rows, columns):
    """Per row and column (mean, standard deviation over seeds or None), or None where nothing was measured."""
    cells = []
    for _, results in rows:
        values = [[cell_value(r, column)[1] for r in results] for column in columns]
        cells.append([None if None in v else (float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else None) for v in values])
    return cells


def paper_table(rows, columns, paper):
    """Markdown: a row's numbers, each with the paper's beside it where the paper has it; best bold, second best italic."""
    cells = summarise(rows, columns)
    head, lines = ["", "seeds"], []
    for column in columns:
        head += [cell_value(rows[0][1][0], column)[0]] + ["paper"] * bool(paper)
    for (name, results), row in zip(rows, cells):
        line = [name, str(len(results))]
        for k, (column, cell) in enumerate(zip(columns, row)):
            means = sorted({c[k][0] for c in cells if c[k]}, reverse=column.split()[-1] in HIGHER)
            text = show(*cell, column) if cell else "-"
            mark = "" if not cell or len(means) < 2 else "**" if cell[0] == means[0] else "*" if cell[0] == means[1] and len(means) > 2 else ""
            line.append(mark + text + mark)
            if paper:
                theirs = paper_value(paper, name, column)
                line.append(show(*theirs, column) if theirs else "-")
        lines.append(line)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def without_cm(name):
    """The name of the row that lacks nothing but CM: X of "X + CM" and "CM on X", OC of "CM"; None for other rows."""
    if name.endswith(" + CM"):
        return name.removesuffix(" + CM")
    if name.startswith("CM on "):
        return name.removeprefix("CM on ")
    return "OC" + name.removeprefix("CM") if name == "CM" or name.startswith("CM, ") else None


def paired_differences(rows, columns):
    """Markdown: for each row with CM and its row without, of two seeds or more, the mean difference and its 95 % t interval.

    Seeds are paired: those of the two rows in the order of their files. Empty where there is no such pair.
    """
    by_name, lines = dict(rows), []
    for name, results in rows:
        other = by_name.get(without_cm(name), [])
        if len(results) != len(other) or len(results) < 2:
            continue
        line = [f"{name} against {without_cm(name)}"]
        for column in columns:
            pairs = [(cell_value(a, column)[1], cell_value(b, column)[1]) for a, b in zip(results, other)]
            if any(None in pair for pair in pairs):
                line.append("-")
                continue
            d = np.array([a - b for a, b in pairs])
            half = float(t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5)
            digits = DIGITS.get(column.split()[-1], 2)
            line.append(f"{d.mean():+.{digits}f} ({d.mean() - half:+.{digits}f} to {d.mean() + half:+.{digits}f})")
        lines.append(line)
    if not lines:
        return ""
    head = ["difference (95 % interval)"] + [cell_value(rows[0][1][0], c)[0] for c in columns]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] + ["---:"] * len(columns), *lines])


def paper_figure(rows, columns, paper, title, path):
    """A panel for each Frechet column, a bar a row with its deviation over seeds, the paper's numbers as diamonds: PNG and PDF."""
    columns = [c for c in columns if c.endswith("fid")] or columns
    cells, x, wide = summarise(rows, columns), np.arange(len(rows)), min(2, len(columns))
    high = -(-len(columns) // wide)
    fig, axes = plt.subplots(high, wide, figsize=(wide * (2 + 0.4 * len(rows)), 3.2 * high), squeeze=False, constrained_layout=True)
    for k, (ax, column) in enumerate(zip(axes.flat, columns)):
        bars = ax.bar(x, [row[k][0] if row[k] else 0 for row in cells], 0.7, yerr=[row[k][1] or 0 if row[k] else 0 for row in cells],
                      color=[f"C{i % 10}" for i in x], capsize=2)
        ax.bar_label(bars, fmt="%.3g", fontsize=7, padding=1)
        for i, (name, _) in enumerate(rows):
            value = paper_value(paper, name, column)
            if value is not None:
                ax.plot(i, value[0], "kD", markersize=4, markerfacecolor="white")
        ax.set_xticks(x, [name for name, _ in rows], rotation=40, ha="right", fontsize=8)
        ax.set(title=cell_value(rows[0][1][0], column)[0], ylabel="lower is better" if column.endswith("fid") else "per cent, higher is better")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[len(columns):]:
        ax.remove()
    fig.suptitle(title)
    for suffix in ("png", "pdf"):
        runtime.write_atomic(path.with_suffix("." + suffix), lambda p: fig.savefig(p, dpi=120, format=suffix))
    plt.close(fig)


def paper_page(args, rows):
    """Write the page of one of the paper's tables; returns its table."""
    tables = runtime.read_json(PAPER)["tables"]
    if args.paper not in tables:
        raise UserError(f"--paper {args.paper}: choose one of {', '.join(tables)}")
    table, setting = tables[args.paper], args.setting or "demo"
    page, first = Path(args.out), rows[0][1][0]
    paper = table["settings"].get(setting)
    columns = (paper or next(iter(table["settings"].values())))["columns"]
    if paper is None and columns[0] == "Female fid":
        columns = ["Many fid", "Medium fid", "Few fid", "fid"]          # Table 4 on another set than the paper's
    text = paper_table(rows, columns, paper)
    paper_figure(rows, columns, paper, f"{table['title']}, {setting}", page)
    commands = [f"{command}    # {name}" for name, results in rows for command in (results[0]["settings"].get("command"), results[0].get("command"))
                if command]
    commands = "\n".join(dict.fromkeys(commands))
    steps = sorted({r["settings"]["step"] for _, results in rows for r in results if "step" in r["settings"]})
    notes = [f"{conditions(first)}"] + [f"**Not one budget: the rows' checkpoints are at steps {', '.join(f'{s:,}' for s in steps)}.**"] * (len(steps) > 1)
    notes += ["Mean +- standard deviation over seeds; best in bold, second best in italics."]
    if paper:
        notes.append("Beside each number the paper's own; diamonds in the figure.")
    if "fd" in first:
        notes.append("FD and KD are distances in the features of a small classifier, not FID and KID: nothing here compares with the paper.")
    if pairs := paired_differences(rows, columns):
        text += "\n\n" + pairs
    body = [f"# {table['title']}: {setting}\n", " ".join(notes) + "\n", text + "\n", f"![the table as bars]({page.stem}.png)\n",
            "## The first seed's commands\n", f"```bash\n{commands}\n```\n"]
    runtime.write_atomic(page, lambda p: p.write_text("\n".join(body)))
    return text


# ----------------------------------------------------------------------------------------------------------------------
# The demo's page


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


def conditions(result, one_guidance=True):
    """One line on how the numbers came about, from a row's settings; one_guidance: whether it is that of every row."""
    s = result["settings"]
    if "sampler" not in s and "epochs" not in s:
        return f"{result['num']:,} samples against {result['num_real']:,} real images ({s['reference']})."
    if "sampler" not in s:
        return (f"{s['dataset']}, IR {s['ir']:g}, {s['epochs']} epochs, per cent on {result['num_real']:,} test images; Many / Medium / Few "
                f"by {s['split_rule']}.")
    guidance = f", guidance {s['guidance']:g}" if one_guidance else ""
    return (f"{s['dataset']}, checkpoints at step {s['step']:,}; {s['sampler']} with {s['steps']} steps{guidance}, "
            f"{s['weights']} weights; {result['num']:,} class-balanced samples against {result['num_real']:,} real images "
            f"({s['reference']}).")


def main():
    """Make the page that the flags ask for."""
    parser = Parser(__doc__)
    parser.add_argument("--row", action="append", required=True, metavar="NAME=FILE", help="a row of the table; repeatable")
    parser.add_argument("--pair", nargs=2, metavar=("GENERAL", "FULL"), help="samples.npz of theta^g and of theta")
    parser.add_argument("--paper", metavar="TABLE", help="make this table of the paper: table2, fig4b, ... (see paper_results.json)")
    parser.add_argument("--setting", help="the data set and ratio, as cifar100-ir100: whose numbers of the paper stand beside")
    parser.add_argument("--out", default="out/report.md", help="the page; its pictures go beside it (default: out/report.md)")
    args = parser.parse_args()
    rows, page = [read_row(text) for text in args.row], Path(args.out)
    if args.paper:
        return print(paper_page(args, rows) + f"\nwrote {page}")
    rows, folder = [(name, results[0]) for name, results in rows], page.parent
    if any("floor" not in r or "fd" not in r for _, r in rows):
        raise UserError("--row: a page without --paper needs numbers that evaluate.py made with a classifier and --floor")
    if bad := [name for name, r in rows if "guidance" not in r["settings"] or "accuracy" not in r]:
        raise UserError(f"--row {bad[0]}: a page without --paper is for images of sample.py, in features of a classifier of their classes")
    text = ["# Samples per split\n", conditions(rows[0][1], len({r["settings"]["guidance"] for _, r in rows}) == 1) + "\n", table(rows) + "\n",
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
