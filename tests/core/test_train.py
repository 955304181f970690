"""train.py: exact resume, refusals, signals, divergence, its flags, and that it learns."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_FLAGS, call, randomize, read_log, refuses, wait_for
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import disk
import evaluate
import loop
import losses
import runtime
import sample
import train
from cm_layers import reserved
from data import load_long_tailed
from recognition import classify
from runtime import UserError
from sets import readers


def start(out, data_dir, *flags):
    """train.py as a process of its own."""
    command = [sys.executable, ROOT / "train.py", *TINY_FLAGS, "--data-dir", data_dir, "--out", out,
               *flags]
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True,
                            # Under nohup the tests, and so it, would ignore this signal
                            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def load(out):
    """The checkpoint of a run."""
    return disk.load(out / "ckpt.pt", ["diffusion"])


def resolved(*flags):
    """The settings that these flags mean."""
    return train.resolve(train.make_parser().parse_args(list(flags)))


# --------------------------------------------------------------------------------------------------
# Resuming, signals

def test_ten_steps_are_five_and_kill_and_five(tmp_path, data_dir):
    straight, killed = tmp_path / "a", tmp_path / "b"
    often = ("--log-every", 2, "--save-every", 5)
    assert start(straight, data_dir, "--steps", 10, *often).wait() == 0
    p = start(killed, data_dir, "--steps", 100000, *often)
    wait_for(killed / "ckpt.pt", p)
    p.kill()
    p.wait()
    step = load(killed)["step"]
    assert step % 5 == 0
    assert start(killed, data_dir, "--steps", step + 5, *often).wait() == 0
    assert start(straight, data_dir, "--steps", step + 5, *often).wait() == 0
    a, b = load(straight), load(killed)
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    for k, state in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][k][n]) for n, v in state.items())
    # The last line of a command is at its last step, which may be odd
    expected = {record["step"]: record for record in read_log(straight)}
    even = [record for record in read_log(killed) if record["step"] % 2 == 0]
    common = [record for record in even if record["step"] in expected]
    assert common == [expected[record["step"]] for record in even]


@pytest.mark.parametrize("number, code", [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signals_save_and_exit(tmp_path, data_dir, number, code):
    p = start(tmp_path, data_dir, "--steps", 100000)
    wait_for(tmp_path / "log.jsonl", p)
    p.send_signal(number)
    assert p.wait(60) == code
    assert "saved" in p.stdout.read()
    assert load(tmp_path)["step"] == read_log(tmp_path)[-1]["step"]


def test_a_reader_that_leaves_stops_and_saves(tmp_path, data_dir):
    """As `| head`: like a signal, and the run goes on from there."""
    p = start(tmp_path, data_dir, "--steps", 100000)
    while not p.stdout.readline().startswith("step"):
        assert p.poll() is None
    p.stdout.close()
    assert p.wait(60) == 141
    assert load(tmp_path)["step"] >= 1


@pytest.mark.parametrize("name, text", [
    ("config.json", '{"name": "their own"}'), ("log.jsonl", "a diary\nof many lines\n")])
def test_files_of_others_in_the_runs_folder_are_kept(tmp_path, data_dir, capsys, name, text):
    (tmp_path / name).write_text(text)
    refuses(capsys, train.main, *TINY_FLAGS, "--steps", 1, "--data-dir", data_dir,
            "--out", tmp_path, says=["--out", name, "not a run's"])
    assert (tmp_path / name).read_text() == text


def test_distances_in_other_features_are_another_curve(tmp_path, data_dir, classifier, capsys):
    flags = [*TINY_FLAGS, "--eval-every", 1, "--eval-num", 20, "--data-dir", data_dir,
             "--out", tmp_path]
    call(train.main, *flags, "--steps", 1, "--features", classifier)
    call(classify.main, "--dataset", "digits", "--data-dir", data_dir, "--epochs", 1, "--width", 8,
         "--seed", 1, "--device", "cpu", "--out", tmp_path / "other")
    refuses(capsys, train.main, *flags, "--steps", 2, "--features", tmp_path / "other/ckpt.pt",
            says=["--features", "log.jsonl", "another file"])
    call(train.main, *flags, "--steps", 2, "--features", classifier)
    assert [r["step"] for r in read_log(tmp_path) if "FD" in r] == [1, 2]


def test_a_signal_is_answered_within_a_pass(tmp_path, data_dir, monkeypatch, capsys):
    """It comes in the second of four passes of step 3: saved as after step 2, and gone on with."""
    flags = [*TINY_FLAGS, "--accumulate", 4, "--data-dir", data_dir, "--out"]
    call(train.main, *flags, tmp_path / "straight", "--steps", 4)
    draw, calls = train.draw_batch, []

    def draw_and_stop(*args, **kwargs):
        calls.append(kwargs)
        if len([k for k in calls if k["parts"] == 4]) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*args, **kwargs)
    monkeypatch.setattr(train, "draw_batch", draw_and_stop)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as e:
            call(train.main, *flags, tmp_path / "stopped", "--steps", 4)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert e.value.code == 143 and "at step 2; saved" in capsys.readouterr().out
    assert len([k for k in calls if k["parts"] == 4]) == 11     # and one that checks the weights
    assert load(tmp_path / "stopped")["step"] == 2
    monkeypatch.undo()
    call(train.main, *flags, tmp_path / "stopped", "--steps", 4)
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")


def test_how_long_it_takes_is_said_once(tmp_path, data_dir, capsys):
    """From the first steps; not where a log line comes before."""
    flags = [*TINY_FLAGS, "--data-dir", data_dir, "--steps", 6, "--out"]
    call(train.main, *flags, tmp_path / "a", "--log-every", 5)
    text = capsys.readouterr().out
    assert len(re.findall(r"[\d.]+ s a step: about \d+ s for the other 3 steps", text)) == 1
    call(train.main, *flags, tmp_path / "b", "--log-every", 1)
    assert "s a step: about" not in capsys.readouterr().out


def test_the_bar_moves_with_every_pass(tmp_path, data_dir, monkeypatch):
    """In images; it is shown on a terminal only, and gone before the last line."""
    calls = []

    class Bar:
        update = staticmethod(calls.append)

        @staticmethod
        def close():
            calls.append("closed")

    def progress(*args, **kwargs):
        if kwargs.get("total") != 3 * 16:
            return runtime.tqdm(*args, **{**kwargs, "disable": True})
        calls.append((kwargs["initial"], kwargs["disable"]))
        return Bar()
    monkeypatch.setattr(runtime, "progress", progress)
    call(train.main, *TINY_FLAGS, "--accumulate", 2, "--steps", 3, "--data-dir", data_dir, "--out",
         tmp_path)
    assert calls == [(0, True), *[8] * 6, "closed"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    call(train.main, *TINY_FLAGS, "--steps", 3, "--data-dir", data_dir, "--out", tmp_path / "b")
    assert calls[8:] == [(0, False), *[16] * 3, "closed"]


def test_changed_settings_are_refused_and_finished_runs_skipped(cm_run, data_dir, capsys):
    same = (*TINY_FLAGS, "--data-dir", data_dir, "--out", cm_run)
    call(train.main, *same, "--steps", 30)
    assert "finished" in capsys.readouterr().out
    changes = {"--lr 0.5": ("--lr", 0.5), "--cm False": ("--no-cm",), "--seed 3": ("--seed", 3)}
    for words, flags in changes.items():
        with pytest.raises(UserError, match=words):
            call(train.main, *same, "--steps", 40, *flags)
    assert load(cm_run)["step"] == 30


def test_a_checkpoint_from_before_a_flag_is_resumed(cm_run, data_dir, tmp_path):
    """Settings that it does not have were what they are by default."""
    ckpt = load(cm_run)
    for name in ("resample", "ema"):
        ckpt["config"].pop(name)
    disk.save(tmp_path / "ckpt.pt", ckpt)
    flags = (*TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path)
    call(train.main, *flags, "--steps", 31)
    assert load(tmp_path)["step"] == 31
    with pytest.raises(UserError, match="--resample 0.5: .* was started with 1.0"):
        call(train.main, *flags, "--steps", 32, "--resample", 0.5)


def test_a_log_line_shows_which_group_had_no_image():
    """Two numbers of three groups would not say whose they are."""
    args = resolved("--dataset", "digits")
    means = {"base": 1.0, "D_Many": 1e-5, "D_Few": 2e-3, "grad_norm": 1.0}
    line = loop.format_line(5, args, means, ["Many", "Medium", "Few"], 1e-3, 10, 5)
    assert "D 1.0e-05/-/2.0e-03 " in line


def with_split_seed(cm_run, out, seed):
    """Write a checkpoint of cm_run as it was when --tail-seed was called --split-seed."""
    ckpt = load(cm_run)
    assert "split_seed" not in ckpt["config"]
    assert ckpt["config"].pop("tail_seed") == 0
    ckpt["config"]["split_seed"] = seed
    disk.save(out / "ckpt.pt", ckpt)


def test_a_checkpoint_with_a_split_seed_is_resumed(cm_run, data_dir, tmp_path):
    with_split_seed(cm_run, tmp_path, 0)
    call(train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path, "--steps", 31)
    # Read without disk.load, which translates
    ckpt = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert ckpt["step"] == 31
    assert ckpt["config"]["tail_seed"] == 0
    assert "split_seed" not in ckpt["config"]


def test_a_checkpoint_with_another_split_seed_is_refused(cm_run, data_dir, tmp_path, capsys):
    with_split_seed(cm_run, tmp_path, 4)
    refuses(capsys, train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path,
            "--steps", 31, says=["--tail-seed 0", "was started with 4"])
    assert load(tmp_path)["step"] == 30


def test_split_seed_means_tail_seed():
    old = resolved("--split-seed", "4")
    assert old.tail_seed == 4
    assert old == resolved("--tail-seed", "4")
    assert old != resolved()


# --------------------------------------------------------------------------------------------------
# Learning

def test_it_learns(tmp_path, data_dir):
    call(train.main, *TINY_FLAGS, "--base", "ddpm", "--steps", 200, "--log-every", 50,
         "--data-dir", data_dir, "--out", tmp_path)
    log = read_log(tmp_path)
    assert log[-1]["base"] < 0.3 < log[0]["base"]
    names = {"base", "con", "div", "D_Many", "D_Few", "grad_norm", "lr", "step"}
    assert names <= set(log[-1])
    board = EventAccumulator(str(tmp_path)).Reload()
    assert len(board.Scalars("loss/base")) == 4
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("base", ["ddpm", "cbdm", "oc"])
@pytest.mark.parametrize("cm", ["--cm", "--no-cm"])
def test_every_base_trains(tmp_path, data_dir, base, cm):
    call(train.main, *TINY_FLAGS, "--base", base, cm, "--steps", 3, "--data-dir", data_dir,
         "--out", tmp_path)
    assert ("con" in read_log(tmp_path)[-1]) == (cm == "--cm")
    # Without a second pass there is no curve of zeros
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    assert ("D/Few" in tags) == (cm == "--cm") and "loss/base" in tags


PAIRS = {       # flags -> whether L_CM's terms are logged
    "--cm": True,
    "--cm --resample 0.5": True,
    "--cm --ada 0.12": True,
    "--no-cm --experts group": False,
    "--cm --lam 0": False,
    "--w-con 0": True,
    "--w-div 0": True,
}


@pytest.mark.parametrize("base", ["ddpm", "cbdm", "oc", "focal", "rop", "consistency"])
@pytest.mark.parametrize("more", PAIRS)
def test_every_pair_trains(tmp_path, data_dir, base, more):
    """CM on any base, with +RS, with +ADA, its ablations; group experts: ten steps, learning."""
    call(train.main, *TINY_FLAGS, "--base", base, *more.split(), "--steps", 10, "--log-every", 5,
         "--lr", 0.003, "--warmup", 0, "--data-dir", data_dir, "--out", tmp_path)
    first, last = read_log(tmp_path)
    assert last["base"] < first["base"]
    assert ("con" in last) == PAIRS[more]


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path, data_dir):
    """The learning rate rises by 0.01 per step: the first step is good."""
    flags = (*TINY_FLAGS, "--base", "ddpm", "--no-cm", "--data-dir", data_dir, "--out", tmp_path,
             "--warmup", 10 ** 8, "--lr", 1e6)
    call(train.main, *flags, "--steps", 1)
    with pytest.raises(UserError, match="base is .*diverged.*--lr.*last good checkpoint"):
        call(train.main, *flags, "--steps", 100, "--save-every", 1)
    assert 1 <= load(tmp_path)["step"] < 100


def test_the_unbounded_divergence_runs_away(tmp_path, data_dir, capsys):
    """Eq. (2) as printed, at a large learning rate: a warning, then a stop that names the bound."""
    with pytest.raises(UserError, match="diverged; bound the divergence with --div-bound"):
        call(train.main, *TINY_FLAGS, "--base", "ddpm", "--steps", 60, "--div-bound", 0,
             "--lr", 0.02, "--warmup", 0, "--w-con", 0, "--data-dir", data_dir, "--out", tmp_path)
    warning = "warning: the two predictions differ by more than the noise itself"
    assert warning in capsys.readouterr().out


def test_a_compiler_that_is_missing(tmp_path, data_dir, monkeypatch, capsys):
    """--compile where nothing compiles: a warning, also in the log, and the same training."""
    def broken(module, mode):
        def call(*_):
            raise RuntimeError("no C++ compiler found")
        return call
    flags = (*TINY_FLAGS, "--steps", 3, "--data-dir", data_dir, "--out")
    call(train.main, *flags, tmp_path / "eager")
    monkeypatch.setattr(torch, "compile", broken)
    call(train.main, *flags, tmp_path / "broken", "--compile")
    line = ("--compile: cannot compile here (RuntimeError: no C++ compiler found), going on "
            "without")
    assert "WARNING: " + line in capsys.readouterr().err
    first, *rest = read_log(tmp_path / "broken")
    assert first["step"] == 0 and line in "--compile: " + first["warning"]
    assert read_log(tmp_path / "eager") == rest


def test_when_ranks_agree_on_signals():
    """One process, CPUs, or several passes per step: after every step. GPUs: every ten steps."""
    def steps(device, world, accumulate):
        rt = runtime.Runtime(torch.device(device), torch.float32, 0, world)
        args = SimpleNamespace(accumulate=accumulate)
        return [step for step in range(1, 25) if loop.agrees(step, args, rt)]
    assert steps("cpu", 2, 1) == steps("cuda", 1, 1) == steps("cuda", 2, 4) == [*range(1, 25)]
    assert steps("cuda", 2, 1) == [10, 20]


def test_d_per_group_is_weighted(digits):
    """With --cm-fraction an image stands for as many as its weight says."""
    meter = loop.Meter(digits.counts, digits.class_names, torch.device("cpu"))
    y = torch.tensor([0, 0, 9])
    meter.add_D(torch.tensor([1.0, 4.0, 7.0]), y, torch.tensor([2.0, 1.0, 0.5]))
    meter.add({"base": torch.tensor(1.0)})
    meter.steps = 1
    means = meter.means(runtime.Runtime(torch.device("cpu"), torch.float32))
    assert means["D_Many"] == pytest.approx(2.0) and means["D_Few"] == pytest.approx(7.0)


def test_snapshots_and_grids(tmp_path, data_dir):
    call(train.main, *TINY_FLAGS, "--steps", 4, "--keep-every", 2, "--data-dir", data_dir,
         "--out", tmp_path, "--sample-every", 4)
    snapshots = sorted(tmp_path.glob("ckpt-*.pt"))
    assert [disk.load(path, ["diffusion"])["step"] for path in snapshots] == [2, 4]
    board = EventAccumulator(str(tmp_path)).Reload()
    image = board.Images("samples")[0]
    assert image.step == 4
    scalars = set(board.Tags()["scalars"])
    assert {"loss/base", "loss/div", "D/Few", "optimisation/lr", "speed/images_per_s"} <= scalars
    assert "settings/text_summary" in board.Tags()["tensors"]
    grid = (tmp_path / "grid-0000004.png").read_bytes()
    assert grid[:4] == image.encoded_image_string[:4]


def test_distances_are_computed_on_all_cores(tmp_path, data_dir, classifier, monkeypatch):
    """Those of train.py and the numbers of evaluate.py: torchrun gives each process one core."""
    inside, calls = [], []

    @contextmanager
    def all_cores(rt):
        inside.append(rt)
        yield
        inside.pop()

    def watched(function):
        def called(*args, **kwargs):
            calls.append((function.__name__, bool(inside)))
            return function(*args, **kwargs)
        return called
    monkeypatch.setattr(runtime, "all_cores", all_cores)
    monkeypatch.setattr(train, "distance_of", watched(train.distance_of))
    monkeypatch.setattr(evaluate, "measure_all", watched(evaluate.measure_all))
    flags = ["--features", classifier, "--data-dir", data_dir]
    call(train.main, *TINY_FLAGS, "--steps", 1, "--eval-every", 1, "--eval-num", 20, *flags,
         "--out", tmp_path)
    call(evaluate.main, "--ckpt", tmp_path / "ckpt.pt", "--num", 20, "--steps", 1, *flags,
         "--device", "cpu")
    assert set(calls) == {("distance_of", True), ("measure_all", True)}


def test_distances_during_training(tmp_path, data_dir, classifier, capsys):
    """Those that evaluate.py measures on the same samples; a killed run makes up for one."""
    flags = [*TINY_FLAGS, "--steps", 5, "--eval-every", 3, "--eval-num", 60, "--features",
             classifier, "--save-every", 3, "--keep-every", 3, "--data-dir", data_dir,
             "--out", tmp_path]
    call(train.main, *flags)
    records = [r for r in read_log(tmp_path) if "FD" in r]
    assert [r["step"] for r in records] == [3, 5] and records[0]["eval_num"] == 60
    text = capsys.readouterr().out
    assert "FD (60 samples): all" in text and "full training set" in text
    assert "60 samples (ddim, 50 steps, guidance 1.5, x_0 clipped) against digits" in text
    board = EventAccumulator(str(tmp_path)).Reload()
    assert {"FD/all", "FD/Many", "FD/Medium", "FD/Few"} <= set(board.Tags()["scalars"])
    call(evaluate.main, "--ckpt", tmp_path / "ckpt-0000003.pt", "--num", 60, "--features",
         classifier, "--data-dir", data_dir, "--device", "cpu", "--out-json", tmp_path / "e.json")
    result = disk.read_json(tmp_path / "e.json")
    assert records[0]["FD"] == pytest.approx(result["fd"], rel=1e-6)
    for group in ("Many", "Medium", "Few"):
        assert records[0][f"FD_{group}"] == pytest.approx(result["groups"][group]["fd"], rel=1e-6)
    # Killed after the checkpoint of step 3 and before its distance
    shutil.copy(tmp_path / "ckpt-0000003.pt", tmp_path / "ckpt.pt")
    lines = [json.dumps(r) + "\n" for r in read_log(tmp_path) if "FD" not in r]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    call(train.main, *flags)
    again = [r for r in read_log(tmp_path) if "FD" in r]
    assert again == records
    # Killed after the last checkpoint and before its distance
    lines = [json.dumps(r) + "\n" for r in read_log(tmp_path) if "FD" not in r or r["step"] == 3]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    call(train.main, *flags)
    assert [r for r in read_log(tmp_path) if "FD" in r] == records
    capsys.readouterr()
    call(train.main, *flags)
    assert "finished, step 5 of 5" in capsys.readouterr().out


def test_the_speed_is_that_of_training_alone(tmp_path, data_dir, monkeypatch):
    """A grid of ten seconds is none of it, nor of the time that is left."""
    class Clock:
        now = 0.0

        def time(self):
            return self.now
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    take = loop.train_step

    def step_of_a_second(*args):
        clock.now += 1
        return take(*args)

    def grid(*args, **kwargs):
        clock.now += 10
    monkeypatch.setattr(loop, "train_step", step_of_a_second)
    monkeypatch.setattr(train, "save_due", grid)
    call(train.main, *TINY_FLAGS, "--steps", 4, "--log-every", 2, "--data-dir", data_dir,
         "--out", tmp_path)
    size = disk.read_json(tmp_path / "config.json")["config"]["batch_size"]
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert [r["images_per_s"] for r in records] == [size, size]


def test_features_without_distances(capsys):
    for flag in ("--eval-num", "--features"):
        refuses(capsys, train.main, *TINY_FLAGS, flag, 5, says=[f"{flag}: belongs to --eval-every"])


# --------------------------------------------------------------------------------------------------
# Flags

def test_default_names_and_paper_defaults():
    paper = vars(resolved("--preset", "paper"))
    expected = {"dataset": "cifar100", "ir": 100, "base": "oc", "cm": True, "lam": 1,
                "rank_ratio": 0.1, "steps": 300000, "lr": 2e-4, "warmup": 5000, "batch_size": 64,
                "ema": 0.9999, "dropout": 0.1, "ch": 128, "ch_mult": [1, 2, 2, 2], "attn": [1],
                "num_res_blocks": 2, "grad_clip": 1, "label_drop": 0.1, "w_con": 1, "w_div": 1,
                "div_bound": 0.01, "out": "out/cifar100-ir100-oc-cm-seed0"}
    assert {k: paper[k] for k in expected} == expected
    own = ("--preset", "paper")
    assert resolved(*own, "--lam", "0.5").out != paper["out"]
    assert resolved(*own, "--seed", "2").out.endswith("seed2")
    assert resolved(*own, "--ch", "64").out != paper["out"]
    assert resolved(*own, "--steps", "9").out == paper["out"]


def test_presets(monkeypatch):
    """tiny without a GPU; a flag goes before its preset; sets of one size keep it."""
    sizes = {"tiny": (16, 32, 4000), "small": (32, 64, 20_000), "paper": (None, 128, 300_000)}
    for name, size in sizes.items():
        args = resolved("--dataset", "folder", "--preset", name)
        assert (args.resolution, args.ch, args.steps) == size
        assert resolved("--preset", name).resolution is None            # CIFAR-100
        assert resolved("--preset", name).ch == size[1]
    assert resolved("--dataset", "folder") == resolved("--dataset", "folder", "--preset", "tiny")
    assert resolved() == resolved("--preset", "paper")                  # a set of the paper's
    assert resolved("--dataset", "digits").preset == "digits"
    own = resolved("--dataset", "folder", "--ch", "16", "--resolution", "8")
    assert (own.ch, own.resolution, own.preset) == (16, 8, "tiny")
    monkeypatch.setattr(train.runtime, "find_device", lambda name: torch.device("cuda"))
    assert resolved("--dataset", "folder") == resolved("--dataset", "folder", "--preset", "paper")
    assert resolved("--dataset", "digits").preset == "digits"


def test_names_of_runs_are_short(tmp_path, monkeypatch):
    """Without what the preset sets; a folder's own name, and no ratio that is not drawn."""
    monkeypatch.chdir(tmp_path)
    birds = tmp_path / "birds/train"
    name = resolved("--dataset", "folder", "--data-dir", str(birds)).out
    assert name == f"out/{disk.path_id(tmp_path / 'birds')}-oc-cm-seed0-tiny"
    assert resolved("--dataset", "folder", "--ir", "9", "--data-dir", str(birds)).out == (
        f"out/{disk.path_id(tmp_path / 'birds')}-ir9-oc-cm-seed0-tiny")
    # A run of an earlier version is gone on with
    flags = ["--dataset", "folder", "--preset", "paper", "--data-dir", str(birds)]
    earlier = f"out/{disk.path_id(birds)}-ir1-oc-cm-seed0"
    assert resolved(*flags).out != earlier
    os.makedirs(earlier)
    open(f"{earlier}/ckpt.pt", "w").close()
    assert resolved(*flags).out == earlier


