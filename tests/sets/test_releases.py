"""The paper's other data sets: each is read from a miniature in exactly its official layout.

The miniatures have the irregularities of the official releases too.
"""
import json
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import scipy.io
import torch
from conftest import ROOT, call
from PIL import Image

import data
import loop
import runtime
import train
from data import (add_data_flags, by_size, class_groups, load, load_long_tailed, load_reference,
                  training_images)
from runtime import UserError
from sets import packing, readers
from sets.packing import read_image


def picture(path, seed, mode="RGB", size=(14, 12)):
    """Write a random image file; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, quality=95)
    return path


# --------------------------------------------------------------------------------------------------
# Miniatures: each builder returns the path of one image, of a class that it is known to have

def celebahq(root, n=12):
    top = root / "CelebAMask-HQ"
    for i in range(n):
        picture(top / "CelebA-HQ-img" / f"{i}.jpg", i)
    names = "5_o_Clock_Shadow Male Young"
    rows = [f"{i}.jpg  -1 {1 if i % 3 == 0 else -1:2d}  1" for i in range(n)]
    text = "\n".join([str(n), names + " ", *rows, ""])
    (top / "CelebAMask-HQ-attribute-anno.txt").write_text(text)
    return top / "CelebA-HQ-img" / "4.jpg"


def imagenet_lt(root):
    wnids = ["n01440764", "n01443537", "n01484850"]
    lines = []
    for c, wnid in enumerate(wnids):
        for i in range(6 - 2 * c):
            name = f"train/{wnid}/{wnid}_{i}.JPEG"
            picture(root / name, 10 * c + i, mode=["RGB", "L", "CMYK"][i % 3])
            lines.append(f"{name} {c}")
        for i in range(2):
            name = f"ILSVRC2012_val_{10 * c + i:08d}.JPEG"
            picture(root / "val" / wnid / name, 50 + i)
    picture(root / "train" / wnids[0] / "not_in_the_list.JPEG", 99)
    (root / "ImageNet_LT_train.txt").write_text("\n".join(lines[::-1]) + "\n")
    return root / "train/n01443537/n01443537_0.JPEG"


def inat2018_record(root, split, c, i):
    """Write image i of class c; return its entry under "images"."""
    name = f"train_val2018/Plantae/{c}/größe_{split}_{i}.jpg"
    picture(root / name, 7 * c + i)
    number = 10 * c + i + (1000 if split == "val" else 0)
    return {"id": number, "file_name": name, "license": 3, "rights_holder": "who",
            "width": 800, "height": 600}


def inat2018(root):
    categories = [{"id": c, "name": f"Género {c}", "supercategory": "Plantae"} for c in range(4)]
    for split, per_class in (("train", [5, 3, 2, 1]), ("val", [2, 2, 2, 2])):
        images, annotations = [], []
        for c, n in enumerate(per_class):
            for i in range(n):
                images.append(inat2018_record(root, split, c, i))
                annotations.append({"id": len(annotations), "image_id": images[-1]["id"],
                                    "category_id": c})
        content = {
            "info": {"year": 2018},
            "images": images[::-1],
            "licenses": [{"id": 3, "url": "u", "name": "n"}],
            "annotations": annotations,
            "categories": categories[::-1],
        }
        text = json.dumps(content, ensure_ascii=False)
        (root / f"{split}2018.json").write_text(text, encoding="utf-8")
    return root / "train_val2018/Plantae/1/größe_train_1.jpg"


def artbench10(root):
    for c, style in enumerate(["art_nouveau", "baroque", "ukiyo_e"]):
        for i in range(4):
            picture(root / style / f"some-artist_título-{i}.jpg", 10 * c + i)
    return root / "baroque/some-artist_título-1.jpg"


def cub200(root):
    top = root / "CUB_200_2011"
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    rows = [(c, i) for c in range(3) for i in range(5)]
    files = [f"{names[c]}/{names[c][4:]}_{i:04d}_{c}.jpg" for c, i in rows]
    for k, f in enumerate(files):
        picture(top / "images" / f, k, mode="L" if k == 3 else "RGB")

    def write(name, values):
        (top / name).write_text("".join(f"{k + 1} {v}\n" for k, v in enumerate(values)))

    write("images.txt", files)
    write("classes.txt", names)
    write("image_class_labels.txt", [c + 1 for c, _ in rows])
    write("train_test_split.txt", [int(i < 3) for _, i in rows])
    return top / "images" / files[5]


def flowers102(root):
    for k in range(1, 13):
        picture(root / "jpg" / f"image_{k:05d}.jpg", k)
    labels = np.array([[1 + (k % 3) for k in range(12)]], np.uint8)
    splits = {
        "trnid": np.arange(1, 4)[None],
        "valid": np.array([[4, 5, 6]]),
        "tstid": np.arange(7, 13)[None],
    }
    scipy.io.savemat(root / "imagelabels.mat", {"labels": labels})
    scipy.io.savemat(root / "setid.mat", splits)
    return root / "jpg/image_00002.jpg"


# --------------------------------------------------------------------------------------------------
# Reading and packing them

WNIDS = ["n01440764", "n01443537", "n01484850"]
STYLES = ["art_nouveau", "baroque", "ukiyo_e"]
BIRDS = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
CASES = {       # name: (builder, counts of train, the reference's counts, its words, class names)
    "celebahq": (celebahq, [8, 4], [4, 4], "training set, 4 images of each class",
                 ["Female", "Male"]),
    "imagenet-lt": (imagenet_lt, [6, 4, 2], [2, 2, 2], "full test set", WNIDS),
    "inat2018": (inat2018, [5, 3, 2, 1], [2, 2, 2, 2], "full test set",
                 [f"Género {i}" for i in range(4)]),
    "artbench10": (artbench10, [4, 4, 4], [4, 4, 4], "full training set", STYLES),
    "cub200": (cub200, [3, 3, 3], [3, 3, 3], "full training set", BIRDS),
    "flowers102": (flowers102, [3, 3, 3], [3, 3, 3], "full training set", ["1", "2", "3"]),
}


@pytest.mark.parametrize("name", CASES)
def test_release(name, tmp_path):
    build, counts, reference_counts, words, names = CASES[name]
    one = build(tmp_path)
    images = load(name, tmp_path, resolution=8)
    assert images.counts.tolist() == counts
    assert images.class_names == names
    assert images.images.shape[1:] == (8, 8, 3)
    expected = read_image(one, 8)
    rows = [r for r, image in enumerate(images.images) if np.array_equal(image, expected)]
    assert len(rows) == 1
    assert images.labels[rows[0]] == (0 if name == "celebahq" else 1)
    reference, description = load_reference(name, tmp_path, resolution=8)
    assert reference.counts.tolist() == reference_counts
    assert description == words


def test_either_split_is_a_balanced_reference(tmp_path):
    """ImageNet-LT's training set is long-tailed: equally many of each class."""
    imagenet_lt(tmp_path)
    train_images, words = load_reference("imagenet-lt", tmp_path, "train", resolution=8)
    assert train_images.counts.tolist() == [2, 2, 2]
    assert words == "training set, 2 images of each class"
    test_images, words = load_reference("imagenet-lt", tmp_path, "test", resolution=8)
    assert test_images.counts.tolist() == [2, 2, 2] and words == "test set"
    with pytest.raises(UserError, match="--reference-split test: CelebA-HQ"):
        celebahq(tmp_path)
        load_reference("celebahq", tmp_path, "test", resolution=8)


