"""A user's likely mistake: exit code 2, one line on stderr that names the flag, and nothing lost.

Those of single scripts stand with their other tests.
"""
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import call, ckpt_of, make_folder, picture, refuses

import disk
import evaluate
import prune_probe
import sample
import train
from probes import capacity
from recognition import classify

TRAIN = [       # the last flag of each is the one that the line must name
    "--dataset imagenot", "--ir 0.5", "--class-order 0-4", "--steps 0", "--lr nan",
    "--rank-ratio 1.5", "--batch-size 16 --accumulate 7", "--device tpu9", "--dtype float64",
    "--plugin none.py", "--init-from none.pt", "--learning-rate 1",
    "--ir 1000",                            # a class would be empty
    "--ir 1 --tail-seed 3",                 # nothing is drawn
    "--resolution 16",                      # digits have 8
    "--ch 130",                             # not whole groups of channels
    "--attn 5",                             # no such level
    "--ch-mult 1 1 1 1 1",                  # more levels than 8 pixels have
    "--eval-every 1 --eval-num 9",          # of ten classes
    "--rank-ratio 0",                       # theta^g would be theta
    # Flags that would do nothing
    "--base ddpm --focal-gamma 1", "--base ddpm --cbdm-y train", "--network unet --depth 2",
    "--no-cm --w-div 2", "--no-cm --rank-ratio 0.1", "--no-cm --reserve conv3x3",
    "--no-cm --equal-weights", "--rank-ratio 0 --independent-dropout all --form kernel",
    "--network dit --reserve conv3x3", "--experts group --cm", "--lora",
    "--lora --init-from x --lam 1", "--ada 0.12 --flip", "--eval-num 5"]


def last_flag(flags):
    """The last of some flags, which are one string."""
    return [word for word in flags.split() if word.startswith("--")][-1]


@pytest.mark.parametrize("flags", TRAIN)
def test_train(flags, capsys, tiny, tmp_path, monkeypatch):
    out = tmp_path / "run"
    words = [*tiny, "--steps", 2, "--out", out, *flags.split()]
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, words)])     # where plugins are named
    refuses(capsys, train.main, *words, says=[last_flag(flags)])
    assert not out.exists()


@pytest.mark.parametrize("flags", [
    "--lr 0.5", "--base ddpm", "--ch 32", "--tail-seed 1", "--ir 5", "--lam 0",
    "--recipe release", "--steps 8"])
def test_a_run_does_not_go_on_with_other_settings(flags, capsys, cm_run, tiny):
    before = disk.sha256(cm_run / "ckpt.pt")
    refuses(capsys, train.main, *tiny, "--out", cm_run, "--steps", 60, *flags.split(),
            says=[last_flag(flags)])
    call(train.main, *tiny, "--out", cm_run, "--steps", 30)     # finished: it is left alone
    assert disk.sha256(cm_run / "ckpt.pt") == before


def test_a_cut_checkpoint_is_not_overwritten(capsys, cm_run, tiny, tmp_path):
    content = (cm_run / "ckpt.pt").read_bytes()[:1000]
    (tmp_path / "ckpt.pt").write_bytes(content)
    refuses(capsys, train.main, *tiny, "--out", tmp_path, says=["--out"])
    assert (tmp_path / "ckpt.pt").read_bytes() == content


@pytest.mark.parametrize("main", [train.main, classify.main])
def test_a_link_to_a_checkpoint_that_is_gone_is_no_new_run(main, capsys, data_dir, tmp_path):
    """As where the disk of the runs is not mounted: starting anew would drop the old log."""
    (tmp_path / "ckpt.pt").symlink_to(tmp_path / "elsewhere.pt")
    refuses(capsys, main, "--dataset", "digits", "--data-dir", data_dir, "--out", tmp_path,
            "--device", "cpu", says=["--out"])


@pytest.mark.parametrize("flags", ["--classes 3-12", "--classes cat", "--num 0", "--guidance nan",
                                   "--format diffusers"])
def test_sample(flags, capsys, from_run, tmp_path):
    out = tmp_path / "s"
    refuses(capsys, sample.main, *from_run, "--out", out, *flags.split(), says=[last_flag(flags)])
    assert not out.exists()


