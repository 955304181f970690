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


def test_the_picture_shows_few_where_there_are_some():
    """Pixels say which image it is: 10 + the row of a generated one, 100 + that of a real one."""
    images, real = (np.arange(n, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2)
                    .repeat(3, 3) for n in (5, 50))
    data = {"class_names": list("abc"), "class_counts": [9, 8, 7]}
    groups = {"Many": [0], "Medium": [1], "Few": [2]}
    index = np.array([30, 31, 32, 33, 34])

    def shown(labels, groups, columns):
        picture = copies.pairs_picture(images + 10, np.array(labels), index, real + 100, data,
                                           groups)
        left = picture.width - columns * 60
        cells = [[picture.getpixel((left + 60 * k + 9, 60 * r + 9))[0] for k in range(columns)]
                 for r in range(picture.height // 60)]
        return [[value for value in row if value < 255] for row in cells]
    assert shown([2, 0, 1, 2, 0], groups, 4) == [[10, 130, 13, 133]]
    everything = [[11, 131, 14, 134], [10, 130, 12, 132, 13, 133]]
    assert shown([1, 0, 1, 1, 0], groups, 6) == everything             # --classes without Few
    assert shown([1, 0, 1, 1, 0], {}, 6) == everything


@pytest.fixture(scope="module")
def samples(cm_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples")
    call(sample.main, "--ckpt", cm_run / "ckpt.pt", "--num", 20, "--steps", 2, "--device", "cpu",
         "--out", out)
    return out / "samples.npz"


def test_training_images_are_copies_and_noise_is_none(cm_run, classifier, data_dir, samples,
                                                      digits, tmp_path, capsys):
    """Training images as samples: all are copies; the unseen digits are not of the draw."""
    record = disk.read_json(samples.with_suffix(".json"))
    perfect = tmp_path / "perfect/samples.npz"
    disk.write_npz(perfect, arr_0=digits.images, arr_1=digits.labels)
    record["npz_sha256"] = disk.sha256(perfect)
    disk.write_json(perfect.with_suffix(".json"), record)
    call(copies.main, "--ckpt", cm_run / "ckpt.pt", "--samples", samples, perfect,
         "--features", classifier, "--data-dir", data_dir, "--device", "cpu", "--out", tmp_path)
    found = disk.read_json(tmp_path / "copies.json")
    rows = found["rows"]
    unseen, generated, copied = rows.values()
    assert unseen["num"] == 1497 - 502
    for space in ("pixels", "features"):
        assert set(copied[space].values()) == {1.0}
        assert 0.2 < unseen[space]["all"] < 0.8
    assert generated["pixels"]["all"] < 0.2                 # two steps: noise
    assert (tmp_path / "pairs.png").is_file()


def test_copies_of_training_images_that_are_there_twice(cm_run, classifier, data_dir, samples,
                                                        digits, tmp_path, monkeypatch):
    """Each training image is in the set two times: samples that are training images are copies."""
    def twice(ckpt, data_dir, real=copies.training_images):
        found = real(ckpt, data_dir)
        return replace(found, images=np.concatenate([found.images] * 2),
                       labels=np.concatenate([found.labels] * 2))
    monkeypatch.setattr(copies, "training_images", twice)
    perfect = tmp_path / "perfect/samples.npz"
    disk.write_npz(perfect, arr_0=digits.images, arr_1=digits.labels)
    disk.write_json(perfect.with_suffix(".json"), {
        **disk.read_json(samples.with_suffix(".json")), "npz_sha256": disk.sha256(perfect)})
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
