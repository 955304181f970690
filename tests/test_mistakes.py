"""A user's mistake: one line on stderr that names the flag and the fix, exit code 2, no traceback, nothing lost."""
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_FLAGS, call
from PIL import Image

import capacity_probe
import evaluate
import prune_probe
import report
import runtime
import sample
import train
from data import load
from runtime import UserError


def refuses(capsys, main, *flags, says):
    """Run a script as its command line would; it must exit with code 2 after one line that holds every word of `says`."""
    with pytest.raises(SystemExit) as e:
        runtime.run(lambda: call(main, *flags))
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert e.value.code == 2 and len(lines) == 1 and "Traceback" not in text
    for word in says:
        assert word in lines[0], lines[0]


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
    "class order names half": (["--class-order", "0-4"], ["--class-order", "each of the 10 classes"]),
    "accumulate does not divide": (["--accumulate", 7], ["--batch-size 16", "--accumulate 7"]),
    "device": (["--device", "tpu9"], ["--device tpu9"]),
    "unknown flag": (["--learning-rate", 1], ["--learning-rate"]),
}


@pytest.mark.parametrize("case", TRAIN)
def test_train_refuses(case, capsys, data_dir, tmp_path):
    flags, says = TRAIN[case]
    refuses(capsys, train.main, *TINY_FLAGS, "--steps", 2, "--data-dir", data_dir, "--out", tmp_path / "run", *flags, says=says)
    assert not (tmp_path / "run").exists()


