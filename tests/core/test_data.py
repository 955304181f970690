"""data.py, packing.py: Cao et al.'s draw, packs, groups, batches, images in an .npz."""
import hashlib
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from argparse import Namespace
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, call
from PIL import Image
from torchvision import transforms

import data
import disk
import train
from data import (Batches, class_groups, images_of_npz, load, load_long_tailed, load_reference,
                  long_tail, long_tail_counts, open_npz, read_samples, resolve_classes, to_float,
                  to_uint8)
from runtime import UserError
from sets import packing, readers
from sets.packing import open_image, read_image


# --------------------------------------------------------------------------------------------------
# Class sizes and groups

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


def test_long_tail_of_unequal_classes():
    available = [148, 152, 147, 153, 151, 152, 151, 149, 144, 150]
    counts = [148, 106, 76, 54, 39, 28, 20, 14, 10, 7]
    assert long_tail_counts(available, 20).tolist() == counts
    assert long_tail_counts([10, 90], 2).tolist() == [10, 5]
    assert long_tail_counts([90, 10], 10).tolist() == [50, 5]           # n_max: at most N / C
    with pytest.raises(UserError, match="--ir 2000"):
        long_tail_counts([100, 100], 2000)


def test_class_groups():
    def sizes(C):
        groups = class_groups(np.arange(C, 0, -1))
        return {name: (min(v), max(v), len(v)) for name, v in groups.items()}
    assert sizes(10) == {"Many": (0, 2, 3), "Medium": (3, 5, 3), "Few": (6, 9, 4)}
    assert sizes(100) == {"Many": (0, 32, 33), "Medium": (33, 65, 33), "Few": (66, 99, 34)}
    assert class_groups([1, 9, 5])["Many"] == [1]
    assert class_groups([5, 1]) == {}


def test_groups_of_equal_classes_follow_their_numbers():
    assert class_groups([2, 2, 2, 2]) == {"Many": [0], "Medium": [1], "Few": [2, 3]}


def test_another_seed_draws_other_images():
    labels = np.arange(400) % 4
    rng = np.random.RandomState(3)
    expected = []
    for c, n in enumerate(long_tail_counts([100] * 4, 10)):
        members = np.flatnonzero(labels == c)
        rng.shuffle(members)
        expected.extend(members[:n])
    assert long_tail(labels, 10, seed=3).tolist() == sorted(expected)
    assert long_tail(labels, 10).tolist() != sorted(expected)


def test_resolve_classes():
    names = ["cat", "dog", "owl"]
    assert resolve_classes("0-1,owl", names) == [0, 1, 2]
    for text in ("3", "x", "1-", ""):
        with pytest.raises(UserError, match="--classes"):
            resolve_classes(text, names)


# --------------------------------------------------------------------------------------------------
# Data sets

def test_digits(data_dir):
    train = load("digits", data_dir)
    test = load("digits", data_dir, "test")
    assert len(train.labels) == 1497 and len(test.labels) == 300 and (test.counts == 30).all()
    assert train.images.shape == (1497, 8, 8, 1) and train.images.max() == 255 and not train.flip
    swapped = load("digits", data_dir, class_order="9-9,1-8,0")
    assert swapped.class_names[0] == "9" and swapped.counts[0] == train.counts[9]
    again = load("digits", data_dir)
    assert isinstance(again.images, np.memmap) and np.array_equal(again.images, train.images)


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


def test_the_papers_command_on_cifar100(small_cifar, capsys):
    """`train.py --dataset cifar100 --ir 100`, but for the width, the batch and the steps."""
    call(train.main, "--dataset", "cifar100", "--ir", 100, "--data-dir", small_cifar, "--ch", 32,
         "--batch-size", 4, "--steps", 1, "--sample-every", 0, "--device", "cpu",
         "--dtype", "float32", "--out", small_cifar / "run")
    text = capsys.readouterr().out
    assert "2,131 images, 100 classes, IR 100" in text
    assert "dropout=0.1" in text and "reserved (A, B)" in text
    config = disk.read_json(small_cifar / "run/config.json")
    assert config["config"]["base"] == "oc" and config["config"]["cm"]
    assert config["network"]["ch_mult"] == [1, 2, 2, 2]


# --------------------------------------------------------------------------------------------------
# Batches

