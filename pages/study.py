"""The human study of Sec. G.4, Table G.7: whose images look more real to people, a's or b's?

    python -m pages.study make --a DDPM=out/ddpm/samples --b CM=out/cm/samples --real DIR
    python -m pages.study tally out/study/answers/*.json      # Table G.7, with intervals

`make` writes study.html, one file that needs no network: ten real images of a class, below them one
image of each model in random order, in --groups questions, and --catch more in which one of the two
is real. What is which stands in key.json only, which stays with you. Every evaluator gets the
questions in another order, and at the end saves the answers as a JSON file. `tally` reads those:
counts per evaluator, the share of b with an exact binomial interval and with one that respects
evaluators, their agreement, the sides they chose, and the same without those who missed real
images. A study of 30 questions takes an evaluator five minutes.
"""
import hashlib
import json
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

import disk
import runtime
from data import class_groups, load, to_rgb
from pages.figures import fit_together, read_column
from pages.page import differences, escaped, in_words, markdown_table, named, png_uri
from runtime import Parser, UserError, integer, number, run, seed_of
from sample import chosen_classes
from sets.readers import READERS

FOLDER = Path(__file__).parent
SIDES = ("left", "right")
RESAMPLES = 10_000          # of the evaluators, for the interval that respects them


# --------------------------------------------------------------------------------------------------
# make

def draw_questions(args, sets, class_names, rng):
    """{id: question} of a study, in the page's order. Raises UserError for too few images.

    sets: {"a", "b", "real": (images, {class name: rows})}. A question: its "class"; "left" and
    "right", keys of sets; their "rows", and those of the images that are said to be real. The
    classes take turns; each image is shown once to choose from, and a real one that is, is shown as
    a real one nowhere.
    """
    unused = {(which, name): rng.permutation(rows.get(name, [])).tolist()
              for name in class_names for which, (_, rows) in sets.items()}

    def take(which, name, n):
        rows = unused[which, name]
        if len(rows) < n:
            raise UserError(f"--{which}: too few images of class {name} for this study; take more "
                            "images, fewer --groups or more --classes")
        unused[which, name] = rows[n:]
        return rows[:n]

    def balanced(n):
        return rng.permutation((np.arange(n) + rng.integers(2)) % 2 == 0).tolist()
    kinds = [("a", "b")] * args.groups + [("ab"[j % 2], "real") for j in range(args.catch)]
    turns = [class_names[i % len(class_names)] for i in range(len(kinds))]
    pairs = [[(which, *take(which, name, 1)) for which in kind] for kind, name in zip(kinds, turns)]
    found = []
    for name, pair, swap in zip(turns, pairs, balanced(args.groups) + balanced(args.catch)):
        rows = unused["real", name] = rng.permutation(unused["real", name]).tolist()
        shown = take("real", name, args.num_real)
        unused["real", name] = rows             # they may be shown beside other questions as well
        left, right = pair[::-1] if swap else pair
        found.append((rng.bytes(6).hex(), {
            "class": name, "left": left[0], "right": right[0],
            "rows": {"real": shown, "left": left[1], "right": right[1]}}))
    return dict(found[i] for i in rng.permutation(len(found)))


def real_images(args, size):
    """The ImageSet of --real, of `size` pixels a side: a data set, or a folder of class folders."""
    name, folder = (args.real, args.data_dir) if args.real in READERS else ("folder", args.real)
    found = load(name, folder, resolution=size if READERS[name].files else None,
                 pack_dir=args.pack_dir)
    if found.images.shape[1] != size:
        raise UserError(f"--real {args.real}: images of {found.images.shape[1]} pixels a side, and "
                        f"those of --a have {size}; the size would say which is real")
    return found


def make_parser():
    """The flags of the command make."""
    parser = Parser("python -m pages.study make --a DDPM=A/samples --b CM=B/samples --real DIR")
    parser.add_argument("--a", required=True, metavar="NAME=SAMPLES",
                        help="one model's images: a samples.npz of sample.py, or its folder; "
                        "the baseline, as in the paper")
    parser.add_argument("--b", required=True, metavar="NAME=SAMPLES",
                        help="the other model's images: its share of the trials is counted")
    parser.add_argument("--real", required=True, metavar="DIR",
                        help="real images: a folder with one sub-folder per class, or a data set, "
                        f"one of {', '.join(READERS)}")
    parser.add_argument("--data-dir", default="data",
                        help="where the data set of --real is (default: data)")
    parser.add_argument("--pack-dir", help="where its packed arrays go (default: as data.py)")
    parser.add_argument("--classes",
                        help="numbers, ranges or names: 6-9 or 0,3,cat (default: those of Few)")
    parser.add_argument("--groups", type=integer(1, 1000), default=30,
                        help="questions that compare the two, over all classes in turn (default: "
                        "30; the paper's evaluators answered 20 to 36)")
    parser.add_argument("--catch", type=integer(0, 1000), default=5,
                        help="more questions, of a real image and a generated one (default: 5)")
    parser.add_argument("--num-real", type=integer(1, 100), default=10,
                        help="real images beside each question (default: 10, the paper's)")
    parser.add_argument("--seed", type=integer(0), default=0,
                        help="of the images and of their order (default: 0)")
    parser.add_argument("--out", default="out/study",
                        help="folder of study.html and key.json (default: out/study)")
    return parser


