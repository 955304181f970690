"""data.py: Cao et al.'s draw, packs, splits, batches that are a pure function of (seed, step)."""
import hashlib
import pickle

import numpy as np
import pytest
import torch
import torchvision
from conftest import call
from PIL import Image
from torchvision import transforms

import runtime
import train
from data import (Batches, load, load_reference, long_tail, long_tail_counts, read_image, resolve_classes, splits, to_float,
                  to_uint8)
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


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """A folder with a miniature CIFAR-100, official names and pickles; its hashes stand in for the official ones."""
    folder, kind = tmp_path / "cifar-100-python", torchvision.datasets.CIFAR100
    folder.mkdir()
    rng = np.random.RandomState(0)
    files = {"train": 10_000, "test": 100}
    for name, n in files.items():
        data = {"data": rng.randint(0, 256, (n, 3072)).astype(np.uint8), "fine_labels": (np.arange(n) % 100).tolist()}
        (folder / name).write_bytes(pickle.dumps(data))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class{c}" for c in range(100)]}))
    md5 = {n: hashlib.md5((folder / n).read_bytes()).hexdigest() for n in ("train", "test", "meta")}
    monkeypatch.setattr(kind, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(kind, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5["meta"]})
    return tmp_path


def test_cifar_in_its_official_layout(small_cifar):
    images = load("cifar100", small_cifar)
    raw = pickle.loads((small_cifar / "cifar-100-python/train").read_bytes())["data"]
    assert images.images.shape == (10_000, 32, 32, 3) and images.flip and images.class_names[3] == "class3"
    assert images.images[7, 1, 2].tolist() == raw[7].reshape(3, 32, 32)[:, 1, 2].tolist()


def test_the_papers_command_on_cifar100(small_cifar, capsys):
    """`train.py --dataset cifar100 --ir 100` in everything but its network's width, the batch and the number of steps."""
    call(train.main, "--dataset", "cifar100", "--ir", 100, "--data-dir", small_cifar, "--ch", 32, "--batch-size", 4, "--steps", 1,
         "--sample-every", 0, "--device", "cpu", "--dtype", "float32", "--out", small_cifar / "run")
    text = capsys.readouterr().out
    assert "2,131 images, 100 classes, IR 100" in text and "dropout=0.1" in text and "reserved (A, B)" in text
    config = runtime.read_json(small_cifar / "run/config.json")
    assert config["config"]["base"] == "oc" and config["config"]["cm"] and config["network"]["ch_mult"] == [1, 2, 2, 2]


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


# ----------------------------------------------------------------------------------------------------------------------
# Anyone's images

def gradient(w, h):
    """A colour image whose red grows to the right, green downwards."""
    x = np.zeros((h, w, 3), np.uint8)
    x[..., 0], x[..., 1], x[..., 2] = np.linspace(0, 255, w)[None], np.linspace(0, 255, h)[:, None], 90
    return Image.fromarray(x)


