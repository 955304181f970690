"""Turn the JSON files of evaluate.py into a page: one table, one figure, the sample grids.

    python -m pages.report --out out/demo/report.md --row DDPM=out/demo/ddpm/samples/eval.json \\
        --row CM=... --pair out/demo/cm/samples-general/samples.npz out/demo/cm/samples/samples.npz
    python -m pages.report --paper table2 --setting cifar100-ir100 \\
        --row "CM=out/paper/cm-seed*/eval.json" --row ...

Rows that were measured with a classifier and --floor, one result each, become the demo's table,
which has accuracies and the floor. --pair shows samples of theta_g and of theta from the same
noise, side by side (Fig. G.4). For pictures alone see figures.py.

--paper makes one of the paper's tables. Each number is the mean ± standard deviation over a row's
files (one per seed), with the paper's number beside it (paper_results.json). The best is in bold,
the second best in italics. The page also lists the commands behind each row.
"""
import glob
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

import disk
import runtime
from data import read_samples
from metrics.scores import KID_SIZE
from pages import figures
from pages.page import escaped, from_markdown, html, markdown_table, part
from runtime import Parser, UserError, run

COMMANDS = "## The first seed's commands"    # a heading of every page
PAPER = Path(__file__).with_name("paper_results.json")
HIGHER_IS_BETTER = {"recall", "precision", "is", "accuracy"}
DIGITS = {"fid": 3, "kid": 4}       # after the point, as in the paper; else two
IN_CAPITALS = {"fid", "kid", "fd", "kd", "is"}
CLASSIFIER_KEYS = {"fid": "fd", "kid": "kd"}        # in a classifier's features
GENERATED = {       # settings of sample.py: what they are called on a page
    "dataset": "data set", "step": "training step", "sampler": "sampler", "steps": "steps",
    "grid": "grid", "order": "order", "eta": "eta", "guidance": "guidance", "weights": "weights",
    "branch": "branch", "seed": "sampling seed", "dtype": "dtype", "trained_on": "training set of"}

# In this file a row is (name, results): results is a list of what evaluate.py or classify.py
# wrote, one dict per seed. On the demo's page a row is (name, result).
# A column is a text such as "fid", "Few fid" or "Male fid": a metric, and before it a group or
# a class; neither for all images.


def read_row(text):
    """(name, results) from "NAME=FILE,FILE"; a FILE may have wildcards. Raises UserError."""
    name, _, patterns = text.rpartition("=")
    paths = []
    for pattern in patterns.split(","):
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
        if pattern and not found:
            raise UserError(f"--row {text}: there is no file {pattern}; give NAME=FILE, with a "
                            "JSON file that evaluate.py wrote")
        paths += found
    if not name.strip() or not paths:
        raise UserError(f"--row {text}: give NAME=FILE, with a JSON file that evaluate.py wrote")
    results = [disk.read_json(path) for path in paths]
    for path, result in zip(paths, results):
        if not is_result(result):
            raise UserError(f"--row {text}: {path} is not a whole result of evaluate.py or "
                            "classify.py; make it again")
    refuse_twice(text, "file", [Path(path).resolve() for path in paths], paths)
    refuse_twice(text, "checkpoint", [checkpoint_of(result) for result in results], paths)
    for path, result in zip(paths, results):
        found = generated_otherwise(results[0], result)
        differences = [pair for key, pair in found.items() if key != "seed"]
        if differences:
            a, b = differences[0]
            raise UserError(f"--row {text}: {path} has {b}, and {paths[0]} has {a}; a row's files "
                            "differ in their seeds only")
    if 1 < len(set(sampling_seeds(results))) < len(results):
        raise UserError(f"--row {text}: some of its files have the same sampling seed, others not; "
                        "let evaluate.py's --seed be that of training for all of them")
    return name, results


def sampling_seeds(results):
    """The seed of the noise that each result's images were made from, or None."""
    return [r["settings"].get("seed") if is_generated(r["settings"]) else None for r in results]


def refuse_twice(row, what, values, paths):
    """Raise UserError where two of a row's files are one; values: of each file, or None."""
    for i, value in enumerate(values):
        if value is not None and value in values[:i]:
            first = paths[values.index(value)]
            raise UserError(f"--row {row}: the same {what} twice, in {first} and {paths[i]}; "
                            "a row's files are of different seeds")


def checkpoint_of(result):
    """The hash of the checkpoint that was measured, or None where the result does not say it."""
    return (result["settings"].get("ckpt_sha256") or result.get("ckpt_sha256")
            or result.get("weights_sha256"))            # of a classifier