def main_make(argv):
    """Write study.html and key.json."""
    args = make_parser().parse_args(argv)
    out = Path(args.out)
    models, about = {}, {}
    for which, text in (("a", args.a), ("b", args.b)):
        name, file = named(text, f"--{which}")
        models[which] = read_column(file, f"--{which}")
        about[which] = {"name": name, "samples": file,
                        "npz_sha256": disk.sha256(models[which].file),
                        "settings": models[which].settings}
    a, b = models.values()
    if not fit_together(a, b):
        raise UserError(f"--b {args.b}: images of another size than those of --a, which would say "
                        "which is which, or its network was trained on other data")
    size = a.images.shape[1]
    real = real_images(args, size)
    groups = class_groups(a.data.get("class_counts") or [])
    classes = groups["Few"] if groups and args.classes is None else chosen_classes(args, a.data)
    class_names = [a.data["class_names"][c] for c in dict.fromkeys(classes)]

    def rows_of(labels, names):
        return {name: np.flatnonzero(labels == c) for c, name in enumerate(names)}
    sets = {"a": (a.images, rows_of(a.labels, a.data["class_names"])),
            "b": (b.images, rows_of(b.labels, b.data["class_names"])),
            "real": (real.images, rows_of(real.labels, real.class_names))}
    # Not from the seed alone: who has the page and this code, but not the images, cannot draw it
    hashes = [about[which]["npz_sha256"] for which in "ab"]
    rng = np.random.default_rng(seed_of(args.seed, "study", *hashes))
    questions = draw_questions(args, sets, class_names, rng)

    def uri(which, row):
        return png_uri(to_rgb(sets[which][0][[row]])[0])
    shown = [{"id": name, "class": q["class"],
              "real": [uri("real", row) for row in q["rows"]["real"]],
              **{side: uri(q[side], q["rows"][side]) for side in SIDES}}
             for name, q in questions.items()]
    study = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]
    old = disk.read_json(out / "key.json")
    if old is not None and old.get("study") != study:
        raise UserError(f"--out {out}: holds the key of another study, whose answers could be "
                        "tallied no more; choose another folder")
    data = json.dumps({"id": study, "size": size, "questions": shown})
    text = (FOLDER / "study.html").read_text(encoding="utf-8")
    disk.write_json(out / "key.json", {
        "kind": "study key", "study": study, "command": runtime.command_line("-m pages.study"),
        "seed": args.seed, "real": args.real, "classes": class_names, **about,
        "questions": questions})
    disk.write_text(out / "study.html", text.replace("STUDY", data.replace("<", "\\u003c")))
    print(f"wrote {out / 'study.html'}: {args.groups} questions on {', '.join(class_names)} and "
          f"{args.catch} catch trials, for the evaluators; and {out / 'key.json'}, which says what "
          "is which: keep it to yourself")
    print(f"settings of {about['a']['name']} / {about['b']['name']} that differ: "
          f"{in_words(differences(a.settings, b.settings)) or 'none'}")


# --------------------------------------------------------------------------------------------------
# tally: the numbers

