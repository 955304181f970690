"""train.py and loop.py: exact resume, signals, divergence, what flags reach, and that it learns."""
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (ROOT, assert_equal, call, ckpt_of, interrupted, read_log, refuses, resolved,
                      wait_for)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import disk
import loop
import losses
import runtime
import train
from cm_layers import reserved
from data import load_long_tailed
from sets import readers


def test_ten_steps_are_five_and_kill_and_five(tmp_path, tiny):
    straight, killed = tmp_path / "a", tmp_path / "b"
    flags = (*tiny, "--log-every", 2, "--save-every", 5, "--out")
    command = [sys.executable, ROOT / "train.py", *flags, killed, "--steps", 100000]
    p = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
    wait_for(killed / "ckpt.pt", p)
    p.kill()
    p.wait()
    step = ckpt_of(killed)["step"]
    assert step % 5 == 0
    for out in (killed, straight):
        call(train.main, *flags, out, "--steps", step + 5)
    a, b = ckpt_of(straight), ckpt_of(killed)
    for part in ("model", "ema"):
        assert_equal(a[part], b[part])
    for k, state in a["optimizer"]["state"].items():
        assert_equal(state, b["optimizer"]["state"][k])
    assert read_log(straight) == read_log(killed)


def test_a_signal_is_answered_within_a_pass(tmp_path, tiny, monkeypatch):
    """It comes in the second of four passes of step 3: saved as after step 2, and gone on with."""
    flags = (*tiny, "--accumulate", 4, "--steps", 4, "--out")
    call(train.main, *flags, tmp_path / "straight")
    with interrupted(monkeypatch, losses.Objective, "draw_batch", 10) as passes:
        call(train.main, *flags, tmp_path / "stopped")
    assert ckpt_of(tmp_path / "stopped")["step"] == 2
    assert len(passes) == 4 + 4 + 3                     # the last one checks the weights
    call(train.main, *flags, tmp_path / "stopped")
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")


def test_it_learns(tmp_path, tiny):
    call(train.main, *tiny, "--base", "ddpm", "--steps", 80, "--log-every", 20, "--lr", 0.003,
         "--warmup", 0, "--out", tmp_path)
    log = read_log(tmp_path)
    assert log[-1]["base"] < 0.35 < log[0]["base"]
    assert {"con", "div", "D_Many", "D_Few", "grad_norm", "lr", "step"} <= set(log[-1])


# Every base, with and without CM: see same_numbers.py
@pytest.mark.parametrize("flags", ["--lam 0", "--w-con 0", "--cm-fraction 0.5"])
def test_ways_of_cm_train(tmp_path, tiny, flags):
    call(train.main, *tiny, *flags.split(), "--steps", 10, "--log-every", 5, "--lr", 0.003,
         "--warmup", 0, "--out", tmp_path)
    first, last = read_log(tmp_path)
    assert last["base"] < first["base"] and ("con" in last) == (flags != "--lam 0")


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path, tiny, capsys):
    """The learning rate rises by 0.01 per step: the first step is good."""
    flags = (*tiny, "--base", "ddpm", "--no-cm", "--warmup", 10 ** 8, "--lr", 1e6,
             "--out", tmp_path)
    call(train.main, *flags, "--steps", 1)
    refuses(capsys, train.main, *flags, "--steps", 100, "--save-every", 1, says=["--lr"])
    assert 1 <= ckpt_of(tmp_path)["step"] < 100


@pytest.mark.parametrize("flags, flag", [
    ("--no-cm --lr 1e10 --save-every 1", "--lr"),               # finite weights that predict NaN
    ("--div-bound 0 --lr 0.02 --w-con 0", "--div-bound")])      # Eq. (2) as printed runs away
def test_what_diverges_is_not_saved(tmp_path, tiny, capsys, flags, flag):
    refuses(capsys, train.main, *tiny, "--base", "ddpm", "--warmup", 0, "--steps", 60,
            *flags.split(), "--out", tmp_path / "run", says=[flag])
    assert not (tmp_path / "run/ckpt.pt").exists()


def test_a_compiler_that_is_missing(tmp_path, tiny, monkeypatch):
    """--compile where nothing compiles: a warning in the log, and the same training."""
    def broken(*_, **__):
        def call(*_):
            raise RuntimeError("no C++ compiler found")
        return call
    flags = (*tiny, "--steps", 3, "--out")
    call(train.main, *flags, tmp_path / "eager")
    monkeypatch.setattr(torch, "compile", broken)
    call(train.main, *flags, tmp_path / "broken", "--compile")
    first, *rest = read_log(tmp_path / "broken")
    assert first["step"] == 0 and "no C++ compiler found" in first["warning"]
    assert read_log(tmp_path / "eager") == rest


