"""The human study of Sec. G.4, Table G.7: whose images look more real to people, a's or b's?

    python -m pages.study make --a DDPM=out/ddpm/samples --b CM=out/cm/samples --real DIR
    python -m pages.study serve --study out/study             # or hand study.html to people
    python -m pages.study tally out/study/answers/*.json      # Table G.7, with intervals

`make` writes study.html, one file that needs no network: ten real images of a class, below them one
image of each model in random order, in --groups questions, and --catch more in which one of the two
is real. What is which stands in key.json only, which stays with you. Every evaluator gets the
questions in another order; a browser keeps the answers until they are saved as a file, or sent to
`serve`. `tally` reads those files: counts per evaluator, the share of b with an exact binomial
interval and with one that respects evaluators, their agreement, the sides they chose, and the same
without those who missed real images. A study of 30 questions takes an evaluator five minutes.
"""
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

import disk
import runtime
from data import class_groups, load_reference, read_samples, resolve_classes, to_classes, to_rgb
from pages import page
from pages.page import escaped, markdown_table
from runtime import Parser, UserError, integer, number, refuse_unused, run, seed_of
from sets.packing import open_image, resize_and_crop
from sets.readers import READERS, image_folder, train_and_test_folder

PAPER = Path(__file__).with_name("paper_results.json")
SIDES = ("left", "right")
LONGEST_POST = 1 << 20      # bytes of what `serve` accepts; answers to 100 questions take 10,000
RESAMPLES = 10_000          # of the evaluators, for the interval that respects them


# --------------------------------------------------------------------------------------------------
# make: what is compared

class Model(NamedTuple):
    """One of the two models: images uint8 (N, H, W, 3), labels (N,) in the classes of a."""
    name: str
    path: Path
    images: np.ndarray
    labels: np.ndarray
    data: dict          # the record of its training set
    settings: dict      # how sample.py made the images
    sha256: str


def read_model(text, flag):
    """The Model of "PATH" or "NAME=PATH": a samples.npz of sample.py, or its folder.

    Raises UserError.
    """
    name, _, path = text.rpartition("=")
    if Path(text).exists() or not name.strip():
        name, path = flag.removeprefix("--"), text
    path = Path(path)
    if path.is_dir():
        path = path / "samples.npz"
    images, labels, record = read_samples(path, flag)
    if labels is None or "data" not in record:
        raise UserError(f"{flag} {text}: without labels or the names of their classes; run "
                        "sample.py again")
    return Model(" ".join(name.split()), path, images, labels, record["data"], record["settings"],
                 disk.sha256(path))


def read_models(args):
    """The Models of --a and --b, labels in the classes of a. Raises UserError."""
    a = read_model(args.a, "--a")
    b = read_model(args.b, "--b")
    if a.sha256 == b.sha256:
        raise UserError(f"--b {args.b}: the very images of --a; name those of another model")
    if a.name == b.name:
        raise UserError(f"--b {args.b}: both are called {a.name}; write --a NAME=... --b NAME=...")
    if a.images.shape[1:] != b.images.shape[1:]:
        sizes = [f"{m.images.shape[1]} x {m.images.shape[2]}" for m in (a, b)]
        raise UserError(f"--b {args.b}: its images have {sizes[1]} pixels, those of --a "
                        f"{sizes[0]}; the size would say which is which")
    names = a.data["class_names"]
    labels = to_classes(b.labels, b.data["class_names"], names, "--b")
    sizes = [dict(zip(m.data["class_names"], m.data.get("class_counts", []))) for m in (a, b)]
    if all(sizes) and sizes[0] != sizes[1]:
        raise UserError(f"--b {args.b}: trained on other numbers of images per class than --a; the "
                        "rare classes of one are not those of the other")
    return a, b._replace(labels=labels)


class Real(NamedTuple):
    """Real images: what they are, {class name: row numbers}, rows -> uint8 (n, H, W, 3)."""
    words: str
    rows: dict
    at: object