def is_result(result):
    """Whether this is what evaluate.py or classify.py wrote: all that the pages need is there."""
    if not isinstance(result, dict) or not isinstance(result.get("settings"), dict):
        return False
    parts = [result]
    for kind in ("groups", "classes"):
        if not isinstance(result.get(kind), dict):
            return False
        parts += result[kind].values()
    if not all(isinstance(part, dict) and has_finite_numbers(part) for part in parts):
        return False
    settings = result["settings"]
    numbers, texts = [], ["reference"]
    if is_generated(settings):
        numbers, texts = ["step", "guidance", "steps"], ["dataset", "weights", "reference"]
    elif "epochs" in settings:
        numbers, texts = ["ir", "epochs"], ["dataset", "group_rule"]
    return (all(isinstance(result.get(key), int) for key in ("num", "num_real"))
            and all(isinstance(settings.get(key), (int, float)) for key in numbers)
            and all(isinstance(settings.get(key), str) for key in texts))


def has_finite_numbers(part):
    """Whether no metric of a part is a text, or not finite."""
    metrics = [part[key] for key in (*HIGHER_IS_BETTER, "fid", "kid", "fd", "kd") if key in part]
    return all(isinstance(value, (int, float)) and np.isfinite(value) for value in metrics)


def clipped(settings):
    """Whether x_0 was clipped at every step of sampling, in words."""
    return "x_0 clipped" if settings.get("clip") else "x_0 not clipped"


def is_generated(settings):
    """Whether these are settings of a result of images that sample.py generated."""
    return "sampler" in settings and "guidance" in settings


def generated_otherwise(first, result):
    """{setting: (words on one result, on another)} of all that made their images differ.

    Empty for classifiers.
    """
    pair = [r["settings"] for r in (first, result)]
    ours = tuple(is_generated(s) for s in pair)
    if not all(ours):
        words = {True: "images of sample.py", False: "images of another program"}
        return {"sampler": tuple(words[is_ours] for is_ours in ours)} if any(ours) else {}
    found = {}
    for key, words in GENERATED.items():
        a, b = (s.get(key) for s in pair)
        if None not in (a, b) and a != b:           # older results do not say all of it
            found[key] = tuple(f"{words} {v:.10g}" if isinstance(v, float) else f"{words} {v}"
                               for v in (a, b))
    return found


def refuse_other_conditions(rows):
    """Raise UserError for a result that cannot stand in one table with the first row's first."""
    first_name, (first, *_) = rows[0]
    for name, results in rows:
        for result in results:
            for what, (a, b) in compared(first, result).items():
                if a != b:
                    raise UserError(f"--row {name}: {what} {b}, and of {first_name} {a}; one "
                                    "table has rows that were measured alike")


def compared(first, result):
    """{in words: (of one result, of another)} of all that must be equal in a table."""
    pair = (first, result)
    known = {"its distance is": tuple(distance_name(r) for r in pair)}
    of_settings = {"features": "its features are", "features_sha256": "its features' hash is",
                   "reference": "its reference is", "reference_sha256": "its reference's hash is",
                   "k": "its --k is", "test_sha256": "its test set's hash is",
                   "ir": "its --ir is", "epochs": "its --epochs is",
                   "group_rule": "its --group-rule is", "classes": "its --classes are"}
    for key, words in of_settings.items():
        values = tuple(r["settings"].get(key) for r in pair)
        if None not in values:              # older results do not say all of it
            known[words] = values
    orders = [r.get("class_order") for r in pair]
    if None not in orders:                  # Many, Medium and Few would be others
        known["its classes by size are"] = tuple(" ".join(map(str, order)) for order in orders)
    if all("sampler" in r["settings"] for r in pair):
        known["its sampling has"] = tuple(clipped(r["settings"]) for r in pair)
    known["its number of real images is"] = tuple(r["num_real"] for r in pair)
    if not any("epochs" in r["settings"] for r in pair):        # there, those of training
        known["its number of images is"] = tuple(r["num"] for r in pair)
    return known


def distance_name(result):
    """ "FID", "FD" or "none": the Frechet distance that a result has."""
    return next((key.upper() for key in ("fid", "fd") if key in result), "none")


# --------------------------------------------------------------------------------------------------
# The numbers of a paper table

class Number(NamedTuple):
    """A mean, and the standard deviation over seeds or None where there is one seed."""
    mean: float
    std: float | None = None


def metric_of(column):
    """The metric of a column: "fid" of "Few fid"."""
    return column.split()[-1]