@pytest.mark.parametrize("name", CASES)
def test_an_image_is_changed_after_packing(name, tmp_path):
    """Another image of the same name, and perhaps size, is packed anew."""
    one = CASES[name][0](tmp_path)
    before = load(name, tmp_path, resolution=8)
    picture(one, 1000)
    after = load(name, tmp_path, resolution=8)
    changed = (after.images != before.images).any((1, 2, 3))
    assert changed.sum() == 1 and after.sha256 != before.sha256


@pytest.mark.parametrize("name", CASES)
def test_an_image_is_removed_after_packing(name, tmp_path, capsys):
    """The pack is used, with a line; ArtBench-10 has no list: other files are another pack."""
    one = CASES[name][0](tmp_path)
    before = load(name, tmp_path, resolution=8)
    one.unlink()
    after = load(name, tmp_path, resolution=8)
    if name == "artbench10":
        assert after.counts.tolist() == [4, 3, 4]
    else:
        assert np.array_equal(after.images, before.images)
        assert "packed images, which cannot be compared" in capsys.readouterr().out
        message = "--data-dir.* 1 of .* are missing, the first is .*" + one.name.replace("(", "")
        with pytest.raises(UserError, match=message):
            load(name, tmp_path, resolution=16)


def test_a_label_is_changed_after_packing(tmp_path):
    cub200(tmp_path)
    before = load("cub200", tmp_path, resolution=8)
    path = next(tmp_path.rglob("image_class_labels.txt"))
    numbers = [line.split() for line in path.read_text().splitlines()]
    path.write_text("\n".join(f"{i} {int(c) % 3 + 1}" for i, c in numbers))
    after = load("cub200", tmp_path, resolution=8)
    assert (after.labels == (before.labels + 1) % 3).all()


