"""Turn the JSON files of evaluate.py into a page: one table, one figure, the samples side by side.

    python -m pages.report --out out/demo/report.md --row DDPM=out/demo/ddpm/samples/eval.json \\
        --row CM=... --pair out/demo/cm/samples-general/samples.npz out/demo/cm/samples/samples.npz
    python -m pages.report --paper table2 --setting cifar100-ir100 \\
        --row "CM=out/paper/cm-seed*/eval.json" --row ...

Each number is the mean ± standard deviation over a row's files (one per seed). --pair shows samples
of theta_g and of theta from the same noise, side by side (Fig. G.4). For pictures alone see
figures.py.

--paper makes one of the paper's tables, with the paper's number beside each of ours
(paper_results.json). The best is in bold, the second best in italics. The page also says in which
settings rows differ, and lists the commands behind each row. The files of one row may differ in
seeds and paths only.
"""
import glob
import json
import os
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

import disk
from evaluate import FEW
from metrics.scores import KID_SIZE
from pages import page
from pages.figures import fit_together, read_column
from pages.page import differences, escaped, in_words, markdown_table, named
from runtime import Parser, UserError, run
from sample import grid_image, sampling_in_words

PAPER = Path(__file__).with_name("paper_results.json")
HIGHER_IS_BETTER = {"recall", "precision", "density", "coverage", "is", "accuracy"}
DIGITS = {"fid": 3, "kid": 4}       # after the point, as in the paper; else two
IN_CAPITALS = {"fid", "kid", "fd", "kd", "is"}
CLASSIFIER_KEYS = {"fid": "fd", "kid": "kd"}        # in a classifier's features
NO_EXTRA = "No augmentation"        # Table G.8's row without generated images
MEANS_NOTE = "Mean ± standard deviation over seeds; best in bold, second best in italics."
CLASSIFIER_NOTE = (
    "FD and KD are distances in other features than Inception's, not FID and KID: do not compare "
    "them with the paper's numbers. Accuracy is the per cent of the samples that the classifier "
    "takes for the class asked for.")
FEW_NOTE = (
    f"With fewer than {FEW:,} images on a side, Frechet distances are too high and Inception "
    "scores too low: they compare at equal counts only.")
FLOOR_NOTE = (
    "Real against real compares the halves of the reference, each class halved; with half as many "
    "images, it lies above the distance of perfect samples. In the figure it is the dashed line.")

# In this file a row is (name, results): results is a list of what evaluate.py or classify.py
# wrote, one dict per seed. A column is a text such as "fid", "Few fid" or "Male fid": a metric, and
# before it a group or a class; neither for all images.


def read_row(text):
    """(name, results, files that are not there) from "NAME=FILE,FILE"; a FILE may have wildcards.

    Raises UserError.
    """
    name, files = named(text, "--row")
    results = []
    missing = []
    for pattern in filter(None, files.split(",")):
        paths = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
        if not paths:
            missing.append(pattern)
        results += [disk.read_json(path) for path in paths]
    for result in results:
        if not isinstance(result, dict) or not {"settings", "groups", "num_real"} <= result.keys():
            raise UserError(f"--row {text}: not a result of evaluate.py or classify.py")
    for result in results[1:]:
        if found := differences(*(settings_of(r) for r in (results[0], result))):
            raise UserError(f"--row {name}: its files are no seeds of one experiment, they differ "
                            f"in {in_words(found)}; give each its own row")
    return name, results, missing


def settings_of(result):
    """Everything that makes a result another experiment's, but for its groups."""
    return {**result["settings"], "num": result["num"]}


def refuse_other_measures(rows):
    """Raise UserError for a row that was measured in other features or on other images."""
    def measure(result):
        s = result["settings"]
        return {"distance": next((key for key in ("fid", "fd") if key in result), "none"),
                "features": s.get("features"), "content of features": s.get("features_sha256"),
                "reference": s.get("reference"), "real images": result["num_real"],
                "content of them": s.get("reference_sha256", s.get("test_sha256"))}
    first_name, (first, *_) = rows[0]
    for name, results in rows:
        for result in results:
            if found := differences(measure(first), measure(result)):
                raise UserError(f"--row {name}: measured otherwise than {first_name}: "
                                f"{in_words(found)}; measure alike, or make a page for each")


