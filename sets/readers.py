"""How each data set lies on disk, as its authors release it: one function per set, see READERS.

    read(data_dir, split) -> images, labels (N,) int, class names

images: an array (N, H, W, C) uint8, or N paths of image files. split is "train" or "test". A set
that lacks the requested one raises NoSuchSplit. data.py packs what these functions return. Where a
set has texts as well, a second function reads those of given image files, see Source.captions.
"""
import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unicodedata import normalize

import numpy as np

from disk import sha256
from runtime import UserError

CIFAR_SHA256 = {        # of the published archives
    "CIFAR10": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    "CIFAR100": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
}
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}
IMAGE_FILES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif",
               ".ppm", ".pgm"}
NOT_READ = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".tga", ".exr", ".hdr"}      # images, too


class NoSuchSplit(UserError):
    """The data set has no such split."""


# --------------------------------------------------------------------------------------------------
# What several readers need

def is_image(name):
    """Whether a file name is that of an image; hidden files are not counted."""
    return Path(name).suffix.lower() in IMAGE_FILES and not name.startswith(".")


def find(data_dir, name):
    """The file or folder `name` in data_dir, or in a folder of data_dir. Raises UserError."""
    for path in (Path(data_dir) / name, *sorted(Path(data_dir).glob(f"*/{name}"))):
        if path.exists():
            return path
    raise UserError(f"--data-dir {data_dir}: {name} is not there; put the data set, as it is "
                    f"released, into this folder")


def lines_of(path):
    """The lines of a text file, without the blank ones."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def as_lists(classes):
    """{class: its paths} -> what a reader returns: all paths, labels (N,), class names."""
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in classes.values()])
    return [path for paths in classes.values() for path in paths], labels, list(classes)


@contextmanager
def as_released(path):
    """Turns whatever fails while `path` is understood into a UserError that names it."""
    try:
        yield
    except Exception as e:      # of many kinds: a column, a number or a bracket is missing
        why = f"{type(e).__name__}: {e}".splitlines()[0]
        raise UserError(f"--data-dir: {path} is not as it is released ({why}); get it again") from e


def check_all_exist(paths, data_dir, source):
    """Raise UserError where the list `source` is empty, or a listed file is missing."""
    if not paths:
        raise UserError(f"--data-dir: {source} is not as it is released (it lists no images of "
                        "this split); get it again")
    missing = [p for p in paths if not os.path.exists(p)]
    if missing:
        raise UserError(f"--data-dir {data_dir}: {len(missing):,} of {len(paths):,} listed images "
                        f"are missing, the first is {missing[0]}")


# --------------------------------------------------------------------------------------------------
# Sets that come with a library

def read_digits(data_dir, split):
    """scikit-learn's 1,797 real handwritten digits, 8 x 8, one channel.

    Test: 30 per class, evenly spaced in the order of the set; train: the others.
    """
    from sklearn.datasets import load_digits
    digits = load_digits()
    grey = digits.images[..., None] * (255 / 16)        # from 17 grey levels, 0 ... 16
    images = np.round(grey).astype(np.uint8)
    test = np.zeros(len(images), bool)
    for c in range(10):
        rows = np.flatnonzero(digits.target == c)
        test[rows[np.linspace(0, len(rows) - 1, 30).astype(int)]] = True
    rows = np.flatnonzero(test if split == "test" else ~test)
    return images[rows], digits.target[rows], [str(c) for c in range(10)]


def read_cifar(data_dir, split, name):
    """CIFAR10 or CIFAR100 of torchvision, which checks the MD5 of what it downloads or finds.

    Where the archive is in data_dir, its SHA-256 is checked as well.
    """
    import torchvision
    kind = getattr(torchvision.datasets, name)
    archive = Path(data_dir) / kind.filename
    try:
        source = kind(data_dir, train=split == "train", download=True)
    except (OSError, RuntimeError) as e:
        raise UserError(f"--data-dir {data_dir}: {name} is not there and cannot be downloaded "
                        f"({e}); put {kind.filename} from {kind.url} into {data_dir}") from e
    if archive.exists() and sha256(archive) != CIFAR_SHA256[name]:
        raise UserError(f"--data-dir {data_dir}: {kind.filename} is not the published archive (its "
                        f"SHA-256 is another one); get it from {kind.url}")
    return source.data, np.array(source.targets), source.classes


# --------------------------------------------------------------------------------------------------
# Folders of classes

def read_folder(data_dir, split):
    """Images of your own: one sub-folder per class, in alphabetical order. Images may lie deeper.

    Where data_dir holds `train` and also `test` or `val`, those are the two splits, and the classes
    are those of `train`. Otherwise all of it is "train".
    """
    root = Path(data_dir)
    folders = {"train": root}
    for name in ("val", "test"):
        if (root / "train").is_dir() and (root / name).is_dir():
            folders = {"train": root / "train", "test": root / name}
    if split not in folders:
        raise NoSuchSplit(f"--data-dir {root}: no test images; put the classes into train/, and "
                          "the test images, in folders of the same names, into test/")
    classes = files_by_class(folders["train"])
    names = list(classes)
    if len(names) < 2:
        raise UserError(f"--data-dir {folders['train']}: has {len(names)} sub-folders with images; "
                        "it must hold one per class, at least two")
    if split == "test":
        classes = files_by_class(folders["test"])
        if unknown := [name for name in classes if name not in names]:
            raise UserError(f"--data-dir {folders['test']}: class {unknown[0]} is not one of those "
                            f"in {folders['train']}")
        if not classes:
            raise NoSuchSplit(f"--data-dir {folders['test']}: it holds no images")
    paths, labels, own_names = as_lists(classes)
    return paths, np.array([names.index(name) for name in own_names])[labels], names


def files_by_class(root, flag="--data-dir"):
    """{sub-folder: the paths of all images in it, however deep}, in alphabetical order.

    Sub-folders that are named by whole numbers are in the order of these; those without images are
    no classes. Names are in Unicode's form NFC, whatever form the disk keeps. Raises UserError
    where it is not clear what the classes are.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{flag} {root}: there is no such folder; it must hold one sub-folder of "
                        "images per class")
    folders = [entry.name for entry in root.iterdir()
               if entry.is_dir() and not entry.name.startswith(".")]
    numbered = all(name.isdecimal() and name.isascii() for name in folders)
    folders.sort(key=lambda name: (int(name), name) if numbered else normalize("NFC", name))
    classes = {}
    for name in folders:
        if files := files_under(root / name, flag):
            classes.setdefault(normalize("NFC", name), []).extend(files)
    flat = sorted(entry.name for entry in root.iterdir() if is_image(entry.name))
    if classes and flat:
        raise UserError(f"{flag} {root}: images, such as {flat[0]}, beside sub-folders of images, "
                        f"such as {next(iter(classes))}; move one of the two elsewhere")
    for name, files in classes.items():
        # A class may be called train, too: its images then lie directly in it
        if name.lower() in SPLITS and all(Path(file).parent != root / name for file in files):
            raise UserError(f"{flag} {root}: {name} would be a class, with all that its "
                            f"sub-folders hold; name {root / name}, or for --dataset folder have "
                            "train beside test or val, named just so")
    return classes


