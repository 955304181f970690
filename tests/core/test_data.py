"""data.py: Cao et al.'s draw, groups and classes, data sets, batches."""
import hashlib
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import call, ckpt_of, make_folder

import data
import disk
import train
from data import (Batches, ImageSet, class_groups, load, load_long_tailed, load_reference,
                  long_tail, long_tail_counts, reference_images, resolve_classes, to_float,
                  to_uint8)
from runtime import UserError
from sets.packing import read_image


@pytest.mark.parametrize("C, ir, total, last", [
    (10, 100, 12406, 50), (100, 100, 10847, 5), (10, 50, 13996, 100), (100, 50, 12608, 10)])
def test_long_tail_is_cao_et_als(C, ir, total, last):
    labels = np.random.RandomState(1).permutation(np.arange(50000) % C)
    np.random.seed(5)
    rows = long_tail(labels, ir)
    # The global generator is not used
    assert np.random.rand() == np.random.RandomState(5).rand()
    assert len(rows) == total and (labels[rows] == C - 1).sum() == last
    # Literally, as published
    np.random.seed(0)
    expected = []
    for c in range(C):
        n = int(50000 / C * (1 / ir) ** (c / (C - 1.0)))
        idx = np.where(labels == c)[0]
        np.random.shuffle(idx)
        expected.extend(idx[:n])
    assert np.array_equal(rows, np.sort(expected))
    assert not np.array_equal(long_tail(labels, ir, seed=3), rows)


def test_long_tail_of_unequal_classes():
    available = [148, 152, 147, 153, 151, 152, 151, 149, 144, 150]
    counts = [148, 106, 76, 54, 39, 28, 20, 14, 10, 7]
    assert long_tail_counts(available, 20).tolist() == counts
    assert long_tail_counts([10, 90], 2).tolist() == [10, 5]
    assert long_tail_counts([90, 10], 10).tolist() == [50, 5]           # n_max: at most N / C
    assert long_tail_counts([100, 10], 3).tolist() == [32, 10]          # the floor of 32 / 3
    with pytest.raises(UserError, match="--ir"):
        long_tail_counts([100, 100], 2000)


def test_class_groups():
    def sizes(C):
        groups = class_groups(np.arange(C, 0, -1))
        return {name: (min(v), max(v), len(v)) for name, v in groups.items()}
    assert sizes(10) == {"Many": (0, 2, 3), "Medium": (3, 5, 3), "Few": (6, 9, 4)}
    assert sizes(100) == {"Many": (0, 32, 33), "Medium": (33, 65, 33), "Few": (66, 99, 34)}
    assert class_groups([1, 9, 5])["Many"] == [1]
    assert class_groups([2, 2, 2, 2]) == {"Many": [0], "Medium": [1], "Few": [2, 3]}
    assert class_groups([5, 1]) == {}


def test_resolve_classes():
    names = ["cat", "dog", "owl"]
    assert resolve_classes("0-1,owl", names) == [0, 1, 2]
    for text in ("3", "x", "2-1", ""):
        with pytest.raises(UserError, match="--classes"):
            resolve_classes(text, names)
    # Where a word is one class's name and another's number, one must say which
    with pytest.raises(UserError, match="--classes"):
        resolve_classes("2", ["1", "2", "3"])
    assert resolve_classes("1-1,2-2", ["1", "2", "3"]) == [1, 2]
    assert resolve_classes("2", [str(c) for c in range(10)]) == [2]
    names = ["ducks, geese", "Nävus", "owl"]
    assert resolve_classes("ducks, geese", names) == [0]
    assert resolve_classes('owl, "ducks, geese",Na\u0308vus', names) == [2, 0, 1]
    with pytest.raises(UserError, match=r"ducks, geese \(1,000\), Nävus \(9\), owl \(3\)"):
        resolve_classes("geese", names, counts=[1000, 9, 3])
    with pytest.raises(UserError, match="11 and 8 more"):
        resolve_classes("x", [str(c) for c in range(20)])