def key_of(result, column):
    """The key of a column's metric in a result: "fid", or "fd" of a classifier."""
    metric = metric_of(column)
    return metric if "fid" in result else CLASSIFIER_KEYS.get(metric, metric)


def title_of(result, column):
    """A column's title: "Few FID"."""
    group = column.split()[:-1]
    key = key_of(result, column)
    return " ".join([*group, key.upper() if key in IN_CAPITALS else key])


def value_of(result, column):
    """A column's number in a result, or None where it was not measured.

    A KID of smaller subsets than the protocol's is another number, and counts as not measured.
    """
    group = column.split()[:-1]
    part = result
    if group:
        part = {**result["classes"], **result["groups"]}.get(group[0], {})
    if metric_of(column) == "kid" and part.get("kid_subset_size", KID_SIZE) < KID_SIZE:
        return None
    return part.get(key_of(result, column))


def digits_of(column):
    """How many digits after the point a column's numbers have."""
    return DIGITS.get(metric_of(column), 2)


def show(number, column):
    """A Number as text."""
    digits = digits_of(column)
    text = f"{number.mean:.{digits}f}"
    if number.std is not None:
        text += f" ± {number.std:.{digits}f}"
    return text


def paper_number(paper, name, column):
    """The paper's Number of a row, or None where it has none.

    paper: a setting in paper_results.json, {"columns": [...], "rows": {name: [...]}}, or None.
    """
    if not paper or name not in paper["rows"] or column not in paper["columns"]:
        return None
    value = paper["rows"][name][paper["columns"].index(column)]
    if value is None:
        return None
    return Number(*value) if isinstance(value, list) else Number(value)


def over_seeds(results, column):
    """The Number of a column over a row's results; None where one of them lacks it."""
    values = [value_of(result, column) for result in results]
    if None in values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Number(float(np.mean(values)), std)


def summarise(rows, columns):
    """For each row a list with each column's Number, None where it was not measured."""
    return [[over_seeds(results, column) for column in columns] for _, results in rows]


# --------------------------------------------------------------------------------------------------
# A paper table as Markdown

def different_means(numbers, column):
    """The different means of a column, best first."""
    means = {number.mean for number in numbers if number is not None}
    return sorted(means, reverse=metric_of(column) in HIGHER_IS_BETTER)


def emphasis(mean, means):
    """What is put around a mean in Markdown.

    means: the column's different means, best first.
    """
    if len(means) > 1 and mean == means[0]:
        return "**"
    if len(means) > 2 and mean == means[1]:
        return "*"
    return ""


def paper_table(rows, columns, paper):
    """Markdown: each row's numbers, each with the paper's beside it if paper is not None."""
    summary = summarise(rows, columns)
    by_column = zip(columns, zip(*summary))
    means = [different_means(numbers, column) for column, numbers in by_column]
    head = ["", "seeds"]
    for column in columns:
        head.append(title_of(rows[0][1][0], column))
        if paper:
            head.append("paper")

    lines = []
    for (name, results), numbers in zip(rows, summary):
        line = [escaped(name), str(len(results))]
        for k, (column, number) in enumerate(zip(columns, numbers)):
            mark = emphasis(number.mean, means[k]) if number else ""
            line.append(mark + (show(number, column) if number else "-") + mark)
            if paper:
                theirs = paper_number(paper, name, column)
                line.append(show(theirs, column) if theirs else "-")
        lines.append(line)
    return markdown_table(head, lines)


def without_cm(name):
    """The names of the rows that a row with CM is compared with; [] for other rows.

    X of "X + CM" and of "CM on X"; OC of "CM"; "OC, widths" of "CM, widths": they differ only in
    having no CM. Then "X, as long", which has also been trained for as many seconds.
    """
    if name.endswith(" + CM"):
        other = name.removesuffix(" + CM")
    elif name.startswith("CM on "):
        other = name.removeprefix("CM on ")
    elif name == "CM" or name.startswith("CM, "):
        other = "OC" + name.removeprefix("CM")
    else:
        return []
    return [other, f"{other}, as long"]


def paired_difference(results, others, column):
    """The mean difference of two rows, paired by seed, and its 95 % t interval, as text."""
    pairs = [(value_of(a, column), value_of(b, column)) for a, b in zip(results, others)]
    if any(None in pair for pair in pairs):
        return "-"
    differences = np.array([a - b for a, b in pairs])
    n = len(differences)
    mean = differences.mean()
    half = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / n ** 0.5)
    digits = digits_of(column)
    return f"{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"