def test_artbench10_in_its_two_releases(tmp_path):
    """With other folders beside them; the release with train/ and test/ has a test set."""
    artbench10(tmp_path / "artbench-10-imagefolder")
    picture(tmp_path / "elsewhere/other.jpg", 1)
    assert load("artbench10", tmp_path, resolution=8).counts.tolist() == [4, 4, 4]
    divided = tmp_path / "artbench-10-imagefolder-split"
    for split in ("train", "test"):
        artbench10(divided / split)
    (divided / "test/baroque/some-artist_título-1.jpg").unlink()
    assert load("artbench10", tmp_path, resolution=8).class_names == STYLES
    assert load("artbench10", tmp_path, "test", resolution=8).counts.tolist() == [4, 3, 4]


def test_artbench10_order_agrees_with_the_paper(tmp_path):
    """Fig. 3 and Sec. G.4: Realism is in Few; Fig. G.5: Post-Impressionism in the tail; Fig. G.7:
    Surrealism in Medium. The folders come in alphabetical order.
    """
    styles = sorted(readers.READERS["artbench10"].order)
    assert len(set(styles)) == 10
    for k, style in enumerate(styles):
        for i in range(4):
            picture(tmp_path / style / f"{i}.jpg", 10 * k + i)
    parser = runtime.Parser("flags")
    add_data_flags(parser)
    args = parser.parse_args(["--dataset", "artbench10", "--data-dir", str(tmp_path),
                              "--resolution", "8", "--ir", "4"])
    images = load_long_tailed(args)
    groups = {name: {images.class_names[c] for c in classes}
              for name, classes in class_groups(images.counts).items()}
    assert {"realism", "post_impressionism"} <= groups["Few"]
    assert "surrealism" in groups["Medium"] and len(groups["Few"]) == 4
    assert (np.diff(images.counts) <= 0).all() and images.counts[0] == 4 * images.counts[-1]
    assert by_size(images.record()) == images.class_names
    # Labels went with their names
    first = read_image(tmp_path / images.class_names[0] / "0.jpg", 8)
    assert any(np.array_equal(image, first) for image in images.images[images.labels == 0])
    # A run of before goes on in its own order, and is probed in it
    old = {"data": {**images.record(), "class_names": styles}, "config": vars(args)}
    assert load_long_tailed(args, old).class_names == styles
    old["data"]["sha256"] = None
    assert training_images(old).class_names == styles
    given = ",".join(styles[::-1])
    assert load_long_tailed(Namespace(**{**vars(args), "class_order": given}), old
                            ).class_names == styles[::-1]


def test_class_order(tmp_path):
    artbench10(tmp_path)
    order = "ukiyo_e,art_nouveau,baroque"
    images = load("artbench10", tmp_path, resolution=8, class_order=order)
    assert images.class_names == ["ukiyo_e", "art_nouveau", "baroque"]
    first = read_image(tmp_path / "ukiyo_e/some-artist_título-0.jpg", 8)
    assert np.array_equal(images.images[images.labels == 0][0], first)


def test_what_is_not_there(tmp_path):
    first_file = {
        "celebahq": "CelebAMask-HQ-attribute-anno.txt",
        "imagenet-lt": "ImageNet_LT_train.txt",
        "inat2018": "train2018.json",
        "cub200": "image_class_labels.txt",
        "flowers102": "imagelabels.mat",
    }
    for name, word in first_file.items():
        with pytest.raises(UserError, match=f"--data-dir .*{word} is not there"):
            load(name, tmp_path, resolution=8)
    imagenet_lt(tmp_path)
    (tmp_path / "val/n01443537").rename(tmp_path / "val/elsewhere")
    with pytest.raises(UserError, match="no folder n01443537; sort"):
        load("imagenet-lt", tmp_path, "test", 8)


