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


def test_it_is_recorded_by_name_and_hash(folder):
    config = disk.load(folder / "run/ckpt.pt", ["diffusion"])["config"]
    digest = disk.sha256(folder / "my_run.py")[:16]
    assert config["plugin"] == [f"my_run.py {digest}"]
    assert (config["base"], config["huber_delta"]) == ("huber", 0.5)


def test_a_checkpoint_does_not_run_it(folder):
    """A script needs the file named once more, and says so."""
    words = ["--ckpt", folder / "run/ckpt.pt", "--num", 3, "--steps", 1, "--device", "cpu"]
    without = start("evaluate.py", *words, "--features", "x", "--data-dir", folder / "data")
    assert without.returncode == 2 and "--plugin" in without.stderr
    done = start("sample.py", *words, "--plugin", folder / "my_run.py")
    assert done.returncode == 0, done.stderr
    settings = disk.read_json(folder / "run/samples/samples.json")["settings"]
    assert settings["plugin"] == [f"my_run.py {disk.sha256(folder / 'my_run.py')[:16]}"]
    assert "starting" not in done.stdout            # its last line, which trains, did nothing


def test_a_changed_file_is_another_setting(folder):
    (folder / "other").mkdir()
    (folder / "other/my_run.py").write_text(MY_RUN + "# changed\n")
    done = start("train.py", *flags_of(folder), "--steps", 3, "--plugin",
                 folder / "other/my_run.py")
    assert done.returncode == 2 and "--plugin ['my_run.py " in done.stderr


@pytest.fixture
def unchanged(monkeypatch):
    """What importing a plugin changes is undone."""
    monkeypatch.setattr(runtime.Plugins, "found", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("mine", None)


def test_a_change_since_training_is_said(folder):
    (folder / "later").mkdir()
    (folder / "later/my_run.py").write_text(MY_RUN + "# changed\n")
    words = ["sample.py", "--ckpt", folder / "run/ckpt.pt", "--num", 3, "--steps", 1, "--device",
             "cpu", "--out", folder / "later/samples", "--plugin"]
    assert "warning: --plugin" not in start(*words, folder / "my_run.py").stdout
    assert "warning: --plugin" in start(*words, folder / "later/my_run.py").stdout


@pytest.mark.parametrize("name, says", [
    ("my.run.py", "a name of its own"), ("pages.py", "a name of its own"),
    ("none.py", "no such file"), ("losses.py", "a name of its own"), ("mine.txt", "a .py file")])
def test_mistakes(name, says, tmp_path, unchanged, capsys, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "first")
    (tmp_path / "first/pages").mkdir(parents=True)          # a folder is a package of that name
    for own in ("losses.py", "mine.txt", "my.run.py", "pages.py"):
        (tmp_path / own).write_text("")
    monkeypatch.setattr(sys, "argv", ["script", "--plugin", str(tmp_path / name)])
    with pytest.raises(SystemExit) as e:
        runtime.run(lambda: None)
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.startswith("error: --plugin") and says in text
