"""torchrun: the same run, the same images and the same numbers on two gloo processes; a killed rank; --accumulate."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, TINY_FLAGS, call

import evaluate
import runtime
import sample
import train

RUNS = [(base, cm) for base in ("ddpm", "cbdm", "oc", "focal", "rop", "consistency") for cm in ("--cm", "--no-cm")]


def torchrun(*argv, processes=2):
    """Start torchrun; stdout and stderr go to one pipe."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *argv]
    return subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})


def losses_of(out):
    """The logged numbers of a run but for its speed: a list of dicts."""
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in (out / "log.jsonl").open()]


def train_flags(base, cm, steps, data_dir, out, *more):
    flags = [*TINY_FLAGS, "--base", base, cm, "--dropout", 0, "--steps", steps, "--data-dir", data_dir, "--out", out, *more]
    return [str(f) for f in flags]


def assert_same_losses(a, b):
    a, b = losses_of(a), losses_of(b)
    assert len(a) == len(b) > 0 and [r.keys() for r in a] == [r.keys() for r in b]
    for r, s in zip(a, b):
        assert r == pytest.approx(s, rel=1e-4, abs=1e-9)


@pytest.fixture(scope="module")
def two(tmp_path_factory, data_dir, cm_run, classifier):
    """Everything that is compared, done once by two processes: the folder of the results."""
    out = tmp_path_factory.mktemp("two")
    work = [["train", *train_flags(base, cm, 20, data_dir, out / (base + cm))] for base, cm in RUNS]
    work += [["train", *train_flags("oc", "--cm", 10, data_dir, out / "resumed")]]
    pair = ["--ckpt", str(cm_run / "ckpt.pt"), "--num", "23", "--steps", "5", "--device", "cpu"]
    work += [["sample", *pair, "--out", str(out / "sample")], ["sample", *pair, "--num", "1", "--out", str(out / "one")],
             ["evaluate", *pair, "--num", "50", "--features", str(classifier), "--data-dir", str(data_dir), "--out-json", str(out / "eval.json")]]
    (out / "work.json").write_text(json.dumps(work))
    p = torchrun("tests/two_processes.py", out / "work.json")
    text = p.communicate(timeout=300)[0]
    assert p.returncode == 0, text
    return out


@pytest.mark.parametrize("base, cm", RUNS)
def test_losses_equal_one_processes(two, tmp_path, data_dir, base, cm):
    call(train.main, *train_flags(base, cm, 20, data_dir, tmp_path))
    assert_same_losses(tmp_path, two / (base + cm))


@pytest.mark.parametrize("base", ["cbdm", "oc", "consistency"])
def test_accumulate_is_the_same_step(two, tmp_path, data_dir, base):
    call(train.main, *train_flags(base, "--cm", 20, data_dir, tmp_path, "--accumulate", 4))
    assert_same_losses(tmp_path, two / (base + "--cm"))


def test_accumulate_and_processes_share_the_dropout_masks(tmp_path, data_dir):
    """A pass of --accumulate draws what a process would: two passes are two processes, also with dropout."""
    common = [*TINY_FLAGS, "--steps", 3, "--data-dir", data_dir, "--out"]
    call(train.main, *common, tmp_path / "one", "--accumulate", 2)
    p = torchrun("train.py", *common, tmp_path / "two")
    assert p.wait(120) == 0, p.stdout.read()
    assert_same_losses(tmp_path / "one", tmp_path / "two")


def test_resuming_on_another_number_of_processes(two, data_dir):
    """Ten steps on two processes and ten on one are the twenty of the run above."""
    call(train.main, *train_flags("oc", "--cm", 20, data_dir, two / "resumed"))
    assert_same_losses(two / "resumed", two / "oc--cm")


def test_samples_and_numbers_are_one_processes(two, cm_run, classifier, data_dir, tmp_path):
    pair = ["--ckpt", cm_run / "ckpt.pt", "--num", 23, "--steps", 5, "--device", "cpu"]
    call(sample.main, *pair, "--out", tmp_path)
    with np.load(tmp_path / "samples.npz") as a, np.load(two / "sample/samples.npz") as b:
        assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1 and np.array_equal(a["arr_1"], b["arr_1"])
        assert a["arr_0"].shape == (23, 8, 8, 3)
    with np.load(two / "one/samples.npz") as f:             # fewer images than processes
        assert np.abs(f["arr_0"].astype(int) - np.load(tmp_path / "samples.npz")["arr_0"][:1]).max() <= 1
    call(evaluate.main, *pair, "--num", 50, "--features", classifier, "--data-dir", data_dir, "--out-json", tmp_path / "eval.json")
    a, b = (runtime.read_json(f / "eval.json") for f in (tmp_path, two))
    assert a["fd"] == pytest.approx(b["fd"], rel=1e-3) and a["num"] == b["num"] == 50
    assert a["splits"]["Few"]["fd"] == pytest.approx(b["splits"]["Few"]["fd"], rel=1e-3)


def children(pid):
    """Process ids of the children of a process."""
    return [int(p) for p in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]


def test_a_killed_rank_ends_the_job_and_the_checkpoint_is_whole(tmp_path, data_dir):
    p = torchrun("train.py", *train_flags("oc", "--cm", 10 ** 6, data_dir, tmp_path, "--save-every", "1"))
    while not (tmp_path / "ckpt.pt").exists():
        assert p.poll() is None, p.stdout.read()
        time.sleep(0.05)
    os.kill(children(p.pid)[1], signal.SIGKILL)
    start = time.time()
    p.communicate(timeout=60)
    assert p.returncode != 0 and time.time() - start < 60
    step = runtime.load(tmp_path / "ckpt.pt", ["diffusion"])["step"]
    call(train.main, *train_flags("oc", "--cm", step + 2, data_dir, tmp_path, "--save-every", "1"))
    assert runtime.load(tmp_path / "ckpt.pt", ["diffusion"])["step"] == step + 2


def test_a_signal_to_torchrun_saves(tmp_path, data_dir):
    p = torchrun("train.py", *train_flags("ddpm", "--no-cm", 10 ** 6, data_dir, tmp_path))
    while not (tmp_path / "log.jsonl").exists():
        assert p.poll() is None, p.stdout.read()
        time.sleep(0.05)
    p.send_signal(signal.SIGTERM)
    text = p.communicate(timeout=60)[0]
    assert "stopped by signal 15" in text
    assert runtime.load(tmp_path / "ckpt.pt", ["diffusion"])["step"] == losses_of(tmp_path)[-1]["step"]
