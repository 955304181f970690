"""A user's mistake: one line on stderr with the flag and the fix, exit code 2, no traceback.

Nothing is lost. And what users have stays valid: their files, and files of older versions.
"""
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, TINY_FLAGS, call, refuses
from PIL import Image

import disk
import evaluate
import prune_probe
import runtime
import sample
import train
from data import load
from pages import report
from probes import capacity
from recognition import classify
from runtime import UserError


# --------------------------------------------------------------------------------------------------
# Flags

TRAIN = {       # flags -> what the line must say
    "unknown data set": (["--dataset", "imagenot"], ["--dataset imagenot", "cifar100"]),
    "ir below 1": (["--ir", 0.5], ["--ir", "at least 1"]),
    "ir too large": (["--ir", 1000], ["--ir 1000", "no image", "below 148"]),
    "ir is not a number": (["--ir", "many"], ["--ir", "number"]),
    "rank ratio 0": (["--rank-ratio", 0], ["--rank-ratio", "greater than 0", "at most 1"]),
    "rank ratio above 1": (["--rank-ratio", 1.5], ["--rank-ratio", "at most 1"]),
    "steps 0": (["--steps", 0], ["--steps", "at least 1"]),
    "negative learning rate": (["--lr", -1], ["--lr", "greater than 0"]),
    "learning rate nan": (["--lr", "nan"], ["--lr", "greater than 0"]),
    "width that the norm cannot divide": (["--ch", 130], ["--ch 130", "multiple of 32"]),
    "odd width": (["--ch", 5], ["--ch 5", "even"]),
    "attention on a level that is not": (["--attn", 5], ["--attn 5", "levels 0 to 1"]),
    "too many levels": (["--ch-mult", 1, 1, 1, 1, 1], ["--ch-mult", "8 pixels"]),
    "resolution of a fixed set": (["--resolution", 16], ["--resolution 16", "8 x 8"]),
    "class order names half": (["--class-order", "0-4"],
                               ["--class-order", "each of the 10 classes"]),
    "accumulate does not divide": (["--accumulate", 7], ["--batch-size 16", "--accumulate 7"]),
    "device": (["--device", "tpu9"], ["--device tpu9"]),
    "device without numbers": (["--device", "meta"], ["--device meta", "not one of cpu"]),
    "a value for a flag without one": (["--cm", "False"], ["--cm", "takes no value", "False"]),
    "unknown flag": (["--learning-rate", 1], ["--learning-rate"]),
}


@pytest.mark.parametrize("case", TRAIN)
def test_train_refuses(case, capsys, data_dir, tmp_path):
    flags, says = TRAIN[case]
    out = tmp_path / "run"
    refuses(capsys, train.main, *TINY_FLAGS, "--steps", 2, "--data-dir", data_dir, "--out", out,
            *flags, says=says)
    assert not out.exists()


