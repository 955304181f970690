"""Some hundred mistakes per script, generated from its parser: every flag with every wrong value.

A mistake ends with exit code 2, at most three lines on stderr, no traceback, and no file behind.
A value that may be right must end so too, or reach the work, which is cut short here.
"""
import json
import os
import shutil
import signal
import sys
from argparse import ArgumentTypeError
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

import data
import disk
import evaluate
import prune_probe
import runtime
import sample
import theory_sim
import train
from latent import stable_diffusion as sd, text_to_image
from latent.autoencoder import KLAutoencoder
from pages import report, study
from probes import bench, capacity, copies
from recognition import classify

SECONDS = 5         # longer than any refusal
WORDS = ["word", "", "-1", "0", "1.5", "1000000000000", "1e300", "nan", "inf", "no\nthing",
         "é" * 300, "1,,2", "-"]
TEXTS = ["word", "", " ", "nan", "no\nthing", "é" * 300, "../..", "1,,2", "-"]    # of free text
BAD_FILES = ["missing.pt", "missing/file.npz", "empty-folder", "text.txt", "empty.npz", "cut.pt",
             "array.npy", "png.npz", "text.npz", "list.json", "text.txt/file", "pickle.npz",
             "foreign.pt"]

# Flags of files that must be there; a name of BAD_FILES is never one
INPUTS = {"ckpt", "samples", "reference", "features", "init_from", "extra", "row", "pair",
          "quality", "a", "b", "real", "study", "key"}
# Flags of a file or folder that is written: where it cannot be
FOLDERS = {"out": ["text.txt", "text.txt/folder"], "pack_dir": ["text.txt", "text.txt/folder"],
           "data_dir": ["text.txt", "text.txt/folder"]}
WRITTEN = ["empty-folder", "text.txt/file", "text.txt", "ckpt.pt"]
FOLDERS |= {"lora": ["text.txt", "text.txt/folder", "full-folder"],
            "pipeline": ["text.txt", "text.txt/folder", "full-folder"]}
FILES = {"out_json": WRITTEN, "save_stats": WRITTEN, "export": WRITTEN}
# Flags of free text that has a meaning: none of these words has one
MEANINGS = {"dataset", "device", "classes", "class_order", "paper"}
NO_MEANING = ["word", "no\nthing", "é" * 300, "../..", "1,,2", "nan"]


class Reached(BaseException):
    """The flags were accepted: here the work would begin."""


class TooLong(BaseException):
    """Neither refused nor at work in SECONDS."""


class Found(Exception):
    """The parser of a script."""


# --------------------------------------------------------------------------------------------------
# The scripts: main, what comes first, flags with which it works, and what is cut short

TRAINING = {"--dataset": ["digits"], "--data-dir": ["DATA"], "--out": ["out/run"],
            "--device": ["cpu"], "--batch-size": ["16"]}