def what_differs(rows, told):
    """In which settings rows differ from the first one; "" for none.

    told: settings that the page says elsewhere.
    """
    (_, (first, *_)), *others = rows
    lines = []
    for name, (result, *_) in others:
        found = differences(settings_of(first), settings_of(result))
        words = [f"{key} {value}" for key, (_, value) in found.items()
                 if key not in told and value is not None]
        if lacking := [key for key, (_, value) in found.items() if value is None]:
            words.append(f"without {', '.join(lacking)}")
        if words:
            lines.append(f"{escaped(name)} ({escaped(', '.join(words))})")
    return f"Differs: {'; '.join(dict.fromkeys(lines))}." if lines else ""


# --------------------------------------------------------------------------------------------------
# The numbers of a table: means over seeds, the paper's, differences

class Number(NamedTuple):
    """A mean, and the standard deviation over seeds or None where there is one seed."""
    mean: float
    std: float | None = None


def key_of(result, column):
    """The key of a column's metric in a result: "fid", or "fd" of a classifier."""
    metric = column.split()[-1]
    return metric if "fid" in result else CLASSIFIER_KEYS.get(metric, metric)


def title_of(result, column):
    """A column's title: "Few FID"."""
    key = key_of(result, column)
    return " ".join([*column.split()[:-1], key.upper() if key in IN_CAPITALS else key])


def value_of(result, column):
    """A column's number in a result, or None where it was not measured.

    A KID of smaller subsets than the protocol's is another number, and counts as not measured.
    """
    group, _, metric = column.rpartition(" ")
    part = {**result["classes"], **result["groups"]}.get(group, {}) if group else result
    if metric == "kid" and part.get("kid_subset_size", KID_SIZE) < KID_SIZE:
        return None
    value = part.get(key_of(result, column))
    # evaluate.py's accuracy is a share, classify.py's in per cent
    is_share = metric == "accuracy" and value is not None and {"fid", "fd"} & result.keys()
    return 100 * value if is_share else value


def floor_of(result, column):
    """The column's distance of real images from real ones; None without, or of another metric."""
    return value_of(result, column.replace("fid", "floor")) if column.endswith("fid") else None


def strengths_of(rows):
    """The guidance strengths of the rows, rising."""
    return sorted({r["settings"]["guidance"] for _, results, *_ in rows for r in results[:1]
                   if "guidance" in r["settings"]})


def label_of(rows, name, results):
    """A row's name, with its guidance where the rows have several."""
    strength = results[0]["settings"].get("guidance")
    several = strength is not None and len(strengths_of(rows)) > 1
    return f"{name}, guidance {strength:g}" if several else name


def digits_of(column):
    """How many digits after the point a column's numbers have."""
    return DIGITS.get(column.split()[-1], 2)


def is_higher_better(column):
    """Whether a column's best number is the highest one."""
    return column.split()[-1] in HIGHER_IS_BETTER


def over_seeds(results, column):
    """The Number of a column over a row's results; None for none, or where one of them lacks it."""
    values = [value_of(result, column) for result in results]
    if None in values or not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Number(float(np.mean(values)), std)


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


def show(number, column):
    """A Number as text; "-" for None."""
    if number is None:
        return "-"
    digits = digits_of(column)
    std = "" if number.std is None else f" ± {number.std:.{digits}f}"
    return f"{number.mean:.{digits}f}{std}"


def as_shown(number, column):
    """The mean of a Number with the digits that it is shown with: what looks equal is equal."""
    return round(number.mean, digits_of(column))