def test_help_names_every_flag_with_a_text():
    for action in train.make_parser()._actions:
        assert action.help
        assert "default: None" not in action.help


def test_flags_of_the_base_losses_have_their_defaults():
    args = vars(train.make_parser().parse_args([]))
    for base in losses.BASES.values():
        for name, default in losses.options_of(base).items():
            # ct_double's is a quarter of --steps, filled in for the one base that has it
            assert args[name] == (None if name == "ct_double" else default)


VALUES = {      # of each base's own hyper-parameters, none the default
    "cbdm_tau": 0.1, "cbdm_gamma": 3, "focal_gamma": 0.5, "rop_weight": 2, "rop_margin": 2,
    "ct_double": 2, "ct_grid": "karras",
}


class Started(NamedTuple):
    """A run that did not enter its loop."""
    training: loop.Training
    module: losses.Objective
    batch: Callable


def started(monkeypatch, data_dir, out, *flags):
    """A run of train.py with these flags, stopped before its loop."""
    found = []

    def stop(training, module, batch, log, after_step):
        found.append(Started(training, module, batch))
    monkeypatch.setattr(train, "loop", stop)
    call(train.main, *TINY_FLAGS, "--steps", 4, "--data-dir", data_dir, "--out", out, *flags)
    return found[0]


