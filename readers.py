"""How each data set lies on disk, as its authors release it: one function a set, and READERS, which names them.

    read(data_dir, split) -> images (N, H, W, C) uint8, or N paths of image files; labels (N,) int; class names

split is "train" or "test"; a set without the one asked for raises NoSuchSplit. data.py packs what these return.
"""
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime import UserError


def read_digits(data_dir, split):
    """scikit-learn's 1,797 real handwritten digits, 8 x 8, one channel. Test: 30 a class, evenly spread; train: the rest."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)      # 17 grey levels, 0 ... 16
    test = np.zeros(len(images), bool)
    for c in range(10):
        rows = np.flatnonzero(digits.target == c)
        test[rows[np.linspace(0, len(rows) - 1, 30).astype(int)]] = True
    rows = np.flatnonzero(test if split == "test" else ~test)
    return images[rows], digits.target[rows], [str(c) for c in range(10)]


def read_cifar(data_dir, split, classes):
    """CIFAR-10 or CIFAR-100 through torchvision, which checks the MD5 of what it downloads or finds in data_dir."""
    import torchvision
    kind = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[classes]
    try:
        source = kind(data_dir, train=split == "train", download=True)
    except (OSError, RuntimeError) as e:
        raise UserError(f"--data-dir {data_dir}: CIFAR-{classes} is not there and cannot be downloaded ({e}); put "
                        f"{kind.filename} from {kind.url} into {data_dir}")
    return source.data, np.array(source.targets), source.classes


class NoSuchSplit(UserError):
    """The data set has no such split."""


IMAGE_FILES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


def files_by_class(root):
    """{sub-folder: its image files, however deep}, both in alphabetical order; hidden ones and empty classes left out."""
    result = {}
    for folder in sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith(".")):
        files = [os.path.join(top, f) for top, _, files in sorted(os.walk(folder, followlinks=True)) for f in sorted(files)
                 if Path(f).suffix.lower() in IMAGE_FILES and not f.startswith(".")]
        if files:
            result[folder.name] = files
    return result


def read_folder(data_dir, split):
    """Anyone's images, one sub-folder a class (images may lie deeper), in alphabetical order.

    Where data_dir holds `train` and beside it `test` or `val`, those are the splits, with the classes of `train`;
    otherwise all of it is "train".
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: there is no such folder; it must hold one sub-folder of images a class")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    divided = (root / "train").is_dir() and held_out is not None
    if split != "train" and not divided:
        raise NoSuchSplit(f"--data-dir {root}: no test images; put the classes into train/ and others like them into test/")
    root = root / "train" if divided else root
    classes = files_by_class(root)
    names = list(classes)
    if len(names) < 2:
        found = f"only one class with images, {names[0]}" if names else "no sub-folder with images"
        raise UserError(f"--data-dir {root}: {found}; it must hold one sub-folder of images a class, at least two")
    if split != "train":
        classes = files_by_class(held_out)
        if unknown := [n for n in classes if n not in names]:
            raise UserError(f"--data-dir {held_out}: class {unknown[0]} is not one of those in {root}")
        if not classes:
            raise NoSuchSplit(f"--data-dir {held_out}: it holds no images")
    paths = [p for files in classes.values() for p in files]
    return paths, np.repeat([names.index(n) for n in classes], [len(f) for f in classes.values()]), names


def find(data_dir, name):
    """The file or folder `name` in data_dir, or in a folder of data_dir. Raises UserError."""
    for path in (Path(data_dir) / name, *sorted(Path(data_dir).glob(f"*/{name}"))):
        if path.exists():
            return path
    raise UserError(f"--data-dir {data_dir}: {name} is not there; put the data set, as it is released, into this folder")


def all_there(paths, data_dir):
    """The paths, once every file exists; raises UserError with the number of missing ones and the first."""
    missing = [p for p in paths if not os.path.exists(p)]
    if missing:
        raise UserError(f"--data-dir {data_dir}: {len(missing):,} of {len(paths):,} listed images are missing, the first is {missing[0]}")
    return paths


def read_celebahq(data_dir, split):
    """CelebA-HQ by its attribute Male: CelebA-HQ-img/ and CelebAMask-HQ-attribute-anno.txt. Female is class 0."""
    if split != "train":
        raise NoSuchSplit(f"--reference-split {split}: CelebA-HQ has no such split here; its reference is drawn from all of it")
    lines = find(data_dir, "CelebAMask-HQ-attribute-anno.txt").read_text().splitlines()
    column, folder = lines[1].split().index("Male") + 1, find(data_dir, "CelebA-HQ-img")
    rows = [line.split() for line in lines[2:] if line.strip()]
    paths = all_there([os.path.join(folder, row[0]) for row in rows], data_dir)
    return paths, np.array([int(row[column] == "1") for row in rows]), ["Female", "Male"]