def test_d_per_group_is_weighted(digits):
    """With --cm-fraction an image stands for as many as its weight says."""
    meter = loop.Meter(digits.counts, digits.class_names, torch.device("cpu"))
    y = torch.tensor([0, 0, 9])
    meter.add_D(torch.tensor([1.0, 4.0, 7.0]), y, torch.tensor([2.0, 1.0, 0.5]))
    meter.add({"base": torch.tensor(1.0)})
    meter.steps = 1
    means = meter.means(runtime.Runtime(torch.device("cpu"), torch.float32))
    assert means["D_Many"] == pytest.approx(2.0) and means["D_Few"] == pytest.approx(7.0)


def test_snapshots_and_grids(tmp_path, tiny):
    call(train.main, *tiny, "--steps", 4, "--keep-every", 2, "--sample-every", 4, "--out", tmp_path)
    snapshots = sorted(tmp_path.glob("ckpt-*.pt"))
    assert [disk.load(path, ["diffusion"])["step"] for path in snapshots] == [2, 4]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert board.Images("samples")[0].step == 4
    scalars = set(board.Tags()["scalars"])
    assert {"loss/base", "loss/div", "D/Few", "optimisation/lr", "speed/images_per_s"} <= scalars
    assert (tmp_path / "grid-0000004.png").exists()


def test_distances_during_training(tmp_path, tiny, classifier, capsys, measured):
    """Those that evaluate.py measures on the same samples; in other features is another curve."""
    flags = (*tiny, "--eval-every", 3, "--eval-num", 60, "--keep-every", 3, "--out", tmp_path)
    call(train.main, *flags, "--steps", 5, "--features", classifier)
    other = disk.load(classifier, ["classifier"])
    disk.save(tmp_path / "other.pt", {**other, "step": 0})
    refuses(capsys, train.main, *flags, "--steps", 7, "--features", tmp_path / "other.pt",
            says=["--features"])
    records = [r for r in read_log(tmp_path) if "FD" in r]
    assert [r["step"] for r in records] == [3, 5] and records[0]["eval_num"] == 60
    result = measured("--ckpt", tmp_path / "ckpt-0000003.pt", "--num", 60, "--features", classifier)
    assert records[0]["FD"] == pytest.approx(result["fd"], rel=1e-6)
    for group in ("Many", "Medium", "Few"):
        assert records[0][f"FD_{group}"] == pytest.approx(result["groups"][group]["fd"], rel=1e-6)


def test_default_names_and_paper_defaults():
    paper = vars(resolved("--preset", "paper"))
    expected = {"dataset": "cifar100", "ir": 100, "base": "oc", "cm": True, "lam": 1,
                "rank_ratio": 0.1, "steps": 300000, "lr": 2e-4, "warmup": 5000, "batch_size": 64,
                "ema": 0.9999, "dropout": 0.1, "ch": 128, "ch_mult": [1, 2, 2, 2], "attn": [1],
                "num_res_blocks": 2, "grad_clip": 1, "label_drop": 0.1, "w_con": 1, "w_div": 1,
                "div_bound": 0.01, "accumulate": 1, "out": "out/cifar100-ir100-oc-cm-seed0"}
    assert {k: paper[k] for k in expected} == expected
    own = ("--preset", "paper")
    assert resolved(*own, "--lam", 0.5).out != paper["out"]
    assert resolved(*own, "--seed", 2).out.endswith("seed2")
    assert resolved(*own, "--steps", 9).out == paper["out"]


def test_presets(monkeypatch):
    """tiny without a GPU."""
    sizes = {"tiny": (16, 32, 4000), "small": (32, 64, 20_000), "paper": (None, 128, 300_000)}
    for name, size in sizes.items():
        args = resolved("--dataset", "folder", "--preset", name)
        assert (args.resolution, args.ch, args.steps) == size
    assert resolved("--dataset", "folder") == resolved("--dataset", "folder", "--preset", "tiny")
    assert resolved() == resolved("--preset", "paper")                  # a set of the paper's
    monkeypatch.setattr(train.runtime, "find_device", lambda name: torch.device("cuda"))
    assert resolved("--dataset", "folder") == resolved("--dataset", "folder", "--preset", "paper")
    assert resolved("--dataset", "digits").preset == "digits"


VALUES = {      # of each base's own hyper-parameters, none the default
    "cbdm_tau": 0.1, "cbdm_gamma": 3.0, "focal_gamma": 0.5, "rop_weight": 2.0, "rop_margin": 2.0,
    "ct_double": 2, "ct_grid": "karras",
}