def results_table(rows, columns, paper):
    """Markdown: each row's numbers, each with the paper's beside it if paper is not None.

    rows: what read_row gives; those without results say that they failed.
    """
    first = next(results[0] for _, results, _ in rows if results)
    numbers = {(k, column): over_seeds(results, column)
               for k, (_, results, _) in enumerate(rows) for column in columns}
    marks = {}
    for column in columns:
        means = {as_shown(numbers[k, column], column) for k in range(len(rows))
                 if numbers[k, column]}
        ordered = sorted(means, reverse=is_higher_better(column))
        if len(ordered) > 1:
            marks[column, ordered[0]] = "**"
        if len(ordered) > 2:
            marks[column, ordered[1]] = "*"

    guided = len(strengths_of(rows)) > 1
    head = ["", "seeds", *(["guidance"] if guided else [])]
    floors = ["real against real", *[""] * (len(head) - 1)]
    for column in columns:
        floor = floor_of(first, column)
        head += [title_of(first, column), *(["paper"] if paper else [])]
        floors += ["" if floor is None else show(Number(floor), column), *([""] if paper else [])]
    lines = [floors] if any(floors[1:]) else []
    for k, (name, results, missing) in enumerate(rows):
        seeds = [str(len(results))] * bool(results) + [f"{len(missing)} failed"] * bool(missing)
        line = [escaped(name), ", ".join(seeds)]
        if guided:
            line += [f"{s:g}" for s in strengths_of([rows[k]])] or ["-"]
        for column in columns:
            number = numbers[k, column]
            mark = marks.get((column, as_shown(number, column)), "") if number else ""
            line.append(mark + show(number, column) + mark)
            if paper:
                line.append(show(paper_number(paper, name, column), column))
        lines.append(line)
    return markdown_table(head, lines)


def compared_with(name):
    """The names of the rows that a row is compared with; [] for none.

    With CM, X of "X + CM" and of "CM on X", OC of "CM", "OC, widths" of "CM, widths": they differ
    only in having no CM. Then "X, as long", which has also been trained for as many seconds. Of
    classifiers with generated images, the one without.
    """
    other = None
    if name.endswith(" + CM"):
        other = name.removesuffix(" + CM")
    elif name.startswith("CM on "):
        other = name.removeprefix("CM on ")
    elif name == "CM" or name.startswith("CM, "):
        other = "OC" + name.removeprefix("CM")
    plain = [] if name == NO_EXTRA else [NO_EXTRA]
    return [other, f"{other}, as long", *plain] if other else plain


def seeds_of(results):
    """(--seed of training, that of the noise or None) of each result."""
    every = [r["settings"] for r in results]
    return [(s.get("config", s).get("seed"), s.get("seed") if "sampler" in s else None)
            for s in every]


def pairs_of(rows):
    """[(a row, one that it is compared with)]: of one guidance and of the same seeds.

    The seeds are those of training and of sampling, in the order of the rows' files.
    """
    return [(a, b) for a in rows for name in compared_with(a[0]) for b in rows if b[0] == name
            and strengths_of([a]) == strengths_of([b]) and seeds_of(a[1]) == seeds_of(b[1])]


def difference(results, others, column):
    """(mean, half of the 95 % t interval) of a column's paired differences; (mean, None) of one.

    None where one of them was not measured.
    """
    values = [(value_of(a, column), value_of(b, column)) for a, b in zip(results, others)]
    if any(None in pair for pair in values):
        return None
    gains = np.array([a - b for a, b in values])
    n = len(gains)
    if n == 1:
        return gains[0], None
    return gains.mean(), float(stats.t.ppf(0.975, n - 1) * gains.std(ddof=1) / n ** 0.5)


def show_difference(found, column):
    """A difference as text, with its interval; "-" for None."""
    if found is None:
        return "-"
    mean, half = found
    digits = digits_of(column)
    interval = "" if half is None else f" ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"
    return f"{mean:+.{digits}f}{interval}"


def paired_differences(rows, columns):
    """Markdown: the differences of pairs_of, over two seeds at least; "" if there are none."""
    lines = [[escaped(f"{name} against {label_of(rows, other, others)}"),
              *(show_difference(difference(results, others, column), column) for column in columns)]
             for (name, results), (other, others) in pairs_of(rows) if len(results) > 1]
    if not lines:
        return ""
    titles = [title_of(rows[0][1][0], column) for column in columns]
    return markdown_table(["difference (95 % interval)", *titles], lines)


# --------------------------------------------------------------------------------------------------
# The parts of a page