def read_real(args, size):
    """The Real images of --real, a folder of class folders or a data set, of `size` pixels a side.

    A file's short side is resized and its centre cropped, as for training. Raises UserError.
    """
    if args.real in READERS:
        resolution = size if READERS[args.real].files else None
        found, words = load_reference(args.real, args.data_dir, None, resolution, args.pack_dir)
        if found.images.shape[1] != size:
            raise UserError(f"--real {args.real}: its images have {found.images.shape[1]} pixels a "
                            f"side and those of --a {size}; the size would say which is real")
        words = f"{args.real}, {words}"
        labels, names = found.labels, found.class_names

        def at(rows):
            return to_rgb(found.images[rows])
    elif Path(args.real).is_dir():
        paths, labels, names = image_folder(train_and_test_folder(Path(args.real))[0], "--real")
        if labels is None:
            raise UserError(f"--real {args.real}: images without classes; put them into one "
                            "sub-folder per class")
        words = args.real

        def at(rows):
            images = [open_image(paths[row], "--real", at_least=size) for row in rows]
            return np.stack([resize_and_crop(image, size) for image in images])
    else:
        raise UserError(f"--real {args.real}: neither a folder nor a data set "
                        f"({', '.join(READERS)})")
    return Real(words, {name: np.flatnonzero(labels == c) for c, name in enumerate(names)}, at)


def classes_of(args, data):
    """The class numbers of --classes; without it those of Few, or all where there are no groups."""
    names = data["class_names"]
    if args.classes is not None:
        return list(dict.fromkeys(resolve_classes(args.classes, names)))
    groups = class_groups(data.get("class_counts") or [])
    return groups["Few"] if groups else list(range(len(names)))


# --------------------------------------------------------------------------------------------------
# make: the questions

class Question(NamedTuple):
    """Ten real images and two to choose from: rows of the sets that they are from."""
    id: str
    class_name: str
    real: list          # rows of the real images that are said to be real
    left: tuple         # ("a", "b" or "real", its row)
    right: tuple


class Pool:
    """Images of one class, as row numbers in random order; each is taken once."""

    def __init__(self, rows, words, rng):
        self.rows = rng.permutation(rows).tolist()
        self.words = words

    def take(self, n):
        """The next n rows. Raises UserError, in the pool's words, where there are fewer."""
        if n > len(self.rows):
            raise UserError(f"{self.words}; take more images, fewer --groups or more --classes")
        taken, self.rows = self.rows[:n], self.rows[n:]
        return taken


def make_pools(args, models, real, c, rng):
    """{"a", "b", "real": Pool} of class number c."""
    name = models["a"].data["class_names"][c]
    rows = {which: np.flatnonzero(m.labels == c) for which, m in models.items()}
    rows["real"] = real.rows.get(name, [])
    given = {"a": args.a, "b": args.b, "real": args.real}
    return {which: Pool(mine, f"--{which} {given[which]}: {len(mine)} images of class {name} are "
                        "too few for this study", rng) for which, mine in rows.items()}


def balanced(n, rng):
    """n booleans in random order, half of them true; of an odd number one more of either kind."""
    return rng.permutation((np.arange(n) + rng.integers(2)) % 2 == 0).tolist()


def draw_questions(args, a, b, real, classes):
    """The Questions of a study, in the page's order: a function of --seed and of both files.

    So somebody who has the page, this code and the seed, but not the models' images, cannot draw
    them again. Raises UserError where there are too few images.
    """
    rng = np.random.default_rng(seed_of(args.seed, "study", a.sha256, b.sha256))
    pools = {c: make_pools(args, {"a": a, "b": b}, real, c, rng) for c in classes}
    kinds = [("a", "b")] * args.groups + [("ab"[j % 2], "real") for j in range(args.catch)]
    turns = [classes[i % len(classes)] for i in range(len(kinds))]
    swaps = balanced(args.groups, rng) + balanced(args.catch, rng)
    pairs = [[(which, *pools[c][which].take(1)) for which in kind]
             for kind, c in zip(kinds, turns)]
    found = []
    for c, pair, swap in zip(turns, pairs, swaps):
        left, right = pair[::-1] if swap else pair
        # After all pairs: a real image of a catch trial is shown as a real one nowhere
        shown = Pool(pools[c]["real"].rows, pools[c]["real"].words, rng).take(args.num_real)
        found.append(Question(rng.bytes(6).hex(), a.data["class_names"][c], shown, left, right))
    return [found[i] for i in rng.permutation(len(found))]