def test_a_class_that_the_reference_lacks(tmp_path):
    for path in ("train/a/0.png", "train/b/0.png", "test/a/0.png"):
        picture(tmp_path / path, 0)
    with pytest.raises(UserError, match="--data-dir.* class b has no image in the test set"):
        load_reference("folder", tmp_path, resolution=8, pack_dir=tmp_path / "packed")


def test_data_py_prints_the_summary(tmp_path, capsys):
    imagenet_lt(tmp_path)
    call(data.main, "--dataset", "imagenet-lt", "--data-dir", tmp_path, "--resolution", 8)
    text = capsys.readouterr().out
    assert "imagenet-lt: 12 images, 3 classes, IR 3, class sizes 6 4 2" in text
    assert "Few: 1 classes, 2 images" in text


# --------------------------------------------------------------------------------------------------
# Large sets

PACK_BLANK_IMAGES = """
import resource, sys, numpy as np
from pathlib import Path
from sets import packing
n, image = int(sys.argv[2]), np.zeros((64, 64, 3), np.uint8)
packing.read_image = lambda path, resolution: image
path = Path(sys.argv[1]) / f"{n}.npy"
packing.pack_files(path, ["x"] * n, [n, 64, 64, 3], {}, block=512)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_packing_needs_the_memory_of_a_block(tmp_path):
    """Eight times the images, the same peak: the pack is mapped block by block."""
    def peak(n):
        command = [sys.executable, "-c", PACK_BLANK_IMAGES, tmp_path, str(n)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout)

    few, many = peak(1024), peak(8192)
    assert many - few < 30_000, (few, many)         # KiB; the larger pack has 98,304


def test_packing_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Stopped in the third block, it reads only what was missing; the result is that of one run."""
    artbench10(tmp_path)
    files, labels, names = readers.read_folder(tmp_path, "train")
    whole = [read_image(f, 8) for f in files]
    pack = tmp_path / "p/x.npy"
    read = []

    def stopped(path, resolution):
        if len(read) == 9:
            raise KeyboardInterrupt
        read.append(path)
        return read_image(path, resolution)

    def resumed(path, resolution):
        read.append(path)
        return read_image(path, resolution)

    monkeypatch.setattr(packing.os, "cpu_count", lambda: 1)     # one thread: files in their order
    with monkeypatch.context() as m:
        m.setattr(packing, "read_image", stopped)
        with pytest.raises(KeyboardInterrupt):
            packing.pack_files(pack, files, [12, 8, 8, 3], {"dataset": "x"}, block=4)
    assert not pack.exists()
    read.clear()
    monkeypatch.setattr(packing, "read_image", resumed)
    packing.pack_files(pack, files, [12, 8, 8, 3], {"dataset": "x"}, block=4)
    assert read == files[8:]
    assert np.array_equal(np.load(pack), whole)
    assert [p.name for p in pack.parent.iterdir()] == ["x.npy"]


def test_thousands_of_classes_take_no_loop_per_step_and_one_line():
    """8,142 classes, as iNaturalist has: means, log line and summary stay vectorised and short."""
    N_c = 1000 * 500.0 ** (-np.arange(8142) / 8141)
    counts = np.maximum(1, N_c.astype(int))
    names = [f"species {c}" for c in range(8142)]
    start = time.time()
    meter = loop.Meter(counts, names, torch.device("cpu"))
    assert time.time() - start < 2
    assert len(meter.groups) == 3
    y = torch.randint(8142, (64,))
    start = time.time()
    for _ in range(100):
        meter.add_D(torch.rand(64), y)
    assert time.time() - start < 0.5
    meter.add({"base": torch.tensor(1.0), "grad_norm": torch.tensor(1.0)})
    meter.steps = 1
    args = train.resolve(train.make_parser().parse_args([]))
    means = meter.means(runtime.Runtime(torch.device("cpu"), torch.float32))
    line = loop.format_line(5, args, means, meter.groups, 1e-3, 10, 5)
    assert "\n" not in line
    assert len(line) < 200
    labels = np.repeat(np.arange(8142), counts)
    summary = data.ImageSet("x", np.zeros((1, 8, 8, 3)), labels, names).summary()
    assert "\n" not in summary
    assert len(summary) < 200


# --------------------------------------------------------------------------------------------------
# Lists that are not as released

BROKEN = {      # set: the list that is broken
    "celebahq": "CelebAMask-HQ-attribute-anno.txt", "imagenet-lt": "ImageNet_LT_train.txt",
    "inat2018": "train2018.json", "cub200": "image_class_labels.txt", "flowers102": "setid.mat"}


