"""The paper's other data sets: each is read from a miniature in exactly its official layout.

The miniatures have the irregularities of the official releases too.
"""
import json
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import cub200, flowers102, make_folder, picture

import runtime
from data import (add_data_flags, by_size, class_groups, load, load_long_tailed, load_reference)
from runtime import UserError
from sets import readers
from sets.packing import read_image


WNIDS = ["n01440764", "n01443537", "n01484850"]
STYLES = ["art_nouveau", "baroque", "ukiyo_e"]


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
    lines = []
    for c, wnid in enumerate(WNIDS):
        for i in range(6 - 2 * c):
            name = f"train/{wnid}/{wnid}_{i}.JPEG"
            picture(root / name, 10 * c + i, mode=["RGB", "L", "CMYK"][i % 3])
            lines.append(f"{name} {c}")
        for i in range(2):
            name = f"ILSVRC2012_val_{10 * c + i:08d}.JPEG"
            picture(root / "val" / wnid / name, 50 + i)
    picture(root / "train" / WNIDS[0] / "not_in_the_list.JPEG", 99)
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
            "info": {"year": 2018}, "images": images[::-1],
            "licenses": [{"id": 3, "url": "u", "name": "n"}],
            "annotations": annotations, "categories": categories[::-1]}
        text = json.dumps(content, ensure_ascii=False)
        (root / f"{split}2018.json").write_text(text, encoding="utf-8")
    return root / "train_val2018/Plantae/1/größe_train_1.jpg"


def artbench10(root):
    for c, style in enumerate(STYLES):
        for i in range(4):
            picture(root / style / f"some-artist_título-{i}.jpg", 10 * c + i)
    return root / "baroque/some-artist_título-1.jpg"