def test_batches_are_epochs_of_permutations(digits):
    N = len(digits.labels)
    B = 64
    batches = Batches(digits, B, 0, "cpu")
    rows = np.concatenate([batches.rows(s) for s in range(2 * N // B + 1)])
    first = rows[:N]
    second = rows[N:2 * N]
    assert sorted(first) == sorted(second) == list(range(N))
    assert not np.array_equal(first, second)


def test_batches_are_a_pure_function_of_seed_and_step(digits):
    used = Batches(digits, 64, 0, "cpu")
    for step in range(20):
        used.rows(step)
    fresh = Batches(digits, 64, 0, "cpu")
    other = Batches(digits, 64, 1, "cpu")
    assert np.array_equal(fresh.rows(9), used.rows(9))
    assert not np.array_equal(other.rows(9), fresh.rows(9))
    x, y = fresh.at(9)
    x_map, y_map = Batches(digits, 64, 0, "cpu", limit=0).at(9)     # from the memory map instead
    assert torch.equal(x, x_map) and torch.equal(y, y_map)
    assert torch.equal(to_uint8(x), torch.from_numpy(digits.images[fresh.rows(9)]))


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


# --------------------------------------------------------------------------------------------------
# Samples in an .npz

def noise(n=4, channels=3):
    """n images of random pixels, 8 x 8."""
    return np.random.RandomState(0).randint(0, 256, (n, 8, 8, channels), np.uint8)


def test_open_npz(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=noise(), more=np.arange(3))
    content = open_npz(tmp_path / "a.npz", "--samples")
    assert content.keys() == {"arr_0", "more"}
    assert np.array_equal(content["arr_0"], noise())
    assert content["more"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["missing", "a folder", "empty", "text", "cut", "objects", "crc"])
def test_open_npz_refuses(tmp_path, kind):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=noise())
    whole = path.read_bytes()
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "objects":
        np.savez(path, arr_0=np.array([{"not": "a number"}], dtype=object))
    elif kind != "missing":
        damaged = whole[:500] + b"damaged" + whole[507:]
        content = {"empty": b"", "text": b"hello", "cut": whole[:len(whole) // 2], "crc": damaged}
        path.write_bytes(content[kind])
    with pytest.raises(UserError) as e:
        open_npz(path, "--extra")
    assert str(e.value).startswith(f"--extra {path}: cannot be read as an .npz (")


def damaged_npz(path, kind):
    """Files that NumPy fails on in ways of its own."""
    if kind == "npy":
        np.save(open(path, "wb"), noise())
    elif kind == "deflate":
        np.savez_compressed(path, arr_0=np.tile(noise(), (40, 1, 1, 1)))
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle:middle + 40] = bytes(40)
        path.write_bytes(content)
    elif kind == "member":
        with zipfile.ZipFile(path, "w") as f:
            f.writestr("arr_0", b"not an array")
    elif kind == "header":
        with zipfile.ZipFile(path, "w") as f:
            f.writestr("arr_0.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', " + b" " * 200)
    elif kind == "huge":
        header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000,), }\n"
        with zipfile.ZipFile(path, "w") as f:
            f.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
                       + header)
    elif kind == "png":
        gradient(9, 9).save(path, format="png")


@pytest.mark.parametrize("kind", ["npy", "deflate", "member", "header", "huge", "png"])
def test_open_npz_refuses_damaged_files(tmp_path, kind):
    path = tmp_path / "samples.npz"
    damaged_npz(path, kind)
    with pytest.raises(UserError, match="^--samples .*cannot be read as an .npz") as e:
        open_npz(path, "--samples")
    assert "allow_pickle" not in str(e.value) and "\n" not in str(e.value)


def test_images_of_npz():
    def read(**content):
        return images_of_npz(content, "a.npz", "--samples")
    got, labels = read(arr_0=noise())
    assert np.array_equal(got, noise()) and labels is None
    got, labels = read(arr_0=noise(channels=1), arr_1=np.array([3, 0, 1, 1], np.int16))
    assert got.shape == (4, 8, 8, 1) and labels.tolist() == [3, 0, 1, 1]


@pytest.mark.parametrize("content, says", [
    ({"images": noise()}, "has no arr_0"),
    ({"arr_0": noise().astype(np.float32)}, r"arr_0 is float32 of shape \[4, 8, 8, 3\]"),
    ({"arr_0": noise()[..., 0]}, r"of shape \[4, 8, 8\]; it must be uint8, N x H x W x 3"),
    ({"arr_0": noise(channels=4)}, r"of shape \[4, 8, 8, 4\]"),
    ({"arr_0": noise().transpose(0, 3, 1, 2)}, r"of shape \[4, 3, 8, 8\]"),
    ({"arr_0": noise(), "arr_1": np.arange(3)}, "arr_1 must hold 4 whole numbers"),
    ({"arr_0": noise(), "arr_1": np.zeros((4, 10), int)}, "arr_1 must hold 4 whole numbers"),
    ({"arr_0": noise(), "arr_1": np.zeros(4)}, "arr_1 must hold 4 whole numbers"),
])
def test_images_of_npz_refuses(content, says):
    with pytest.raises(UserError, match=f"^--extra a.npz: .*{says}"):
        images_of_npz(content, "a.npz", "--extra")


def test_read_samples(tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=noise(channels=1), arr_1=np.array([0, 1, 0, 1]))
    record = {"settings": {"seed": 0}, "data": {"class_names": ["a", "b"]}}
    content = {**record, "seconds": 1.5, "npz_sha256": disk.sha256(path)}
    disk.write_json(tmp_path / "samples.json", content)
    got, labels, read = read_samples(path)
    assert np.array_equal(got, noise(channels=1).repeat(3, 3))
    assert labels.tolist() == [0, 1, 0, 1] and read == record


def test_read_samples_refuses(tmp_path):
    path = tmp_path / "samples.npz"
    with pytest.raises(UserError, match="^--pair .*cannot be read as an .npz"):
        read_samples(path, "--pair")
    np.savez(path, arr_0=noise().astype(float))
    with pytest.raises(UserError, match="^--pair .*arr_0 is float64"):
        read_samples(path, "--pair")
    np.savez(path, arr_0=noise())
    with pytest.raises(UserError, match="^--samples .*the .json that sample.py writes"):
        read_samples(path)
    for not_ours in ([1, 2], {"data": {}}, {"settings": "none", "data": {}}):
        disk.write_json(tmp_path / "samples.json", not_ours)
        with pytest.raises(UserError, match="^--samples .*the .json that sample.py writes"):
            read_samples(path)


@pytest.mark.parametrize("content", [
    '{"settings": {}, "data": {}}', '{"settings": {}, "data": {}, "npz_sha256": "0123"}'])
def test_a_json_that_belongs_to_other_samples(tmp_path, content):
    """The .npz was replaced or cut, or the JSON is an older version's: nothing is taken of it."""
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=noise())
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(UserError, match="^--pair .*does not belong to it.*run sample.py again"):
        read_samples(path, "--pair")


