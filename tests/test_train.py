"""train.py: exact resume, refusals, signals, divergence, and that it learns."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from conftest import ROOT, TINY_FLAGS, call

import runtime
import train
from runtime import UserError


def start(out, data_dir, *flags):
    """train.py as a process of its own."""
    command = [sys.executable, ROOT / "train.py", *TINY_FLAGS, "--data-dir", data_dir, "--out", out, *flags]
    return subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def read_log(out):
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in (out / "log.jsonl").open()]


def test_ten_steps_are_five_and_kill_and_five(tmp_path, data_dir):
    straight, killed = tmp_path / "a", tmp_path / "b"
    flags = ("--steps", 10, "--log-every", 2, "--save-every", 5)
    assert start(straight, data_dir, *flags).wait() == 0
    p = start(killed, data_dir, "--steps", 100000, "--log-every", 2, "--save-every", 5)
    while not (killed / "ckpt.pt").exists():
        assert p.poll() is None
        time.sleep(0.02)
    p.kill()
    p.wait()
    step = runtime.load(killed / "ckpt.pt", ["diffusion"])["step"]
    assert step % 5 == 0
    total = ("--steps", step + 5, "--log-every", 2, "--save-every", 5)
    assert start(killed, data_dir, *total).wait() == 0
    assert start(straight, data_dir, *total).wait() == 0
    a, b = (runtime.load(out / "ckpt.pt", ["diffusion"]) for out in (straight, killed))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    for k, state in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][k][n]) for n, v in state.items())
    shared = {r["step"]: r for r in read_log(straight)}
    assert [r for r in read_log(killed) if r["step"] % 2 == 0 and r["step"] in shared] == [
        shared[r["step"]] for r in read_log(killed) if r["step"] % 2 == 0]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit(tmp_path, data_dir, number, code):
    p = start(tmp_path, data_dir, "--steps", 100000)
    while not (tmp_path / "log.jsonl").exists():
        assert p.poll() is None
        time.sleep(0.02)
    p.send_signal(number)
    assert p.wait(60) == code and "saved" in p.stdout.read()
    assert runtime.load(tmp_path / "ckpt.pt", ["diffusion"])["step"] == read_log(tmp_path)[-1]["step"]


def test_changed_settings_are_refused_and_finished_runs_skipped(cm_run, data_dir, tmp_path, capsys):
    same = (*TINY_FLAGS, "--data-dir", data_dir, "--out", cm_run)
    call(train.main, *same, "--steps", 30)
    assert "finished" in capsys.readouterr().out
    for flags, word in ((("--lr", 0.5), "--lr 0.5"), (("--no-cm",), "--cm False"), (("--seed", 3), "--seed 3")):
        with pytest.raises(UserError, match=word):
            call(train.main, *same, "--steps", 40, *flags)
    ckpt = runtime.load(cm_run / "ckpt.pt", ["diffusion"])
    assert ckpt["step"] == 30
    for name in ("resample", "ema"):                   # a checkpoint from before these flags: they were what they are by default
        ckpt["config"].pop(name)
    runtime.save(tmp_path / "ckpt.pt", ckpt)
    call(train.main, *same[:-1], tmp_path, "--steps", 31)
    assert runtime.load(tmp_path / "ckpt.pt", ["diffusion"])["step"] == 31
    with pytest.raises(UserError, match="--resample 0.5: .* was started with 1.0"):
        call(train.main, *same[:-1], tmp_path, "--steps", 32, "--resample", 0.5)


def test_it_learns(tmp_path, data_dir):
    call(train.main, *TINY_FLAGS, "--base", "ddpm", "--steps", 200, "--log-every", 50, "--data-dir", data_dir, "--out", tmp_path)
    first, last = (read_log(tmp_path)[i] for i in (0, -1))
    assert last["base"] < 0.3 < first["base"]
    assert {"base", "con", "div", "D_Many", "D_Few", "grad_norm", "lr", "step"} <= set(last)
    assert list(tmp_path.glob("events*")) and (tmp_path / "config.json").exists()


@pytest.mark.parametrize("base", ["ddpm", "cbdm", "oc"])
@pytest.mark.parametrize("cm", ["--cm", "--no-cm"])
def test_every_base_trains(tmp_path, data_dir, base, cm):
    call(train.main, *TINY_FLAGS, "--base", base, cm, "--steps", 3, "--data-dir", data_dir, "--out", tmp_path)
    assert ("con" in read_log(tmp_path)[-1]) == (cm == "--cm")


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path, data_dir):
    flags = (*TINY_FLAGS, "--base", "ddpm", "--no-cm", "--data-dir", data_dir, "--out", tmp_path, "--warmup", 0, "--lr", 1e6)
    call(train.main, *flags, "--steps", 1)
    with pytest.raises(UserError, match="base is .*diverged.*--lr"):
        call(train.main, *flags, "--steps", 50)
    assert runtime.load(tmp_path / "ckpt.pt", ["diffusion"])["step"] < 50


def test_default_names_and_paper_defaults():
    parse = lambda *a: train.resolve(train.make_parser().parse_args(list(a)))
    paper = parse()
    assert (paper.dataset, paper.ir, paper.base, paper.cm, paper.lam, paper.rank_ratio) == ("cifar100", 100, "oc", True, 1, 0.1)
    assert (paper.steps, paper.lr, paper.warmup, paper.batch_size, paper.ema, paper.dropout) == (300000, 2e-4, 5000, 64, 0.9999, 0.1)
    assert paper.out == "out/cifar100-ir100-oc-cm-seed0"
    assert parse("--lam", "0.5").out != paper.out and parse("--seed", "2").out.endswith("seed2")
    assert parse("--ch", "64").out != paper.out and parse("--steps", "9").out == paper.out


def test_a_compiler_that_is_missing(tmp_path, data_dir, monkeypatch, capsys):
    """--compile where nothing compiles: one line, and the same training."""
    def broken(module):
        def call(*_):
            raise RuntimeError("no C++ compiler found")
        return call
    flags = (*TINY_FLAGS, "--steps", 3, "--data-dir", data_dir, "--out")
    call(train.main, *flags, tmp_path / "eager")
    monkeypatch.setattr(torch, "compile", broken)
    call(train.main, *flags, tmp_path / "broken", "--compile")
    assert "--compile: cannot compile here (RuntimeError: no C++ compiler found), going on without" in capsys.readouterr().out
    assert read_log(tmp_path / "eager") == read_log(tmp_path / "broken")


def test_snapshots_and_grids(tmp_path, data_dir):
    call(train.main, *TINY_FLAGS, "--steps", 4, "--keep-every", 2, "--data-dir", data_dir, "--out", tmp_path, "--sample-every", 4)
    assert [runtime.load(p, ["diffusion"])["step"] for p in sorted(tmp_path.glob("ckpt-*.pt"))] == [2, 4]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert board.Images("samples")[0].step == 4 and {"base", "div", "D_Few", "lr"} <= set(board.Tags()["scalars"])
    assert (tmp_path / "grid-0000004.png").read_bytes()[:4] == board.Images("samples")[0].encoded_image_string[:4]


def test_the_unbounded_divergence_runs_away(tmp_path, data_dir, capsys):
    """Eq. (2) as printed, at a large learning rate: first a warning, then the run stops and names the bound."""
    with pytest.raises(UserError, match="diverged; bound the divergence with --div-bound"):
        call(train.main, *TINY_FLAGS, "--steps", 60, "--div-bound", 0, "--lr", 0.02, "--warmup", 0, "--w-con", 0, "--base", "ddpm",
             "--data-dir", data_dir, "--out", tmp_path)
    assert "warning: the two predictions differ by more than the noise itself" in capsys.readouterr().out


def test_help_names_every_flag_with_a_text():
    for action in train.make_parser()._actions:
        assert action.help and not re.search(r"default: None", action.help)
