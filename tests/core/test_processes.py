"""torchrun: two gloo processes give the same run, images and numbers as one; --accumulate.

And a killed or failing rank: the job ends, says why, and its checkpoint is whole.
"""
import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import (TINY_FLAGS, assert_same_losses, by_two_processes, call, ckpt_of, pixels,
                      read_log, torchrun, wait_for)

import disk
import sample
import train

pytestmark = pytest.mark.slow
RUNS = [("ddpm", "--no-cm"), ("cbdm", "--cm"), ("oc", "--cm"), ("consistency", "--cm")]


def train_flags(base, cm, steps, data_dir, out, *more):
    """Flags of train.py for a run without dropout."""
    return (*TINY_FLAGS, "--base", base, cm, "--dropout", 0, "--steps", steps,
            "--data-dir", data_dir, "--out", out, *more)


@pytest.fixture(scope="module")
def two(tmp_path_factory, data_dir, from_run, classifier):
    """Everything that is compared, done once by two processes: the folder of the results."""
    out = tmp_path_factory.mktemp("two")
    work = [["train", *train_flags(base, cm, 20, data_dir, out / (base + cm))]
            for base, cm in RUNS]
    work.append(["train", *train_flags("oc", "--cm", 10, data_dir, out / "resumed")])
    work.append(["train", *train_flags("oc", "--cm", 8, data_dir, out / "window", "--log-every", 4,
                                       "--save-every", 6, "--keep-every", 6)])
    pair = (*from_run, "--num", 23, "--steps", 5)
    work.append(["sample", *pair, "--out", out / "sample"])
    work.append(["sample", *pair, "--num", 1, "--out", out / "one"])
    work.append(["evaluate", *pair, "--num", 50, "--features", classifier,
                 "--out-json", out / "eval.json"])
    plain = [[str(word) for word in words] for words in work]
    (out / "work.json").write_text(json.dumps(plain))
    by_two_processes("tests/two_processes.py", out / "work.json")
    return out


@pytest.mark.parametrize("base, cm", RUNS)
def test_losses_equal_one_processes(two, tmp_path, data_dir, base, cm):
    call(train.main, *train_flags(base, cm, 20, data_dir, tmp_path))
    assert_same_losses(tmp_path, two / (base + cm))


@pytest.mark.parametrize("base", ["cbdm", "oc", "consistency"])
def test_accumulate_is_the_same_step(two, tmp_path, data_dir, base):
    call(train.main, *train_flags(base, "--cm", 20, data_dir, tmp_path, "--accumulate", 4))
    assert_same_losses(tmp_path, two / (base + "--cm"))


def test_accumulate_and_processes_share_the_dropout_masks(tmp_path, tiny):
    """A pass of --accumulate draws what a process would: two passes are two processes."""
    common = (*tiny, "--steps", 3, "--out")
    call(train.main, *common, tmp_path / "one", "--accumulate", 2)
    by_two_processes("train.py", *common, tmp_path / "two")
    assert_same_losses(tmp_path / "one", tmp_path / "two")


def test_resuming_on_another_number_of_processes(two, data_dir):
    """Ten steps on two processes and ten on one are the twenty of the run above."""
    call(train.main, *train_flags("oc", "--cm", 20, data_dir, two / "resumed"))
    assert_same_losses(two / "resumed", two / "oc--cm")


def test_a_checkpoint_between_two_log_lines_has_the_sums_of_all_processes(two, tmp_path, data_dir):
    shutil.copy(two / "window/ckpt-0000006.pt", tmp_path / "ckpt.pt")
    call(train.main, *train_flags("oc", "--cm", 8, data_dir, tmp_path, "--log-every", 4))
    assert read_log(tmp_path)[-1] == pytest.approx(read_log(two / "window")[-1], rel=1e-4, abs=1e-9)


def test_samples_and_numbers_are_one_processes(two, from_run, classifier, measured, tmp_path):
    pair = (*from_run, "--num", 23, "--steps", 5)
    call(sample.main, *pair, "--out", tmp_path)
    images = pixels(tmp_path)
    assert images.shape == (23, 8, 8, 3)
    assert np.abs(images - pixels(two / "sample")).max() <= 1
    with np.load(tmp_path / "samples.npz") as a, np.load(two / "sample/samples.npz") as b:
        assert np.array_equal(a["arr_1"], b["arr_1"])
    # Fewer images than processes
    assert np.abs(pixels(two / "one") - images[:1]).max() <= 1

    a = measured(*pair, "--num", 50, "--features", classifier)
    b = disk.read_json(two / "eval.json")
    assert a["num"] == b["num"] == 50
    assert a["fd"] == pytest.approx(b["fd"], rel=1e-3)
    assert a["groups"]["Few"]["fd"] == pytest.approx(b["groups"]["Few"]["fd"], rel=1e-3)


def test_a_killed_rank_ends_the_job_and_the_checkpoint_is_whole(tmp_path, data_dir):
    often = ("--save-every", 1)
    p = torchrun("train.py", *train_flags("oc", "--cm", 10 ** 6, data_dir, tmp_path, *often))
    wait_for(tmp_path / "ckpt.pt", p)
    ranks = subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True).stdout
    os.kill(int(ranks.split()[1]), signal.SIGKILL)
    start = time.time()
    p.communicate(timeout=60)
    assert p.returncode != 0
    assert time.time() - start < 60
    step = ckpt_of(tmp_path)["step"]
    call(train.main, *train_flags("oc", "--cm", step + 2, data_dir, tmp_path, *often))
    assert ckpt_of(tmp_path)["step"] == step + 2


@pytest.mark.parametrize("how, rank, line", [
    ("memory", 1, "out of memory on the device; take a smaller --batch-size"),
    ("disk", 0, "No space left on device"),
    ("user", 1, "--flag: a mistake of one rank"),
    ("bug", 1, "ZeroDivisionError: a mistake of the program"),
])
def test_a_rank_that_fails_ends_the_job_and_says_why_once(tmp_path, data_dir, how, rank, line):
    """The others wait for it in an exchange of gradients, and none waits to destroy the group."""
    flags = train_flags("ddpm", "--cm", 10 ** 6, data_dir, tmp_path / "run", "--sample-every", 2)
    failed = tmp_path / "failed"
    p = torchrun("tests/failing_process.py", how, rank, failed, *flags)
    text = p.communicate(timeout=300)[0]
    assert p.returncode != 0 and time.time() - failed.stat().st_mtime < 60
    said = [words for words in text.splitlines() if line in words]
    assert len(said) == 1, text
    assert text.count(f"error: rank {rank}: ") == 1 and text.count(f"error: rank {1 - rank}: ") <= 1
    assert how == "bug" or f"error: rank {rank}: " in said[0]
    assert ('train.py", line' in text) == (how == "bug"), text


def test_a_refusal_of_rank_0_ends_every_rank_without_a_traceback(tmp_path):
    """Rank 0 finds that the data are not there while the others wait for it."""
    flags = [*TINY_FLAGS, "--dataset", "folder", "--data-dir", tmp_path / "nothing"]
    p = torchrun("train.py", *flags, "--out", tmp_path / "run")
    text = p.communicate(timeout=120)[0]
    assert p.returncode != 0 and text.count("no such folder") == 1
    # torchrun adds a traceback of its own, but there is none through our files
    assert 'train.py", line' not in text and "Connection closed" not in text