@pytest.mark.parametrize("data", [
    {"class_names": "ab"}, {"class_names": [1, 2]}, {"class_counts": [1, 2]},
    {"class_names": ["a", "b"], "class_counts": [5]},
    {"class_names": ["a", "b"], "class_counts": ["5", "1"]}, {"resolution": "big"}])
def test_a_damaged_json_beside_samples(tmp_path, data):
    """Counts of too few classes would leave the groups out, those of text end in a traceback."""
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=noise())
    content = {"settings": {}, "data": data, "npz_sha256": disk.sha256(path)}
    disk.write_json(tmp_path / "samples.json", content)
    with pytest.raises(UserError, match="^--pair .*is damaged.*run sample.py again"):
        read_samples(path, "--pair")


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, -1, 1]])
def test_labels_without_a_class(tmp_path, labels):
    """-1 would be shown under the last class's name."""
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=noise()[:3], arr_1=np.array(labels))
    content = {"settings": {}, "data": {"class_names": ["a", "b"]}}
    disk.write_json(tmp_path / "samples.json", {**content, "npz_sha256": disk.sha256(path)})
    with pytest.raises(UserError, match="^--pair .*none of its 2 classes"):
        read_samples(path, "--pair")


# --------------------------------------------------------------------------------------------------
# Packs are current and whole

def load_folder(root, pack_dir):
    """The set of a folder, at 8 pixels."""
    return load("folder", root, resolution=8, pack_dir=pack_dir)


def test_a_file_of_the_same_name_and_size_is_packed_anew(tmp_path):
    root = make_folder(tmp_path / "set", [2, 2])
    path = root / "class0/new.bmp"
    hashes = []
    for grey in (0, 255):
        Image.new("RGB", (9, 9), (grey,) * 3).save(path)
        images = load_folder(root, tmp_path / "packs")
        assert (images.images[images.labels == 0] == grey).all((1, 2, 3)).any()
        hashes.append(images.record()["sha256"])
    assert hashes[0] != hashes[1]
    os.utime(path)                      # touched: packed anew, and the content is what it was
    assert load_folder(root, tmp_path / "packs").record()["sha256"] == hashes[1]


RACE = """
import sys, packing
from data import load
read, started = packing.read_image, []
def slow(path, resolution):
    import time
    time.sleep(0.02)
    return read(path, resolution)
packing.read_image = slow
images = load("folder", sys.argv[1], resolution=8, pack_dir=sys.argv[2])
print(images.sha256)
"""


def test_two_processes_pack_one_set(tmp_path):
    """Both get the whole set; one of them packs it."""
    root = make_folder(tmp_path / "set", [30, 20])
    command = [sys.executable, "-c", RACE, root, tmp_path / "packs"]
    both = [subprocess.Popen([str(w) for w in command], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, text=True) for _ in range(2)]
    hashes = {p.communicate(timeout=120)[0].strip() for p in both}
    assert hashes == {load_folder(root, tmp_path / "alone").sha256}
    assert not list((tmp_path / "packs").glob("*.partial"))


def test_a_mark_without_its_partial(tmp_path):
    """What a mark says counts only for the file that it names."""
    root = make_folder(tmp_path / "set", [5, 4])
    whole = load_folder(root, tmp_path / "packs")
    (npy,) = (tmp_path / "packs").glob("*.npy")
    meta = disk.read_json(npy.with_suffix(".json"))
    source = {key: meta[key] for key in ("provenance", "stamp")}
    mark = {"partial": f"{npy.name}.gone.partial", "shape": meta["shape"], "source": source,
            "done": 7}
    disk.write_json(npy.with_name(npy.name + ".mark"), mark)
    np.save(open(npy.with_name(npy.name + ".other.partial"), "wb"), np.zeros_like(whole.images))
    npy.unlink()
    again = load_folder(root, tmp_path / "packs")
    assert np.array_equal(again.images, whole.images)
    assert not list((tmp_path / "packs").glob("*.partial"))


@pytest.mark.parametrize("shape, source", [([3, 8, 8, 3], "y"), ([4, 8, 8, 3], "x")])
def test_another_set_does_not_go_on_with_what_was_packed(shape, source, tmp_path):
    """A mark of the same pack, of other sources or so many images: its part is removed."""
    pack, mark = tmp_path / "x.npy", tmp_path / "x.npy.mark"
    partial = packing.new_partial(pack, [3, 8, 8, 3], np.uint8)
    record = {"partial": partial.name, "shape": [3, 8, 8, 3], "source": "x", "done": 2}
    disk.write_json(mark, record)
    assert packing.packed_so_far(pack, mark, [3, 8, 8, 3], "x") == (partial, 2)
    assert packing.packed_so_far(pack, mark, shape, source) == (None, 0)
    assert not list(tmp_path.iterdir())


PACKED = (np.zeros((2, 4, 4, 3), np.uint8), [0, 1], ["a", "b"])     # images, labels, class names


def test_a_pack_counts_for_its_own_provenance_and_stamp(tmp_path):
    base = tmp_path / "x"
    packing.write_pack(base, *PACKED, {"split": "train"}, stamp=1)
    assert packing.read_pack(base, {"split": "train"}, 1) is not None
    assert packing.read_pack(base, {"split": "test"}, 1) is None
    assert packing.read_pack(base, {"split": "train"}, 2) is None
    with pytest.raises(AttributeError):     # killed while it is packed anew: the old JSON is gone
        packing.write_pack(base, None, [], [], {})
    assert packing.read_pack(base, {"split": "train"}, 1) is None