def total_of_step_3(monkeypatch, data_dir, out, *flags):
    """The loss that a run of train.py with these flags has at step 3, with random weights."""
    run = started(monkeypatch, data_dir, out, "--no-cm", "--label-drop", 0, *flags)
    randomize(run.module.net)
    return run.module(run.batch(3, 0))[0].item()


@pytest.mark.parametrize("name", losses.FLAGS)
def test_a_flag_reaches_its_loss_and_no_other(name, monkeypatch, data_dir, tmp_path, capsys):
    flag = "--" + name.replace("_", "-")
    for base, entry in losses.BASES.items():
        same = (monkeypatch, data_dir, tmp_path / base, "--base", base)
        if name in losses.options_of(entry):
            assert total_of_step_3(*same, flag, VALUES[name]) != total_of_step_3(*same), base
        else:
            refuses(capsys, train.main, "--base", base, "--no-cm", flag, VALUES[name],
                    says=[f"{flag}: belongs to another base than {base}"])


def test_sets_that_may_be_mirrored_are(monkeypatch, data_dir, tmp_path):
    """--flip, --no-flip, and the set's own choice: digits are not, others are."""
    def pool(name, *flags):
        return started(monkeypatch, data_dir, tmp_path / name, *flags).batch(0, 0).pool_x_0
    plain = pool("digits")
    mirrored = pool("flip", "--flip")
    are = (mirrored == plain.flip(3)).flatten(1).all(1)
    assert ((mirrored == plain).flatten(1).all(1) | are).all()
    assert 0 < are.sum() < 16
    monkeypatch.setitem(readers.READERS, "digits", replace(readers.READERS["digits"], flip=True))
    assert torch.equal(pool("own choice"), mirrored)
    assert torch.equal(pool("no flip", "--no-flip"), plain)
    ada = started(monkeypatch, data_dir, tmp_path / "ada", "--ada", 1e-9).batch(0, 0)
    mirrors = ada.augmentation[:, 0] == 1                              # and the network is told
    assert torch.equal(ada.pool.x_0[mirrors], plain[mirrors].flip(3))
    assert torch.equal(ada.pool.x_0[~mirrors], plain[~mirrors])
    assert 0 < mirrors.sum() < 16


