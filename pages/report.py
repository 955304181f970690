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

# In this file a column is a text such as "fid", "Few fid" or "Male fid": a metric, and before it a
# group or a class; neither for all images.


class Row(NamedTuple):
    """A row of the table."""
    name: str
    results: list       # what evaluate.py or classify.py wrote, a dict per seed
    missing: list       # files that are not there

    @property
    def first(self):
        """The result of the first seed."""
        return self.results[0]

    @property
    def guidance(self):
        """The guidance strength of its samples; None without samples or without results."""
        return self.first["settings"].get("guidance") if self.results else None


def settings_of(result):
    """Everything that makes a result another experiment's, but for its groups."""
    return {**result["settings"], "num": result["num"]}


def measure_of(result):
    """In which features, and against which images, a result was measured."""
    s = result["settings"]
    return {"distance": next((key for key in ("fid", "fd") if key in result), "none"),
            "features": s.get("features"), "content of features": s.get("features_sha256"),
            "reference": s.get("reference"), "real images": result["num_real"],
            "content of them": s.get("reference_sha256", s.get("test_sha256"))}


def read_rows(texts):
    """The Rows of "NAME=FILE,FILE" texts, where a FILE may have wildcards.

    Raises UserError for a row that has other experiments than seeds of one, or that was not
    measured as the first one.
    """
    rows = []
    for text in texts:
        name, files = named(text, "--row")
        row = Row(name, [], [])
        rows.append(row)
        for pattern in filter(None, files.split(",")):
            paths = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
            row.results.extend(disk.read_json(path) for path in paths)
            if not paths:
                row.missing.append(pattern)
        for result in row.results:
            if not (isinstance(result, dict)
                    and {"settings", "groups", "num_real"} <= result.keys()):
                raise UserError(f"--row {text}: not a result of evaluate.py or classify.py")
            if found := differences(settings_of(row.first), settings_of(result)):
                raise UserError(f"--row {name}: its files are no seeds of one experiment, they "
                                f"differ in {in_words(found)}; give each its own row")
            first = next(other for other in rows if other.results)
            if found := differences(measure_of(first.first), measure_of(result)):
                raise UserError(f"--row {name}: measured otherwise than {first.name}: "
                                f"{in_words(found)}; measure alike, or make a page for each")
    if not any(row.results for row in rows):
        raise UserError(f"--row {texts[0]}: there are no such files; run evaluate.py first")
    return rows


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
    if metric == "accuracy" and value is not None and {"fid", "fd"} & result.keys():
        return 100 * value      # evaluate.py's is a share, classify.py's in per cent
    return value


def floor_of(result, column):
    """The column's distance of real images from real ones; None without, or of another metric."""
    return value_of(result, column.replace("fid", "floor")) if column.endswith("fid") else None


def strengths_of(rows):
    """The guidance strengths of the rows, rising."""
    return sorted({row.guidance for row in rows if row.guidance is not None})


def label_of(rows, row):
    """A row's name, with its guidance where the rows have several."""
    several = row.guidance is not None and len(strengths_of(rows)) > 1
    return f"{row.name}, guidance {row.guidance:g}" if several else row.name


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
    row = dict(zip(paper["columns"], paper["rows"].get(name, []))) if paper else {}
    value = row.get(column)     # a mean, or [mean, deviation]
    return None if value is None else Number(*np.ravel(value))


def show(number, column):
    """A Number as text; "-" for None."""
    if number is None:
        return "-"
    digits = digits_of(column)
    std = "" if number.std is None else f" ± {number.std:.{digits}f}"
    return f"{number.mean:.{digits}f}{std}"


def results_table(rows, columns, paper):
    """Markdown: each row's numbers, each with the paper's beside it if paper is not None.

    Rows without results say that they failed.
    """
    first = next(row.first for row in rows if row.results)
    seeds = [[str(len(row.results))] * bool(row.results)
             + [f"{len(row.missing)} failed"] * bool(row.missing) for row in rows]
    # By columns: the head, real against real, each row
    table = [["", "real against real", *(escaped(row.name) for row in rows)],
             ["seeds", "", *map(", ".join, seeds)]]
    if len(strengths_of(rows)) > 1:
        table.append(["guidance", "", *("-" if row.guidance is None else f"{row.guidance:g}"
                                        for row in rows)])
    for column in columns:
        floor = floor_of(first, column)
        table.append([title_of(first, column),
                      "" if floor is None else show(Number(floor), column)])
        numbers = [over_seeds(row.results, column) for row in rows]
        # With the digits that are shown: what looks equal is equal
        means = [number and round(number.mean, digits_of(column)) for number in numbers]
        best = sorted({mean for mean in means if mean is not None},
                      reverse=is_higher_better(column))
        marks = dict(zip(best[:-1], ("**", "*")))       # of two, one is marked
        for number, mean in zip(numbers, means):
            mark = marks.get(mean, "")
            table[-1].append(mark + show(number, column) + mark)
        if paper:
            table.append(["paper", "", *(show(paper_number(paper, row.name, column), column)
                                         for row in rows)])
    head, floors, *lines = zip(*table)
    return markdown_table(head, [floors, *lines] if any(floors[1:]) else lines)


