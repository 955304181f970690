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

TRAIN = [       # flags of train.py -> the flag that the line must name
    (["--dataset", "imagenot"], "--dataset"),
    (["--ir", 0.5], "--ir"),
    (["--ir", 1000], "--ir"),                           # a class would be empty
    (["--ir", 1, "--tail-seed", 3], "--tail-seed"),     # nothing is drawn
    (["--class-order", "0-4"], "--class-order"),
    (["--resolution", 16], "--resolution"),             # digits have 8
    (["--steps", 0], "--steps"),
    (["--lr", "nan"], "--lr"),
    (["--rank-ratio", 1.5], "--rank-ratio"),
    (["--batch-size", 16, "--accumulate", 7], "--accumulate"),
    (["--ch", 130], "--ch"),                            # not whole groups of channels
    (["--attn", 5], "--attn"),                          # no such level
    (["--ch-mult", 1, 1, 1, 1, 1], "--ch-mult"),        # more levels than 8 pixels have
    (["--base", "ddpm", "--focal-gamma", 1], "--focal-gamma"),
    (["--network", "unet", "--depth", 2], "--depth"),
    (["--base", "ddpm", "--cbdm-y", "train"], "--cbdm-y"),
    (["--no-cm", "--w-div", 2], "--w-div"),
    (["--no-cm", "--rank-ratio", 0.1], "--rank-ratio"),     # also where it is the default
    (["--no-cm", "--reserve", "conv3x3"], "--reserve"),
    (["--no-cm", "--equal-weights"], "--equal-weights"),
    (["--rank-ratio", 0], "--rank-ratio"),              # theta^g would be theta
    (["--rank-ratio", 0, "--independent-dropout", "all", "--form", "kernel"], "--form"),
    (["--network", "dit", "--recipe", "release"], "--reserve"),
    (["--experts", "group", "--cm"], "--cm"),
    (["--lora"], "--lora"),
    (["--lora", "--init-from", "x", "--lam", 1], "--lam"),
    (["--ada", 0.12, "--flip"], "--flip"),
    (["--eval-num", 5], "--eval-num"),
    (["--eval-every", 1, "--eval-num", 9], "--eval-num"),   # of ten classes
    (["--cm", "False"], "False"),                       # takes no value
    (["--learning-rate", 1], "--learning-rate"),        # no such flag
    (["--device", "tpu9"], "--device"),
    (["--dtype", "float64"], "--dtype"),
    (["--plugin", "none.py"], "--plugin"),
    (["--init-from", "none.pt"], "--init-from"),
]


@pytest.mark.parametrize("flags, named", TRAIN)
def test_train(flags, named, capsys, tiny, tmp_path, monkeypatch):
    out = tmp_path / "run"
    words = [*tiny, "--steps", 2, "--out", out, *flags]
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, words)])     # where plugins are named
    refuses(capsys, train.main, *words, says=[named])
    assert not out.exists()


@pytest.mark.parametrize("flags, named", [
    (["--lr", 0.5], "--lr"), (["--base", "ddpm"], "--base"), (["--ch", 32], "--ch"),
    (["--tail-seed", 1], "--tail-seed"), (["--ir", 5], "--ir"), (["--no-cm"], "--cm"),
    (["--recipe", "release"], "--recipe"), (["--steps", 8], "--steps")])
def test_a_run_does_not_go_on_with_other_settings(flags, named, capsys, cm_run, tiny):
    before = disk.sha256(cm_run / "ckpt.pt")
    refuses(capsys, train.main, *tiny, "--out", cm_run, "--steps", 60, *flags, says=[named])
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


@pytest.mark.parametrize("flags, named", [
    (["--classes", "3-12"], "--classes"), (["--classes", "cat"], "--classes"),
    (["--num", 0], "--num"), (["--guidance", "nan"], "--guidance"),
    (["--format", "diffusers"], "--format")])
def test_sample(flags, named, capsys, from_run, tmp_path):
    out = tmp_path / "s"
    refuses(capsys, sample.main, *from_run, "--out", out, *flags, says=[named])
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


@pytest.mark.parametrize("flags, named", [
    (["--samples", "text.npz"], "--samples"),
    (["--samples", "bare.npz"], "--samples"),
    (["--samples", "good.npz", "--features", "none.pt"], "--features"),
    (["--samples", "good.npz", "--reference", "nowhere"], "--reference"),
    (["--samples", "good.npz", "--out-json", "other.json"], "--out-json"),
    (["--samples", "good.npz", "--save-stats", "good.npz"], "--save-stats"),
    (["--samples", "good.npz", "--save-stats", "text.npz"], "--save-stats"),
    (["--ckpt", "ckpt.pt", "--samples", "good.npz"], "--samples")])
def test_evaluate(flags, named, capsys, cm_run, classifier, data_dir, digits, tmp_path,
                  monkeypatch):
    """Files of another kind are neither read nor overwritten."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(cm_run / "ckpt.pt", "ckpt.pt")
    (tmp_path / "text.npz").write_text("a letter")
    disk.write_json("other.json", {"of": "another program"})
    np.savez("good.npz", arr_0=np.repeat(digits.images[:40], 3, axis=3))
    np.savez("bare.npz", features=np.zeros((30, 64)))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    given = {"--features": classifier, "--reference": "digits", "--data-dir": data_dir}
    flags = [*flags, *(w for k, v in given.items() if k not in flags for w in (k, v))]
    refuses(capsys, evaluate.main, *flags, "--device", "cpu", says=[named])
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