def test_flags_reach_the_step(monkeypatch, data_dir, tmp_path):
    run = started(monkeypatch, data_dir, tmp_path, "--w-div", 0.2, "--div-bound", 0, "--lam", 0.5,
                  "--independent-dropout", "--label-drop", 0.3, "--cbdm-y", "train", "--base",
                  "cbdm", "--ada", 0.4, "--rank-ratio", 0.5)
    objective = run.module
    assert objective.cm == losses.CMConfig(0.5, 1.0, 0.2, 0.0, True)
    assert (objective.label_drop, objective.ada) == (0.3, 0.4)
    counts = load_long_tailed(run.training.args).counts
    assert objective.counts.tolist() == counts.tolist()
    assert objective.y_other_weights.tolist() == counts.tolist()
    assert {part.rank for _, _, part in reserved(objective.net.decoder)} == {1, 8, 16}


def test_the_seed_is_that_of_everything(monkeypatch, data_dir, tmp_path):
    """Initial weights, the order of the images, and what a step draws."""
    runs = [started(monkeypatch, data_dir, tmp_path / str(seed), "--seed", seed)
            for seed in (0, 1)]
    weights = [run.training.params["encoder.head.weight"] for run in runs]
    batches = [run.batch(0, 0) for run in runs]
    assert not torch.equal(*weights)
    assert not torch.equal(*(b.pool.y for b in batches))
    assert not torch.equal(*(b.eps for b in batches))