def results_figure(rows, columns, paper, title, path):
    """Write a PNG and a PDF: one panel per FID column, or per column if there are none.

    A bar per row, with the deviation over seeds; the paper's numbers as diamonds, the distance of
    real images as a dashed line.
    """
    plt = disk.pyplot()
    columns = [column for column in columns if column.endswith("fid")] or columns
    across = min(2, len(columns))
    down = -(-len(columns) // across)
    size = (across * (2 + 0.4 * len(rows)), 3.2 * down)
    fig, axes = plt.subplots(down, across, figsize=size, squeeze=False, constrained_layout=True)
    names = [label_of(rows, *row) for row in rows]
    x = np.arange(len(rows))
    for ax, column in zip(axes.flat, columns):
        numbers = [over_seeds(results, column) for _, results in rows]
        heights = [number.mean if number else np.nan for number in numbers]
        errors = [number.std if number and number.std is not None else np.nan for number in numbers]
        bars = ax.bar(x, heights, 0.7, yerr=errors, capsize=2)
        labels = [f"{number.mean:.3g}" if number else "" for number in numbers]
        ax.bar_label(bars, labels, fontsize=7, padding=1)
        ax.margins(y=0.1)       # room for the number above the highest bar
        for i, (name, _) in enumerate(rows):
            if theirs := paper_number(paper, name, column):
                ax.plot(i, theirs.mean, "kD", markersize=4, markerfacecolor="white")
        ax.set_xticks(x, names, rotation=40, ha="right", fontsize=8)
        if floor := floor_of(rows[0][1][0], column):
            ax.axhline(floor, color="black", linestyle="dashed")
        means = [number.mean for number in numbers if number]
        if means and max(means) > 20 * min(means) > 0:
            ax.set_yscale("log")
        better = "higher" if is_higher_better(column) else "lower"
        ax.set(title=title_of(rows[0][1][0], column), ylabel=f"{better} is better")
    for ax in axes.flat[len(columns):]:
        ax.remove()
    # About ten characters to an inch
    fig.suptitle(textwrap.fill(title, round(10 * size[0])))
    disk.save_figure(fig, path, ("png", "pdf"))


def conditions_of(rows):
    """How the first row's numbers were made, and in what other rows differ."""
    told = {"guidance"} if len(strengths_of(rows)) > 1 else set()       # a column of the table
    result = rows[0][1][0]
    s = {key: value for key, value in result["settings"].items() if key not in told}
    against = f"{result['num_real']:,} real images ({s.get('reference')})"
    text = f"{result['num']:,} images against {against}."
    if "sampler" in s:
        seeds = ", ".join(dict.fromkeys(str(noise) for _, noise in seeds_of(rows[0][1])))
        text = (f"{s['dataset']}; {sampling_in_words(s)}, noise of seed {seeds}; {result['num']:,} "
                f"class-balanced samples against {against}.")
    elif "epochs" in s:         # a classifier of classify.py
        length = f"{s['epochs']} epochs" if s["epochs"] else f"{s['steps']} steps"
        text = (f"{s['dataset']}, IR {s['ir']:g}, {length}, per cent on "
                f"{result['num_real']:,} test images; Many / Medium / Few: over 100, 20 to 100, "
                "under 20 training images.")
    return " ".join(filter(None, [text, what_differs(rows, told)]))


def commands_part(rows):
    """The page's part with the commands behind each row's first file."""
    lines = [f"{command}    # {name}" for name, (first, *_) in rows
             for command in (first["settings"].get("command"), first.get("command")) if command]
    text = "\n".join(dict.fromkeys(lines))
    return f"## The first seed's commands\n\n```bash\n{text}\n```\n"


def picture_part(title, columns, path, across):
    """Write the picture of {name: Samples}, a row per class; the page's part with it."""
    data = next(iter(columns.values())).data
    shown = {name: (c.images, c.labels) for name, c in columns.items()}
    disk.write_png(path, grid_image(shown, data["class_names"], data.get("class_counts"),
                                    across=across))
    return f"## {title}\n\n![{title}]({path.name})\n"


def pair_part(files, out):
    """The page's part with --pair's two files. Raises UserError."""
    general, full = (read_column(file, "--pair") for file in files)
    branches = [column.settings.get("branch") for column in (general, full)]
    one = [{**column.settings, "branch": None} for column in (general, full)]
    if branches != ["general", "full"] or one[0] != one[1]:
        raise UserError(f"--pair {' '.join(files)}: give samples of --branch general, then those "
                        "of the full network with the same settings and noise")
    return picture_part("Samples of theta_g and of theta from the same noise", {
        f"theta_g alone, guidance {full.settings.get('guidance', 0):g}": general,
        "theta = theta_g + BA, the same noise": full}, out.with_name(f"{out.stem}-pair.png"), 6)


def samples_of(result):
    """The Samples that a result measured; None where they are not there, or were made again."""
    npz = Path(result["settings"].get("samples", ""))
    npz = npz / "samples.npz" if npz.is_dir() else npz
    if not npz.is_file() or disk.sha256(npz) != result["settings"].get("samples_sha256"):
        return None
    return read_column(npz, "--row")


def samples_parts(rows, out):
    """The page's parts with the samples of the rows side by side, for each guidance strength.

    Named, not shown: rows whose samples are not there, or do not fit those of the first one.
    """
    parts = []
    for strength in strengths_of(rows):
        found = {name: samples_of(r) for name, (r, *_) in rows
                 if r["settings"].get("guidance") == strength}
        first = next(filter(None, found.values()), None)
        shown = {name: c for name, c in found.items() if c and fit_together(first, c)}
        if shown:
            parts.append(picture_part(f"Samples, guidance {strength:g}", shown,
                                      out.with_name(f"{out.stem}-samples-{strength:g}.png"), 4))
            if missing := [escaped(name) for name in found if name not in shown]:
                parts.append(f"Not shown: {', '.join(missing)} (no samples here, or of other "
                             "training images).\n")
    return parts


def demo_summary(rows):
    """What the first three rows say: a baseline, CM on it, CM's theta_g alone. Three sentences.

    One run against one: the paired differences of the demo's seeds have a standard deviation of
    20 % on Few, so that one below 40 % says nothing.
    """
    metric = "fd" if "fd" in rows[0][1][0] else "fid"

    def of(group, k):
        return over_seeds(rows[k][1], f"{group} {metric}").mean

    def compared(group):
        change = of(group, 1) / of(group, 0) - 1
        if abs(change) < 0.4:
            return "a single run cannot show a difference below 40 %"
        words = "lower, which is better" if change < 0 else "higher, which is worse"
        return f"{abs(change):.0%} {words}; another seed may say otherwise"
    few, many = (of(group, 2) / of(group, 1) for group in ("Few", "Many"))
    holds = "holds more" if few > 1.15 * max(1, many) else "does not hold more"
    return [
        *(f"{words}: {metric.upper()} {of(group, 1):.1f} with CM, {of(group, 0):.1f} without: "
          f"{compared(group)}."
          for words, group in (("Rare classes (Few)", "Few"), ("Frequent classes (Many)", "Many"))),
        f"Without the reserved part, CM's {metric.upper()} is {few:.1f} times as large on Few and "
        f"{many:.1f} times on Many: that part {holds} of the rare classes than of the frequent "
        "ones."]


def seconds_per_step(results):
    """The median over the training logs of a row's runs; None where they are not there."""
    found = []
    for settings in (result["settings"] for result in results):
        log = Path(settings.get("ckpt", "")).with_name("log.jsonl")
        lines = map(json.loads, log.read_text().splitlines()) if log.is_file() else []
        found += [settings["config"]["batch_size"] / line["images_per_s"] for line in lines
                  if line.get("images_per_s")]
    return float(np.median(found)) if found else None


def verdict(rows):
    """What each of pairs_of shows, per group: a sentence for each, with what a step of CM cost.

    A difference is said to be better or worse where its 95 % interval excludes zero.
    """
    first = rows[0][1][0]
    metric, overall = ("fid", "fid") if {"fid", "fd"} & first.keys() else ("accuracy", "recall")
    columns = [*(f"{part} {metric}" for part in first["groups"] or first["classes"]), overall]
    said = []
    for (name, results), (other, others) in pairs_of(rows):
        found = {"better": [], "worse": [], "no difference shown": []}
        for column in columns:
            gain = difference(results, others, column)
            if gain is None:
                continue
            mean, half = gain
            shown = half is not None and abs(mean) > half
            title = ("" if column != "fid" else "overall ") + title_of(first, column)
            kind = "better" if (mean > 0) == is_higher_better(column) else "worse"
            found[kind if shown else "no difference shown"].append(
                f"{title} {show_difference(gain, column)}")
        how = "" if metric == "accuracy" else ", as many steps"
        if other.endswith(", as long"):
            how = ""
            with_cm, without = seconds_per_step(results), seconds_per_step(others)
            if with_cm and without:
                how += (f" (a step takes {with_cm:.3g} s with CM and {without:.3g} s without, "
                        f"{with_cm / without:.2f} times as long)")
        n = len(results)
        seeds = f"{n} seeds" if n > 1 else "one seed, which decides nothing"
        words = "; ".join(f"{kind}: {', '.join(texts)}" for kind, texts in found.items() if texts)
        said.append(f"{name} against {other}{how}, {seeds}: {words}.")
    return said


def copies_in_words(path, rows):
    """What copies.json of probes.copies shows: of Few, or of all where there are no groups.

    The criterion holds for some images that are new, so that unseen real ones say how many are
    expected; more is a share that exceeds theirs by two standard errors. Raises UserError.
    """
    found = (disk.read_json(path) or {}).get("rows")
    if not found:
        raise UserError(f"--copies {path}: not a copies.json of probes.copies")
    runs = {Path(results[0]["settings"].get("ckpt", "")).parent: name for name, results in rows}
    real = found.get("real, not in the training set")
    words = []
    for file, result in found.items():
        name = next((name for run, name in runs.items() if run in Path(file).parents), None)
        group = "Few" if "Few" in result["features"] else "all"
        if not name:
            continue
        share, n = result["features"][group], result["num"][group]
        text = f"{share:.0%} of {n:,} samples of {name}"
        if real and group in real["features"]:
            expected, m = real["features"][group], real["num"][group]
            error = (share * (1 - share) / n + expected * (1 - expected) / m) ** 0.5
            text += ", more" if share - expected > 2 * error else ", not more"
        words.append(text)
    if real and group in real["features"]:
        words.append(f"expected are {expected:.0%}, as of {m:,} real images that were not trained "
                     "on")
    return (f"Images of {'Few' if group == 'Few' else 'all classes'} that are nearer to a training "
            f"image than any other training image is, as copies are: {'; '.join(words)}.")


def summary(rows, copies):
    """The sentences of --summary; copies: the file of --copies, or None."""
    if rows[-1][1][0]["settings"].get("branch") == "general":
        return demo_summary(rows) if len(rows) > 2 else []      # else one has failed
    said = verdict(rows)
    if copies and Path(copies).is_file():
        said.append(copies_in_words(copies, rows))
    return said


# --------------------------------------------------------------------------------------------------
# A table of the paper's, or of rows of one's own: means over seeds

def columns_of(args, rows):
    """(title, columns, the paper's numbers or None) of the table. Raises UserError.

    With --paper the paper's columns; without it every metric that a first file has, and the groups,
    or without groups the classes, in the first metric that they have and in accuracy.
    """
    if args.paper:
        tables = disk.read_json(PAPER)["tables"]
        if args.paper not in tables:
            raise UserError(f"--paper {args.paper}: choose one of {', '.join(tables)}")
        table = tables[args.paper]
        paper = table["settings"].get(args.setting)
        columns = (paper or next(iter(table["settings"].values())))["columns"]
        if not paper and columns[0] == "Female fid":    # Table 4; other sets have other classes
            columns = ["Many fid", "Medium fid", "Few fid", "fid"]
        return ": ".join(filter(None, [table["title"], args.setting])), columns, paper

    firsts = [results[0] for _, results in rows]
    groups = list(dict.fromkeys(group for first in firsts
                                for group in first["groups"] or first["classes"]))

    def known(columns):
        return [c for c in columns if any(value_of(first, c) is not None for first in firsts)]
    metrics = known(["fid", "kid", "is", "recall", "precision", "density", "coverage",
                     "accuracy"])
    by_metric = [known(f"{group} {metric}" for group in groups) for metric in metrics]
    columns = [*next(filter(None, by_metric), []), *metrics,
               *known(f"{group} accuracy" for group in groups)]
    return "Results", list(dict.fromkeys(columns)), None


# --------------------------------------------------------------------------------------------------

def make_parser():
    """The flags."""
    parser = Parser(__doc__)
    parser.add_argument("--row", action="append", required=True, metavar="NAME=FILE,FILE",
                        help="a row of the table, with a file per seed; repeatable")
    parser.add_argument("--pair", nargs=2, metavar=("GENERAL", "FULL"),
                        help="samples.npz of theta_g and of theta")
    parser.add_argument("--summary", action="store_true",
                        help="say first, in sentences, whether CM helped, and what it cost; of a "
                        "baseline, CM, and CM's theta_g alone: what the reserved part holds")
    parser.add_argument("--copies", metavar="FILE",
                        help="with --summary: copies.json of probes.copies, to say whether images "
                        "are copied")
    parser.add_argument("--picture", action="append", default=[], metavar="TITLE=FILE",
                        help="a picture that is shown below the others; repeatable")
    parser.add_argument("--paper", metavar="TABLE",
                        help="make this table of the paper: table2, fig4b, ... "
                        "(see paper_results.json)")
    parser.add_argument("--setting",
                        help="the data set and its ratio, for example cifar100-ir100: "
                        "which of the paper's numbers are shown beside the rows' (default: none)")
    parser.add_argument("--out", default="out/report.md",
                        help="the page, Markdown; beside it go its pictures, and the same as one "
                        ".html file (default: out/report.md)")
    return parser


def main():
    """Make the page that the flags ask for."""
    args = make_parser().parse_args()
    if args.setting and not args.paper:
        raise UserError("--setting: belongs to --paper; leave it out")
    given = [read_row(text) for text in args.row]
    rows = [(name, results) for name, results, _ in given if results]
    if not rows:
        raise UserError(f"--row {args.row[0]}: there are no such files; run evaluate.py first")
    refuse_other_measures(rows)
    out = Path(args.out)
    pair = [pair_part(args.pair, out)] if args.pair else []
    title, columns, paper = columns_of(args, rows)
    notes = [conditions_of(rows), MEANS_NOTE]
    if paper:
        notes += ["Beside each number is the paper's; in the figure it is a diamond.",
                  paper.get("note", "")]
    if "fd" in rows[0][1][0]:
        notes.append(CLASSIFIER_NOTE)
    if any(min(r["num"], r["num_real"]) < FEW for _, results in rows for r in results
           if {"fid", "fd"} & r.keys()):
        notes.append(FEW_NOTE)
    if any(floor_of(rows[0][1][0], column) for column in columns):
        notes.append(FLOOR_NOTE)
    notes += dict.fromkeys(text for _, results in rows for result in results
                           for text in result.get("warnings", ()))
    table = "\n\n".join(filter(None, [results_table(given, columns, paper),
                                      paired_differences(rows, columns)]))
    results_figure(rows, columns, paper, title, out)
    said = summary(rows, args.copies) if args.summary else []
    pictures = [named(text, "--picture") for text in args.picture]
    files = [args.copies] * bool(args.copies) + [file for _, file in pictures]
    lost = [file for file in files if not Path(file).is_file()]
    page.write(out, "\n".join([
        f"# {title}\n",
        *(f"- {line}" for line in said), "",
        " ".join(filter(None, notes)) + "\n",
        table + "\n",
        f"![the table as bars]({out.stem}.png)\n",
        *pair,
        *samples_parts(rows, out),
        *(f"## {name}\n\n![{name}]({os.path.relpath(file, out.parent)})\n"
          for name, file in pictures if file not in lost),
        commands_part(rows)]))
    print("\n".join([table, *said, f"wrote {out}, {out.with_suffix('.html').name}"]))
    if lost:
        raise UserError(f"--picture, --copies: not on the page, since there is no {lost[0]}")
    if failed := [name for name, _, missing in given if missing]:
        files = ", ".join(file for _, _, missing in given for file in missing)
        raise UserError(f"--row {', '.join(failed)}: shown as failed, since there is no {files}")


if __name__ == "__main__":
    run(main)