def save_as(folder, kind, image):
    """Write an image in one of the ways in which people's files come; returns its path."""
    path = folder / f"{kind}.{'jpg' if kind in ('jpeg', 'cmyk', 'exif') else 'gif' if kind == 'gif' else 'png'}"
    if kind == "jpeg":
        image.save(path, quality=95)
    elif kind == "cmyk":
        image.convert("CMYK").save(path, quality=95)
    elif kind == "exif":                                # stored on its side, as a telephone does
        exif = Image.Exif()
        exif[0x0112] = 6                                # to be turned by 90 degrees clockwise
        image.transpose(Image.ROTATE_90).save(path, quality=95, exif=exif)
    elif kind in ("palette", "gif"):
        image.quantize(256).save(path)
    elif kind == "rgba":
        rgba = image.convert("RGBA")
        rgba.putalpha(Image.fromarray(np.where(np.arange(image.height)[:, None] < image.height // 2, 255, 0).astype(np.uint8)
                                      * np.ones((1, image.width), np.uint8)))
        rgba.save(path)
    elif kind == "grey":
        image.convert("L").save(path)
    elif kind == "grey16":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
    else:
        image.save(path)
    return path


@pytest.mark.parametrize("kind", ["png", "jpeg", "cmyk", "exif", "palette", "gif", "rgba", "grey", "grey16"])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (40, 200), (7, 5)])
def test_every_kind_and_size_of_image(tmp_path, kind, size):
    image, R = gradient(*size), 16
    got = read_image(save_as(tmp_path, kind, image), R).astype(float)
    assert got.shape == (R, R, 3)
    if kind.startswith("grey"):
        image = image.convert("L").convert("RGB")
    scale = R / min(size)                               # an independent resize: torchvision's, with antialiasing
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    expected = transforms.functional.center_crop(transforms.functional.resize(whole, R, antialias=True), [R, R])
    expected = expected.permute(1, 2, 0).numpy().astype(float)
    if kind == "rgba":
        assert (got[-2:] == 255).all() and np.abs(got[:R // 2 - 3] - expected[:R // 2 - 3]).max() < 14 * max(1, scale)
        return
    tolerance = {"png": 8, "grey": 8, "grey16": 8}.get(kind, 16) * max(1, scale)    # lossy kinds; enlarged ones ring
    assert np.abs(got - expected).mean() < tolerance / 4 and np.abs(got - expected).max() < 3 * tolerance


def make_folder(root, sizes):
    """A folder with one sub-folder a class, of so many small images."""
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
    read = lambda: load("folder", root, resolution=8, pack_dir=tmp_path / "packed")
    images = read()
    assert images.class_names == ["class0", "class1", "class2"] and images.counts.tolist() == [30, 21, 12] and images.flip
    assert images.images.shape == (63, 8, 8, 3)
    assert np.array_equal(images.images[0], read_image(root / "class0/000.png", 8))
    packed = next((tmp_path / "packed").glob("*.npy"))
    before = packed.stat().st_mtime_ns
    assert np.array_equal(read().images, images.images) and packed.stat().st_mtime_ns == before     # packed once
    (root / "class2/000.png").unlink()                                                              # another name
    assert read().counts.tolist() == [30, 21, 11]
    gradient(200, 200).save(root / "class0/000.png")                                                # another size
    assert not np.array_equal(read().images[0], images.images[0])


def test_balanced_reference(tmp_path, data_dir):
    root = make_folder(tmp_path / "set", [30, 20, 12])
    images, words = load_reference("folder", root, None, 8, tmp_path / "packed")
    assert images.counts.tolist() == [12, 12, 12] and words == "training set, 12 images of each class"
    split = tmp_path / "split"
    make_folder(split / "train", [30, 20, 12]), make_folder(split / "test", [5, 5, 5])
    assert load("folder", split, resolution=8, pack_dir=tmp_path / "packed").counts.tolist() == [30, 20, 12]
    images, words = load_reference("folder", split, None, 8, tmp_path / "packed")
    assert images.counts.tolist() == [5, 5, 5] and words == "full test set"
    images, words = load_reference("digits", data_dir)
    assert len(images.labels) == 1497 and words == "full training set"


def test_training_on_a_folder(tmp_path, capsys):
    root = make_folder(tmp_path / "birds", [30, 20, 12])
    flags = ["--dataset", "folder", "--data-dir", root, "--pack-dir", tmp_path / "packed", "--resolution", 8, "--ch", 16, "--ch-mult", 1, 2,
             "--num-res-blocks", 1, "--batch-size", 8, "--device", "cpu", "--sample-every", 2, "--out", tmp_path / "run"]
    call(train.main, *flags, "--steps", 2)
    text = capsys.readouterr().out
    assert "class sizes 30 20 12" in text and "Few 12" in text
    assert Image.open(tmp_path / "run/grid-0000002.png").height == 3 * 60
    gradient(9, 9).save(root / "class0/new.png")
    with pytest.raises(UserError, match="--data-dir .*not the images"):
        call(train.main, *flags, "--steps", 3)
    assert train.resolve(train.make_parser().parse_args([str(f) for f in flags[:4]])).out.startswith("out/birds-ir1-oc-cm-seed0")