def seeds_of(results):
    """The --seed of each result's training run, 0 where its command names none."""
    commands = [r["settings"].get("command") or r.get("command") or "" for r in results]
    found = [re.search(r"--seed[ =](\d+)", command) for command in commands]
    return [int(match[1]) if match else 0 for match in found]


def paired_differences(rows, columns):
    """Markdown: for each row with CM, its difference to rows without; "" if there are none.

    Both rows must have the same seeds, of training and of sampling, at least two, in the order of
    their files.
    """
    by_name = dict(rows)
    lines = []
    pairs = [(name, other) for name in by_name for other in without_cm(name) if other in by_name]
    for name, other in pairs:
        results, others = by_name[name], by_name[other]
        same = all(of(results) == of(others) for of in (seeds_of, sampling_seeds))
        if not same or len(results) < 2:
            continue
        differences = [paired_difference(results, others, column) for column in columns]
        lines.append([escaped(f"{name} against {other}"), *differences])
    if not lines:
        return ""
    titles = [title_of(rows[0][1][0], column) for column in columns]
    return markdown_table(["difference (95 % interval)", *titles], lines)


# --------------------------------------------------------------------------------------------------
# A paper table as a figure, and its page

def draw_panel(ax, rows, column, numbers, paper):
    """One column: a bar per row, with the deviation over seeds; the paper's as diamonds."""
    x = np.arange(len(rows))
    heights = [number.mean if number else np.nan for number in numbers]
    errors = [(number.std or 0) if number else 0 for number in numbers]
    colors = [f"C{i % 10}" for i in x]
    bars = ax.bar(x, heights, 0.7, yerr=errors, color=colors, capsize=2)
    labels = [f"{height:.3g}" if number else "" for height, number in zip(heights, numbers)]
    ax.bar_label(bars, labels, fontsize=7, padding=1)
    for i, (name, _) in enumerate(rows):
        theirs = paper_number(paper, name, column)
        if theirs is not None:
            ax.plot(i, theirs.mean, "kD", markersize=4, markerfacecolor="white")
    names = [disk.in_figure(name) for name, _ in rows]
    ax.set_xticks(x, names, rotation=40, ha="right", fontsize=8)
    is_distance = metric_of(column).endswith("fid")
    ylabel = "lower is better" if is_distance else "per cent, higher is better"
    ax.set(title=title_of(rows[0][1][0], column), ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)