BIRDS = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
CASES = {       # name: (builder, counts of train, the reference's counts, its words, class names)
    "celebahq": (celebahq, [8, 4], [8, 4], "full training set", ["Female", "Male"]),
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
    assert images.counts.tolist() == counts and images.class_names == names
    assert images.images.shape[1:] == (8, 8, 3)
    expected = read_image(one, 8)
    rows = [r for r, image in enumerate(images.images) if np.array_equal(image, expected)]
    assert len(rows) == 1
    assert images.labels[rows[0]] == (0 if name == "celebahq" else 1)
    reference, description = load_reference(name, tmp_path, resolution=8)
    assert reference.counts.tolist() == reference_counts
    assert description == words


def test_either_split_is_a_reference(tmp_path):
    """ImageNet-LT's training set is long-tailed: its images are all of the reference."""
    imagenet_lt(tmp_path)
    train_images, words = load_reference("imagenet-lt", tmp_path, "train", resolution=8)
    assert train_images.counts.tolist() == [6, 4, 2] and words == "full training set"
    test_images, words = load_reference("imagenet-lt", tmp_path, "test", resolution=8)
    assert test_images.counts.tolist() == [2, 2, 2] and words == "full test set"
    with pytest.raises(UserError, match="--reference-split"):
        celebahq(tmp_path)
        load_reference("celebahq", tmp_path, "test", resolution=8)


@pytest.mark.parametrize("name", CASES)
def test_an_image_is_changed_or_removed_after_packing(name, tmp_path):
    """Another image of the same name, and perhaps size, is packed anew. Without it the pack is
    used, with a line; ArtBench-10 has no list: other files are another pack.
    """
    one = CASES[name][0](tmp_path)
    packed = load(name, tmp_path, resolution=8)
    picture(one, 1000)
    before = load(name, tmp_path, resolution=8)
    changed = (before.images != packed.images).any((1, 2, 3))
    assert changed.sum() == 1 and before.sha256 != packed.sha256
    one.unlink()
    after = load(name, tmp_path, resolution=8)
    if name == "artbench10":
        assert after.counts.tolist() == [4, 3, 4]
    else:
        assert np.array_equal(after.images, before.images)
        with pytest.raises(UserError, match="--data-dir"):
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
    """Figs. 3 and G.4: Realism is in Few; Fig. G.5: Post-Impressionism in the tail; Fig. G.7:
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
    given = ",".join(styles[::-1])
    images = load_long_tailed(Namespace(**{**vars(args), "class_order": given}))
    assert images.class_names == styles[::-1]


def test_what_is_not_there(tmp_path):
    for name in LISTS:
        with pytest.raises(UserError, match="--data-dir"):
            load(name, tmp_path, resolution=8)
    imagenet_lt(tmp_path)
    (tmp_path / "val/n01443537").rename(tmp_path / "val/elsewhere")
    with pytest.raises(UserError, match="--data-dir"):
        load("imagenet-lt", tmp_path, "test", 8)


def test_folder(tmp_path):
    """Images may lie deeper; hidden folders, other files and empty folders are no images."""
    root = make_folder(tmp_path / "set", {"a": 3, "b": 2, ".ipynb_checkpoints": 1,
                                          "a/.ipynb_checkpoints": 1, "b/deeper": 1})
    picture(tmp_path / "elsewhere/x.JPG", 9)
    (root / "a/linked").symlink_to(tmp_path / "elsewhere")
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("not an image")
    paths, labels, names = readers.read_folder(root, "train")
    assert names == ["a", "b"] and labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert [Path(p).name for p in paths[:4]] == ["000.png", "001.png", "002.png", "x.JPG"]
    again, same_labels, same_names = readers.image_folder(root)
    assert (again, same_labels.tolist(), same_names) == (paths, labels.tolist(), names)
    flat, labels, names = readers.image_folder(root / "b/deeper")
    assert [Path(p).name for p in flat] == ["000.png"] and labels is None and names is None


def test_names_of_classes(tmp_path):
    """Numbers come in their order; a class may be called train."""
    root = make_folder(tmp_path / "numbers", {str(c): 1 for c in range(1, 13)})
    assert readers.read_folder(root, "train")[2] == [str(c) for c in range(1, 13)]
    root = make_folder(tmp_path / "words", {"bus": 2, "train": 2})
    assert readers.read_folder(root, "train")[2] == ["bus", "train"]
    # "a" and two dots, as a Mac may write it, is an "ä"; the paths are those on the disk
    root = make_folder(tmp_path / "dots", {"train/Na\u0308vus": 1, "train/b": 1, "test/Nävus": 1})
    for split in ("train", "test"):
        paths, _, names = readers.read_folder(root, split)
        assert names == ["Nävus", "b"] and all(map(os.path.exists, paths))


@pytest.mark.parametrize("folders, files", [
    ({}, []),                                               # no sub-folder with images
    ({"a": 3}, []),                                         # one class alone
    ({"a": 3, "b": 2}, ["x.png"]),                          # images beside the classes
    ({"a": 3, "b": 2}, ["a/telephone.HEIC"]),               # of a kind that is not read
    ({f"{split}/{c}": 2 for split in ("train", "valid") for c in "ab"}, []),    # splits, no classes
    ({"train/a": 2, "train/b": 2, "test/a": 2, "test/c": 2}, [])])      # a class of test alone
def test_a_folder_whose_classes_are_not_clear(tmp_path, folders, files):
    root = make_folder(tmp_path, folders)
    for name in files:
        (root / name).write_bytes(b"")
    split = "test" if "test/a" in folders else "train"
    with pytest.raises(UserError, match="--data-dir"):
        readers.read_folder(root, split)


LISTS = {       # of each set that has one
    "celebahq": "CelebAMask-HQ-attribute-anno.txt", "imagenet-lt": "ImageNet_LT_train.txt",
    "inat2018": "train2018.json", "cub200": "image_class_labels.txt", "flowers102": "setid.mat"}


def content(text):
    """A change of a list: it holds this text."""
    return lambda path: path.write_text(text)


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
    return lambda path: scipy.io.savemat(path, content)


@pytest.mark.parametrize("name, file, change", [
    *((name, file, content(text)) for name, file in LISTS.items() for text in ("", "1 2 3\n4\n")),
    ("celebahq", LISTS["celebahq"], cut_last_line),
    ("celebahq", LISTS["celebahq"], replace("0.jpg  -1  1", "0.jpg  -1  0")),
    ("imagenet-lt", LISTS["imagenet-lt"], replace("JPEG 2", "JPEG 1")),
    ("imagenet-lt", LISTS["imagenet-lt"], replace("JPEG 2", "JPEG 3", -1)),
    ("inat2018", LISTS["inat2018"], replace('"category_id": 3', '"category_id": 7')),
    ("cub200", LISTS["cub200"], cut_last_line),
    ("cub200", LISTS["cub200"], replace(" 3\n", " 4\n")),
    ("cub200", "train_test_split.txt", replace(" 1\n", " 2\n")),
    ("cub200", "classes.txt", replace("2 002", "7 002")),
    ("flowers102", "imagelabels.mat", matlab(labels=np.array([[0, 1, 2]]))),
    ("flowers102", "setid.mat", matlab(valid=np.array([[4, 5, 60]]))),
])
def test_a_broken_list_is_named(name, file, change, tmp_path):
    """Empty, cut short, with a number that there is not, of another kind: never other labels."""
    CASES[name][0](tmp_path)
    (path,) = tmp_path.rglob(file)
    change(path)
    with pytest.raises(UserError, match=f"--data-dir.*{file}"):
        load(name, tmp_path, resolution=8)


def test_a_cifar_archive_that_is_not_the_published_one(tmp_path, monkeypatch):
    """MD5 can be forged: where the archive is there, its SHA-256 counts."""
    import torchvision

    class Forged:
        filename, url = "cifar-10-python.tar.gz", "https://"
        data, targets, classes = np.zeros((2, 32, 32, 3), np.uint8), [0, 1], ["a", "b"]

        def __init__(self, *_, **__):
            (tmp_path / self.filename).write_bytes(b"forged")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Forged)
    with pytest.raises(UserError, match="--data-dir"):
        load("cifar10", tmp_path)