CKPT = {"--ckpt": ["ckpt.pt"], "--out": ["out/x"], "--device": ["cpu"]}
SCRIPTS = {
    "train": (train, [], {**TRAINING, "--ch": ["16"], "--steps": ["2"], "--sample-every": ["0"],
                          "--no-compile": []}, ["start_log"]),
    "sample": (sample, [], CKPT, ["generate"]),
    "evaluate": (evaluate, [], {**CKPT, "--data-dir": ["DATA"], "--features": ["classifier.pt"]},
                 ["extract_both"]),
    "evaluate samples": (evaluate, [], {"--samples": ["samples.npz"], "--reference": ["digits"],
                                        "--data-dir": ["DATA"], "--features": ["classifier.pt"],
                                        "--out": ["out/x"], "--device": ["cpu"]},
                         ["extract_both"]),
    "classify": (classify, [], {**TRAINING, "--width": ["8"], "--epochs": ["1"],
                                "--no-compile": []}, ["SummaryWriter"]),
    "latent train": (sd, ["train"], {**TRAINING, "--model": ["empty-folder"]}, ["Model"]),
    "latent sample": (sd, ["sample"], {**CKPT, "--ckpt": ["latent.pt"]}, ["Model"]),
    "latent export": (sd, ["export"], {"--ckpt": ["latent.pt"], "--pipeline": ["out/x"]},
                      ["merged_pipeline", "export_record"]),
    "text autoencoder": (text_to_image, ["autoencoder"], {**TRAINING, "--factor": ["4"]},
                         ["make_autoencoder"]),
    "text train": (text_to_image, ["train"], {
        **TRAINING, "--autoencoder": ["ae.pt"], "--text-encoder": ["words"], "--ch": ["16"]},
        ["make_network"]),
    "text sample": (text_to_image, ["sample"], {**CKPT, "--ckpt": ["text.pt"]},
                    ["load_autoencoder"]),
    "prune_probe": (prune_probe, [], {**CKPT, "--data-dir": ["DATA"]}, ["measure"]),
    "dominance": (capacity, ["dominance"], {**CKPT, "--data-dir": ["DATA"]},
                  ["group_gradients"]),
    "allocation": (capacity, ["allocation"], {**CKPT, "--data-dir": ["DATA"]},
                   ["distances"]),
    "copy_probe": (copies, [], {**CKPT, "--data-dir": ["DATA"], "--samples": ["samples.npz"],
                                    "--features": ["classifier.pt"]}, ["features_of"]),
    "bench": (bench, [], {"--device": ["cpu"], "--out": ["out/x"]},
              ["bench_training", "bench_sampling", "bench_metrics"]),
    "bench plan": (bench, [], {"--plan": [], "--out": ["out/x"]}, ["plan_rows"]),
    "report": (report, [], {"--row": ["CM=result.json"], "--out": ["out/report.md"]},
               []),
    "study make": (study, ["make"], {"--a": ["samples.npz"], "--b": ["other.npz"],
                                     "--real": ["digits"], "--data-dir": ["DATA"],
                                     "--groups": ["2"], "--out": ["out/x"]}, ["make_study"]),
    "study serve": (study, ["serve"], {"--study": ["study"], "--port": ["0"]},
                    ["serve_until_stopped"]),
    "study tally": (study, ["tally", "answers.json"], {"--key": ["study/key.json"],
                                                       "--out": ["out/x"]}, ["tally"]),
    "theory_sim": (theory_sim, [], {"--out": ["out/x"]}, ["results"]),
    "data": (data, [], {"--dataset": ["digits"], "--data-dir": ["DATA"]}, []),
}
INSTEAD_OF = {      # a flag of a script that takes one of two
    "evaluate": {"--samples": "--ckpt", "--ckpt": "--samples"},
    "latent export": {"--lora": "--pipeline"}}


def find_parser(module, first):
    """The Parser that a script's main makes."""
    def stop(self, *args):
        raise Found(self)
    before = runtime.Parser.parse_args
    runtime.Parser.parse_args = stop
    try:
        call(module.main, *first)
    except Found as found:
        return found.args[0]
    except TypeError:
        raise
    finally:
        runtime.Parser.parse_args = before
    raise AssertionError(f"{module.__name__}: no parser")


def real_parser(module, first):
    """The first Parser that reads the command line, not one whose defaults a script asks for."""
    parser = find_parser(module, first)
    assert isinstance(parser, runtime.Parser)
    return parser


PARSERS = {name: real_parser(module, first) for name, (module, first, _, _) in SCRIPTS.items()}


def flags_of(parser):
    """[(flag, action)]: every flag once."""
    return [(action.option_strings[0], action) for action in parser._actions
            if action.option_strings and action.dest != "help"]


# --------------------------------------------------------------------------------------------------
# The cases of a flag

def is_refused_by_type(action, value):
    """Whether the parser alone must refuse a value."""
    if action.choices is not None:
        return value not in action.choices
    if action.type is None:
        return False
    try:
        action.type(value)
    except (ArgumentTypeError, ValueError, TypeError):
        return True
    return False


def values_of(action):
    """(a flag's values, whether they must be refused) for each case."""
    name = action.dest
    if action.nargs == 0:
        yield ["word"], True
        return
    if action.nargs not in ("?", "*"):
        yield [], True
    count = action.nargs if isinstance(action.nargs, int) else 1
    for word in WORDS if action.type or action.choices else TEXTS:
        wrong = is_refused_by_type(action, word) or name in INPUTS
        yield [word] * count, wrong or (name in MEANINGS and word in NO_MEANING)
    if count > 1:
        yield ["word"], True
    if action.nargs in ("+", "*") and action.type is not None:
        yield ["1", "word"], True
    start = "A=" if name == "row" else ""
    for path in BAD_FILES if name in INPUTS else FOLDERS.get(name, FILES.get(name, [])):
        yield [start + path] * count, True


def cases_of(script, flag, action):
    """(the command line, whether it must be refused) for each case of a flag."""
    _, first, base, _ = SCRIPTS[script]
    same = {flag, *action.option_strings}
    same.add(INSTEAD_OF.get(script.removesuffix(" samples"), {}).get(flag))
    rest = [w for name, values in base.items() if name not in same for w in (name, *values)]
    for values, wrong in values_of(action):
        words = [f"{flag}={values[0]}"] if len(values) == 1 and values[0][:1] == "-" else [
            flag, *values]
        yield [*first, *rest, *words], wrong


