"""figures.py: which images stand where, what the line below says, what is refused."""
import shutil

import numpy as np
import pytest
from conftest import call, refuses
from PIL import Image

import disk
import sample
from sets.samples import read_samples
from pages import figures
from pages.figures import Samples


def flat(labels, values):
    """Images 8 x 8 of one value each, and their labels."""
    return np.tile(np.array(values, np.uint8)[:, None, None, None], (1, 8, 8, 3)), labels


def test_every_pixel_is_where_it_belongs():
    """Columns below their titles; down each class its images in the order of the file."""
    labels = np.arange(40) % 10
    columns = {"A": flat(labels, 100 + np.arange(40)),
               "B, with a long title": flat(np.arange(12) % 3, 200 + np.arange(12))}
    names = [f"class {c}" for c in range(10)]
    picture = sample.grid_image(columns, names, None, across=3, down=2)
    array = np.asarray(picture)[..., 0].astype(int)
    assert array.shape[0] == 30 + 3 * 120                       # the classes that both have
    left = next(x for x in range(array.shape[1]) if array[31, x] == 100)
    second = next(x for x in range(array.shape[1]) if array[31, x] == 200)
    assert second == left + 3 * 60 + 24
    for r in range(3):
        for k in range(4):
            for x0, first, step in ((left, 100, 10), (second, 200, 3)):
                y, x = 30 + r * 120 + k // 3 * 60, x0 + k % 3 * 60
                assert (array[y:y + 56, x:x + 56] == first + r + step * k).all()


def test_names_in_other_scripts():
    """Each letter has its shape; of a script that the font lacks stands the class's number."""
    def named(*names):
        images = np.zeros((len(names), 4, 4, 3), np.uint8)
        return np.asarray(sample.grid_image({"": (images, range(len(names)))}, names, None))
    for word in ("кот", "γάα", "öäü"):
        assert not np.array_equal(named(word), named(word[::-1]))
    assert np.array_equal(named("a", "黑色"), named("a", "class 1"))


SETTINGS = {"seed": 0, "sampler": "ddim", "steps": 50, "guidance": 1.5, "clip": True, "num": 9,
            "ckpt": "a", "step": 3000, "branch": "full", "weights": "ema", "command": "x"}


@pytest.mark.parametrize("labels, changes, one_way, same", [
    ((0, 1), {"ckpt": "b", "command": "y", "num": 20}, True, True),
    ((0, 1, 0, 1), {}, True, True),                     # more images, which are not shown
    ((0, 1), {"seed": 1}, True, False), ((1, 0), {}, True, False),
    ((0, 1), {"model": "sd"}, True, False), ((0, 1), {"guidance": 0.0}, False, True)])
def test_the_line_below_says_how_columns_were_made(labels, changes, one_way, same):
    columns = {"A": Samples(None, np.array([0, 1]), SETTINGS, {}),
               "B": Samples(None, np.array(labels), {**SETTINGS, **changes}, {})}
    text = figures.caption_of(columns, [0, 1], 1)
    assert text.startswith(sample.sampling_in_words(SETTINGS)) == one_way
    assert text.startswith("A: ") and "; B: " in text or one_way
    assert ("the same noise" in text) == same and ("noise differs" in text) != same
    assert "noise" not in figures.caption_of({"A": columns["A"]}, [0, 1], 1)


@pytest.fixture(scope="module")
def sampled(cm_run, tmp_path_factory):
    """Folders of samples: both branches, the rarest class alone, other training data."""
    folder = tmp_path_factory.mktemp("sampled")
    flags = {"full": [], "general": ["--branch", "general"], "tail": ["--classes", "rarest"],
             "high": ["--classes", "0-4"]}
    for name, more in flags.items():
        call(sample.main, "--ckpt", cm_run / "ckpt.pt", "--num", 20, "--steps", 1, *more,
             "--device", "cpu", "--out", folder / name)
    shutil.copytree(folder / "full", folder / "other")
    record = disk.read_json(folder / "other/samples.json")
    record["data"]["class_counts"] = [1] * 10
    disk.write_json(folder / "other/samples.json", record)
    return folder


def test_real_images_and_methods(sampled, digits, data_dir, tmp_path):
    """Training images first; a folder means its samples.npz; the rarest class below itself."""
    columns = ["--column", f"theta_g={sampled}/general", "--column",
               f"theta={sampled}/full/samples.npz", "--data-dir", data_dir]
    call(figures.main, *columns, "--out", tmp_path / "a.png")
    array = np.asarray(Image.open(tmp_path / "a.png"))[..., 0]
    real = digits.images[digits.labels == 0][0, ..., 0]
    theta, labels, _ = read_samples(sampled / "full/samples.npz")
    for image, columns in ((real, range(300)), (theta[labels == 0][0, ..., 0], range(600, 900))):
        square = np.kron(image, np.ones((7, 7)))
        assert any(np.array_equal(array[30:86, x:x + 56], square) for x in columns)


@pytest.mark.parametrize("flags, says", [
    (["--column", "nothing.npz"], "--column"), (["--column", "B=none.npz"], "--column"),
    (["--column", "B=other"], "--column"), (["--column", "B=high"], "--classes"),
    (["--classes", "3"], "--classes"), (["--no-real", "--data-dir", "x"], "--data-dir")])
def test_refuses(sampled, tmp_path, capsys, monkeypatch, flags, says):
    monkeypatch.chdir(sampled)
    refuses(capsys, figures.main, "--column", "CM=tail", *flags, "--out", tmp_path / "p.png",
            says=[says])
    assert not list(tmp_path.iterdir())