def read_evaluator(path, key, least):
    """(the evaluator's id, choices, counts) of a file that the page saved. Raises UserError.

    choices: {question: "a" or "b"}, of the questions that compare the two. counts: in how many of
    these each was chosen, and the image at the left; in how many catch trials the real one, and
    whether that is the share `least`; the median time of an answer.
    """
    answers = disk.read_json(path)
    if not isinstance(answers, dict) or answers.get("kind") != "study answers":
        raise UserError(f"tally {path}: there are no answers of a study's page; leave it out")
    side = {answer["question"]: answer.get("side") for answer in answers["answers"]}
    if answers["study"] != key["study"] or side.keys() != key["questions"].keys():
        raise UserError(f"tally {path}: answers to another study than that of --key, or not all of "
                        "them; leave it out")
    chosen = {q: said[side[q]] for q, said in key["questions"].items()}
    catch = [q for q, said in key["questions"].items() if "real" in (said["left"], said["right"])]
    choices = {q: which for q, which in chosen.items() if q not in catch}
    votes = [*choices.values()]
    passed = sum(chosen[q] == "real" for q in catch)
    who = answers["evaluator"]
    return who["id"], choices, {
        "name": " ".join(who["name"].split()) or who["id"][:6],
        "a": votes.count("a"), "b": votes.count("b"),
        "left": sum(side[q] == "left" for q in choices),
        "passed": passed, "catch": len(catch), "careful": passed >= least * len(catch),
        "seconds": float(np.median([answer["seconds"] for answer in answers["answers"]]))}


def exact_interval(k, n):
    """The 95 % interval of a share k / n by Clopper and Pearson, as (low, high)."""
    low, high = binomtest(k, n).proportion_ci(0.95, "exact")
    return float(low), float(high)


def interval_over(counts, totals):
    """The 95 % percentile interval of sum(counts) / sum(totals), evaluators drawn with replacement.

    counts, totals: of each evaluator. None for fewer than two. With few evaluators it is too
    narrow, as every bootstrap is.
    """
    n = len(counts)
    if n < 2:
        return None
    rows = np.random.default_rng(seed_of(0, "evaluators")).integers(n, size=(RESAMPLES, n))
    shares = np.asarray(counts)[rows].sum(1) / np.asarray(totals)[rows].sum(1)
    return tuple(float(x) for x in np.quantile(shares, [0.025, 0.975]))


def agreement(choices):
    """How far evaluators agree, whose choices are {question: "a" or "b"}; None of fewer than two.

    "pairs": P, the mean agreement of two evaluators on a question. "fleiss_kappa":
    (P - P_e) / (1 - P_e), P_e what the overall shares of a and b give by chance; None where all
    chose the same everywhere.
    """
    n = len(choices)
    if n < 2:
        return None
    b = np.array([sum(mine[q] == "b" for mine in choices) for q in choices[0]])
    P = float(np.mean((b * (b - 1) + (n - b) * (n - b - 1)) / (n * (n - 1))))
    share = float(b.sum() / (n * len(b)))
    P_e = share ** 2 + (1 - share) ** 2
    return {"pairs": P, "fleiss_kappa": (P - P_e) / (1 - P_e) if P_e < 1 else None}


def share_of(evaluators):
    """The share of b of the pooled trials, with both intervals and the p value of no preference.

    evaluators: dicts with the counts "a" and "b".
    """
    counts = [e["b"] for e in evaluators]
    totals = [e["a"] + e["b"] for e in evaluators]
    k, n = sum(counts), sum(totals)
    return {"evaluators": len(counts), "trials": n, "b": k, "share": k / n,
            "exact": exact_interval(k, n), "over_evaluators": interval_over(counts, totals),
            "p": float(binomtest(k, n).pvalue)}


# --------------------------------------------------------------------------------------------------
# tally: the page

def percent(share):
    """A share as "70.56 %"."""
    return f"{100 * share:.2f} %"