def test_digits(data_dir):
    images = load("digits", data_dir)
    test = load("digits", data_dir, "test")
    assert len(images.labels) == 1497 and len(test.labels) == 300 and (test.counts == 30).all()
    assert images.images.shape == (1497, 8, 8, 1) and images.images.max() == 255
    assert not images.flip
    swapped = load("digits", data_dir, class_order="9-9,1-8,0")
    assert swapped.class_names[0] == "9" and swapped.counts[0] == images.counts[9]
    again = load("digits", data_dir)
    assert isinstance(again.images, np.memmap) and np.array_equal(again.images, images.images)


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """A folder with a miniature CIFAR-100, official names and pickles.

    Its hashes take the place of the official ones.
    """
    folder = tmp_path / "cifar-100-python"
    kind = torchvision.datasets.CIFAR100
    folder.mkdir()
    rng = np.random.RandomState(0)
    for name, n in {"train": 10_000, "test": 100}.items():
        pixels = rng.randint(0, 256, (n, 3072)).astype(np.uint8)
        content = {"data": pixels, "fine_labels": (np.arange(n) % 100).tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    names = {"fine_label_names": [f"class{c}" for c in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(names))

    def md5(name):
        return hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "train_list", [["train", md5("train")]])
    monkeypatch.setattr(kind, "test_list", [["test", md5("test")]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5("meta")})
    return tmp_path


def test_cifar_in_its_official_layout(small_cifar):
    images = load("cifar100", small_cifar)
    raw = pickle.loads((small_cifar / "cifar-100-python/train").read_bytes())["data"]
    assert images.images.shape == (10_000, 32, 32, 3) and images.flip
    assert images.class_names[3] == "class3"
    pixel = raw[7].reshape(3, 32, 32)[:, 1, 2]
    assert images.images[7, 1, 2].tolist() == pixel.tolist()


def test_the_papers_command_on_cifar100(small_cifar):
    """`train.py --dataset cifar100 --ir 100`, but for the width, the batch and the steps."""
    call(train.main, "--dataset", "cifar100", "--ir", 100, "--data-dir", small_cifar, "--ch", 32,
         "--batch-size", 4, "--steps", 1, "--sample-every", 0, "--device", "cpu",
         "--dtype", "float32", "--out", small_cifar / "run")
    counts = disk.read_json(small_cifar / "run/config.json")["data"]["class_counts"]
    assert (sum(counts), len(counts), counts[0] // counts[-1]) == (2131, 100, 100)


def test_reference(tmp_path, data_dir):
    """All images; for the probes equally many of each class."""
    packed = tmp_path / "packed"
    root = make_folder(tmp_path / "set", {"a": 30, "b": 20, "c": 12})
    images, words = load_reference("folder", root, None, 8, packed)
    assert images.counts.tolist() == [30, 20, 12] and words == "full training set"
    ckpt = {"config": {"data_dir": root, "pack_dir": packed}, "data": images.record()}
    chosen, labels, words = reference_images(ckpt)
    assert chosen.counts.tolist() == np.bincount(labels).tolist() == [12, 12, 12]
    assert words == "folder, 12 images of each class of the full training set"
    # A folder with a test set
    root = tmp_path / "split"
    make_folder(root / "train", {"a": 30, "b": 20, "c": 12})
    make_folder(root / "test", {"a": 5, "b": 5, "c": 5})
    assert load("folder", root, resolution=8, pack_dir=packed).counts.tolist() == [30, 20, 12]
    images, words = load_reference("folder", root, None, 8, packed)
    assert images.counts.tolist() == [5, 5, 5] and words == "full test set"
    # One that lacks a class
    for path in (root / "test/b").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="--data-dir"):
        load_reference("folder", root, None, 8, packed)
    # Digits
    assert len(load_reference("digits", data_dir)[0].labels) == 1497


def test_the_classes_of_a_folder_are_ordered_by_size(tmp_path):
    """So a draw takes what there is of the rare ones; runs of before stay in their order."""
    root = make_folder(tmp_path / "set", {"a": 4, "b": 40, "c": 12})
    args = Namespace(dataset="folder", data_dir=root, resolution=8, class_order=None,
                     pack_dir=tmp_path / "packed", ir=4, tail_seed=0)
    images = load_long_tailed(args)
    assert images.class_names == ["b", "c", "a"] and images.counts.tolist() == [18, 9, 4]
    whole = load("folder", root, resolution=8, pack_dir=args.pack_dir)
    of_a = whole.images[whole.labels == 2]
    assert len(of_a) == 4 and np.array_equal(images.images[images.labels == 2], of_a)
    assert np.array_equal(of_a[0], read_image(root / "a/000.png", 8))
    old = {"data": {"class_names": ["a", "b", "c"]}}
    args.ir = 1
    assert load_long_tailed(args, old).counts.tolist() == [4, 40, 12]
    args.class_order = "c,b,a"
    assert load_long_tailed(args).class_names == ["c", "b", "a"]


def test_the_table_of_a_set(digits):
    """What is used of what there is; then all classes, or the first and the last; the groups."""
    backwards = ImageSet("x", digits.images, 9 - digits.labels, list("jihgfedcba"), total=1497)
    first, *rows, groups = backwards.table().splitlines()
    assert "uses 502 of 1,497 images" in first
    assert [row.split() for row in rows[:4]] == [
        ["a", "148", "Many"], ["b", "106", "Many"], ["c", "76", "Many"], ["d", "54", "Medium"]]
    assert len(rows) == 10 and "Few 51" in groups
    rule = backwards.table({"Few": [0, 1]}, "under 11 images")
    assert rule.count("Few") == 3 and "Many" not in rule and "under 11 images" in rule
    labels = np.repeat(np.arange(13), np.arange(13, 0, -1))
    rows = ImageSet("x", labels, labels, list("abcdefghijklm"), total=91).table().splitlines()
    assert "uses" not in rows[0] and [row.split()[0] for row in rows[1:-1]] == [
        *"abcde", "...", *"ijklm"]
    balanced = ImageSet("x", labels[:2], np.arange(2), ["a", "b"], total=2).table()
    assert "1 of each class" in balanced and len(balanced.splitlines()) == 1


def test_a_class_without_images_is_refused(monkeypatch):
    """Of a reader of one's own: Eq. (3) divides by the size of each class."""
    def read(data_dir, split):
        return np.zeros((6, 8, 8, 3), np.uint8), np.array([0, 0, 0, 0, 1, 1]), ["a", "b", "none"]
    monkeypatch.setitem(data.READERS, "mine", data.Source(read, resolution=8, flip=False))
    for ir in (1, 2):
        args = Namespace(dataset="mine", data_dir="data", resolution=None, class_order=None,
                         pack_dir=None, ir=ir, tail_seed=0)
        with pytest.raises(UserError, match="--dataset"):
            load_long_tailed(args)


def test_the_hash_is_of_the_whole_set_and_of_its_content(data_dir, tmp_path):
    """Draws and orders do not change it; it is read from the pack, and another pack agrees."""
    images = load("digits", data_dir)
    assert images.take(np.arange(5)).sha256 == images.sha256
    assert load("digits", data_dir, class_order="9-9,1-8,0").sha256 == images.sha256
    assert load("digits", data_dir, pack_dir=tmp_path).sha256 == images.sha256
    assert load("digits", data_dir, "test").sha256 != images.sha256


def test_folders_that_a_received_checkpoint_names_are_not_made(cm_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ckpt = ckpt_of(cm_run)
    theirs = {"data_dir": str(tmp_path / "their/data"), "pack_dir": str(tmp_path / "their/packs")}
    ckpt["config"].update(theirs)
    assert len(data.training_images(ckpt).labels) == 502
    assert len(data.reference_images(ckpt)[0].labels) == 1497
    assert not (tmp_path / "their").exists() and (tmp_path / "data/packed").is_dir()
    for folder in theirs.values():              # on the machine of the training
        Path(folder).mkdir(parents=True)
    assert data.folders_of(ckpt["config"]) == tuple(theirs.values())
    assert data.folders_of(ckpt["config"], "a", "b") == ("a", "b")


def test_batches_are_epochs_of_permutations(digits):
    N = len(digits.labels)
    batches = Batches(digits, 64, 0, "cpu")
    rows = np.concatenate([batches.rows(s) for s in range(2 * N // 64 + 1)])
    first, second = rows[:N], rows[N:2 * N]
    assert sorted(first) == sorted(second) == list(range(N))
    assert not np.array_equal(first, second)


def test_batches_are_a_pure_function_of_seed_and_step(digits, monkeypatch):
    used = Batches(digits, 64, 0, "cpu")
    for step in range(20):
        used.rows(step)
    fresh = Batches(digits, 64, 0, "cpu")
    other = Batches(digits, 64, 1, "cpu")
    assert np.array_equal(fresh.rows(9), used.rows(9))
    assert not np.array_equal(other.rows(9), fresh.rows(9))
    x, y = fresh.at(9)
    monkeypatch.setattr(data, "device_limit", lambda device: 0)
    x_map, y_map = Batches(digits, 64, 0, "cpu").at(9)              # from the memory map instead
    assert torch.equal(x, x_map) and torch.equal(y, y_map)
    assert torch.equal(to_uint8(x), torch.from_numpy(digits.images[fresh.rows(9)]))
    assert y.tolist() == digits.labels[fresh.rows(9)].tolist()


@pytest.mark.parametrize("Q", [0, 0.5])
def test_resampled_classes_are_drawn_by_their_sizes_power(digits, Q):
    """--resample Q: class c with probability proportional to N_c^Q, images more than once."""
    batches = Batches(digits, 64, 0, "cpu", resample=Q)
    rows = np.concatenate([batches.order(epoch) for epoch in range(20)])
    got = np.bincount(digits.labels[rows], minlength=10) / len(rows)
    expected = digits.counts ** Q / (digits.counts ** Q).sum()
    assert np.abs(got - expected).max() < 0.02
    assert len(set(batches.order(0))) < len(digits.labels)


def test_uint8_rounds_and_clips():
    x = torch.tensor([-1.1, -1.0, 0.0, 1.0, 1.1, 1 / 127.5 * 0.4]).view(1, 1, 1, 6)
    assert to_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255, 128]
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    assert torch.equal(to_uint8(to_float(every)), every)