def test_a_pack_with_its_time_set_back(tmp_path):
    base = tmp_path / "x"
    packing.write_pack(base, *PACKED, {})
    path = tmp_path / "x.npy"
    stat = path.stat()
    np.save(path, PACKED[0] + 1)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert packing.read_pack(base, {}) is None


def test_files_of_other_names_or_sizes_are_another_set(tmp_path):
    hashes = set()
    for name, content in (("a", "x"), ("b", "x"), ("a", "xy")):
        (tmp_path / name).write_text(content)
        hashes.add(packing.names_and_sizes([tmp_path / name], tmp_path))
    assert len(hashes) == 3


def test_the_hash_of_a_set_is_of_all_of_it():
    images, labels, names = PACKED
    hashes = {packing.content_hash(*changed) for changed in (
        PACKED, (images + 1, labels, names), (images, [1, 0], names), (images, labels, ["a", "c"]),
        (images.reshape(2, 2, 8, 3), labels, names))}
    assert len(hashes) == 5


def test_a_set_that_another_process_packs_meanwhile_is_not_packed_again(tmp_path, monkeypatch):
    @contextmanager
    def waited(path):
        packing.write_pack(tmp_path / "x", *PACKED, {})
        monkeypatch.setattr(packing, "write_pack", None)
        yield
    monkeypatch.setattr(packing, "lock", waited)
    images, _ = packing.pack_once(tmp_path / "x", lambda: PACKED, {}, None, None, "x")
    assert np.array_equal(images, PACKED[0])


def test_a_full_disk_is_an_error_before_the_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="--pack-dir.*No space left"):
        load_folder(make_folder(tmp_path / "set", [2, 2]), tmp_path / "packs")
    assert not [p for p in (tmp_path / "packs").iterdir() if p.suffix != ".lock"]


@pytest.mark.parametrize("damage", [b"", b"{'descr': (" + b" " * 200, b"\xff" * 300])
def test_a_damaged_pack_is_made_again(tmp_path, damage):
    root = make_folder(tmp_path / "set", [2, 2])
    whole = np.array(load_folder(root, tmp_path / "packs").images)
    (npy,) = (tmp_path / "packs").glob("*.npy")
    content = npy.read_bytes()
    npy.write_bytes(content[:10] + damage + content[10 + len(damage):] if damage else b"")
    assert np.array_equal(load_folder(root, tmp_path / "packs").images, whole)


def test_a_pack_of_other_pixels_is_made_again(tmp_path):
    """Its file is hashed again where its size or times are not those that were written down."""
    root = make_folder(tmp_path / "set", [2, 2])
    before = load_folder(root, tmp_path / "packs")
    whole = np.array(before.images)
    (npy,) = (tmp_path / "packs").glob("*.npy")
    os.utime(npy)                       # the same content: taken, and written down
    assert load_folder(root, tmp_path / "packs").sha256 == before.sha256
    np.save(npy, 255 - whole)
    assert np.array_equal(load_folder(root, tmp_path / "packs").images, whole)


def test_times_that_were_set_back(tmp_path):
    root = make_folder(tmp_path / "set", [2, 2])
    path = root / "class0/new.bmp"
    Image.new("RGB", (9, 9), (0, 0, 0)).save(path)
    before = load_folder(root, tmp_path / "packs").sha256
    stat = path.stat()
    Image.new("RGB", (9, 9), (255, 255, 255)).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_folder(root, tmp_path / "packs").sha256 != before


def test_32_bit_images_are_refused(tmp_path):
    root = make_folder(tmp_path / "set", [2, 2])
    Image.fromarray(np.full((9, 9), 200, np.int32)).save(root / "class0/deep.tiff")
    with pytest.raises(UserError, match="deep.tiff .*32-bit pixels have no known range"):
        load_folder(root, tmp_path / "packs")


def test_a_set_that_cannot_be_packed_completely(tmp_path, monkeypatch):
    """A pack counts only when every image is in it."""
    root = make_folder(tmp_path / "set", [3, 2])
    broken_image(root / "class1/001.png", "cut")
    with pytest.raises(UserError, match="--data-dir: .*001.png cannot be read"):
        load_folder(root, tmp_path / "packs")
    left = {p.suffix for p in (tmp_path / "packs").iterdir()}
    assert left <= {".lock"}


def test_older_checkpoints_still_resume(data_dir):
    """They have no hash, a classifier's three entries only; those that they have must agree."""
    record = load("digits", data_dir).record()
    args = train.make_parser().parse_args([])
    assert len(record["sha256"]) == 64
    three = {key: record[key] for key in ("dataset", "class_names", "class_counts")}
    without = {key: value for key, value in record.items() if key != "sha256"}
    for old in (record, without, three):
        data.refuse_other_data(old, record, args)
    for key, value in (("sha256", "0" * 64), ("class_counts", [1] * 10)):
        with pytest.raises(UserError, match="--data-dir.*not the images"):
            data.refuse_other_data({**record, key: value}, record, args)


def test_the_hash_is_of_the_whole_set_and_of_its_content(data_dir, tmp_path):
    """Draws and orders do not change it; it is read from the pack, and another pack agrees."""
    images = load("digits", data_dir)
    assert images.take(np.arange(5)).sha256 == images.sha256
    assert load("digits", data_dir, class_order="9-9,1-8,0").sha256 == images.sha256
    assert load("digits", data_dir, pack_dir=tmp_path).sha256 == images.sha256
    assert load("digits", data_dir, "test").sha256 != images.sha256


def test_one_pack_dir_for_two_data_dirs(tmp_path):
    """Each has its own pack, for sets that are not folders too."""
    paths = [data.pack_path("cub200", tmp_path / name, "train", 64, tmp_path / "packs")
             for name in ("a/cub", "b/cub")]
    assert paths[0] != paths[1] and paths[0].parent == paths[1].parent


