"""--plugin: a file of one's own is imported before the flags are read, in every script."""
import subprocess
import sys

import pytest
from conftest import ROOT, TINY_FLAGS

import disk

MY_RUN = """
import losses, readers
import numpy as np
from torch.nn.functional import huber_loss

def huber(pred, batch, obj, *, huber_delta=1.0):
    loss = huber_loss(pred.eps, batch.eps, delta=huber_delta)
    return loss, {"base": loss}

def read_stripes(data_dir, split):
    labels = np.arange(60) % 3
    images = np.zeros((60, 8, 8, 1), np.uint8)
    images[np.arange(60), labels * 2] = 255
    return images, labels, ["top", "middle", "bottom"]

losses.BASES["huber"] = losses.Base(huber)
losses.FLAGS["huber_delta"] = (float, "where --base huber turns linear")
readers.READERS["stripes"] = readers.Source(read_stripes, resolution=8, flip=False)

import train; train.run(train.main)
"""
SCRIPTS = sorted(p.name for p in ROOT.glob("*.py") if "run(main)" in p.read_text())


def start(*words):
    """A script as a process of its own."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, text=True,
                          capture_output=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with my_run.py, and a run of it in run/."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "my_run.py").write_text(MY_RUN)
    done = start("train.py", *flags_of(folder), "--plugin", folder / "my_run.py")
    assert done.returncode == 0, done.stderr
    return folder


def flags_of(folder):
    """Two steps of the loss and the data set of my_run.py."""
    return [*TINY_FLAGS[2:], "--dataset", "stripes", "--ch-mult", 1, 2, "--num-res-blocks", 1,
            "--data-dir", folder / "data", "--steps", 2, "--base", "huber", "--huber-delta", 0.5,
            "--ir", 4, "--out", folder / "run"]


def test_it_is_recorded_by_name_and_hash(folder):
    config = disk.load(folder / "run/ckpt.pt", ["diffusion"])["config"]
    digest = disk.sha256(folder / "my_run.py")[:16]
    assert config["plugin"] == [f"my_run.py {digest}"]
    assert (config["base"], config["huber_delta"]) == ("huber", 0.5)


def test_a_checkpoint_does_not_run_it(folder):
    """evaluate.py knows the data set with it, and says what is missing without."""
    common = ["--ckpt", folder / "run/ckpt.pt", "--num", 9, "--steps", 2, "--device", "cpu",
              "--data-dir", folder / "data", "--features", folder / "classifier/ckpt.pt"]
    classify = ["classify.py", "--dataset", "stripes", "--width", 8, "--epochs", 1, "--device",
                "cpu", "--data-dir", folder / "data", "--out", folder / "classifier"]
    plugin = ["--plugin", folder / "my_run.py"]
    without = start("evaluate.py", *common)
    assert without.returncode == 2 and "--plugin" in without.stderr
    assert "--plugin" in start(*classify).stderr
    assert start(*classify, *plugin).returncode == 0
    done = start("evaluate.py", *common, *plugin)
    assert done.returncode == 0, done.stderr
    settings = disk.read_json(folder / "run/eval.json")["settings"]
    assert settings["plugin"][0].startswith("my_run.py ")
    assert "starting" not in done.stdout            # its last line, which trains, did nothing


def test_a_changed_file_is_another_setting(folder):
    other = folder / "other"
    other.mkdir()
    (other / "my_run.py").write_text(MY_RUN + "# changed\n")
    done = start("train.py", *flags_of(folder), "--steps", 3, "--plugin", other / "my_run.py")
    assert done.returncode == 2 and "--plugin ['my_run.py " in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_takes_it(name, tmp_path):
    """And imports it first: here it ends the process."""
    (tmp_path / "mine.py").write_text("import sys; print('mine'); sys.exit(7)")
    words = [name, "train"] if name == "latent.py" else [name]
    done = start(*words, f"--plugin={tmp_path / 'mine.py'}")
    assert (done.returncode, done.stdout) == (7, "mine\n"), done.stderr


def test_mistakes(tmp_path):
    (tmp_path / "train.py").write_text("")
    (tmp_path / "losses.py").write_text("")
    for name, words in {"none.py": "no such file", "losses.py": "a name of its own"}.items():
        done = start("sample.py", "--plugin", tmp_path / name, "--ckpt", "x")
        assert done.returncode == 2
        assert done.stderr.startswith("error: --plugin") and words in done.stderr