@pytest.mark.parametrize("content", ["", "x\n", "1 2 3\n4\n", "{}", "[1]"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_list_is_one_line(name, content, tmp_path):
    CASES[name][0](tmp_path)
    (path,) = tmp_path.rglob(BROKEN[name])
    path.write_text(content)
    with pytest.raises(UserError, match=f"^--data-dir: .*{BROKEN[name]} is not as it is rel") as e:
        load(name, tmp_path, resolution=8)
    assert "\n" not in str(e.value)


def replace(word, other, count=1):
    """A change of a list: one occurrence of a word becomes another."""
    def change(path):
        text = path.read_text(encoding="utf-8")
        assert word in text
        path.write_text(text.replace(word, other, count), encoding="utf-8")
    return change


def cut_last_line(path):
    """A change of a list: its last line is missing, as after a download that was cut."""
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def matlab(**content):
    """A change of a .mat file: it holds this."""
    def change(path):
        scipy.io.savemat(path, content)
    return change


@pytest.mark.parametrize("name, file, change", [
    ("celebahq", "CelebAMask-HQ-attribute-anno.txt", cut_last_line),
    ("celebahq", "CelebAMask-HQ-attribute-anno.txt", replace("0.jpg  -1  1", "0.jpg  -1  0")),
    ("celebahq", "CelebAMask-HQ-attribute-anno.txt", replace("0.jpg  -1  1  1", "0.jpg")),
    ("imagenet-lt", "ImageNet_LT_train.txt", replace("JPEG 2", "JPEG 1")),
    ("imagenet-lt", "ImageNet_LT_train.txt", replace("JPEG 2", "JPEG 3", -1)),
    ("imagenet-lt", "ImageNet_LT_train.txt", replace("JPEG 2", "JPEG two")),
    ("inat2018", "train2018.json", replace('"category_id": 3', '"category_id": 7')),
    ("inat2018", "train2018.json", replace('"category_id": 3', '"category": 3')),
    ("inat2018", "train2018.json", replace('"file_name": "train', '"file_name": 7, "x": "train')),
    ("cub200", "image_class_labels.txt", cut_last_line),
    ("cub200", "image_class_labels.txt", replace(" 3\n", " 4\n")),
    ("cub200", "image_class_labels.txt", replace(" 3\n", " 0\n")),
    ("cub200", "train_test_split.txt", replace(" 1\n", " 2\n")),
    ("cub200", "train_test_split.txt", cut_last_line),
    ("cub200", "classes.txt", replace("2 002", "7 002")),
    ("flowers102", "imagelabels.mat", matlab(labels=np.array([[0, 1, 2]]))),
    ("flowers102", "imagelabels.mat", matlab(labels=np.array([[0.5, 1, 2]]))),
    ("flowers102", "imagelabels.mat", matlab(other=np.array([[1]]))),
    ("flowers102", "setid.mat", matlab(valid=np.array([[4, 5, 60]]))),
    ("flowers102", "setid.mat", matlab(valid=np.zeros((1, 0)))),
])
def test_a_list_that_contradicts_itself(name, file, change, tmp_path):
    """Cut short, with a number that there is not, or of another kind: never other labels."""
    CASES[name][0](tmp_path)
    (path,) = tmp_path.rglob(file)
    change(path)
    with pytest.raises(UserError, match=f"^--data-dir: .*{file} is not as it is released"):
        load(name, tmp_path, resolution=8)


def test_a_listed_image_outside_the_folder(tmp_path):
    inat2018(tmp_path / "inat")
    picture(tmp_path / "secret.jpg", 1)
    (path,) = tmp_path.rglob("train2018.json")
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "../../secret.jpg"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="--data-dir.*lies outside"):
        load("inat2018", tmp_path / "inat", resolution=8)


def test_a_cifar_archive_that_is_not_the_published_one(tmp_path, monkeypatch):
    """MD5 can be forged: where the archive is there, its SHA-256 counts."""
    import torchvision

    class Forged:
        filename, url = "cifar-10-python.tar.gz", "https://"
        data, targets, classes = np.zeros((2, 32, 32, 3), np.uint8), [0, 1], ["a", "b"]

        def __init__(self, *_, **__):
            (tmp_path / self.filename).write_bytes(b"forged")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Forged)
    with pytest.raises(UserError, match="--data-dir.*not the published archive"):
        load("cifar10", tmp_path)