# --------------------------------------------------------------------------------------------------
# Readers of one's own

def use_reader(monkeypatch, read):
    """Make `read` the reader of the set "own"."""
    monkeypatch.setitem(readers.READERS, "own", readers.Source(read, resolution=8, flip=False))


@pytest.mark.parametrize("images, labels, says", [
    (np.zeros((4, 8, 8, 3)), [0, 1, 0, 1], "float64 from 0 to 0.*uint8"),
    (np.full((4, 8, 8, 3), 300), [0, 1, 0, 1], "from 300 to 300"),
    (np.full((4, 8, 8, 3), -1), [0, 1, 0, 1], "from -1 to -1"),
    (np.zeros((4, 8, 8), np.uint8), [0, 1, 0, 1], "N x H x W x 3"),
    (np.zeros((4, 8, 6, 3), np.uint8), [0, 1, 0, 1], "as high as wide"),
    (np.full((4, 8, 8, 3), np.nan), [0, 1, 0, 1], "float64 from nan to nan"),
    (np.zeros((4, 8, 8, 3), bool), [0, 1, 0, 1], "type bool"),
    (["a.png"] * 4, [0, 1, 0, 1], "type list.*files=True"),
    (np.zeros((4, 8, 8, 3), np.uint8), [1, 2, 1, 2], "labels from 1 to 2 and 2 class names"),
    (np.zeros((4, 8, 8, 3), np.uint8), [0.5, 1, 0, 1], "float64; they must be whole numbers"),
    (np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0], "one label per image"),
    (np.zeros((0, 8, 8, 3), np.uint8), [], "0 images"),
])
def test_what_a_reader_gives_is_checked(monkeypatch, tmp_path, images, labels, says):
    use_reader(monkeypatch, lambda data_dir, split: (images, np.array(labels), ["a", "b"]))
    with pytest.raises(UserError, match="--dataset own: .*" + says):
        load("own", tmp_path)
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_class_names_of_a_reader(monkeypatch, tmp_path, names):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    use_reader(monkeypatch, lambda data_dir, split: (images, np.array([0, 1]), names))
    with pytest.raises(UserError, match="--dataset own: .*class names"):
        load("own", tmp_path)


def test_a_reader_whose_source_cannot_be_had(monkeypatch, tmp_path):
    """Packed anew each time: nobody can say whether it is the one that made the pack."""
    for value in (0, 1):
        content = {"np": np, "value": value}
        exec("def read(data_dir, split):\n    images = np.full((2, 8, 8, 3), value, np.uint8)\n"
             "    return images, np.array([0, 1]), ['a', 'b']", content)
        use_reader(monkeypatch, content["read"])
        assert (load("own", tmp_path).images == value).all()


def test_a_reader_that_has_changed_is_read_again(monkeypatch, tmp_path):
    def first(data_dir, split):
        return np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1]), ["a", "b"]

    def second(data_dir, split):
        return np.ones((2, 8, 8, 3), np.uint8), np.array([0, 1]), ["a", "b"]
    for value, read in enumerate((first, second)):
        use_reader(monkeypatch, read)
        assert (load("own", tmp_path).images == value).all()


# --------------------------------------------------------------------------------------------------
# Folders as they are found

def test_links_that_lead_back(tmp_path):
    root = make_folder(tmp_path / "set", [3, 2])
    (root / "class0/up").symlink_to(root / "class0")
    (root / "class1/all").symlink_to(root)
    assert load_folder(root, tmp_path / "packs").counts.tolist() == [3, 5]


def test_hidden_folders_at_any_depth(tmp_path):
    root = make_folder(tmp_path / "set", [3, 2])
    for where in (root / ".ipynb_checkpoints", root / "class0/.ipynb_checkpoints"):
        where.mkdir()
        gradient(9, 9).save(where / "x.png")
    images = load_folder(root, tmp_path / "packs")
    assert images.counts.tolist() == [3, 2] and images.class_names == ["class0", "class1"]


@pytest.mark.parametrize("make", [
    lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to(path.name), os.mkfifo],
    ids=["dangling", "itself", "fifo"])
def test_what_is_no_file_is_refused(tmp_path, make):
    root = make_folder(tmp_path / "set", [3, 2])
    make(root / "class1/x.png")
    with pytest.raises(UserError, match="--data-dir.*x.png"):
        load_folder(root, tmp_path / "packs")


def test_a_class_whose_folder_is_elsewhere_now(tmp_path):
    """A link that leads nowhere is refused: without it the classes would be others."""
    root = make_folder(tmp_path / "set", [3, 2])
    for link in (root / "class2", root / "class1/more"):
        link.symlink_to(tmp_path / "not mounted")
        with pytest.raises(UserError, match=f"^--data-dir: {link} is a link that leads nowhere"):
            load_folder(root, tmp_path / "packs")
        link.unlink()


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    """It is not taken for an empty one."""
    root = make_folder(tmp_path / "set", [3, 2])
    (root / "class1/more").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="^--data-dir .*Permission denied.*more"):
        load_folder(root, tmp_path / "packs")


def test_image_folder(tmp_path):
    """The files and the order of training; or images that lie flat."""
    root = make_folder(tmp_path / "set", [3, 2])
    (root / "class0/up").symlink_to(root / "class0")
    paths, labels, names = readers.image_folder(str(root))
    expected, expected_labels, expected_names = readers.read_folder(root, "train")
    assert list(map(str, paths)) == list(map(str, expected)) and names == expected_names
    assert labels.tolist() == expected_labels.tolist() == [0, 0, 0, 1, 1]
    paths, labels, names = readers.image_folder(root / "class1")
    assert [os.path.basename(p) for p in paths] == ["000.png", "001.png"]
    assert labels is None and names is None