def show_question(question, a, b, real):
    """What the page has of a Question: its id, its class, images as text; not which is whose."""
    sources = {"a": lambda row: a.images[row], "b": lambda row: b.images[row],
               "real": lambda row: real.at([row])[0]}
    pair = {side: page.png_uri(sources[which](row))
            for side, (which, row) in zip(SIDES, (question.left, question.right))}
    shown = [page.png_uri(image) for image in real.at(question.real)]
    return {"id": question.id, "class": question.class_name, "real": shown, **pair}


def make_study(args, a, b, real, classes):
    """(the text of study.html, the key as plain types) of a study."""
    questions = draw_questions(args, a, b, real, classes)
    shown = [show_question(question, a, b, real) for question in questions]
    size = a.images.shape[1]
    study_id = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]
    text = page.html("Which image looks more real?", page.part("study.html"),
                     page.part("study.css"), page.part("study.js"),
                     {"id": study_id, "size": size, "questions": shown})
    models = {which: {"name": m.name, "samples": str(m.path), "npz_sha256": m.sha256,
                      "settings": m.settings} for which, m in (("a", a), ("b", b))}
    real_hash = hashlib.sha256(json.dumps([q["real"] for q in shown]).encode()).hexdigest()
    key = {"format": disk.FORMAT, "kind": "study key", "study": study_id,
           "html_sha256": hashlib.sha256(text.encode()).hexdigest(),
           "command": runtime.command_line("-m pages.study"), "seed": args.seed, **models,
           "real": {"what": real.words, "shown_sha256": real_hash},
           "classes": [a.data["class_names"][c] for c in classes],
           "questions": {q.id: {"class": q.class_name, "left": q.left[0], "right": q.right[0],
                                "rows": {"real": q.real, "left": q.left[1], "right": q.right[1]}}
                         for q in questions}}
    return text, key


def refuse_other_study(out, key):
    """Raise UserError where `out` holds another study: its answers would lose their key."""
    path = Path(out) / "key.json"
    old = disk.read_json(path)
    if path.exists() and not (isinstance(old, dict) and old.get("study") == key["study"]):
        raise UserError(f"--out {out}: holds the key of another study, whose answers could be "
                        "tallied no more; choose another folder with --out")