def to(interval):
    """An interval of shares in per cent, as "63.9 to 76.6"; "-" for None."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else "-"


def tally_page(result, key, least):
    """The Markdown page of a study; the paper's counts beside its own."""
    names = {which: escaped(key[which]["name"]) for which in "ab"}
    each = result["evaluators"]
    table = disk.read_json(FOLDER / "paper_results.json")["not_measured_here"]["tableG7"]
    paper = {name: counts[:-1]
             for name, counts in table["settings"]["artbench10-ir100"]["rows"].items()}
    width = max(len(each), *map(len, paper.values()))
    counts = {**{name: [e[which] for e in each] for which, name in names.items()},
              **{f"the paper's {name}": of_paper for name, of_paper in paper.items()}}
    counts_table = markdown_table(
        ["", *(f"Eval. {k + 1}" for k in range(width)), "Overall"],
        [[name, *row, *[""] * (width - len(row)), sum(row)] for name, row in counts.items()])

    in_paper = [{"a": ddpm, "b": cm} for ddpm, cm in zip(*paper.values())]
    shares = {"all evaluators": result["all"],
              f"those who passed {100 * least:g} % of the catch trials": result["careful"],
              "the paper: CM, against DDPM": share_of(in_paper)}
    shares_table = markdown_table(
        ["", "evaluators", "trials", names["b"], "share (exact 95 % interval)",
         "95 % over evaluators", "p of no preference"],
        [[words, s["evaluators"], s["trials"], s["b"],
          f"{percent(s['share'])} ({to(s['exact'])})", to(s["over_evaluators"]), f"{s['p']:.2g}"]
         if s else [words, 0, *["-"] * 5] for words, s in shares.items()])

    people_table = markdown_table(
        ["", "trials", names["b"], "left side", "catch trials passed",
         "seconds per answer (median)"],
        [[f"Eval. {k}: {escaped(e['name'])}", e["a"] + e["b"], percent(e["b"] / (e["a"] + e["b"])),
          percent(e["left"] / (e["a"] + e["b"])),
          f"{e['passed']} of {e['catch']}{'' if e['careful'] else ', **careless**'}",
          f"{e['seconds']:.1f}"] for k, e in enumerate(each, 1)])

    agree, left = "it needs two evaluators.", result["left"]
    if both := result["agreement"]:
        kappa = both["fleiss_kappa"]
        kappa = "not defined, since all chose the same" if kappa is None else f"{kappa:.3f}"
        agree = (f"two evaluators chose the same image in {percent(both['pairs'])} of the cases; "
                 f"Fleiss' kappa is {kappa} (1: always, 0: as by chance).")
    return "\n\n".join([
        "# Human study (Sec. G.4, Table G.7)",
        f"In how many trials each method was preferred. Study {key['study']}: {names['a']} against "
        f"{names['b']}, classes {escaped(', '.join(key['classes']))}; real images: "
        f"{escaped(key['real'])}. Settings that differ: "
        f"{escaped(in_words(result['differ'])) or 'none'}.",
        counts_table,
        f"The share of {names['b']}. The exact interval (Clopper and Pearson) takes all trials for "
        "independent, which trials of one evaluator are not; the other draws whole evaluators with "
        "replacement, and is too narrow where they are few.",
        shares_table,
        people_table,
        f"Agreement: {agree}",
        f"Position: the left image was chosen in {percent(left['share'])} ({to(left['exact'])}) of "
        "the trials (exact 95 % interval); each method stood there in half of the questions "
        "(rounded).",
        "In a catch trial one of the two images was real, and choosing it passes."]) + "\n"


def main_tally(argv):
    """Count answers; print and write the tables."""
    parser = Parser("python -m pages.study tally out/study/answers/*.json")
    parser.add_argument("files", nargs="+", metavar="FILE",
                        help="evaluators' answers, as the page saved them")
    parser.add_argument("--key", default="out/study/key.json",
                        help="the key.json of make (default: out/study/key.json)")
    parser.add_argument("--min-catch", type=number(0, 1), default=0.8, metavar="SHARE",
                        help="of the catch trials that a careful evaluator passes (default: 0.8)")
    parser.add_argument("--out", help="folder of tally.md and tally.json (default: the key's)")
    args = parser.parse_args(argv)
    key = disk.read_json(args.key)
    if not isinstance(key, dict) or key.get("kind") != "study key":
        raise UserError(f"--key {args.key}: not the key.json that study.py make wrote")
    found = {}
    for path in args.files:
        who, choices, counts = read_evaluator(path, key, args.min_catch)
        if who in found:
            raise UserError(f"tally {path}: of the same evaluator as another file; leave one out")
        found[who] = choices, counts
    choices, evaluators = zip(*found.values())
    careful = [e for e in evaluators if e["careful"]]
    left = sum(e["left"] for e in evaluators)
    everyone = share_of(evaluators)
    result = {
        "differ": differences(key["a"]["settings"], key["b"]["settings"]),
        "evaluators": evaluators, "all": everyone,
        "careful": share_of(careful) if careful else None,
        "left": {"share": left / everyone["trials"],
                 "exact": exact_interval(left, everyone["trials"])},
        "agreement": agreement(choices)}
    text = tally_page(result, key, args.min_catch)
    out = Path(args.out or Path(args.key).parent)
    disk.write_text(out / "tally.md", text)
    disk.write_json(out / "tally.json", {
        "study": key["study"], "names": {which: key[which]["name"] for which in "ab"},
        "min_catch": args.min_catch,
        "files": {path: disk.sha256(path) for path in args.files}, **result})
    print(f"{text}\nwrote {out}: tally.md, tally.json")


def main():
    """Make or tally a study, by the first word."""
    runtime.main_of("-m pages.study", __doc__, {"make": main_make, "tally": main_tally})


if __name__ == "__main__":
    run(main)