@pytest.mark.parametrize("change, says", [
    (lambda root: gradient(9, 9).save(root / "x.png"), "x.png, beside sub-folders"),
    (lambda root: (root / "class9").symlink_to("nowhere"), "leads nowhere"),
    (lambda root: (root / "class0").rename(root.parent / "away"), "no images in it"),
    (lambda root: root.rename(root.parent / "away"), "cannot be read"),
])
def test_image_folder_refuses(tmp_path, change, says):
    root = make_folder(tmp_path / "set", [3])
    change(root)
    with pytest.raises(UserError, match=f"^--samples.*{says}"):
        readers.image_folder(root, "--samples")


def test_images_beside_the_classes_are_not_left_out_of_training(tmp_path):
    root = make_folder(tmp_path / "set", [3, 2])
    gradient(9, 9).save(root / "x.png")
    with pytest.raises(UserError, match="^--data-dir.*x.png, beside sub-folders"):
        readers.read_folder(root, "train")


def test_a_run_among_the_classes_is_refused(tmp_path):
    """Its grids of samples would be a class of the next call; beside train/ and test/ it is not."""
    root = make_folder(tmp_path / "set", [3, 2])
    flags = {"dataset": "folder", "data_dir": root, "resolution": 8, "class_order": None,
             "pack_dir": tmp_path / "packs", "ir": 1}
    for out in (root, root / "run", root / "class0/run"):
        with pytest.raises(UserError, match="^--out .*would take its pictures for a class"):
            load_long_tailed(Namespace(**flags, out=out))
    for split in ("train", "test"):
        make_folder(tmp_path / "both" / split, [3, 2])
    flags["data_dir"] = tmp_path / "both"
    assert len(load_long_tailed(Namespace(**flags, out=tmp_path / "both/run")).labels) == 5


def test_a_split_is_no_class(tmp_path):
    """train/ beside valid/ would be two classes; a folder of railway trains is one."""
    for split in ("train", "valid"):
        make_folder(tmp_path / "set" / split, [3, 2])
    for read in (lambda root: readers.read_folder(root, "train"), readers.image_folder):
        with pytest.raises(UserError, match="^--data-dir.*train would be a class.*test or val"):
            read(tmp_path / "set")
    (tmp_path / "set/valid").rename(tmp_path / "set/val")
    assert readers.read_folder(tmp_path / "set", "train")[2] == ["class0", "class1"]
    trains = make_folder(tmp_path / "trains", [3, 2])
    (trains / "class0").rename(trains / "train")
    assert readers.read_folder(trains, "train")[2] == ["class1", "train"]


def test_names_that_are_not_utf8(tmp_path):
    root = make_folder(tmp_path / "set", [3, 2])
    gradient(9, 9).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(os.fsdecode(os.fsencode(root) + b"/class0/\xff.png"))
    assert load_folder(root, tmp_path / "packs").counts.tolist() == [4, 2]
    (root / "class1").rename(os.fsdecode(os.fsencode(root) + b"/\xff"))
    with pytest.raises(UserError, match="--data-dir.*rename it"):
        load_folder(root, tmp_path / "packs")


def test_classes_named_by_numbers(tmp_path):
    """They are in the order of the numbers; where name and number differ, one must say which."""
    for c in range(1, 13):
        (tmp_path / f"set/{c}").mkdir(parents=True)
        gradient(9, 9).save(tmp_path / f"set/{c}/x.png")
    names = load_folder(tmp_path / "set", tmp_path / "packs").class_names
    assert names == [str(c) for c in range(1, 13)]
    with pytest.raises(UserError, match="--classes 2: 2 is the name of class number 1"):
        resolve_classes("2", names)
    assert resolve_classes("1-1,2-3", names) == [1, 2, 3]
    assert resolve_classes("2", [str(c) for c in range(10)]) == [2]
    ages = ["0-2", "10-19", "20-29", "3-9"]
    with pytest.raises(UserError, match="0-2 is the name of class number 0, and also a range"):
        resolve_classes("0-2", ages)
    assert resolve_classes("0,1-3", ages) == [0, 1, 2, 3]


@pytest.mark.parametrize("text", [
    "0-99999999999", "99999999999", "9" * 5000, "\u00b2", "1-", "-1", "", "1--2"])
def test_classes_that_are_none(text):
    with pytest.raises(UserError, match="--classes"):
        resolve_classes(text, ["a", "b", "c"])


# --------------------------------------------------------------------------------------------------
# Anyone's images

KINDS = {       # the suffix of each kind of file
    "png": "png", "jpeg": "jpg", "cmyk": "jpg", "exif": "jpg", "palette": "png", "gif": "gif",
    "rgba": "png", "grey": "png", "grey16": "png"}
TOLERANCE = {"png": 8, "grey": 8, "grey16": 8}      # the others, 16, lose something


def gradient(w, h):
    """A colour image whose red grows to the right, green downwards."""
    x = np.zeros((h, w, 3), np.uint8)
    x[..., 0] = np.linspace(0, 255, w)[None]
    x[..., 1] = np.linspace(0, 255, h)[:, None]
    x[..., 2] = 90
    return Image.fromarray(x)