def main_make(argv):
    """Write study.html and key.json."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.real not in READERS:
        why = "belongs to a data set, and --real is none"
        refuse_unused(parser.given, {"data_dir": why, "pack_dir": why})
    out = Path(args.out)
    for name in ("study.html", "key.json"):
        disk.check_writable(out / name)
    a, b = read_models(args)
    classes = classes_of(args, a.data)
    real = read_real(args, a.images.shape[1])
    text, key = make_study(args, a, b, real, classes)
    refuse_other_study(out, key)
    disk.write_json(out / "key.json", key)
    disk.write_text(out / "study.html", text)
    print(f"wrote {out / 'study.html'}, {len(text) / 1e6:.1f} MB: {args.groups} questions on "
          f"{', '.join(key['classes'])} and {args.catch} catch trials, for the evaluators; and "
          f"{out / 'key.json'}, which says what is which: keep it to yourself")


# --------------------------------------------------------------------------------------------------
# Keys and answers, read

def is_ours(value, kind):
    """Whether a JSON value is a dict that this script, or its page, marked as of this kind."""
    return isinstance(value, dict) and (value.get("format"), value.get("kind")) == (
        disk.FORMAT, kind)


def read_key(path, flag):
    """The key that `make` wrote. Raises UserError, which names the flag."""
    key = disk.read_json(path)
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: there is no such file; name the key.json that study.py "
                        "make wrote")
    parts = is_ours(key, "study key") and [key.get(k) for k in ("a", "b", "questions")]
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{flag} {path}: not a whole key.json of study.py make")
    return key


def what_is_wrong(answers, key):
    """Why a JSON value is not one evaluator's answers to every question of a study, or None."""
    if not is_ours(answers, "study answers") or not has_right_types(answers):
        return "not whole answers of a study's page (cut short, damaged or of another program)"
    if answers["study"] != key["study"]:
        return f"answers to the study {answers['study']}, and the key is of {key['study']}"
    ids = [answer["question"] for answer in answers["answers"]]
    twice = {i for i in ids if ids.count(i) > 1}
    if twice:
        return f"the question {min(twice)} is answered twice"
    if set(ids) - set(key["questions"]):
        return "answers to questions that the study does not have"
    if len(ids) < len(key["questions"]):
        return f"not finished: {len(ids)} of {len(key['questions'])} questions are answered"
    return None


def has_right_types(answers):
    """Whether all that is read of an evaluator's answers is there and of the right kind."""
    who = answers.get("evaluator")
    each = answers.get("answers")
    if not isinstance(who, dict) or not isinstance(each, list):
        return False
    known = (isinstance(answers.get("study"), str) and isinstance(who.get("name"), str)
             and isinstance(who.get("id"), str) and re.fullmatch("[0-9a-f]{16}", who["id"]))
    return bool(known) and all(is_answer(answer) for answer in each)


def is_answer(answer):
    """Whether this is the answer to one question."""
    if not isinstance(answer, dict):
        return False
    seconds = answer.get("seconds")
    return (isinstance(answer.get("question"), str) and answer.get("side") in SIDES
            and type(seconds) in (int, float) and 0 <= seconds < float("inf"))


def name_of(answers):
    """An evaluator's name on one line, or the beginning of the id where there is none."""
    name = "".join(c if c.isprintable() else " " for c in answers["evaluator"]["name"])
    return " ".join(name.split())[:60] or answers["evaluator"]["id"][:6]


# --------------------------------------------------------------------------------------------------
# serve

