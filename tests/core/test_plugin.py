"""--plugin: a file of one's own is imported before the flags are read, in every script."""
import subprocess
import sys

import pytest
from conftest import ROOT, TINY_FLAGS

import disk
import runtime

MY_RUN = """
import data, losses
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
data.READERS["stripes"] = data.Source(read_stripes, resolution=8, flip=False)

import train; train.run(train.main)
"""


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


def test_it_is_recorded_and_must_be_named_again(folder):
    """A checkpoint does not run it."""
    recorded = [f"my_run.py {disk.sha256(folder / 'my_run.py')[:16]}"]
    config = disk.load(folder / "run/ckpt.pt", ["diffusion"])["config"]
    assert (config["plugin"], config["base"], config["huber_delta"]) == (recorded, "huber", 0.5)
    words = ["--ckpt", folder / "run/ckpt.pt", "--num", 3, "--steps", 1, "--device", "cpu"]
    without = start("evaluate.py", *words, "--features", "x", "--data-dir", folder / "data")
    assert without.returncode == 2 and "--plugin" in without.stderr
    done = start("sample.py", *words, "--plugin", folder / "my_run.py")
    assert done.returncode == 0, done.stderr
    assert disk.read_json(folder / "run/samples/samples.json")["settings"]["plugin"] == recorded
    assert "starting" not in done.stdout            # its last line, which trains, did nothing
    assert "warning" not in done.stdout


def test_a_changed_file_is_another_setting(folder):
    """A run does not go on with it; samples come with a warning."""
    (folder / "other").mkdir()
    (folder / "other/my_run.py").write_text(MY_RUN + "# changed\n")
    plugin = ["--plugin", folder / "other/my_run.py"]
    done = start("train.py", *flags_of(folder), "--steps", 3, *plugin)
    assert done.returncode == 2 and "--plugin" in done.stderr
    done = start("sample.py", "--ckpt", folder / "run/ckpt.pt", "--num", 3, "--steps", 1,
                 "--device", "cpu", "--out", folder / "other/samples", *plugin)
    assert done.returncode == 0 and "warning: --plugin" in done.stdout


@pytest.mark.parametrize("name", ["none.py", "losses.py", "mine.txt"])
def test_mistakes(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime.Plugins, "found", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    for own in ("losses.py", "mine.txt"):
        (tmp_path / own).write_text("")
    monkeypatch.setattr(sys, "argv", ["script", "--plugin", str(tmp_path / name)])
    with pytest.raises(SystemExit) as e:
        runtime.run(lambda: None)
    assert e.value.code == 2 and capsys.readouterr().err.startswith("error: --plugin")