def test_resampling_reaches_the_batches(monkeypatch, data_dir, tmp_path):
    def share_of_few(name, *flags):
        batch = started(monkeypatch, data_dir, tmp_path / name, *flags).batch
        return np.mean([(batch(step, 0).pool_y > 5).float().mean() for step in range(30)])
    assert share_of_few("as it is") < 0.2
    assert share_of_few("balanced", "--resample", 0) > 0.3


def test_an_update_is_clipping_adam_and_averaging(monkeypatch, data_dir, tmp_path):
    """Four updates with given gradients against a literal version in float64."""
    run = started(monkeypatch, data_dir, tmp_path, "--lr", 0.01, "--warmup", 3, "--ema", 0.2,
                  "--grad-clip", 2)
    training = run.training
    params, ema = list(training.params.values()), list(training.ema.values())
    p = torch.cat([x.detach().flatten() for x in params]).double()
    average = p.clone()
    m = v = torch.zeros_like(p)
    g = torch.Generator().manual_seed(0)
    for step, (norm, lr, decay) in enumerate([(0.5, 0.01 / 3, 0.1), (8, 0.02 / 3, 2 / 11),
                                              (1, 0.01, 0.2), (5, 0.01, 0.2)]):
        grad = torch.randn(len(p), generator=g, dtype=torch.float64)
        grad *= norm / grad.norm()
        for x, part in zip(params, grad.split([x.numel() for x in params])):
            x.grad = torch.empty_like(x).copy_(part.view(x.shape))      # in the parameter's layout
        assert loop.update(params, ema, training.optimizer, step, training.args) == pytest.approx(
            norm, rel=1e-4)
        assert all(x.grad is None for x in params)
        grad *= min(1, 2 / norm)
        m = 0.9 * m + 0.1 * grad
        v = 0.999 * v + 0.001 * grad ** 2
        m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
        p = p - lr * m_hat / (v_hat.sqrt() + 1e-8)
        average = decay * average + (1 - decay) * p
        for expected, got in ((p, params), (average, ema)):
            got = torch.cat([x.detach().flatten() for x in got]).double()
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    state = training.state()
    assert all(torch.equal(state["ema"][name], x) for name, x in training.ema.items())
    assert all(torch.equal(state["model"][name], x) for name, x in training.params.items())