class Handler(BaseHTTPRequestHandler):
    """Gives the page, and takes answers; the server has `page`, `key`, `folder` and `lock`."""
    timeout = 60
    server_version = "study"
    sys_version = ""

    def do_GET(self):
        """The page, at "/"; there is nothing else."""
        if self.path in ("/", "/study.html"):
            self.reply(200, self.server.page, "text/html; charset=utf-8")
        else:
            self.reply(404, b"there is only / here")

    def do_POST(self):
        """Answers, as JSON: kept in the folder where they are whole."""
        length = self.headers.get("Content-Length", "")
        # A form of another site could send text, but not JSON without being asked first
        if self.path != "/answers" or self.headers.get_content_type() != "application/json":
            return self.reply(404, b"answers go to /answers, as JSON")
        if not (length.isascii() and length.isdecimal() and int(length) <= LONGEST_POST):
            return self.reply(413, b"too long")
        status, words = receive(self.rfile.read(int(length)), self.server)
        self.reply(status, words.encode())

    def reply(self, status, content, kind="text/plain; charset=utf-8"):
        """Send a whole answer."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """No line for every request."""


def receive(content, server):
    """Keep what was posted where it is whole and new: (HTTP status, words)."""
    try:
        answers = json.loads(content)
    except (ValueError, RecursionError):
        return 400, "not JSON"
    wrong = what_is_wrong(answers, server.key)
    if wrong:
        return 400, wrong
    path = server.folder / f"{answers['evaluator']['id']}.json"
    with server.lock:
        if path.exists() and disk.read_json(path) != answers:
            return 409, "this evaluator has sent other answers already"
        try:
            disk.write_json(path, answers, "--study")
        except UserError as e:
            print(e, file=sys.stderr, flush=True)
            return 500, "they could not be written"
    print(f"answers of {name_of(answers)}: {path}", flush=True)
    return 200, "kept"


def make_server(folder, host, port):
    """A server of the study in a folder. Raises UserError."""
    key = read_key(folder / "key.json", "--study")
    try:
        text = (folder / "study.html").read_bytes()
    except OSError as e:
        raise UserError(f"--study {folder}: study.html cannot be read ({e.strerror}); run study.py "
                        "make again") from e
    if hashlib.sha256(text).hexdigest() != key.get("html_sha256"):
        raise UserError(f"--study {folder}: study.html is not that of key.json; run study.py make "
                        "again")
    disk.check_writable(folder / "answers" / "answers.json", "--study")
    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError, UnicodeError, TypeError) as e:     # the last two: of names
        raise UserError(f"--host {host} --port {port}: cannot be served on ({e}); choose another "
                        "one") from e
    server.daemon_threads = True
    server.page = text
    server.key = key
    server.folder = folder / "answers"
    server.lock = threading.Lock()
    return server


def serve_until_stopped(server):
    """Answer requests until the process is interrupted."""
    server.serve_forever()


def main_serve(argv):
    """Serve the page and keep the answers until interrupted."""
    args = make_serve_parser().parse_args(argv)
    server = make_server(Path(args.study), args.host, args.port)
    address = f"http://{args.host}:{server.server_address[1]}/"
    who = "this machine" if args.host in ("127.0.0.1", "localhost") else "the network"
    print(f"{address} shows the study to {who}; answers go to {server.folder}; Ctrl-C ends it",
          flush=True)
    with server:
        serve_until_stopped(server)


# --------------------------------------------------------------------------------------------------
# tally: the numbers

class Evaluator(NamedTuple):
    """One evaluator's answers, in words of the key."""
    name: str
    chosen: dict        # {question: "a" or "b"}, of the questions that compare the two
    left: int           # how often the left one of those
    passed: int         # in how many catch trials the real image
    catch: int          # of how many
    seconds: float      # the median time of an answer

    @property
    def num_b(self):
        """In how many trials b was preferred."""
        return sum(which == "b" for which in self.chosen.values())

    def is_careful(self, least):
        """Whether at least this share of the catch trials was passed; true where there are none."""
        return self.passed >= least * self.catch


def read_evaluator(answers, key):
    """The Evaluator of whole answers."""
    side = {answer["question"]: answer["side"] for answer in answers["answers"]}
    pairs = {q: {question["left"], question["right"]} for q, question in key["questions"].items()}
    catch = [q for q, pair in pairs.items() if "real" in pair]
    others = [q for q in pairs if q not in catch]
    chosen = {q: key["questions"][q][side[q]] for q in pairs}
    return Evaluator(
        name_of(answers), {q: chosen[q] for q in others}, sum(side[q] == "left" for q in others),
        sum(chosen[q] == "real" for q in catch), len(catch),
        float(np.median([answer["seconds"] for answer in answers["answers"]])))


def exact_interval(k, n):
    """The 95 % interval of a share k / n by Clopper and Pearson, as (low, high)."""
    low, high = binomtest(k, n).proportion_ci(0.95, "exact")
    return float(low), float(high)


def interval_over(counts, totals, seed=0):
    """The 95 % percentile interval of sum(counts) / sum(totals), evaluators drawn with replacement.

    counts, totals: of each evaluator. None for fewer than two. With few evaluators it is too
    narrow, as every bootstrap is.
    """
    n = len(counts)
    if n < 2:
        return None
    rng = np.random.default_rng(seed_of(seed, "evaluators"))
    rows = rng.integers(n, size=(RESAMPLES, n))
    shares = np.asarray(counts)[rows].sum(1) / np.asarray(totals)[rows].sum(1)
    return tuple(float(x) for x in np.quantile(shares, [0.025, 0.975]))