def test_what_is_no_checkpoint(capsys, cm_run, classifier, tmp_path):
    """A text, half a checkpoint, one of torch alone, of another network; a classifier, no file."""
    content = (cm_run / "ckpt.pt").read_bytes()
    (tmp_path / "text.pt").write_bytes(b"hello")
    (tmp_path / "cut.pt").write_bytes(content[:len(content) // 2])
    torch.save({"model": {}}, tmp_path / "torch.pt")
    state = ckpt_of(cm_run)
    disk.save(tmp_path / "other.pt", {**state, "network": {**state["network"], "ch": 32}})
    for path in (*tmp_path.iterdir(), classifier, tmp_path / "missing.pt"):
        refuses(capsys, sample.main, "--ckpt", path, "--device", "cpu", says=["--ckpt"])


@pytest.mark.parametrize("flags", [
    "--samples text.npz", "--samples bare.npz", "--samples good.npz --features none.pt",
    "--samples good.npz --reference nowhere", "--samples good.npz --out-json other.json",
    "--samples good.npz --save-stats good.npz", "--samples good.npz --save-stats text.npz",
    "--ckpt ckpt.pt --samples good.npz"])
def test_evaluate(flags, capsys, cm_run, classifier, data_dir, digits, tmp_path, monkeypatch):
    """Files of another kind are neither read nor overwritten."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(cm_run / "ckpt.pt", "ckpt.pt")
    (tmp_path / "text.npz").write_text("a letter")
    disk.write_json("other.json", {"of": "another program"})
    np.savez("good.npz", arr_0=np.repeat(digits.images[:40], 3, axis=3))
    np.savez("bare.npz", features=np.zeros((30, 64)))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    given = {"--features": classifier, "--reference": "digits", "--data-dir": data_dir}
    words = [word for item in given.items() if item[0] not in flags for word in item]
    refuses(capsys, evaluate.main, *words, *flags.split(), says=[last_flag(flags)])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_missing_folder_or_download_says_the_fix(capsys, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("network is unreachable")
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    common = ["--data-dir", tmp_path / "none", "--pack-dir", tmp_path / "packs",
              "--out", tmp_path / "run", "--device", "cpu"]
    for name, what in (("cifar100", "https://"), ("folder", "none"), ("inat2018", ".json")):
        refuses(capsys, train.main, "--dataset", name, *common, says=["--data-dir", what])
    make_folder(tmp_path / "none", {"cat": 2, "dog": 1})
    (tmp_path / "none/dog/000.png").write_text("no image")
    refuses(capsys, train.main, "--dataset", "folder", *common, says=["--data-dir", "dog/000.png"])
    assert not (tmp_path / "run").exists()


def test_other_data_behind_the_same_name(tmp_path, capsys):
    """A run does not go on with other images, no probe measures with them, nothing against them:
    one image is replaced; another folder has classes of the same names and sizes.
    """
    sizes = {"cat": 6, "dog": 5, "owl": 4}
    root = make_folder(tmp_path / "set", sizes)
    other = make_folder(tmp_path / "other", sizes)
    picture(other / "cat/000.png", 999)
    flags = ["--dataset", "folder", "--data-dir", root, "--pack-dir", tmp_path / "packs",
             "--resolution", 8, "--ch", 16, "--ch-mult", 1, 2, "--num-res-blocks", 1,
             "--batch-size", 4, "--sample-every", 0, "--device", "cpu", "--out", tmp_path / "run"]
    call(train.main, *flags, "--steps", 1)
    ours = ("--ckpt", tmp_path / "run/ckpt.pt", "--device", "cpu")
    measure = (evaluate.main, *ours, "--num", 6, "--num-group", 0, "--steps", 1,
               "--features", tmp_path / "none.pt")
    refuses(capsys, *measure, "--data-dir", other, says=["--data-dir"])
    refuses(capsys, *measure, says=["--features"])          # the folder of the training
    picture(root / "cat/000.png", 999)                      # the same name, another image
    refuses(capsys, *measure, says=["--data-dir"])
    refuses(capsys, train.main, *flags, "--steps", 2, says=["--data-dir"])
    for main, *command in ([prune_probe.main], [capacity.main, "allocation"]):
        refuses(capsys, main, *command, *ours, "--data-dir", root, says=["--data-dir"])
