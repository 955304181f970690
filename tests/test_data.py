"""data.py: Cao et al.'s draw, packs, splits, batches that are a pure function of (seed, step)."""
import hashlib
import pickle

import numpy as np
import pytest
import torch
import torchvision

from data import Batches, load, long_tail, long_tail_counts, resolve_classes, splits, to_float, to_uint8
from runtime import UserError


@pytest.mark.parametrize("C, ir, total, last", [(10, 100, 12406, 50), (100, 100, 10847, 5), (10, 50, 13996, 100), (100, 50, 12608, 10)])
def test_long_tail_is_cao_et_als(C, ir, total, last):
    labels = np.random.RandomState(1).permutation(np.arange(50000) % C)
    np.random.seed(5)
    rows = long_tail(labels, ir)
    assert np.random.rand() == np.random.RandomState(5).rand()          # the global generator is left alone
    assert len(rows) == total and (labels[rows] == C - 1).sum() == last
    np.random.seed(0)                                                   # literally, as published
    expected = []
    for c, n in enumerate([int(50000 / C * (1 / ir) ** (c / (C - 1.0))) for c in range(C)]):
        idx = np.where(labels == c)[0]
        np.random.shuffle(idx)
        expected.extend(idx[:n])
    assert np.array_equal(rows, np.sort(expected))


def test_long_tail_of_unequal_classes():
    assert long_tail_counts([148, 152, 147, 153, 151, 152, 151, 149, 144, 150], 20).tolist() == [148, 106, 76, 54, 39, 28, 20, 14, 10, 7]
    assert long_tail_counts([10, 90], 2).tolist() == [10, 5]
    with pytest.raises(UserError, match="--ir 2000"):
        long_tail_counts([100, 100], 2000)


def test_splits():
    sizes = {n: {k: (min(v), max(v), len(v)) for k, v in splits(np.arange(n, 0, -1)).items()} for n in (10, 100)}
    assert sizes[10] == {"Many": (0, 2, 3), "Medium": (3, 5, 3), "Few": (6, 9, 4)}
    assert sizes[100] == {"Many": (0, 32, 33), "Medium": (33, 65, 33), "Few": (66, 99, 34)}
    assert splits([1, 9, 5])["Many"] == [1] and splits([5, 1]) == {}


def test_digits(data_dir):
    train, test = load("digits", data_dir), load("digits", data_dir, "test")
    assert len(train.labels) == 1497 and len(test.labels) == 300 and (test.counts == 30).all()
    assert train.images.shape == (1497, 8, 8, 1) and train.images.max() == 255 and not train.flip
    swapped = load("digits", data_dir, class_order="9-9,1-8,0")
    assert swapped.class_names[0] == "9" and swapped.counts[0] == train.counts[9]
    again = load("digits", data_dir)
    assert isinstance(again.images, np.memmap) and np.array_equal(again.images, train.images)


def test_cifar_in_its_official_layout(tmp_path, monkeypatch):
    """A miniature with the official names and pickles; its hashes stand in for the official ones."""
    folder, kind = tmp_path / "cifar-100-python", torchvision.datasets.CIFAR100
    folder.mkdir()
    rng = np.random.RandomState(0)
    files = {"train": 300, "test": 100}
    for name, n in files.items():
        data = {"data": rng.randint(0, 256, (n, 3072)).astype(np.uint8), "fine_labels": (np.arange(n) % 100).tolist()}
        (folder / name).write_bytes(pickle.dumps(data))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class{c}" for c in range(100)]}))
    md5 = {n: hashlib.md5((folder / n).read_bytes()).hexdigest() for n in ("train", "test", "meta")}
    monkeypatch.setattr(kind, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(kind, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5["meta"]})
    images = load("cifar100", tmp_path)
    raw = pickle.loads((folder / "train").read_bytes())["data"]
    assert images.images.shape == (300, 32, 32, 3) and images.flip and images.class_names[3] == "class3"
    assert images.images[7, 1, 2].tolist() == raw[7].reshape(3, 32, 32)[:, 1, 2].tolist()


def test_batches_are_epochs_of_permutations_and_pure(digits):
    N, B = len(digits.labels), 64
    batches = Batches(digits, B, 0, "cpu")
    rows = np.concatenate([batches.rows(s) for s in range(2 * N // B + 1)])
    assert sorted(rows[:N]) == sorted(rows[N:2 * N]) == list(range(N)) and not np.array_equal(rows[:N], rows[N:2 * N])
    fresh = Batches(digits, B, 0, "cpu")
    assert np.array_equal(fresh.rows(9), batches.rows(9)) and not np.array_equal(Batches(digits, B, 1, "cpu").rows(9), fresh.rows(9))
    x, y = fresh.at(9)
    x_map, y_map = Batches(digits, B, 0, "cpu", limit=0).at(9)          # from the memory map instead
    assert torch.equal(x, x_map) and torch.equal(y, y_map)
    assert torch.equal(to_uint8(x), torch.from_numpy(digits.images[fresh.rows(9)]))


def test_uint8_rounds_and_clips():
    x = torch.tensor([-1.1, -1.0, 0.0, 1.0, 1.1, 1 / 127.5 * 0.4]).view(1, 1, 1, 6)
    assert to_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255, 128]
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    assert torch.equal(to_uint8(to_float(every)), every)


def test_resolve_classes():
    names = ["cat", "dog", "owl"]
    assert resolve_classes("0-1,owl", names) == [0, 1, 2]
    for text in ("3", "x", "1-", ""):
        with pytest.raises(UserError, match="--classes"):
            resolve_classes(text, names)