def half_transparent(image):
    """The image with an alpha channel: its lower half is transparent."""
    rgba = image.convert("RGBA")
    alpha = np.zeros((image.height, image.width), np.uint8)
    alpha[:image.height // 2] = 255
    rgba.putalpha(Image.fromarray(alpha))
    return rgba


def save_as(folder, kind, image):
    """Write an image in one of the ways in which people's files come; returns its path."""
    path = folder / f"{kind}.{KINDS[kind]}"
    options = {"quality": 95} if KINDS[kind] == "jpg" else {}
    if kind == "cmyk":
        image = image.convert("CMYK")
    elif kind == "exif":                                # stored on its side, as a telephone does
        exif = Image.Exif()
        exif[0x0112] = 6                                # to be turned by 90 degrees clockwise
        image = image.transpose(Image.ROTATE_90)
        options["exif"] = exif
    elif kind in ("palette", "gif"):
        image = image.quantize(256)
    elif kind == "rgba":
        image = half_transparent(image)
    elif kind == "grey":
        image = image.convert("L")
    elif kind == "grey16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    image.save(path, **options)
    return path


def by_torchvision(image, R):
    """An independent resize and crop, with antialiasing: (R, R, 3) float."""
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    resized = transforms.functional.resize(whole, R, antialias=True)
    cropped = transforms.functional.center_crop(resized, [R, R])
    return cropped.permute(1, 2, 0).numpy().astype(float)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (40, 200), (7, 5)])