def files_under(folder, flag="--data-dir"):
    """The paths of all image files in a folder, however deep, in alphabetical order."""
    found = {}
    for top, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found[top] = [os.path.join(top, f) for f in sorted(files) if is_image(f)]
        unread = [f for f in files if Path(f).suffix.lower() in NOT_READ and f[0] != "."]
        if unread:
            raise UserError(f"{flag} {top}: {unread[0]} is an image of a kind that is not read; "
                            "convert it to JPEG or PNG")
    return [path for top in sorted(found) for path in found[top]]


def image_folder(root, flag="--data-dir"):
    """Images that are measured: (paths, labels (N,) or None, class names or None).

    One sub-folder per class, as files_by_class, or images directly in `root`.
    """
    classes = files_by_class(root, flag)
    if not classes:
        flat = [os.path.join(root, f) for f in sorted(os.listdir(root)) if is_image(f)]
        if not flat:
            raise UserError(f"{flag} {root}: no images in it, and no sub-folders of images")
        return flat, None, None
    return as_lists(classes)


def read_artbench10(data_dir, split):
    """ArtBench-10 in either of its ImageFolder releases, with one folder per style.

    These folders lie in artbench-10-imagefolder/, or in train/ and test/ of
    artbench-10-imagefolder-split/. data_dir is either, or holds either. Where it holds both, the
    one with train/ and test/ is read.
    """
    for release in ("artbench-10-imagefolder-split", "artbench-10-imagefolder"):
        folder = Path(data_dir) / release
        if folder.is_dir():
            return read_folder(folder, split)
    return read_folder(data_dir, split)


# --------------------------------------------------------------------------------------------------
# Sets with lists of images

def read_celebahq(data_dir, split):
    """CelebA-HQ by its attribute Male: class 0 is Female, class 1 is Male.

    It reads CelebA-HQ-img/ and CelebAMask-HQ-attribute-anno.txt.
    """
    if split != "train":
        raise NoSuchSplit(f"--reference-split {split}: CelebA-HQ has no such split here; its "
                          f"reference images are chosen from all of it")
    path = find(data_dir, "CelebAMask-HQ-attribute-anno.txt")
    with as_released(path):
        number, attributes, *rows = lines_of(path)
        column = attributes.split().index("Male") + 1   # lines begin with the file's name
        if len(rows) != int(number):
            raise ValueError(f"{len(rows)} images, and its first line says {number}")
        files = [row.split()[0] for row in rows]
        labels = [{"-1": 0, "1": 1}[row.split()[column]] for row in rows]
    folder = find(data_dir, "CelebA-HQ-img")
    paths = [os.path.join(folder, file) for file in files]
    check_all_exist(paths, data_dir, path)
    return paths, np.array(labels), ["Female", "Male"]