@pytest.mark.parametrize("name", losses.FLAGS)
def test_a_flag_reaches_its_loss_and_no_other(name, capsys):
    flag = "--" + name.replace("_", "-")
    for base, entry in losses.BASES.items():
        if name not in losses.options_of(entry):
            refuses(capsys, train.main, "--base", base, "--no-cm", flag, VALUES[name], says=[flag])
            continue
        bound = losses.bind(base, vars(resolved("--base", base, flag, VALUES[name])))
        assert {**bound.loss.keywords, **bound.draw_t.keywords}[name] == VALUES[name]


@pytest.fixture
def started(monkeypatch, tiny, tmp_path):
    """started(*flags): the Training of a run of train.py with these flags, before its loop."""
    def start(*flags):
        found = []
        monkeypatch.setattr(train, "loop", lambda training, *_: found.append(training))
        call(train.main, *tiny, "--steps", 4, "--out", tmp_path, *flags)
        return found[0]
    return start


def test_sets_that_may_be_mirrored_are(monkeypatch, started):
    """--flip, --no-flip, and the set's own choice: digits are not, others are."""
    def pool(*flags):
        return started(*flags).batch().pool.x_0
    plain = pool()
    mirrored = pool("--flip")
    are = (mirrored == plain.flip(3)).flatten(1).all(1)
    assert ((mirrored == plain).flatten(1).all(1) | are).all()
    assert 0 < are.sum() < 16
    monkeypatch.setitem(readers.READERS, "digits", replace(readers.READERS["digits"], flip=True))
    assert torch.equal(pool(), mirrored)
    assert torch.equal(pool("--no-flip"), plain)
    ada = started("--ada", 1e-9).batch()
    mirrors = ada.augmentation[:, 0] == 1                   # and the network is told
    assert torch.equal(ada.pool.x_0[mirrors], plain[mirrors].flip(3))
    assert torch.equal(ada.pool.x_0[~mirrors], plain[~mirrors])
    assert 0 < mirrors.sum() < 16


def test_flags_reach_the_step(started):
    training = started(
        "--w-div", 0.2, "--div-bound", 0, "--lam", 0.5, "--independent-dropout", "all",
        "--label-drop", 0.3, "--cbdm-y", "train", "--base", "cbdm", "--ada", 0.4,
        "--rank-ratio", 0.5, "--resample", 0)
    objective = training.objective
    assert np.mean([(training.batches.at(step)[1] > 5).float().mean() for step in range(30)]) > 0.3
    assert objective.cm == losses.CMConfig(0.5, 1.0, 0.2, 0.0, "all", 1.0, 0.5)
    assert (objective.label_drop, objective.ada) == (0.3, 0.4)
    counts = load_long_tailed(training.args).counts
    assert objective.counts.tolist() == counts.tolist()
    assert objective.y_other_weights.tolist() == counts.tolist()
    assert {part.rank for _, _, part in reserved(objective.net.decoder)} == {1, 8, 16}


def test_the_seed_is_that_of_everything(started):
    """Initial weights, the order of the images, and what a step draws."""
    runs = [started("--seed", seed) for seed in (0, 1)]
    batches = [run.batch() for run in runs]
    assert not torch.equal(*(run.params["encoder.head.weight"] for run in runs))
    assert not torch.equal(*(b.pool.y for b in batches))
    assert not torch.equal(*(b.eps for b in batches))


def test_an_update_is_clipping_adam_and_averaging(started):
    """Four updates with given gradients against a literal version in float64."""
    training = started("--lr", 0.01, "--warmup", 3, "--ema", 0.2, "--grad-clip", 2)
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
        training.step = step
        assert training.update() == pytest.approx(norm, rel=1e-4)
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
    assert_equal(training.state()["ema"], training.ema)
    assert_equal(training.state()["model"], training.params)


def test_lr_decay_is_half_a_cosine_and_fixes_the_steps(started, tiny, tmp_path, capsys):
    flags = ("--lr", 0.01, "--warmup", 2, "--lr-decay", "--steps")
    training = started(*flags, 8)
    rates = [0.01 / 2, *(0.01 * (0.5 + 0.5 * np.cos(np.pi * step / 8)) for step in range(1, 8))]
    assert [training.learning_rate(step) for step in range(8)] == pytest.approx(rates)
    disk.save(tmp_path / "ckpt.pt", training.state())
    refuses(capsys, train.main, *tiny, *flags, 9, "--out", tmp_path, says=["--steps"])