def test_batch_size_and_processes(capsys, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refuses(capsys, train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path,
            says=["--batch-size 16", "3 processes"])


@pytest.mark.parametrize("flags, says", [
    (["--classes", "3-12"], ["--classes 3-12", "0 to 9"]),
    (["--classes", "cat"], ["--classes cat", "neither"]),
    (["--num", 0], ["--num", "at least 1"]),
    (["--steps", 0], ["--steps", "at least 1"]),
    (["--grid", "cubic"], ["--grid"]),
    (["--guidance", "nan"], ["--guidance"])])
def test_sample_refuses(capsys, cm_run, tmp_path, flags, says):
    out = tmp_path / "s"
    refuses(capsys, sample.main, "--ckpt", cm_run / "ckpt.pt", "--device", "cpu", "--out", out,
            *flags, says=says)
    assert not out.exists()


def test_evaluate_and_report_refuse(capsys, cm_run, tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK")
    refuses(capsys, evaluate.main, "--samples", tmp_path / "a.npz", "--device", "cpu",
            says=["--samples"])
    refuses(capsys, evaluate.main, "--ckpt", cm_run / "ckpt.pt", "--features",
            tmp_path / "none.pt", "--device", "cpu", says=["--features", "classify.py"])
    refuses(capsys, report.main, "--row", "DDPM", says=["--row DDPM", "NAME=FILE"])


# --------------------------------------------------------------------------------------------------
# Data

def test_rank_without_torchrun(capsys, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    refuses(capsys, train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path,
            says=["RANK", "WORLD_SIZE", "torchrun"])


def test_a_checkpoint_of_ours_that_lacks_a_part(capsys, cm_run, tmp_path):
    state = disk.load(cm_run / "ckpt.pt", ["diffusion"])
    for key in ("ema", "network", "config"):
        disk.save(tmp_path / "part.pt", {k: v for k, v in state.items() if k != key})
        refuses(capsys, sample.main, "--ckpt", tmp_path / "part.pt", "--device", "cpu",
                says=["--ckpt", "not a whole checkpoint", key])


def test_out_of_memory_on_the_cpu_is_one_line(capsys):
    def main():
        torch.empty(1 << 50)
    with pytest.raises(SystemExit) as e:
        runtime.run(main)
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.startswith("error: out of memory on this machine")


def test_data_folder(capsys, tmp_path):
    root = tmp_path / "set"

    def check(*says):
        refuses(capsys, train.main, "--dataset", "folder", "--data-dir", root,
                "--pack-dir", tmp_path / "packed", "--resolution", 8, "--out", tmp_path / "run",
                says=["--data-dir", *says])
    check("no such folder")
    (root / "cat").mkdir(parents=True)
    check("no sub-folder with images")
    Image.new("RGB", (9, 9)).save(root / "cat/1.png")
    check("only one class", "cat")
    (root / "dog").mkdir()
    whole = (root / "cat/1.png").read_bytes()
    broken = {"broken.jpg": b"no image", "cut.png": whole[:40], "empty.png": b""}
    for name, content in broken.items():
        path = root / "dog" / name
        path.write_bytes(content)
        check(f"dog/{name}", "fix or remove")
        path.unlink()
    assert not list(tmp_path.glob("packed/[!.]*")) and not (tmp_path / "run").exists()


def test_no_network_and_no_data(capsys, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("network is unreachable")
    cifar = torchvision.datasets.cifar
    monkeypatch.setattr(cifar, "download_and_extract_archive", offline)
    refuses(capsys, train.main, "--dataset", "cifar100", "--data-dir", tmp_path,
            "--out", tmp_path / "run", "--device", "cpu",
            says=["--data-dir", "put cifar-100-python.tar.gz", "https://", "unreachable"])


def test_a_pack_cut_in_half_is_packed_anew(tmp_path):
    whole = np.array(load("digits", tmp_path).images)
    for suffix in (".npy", ".json"):
        pack = tmp_path / f"packed/digits-train-8{suffix}"
        os.truncate(pack, pack.stat().st_size // 2)
        assert np.array_equal(load("digits", tmp_path).images, whole)


def make_folder(root, sizes):
    """A folder with a sub-folder of small images for each of {class name: number of images}."""
    for name, n in sizes.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (8, 8), (i * 20, 90, 10)).save(root / name / f"{i}.png")


def test_probes_want_the_checkpoints_classes(tmp_path, capsys):
    make_folder(tmp_path / "one", {"cat": 6, "dog": 5, "one": 4})
    make_folder(tmp_path / "two", {"cat": 6, "dog": 3, "two": 4})
    call(train.main, "--dataset", "folder", "--data-dir", tmp_path / "one",
         "--pack-dir", tmp_path / "packed", "--resolution", 8, "--ch", 16, "--ch-mult", 1, 2,
         "--num-res-blocks", 1, "--batch-size", 4, "--steps", 1, "--sample-every", 0,
         "--device", "cpu", "--out", tmp_path / "run")
    probes = [[prune_probe.main], [capacity.main, "allocation"],
              [capacity.main, "dominance"]]
    for main, *command in probes:
        refuses(capsys, main, *command, "--ckpt", tmp_path / "run/ckpt.pt",
                "--data-dir", tmp_path / "two", "--device", "cpu", says=["--data-dir"])


# --------------------------------------------------------------------------------------------------
# Checkpoints

BROKEN = {      # files that are not a checkpoint of ours -> what the line must say
    "missing.pt": "no such file", "cut.pt": "not a whole checkpoint",
    "empty.pt": "not a whole checkpoint", "text.pt": "not a whole checkpoint",
    "foreign.pt": "not a diffusion", "architecture.pt": "do not fit the network"}


@pytest.fixture(scope="module")
def broken(tmp_path_factory, cm_run):
    """A folder with the files in BROKEN."""
    folder = tmp_path_factory.mktemp("broken")
    good = cm_run / "ckpt.pt"
    content = good.read_bytes()
    (folder / "cut.pt").write_bytes(content[:len(content) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("hello")
    torch.save({"model": {}}, folder / "foreign.pt")
    state = disk.load(good, ["diffusion"])
    wider = {**state["network"], "ch": 32}
    disk.save(folder / "architecture.pt", {**state, "network": wider})
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_sample_refuses_a_broken_checkpoint(capsys, broken, name):
    refuses(capsys, sample.main, "--ckpt", broken / name, "--device", "cpu",
            says=["--ckpt", BROKEN[name]])


@pytest.mark.parametrize("name", BROKEN)
def test_evaluate_refuses_a_broken_checkpoint(capsys, broken, name, classifier, data_dir):
    refuses(capsys, evaluate.main, "--ckpt", broken / name, "--features", classifier,
            "--data-dir", data_dir, "--device", "cpu", says=["--ckpt", BROKEN[name]])


def test_a_run_whose_checkpoint_is_cut_is_not_overwritten(capsys, cm_run, data_dir, tmp_path):
    content = (cm_run / "ckpt.pt").read_bytes()[:1000]
    (tmp_path / "ckpt.pt").write_bytes(content)
    refuses(capsys, train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path,
            says=["--out", "not a whole checkpoint"])
    assert (tmp_path / "ckpt.pt").read_bytes() == content


def test_one_byte_of_a_checkpoint_has_changed(capsys, cm_run, tmp_path):
    """A disk may do that: all parts are there, and one weight is another number."""
    content = bytearray((cm_run / "ckpt.pt").read_bytes())
    weights = disk.load(cm_run / "ckpt.pt", ["diffusion"])["model"]
    largest = max(weights.values(), key=torch.numel).contiguous(memory_format=torch.channels_last)
    place = content.find(largest.permute(0, 2, 3, 1).numpy().tobytes()[:64])
    assert place > 0
    content[place + 2] ^= 1
    (tmp_path / "ckpt.pt").write_bytes(content)
    refuses(capsys, sample.main, "--ckpt", tmp_path / "ckpt.pt", "--device", "cpu",
            says=["--ckpt", "not a whole checkpoint"])


@pytest.mark.parametrize("main, flags", [
    (train.main, ["--ch", 16]), (classify.main, ["--width", 8])])
def test_a_link_to_a_checkpoint_that_is_gone_is_no_new_run(main, flags, capsys, data_dir, tmp_path):
    """As where the disk of the runs is not mounted: starting anew would drop the old log."""
    (tmp_path / "ckpt.pt").symlink_to(tmp_path / "elsewhere.pt")
    refuses(capsys, main, "--dataset", "digits", "--data-dir", data_dir, "--out", tmp_path,
            "--device", "cpu", *flags, says=["--out", "ckpt.pt", "link that leads nowhere"])
    assert (tmp_path / "ckpt.pt").is_symlink()


KILLS = """
import os, random, signal, sys, time, torch, disk

path = sys.argv[1]
moments = random.Random(0)

def save(step):
    model = {str(i): torch.full((1000,), step) for i in range(50)}
    parts = {**dict.fromkeys(disk.REQUIRED["diffusion"]), "network": {}, "ema": {},
             "config": {"dtype": "float32"}, "data": {"class_names": []}}
    disk.save(path, {**parts, "kind": "diffusion", "step": step, "model": model})

save(0)
for kill in range(20):
    first = disk.load(path, ["diffusion"])["step"]
    inode = os.stat(path).st_ino
    child = os.fork()
    if not child:
        for step in range(first + 1, 10 ** 9):
            save(step)
    while os.stat(path).st_ino == inode:        # until the child has saved once
        time.sleep(0.01)
    time.sleep(0.05 * moments.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = disk.load(path, ["diffusion"])
    step = state["step"]
    assert len(state["model"]) == 50
    assert all((v == step).all() for v in state["model"].values())
    assert step > first
    print(step)
"""


def test_twenty_kills_while_saving(tmp_path):
    """kill -9 at twenty random moments of writing.

    The checkpoint on disk can always be loaded, is whole and goes forwards.
    """
    done = subprocess.run([sys.executable, "-c", KILLS, tmp_path / "ckpt.pt"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and len(done.stdout.split()) == 20, done.stderr


def test_nodes_that_do_not_share_the_folder(monkeypatch):
    """Ranks that find runs at different steps would train different steps."""
    rt = runtime.Runtime(torch.device("cpu"), torch.float32, rank=0, world=2)
    # The other rank's share of each maximum: it is at step 500 both times
    others = iter([500, 0, 500, -500])
    monkeypatch.setattr(runtime.Runtime, "maximum", lambda self, value: max(value, next(others)))
    with pytest.raises(UserError, match="share this folder"):
        rt.agree(0, "out/x")
    rt.agree(500, "out/x")


# --------------------------------------------------------------------------------------------------
# Disks and logs

def test_a_folder_that_cannot_be_written(capsys, cm_run, data_dir, tmp_path, monkeypatch):
    """No space left while a checkpoint is written: the old one stays, and no half-written file."""
    run = tmp_path / "run"
    shutil.copytree(cm_run, run)
    before = (run / "ckpt.pt").read_bytes()

    def full_disk(value, f):
        f.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    common = (*TINY_FLAGS, "--data-dir", data_dir)
    refuses(capsys, train.main, *common, "--out", run, "--steps", 31,
            says=["--out", "No space left"])
    assert (run / "ckpt.pt").read_bytes() == before and not list(run.glob(".*tmp"))
    (tmp_path / "file").write_text("in the way")
    refuses(capsys, train.main, *common, "--out", tmp_path / "file/run", "--steps", 2,
            says=["--out"])


def test_the_disks_own_error_is_said(tmp_path):
    """A write that the system cuts short, as a full disk does: torch's message hides why."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(UserError, match=r"--out: cannot write .*File too large"):
            disk.save(tmp_path / "ckpt.pt", {"model": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written(capsys, data_dir, tmp_path):
    # A read-only file would not stop root, who may run this
    (tmp_path / "log.jsonl").mkdir()
    refuses(capsys, train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path,
            "--steps", 2, says=["--out", "log.jsonl"])


def test_pipes_are_refused_not_waited_for(capsys, cm_run, data_dir, tmp_path):
    """What is no regular file would be waited for, or, as /dev/null, be replaced."""
    pipe = tmp_path / "log.jsonl"
    os.mkfifo(pipe)
    refuses(capsys, train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path,
            "--steps", 2, says=["--out", "log.jsonl", "not a regular file"])
    refuses(capsys, evaluate.main, "--samples", pipe, "--reference", "digits", "--device", "cpu",
            "--data-dir", data_dir, says=["--samples", "not a regular file"])
    refuses(capsys, sample.main, "--ckpt", cm_run / "ckpt.pt", "--export", pipe, "--device", "cpu",
            says=["--export"])
    refuses(capsys, report.main, "--row", f"CM={pipe}", says=["--row"])
    with pytest.raises(UserError, match="--out /dev/null: not a regular file"):
        disk.check_writable("/dev/null")


def test_a_log_cut_in_half(cm_run, data_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(cm_run, run)
    log = run / "log.jsonl"
    os.truncate(log, log.stat().st_size - 40)           # in the middle of the last line
    call(train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", run, "--steps", 32)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [*range(1, 30), 31, 32]


# --------------------------------------------------------------------------------------------------
# What users have is kept

def test_what_users_have_is_kept(tmp_path, cm_run, data_dir, classifier, capsys):
    """sample.py removes its own pictures only; evaluate.py keeps numbers of other settings."""
    (tmp_path / "png/holiday").mkdir(parents=True)
    for name in ("holiday/1.png", "me.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / "png" / name)
    for num in (12, 3):
        call(sample.main, "--ckpt", cm_run / "ckpt.pt", "--num", num, "--steps", 2,
             "--out", tmp_path, "--device", "cpu")
    assert len(list((tmp_path / "png").rglob("*.png"))) == 2
    for k in (1, 2, 2):
        call(evaluate.main, "--samples", tmp_path / "samples.npz", "--data-dir", data_dir,
             "--features", classifier, "--device", "cpu", "--k", k)
    assert "are kept as eval-1.json" in capsys.readouterr().out
    files = tmp_path.glob("eval*.json")
    k_and_newest = [(disk.read_json(f)["settings"]["k"], f.name == "eval.json") for f in files]
    assert sorted(k_and_newest) == [(1, False), (2, True)]


def test_a_json_of_someone_else_beside_the_samples(tmp_path, data_dir, classifier, capsys):
    grey = np.random.RandomState(0).randint(0, 256, (30, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "theirs.npz", grey.repeat(3, 3))
    flags = ("--reference", "digits", "--data-dir", data_dir, "--features", classifier,
             "--device", "cpu")
    theirs = {"class_names": ["a"], "labels": [1], "n": 3, "data": "cifar"}
    for content in (theirs, [1, 2]):
        disk.write_json(tmp_path / "theirs.json", content)
        call(evaluate.main, "--samples", tmp_path / "theirs.npz", *flags)
        assert disk.read_json(tmp_path / "eval.json")["num"] == 30
    np.savez(tmp_path / "bare.npz", features=np.zeros((30, 64)))
    refuses(capsys, evaluate.main, "--samples", tmp_path / "bare.npz", *flags,
            says=["--samples", "--save-stats"])


# --------------------------------------------------------------------------------------------------
# Files and flags of older versions: the names changed, what they hold is read as before

OLD = {"split_seed": 3, "split_rule": "thirds", "num_split": 2, "seed": 0}
NEW = {"tail_seed": 3, "group_rule": "thirds", "num_group": 2, "seed": 0}


def test_read_result_translates_old_names(tmp_path):
    path = tmp_path / "eval.json"
    values = {"Many": {"fid": 1.0}, "Few": {"fid": 2.0}}
    new = {"settings": NEW, "groups": values, "fid": 3.0}
    disk.write_json(path, {"settings": OLD, "splits": values, "fid": 3.0})
    assert disk.read_result(path) == new
    disk.write_json(path, new)
    assert disk.read_result(path) == new
    disk.write_json(path, {"splits": values})            # without settings
    assert disk.read_result(path) == {"groups": values}


def test_read_result_of_what_is_none(tmp_path):
    path = tmp_path / "eval.json"
    assert disk.read_result(path) is None
    for text in ("", "{", "[1, 2]", "3", '"splits"'):
        path.write_text(text)
        assert disk.read_result(path) is None


def test_up_to_date_accepts_old_names(tmp_path):
    path = tmp_path / "samples.json"
    for made_with in (OLD, NEW):
        disk.write_json(path, {"settings": made_with})
        assert disk.up_to_date(path, NEW)
        for other in ({**NEW, "tail_seed": 4}, {**NEW, "num_group": 3}, {"seed": 0}):
            assert not disk.up_to_date(path, other)


def test_a_hash_of_the_code_is_that_of_what_runs(tmp_path, monkeypatch):
    """Of the script and of what it imports; comments and docstrings do not move it."""
    monkeypatch.setattr(disk, "__file__", str(tmp_path / "disk.py"))
    code = {"a.py": "import b\nx = 1\n", "b.py": "def f():\n    from c import y\n",
            "c.py": "y = 1\n", "other.py": "z = 1\n"}

    def hash_with(**changed):
        for name, text in {**code, **{f"{k}.py": v for k, v in changed.items()}}.items():
            (tmp_path / name).write_text(text)
        disk.code_hash.cache_clear()
        return disk.code_hash("a.py")
    first = hash_with()
    assert hash_with(a='"""Text."""\nimport b\n\nx = 1    # one\n', other="z = 2\n") == first
    assert len({first, hash_with(a="import b\nx = 2\n"), hash_with(c="y = 2\n"),
                hash_with(b="def f():\n    from c import z\n")}) == 4
    disk.code_hash.cache_clear()


@pytest.mark.parametrize("script, key", [("sample.py", "code_sha256"),
                                         ("evaluate.py", "evaluate_code_sha256")])
def test_what_other_code_made_is_made_again(cm_run, classifier, data_dir, tmp_path, capsys,
                                            monkeypatch, script, key):
    out = tmp_path / "samples"
    commands = {"sample.py": lambda: call(
        sample.main, "--ckpt", cm_run / "ckpt.pt", "--num", 60, "--steps", 2, "--out", out,
        "--if-needed")}
    commands["evaluate.py"] = lambda: call(
        evaluate.main, "--samples", out / "samples.npz", "--features", classifier, "--data-dir",
        data_dir, "--if-needed")
    result = {"sample.py": out / "samples.json", "evaluate.py": out / "eval.json"}[script]
    commands["sample.py"]()
    commands[script]()
    capsys.readouterr()
    commands[script]()
    assert "up to date" in capsys.readouterr().out
    before = disk.read_json(result)["settings"][key]
    monkeypatch.setattr(disk, "code_hash", lambda name: f"another {name}")
    commands[script]()
    assert "up to date" not in capsys.readouterr().out
    assert before != disk.read_json(result)["settings"][key] == f"another {script}"


def test_up_to_date_compares_as_json(tmp_path):
    path = tmp_path / "samples.json"
    assert not disk.up_to_date(path, {})                 # no such file
    disk.write_json(path, {"settings": {"classes": (1, 2)}})
    assert disk.up_to_date(path, {"classes": [1, 2]})
    assert disk.up_to_date(path, {"classes": (1, 2)})
    for content in ({}, [1], {"settings": None}):
        disk.write_json(path, content)
        assert not disk.up_to_date(path, {})


def test_checkpoints_with_old_names_are_read_and_go_on(cm_run, data_dir, tmp_path, capsys):
    """A run that was started when --tail-seed was --split-seed."""
    state = disk.load(cm_run / "ckpt.pt", ["diffusion"])
    config = dict(state["config"])
    config["split_seed"] = config.pop("tail_seed")
    disk.save(tmp_path / "ckpt.pt", {**state, "config": config})
    translated = disk.load(tmp_path / "ckpt.pt", ["diffusion"])
    assert translated["config"] == state["config"]
    common = (*TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path, "--steps", 31)
    refuses(capsys, train.main, *common, "--tail-seed", 1, says=["--tail-seed 1", "with 0"])
    call(train.main, *common)
    assert disk.load(tmp_path / "ckpt.pt", ["diffusion"])["step"] == 31


@pytest.mark.parametrize("script, required, flag, value", [
    (train, [], "tail-seed", 3), (classify, [], "tail-seed", 3),
    (classify, [], "group-rule", "thirds"), (evaluate, ["--ckpt", "x.pt"], "num-group", 2)])
def test_old_flags_are_accepted(script, required, flag, value):
    old = flag.replace("tail-", "split-").replace("group", "split")
    for word in (flag, old):
        args = script.make_parser().parse_args([*required, f"--{word}", str(value)])
        assert getattr(args, flag.replace("-", "_")) == value


# --------------------------------------------------------------------------------------------------
# What disk.py calls the same, and whose it is

def test_a_fingerprint_is_of_names_sizes_and_both_times(monkeypatch):
    def fingerprint(name="a", **changed):
        stat = {"st_size": 1, "st_mtime_ns": 2, "st_ctime_ns": 3, **changed}
        with monkeypatch.context() as m:
            m.setattr(os, "stat", lambda path: SimpleNamespace(**stat))
            return disk.fingerprint([Path("/x") / name], "/x")
    first = fingerprint()
    assert first == fingerprint()
    others = [fingerprint("b"), fingerprint(st_size=9), fingerprint(st_mtime_ns=9),
              fingerprint(st_ctime_ns=9)]
    assert len({first, *others}) == 5


def test_only_temporaries_of_processes_that_ended_are_left_over(tmp_path):
    mine, parents, ended = os.getpid(), os.getppid(), 9_999_999         # above any process's number
    found = {name: disk.is_left_over(tmp_path / name) for name in (
        f".a.{mine}.tmp", f".a.{parents}.tmp", f".a.{ended}.tmp", f"a.{ended}.tmp", ".a.tmp",
        f".a.{ended}.tmp.npz")}
    assert list(found.values()) == [True, False, True, False, False, False]
    (tmp_path / f".b.{ended}.tmp").symlink_to(tmp_path)
    assert not disk.is_left_over(tmp_path / f".b.{ended}.tmp")


def test_a_check_before_the_work_leaves_nothing_behind(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("new/deeper/x.json", "there/x.json", "there/new/x.json"):
        disk.check_writable(tmp_path / name)
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


def test_a_run_is_claimed_as_it_was_found(tmp_path, cpu):
    def claim(old):
        with disk.claim_run(tmp_path, cpu, old):
            pass
    other = "--out .*another process has written there meanwhile"
    claim(None)
    with pytest.raises(UserError, match=other):
        claim(SimpleNamespace(sha256="of a file that is gone"))
    (tmp_path / "ckpt.pt").write_bytes(b"x")
    claim(SimpleNamespace(sha256=disk.sha256(tmp_path / "ckpt.pt")))
    with pytest.raises(UserError, match=other):
        claim(None)


# --------------------------------------------------------------------------------------------------
# Several processes, odd names

@pytest.mark.parametrize("script, flags", [
    (prune_probe, ["--ckpt", "none.pt"]), (capacity, ["dominance", "--ckpt", "none.pt"]),
    (report, ["--row", "CM=none.json"])])
def test_scripts_of_one_process_refuse_torchrun(script, flags, capsys, monkeypatch):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"),
                        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    refuses(capsys, script.main, *flags, says=["WORLD_SIZE is 2", f"python {script.__name__}.py"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuses(capsys, script.main, *flags, says=["none."])


def test_odd_class_names_in_the_confusion_picture(tmp_path):
    path = tmp_path / "confusion.png"
    names = [r"$\foo$", "_hidden", "not utf-8: \udcff"]
    classify.confusion_picture(np.eye(3), np.array([3, 2, 1]), names, path)
    assert path.exists()


@pytest.mark.parametrize("command", [["-m", "latent.stable_diffusion", "--help"],
                                     [ROOT / "theory_sim.py", "--trials", "100"]])
def test_a_reader_that_leaves_is_no_traceback(command, tmp_path):
    """As with `| head -1`: nothing is said, and the exit code is that of a closed pipe."""
    read, write = os.pipe()
    os.close(read)
    out = [] if "--help" in command else ["--out", tmp_path]
    done = subprocess.run([sys.executable, *command, *map(str, out)], cwd=ROOT, stdout=write,
                          stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""