def test_the_warm_up_is_logged(tmp_path, data_dir):
    call(train.main, *TINY_FLAGS, "--steps", 4, "--lr", 0.003, "--warmup", 3, "--no-cm",
         "--data-dir", data_dir, "--out", tmp_path)
    lrs = [record["lr"] for record in read_log(tmp_path)]
    assert lrs == pytest.approx([0.001, 0.002, 0.003, 0.003])


# --------------------------------------------------------------------------------------------------
# Nothing silently wrong, nothing lost

def write_folder(root, shift):
    """Three classes of 5, 4 and 3 small images; `shift` makes other pixels in files of one size."""
    for c, n in enumerate((5, 4, 3)):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(n):
            pixels = np.full((8, 8, 3), 10 * i + 60 * c + shift, np.uint8)
            Image.fromarray(pixels).save(root / f"class{c}/{i}.bmp")
    return root


def folder_flags(tmp_path, data_dir, *more):
    """A run on a folder, in tmp_path/run."""
    return [*TINY_FLAGS, "--dataset", "folder", "--data-dir", data_dir, "--resolution", 8,
            "--ch-mult", 1, "--attn", "--num-res-blocks", 1, "--batch-size", 4,
            "--pack-dir", tmp_path / "packed", "--out", tmp_path / "run", *more]