def test_batch_size_and_processes(capsys, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refuses(capsys, train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path, says=["--batch-size 16", "3 processes"])


def test_data_folder(capsys, tmp_path):
    def check(*says):
        refuses(capsys, train.main, "--dataset", "folder", "--data-dir", tmp_path / "set", "--pack-dir", tmp_path / "packed", "--resolution",
                8, "--out", tmp_path / "run", says=["--data-dir", *says])
    check("no such folder")
    (tmp_path / "set/cat").mkdir(parents=True)
    check("no sub-folder with images")
    Image.new("RGB", (9, 9)).save(tmp_path / "set/cat/1.png")
    check("only one class", "cat")
    (tmp_path / "set/dog").mkdir()
    for name, content in (("broken.jpg", b"no image"), ("cut.png", (tmp_path / "set/cat/1.png").read_bytes()[:40]), ("empty.png", b"")):
        (tmp_path / "set/dog" / name).write_bytes(content)
        check(f"dog/{name}", "mend or remove")
        (tmp_path / "set/dog" / name).unlink()
    assert not list(tmp_path.glob("packed/*")) and not (tmp_path / "run").exists()


def test_no_network_and_no_data(capsys, tmp_path, monkeypatch):
    import torchvision
    def offline(*_, **__):
        raise OSError("network is unreachable")
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    refuses(capsys, train.main, "--dataset", "cifar100", "--data-dir", tmp_path, "--out", tmp_path / "run", "--device", "cpu",
            says=["--data-dir", "put cifar-100-python.tar.gz", "https://", "unreachable"])


def broken_checkpoints(folder, good):
    """{what: (file, what the line must say)} of everything that is not a checkpoint of ours."""
    content = good.read_bytes()
    (folder / "cut.pt").write_bytes(content[:len(content) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("hello")
    torch.save({"model": {}}, folder / "foreign.pt")
    state = runtime.load(good, ["diffusion"])
    runtime.save(folder / "architecture.pt", {**state, "network": {**state["network"], "ch": 32}})
    return {"missing.pt": "no such file", "cut.pt": "not a whole checkpoint", "empty.pt": "not a whole checkpoint",
            "text.pt": "not a whole checkpoint", "foreign.pt": "not a diffusion", "architecture.pt": "do not fit the network"}


@pytest.mark.parametrize("main", [sample.main, evaluate.main])
def test_checkpoints(capsys, cm_run, tmp_path, main):
    for name, words in broken_checkpoints(tmp_path, cm_run / "ckpt.pt").items():
        more = ["--features", tmp_path / "text.pt"] if main is evaluate.main and name == "architecture.pt" else []
        if not more:
            refuses(capsys, main, "--ckpt", tmp_path / name, "--device", "cpu", says=["--ckpt", words])


def test_a_run_whose_checkpoint_is_cut_is_not_overwritten(capsys, cm_run, data_dir, tmp_path):
    content = (cm_run / "ckpt.pt").read_bytes()[:1000]
    (tmp_path / "ckpt.pt").write_bytes(content)
    refuses(capsys, train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path, says=["--out", "not a whole checkpoint"])
    assert (tmp_path / "ckpt.pt").read_bytes() == content


@pytest.mark.parametrize("flags, says", [
    (["--classes", "3-12"], ["--classes 3-12", "0 to 9"]), (["--classes", "cat"], ["--classes cat", "neither"]),
    (["--num", 0], ["--num", "at least 1"]), (["--steps", 0], ["--steps", "at least 1"]),
    (["--grid", "cubic"], ["--grid"]), (["--guidance", "nan"], ["--guidance"])])
def test_sample_refuses(capsys, cm_run, tmp_path, flags, says):
    refuses(capsys, sample.main, "--ckpt", cm_run / "ckpt.pt", "--device", "cpu", "--out", tmp_path / "s", *flags, says=says)
    assert not (tmp_path / "s").exists()


def test_evaluate_and_report_refuse(capsys, cm_run, tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK")
    refuses(capsys, evaluate.main, "--samples", tmp_path / "a.npz", "--device", "cpu", says=["--samples"])
    refuses(capsys, evaluate.main, "--ckpt", cm_run / "ckpt.pt", "--features", tmp_path / "none.pt", "--device", "cpu",
            says=["--features", "classify.py"])
    refuses(capsys, report.main, "--row", "DDPM", says=["--row DDPM", "NAME=FILE"])


def test_a_folder_that_cannot_be_written(capsys, cm_run, data_dir, tmp_path, monkeypatch):
    """No space left while a checkpoint is written: the old one stands, no half-written file stays behind."""
    shutil.copytree(cm_run, tmp_path / "run")
    before = (tmp_path / "run/ckpt.pt").read_bytes()

    def full_disk(value, path):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    refuses(capsys, train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path / "run", "--steps", 31, says=["--out", "No space left"])
    assert (tmp_path / "run/ckpt.pt").read_bytes() == before and not list((tmp_path / "run").glob(".*tmp"))
    (tmp_path / "file").write_text("in the way")
    refuses(capsys, train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path / "file/run", "--steps", 2, says=["--out"])


def test_a_log_that_cannot_be_written(capsys, data_dir, tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").mkdir()                # a read-only file would not stop root, who may run this
    refuses(capsys, train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path, "--steps", 2, says=["--out", "log.jsonl"])


def test_a_pack_cut_in_half_is_packed_anew(tmp_path):
    whole = np.array(load("digits", tmp_path).images)
    for suffix in (".npy", ".json"):
        pack = tmp_path / f"packed/digits-train-8{suffix}"
        os.truncate(pack, pack.stat().st_size // 2)
        assert np.array_equal(load("digits", tmp_path).images, whole)


def test_a_log_cut_in_half(cm_run, data_dir, tmp_path):
    shutil.copytree(cm_run, tmp_path / "run")
    log = tmp_path / "run/log.jsonl"
    os.truncate(log, log.stat().st_size - 40)       # in the middle of the last line
    call(train.main, *TINY_FLAGS, "--data-dir", data_dir, "--out", tmp_path / "run", "--steps", 32)
    steps = [line["step"] for line in map(runtime.json.loads, log.open())]
    assert steps == [*range(1, 30), 31, 32]


KILLS = """
import os, random, signal, sys, time, torch, runtime
path, moments = sys.argv[1], random.Random(0)
def save(step):
    runtime.save(path, {"kind": "diffusion", "step": step, "model": {str(i): torch.full((1000,), step) for i in range(50)}})
save(0)
for kill in range(20):
    first = runtime.load(path, ["diffusion"])["step"]
    child = os.fork()
    if not child:
        for step in range(first + 1, 10 ** 9):
            save(step)
    time.sleep(0.1 + 0.05 * moments.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = runtime.load(path, ["diffusion"])
    assert len(state["model"]) == 50 and all((v == state["step"]).all() for v in state["model"].values())
    assert state["step"] > first
    print(state["step"])
"""


def test_twenty_kills_while_saving(tmp_path):
    """kill -9 at twenty random moments of writing: the checkpoint on disk always loads, is whole and goes forwards."""
    done = subprocess.run([sys.executable, "-c", KILLS, tmp_path / "ckpt.pt"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and len(done.stdout.split()) == 20, done.stderr


def test_nodes_that_do_not_share_the_folder(monkeypatch):
    """Ranks that find runs at different steps would train different steps."""
    rt = runtime.Runtime(torch.device("cpu"), torch.float32, rank=0, world=2)
    others = iter([500, 0, 500, -500])          # the other rank's share of each maximum: at step 500; then at 500 as well
    monkeypatch.setattr(runtime.Runtime, "maximum", lambda self, value: max(value, next(others)))
    with pytest.raises(runtime.UserError, match="share this folder"):
        rt.agree(0, "out/x")
    rt.agree(500, "out/x")


def test_what_users_have_is_kept(tmp_path, cm_run, data_dir, classifier, capsys):
    """sample.py removes its own pictures only; evaluate.py keeps numbers of other settings."""
    (tmp_path / "png/holiday").mkdir(parents=True)
    for name in ("holiday/1.png", "me.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / "png" / name)
    for num in (12, 3):
        call(sample.main, "--ckpt", cm_run / "ckpt.pt", "--num", num, "--steps", 2, "--png", "--out", tmp_path, "--device", "cpu")
    assert len(list((tmp_path / "png").rglob("*.png"))) == 3 + 2
    flags = ("--samples", tmp_path / "samples.npz", "--data-dir", data_dir, "--features", classifier, "--device", "cpu")
    for k in (1, 2, 2):
        call(evaluate.main, *flags, "--k", k)
    assert "are kept as eval-1.json" in capsys.readouterr().out
    ks = sorted((runtime.read_json(f)["settings"]["k"], f.name == "eval.json") for f in tmp_path.glob("eval*.json"))
    assert ks == [(1, False), (2, True)]


def test_a_json_of_someone_else_beside_the_samples(tmp_path, data_dir, classifier, capsys):
    np.savez(tmp_path / "theirs.npz", np.random.RandomState(0).randint(0, 256, (30, 8, 8, 1), np.uint8).repeat(3, 3))
    flags = ("--samples", tmp_path / "theirs.npz", "--reference", "digits", "--data-dir", data_dir, "--features", classifier, "--device", "cpu")
    for content in ({"class_names": ["a"], "labels": [1], "n": 3, "data": "cifar"}, [1, 2]):
        runtime.write_json(tmp_path / "theirs.json", content)
        call(evaluate.main, *flags)
        assert runtime.read_json(tmp_path / "eval.json")["num"] == 30
    np.savez(tmp_path / "bare.npz", features=np.zeros((30, 64)))
    refuses(capsys, evaluate.main, "--samples", tmp_path / "bare.npz", *flags[2:], says=["--samples", "--save-stats"])


def test_probes_want_the_checkpoints_classes(tmp_path, capsys):
    for name, dogs in (("one", 5), ("two", 3)):
        for c, n in (("cat", 6), ("dog", dogs), (name, 4)):
            (tmp_path / name / c).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (8, 8), (i * 20, 90, 10)).save(tmp_path / name / c / f"{i}.png")
    pack = ("--pack-dir", tmp_path / "packed")
    call(train.main, "--dataset", "folder", "--data-dir", tmp_path / "one", *pack, "--resolution", 8, "--ch", 16, "--ch-mult", 1, 2, "--num-res-blocks", 1,
         "--batch-size", 4, "--steps", 1, "--sample-every", 0, "--device", "cpu", "--out", tmp_path / "run")
    for main, *words in ((prune_probe.main,), (capacity_probe.main, "allocation"), (capacity_probe.main, "dominance")):
        refuses(capsys, main, *words, "--ckpt", tmp_path / "run/ckpt.pt", "--data-dir", tmp_path / "two", "--device", "cpu", says=["--data-dir"])