def compared_with(name):
    """The names of the rows that a row is compared with; [] for none.

    With CM, X of "X + CM" and of "CM on X", OC of "CM", "OC, widths" of "CM, widths": they differ
    only in having no CM. Then "X, as long", which has also been trained for as many seconds. Of
    classifiers with generated images, the one without.
    """
    plain = [] if name == NO_EXTRA else [NO_EXTRA]
    if name.endswith(" + CM"):
        other = name.removesuffix(" + CM")
    elif name.startswith("CM on "):
        other = name.removeprefix("CM on ")
    elif name == "CM" or name.startswith("CM, "):
        other = "OC" + name.removeprefix("CM")
    else:
        return plain
    return [other, f"{other}, as long", *plain]


def seeds_of(row):
    """(--seed of training, that of the noise or None) of each result of a row."""
    return [(s.get("config", s).get("seed"), s.get("seed") if "sampler" in s else None)
            for s in (result["settings"] for result in row.results)]


def pairs_of(rows):
    """[(a row, one that it is compared with)]: of one guidance, and of the same seeds, in order."""
    return [(a, b) for a in rows for name in compared_with(a.name) for b in rows
            if b.name == name and a.guidance == b.guidance and seeds_of(a) == seeds_of(b)]


def difference(row, other, column):
    """(mean, half of the 95 % t interval) of a column's paired differences; (mean, None) of one.

    None where one of them was not measured.
    """
    values = [(value_of(a, column), value_of(b, column))
              for a, b in zip(row.results, other.results)]
    if any(None in pair for pair in values):
        return None
    gains = np.array([a - b for a, b in values])
    n = len(gains)
    if n == 1:
        return gains[0], None
    return gains.mean(), float(stats.t.ppf(0.975, n - 1) * gains.std(ddof=1) / n ** 0.5)


def p_value(gain, n):
    """The two-sided p value of a `difference` over n seeds; 1 for one seed."""
    mean, half = gain
    if half is None or mean == 0:
        return 1.0
    return 2 * stats.t.sf(abs(mean) / half * stats.t.ppf(0.975, n - 1), n - 1) if half else 0.0


