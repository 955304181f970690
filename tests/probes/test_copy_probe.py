"""copies.py: what counts as a copy, on points whose neighbours are known; the whole command."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import call, refuses

import disk
import sample
from probes import copies


def test_copies_on_a_line():
    """Training points 0, 1 and 10: their nearest others are 1, 1 and 9 away."""
    train_points = torch.tensor([[0.0], [1.0], [10.0]]).double()
    points = torch.tensor([[-0.9], [-1.0], [1.5], [5.6], [18.9], [19.1]]).double()
    is_copy, index = copies.copies(points, train_points)
    assert index.tolist() == [0, 0, 1, 2, 2, 2]
    assert is_copy.tolist() == [True, False, True, True, True, False]


def test_copies_in_blocks(monkeypatch):
    """A literal version, and blocks that do not divide the rows."""
    g = torch.Generator().manual_seed(0)
    images, train_images = (torch.randn(n, 3, generator=g).double() for n in (50, 33))
    between = torch.cdist(train_images, train_images).fill_diagonal_(torch.inf).min(1).values
    expected = torch.cdist(images, train_images).min(1)
    monkeypatch.setattr(copies, "BLOCK", 7)
    is_copy, index = copies.copies(images, train_images)
    assert torch.equal(index, expected.indices)
    assert torch.equal(is_copy, expected.values < between[expected.indices])


def test_shares():
    found = copies.shares(torch.tensor([True, False, True, True]), np.array([0, 0, 1, 2]),
                              {"Many": [0], "Few": [1, 2], "none": [3]})
    assert found == {"all": 0.75, "Many": 0.5, "Few": 1.0}


@pytest.fixture(scope="module")
def samples(cm_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples")
    call(sample.main, "--ckpt", cm_run / "ckpt.pt", "--num", 20, "--steps", 2, "--device", "cpu",
         "--out", out)
    return out / "samples.npz"


@pytest.fixture
def perfect(samples, digits, tmp_path):
    """The training images, as if they were samples."""
    path = tmp_path / "perfect/samples.npz"
    disk.write_npz(path, arr_0=digits.images, arr_1=digits.labels)
    record = disk.read_json(samples.with_suffix(".json"))
    disk.write_json(path.with_suffix(".json"), {**record, "npz_sha256": disk.sha256(path)})
    return path


def test_training_images_are_copies_and_noise_is_none(cm_run, classifier, data_dir, samples,
                                                      perfect, tmp_path):
    """Training images as samples: all are copies; the unseen digits are not of the draw."""
    call(copies.main, "--ckpt", cm_run / "ckpt.pt", "--samples", samples, perfect,
         "--features", classifier, "--data-dir", data_dir, "--device", "cpu", "--out", tmp_path)
    found = disk.read_json(tmp_path / "copies.json")
    rows = found["rows"]
    unseen, generated, copied = rows.values()
    assert unseen["num"]["all"] == 1497 - 502
    for space in ("pixels", "features"):
        assert set(copied[space].values()) == {1.0}
        assert 0.2 < unseen[space]["all"] < 0.8
    assert generated["pixels"]["all"] < 0.2                 # two steps: noise
    assert (tmp_path / "pairs.png").is_file()


def test_copies_of_training_images_that_are_there_twice(cm_run, classifier, data_dir,
                                                        perfect, tmp_path, monkeypatch):
    """Each training image is in the set two times: samples that are training images are copies."""
    def twice(ckpt, data_dir, real=copies.training_images):
        found = real(ckpt, data_dir)
        return replace(found, images=np.concatenate([found.images] * 2),
                       labels=np.concatenate([found.labels] * 2))
    monkeypatch.setattr(copies, "training_images", twice)
    call(copies.main, "--ckpt", cm_run / "ckpt.pt", "--samples", perfect, "--features", classifier,
         "--data-dir", data_dir, "--device", "cpu", "--out", tmp_path)
    found = disk.read_json(tmp_path / "copies.json")["rows"][str(perfect)]
    assert found["pixels"]["all"] == found["features"]["all"] == 1.0


@pytest.mark.parametrize("key, value", [
    ("sha256", "0" * 64), ("class_counts", [9] * 10), ("class_names", list("abcdefghij"))])
def test_samples_of_a_set_that_differs_in_one_thing(key, value, cm_run, samples, tmp_path, capsys):
    path = tmp_path / "samples.npz"
    path.write_bytes(samples.read_bytes())
    record = disk.read_json(samples.with_suffix(".json"))
    disk.write_json(tmp_path / "samples.json", {**record, "data": {**record["data"], key: value}})
    refuses(capsys, copies.main, "--ckpt", cm_run / "ckpt.pt", "--samples", path,
            says=["--samples"])