def read_imagenet_lt(data_dir, split):
    """ImageNet-LT: the lines "train/n01440764/NAME.JPEG 0" of ImageNet_LT_train.txt.

    Test: ImageNet's val/, sorted into one folder per class.
    """
    path = find(data_dir, "ImageNet_LT_train.txt")
    with as_released(path):
        lines = [line.rsplit(" ", 1) for line in lines_of(path)]
        labels = [int(label) for _, label in lines]
        folders = [name.split("/")[-2] for name, _ in lines]
        wnids = dict(zip(labels, folders))
        if len(set(zip(labels, folders))) != len(wnids):
            raise ValueError("images of one label in several folders")
        names = [wnids[c] for c in range(len(wnids))]
    if split != "train":
        root = find(data_dir, "val")
        lacking = [name for name in names if not (root / name).is_dir()]
        if lacking:
            raise UserError(f"--data-dir {data_dir}: {root} has no folder {lacking[0]}; sort "
                            "ImageNet's validation images into one folder per class")
        return as_lists({name: files_under(root / name) for name in names})
    root = find(data_dir, "train").parent
    paths = [os.path.join(root, name) for name, _ in lines]
    check_all_exist(paths, data_dir, path)
    return paths, np.array(labels), names


def read_inat2018(data_dir, split):
    """iNaturalist 2018: train2018.json, or val2018.json for test, and the images that they name."""
    path = find(data_dir, "train2018.json" if split == "train" else "val2018.json")
    with as_released(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        categories = sorted(content["categories"], key=lambda c: c["id"])
        number = {c["id"]: k for k, c in enumerate(categories)}
        names = [c["name"] for c in categories]
        if len(set(names)) < len(names):
            names = [str(c["id"]) for c in categories]
        category = {a["image_id"]: a["category_id"] for a in content["annotations"]}
        paths = [os.path.join(path.parent, image["file_name"]) for image in content["images"]]
        labels = [number[category[image["id"]]] for image in content["images"]]
    check_all_exist(paths, data_dir, path)
    return paths, np.array(labels), names


def read_cub200(data_dir, split):
    """CUB-200-2011: text files of lines "NUMBER VALUE", joined by number, and images/.

    The files are images.txt, image_class_labels.txt, train_test_split.txt and classes.txt.
    """
    root = find(data_dir, "image_class_labels.txt").parent
    files = [root / f"{name}.txt" for name in (
        "classes", "images", "image_class_labels", "train_test_split")]
    tables = []
    for file in files:
        with as_released(file):
            tables.append(dict(line.strip().split(" ", 1) for line in lines_of(file)))
    classes, images, labels, in_train = tables
    with as_released(files[0]):
        names = [classes[str(c + 1)] for c in range(len(classes))]
    number = {str(c + 1): c for c in range(len(names))}
    with as_released(files[2]):
        y = {i: number[labels[i]] for i in images}
    with as_released(files[3]):
        chosen = [i for i in images if {"0": "test", "1": "train"}[in_train[i]] == split]
    paths = [os.path.join(root, "images", images[i]) for i in chosen]
    check_all_exist(paths, data_dir, root / "images.txt")
    return paths, np.array([y[i] for i in chosen]), names


def read_flowers102(data_dir, split):
    """Oxford-102: jpg/image_00001.jpg ..., imagelabels.mat and setid.mat.

    Test: the official validation set, 10 per class. Train: all others, because the official
    training set alone is balanced, with 10 per class as well.
    """
    labels = numbers_in_mat(find(data_dir, "imagelabels.mat"), "labels")
    held_out = numbers_in_mat(find(data_dir, "setid.mat"), "valid", len(labels))
    test = np.isin(np.arange(len(labels)), held_out)
    rows = np.flatnonzero(test if split == "test" else ~test)
    folder = find(data_dir, "jpg")
    paths = [os.path.join(folder, f"image_{r + 1:05d}.jpg") for r in rows]
    check_all_exist(paths, data_dir, "setid.mat")
    return paths, labels[rows], [str(c + 1) for c in range(labels.max() + 1)]


def numbers_in_mat(path, key, most=None):
    """The whole numbers from 1, at most `most`, under `key` in a MATLAB file, each less 1."""
    from scipy.io import loadmat
    with as_released(path):
        numbers = loadmat(path)[key].ravel()
        whole = numbers.astype(int)
        if (whole != numbers).any() or whole.min() < 1 or whole.max() > (most or whole.max()):
            raise ValueError(f"{key} are not whole numbers from 1 to {most or 'their number'}")
    return whole - 1


# --------------------------------------------------------------------------------------------------
# Captions: texts that say what is in an image

def read_text_c10(data_dir, paths):
    """The captions of Reed et al. (2016) for CUB-200 and Oxford-102: a list of texts per image.

    text_c10/ holds one folder per class, and in it NAME.txt with ten lines for NAME.jpg. It may lie
    in data_dir or deeper, such as in cvpr2016_cub/. paths: N image files.
    """
    folders = sorted(p for p in Path(data_dir).rglob("text_c10") if p.is_dir())
    if not folders:
        raise UserError(f"--data-dir {data_dir}: text_c10 is not there; put the captions of Reed "
                         "et al. (2016), as they are released, into this folder, or make texts of "
                         "class names with --prompt")
    files = {path.stem: path for folder in folders for path in folder.rglob("*.txt")}
    missing = [path for path in paths if Path(path).stem not in files]
    if missing:
        raise UserError(f"--data-dir {data_dir}: text_c10 has no captions for "
                        f"{len(missing):,} of {len(paths):,} images, the first is {missing[0]}")
    return [captions_in(files[Path(path).stem]) for path in paths]


def read_texts_beside(data_dir, paths):
    """The captions in NAME.txt beside NAME.jpg, one a line; None where no image has such a file."""
    files = [Path(path).with_suffix(".txt") for path in paths]
    missing = [file for file in files if not file.is_file()]
    if len(missing) == len(files):
        return None
    if missing:
        raise UserError(f"--data-dir {data_dir}: {len(missing):,} of {len(files):,} images have no "
                        f"captions beside them, the first lacks {missing[0]}; write them, or make "
                        "texts of class names with --prompt")
    return [captions_in(file) for file in files]


def captions_in(path):
    """The lines of a file of captions, at least one. Raises UserError for another file."""
    with as_released(path):
        captions = [line.strip() for line in lines_of(path)]
        if not captions:
            raise ValueError("no line in it")
        return captions


# --------------------------------------------------------------------------------------------------
# The table of data sets

@dataclass(frozen=True)
class Source:
    """How a data set is read, and the settings that suit it."""
    read: Callable
    resolution: int     # the set's own; a default where it consists of files of any size
    flip: bool          # whether a mirrored image is as good as the image: never for digits
    files: bool = False         # whether `read` returns paths; then any --resolution is possible
    listed: bool = True         # of files: whether lists name them; else they are what is there
    constant: bool = False      # of arrays: whether they are the same at every reading
    reference: str = "train"    # the split that samples are compared with
    captions: Callable | None = None    # (data_dir, paths) -> a list of texts for each image, or
                                # None; None: the set has class names alone
    by_size: bool = False       # whether the classes are ordered by their sizes, the largest first
    order: tuple = ()           # names of classes, the most populous first where a draw makes them
                                # so; others follow as they are numbered


# The paper does not give ArtBench-10's full order. It has Realism in Few (Fig. 3, Fig. G.4),
# Post-Impressionism in the tail (Fig. G.5) and Surrealism in Medium (Fig. G.7); the rest is
# alphabetical.
ARTBENCH10_ORDER = (
    "art_nouveau", "baroque", "expressionism",
    "impressionism", "renaissance", "surrealism",
    "post_impressionism", "realism", "romanticism", "ukiyo_e")

READERS = {
    "digits": Source(read_digits, 8, flip=False, constant=True),
    "cifar10": Source(partial(read_cifar, name="CIFAR10"), 32, flip=True, constant=True),
    "cifar100": Source(partial(read_cifar, name="CIFAR100"), 32, flip=True, constant=True),
    "celebahq": Source(read_celebahq, 64, flip=True, files=True),
    "imagenet-lt": Source(read_imagenet_lt, 64, flip=True, files=True, reference="test"),
    "inat2018": Source(read_inat2018, 64, flip=True, files=True, reference="test"),
    # Classes of equal sizes: the order says which of them become rare
    "artbench10": Source(read_artbench10, 256, flip=True, files=True, listed=False,
                         order=ARTBENCH10_ORDER),
    "cub200": Source(read_cub200, 64, flip=True, files=True, captions=read_text_c10),
    "flowers102": Source(read_flowers102, 64, flip=True, files=True, captions=read_text_c10),
    "folder": Source(read_folder, 64, flip=True, files=True, listed=False, reference="test",
                     captions=read_texts_beside, by_size=True),
}