def test_finished_is_not_said_of_other_images(tmp_path, capsys):
    """The same names and sizes, other pixels: neither finished nor resumed."""
    a = write_folder(tmp_path / "a/images", 0)
    b = write_folder(tmp_path / "b/images", 5)
    call(train.main, *folder_flags(tmp_path, a, "--steps", 2))
    assert "no GPU: --preset tiny" in capsys.readouterr().out
    for steps in (2, 4):
        refuses(capsys, train.main, *folder_flags(tmp_path, b, "--steps", steps),
                says=["--data-dir", "not the images"])
    call(train.main, *folder_flags(tmp_path, a, "--steps", 2))
    assert "finished, step 2 of 2" in capsys.readouterr().out


def test_default_folders_of_two_folders_of_one_name(tmp_path):
    names = []
    for parent in "pq":
        folder = tmp_path / parent / "images"
        flags = ["--dataset", "folder", "--data-dir", str(folder)]
        names.append(train.resolve(train.make_parser().parse_args(flags)).out)
    assert names[0] != names[1] and all(name.startswith("out/images-") for name in names)


def test_weights_that_no_longer_predict_are_not_saved(tmp_path, data_dir, capsys):
    flags = [*TINY_FLAGS, "--base", "ddpm", "--no-cm", "--warmup", 0, "--data-dir", data_dir]
    refuses(capsys, train.main, *flags, "--steps", 3, "--lr", 1e10, "--save-every", 1,
            "--out", tmp_path / "run", says=["step 1", "diverged", "--lr"])
    assert not (tmp_path / "run/ckpt.pt").exists()


def test_what_a_kill_left_out_is_made_up_for(tmp_path, data_dir):
    """A kill after ckpt.pt and before the snapshot and the grid of that step."""
    flags = [*TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path, "--keep-every", 2,
             "--sample-every", 2, "--save-every", 2]
    call(train.main, *flags, "--steps", 4)
    left = [tmp_path / name for name in ("ckpt-0000004.pt", "grid-0000004.png")]
    before = [path.read_bytes() for path in left]
    for steps in (4, 6):                    # finished, and going on
        for path in left:
            path.unlink()
        call(train.main, *flags, "--steps", steps)
        assert left[1].read_bytes() == before[1]
        assert disk.load(left[0], ["diffusion"])["step"] == 4


def test_a_folder_is_written_by_one_run_at_a_time(tmp_path, data_dir, capsys, cpu):
    flags = [*TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path / "run", "--steps", 2]
    with disk.claim(tmp_path / "run", cpu):
        refuses(capsys, train.main, *flags, says=["--out", "another process"])
    (tmp_path / "run/.ckpt.pt.9999999.tmp").write_bytes(b"half")
    call(train.main, *flags)
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_run_that_finished_meanwhile_is_not_overwritten(cm_run, tmp_path, data_dir, capsys,
                                                          monkeypatch):
    """Another process trains to its end while this one loads its data; or the file goes."""
    flags = [*TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path, "--steps", 31]
    path, read = tmp_path / "ckpt.pt", train.load_long_tailed

    def appears(*args):
        shutil.copy(cm_run / "ckpt.pt", path)
        return read(*args)

    def goes(*args):
        path.unlink()
        return read(*args)
    for meanwhile in (appears, goes):
        monkeypatch.setattr(train, "load_long_tailed", meanwhile)
        refuses(capsys, train.main, *flags, says=["--out", "meanwhile", "start again"])
        assert path.exists() == (meanwhile is appears)
        assert not (tmp_path / "log.jsonl").exists()