def paper_figure(rows, columns, paper, title, path):
    """Write a PNG and a PDF: one panel per FID column, or per column if there are none."""
    plt = disk.pyplot()
    columns = [column for column in columns if column.endswith("fid")] or columns
    summary = summarise(rows, columns)
    panels_across = min(2, len(columns))
    panels_down = -(-len(columns) // panels_across)
    size = (panels_across * (2 + 0.4 * len(rows)), 3.2 * panels_down)
    fig, axes = plt.subplots(panels_down, panels_across, figsize=size, squeeze=False,
                             constrained_layout=True)
    for ax, column, numbers in zip(axes.flat, columns, zip(*summary)):
        draw_panel(ax, rows, column, numbers, paper)
    for ax in axes.flat[len(columns):]:
        ax.remove()
    # About ten characters to an inch
    fig.suptitle(textwrap.fill(title, round(10 * size[0])))
    disk.save_figure(fig, path, ("png", "pdf"))


def columns_of(table, setting):
    """The columns of a paper table in a setting, which the paper may not have."""
    settings = table["settings"]
    if setting in settings:
        return settings[setting]["columns"]
    columns = next(iter(settings.values()))["columns"]
    if columns[0] == "Female fid":          # Table 4; other data sets have other classes
        return ["Many fid", "Medium fid", "Few fid", "fid"]
    return columns


def settings_behind(rows):
    """[[row, [all settings of each file]]], which the HTML page shows behind each number."""
    return [[" ".join(name.split()), [
        {**r["settings"], "num": r["num"], "num_real": r["num_real"],
         **({"measured by": r["command"]} if "command" in r else {})} for r in results]]
        for name, results in rows]


def write_page(page, markdown, title, rows):
    """Write a page as Markdown, and beside it as one HTML file with its pictures inside."""
    disk.write_text(page, markdown)
    body = f"<main>\n{from_markdown(markdown, page.parent)}\n</main>\n"
    text = html(title, body + part("report.html"), part("report.css"), part("report.js"),
                settings_behind(rows))
    disk.write_text(page.with_suffix(".html"), text)


def commands_of(rows):
    """The commands behind each row's first file, one per line."""
    lines = []
    for name, results in rows:
        first = results[0]
        for command in (first["settings"].get("command"), first.get("command")):
            if command:
                lines.append(f"{command}    # {' '.join(name.split())}")
    return "\n".join(dict.fromkeys(lines))


def notes_of(rows, paper):
    """What a reader of a paper table must know: conditions, budgets, marks."""
    first = rows[0][1][0]
    notes = [conditions_of([(name, results[0]) for name, results in rows])]
    settings = [result["settings"] for _, results in rows for result in results]
    steps = sorted({s["step"] for s in settings if "step" in s})
    if len(steps) > 1:
        listed = ", ".join(f"{step:,}" for step in steps)
        notes.append("**Different budgets: "
                     f"the rows' checkpoints are at steps {listed}.**")
    notes.append(f"Mean ± standard deviation over seeds{whose_seeds(rows)}; "
                 "best in bold, second best in italics.")
    if paper:
        notes.append("Beside each number is the paper's; in the figure it is a diamond.")
    if "fd" in first:
        notes.append("FD and KD are distances in the features of a small classifier, "
                     "not FID and KID: do not compare them with the paper's numbers.")
    return " ".join(notes)


def whose_seeds(rows):
    """What changes with the seed where a row has several: the noise of the samples, or not."""
    several = [sampling_seeds(results) for _, results in rows if len(results) > 1]
    of_their_own = {len(set(seeds)) > 1 for seeds in several if None not in seeds}
    if len(of_their_own) != 1:
        return ""
    return (" of training and of sampling" if of_their_own.pop() else
            " of training; the noise that is sampled is the same for all")


class Table(NamedTuple):
    """What a table page shows."""
    title: str
    setting: str            # "" without --paper
    columns: list[str]
    paper: dict | None      # the paper's numbers in this setting


def refuse_other_set(rows, setting, settings):
    """Raise UserError for rows of another data set than the paper's numbers beside them."""
    for name, results in rows:
        dataset = results[0]["settings"].get("dataset")
        if setting in settings and dataset and not f"{setting}-".startswith(f"{dataset}-"):
            raise UserError(f"--setting {setting}: the paper's numbers are of another data set "
                            f"than {name}'s, {dataset}; leave it out")


def paper_table_of(args, rows):
    """The Table that --paper and --setting name. Raises UserError."""
    tables = disk.read_json(PAPER)["tables"]
    if args.paper not in tables:
        raise UserError(f"--paper {args.paper}: choose one of {', '.join(tables)}")
    table = tables[args.paper]
    setting = args.setting or "demo"
    refuse_other_set(rows, setting, table["settings"])
    return Table(table["title"], setting, columns_of(table, setting),
                 table["settings"].get(setting))


def own_table_of(rows):
    """The Table of rows without --paper: all that their first files have, but for a KID of few.

    Groups are shown in the first metric that they have. Raises UserError where there is none.
    """
    firsts = [results[0] for _, results in rows]
    groups = list(dict.fromkeys(group for first in firsts for group in first["groups"]))

    def is_known(column):
        return any(value_of(first, column) is not None for first in firsts)
    metrics = [metric for metric in ("fid", "kid", "is", "recall", "precision", "accuracy")
               if is_known(metric)]
    if min(first.get("kid_subset_size", KID_SIZE) for first in firsts) < KID_SIZE:
        metrics.remove("kid")                       # evaluate.py does not print such a one either
    if not metrics:
        raise UserError(f"--row {rows[0][0]}: its file has no metric; run evaluate.py again")
    by_metric = [[f"{group} {m}" for group in groups if is_known(f"{group} {m}")] for m in metrics]
    return Table("Results", "", next(filter(None, by_metric), []) + metrics, None)


def refuse_one_name_twice(names):
    """Raise UserError where two rows have the same name."""
    if len(set(names)) < len(names):
        raise UserError(f"--row: two rows are called {max(names, key=names.count)}; "
                        "give each a name of its own")


def table_page(args, rows):
    """Write the page of one of the paper's tables, or of rows of your own; returns its table."""
    refuse_one_name_twice([name for name, _ in rows])
    table = paper_table_of(args, rows) if args.paper else own_table_of(rows)
    title = ": ".join(filter(None, [table.title, table.setting]))
    page = Path(args.out)
    # What may be refused comes before what is written
    pair = read_pair(*args.pair, rows) if args.pair else None
    samples = samples_by_strength([(name, results[0]) for name, results in rows])

    text = paper_table(rows, table.columns, table.paper)
    differences = paired_differences(rows, table.columns)
    if differences:
        text += "\n\n" + differences
    paper_figure(rows, table.columns, table.paper, disk.in_figure(title.replace(": ", ", ")), page)
    note = (table.paper or {}).get("note")
    parts = [
        f"# {title}\n",
        notes_of(rows, table.paper) + "\n",
        text + "\n",
        *([note + "\n"] if note else []),
        f"![the table as bars]({page.stem}.png)\n",
        *pair_part(pair, page.with_name(f"{page.stem}-theta_g_theta.png")),
        *sample_pages(samples, page.parent, f"{page.stem}-samples"),
        f"{COMMANDS}\n",
        f"```bash\n{commands_of(rows)}\n```\n",
    ]
    write_page(page, "\n".join(parts), table.title, rows)
    return text


def conditions(result, with_guidance=True):
    """One sentence on how a result's numbers were made.

    with_guidance: False where the rows have different guidance strengths.
    """
    s = result["settings"]
    num = f"{result['num']:,}"
    num_real = f"{result['num_real']:,}"
    if is_generated(s):
        alone = ", theta_g alone" if s.get("branch") == "general" else ""
        guidance = f", guidance {s['guidance']:g}" if with_guidance else ""
        return (f"{s['dataset']}, checkpoints at step {s['step']:,}; "
                f"{s['sampler']} with {s['steps']} steps{guidance}, {clipped(s)}, "
                f"{s['weights']} weights{alone}; "
                f"{num} class-balanced samples "
                f"against {num_real} real images ({s['reference']}).")
    if "epochs" in s:           # a classifier of classify.py
        return (f"{s['dataset']}, IR {s['ir']:g}, {s['epochs']} epochs, "
                f"per cent on {num_real} test images; "
                f"Many / Medium / Few by {s['group_rule']}.")
    # Images that sample.py did not generate
    return f"{num} samples against {num_real} real images ({s['reference']})."


def conditions_of(rows, with_guidance=True):
    """How the first row's numbers were made, and in what the other rows differ.

    rows: (name, result) of each. with_guidance: as for `conditions`.
    """
    first = rows[0][1]
    others = []
    for name, result in rows:
        found = generated_otherwise(first, result)
        words = [b for key, (_, b) in found.items() if with_guidance or key != "guidance"]
        if words:
            others.append(f"{escaped(name)} has {', '.join(words)}")
    text = conditions(first, with_guidance)
    if not others:
        return text
    return f"The first row: {text} Rows that differ from it: {'; '.join(dict.fromkeys(others))}."


# --------------------------------------------------------------------------------------------------
# The demo's page

def demo_table(rows):
    """Markdown: FD and accuracy per row, overall and per group; the floor above them."""
    first = rows[0][1]
    groups = list(first["groups"])
    head = ["", "guidance", "FD"] + [f"FD {group}" for group in groups]
    head += ["accuracy"] + [f"acc. {group}" for group in groups]

    floors = [f"{part['floor']:.2f}" for part in (first, *first["groups"].values())]
    no_accuracy = [""] * (len(groups) + 1)
    lines = [["real against real", "", *floors, *no_accuracy]]
    for name, result in rows:
        parts = [result, *result["groups"].values()]
        distances = [f"{part['fd']:.2f}" for part in parts]
        accuracies = [f"{part['accuracy']:.1%}" for part in parts]
        guidance = f"{result['settings']['guidance']:g}"
        lines.append([escaped(name), guidance, *distances, *accuracies])
    return markdown_table(head, lines)


def guidance_strengths(rows):
    """The different guidance strengths of rows, (name, result) of each, that have one."""
    return sorted({result["settings"]["guidance"] for _, result in rows
                   if "guidance" in result["settings"]})


def draw_groups(ax, rows, floors):
    """Bars of FD per group, one colour per row; each group's floor as a dashed line."""
    groups = list(floors)
    x = np.arange(len(groups))
    width = 0.8 / len(rows)
    for k, (name, result) in enumerate(rows):
        left = x + (k - (len(rows) - 1) / 2) * width
        heights = [result["groups"][group]["fd"] for group in groups]
        bars = ax.bar(left, heights, width, label=disk.in_figure(name))
        # three digits at least; an exponent would be wider than a bar
        written = [f"{h:.3g}" if h < 100 else f"{h:.0f}" for h in heights]
        ax.bar_label(bars, written, fontsize=7, padding=2,      # readable also on a line
                     bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    for i, floor in enumerate(floors.values()):
        label = "real against real" if i == 0 else None         # once in the legend
        ax.hlines(floor, i - 0.45, i + 0.45, "black", "dashed", label=label)
    ax.set_yscale("log")
    ax.set_xticks(x, [disk.in_figure(group) for group in groups])
    ax.spines[["top", "right"]].set_visible(False)


def demo_figure(rows, path):
    """Write a PNG with one panel per guidance strength."""
    plt = disk.pyplot()
    floors = {group: part["floor"] for group, part in rows[0][1]["groups"].items()}
    strengths = guidance_strengths(rows)
    size = (5.2 * len(strengths), 3.8)
    fig, axes = plt.subplots(1, len(strengths), figsize=size, sharey=True, squeeze=False,
                             constrained_layout=True)
    for ax, strength in zip(axes[0], strengths):
        panel = [(name, r) for name, r in rows if r["settings"]["guidance"] == strength]
        draw_groups(ax, panel, floors)
        ax.set_title(f"guidance {strength:g}")
    axes[0, 0].set_ylabel("FD (classifier features), lower is better")
    axes[0, 0].legend(fontsize=8)
    disk.save_figure(fig, path)


def read_pair(general, full, rows):
    """(two Samples, the record of their training data) of --pair: theta_g's and theta's.

    They must be of these branches and of a checkpoint of the rows, and have the same classes and
    noise, image by image. Raises UserError.
    """
    images_g, labels_g, record_g = read_samples(general, "--pair")
    images, labels, record = read_samples(full, "--pair")
    settings_g = {**record_g["settings"], "branch": None}
    settings = {**record["settings"], "branch": None}
    branches = [r["settings"].get("branch") for r in (record_g, record)]
    if branches != ["general", "full"]:
        raise UserError(f"--pair {general} {full}: give samples of --branch general, then those of "
                        "the full network")
    if "class_names" not in record_g.get("data", {}) or labels_g is None:
        raise UserError(f"--pair {general}: without labels or the names of their classes; "
                        "run sample.py again")
    if settings_g != settings or not np.array_equal(labels_g, labels):
        raise UserError("--pair: "
                        "the two files were not sampled with the same settings and noise")
    measured = {checkpoint_of(result) for _, results in rows for result in results} - {None}
    if measured and settings.get("ckpt_sha256", next(iter(measured))) not in measured:
        raise UserError(f"--pair {full}: of a checkpoint that no row has; give the samples of one "
                        "of them")
    guidance = f"guidance {settings['guidance']:g}" if "guidance" in settings else "same settings"
    columns = [figures.Samples(f"theta_g alone, {guidance}", images_g, labels_g),
               figures.Samples("theta = theta_g + BA, the same noise", images, labels)]
    return columns, record_g["data"]


def samples_of(name, result):
    """(Samples, the record of their training data) of what a result measured, or None.

    None where it measured no labelled file of sample.py, or that file is not there. Raises
    UserError where the samples have been made again since.
    """
    settings = result["settings"]
    if "samples" not in settings:
        return None
    npz = Path(settings["samples"])
    if npz.is_dir():
        npz = npz / "samples.npz"
    measured = settings.get("samples_sha256")
    if measured and npz.is_file() and disk.sha256(npz) != measured:
        raise UserError(f"--row {name}: {npz} is not what was measured; run evaluate.py again")
    if not npz.is_file():
        return None
    images, labels, record = read_samples(npz, "--row")
    if labels is None or "class_names" not in record.get("data", {}):
        return None
    return figures.Samples(" ".join(name.split()), images, labels), record["data"]


def pair_part(pair, path):
    """The page's part with --pair's picture, which is written to `path`; none without --pair.

    pair: what read_pair returned, or None.
    """
    if pair is None:
        return []
    columns, data = pair
    figures.write(columns, data["class_names"], data.get("class_counts"), path, across=6)
    return ["## Samples of theta_g and of theta from the same noise\n\n"
            f"![theta_g and theta]({path.name})\n"]


def samples_by_strength(rows):
    """{guidance strength: {name: what samples_of returns}} of rows, (name, result) of each."""
    return {strength: {name: samples_of(name, r) for name, r in rows
                       if r["settings"].get("guidance") == strength}
            for strength in guidance_strengths(rows)}


def sample_pages(by_strength, folder, stem="samples"):
    """A picture for each guidance strength, methods side by side; the page's parts that show them.

    by_strength: see samples_by_strength. Named, not shown: methods whose samples are not there, or
    are of other training images or another size than the first one's.
    """
    parts = []
    for strength, found in by_strength.items():
        known = [pair for pair in found.values() if pair]
        if not known:
            continue
        first, data = known[0]
        shown = {name: pair[0] for name, pair in found.items()
                 if pair and pair[0].images.shape[1:] == first.images.shape[1:]
                 and all(pair[1].get(key) == data.get(key) for key in figures.DATA)}
        file = f"{stem}-{strength:g}.png"
        figures.write(list(shown.values()), data["class_names"], data.get("class_counts"),
                      folder / file)
        parts.append(f"## Samples, guidance {strength:g}\n\n![one class per row]({file})\n")
        missing = [escaped(name) for name in found if name not in shown]
        if missing:
            parts.append(f"Not shown: {', '.join(missing)} (no samples here, or of other training "
                         "images).\n")
    return parts


def has_demo_numbers(rows):
    """Whether the demo's table and figure can be made: one result a row, with all their numbers."""
    groups = rows[0][1][0]["groups"].keys()

    def has_them(result):
        parts = [result, *result["groups"].values()]
        return ("guidance" in result["settings"] and result["groups"].keys() == groups
                and all({"floor", "fd", "accuracy"} <= part.keys() for part in parts))
    return bool(groups) and all(len(results) == 1 and has_them(results[0]) for _, results in rows)


def demo_page(args, given):
    """Write the demo's page; returns its table."""
    rows = [(name, results[0]) for name, results in given]
    for strength in guidance_strengths(rows):       # a name has a row at each strength
        refuse_one_name_twice([name for name, r in rows if r["settings"]["guidance"] == strength])
    page = Path(args.out)
    folder = page.parent
    table = demo_table(rows)
    one_guidance = len(guidance_strengths(rows)) == 1
    # What may be refused comes before what is written
    pair = read_pair(*args.pair, given) if args.pair else None
    samples = samples_by_strength(rows)
    demo_figure(rows, folder / "groups.png")
    parts = [
        "# Samples per group\n",
        conditions_of(rows, with_guidance=one_guidance) + "\n",
        table + "\n",
        "FD is a Frechet distance in the features of a small classifier, not FID. "
        "Real against real compares the halves of the reference, each class halved; "
        "with half as many images, it lies above the distance of perfect samples. "
        "Accuracy is the share of samples "
        "that the classifier takes for the class asked for.\n",
        "![FD per group](groups.png)\n",
        *pair_part(pair, folder / "theta_g_theta.png"),
        *sample_pages(samples, folder),
    ]
    write_page(page, "\n".join(parts), "Samples per group", given)
    return table


# --------------------------------------------------------------------------------------------------

def make_parser():
    """The flags."""
    parser = Parser(__doc__)
    parser.add_argument("--row", action="append", required=True, metavar="NAME=FILE",
                        help="a row of the table; repeatable")
    parser.add_argument("--pair", nargs=2, metavar=("GENERAL", "FULL"),
                        help="samples.npz of theta_g and of theta")
    parser.add_argument("--paper", metavar="TABLE",
                        help="make this table of the paper: table2, fig4b, ... "
                        "(see paper_results.json)")
    parser.add_argument("--setting",
                        help="the data set and its ratio, for example cifar100-ir100: "
                        "which of the paper's numbers are shown beside the rows' (default: none)")
    parser.add_argument("--out", default="out/report.md",
                        help="the page; beside it go its pictures, and the same as one .html file "
                        "(default: out/report.md)")
    return parser


def is_page(path):
    """Whether a file may be a page of ours: HTML, or a title and the commands behind it."""
    text = Path(path).read_bytes()
    return text.startswith((b"<!doctype html>", b"# Samples per group\n")) or (
        text.startswith(b"# ") and COMMANDS.encode() in text)


def main():
    """Make the page that the flags ask for."""
    parser = make_parser()
    args = parser.parse_args()
    runtime.refuse_processes("-m pages.report")
    rows = [read_row(text) for text in args.row]
    refuse_other_conditions(rows)
    if args.setting and not args.paper:
        raise UserError("--setting: belongs to --paper; leave it out")
    if Path(args.out).suffix.lower() in (".png", ".pdf", ".html"):
        raise UserError(f"--out {args.out}: what goes beside the page has such names; name a .md "
                        "file")
    for path in (Path(args.out), Path(args.out).with_suffix(".html")):
        disk.check_writable(path)
        disk.refuse_overwriting(path, is_page, "--out", "a page")
    is_demo = not args.paper and has_demo_numbers(rows)
    table = demo_page(args, rows) if is_demo else table_page(args, rows)
    print(f"{table}\nwrote {Path(args.out)}, {Path(args.out).with_suffix('.html').name}")


if __name__ == "__main__":
    run(main)