ALL = [(script, flag) for script, parser in PARSERS.items() for flag, _ in flags_of(parser)]


# --------------------------------------------------------------------------------------------------
# A folder with good and bad files

@pytest.fixture(scope="session")
def folder(tmp_path_factory, cm_run, classifier, digits):
    """Good files for SCRIPTS, and BAD_FILES."""
    root = tmp_path_factory.mktemp("fuzz") / "two/deep"     # "../.." holds nothing of other tests
    root.mkdir(parents=True)
    shutil.copy(cm_run / "ckpt.pt", root / "ckpt.pt")
    shutil.copy(classifier, root / "classifier.pt")
    write_good_files(root, digits)
    (root / "empty-folder").mkdir()
    (root / "full-folder").mkdir()
    (root / "full-folder/text.txt").write_text("of another program")
    for name in ("text.txt", "text.npz"):
        (root / name).write_text("not what the flag takes\n")
    (root / "empty.npz").touch()
    (root / "list.json").write_text("[1]")
    whole = (root / "ckpt.pt").read_bytes()
    (root / "cut.pt").write_bytes(whole[:len(whole) // 2])
    with open(root / "array.npy", "wb") as f:
        np.save(f, np.zeros(3))
    with open(root / "pickle.npz", "wb") as f:
        np.savez(f, arr_0=np.array([{"a": 1}], dtype=object))
    Image.new("RGB", (8, 8)).save(root / "png.npz", format="png")
    torch.save({"weights": torch.zeros(3)}, root / "foreign.pt")
    return root


def write_good_files(root, digits):
    """Two samples.npz, a result, checkpoints of all kinds, a study with answers."""
    ckpt = disk.load(root / "ckpt.pt", ["diffusion"])
    images = digits.images[:40]
    settings = {"dataset": "digits", "step": 30, "sampler": "ddim", "steps": 5, "guidance": 0.0,
                "weights": "ema", "reference": "digits", "branch": "full"}
    for name, pixels in (("samples", images), ("other", 255 - images)):
        np.savez(root / f"{name}.npz", arr_0=pixels, arr_1=digits.labels[:40])
        record = {"settings": settings, "data": ckpt["data"],
                  "npz_sha256": disk.sha256(root / f"{name}.npz")}
        (root / f"{name}.json").write_text(json.dumps(record))
    write_study(root)
    numbers = {"fd": 2.0, "kd": 0.1, "accuracy": 0.5, "floor": 1.0, "num": 40, "num_real": 40}
    groups = {group: dict(numbers) for group in ("Many", "Medium", "Few")}
    result = {**numbers, "groups": groups, "classes": {}, "settings": settings}
    (root / "result.json").write_text(json.dumps(result))
    config = {**ckpt["config"], "model": "empty-folder", "prompt": "a {}", "rank": 4,
              "cm_rank": 2, "cm": True}
    parts = {key: ckpt[key] for key in ("data", "step", "command")}
    disk.save(root / "latent.pt", {"kind": "latent", "adapters": {}, "ema": {}, "config": config,
                                   **parts})
    network = {"ch": 4, "factor": 4}
    weights = dict(KLAutoencoder(**network).named_parameters())
    disk.save(root / "ae.pt", {"kind": "autoencoder", "network": network, "model": weights,
                               "ema": weights, "config": config, "scale": 1.0, **parts})
    config = {**config, "prompt": None, "autoencoder": "ae.pt", "text_encoder": "words"}
    disk.save(root / "text.pt", {"kind": "text", "network": {"vocabulary": []}, "rank_ratio": 0.1,
                                 "model": {}, "ema": {}, "config": config, **parts})


def write_study(root):
    """A study of one question, and answers to it."""
    disk.write_text(root / "study" / "study.html", "a page")
    disk.write_json(root / "study" / "key.json", {
        "format": disk.FORMAT, "kind": "study key", "study": "s", "a": {"name": "a"},
        "b": {"name": "b"}, "questions": {"q": {"left": "a", "right": "b"}},
        "html_sha256": disk.sha256(root / "study" / "study.html")})
    disk.write_json(root / "answers.json", {
        "format": disk.FORMAT, "kind": "study answers", "study": "s",
        "evaluator": {"id": "0" * 16, "name": ""},
        "answers": [{"question": "q", "side": "left", "seconds": 1}]})


def files_under(root):
    """{path: (size, time of change)} of everything under a folder."""
    return {path: path.is_dir() or (path.stat().st_size, path.stat().st_mtime_ns)
            for path in root.rglob("*")}


def tidy(root, before, contents):
    """Remove and restore what a case made and changed: (the new paths, the changed ones)."""
    now = files_under(root)
    new = sorted(set(now) - set(before), reverse=True)
    for path in new:
        path.rmdir() if path.is_dir() else path.unlink()
    changed = [path for path, what in before.items() if now.get(path) != what]
    for path in changed:
        path.write_bytes(contents[path])
        os.utime(path, ns=(before[path][1], before[path][1]))
    return [str(path.relative_to(root)) for path in new], [path.name for path in changed]


def outcome(main, words):
    """What a command ends with: a number, "work", "too long", or a traceback's last line."""
    def too_long(*_):
        raise TooLong
    old = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    command_line, sys.argv = sys.argv, ["script", *words]       # where an error's flag is looked up
    try:
        runtime.run(lambda: call(main, *words))
    except SystemExit as e:
        return e.code or 0
    except Reached:
        return "work"
    except TooLong:
        return "too long"
    except Exception as e:
        return f"{type(e).__name__}: {e}"[:200]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        sys.argv = command_line
    return 0


def cut_short(script, monkeypatch):
    """Let the functions that do a script's work raise Reached."""
    def reached(*args, **kwargs):
        raise Reached

    def reached_after_loading(*args):
        data.load_long_tailed(*args)
        raise Reached           # before the test whether the images have colours: digits have none
    module, _, _, works = SCRIPTS[script]
    for name in works:
        monkeypatch.setattr(module, name, reached)
    if module is report:        # figures take their time: empty files in their place
        for name in ("demo_figure", "paper_figure"):
            monkeypatch.setattr(report, name, lambda *args: disk.write_text(args[-1], ""))
    if module is sd:
        monkeypatch.setattr(sd, "packages", lambda: None)
    if module is text_to_image:
        monkeypatch.setattr(module, "packages", lambda: (SimpleNamespace(AutoencoderKL=None), None))
        monkeypatch.setattr(module, "pretrained", reached)
    if module in (sd, text_to_image):
        monkeypatch.setattr(module, "load_long_tailed", reached_after_loading)


def complaint(code, error, left, wrong, flags=()):
    """What is wrong with the way that a case ended, or None.

    flags: the names of the flag that was wrong; the line must have one of them.
    """
    if code not in (0, 2, "work"):
        return code
    if code != 2:
        return f"not refused ({code})" if wrong else None
    lines = error.splitlines()
    if not lines or len(lines) > 3 or "Traceback" in error or not lines[-1].startswith("error: "):
        return f"exit code 2 with {error[:300]!r}"
    if wrong and flags and not any(flag in lines[-1] for flag in flags):
        return f"does not name the flag: {lines[-1][:300]!r}"
    return f"refused, but left {left}" if left else None


@pytest.mark.parametrize("script, flag", ALL, ids=[" ".join(case) for case in ALL])
def test_mistakes(script, flag, folder, data_dir, monkeypatch, capsys):
    module = SCRIPTS[script][0]
    cut_short(script, monkeypatch)
    monkeypatch.chdir(folder)
    action = dict(flags_of(PARSERS[script]))[flag]
    before = files_under(folder)
    contents = {path: path.read_bytes() for path in before if path.is_file()}
    bad = []
    for words, wrong in cases_of(script, flag, action):
        words = [str(data_dir) if word == "DATA" else word for word in words]
        code = outcome(module.main, words)
        left, changed = tidy(folder, before, contents)
        error = capsys.readouterr().err
        what = complaint(code, error, left, wrong, action.option_strings)
        if changed:
            what = f"changed {changed}"
        if what:
            bad.append(f"{script}: {words!r}\n    {what}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("script", SCRIPTS)
def test_good_flags_reach_the_work(script, folder, data_dir, monkeypatch, capsys):
    """What the cases above start from is right: what they are refused for is their mistake."""
    module, first, base, works = SCRIPTS[script]
    cut_short(script, monkeypatch)
    monkeypatch.chdir(folder)
    before = files_under(folder)
    words = [w for name, values in base.items() for w in (name, *values)]
    words = [*first, *(str(data_dir) if w == "DATA" else w for w in words)]
    code = outcome(module.main, words)
    tidy(folder, before, {})
    assert code == ("work" if works else 0), capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_and_missing_flags(script, folder, monkeypatch, capsys):
    module, first, base, _ = SCRIPTS[script]
    monkeypatch.chdir(folder)
    required = any(action.required for _, action in flags_of(PARSERS[script]))
    needs_one = any(g.required for g in PARSERS[script]._mutually_exclusive_groups)
    lines = [[*first, "--no-such-flag", "1"], [*first, "word", "word"]]
    if required or needs_one:
        lines.append(first)
    for words in lines:
        code = outcome(module.main, words)
        assert not complaint(code, capsys.readouterr().err, [], True), words