def agreement(evaluators):
    """(mean agreement of two evaluators on a question, Fleiss' kappa), or None for fewer than two.

    kappa = (P - P_e) / (1 - P_e): P the agreement, P_e what the overall shares of a and b give by
    chance. None in place of kappa where all chose the same everywhere.
    """
    n = len(evaluators)
    if n < 2:
        return None
    questions = list(evaluators[0].chosen)
    b = np.array([sum(e.chosen[q] == "b" for e in evaluators) for q in questions])
    P = float(np.mean((b * (b - 1) + (n - b) * (n - b - 1)) / (n * (n - 1))))
    share = float(b.sum() / (n * len(questions)))
    P_e = share ** 2 + (1 - share) ** 2
    return P, (P - P_e) / (1 - P_e) if P_e < 1 else None


def share_of(counts, totals, seed=0):
    """The share of b of the pooled trials, with both intervals and the p value of no preference."""
    k, n = sum(counts), sum(totals)
    return {"evaluators": len(counts), "trials": n, "b": k, "share": k / n,
            "exact": exact_interval(k, n), "over_evaluators": interval_over(counts, totals, seed),
            "p": float(binomtest(k, n).pvalue)}


def tally(evaluators, least, seed=0):
    """All numbers of a study, as plain types. least: --min-catch."""
    def pooled(some):
        return share_of([e.num_b for e in some], [len(e.chosen) for e in some], seed)
    careful = [e for e in evaluators if e.is_careful(least)]
    trials = sum(len(e.chosen) for e in evaluators)
    left = sum(e.left for e in evaluators)
    both = agreement(evaluators)
    return {
        "evaluators": [{"name": e.name, "a": len(e.chosen) - e.num_b, "b": e.num_b,
                        "left": e.left, "passed": e.passed, "catch": e.catch,
                        "careful": e.is_careful(least), "seconds": e.seconds}
                       for e in evaluators],
        "all": pooled(evaluators), "careful": pooled(careful) if careful else None,
        "left": {"share": left / trials, "exact": exact_interval(left, trials)},
        "agreement": {"pairs": both[0], "fleiss_kappa": both[1]} if both else None}


def paper_study():
    """{method: its counts per evaluator} of Table G.7, DDPM first."""
    table = disk.read_json(PAPER)["not_measured_here"]["tableG7"]["settings"]["artbench10-ir100"]
    return {name: counts[:-1] for name, counts in table["rows"].items()}


# --------------------------------------------------------------------------------------------------
# tally: the page

def percent(share, interval=None):
    """ "70.56 %", or with an interval "70.56 % (63.9 to 76.6)"."""
    text = f"{100 * share:.2f} %"
    return f"{text} ({to(interval)})" if interval else text


def to(interval):
    """ "63.9 to 76.6", of an interval of shares in per cent."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def counts_table(result, names):
    """Table G.7: how often each method was preferred, per evaluator, and the paper's beside it."""
    each = result["evaluators"]
    theirs = paper_study()
    width = max(len(each), *map(len, theirs.values()))
    lines = [[escaped(name), *(e[which] for e in each), *[""] * (width - len(each)),
              sum(e[which] for e in each)] for which, name in names.items()]
    lines += [[f"the paper's {name}", *counts, *[""] * (width - len(counts)), sum(counts)]
              for name, counts in theirs.items()]
    return markdown_table(["", *(f"Eval. {k + 1}" for k in range(width)), "Overall"], lines)