def test_temporary_files_of_others_stay(tmp_path, cpu):
    """Of the user, and of a process that lives."""
    ours = [".ckpt.pt.9999999.tmp", ".png.9999999.tmp/0000-a/000000.png"]
    others = [".precious.tmp/a", ".notes.tmp", f".ckpt.pt.{os.getppid()}.tmp", "a.9999999.tmp",
              ".photo.20260101120000.tmp"]
    for name in (*ours, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with disk.claim(tmp_path, cpu):
        left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {".lock", *others}


def test_the_lock_of_a_dead_process_is_none(tmp_path, data_dir):
    code = ("import sys, os, torch, disk, runtime\n"
            "rt = runtime.Runtime(torch.device('cpu'), torch.float32)\n"
            "with disk.claim(sys.argv[1], rt): os._exit(9)")
    died = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    assert died.returncode == 9 and (tmp_path / ".lock").exists()
    call(train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path, "--steps", 1)


def test_fewer_steps_than_a_run_has(cm_run, data_dir, capsys):
    flags = [*TINY_FLAGS, "--data-dir", data_dir, "--out", cm_run]
    refuses(capsys, train.main, *flags, "--steps", 8, says=["--steps 8", "step 30"])


@pytest.mark.parametrize("flags, flag", [
    (["--lora", "--init-from", "x", "--lam", 1], "--lam"),
    (["--lora", "--init-from", "x", "--no-cm"], "--cm"),
    (["--lora", "--init-from", "x", "--experts", "group"], "--experts"),
    (["--experts", "group", "--cm"], "--cm"),
    (["--experts", "group", "--w-div", 1], "--w-div"),
    (["--no-cm", "--rank-ratio", 0.1], "--rank-ratio"),
    (["--no-cm", "--div-bound", 0.01], "--div-bound"),
    (["--base", "oc", "--focal-gamma", 2], "--focal-gamma"),
    (["--base", "ddpm", "--cbdm-tau", 0.001], "--cbdm-tau"),
    (["--base", "rop", "--ct-double", 5], "--ct-double"),
    (["--base", "ddpm", "--cbdm-y", "train"], "--cbdm-y"),
    (["--ada", 0.12, "--flip"], "--flip"),
], ids=str)
def test_flags_that_do_nothing_are_refused(flags, flag, tmp_path, data_dir, capsys):
    """Also where they say what is the default."""
    refuses(capsys, train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path / "run",
            *flags, says=[flag + ":"])
    assert not (tmp_path / "run").exists()


def test_a_run_with_the_older_augmentations_is_not_gone_on_with(tmp_path, data_dir, capsys):
    """They had 14 numbers. Its samples need none of them."""
    flags = (*TINY_FLAGS, "--ada", 0.12, "--data-dir", data_dir, "--out", tmp_path)
    call(train.main, *flags, "--steps", 1)
    old = load(tmp_path)
    old["network"]["augment_dim"] = 14
    for part in ("model", "ema"):
        old[part]["encoder.embedding.augment.weight"] = torch.zeros(64, 14)
    disk.save(tmp_path / "ckpt.pt", old)
    refuses(capsys, train.main, *flags, "--steps", 2, says=["--ada", "older", "--out"])
    call(sample.main, "--ckpt", tmp_path / "ckpt.pt", "--num", 2, "--steps", 2, "--device", "cpu")


def test_an_export_is_not_gone_on_with(cm_run, tmp_path, data_dir, capsys):
    call(sample.main, "--ckpt", cm_run / "ckpt.pt", "--export", tmp_path / "ckpt.pt",
         "--device", "cpu")
    refuses(capsys, train.main, *TINY_FLAGS, "--data-dir", data_dir, "--steps", 40,
            "--out", tmp_path, says=["--out", "an export"])


def test_init_from_is_named(cm_run, tmp_path, data_dir, capsys):
    ckpt = load(cm_run)
    name = next(iter(ckpt["ema"]))
    disk.save(tmp_path / "broken.pt", {**ckpt, "ema": {name: ckpt["ema"][name]}})
    refuses(capsys, train.main, *TINY_FLAGS, "--data-dir", data_dir, "--steps", 1, "--no-cm",
            "--base", "ddpm", "--init-from", tmp_path / "broken.pt", "--out", tmp_path / "run",
            says=["--init-from", "do not fit"])


@pytest.mark.parametrize("flags, flag", [
    (["--keep-every", 100, "--steps", 2], "--keep-every"),
    (["--ir", 1, "--tail-seed", 5], "--tail-seed")])
def test_flags_that_would_do_nothing(flags, flag, capsys):
    refuses(capsys, train.main, *TINY_FLAGS, *flags, says=[flag])