def holm(p):
    """Holm's corrected p values of (n,) p values (Holm, 1979)."""
    order = np.argsort(p)
    raised = np.maximum.accumulate(np.array(p)[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = raised.clip(max=1)
    return corrected


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
    lines = [[escaped(f"{row.name} against {label_of(rows, other)}"),
              *(show_difference(difference(row, other, column), column) for column in columns)]
             for row, other in pairs_of(rows) if len(row.results) > 1]
    if not lines:
        return ""
    titles = [title_of(rows[0].first, column) for column in columns]
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
    for ax, column in zip(axes.flat, columns):
        # What was not measured is NaN: no bar, no number
        numbers = [over_seeds(row.results, column) or Number(np.nan) for row in rows]
        means = np.array([number.mean for number in numbers])
        deviations = np.array([number.std for number in numbers], float)
        bars = ax.bar(range(len(rows)), means, 0.7, yerr=deviations, capsize=2)
        ax.bar_label(bars, fmt="{:.3g}", fontsize=7, padding=1)
        ax.margins(y=0.1)       # room for the number above the highest bar
        for i, row in enumerate(rows):
            if theirs := paper_number(paper, row.name, column):
                ax.plot(i, theirs.mean, "kD", markersize=4, markerfacecolor="white")
        ax.set_xticks(range(len(rows)), [label_of(rows, row) for row in rows],
                      rotation=40, ha="right", fontsize=8)
        if floor := floor_of(rows[0].first, column):
            ax.axhline(floor, color="black", linestyle="dashed")
        known = means[~np.isnan(means)]
        if known.size and known.max() > 20 * known.min() > 0:
            ax.set_yscale("log")
        better = "higher" if is_higher_better(column) else "lower"
        ax.set(title=title_of(rows[0].first, column), ylabel=f"{better} is better")
    for ax in axes.flat[len(columns):]:
        ax.remove()
    # About ten characters to an inch
    fig.suptitle(textwrap.fill(title, round(10 * size[0])))
    disk.save_figure(fig, path, ("png", "pdf"))


def conditions_of(rows):
    """How the first row's numbers were made, and in what other rows differ."""
    told = {"guidance"} if len(strengths_of(rows)) > 1 else set()       # a column of the table
    first = rows[0].first
    s = {key: value for key, value in first["settings"].items() if key not in told}
    against = f"{first['num_real']:,} real images ({s.get('reference')})"
    text = f"{first['num']:,} images against {against}."
    order = "by size" if s.get("trained_on") else "in the order of their numbers"
    rule = f"thirds of the classes, {order}"
    if "sampler" in s:
        seeds = ", ".join(dict.fromkeys(str(noise) for _, noise in seeds_of(rows[0])))
        text = (f"{s['dataset']}; {sampling_in_words(s)}, noise of seed {seeds}; {first['num']:,} "
                f"class-balanced samples against {against}.")
    elif "epochs" in s:         # a classifier of classify.py
        length = f"{s['epochs']} epochs" if s["epochs"] else f"{s['steps']} steps"
        drawn = f"IR {s['ir']:g}" if s["ir"] > 1 else "every image"
        text = (f"{s['dataset']}, {drawn}, {length}, per cent on {first['num_real']:,} test "
                "images.")
        rule = "over 100, 20 to 100, under 20 training images"
    if first["groups"]:
        text += f" Many / Medium / Few: {rule}."
    differing = []
    for row in rows[1:]:
        found = differences(settings_of(first), settings_of(row.first))
        words = [f"{key} {value}" for key, (_, value) in found.items()
                 if key not in told and value is not None]
        if lacking := [key for key, (_, value) in found.items() if value is None]:
            words.append(f"without {', '.join(lacking)}")
        if words:
            differing.append(f"{escaped(row.name)} ({escaped(', '.join(words))})")
    return f"{text} Differs: {'; '.join(dict.fromkeys(differing))}." if differing else text


def notes_of(rows, columns, paper):
    """The sentences above the table: what its numbers are, and what they are not."""
    results = [result for row in rows for result in row.results]
    notes = [conditions_of(rows),
             "Mean ± standard deviation over seeds; best in bold, second best in italics."]
    if paper:
        notes += ["Beside each number is the paper's; in the figure it is a diamond.",
                  paper.get("note", "")]
    if "fd" in results[0]:
        notes.append("FD and KD are distances in other features than Inception's, not FID and KID: "
                     "do not compare them with the paper's numbers. Accuracy is the per cent of "
                     "the samples that the classifier takes for the class asked for.")
    if any(min(r["num"], r["num_real"]) < FEW for r in results if {"fid", "fd"} & r.keys()):
        notes.append(f"With fewer than {FEW:,} images on a side, Frechet distances are too high "
                     "and Inception scores too low: they compare at equal counts only.")
    if any(floor_of(results[0], column) for column in columns):
        notes.append("Real against real compares the halves of the reference, each class halved; "
                     "with half as many images, it lies above the distance of perfect samples. In "
                     "the figure it is the dashed line.")
    notes += dict.fromkeys(text for r in results for text in r.get("warnings", ()))
    return " ".join(filter(None, notes))


def commands_part(rows):
    """The page's part with the commands behind each row's first file."""
    lines = [f"{command}    # {row.name}" for row in rows
             for command in (row.first["settings"].get("command"), row.first.get("command"))
             if command]
    text = "\n".join(dict.fromkeys(lines))
    return f"## The first seed's commands\n\n```bash\n{text}\n```"


def picture_part(title, columns, path, across):
    """Write the picture of {name: Samples}, a row per class; the page's part with it."""
    data = next(iter(columns.values())).data
    shown = {name: (c.images, c.labels) for name, c in columns.items()}
    disk.write_png(path, grid_image(shown, data["class_names"], data.get("class_counts"),
                                    across=across))
    return f"## {title}\n\n![{title}]({path.name})"


def pair_part(files, out):
    """The page's part with --pair's two files. Raises UserError."""
    general, full = (read_column(file, "--pair") for file in files)
    if (general.settings.get("branch") != "general"
            or {**general.settings, "branch": "full"} != full.settings):
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
        found = {row.name: samples_of(row.first) for row in rows if row.guidance == strength}
        first = next(filter(None, found.values()), None)
        shown = {name: c for name, c in found.items() if c and fit_together(first, c)}
        if shown:
            parts.append(picture_part(f"Samples, guidance {strength:g}", shown,
                                      out.with_name(f"{out.stem}-samples-{strength:g}.png"), 4))
            if missing := [escaped(name) for name in found if name not in shown]:
                parts.append(f"Not shown: {', '.join(missing)} (no samples here, or of other "
                             "training images).")
    return parts


def demo_summary(rows):
    """What the first three rows say: a baseline, CM on it, CM's theta_g alone. Three sentences.

    One run against one: the paired differences of the demo's seeds have a standard deviation of
    20 % on Few, so that one below 40 % says nothing.
    """
    title = title_of(rows[0].first, "fid")
    said, ratios = [], []
    for words, group in (("Rare classes (Few)", "Few"), ("Frequent classes (Many)", "Many")):
        without, with_cm, general = (over_seeds(row.results, f"{group} fid").mean
                                     for row in rows[:3])
        ratios.append(general / with_cm)
        change = with_cm / without - 1
        if abs(change) < 0.4:
            shown = "a single run cannot show a difference below 40 %"
        else:
            better = "lower, which is better" if change < 0 else "higher, which is worse"
            shown = f"{abs(change):.0%} {better}; another seed may say otherwise"
        said.append(f"{words}: {title} {with_cm:.1f} with CM, {without:.1f} without: {shown}.")
    few, many = ratios
    holds = "holds more" if few > 1.15 * max(1, many) else "does not hold more"
    said.append(f"Without the reserved part, CM's {title} is {few:.1f} times as large on Few and "
                f"{many:.1f} times on Many: that part {holds} of the rare classes than of the "
                "frequent ones.")
    return said


def seconds_per_step(row):
    """The median over the training logs of a row's runs; None where they are not there."""
    found = []
    for settings in (result["settings"] for result in row.results):
        log = Path(settings.get("ckpt", "")).with_name("log.jsonl")
        lines = map(json.loads, log.read_text().splitlines()) if log.is_file() else []
        found += [settings["config"]["batch_size"] / line["images_per_s"] for line in lines
                  if line.get("images_per_s")]
    return float(np.median(found)) if found else None


def verdict(rows):
    """What each of pairs_of shows, per group: a sentence for each, with what a step of CM cost.

    A difference is said to be better or worse where its p value is below 0.05, corrected for the
    number of differences in the sentence (Holm): of twenty sentences on methods that are equal, one
    says so by chance.
    """
    first = rows[0].first
    metric, overall = ("fid", "fid") if {"fid", "fd"} & first.keys() else ("accuracy", "recall")
    columns = [*(f"{part} {metric}" for part in first["groups"] or first["classes"]), overall]
    said = []
    for row, other in pairs_of(rows):
        n = len(row.results)
        gains = {column: gain for column in columns
                 if (gain := difference(row, other, column)) is not None}
        found = {"better": [], "worse": [], "no difference shown": []}
        for (column, gain), p in zip(gains.items(), holm([p_value(g, n) for g in gains.values()])):
            kind = "no difference shown"
            if p < 0.05:
                kind = "better" if (gain[0] > 0) == is_higher_better(column) else "worse"
            title = ("overall " if column == "fid" else "") + title_of(first, column)
            found[kind].append(f"{title} {show_difference(gain, column)}")
        how = "" if metric == "accuracy" else ", as many steps"
        if other.name.endswith(", as long"):
            with_cm, without = seconds_per_step(row), seconds_per_step(other)
            how = (f" (a step takes {with_cm:.3g} s with CM and {without:.3g} s without, "
                   f"{with_cm / without:.2f} times as long)" if with_cm and without else "")
        seeds = f"{n} seeds" if n > 1 else "one seed, which decides nothing"
        words = "; ".join(f"{kind}: {', '.join(texts)}" for kind, texts in found.items() if texts)
        said.append(f"{row.name} against {other.name}{how}, {seeds}: {words}.")
    missing = [f"{name} ({why})" for name, why in first.get("left_out", {}).items()
               if name in ("Many", "Medium", "Few") or not first["groups"]]
    return said + [f"Not measured: {', '.join(missing)}."] * bool(said and missing)


def copies_in_words(path, rows):
    """What copies.json of probes.copies shows: of Few, or of all where there are no groups.

    The criterion holds for some images that are new, so that unseen real ones say how many are
    expected; more is a share that exceeds theirs by two standard errors. Raises UserError.
    """
    found = (disk.read_json(path) or {}).get("rows")
    if not found:
        raise UserError(f"--copies {path}: not a copies.json of probes.copies")
    real = found.pop("real, not in the training set", None)
    group = "Few" if all("Few" in result["features"] for result in found.values()) else "all"
    expected = real["features"].get(group) if real else None
    runs = {Path(row.first["settings"].get("ckpt", "")).parent: row.name for row in rows}
    words = []
    for file, result in found.items():
        name = next((name for run, name in runs.items() if run in Path(file).parents), None)
        if not name:
            continue
        share, n = result["features"][group], result["num"][group]
        text = f"{share:.0%} of {n:,} samples of {name}"
        if expected is not None:
            m = real["num"][group]
            error = (share * (1 - share) / n + expected * (1 - expected) / m) ** 0.5
            text += ", more" if share - expected > 2 * error else ", not more"
        words.append(text)
    if expected is not None:
        words.append(f"expected are {expected:.0%}, as of {real['num'][group]:,} real images that "
                     "were not trained on")
    else:
        words.append("without test images nothing says how many to expect")
    return (f"Images of {'Few' if group == 'Few' else 'all classes'} that are nearer to a training "
            f"image than any other training image is, as copies are: {'; '.join(words)}.")


def summary(rows, copies):
    """The sentences of --summary; copies: the file of --copies, or None."""
    if rows[-1].first["settings"].get("branch") == "general":
        return demo_summary(rows) if len(rows) > 2 else []      # else one has failed
    said = verdict(rows)
    if copies and Path(copies).is_file():
        said.append(copies_in_words(copies, rows))
    return said


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

    firsts = [row.first for row in rows]
    groups = dict.fromkeys(g for first in firsts for g in first["groups"] or first["classes"])

    def is_known(column):
        return any(value_of(first, column) is not None for first in firsts)
    metrics = ["fid", "kid", "is", "recall", "precision", "density", "coverage", "accuracy"]
    by_group = next((metric for metric in metrics for group in groups
                     if is_known(f"{group} {metric}")), "accuracy")
    columns = [*(f"{group} {by_group}" for group in groups), *metrics,
               *(f"{group} accuracy" for group in groups)]
    return "Results", list(filter(is_known, dict.fromkeys(columns))), None


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
                        help="copies.json of probes.copies: --summary then says whether images are "
                        "copies")
    parser.add_argument("--picture", action="append", default=[], metavar="TITLE=FILE",
                        help="a picture that is shown below the others; repeatable")
    parser.add_argument("--paper", metavar="TABLE",
                        help="one of the paper's tables in paper_results.json: table2, fig4b, ...")
    parser.add_argument("--setting",
                        help="the data set and its ratio, for example cifar100-ir100: "
                        "shows the paper's numbers beside the rows' (default: none)")
    parser.add_argument("--out", default="out/report.md",
                        help="the page, Markdown; beside it go its pictures, and the same as one "
                        ".html file (default: out/report.md)")
    return parser


def main():
    """Make the page that the flags ask for."""
    args = make_parser().parse_args()
    if args.setting and not args.paper:
        raise UserError("--setting: belongs to --paper; leave it out")
    given = read_rows(args.row)
    rows = [row for row in given if row.results]
    out = Path(args.out)
    pair = [pair_part(args.pair, out)] if args.pair else []
    title, columns, paper = columns_of(args, rows)
    tables = list(filter(None, [results_table(given, columns, paper),
                                paired_differences(rows, columns)]))
    results_figure(rows, columns, paper, title, out)
    said = summary(rows, args.copies) if args.summary else []
    pictures = [named(text, "--picture") for text in args.picture]
    files = [file for file in [args.copies, *(file for _, file in pictures)] if file]
    lost = [file for file in files if not Path(file).is_file()]
    page.write(out, "\n\n".join(filter(None, [
        f"# {title}",
        "\n".join(f"- {line}" for line in said),
        notes_of(rows, columns, paper),
        *tables,
        f"![the table as bars]({out.stem}.png)",
        *pair,
        *samples_parts(rows, out),
        *(f"## {name}\n\n![{name}]({os.path.relpath(file, out.parent)})"
          for name, file in pictures if file not in lost),
        commands_part(rows)])) + "\n")
    print("\n\n".join(tables), *said, sep="\n")
    print(f"wrote {out}, {out.with_suffix('.html').name}")
    if lost:
        raise UserError(f"--picture, --copies: not on the page, since there is no {lost[0]}")
    if failed := [row for row in given if row.missing]:
        names = ", ".join(row.name for row in failed)
        files = ", ".join(file for row in failed for file in row.missing)
        raise UserError(f"--row {names}: shown as failed, since there is no {files}")


if __name__ == "__main__":
    run(main)