def read_imagenet_lt(data_dir, split):
    """ImageNet-LT: the lines "train/n01440764/NAME.JPEG 0" of ImageNet_LT_train.txt; test: ImageNet's val/, one folder a class."""
    lines = [line.rsplit(" ", 1) for line in find(data_dir, "ImageNet_LT_train.txt").read_text().splitlines() if line.strip()]
    wnids = {int(label): name.split("/")[-2] for name, label in lines}
    names = [wnids[c] for c in range(len(wnids))]
    root = find(data_dir, "train" if split == "train" else "val")
    if split == "train":
        paths = all_there([os.path.join(root.parent, name) for name, _ in lines], data_dir)
        return paths, np.array([int(label) for _, label in lines]), names
    files = [sorted(f for f in os.listdir(root / n) if Path(f).suffix.lower() in IMAGE_FILES and not f.startswith("."))
             if (root / n).is_dir() else None for n in names]
    if None in files:
        raise UserError(f"--data-dir {data_dir}: {root} has no folder {names[files.index(None)]}; sort ImageNet's validation images into "
                        f"one folder a class")
    return ([os.path.join(root, n, f) for n, fs in zip(names, files) for f in fs],
            np.repeat(np.arange(len(names)), [len(fs) for fs in files]), names)


def read_inat2018(data_dir, split):
    """iNaturalist 2018: train2018.json or val2018.json (test here), and the trees that they name."""
    def slim(record):       # of 437,513 images with a dozen fields each, keep what is needed while parsing
        if "file_name" in record:
            return record["id"], record["file_name"]
        if "image_id" in record:
            return record["image_id"], record["category_id"]
        return record
    path = find(data_dir, "train2018.json" if split == "train" else "val2018.json")
    with open(path, encoding="utf-8") as f:
        content = json.load(f, object_hook=slim)
    categories = sorted(content["categories"], key=lambda c: c["id"])
    number = {c["id"]: k for k, c in enumerate(categories)}
    names = [c["name"] for c in categories]
    names = names if len(set(names)) == len(names) else [str(c["id"]) for c in categories]
    category = dict(content["annotations"])
    paths = all_there([os.path.join(path.parent, name) for _, name in content["images"]], data_dir)
    return paths, np.array([number[category[i]] for i, _ in content["images"]]), names


def read_cub200(data_dir, split):
    """CUB-200-2011: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt and images/, joined by number."""
    def table(name):
        return dict(line.split(" ", 1) for line in (root / name).read_text().splitlines() if line.strip())
    root = find(data_dir, "image_class_labels.txt").parent
    images, labels, in_train, classes = (table(n) for n in ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"))
    chosen = [i for i in images if (in_train[i] == "1") == (split == "train")]
    paths = all_there([os.path.join(root, "images", images[i]) for i in chosen], data_dir)
    names = [classes[str(c + 1)] for c in range(len(classes))]
    return paths, np.array([int(labels[i]) - 1 for i in chosen]), names


def read_flowers102(data_dir, split):
    """Oxford-102: jpg/image_00001.jpg ..., imagelabels.mat, setid.mat. Test: the official validation set (ten a class);
    train: all others, since the official training set has ten a class as well."""
    from scipy.io import loadmat
    labels = loadmat(find(data_dir, "imagelabels.mat"))["labels"].ravel().astype(int) - 1
    held_out = loadmat(find(data_dir, "setid.mat"))["valid"].ravel() - 1
    test = np.isin(np.arange(len(labels)), held_out)
    rows, folder = np.flatnonzero(test if split == "test" else ~test), find(data_dir, "jpg")
    paths = all_there([os.path.join(folder, f"image_{r + 1:05d}.jpg") for r in rows], data_dir)
    return paths, labels[rows], [str(c + 1) for c in range(labels.max() + 1)]


def read_artbench10(data_dir, split):
    """ArtBench-10's ImageFolder releases: one folder a style in artbench-10-imagefolder/, or in train/ and test/ of
    artbench-10-imagefolder-split/; data_dir is either, or holds either (the divided one first)."""
    for folder in (Path(data_dir) / "artbench-10-imagefolder-split", Path(data_dir) / "artbench-10-imagefolder", Path(data_dir)):
        if folder.is_dir():
            return read_folder(folder, split)
    return read_folder(data_dir, split)         # says what is missing


@dataclass(frozen=True)
class Source:
    """How a data set is read and what is natural for it."""
    read: callable
    resolution: int     # the set's own; a default where it consists of files of any size
    flip: bool          # whether a mirrored image is as good: never for digits
    files: bool = False         # whether `read` gives paths: any --resolution
    reference: str = "train"    # which split samples are measured against


READERS = {
    "digits": Source(read_digits, 8, False),
    "cifar10": Source(lambda data_dir, split: read_cifar(data_dir, split, 10), 32, True),
    "cifar100": Source(lambda data_dir, split: read_cifar(data_dir, split, 100), 32, True),
    "celebahq": Source(read_celebahq, 64, True, files=True),
    "imagenet-lt": Source(read_imagenet_lt, 64, True, files=True, reference="test"),
    "inat2018": Source(read_inat2018, 64, True, files=True, reference="test"),
    "artbench10": Source(read_artbench10, 256, True, files=True),   # mind --class-order
    "cub200": Source(read_cub200, 64, True, files=True),
    "flowers102": Source(read_flowers102, 64, True, files=True),
    "folder": Source(read_folder, 64, True, files=True, reference="test"),
}