def shares_table(result, name, least):
    """The share of b: of all evaluators, of the careful ones, and the paper's."""
    ddpm, cm = paper_study().values()
    rows = {"all evaluators": result["all"],
            f"those who passed {100 * least:g} % of the catch trials": result["careful"],
            "the paper: CM, against DDPM": share_of(cm, [a + b for a, b in zip(ddpm, cm)])}
    lines = []
    for words, s in rows.items():
        if s is None:
            lines.append([words, 0, *["-"] * 5])
            continue
        respects = to(s["over_evaluators"]) if s["over_evaluators"] else "-"
        lines.append([words, s["evaluators"], s["trials"], s["b"],
                      percent(s["share"], s["exact"]), respects, f"{s['p']:.2g}"])
    return markdown_table(["", "evaluators", "trials", escaped(name), "share (exact 95 % interval)",
                  "95 % over evaluators", "p of no preference"], lines)


def evaluators_table(result, name):
    """One line per evaluator: the share of b, of the left side, catch trials, time."""
    lines = []
    for k, e in enumerate(result["evaluators"], 1):
        n = e["a"] + e["b"]
        careless = "" if e["careful"] else ", **careless**"
        lines.append([f"Eval. {k}: {escaped(e['name'])}", n, percent(e["b"] / n),
                      percent(e["left"] / n), f"{e['passed']} of {e['catch']}{careless}",
                      f"{e['seconds']:.1f}"])
    return markdown_table(["", "trials", escaped(name), "left side", "catch trials passed",
                  "seconds per answer (median)"], lines)


def tally_page(result, key, least):
    """The Markdown page of a study."""
    names = {which: key[which]["name"] for which in "ab"}
    both = result["agreement"]
    agree = "Agreement: it needs two evaluators."
    if both:
        kappa = both["fleiss_kappa"]
        kappa = "not defined, since all chose the same" if kappa is None else f"{kappa:.3f}"
        agree = (f"Agreement: two evaluators chose the same image in {percent(both['pairs'])} of "
                 f"the cases; Fleiss' kappa is {kappa} (1: always, 0: as by chance).")
    left = result["left"]
    parts = [
        "# Human study (Sec. G.4, Table G.7)\n",
        f"In how many trials each method was preferred. Study {key['study']}: "
        f"{escaped(names['a'])} against {escaped(names['b'])}, classes "
        f"{escaped(', '.join(key['classes']))}; real images: {escaped(key['real']['what'])}.\n",
        counts_table(result, names) + "\n",
        f"The share of {escaped(names['b'])}. The exact interval (Clopper and Pearson) takes all "
        "trials for independent, which trials of one evaluator are not; the other draws whole "
        "evaluators with replacement, and is too narrow where they are few.\n",
        shares_table(result, names["b"], least) + "\n",
        evaluators_table(result, names["b"]) + "\n",
        agree + "\n",
        f"Position: the left image was chosen in {percent(left['share'], left['exact'])} of the "
        "trials (exact 95 % interval); each method stood there in half of the questions (rounded)."
        "\n",
        "In a catch trial one of the two images was real, and choosing it passes.\n"]
    return "\n".join(parts)


# --------------------------------------------------------------------------------------------------
# tally: the files

def sort_files(paths):
    """(answers' paths, keys' paths) of the files named; what an earlier tally wrote is left out."""
    answers, keys = [], []
    for path in map(Path, paths):
        value = disk.read_json(path)
        if is_ours(value, "study tally"):
            continue
        (keys if is_ours(value, "study key") else answers).append(path)
    if not answers:
        raise UserError("tally: no answers among the files named; name those that the page saved")
    return answers, keys


def find_key(args, answers, keys):
    """The path of the key: --key, one of the files named, or one beside or above the answers."""
    if args.key:
        return args.key
    around = [folder / "key.json" for folder in (answers[0].parent, answers[0].parent.parent)]
    found = keys + [path for path in around if path.is_file()]
    if not found:
        raise UserError(f"--key: there is no key.json beside {answers[0]}; name the one that "
                        "study.py make wrote")
    return found[0]