def test_every_kind_and_size_of_image(tmp_path, kind, size):
    image = gradient(*size)
    R = 16
    got = read_image(save_as(tmp_path, kind, image), R).astype(float)
    assert got.shape == (R, R, 3)
    if kind.startswith("grey"):
        image = image.convert("L").convert("RGB")
    error = np.abs(got - by_torchvision(image, R))
    scale = max(1, R / min(size))                       # enlarged images ring
    if kind == "rgba":
        assert (got[-2:] == 255).all() and error[:R // 2 - 3].max() < 14 * scale
        return
    tolerance = TOLERANCE.get(kind, 16) * scale
    assert error.mean() < tolerance / 4 and error.max() < 3 * tolerance


def test_open_image_keeps_the_size(tmp_path):
    """Upright and in RGB, in its own size: what read_image resizes."""
    image = gradient(40, 20)
    got = open_image(save_as(tmp_path, "exif", image))
    assert got.size == (40, 20) and got.mode == "RGB"
    assert np.abs(np.asarray(got).astype(int) - np.asarray(image)).max() < 40
    assert np.array_equal(read_image(save_as(tmp_path, "png", image), 20),
                          np.asarray(image)[:, 10:30])


def broken_image(path, kind):
    """Write a file that Pillow has its own difficulties with."""
    gradient(9, 9).save(path)
    whole = path.read_bytes()
    if kind == "cut":
        path.write_bytes(whole[:len(whole) // 2])
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "bomb":
        ihdr = b"IHDR" + struct.pack(">II", 30_000, 30_000) + whole[24:29]
        path.write_bytes(whole[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + whole[33:])
    elif kind == "header":
        path.write_bytes(whole[:16] + bytes(8) + whole[24:])
    elif kind == "float":
        Image.fromarray(np.zeros((9, 9), np.float32)).save(path, format="tiff")
    elif kind == "32 bits":
        Image.fromarray(np.full((9, 9), 70_000, np.int32)).save(path, format="tiff")


@pytest.mark.parametrize("kind", ["cut", "text", "bomb", "header", "float", "32 bits"])
def test_a_broken_image_is_named(tmp_path, kind):
    path = tmp_path / "x.png"
    broken_image(path, kind)
    with pytest.raises(UserError, match=f"^--samples: {path} cannot be read as an image") as e:
        open_image(path, "--samples")
    assert "\n" not in str(e.value)


def test_an_error_of_a_decoder_is_named(tmp_path, monkeypatch):
    def decode(path):
        raise OverflowError("an offset")
    monkeypatch.setattr(Image, "open", decode)
    gradient(9, 9).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="^--data-dir: .*x.png cannot be read"):
        read_image(tmp_path / "x.png", 8)


def make_folder(root, sizes):
    """A folder with one sub-folder per class, of so many small images."""
    for c, n in enumerate(sizes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(n):
            gradient(20 + c, 20 + i % 7).save(root / f"class{c}" / f"{i:03d}.png")
    (root / ".hidden").mkdir()
    (root / "notes.txt").write_text("not an image")
    return root


def test_folder(tmp_path):
    root = make_folder(tmp_path / "set", [30, 20, 12])
    (root / "class1" / "deeper").mkdir()
    gradient(30, 30).save(root / "class1/deeper/x.JPG", format="jpeg")

    def read():
        return load("folder", root, resolution=8, pack_dir=tmp_path / "packed")
    images = read()
    assert images.class_names == ["class0", "class1", "class2"]
    assert images.counts.tolist() == [30, 21, 12] and images.flip
    assert images.images.shape == (63, 8, 8, 3)
    assert np.array_equal(images.images[0], read_image(root / "class0/000.png", 8))
    # Packed once
    packed = next((tmp_path / "packed").glob("*.npy"))
    before = packed.stat().st_mtime_ns
    assert np.array_equal(read().images, images.images)
    assert packed.stat().st_mtime_ns == before
    # Packed anew where a file's name or size is another
    (root / "class2/000.png").unlink()
    assert read().counts.tolist() == [30, 21, 11]
    gradient(200, 200).save(root / "class0/000.png")
    assert not np.array_equal(read().images[0], images.images[0])


def test_a_folder_without_images_is_said(tmp_path, capsys):
    """It is no class; one whose files are of a kind that is not read would be missed silently."""
    root = make_folder(tmp_path / "set", [3, 2])
    load("folder", root, resolution=8, pack_dir=tmp_path / "packed")
    assert "warning" not in capsys.readouterr().out
    (root / "cats").mkdir()
    (root / "cats/x.heic").write_bytes(b"x")
    images = load("folder", root, resolution=8, pack_dir=tmp_path / "packed")
    assert images.counts.tolist() == [3, 2]
    assert f"warning: {root}: cats: no images" in capsys.readouterr().out
    # Beside images that are read, it would make its class smaller
    for name in ("y.HEIC", "z.heic", ".hidden.heic", "notes.txt"):
        (root / "class1" / name).write_bytes(b"x")
    gradient(9, 9).save(root / "class1/w.jfif", format="jpeg")
    images = load("folder", root, resolution=8, pack_dir=tmp_path / "packed")
    assert images.counts.tolist() == [3, 3]
    assert f"warning: {root}/class1: 2 images of a kind that is not read, such as y.HEIC" in (
        capsys.readouterr().out)


def test_balanced_reference(tmp_path, data_dir):
    packed = tmp_path / "packed"
    root = make_folder(tmp_path / "set", [30, 20, 12])
    images, words = load_reference("folder", root, None, 8, packed)
    assert images.counts.tolist() == [12, 12, 12]
    assert words == "training set, 12 images of each class"
    # A folder with a test set
    root = tmp_path / "split"
    make_folder(root / "train", [30, 20, 12])
    make_folder(root / "test", [5, 5, 5])
    images = load("folder", root, resolution=8, pack_dir=packed)
    assert images.counts.tolist() == [30, 20, 12]
    images, words = load_reference("folder", root, None, 8, packed)
    assert images.counts.tolist() == [5, 5, 5] and words == "full test set"
    # Digits
    images, words = load_reference("digits", data_dir)
    assert len(images.labels) == 1497 and words == "full training set"


def test_what_a_reader_of_ones_own_gives_now_is_what_is_packed(tmp_path, monkeypatch):
    """Also where a file or a helper of it has changed, and its own code has not."""
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    labels = np.array([0, 0, 1, 1])
    names = ["a", "b"]
    monkeypatch.setitem(data.READERS, "mine", data.Source(
        lambda *_: (pixels.copy(), labels.copy(), list(names)), resolution=8, flip=False))

    def read():
        images = load("mine", tmp_path, pack_dir=tmp_path / "packed")
        return images.images[0, 0, 0, 0], images.labels.tolist(), images.class_names
    assert read() == (0, [0, 0, 1, 1], ["a", "b"])
    packed = next((tmp_path / "packed").glob("*.npy"))
    before = packed.stat().st_mtime_ns
    assert read()[0] == 0 and packed.stat().st_mtime_ns == before      # packed once
    pixels += 7
    assert read()[0] == 7
    labels[1] = 1
    assert read()[1] == [0, 1, 1, 1]
    names[1] = "c"
    assert read()[2] == ["a", "c"]


def test_a_class_without_images_is_refused(monkeypatch):
    """Of a reader of one's own: Eq. (3) divides by the size of each class."""
    def read(data_dir, split):
        return np.zeros((6, 8, 8, 3), np.uint8), np.array([0, 0, 0, 0, 1, 1]), ["a", "b", "none"]
    monkeypatch.setitem(data.READERS, "mine", data.Source(read, resolution=8, flip=False))
    for ir in (1, 2):
        args = Namespace(dataset="mine", data_dir="data", resolution=None, class_order=None,
                         pack_dir=None, ir=ir, tail_seed=0)
        with pytest.raises(UserError, match="--dataset mine: class none has no training images"):
            data.load_long_tailed(args)


def test_a_set_without_a_long_tail_is_said(capsys):
    for labels, said in (([0, 0, 1, 1], True), ([0, 0, 0, 1], False)):
        pixels = np.zeros((4, 8, 8, 3), np.uint8)
        images = data.ImageSet("birds", pixels, np.array(labels), ["a", "b"])
        train.announce_data(images, {}, Namespace(print=print))
        assert ("equally large" in capsys.readouterr().out) == said


def test_training_on_a_folder(tmp_path, capsys):
    root = make_folder(tmp_path / "birds", [30, 20, 12])
    data = ["--dataset", "folder", "--data-dir", root]
    flags = [*data, "--pack-dir", tmp_path / "packed", "--resolution", 8, "--ch", 16,
             "--ch-mult", 1, 2, "--num-res-blocks", 1, "--batch-size", 8, "--device", "cpu",
             "--dtype", "float32", "--sample-every", 2, "--out", tmp_path / "run"]
    call(train.main, *flags, "--steps", 2)
    text = capsys.readouterr().out
    assert "class sizes 30 20 12" in text and "Few 12" in text
    assert Image.open(tmp_path / "run/grid-0000002.png").height == 3 * 60
    gradient(9, 9).save(root / "class0/new.png")
    with pytest.raises(UserError, match="--data-dir .*not the images"):
        call(train.main, *flags, "--steps", 3)
    args = train.make_parser().parse_args([str(f) for f in data])
    assert train.resolve(args).out.endswith("-oc-cm-seed0-tiny")


class PinnedTensor:
    """Stands for a tensor in the CPU's memory, and keeps what is called."""

    device = torch.device("cpu")

    def __init__(self):
        self.calls = []

    def pin_memory(self):
        self.calls.append("pinned")
        return self

    def to(self, device, non_blocking):
        self.calls.append((torch.device(device).type, non_blocking))
        return self


def test_copies_to_a_gpu_start_from_pinned_memory(monkeypatch):
    assert data.send(PinnedTensor(), "cuda").calls == ["pinned", ("cuda", True)]
    assert data.send(PinnedTensor(), "cpu").calls == [("cpu", True)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 << 30, 80 << 30))
    assert data.device_limit("cuda") == 15 << 30
    assert data.device_limit("cpu") == 4 << 30