def read_answers(paths, key):
    """[answers] of the files. Raises UserError for one that is not whole, or counted twice."""
    found = {}
    for path in paths:
        answers = disk.read_json(path)
        if not path.is_file():
            raise UserError(f"tally {path}: there is no such file")
        wrong = what_is_wrong(answers, key)
        if wrong:
            raise UserError(f"tally {path}: {wrong}; leave it out, or get it again")
        refuse_second(path, answers, found)
        found[path] = answers
    return list(found.values())


def refuse_second(path, answers, found):
    """Raise UserError where an evaluator's answers are among {path: answers} already."""
    mine = answers["evaluator"]
    for other, theirs in found.items():
        if theirs["evaluator"]["id"] == mine["id"]:
            raise UserError(f"tally {path}: of the same evaluator as {other}; leave one out")
        name = name_of(answers)
        if mine["name"].strip() and name.casefold() == name_of(theirs).casefold():
            raise UserError(f"tally {path}: of {name}, as is {other}; leave one out, or, where "
                            "these are two people, change the name in one of the files")


def main_tally(argv):
    """Count answers; print and write the tables."""
    args = make_tally_parser().parse_args(argv)
    paths, keys = sort_files(args.files)
    key_path = Path(find_key(args, paths, keys))
    key = read_key(key_path, "--key")
    out = Path(args.out or key_path.parent)
    for name in ("tally.md", "tally.json"):
        disk.check_writable(out / name)
    evaluators = [read_evaluator(answers, key) for answers in read_answers(paths, key)]
    result = tally(evaluators, args.min_catch, args.seed)
    text = tally_page(result, key, args.min_catch)
    disk.write_text(out / "tally.md", text)
    disk.write_json(out / "tally.json", {
        "format": disk.FORMAT, "kind": "study tally", "study": key["study"],
        "names": {which: key[which]["name"] for which in "ab"}, "seed": args.seed,
        "min_catch": args.min_catch, "files": {str(path): disk.sha256(path) for path in paths},
        **result})
    print(f"{text}\nwrote {out}: tally.md, tally.json")


# --------------------------------------------------------------------------------------------------

def make_parser():
    """The flags of `study.py make`."""
    parser = Parser(__doc__)
    parser.add_argument("--a", required=True, metavar="[NAME=]SAMPLES",
                        help="one model's images: a samples.npz of sample.py, or its folder; "
                        "the baseline, as in the paper")
    parser.add_argument("--b", required=True, metavar="[NAME=]SAMPLES",
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


def make_serve_parser():
    """The flags of `study.py serve`."""
    parser = Parser(__doc__)
    parser.add_argument("--study", default="out/study",
                        help="the folder that make wrote; answers go to answers/ in it (default: "
                        "out/study)")
    parser.add_argument("--host", default="127.0.0.1",
                        help="the address to serve on; 0.0.0.0: all of this machine's, for the "
                        "network (default: 127.0.0.1, for this machine only)")
    parser.add_argument("--port", type=integer(0, 65535), default=8000,
                        help="0: any free one (default: 8000)")
    return parser


def make_tally_parser():
    """The flags of `study.py tally`."""
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE",
                        help="evaluators' answers, as the page saved them or serve kept them")
    parser.add_argument("--key", help="the key.json of make (default: the one among the files, "
                        "beside or above them)")
    parser.add_argument("--min-catch", type=number(0, 1), default=0.8, metavar="SHARE",
                        help="of the catch trials that a careful evaluator passes (default: 0.8)")
    parser.add_argument("--seed", type=integer(0), default=0,
                        help="of the interval over evaluators (default: 0)")
    parser.add_argument("--out", help="folder of tally.md and tally.json (default: the key's)")
    return parser


COMMANDS = {
    "make": (main_make, make_parser), "serve": (main_serve, make_serve_parser),
    "tally": (main_tally, make_tally_parser)}


def main():
    """Make, serve or tally a study, by the first word."""
    runtime.refuse_processes("-m pages.study")
    runtime.main_of("-m pages.study", __doc__, COMMANDS)


if __name__ == "__main__":
    run(main)
