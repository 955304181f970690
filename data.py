"""Data sets as one packed uint8 array, the long-tail draw, the Many / Medium / Few splits, and the batches.

    images = load("cifar100", "data")               # downloads, packs once to data/packed/, memory-maps
    subset = images.take(long_tail(images.labels, ir=100))      # Sec. 4.1: 10,847 of 50,000 images
    x_0, y = Batches(subset, 64, seed=0, device="cpu").at(step=0)

`python data.py --dataset cifar100 --ir 100` packs the set and prints the class counts.
A new data set is one function that returns images (N x H x W x C uint8, or N paths of image files), labels (N,) and
class names: see READERS.
"""
import hashlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from runtime import (Parser, UserError, integer, number, progress, read_json, run, seed_of, write_atomic, write_json,
                     writing)


# ----------------------------------------------------------------------------------------------------------------------
# Readers: reader(data_dir, split) -> images (N, H, W, C) uint8 or N paths, labels (N,) int, class names

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
    files = [sorted(os.listdir(root / n)) if (root / n).is_dir() else None for n in names]
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
    "artbench10": Source(read_folder, 256, True, files=True),       # the ImageFolder release; mind --class-order
    "cub200": Source(read_cub200, 64, True, files=True),
    "flowers102": Source(read_flowers102, 64, True, files=True),
    "folder": Source(read_folder, 64, True, files=True, reference="test"),
}


# ----------------------------------------------------------------------------------------------------------------------
# Packed sets

@dataclass
class ImageSet:
    """images (N, H, W, C) uint8 (a memory map where packed), labels (N,) int64 in [0, len(class_names))."""
    name: str
    images: np.ndarray
    labels: np.ndarray
    class_names: list
    flip: bool = False
    provenance: dict = field(default_factory=dict)

    @property
    def counts(self):
        """Images per class, (C,) int64: the N_c of Sec. 2.1."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def take(self, rows):
        """The subset of these rows, in ascending order (which reads a memory map forwards)."""
        rows = np.sort(rows)
        return ImageSet(self.name, self.images[rows], self.labels[rows], self.class_names, self.flip, self.provenance)

    def summary(self):
        """One line: the number of images, of classes, and the class sizes (all of them, or the largest ones)."""
        n = self.counts
        sizes = " ".join(map(str, n[:10])) + (f" ... {n[-1]}" if len(n) > 10 else "")
        ratio = f"IR {n.max() / n.min():.4g}" if n.min() else f"{(n == 0).sum()} classes empty"
        return f"{self.name}: {len(self.labels):,} images, {len(n)} classes, {ratio}, class sizes {sizes}"


def load(name, data_dir="data", split="train", resolution=None, class_order=None, pack_dir=None):
    """Read a data set, packing it on first use; raises UserError that names the flag.

    split: "train" or "test". resolution: None for the set's own. class_order: names or numbers of all classes, the
    most populous first; class i of the result is the i-th of them, so that the long-tail draw follows that order.
    pack_dir: where packs are; None for data_dir/packed, and data/packed for "folder", whose data_dir is its user's.
    """
    if name not in READERS:
        raise UserError(f"--dataset {name}: unknown; choose one of {', '.join(READERS)}")
    source = READERS[name]
    if resolution not in (None, source.resolution) and not source.files:
        raise UserError(f"--resolution {resolution}: {name} is {source.resolution} x {source.resolution}")
    resolution, provenance = resolution or source.resolution, {"dataset": name, "split": split}
    if name == "folder":
        where = hashlib.sha256(str(Path(data_dir).resolve()).encode()).hexdigest()[:8]
        base = Path(pack_dir or "data/packed") / f"{Path(data_dir).resolve().name}-{where}-{split}-{resolution}"
    else:
        base = Path(pack_dir or Path(data_dir) / "packed") / f"{name}-{split}-{resolution}"
    contents = None
    if name == "folder":        # a released set does not change; a user's folder does
        contents = source.read(data_dir, split)
        provenance["files_sha256"] = fingerprint(contents[0], data_dir)
    packed = read_pack(base, provenance)
    if packed is None:
        write_pack(base, *(contents or source.read(data_dir, split)), provenance, resolution if source.files else None)
    images, meta = packed or read_pack(base, provenance)
    labels, names = np.array(meta["labels"]), meta["class_names"]
    if class_order is not None:
        order = resolve_classes(class_order, names, "--class-order")
        if sorted(order) != list(range(len(names))):
            raise UserError(f"--class-order: name each of the {len(names)} classes once, the most populous first")
        labels, names = np.argsort(order)[labels], [names[c] for c in order]
    return ImageSet(name, images, labels, names, source.flip, meta["provenance"])


def read_image(path, resolution):
    """One image file as (resolution, resolution, 3) uint8: upright by its EXIF, short side resized, centre-cropped.

    Grey, palette, CMYK and 16-bit images are converted to RGB; transparent ones are laid on white. Raises UserError
    with the path of a file that cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)     # large photographs are welcome
            image = Image.open(path)
            image.draft(None, (2 * resolution, 2 * resolution))                 # JPEG: decode no more than is needed
            image = ImageOps.exif_transpose(image)
            image.load()
        if image.mode.startswith("I"):                                          # 16-bit grey
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if "A" in image.getbands() or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
        scale = resolution / min(image.size)
        size = [max(resolution, round(side * scale)) for side in image.size]
        left, top = ((side - resolution) // 2 for side in size)
        box = (left, top, left + resolution, top + resolution)
        return np.asarray(image.resize(size, Image.LANCZOS, reducing_gap=3.0).crop(box))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:     # SyntaxError: a broken PNG
        raise UserError(f"--data-dir: {path} cannot be read as an image ({e}); mend or remove it")


def fingerprint(paths, data_dir):
    """A hash of the names and sizes of image files: another one, and the set is packed anew."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{os.path.relpath(path, data_dir)} {os.path.getsize(path)}\n".encode())
    return digest.hexdigest()


def write_pack(base, images, labels, class_names, provenance, resolution=None):
    """Write base.npy (the images) and base.json (labels, class names, provenance): the JSON last, as the seal.

    images: an array, or paths of image files, which are read on all cores, each straight into its place; stopped and
    started again, it goes on with the block of images that it was at.
    """
    path = base.with_name(base.name + ".npy")
    if resolution:
        shape = [len(images), resolution, resolution, 3]
        pack_files(path, images, shape, provenance)
    else:
        shape = list(images.shape)

        def write_images(temporary):
            with open(temporary, "wb") as f:
                np.save(f, np.ascontiguousarray(images, dtype=np.uint8))
        write_atomic(path, write_images, "--data-dir")
    counts = np.bincount(labels, minlength=len(class_names)).tolist()
    write_json(base.with_name(base.name + ".json"), {
        "shape": shape, "class_names": list(class_names), "class_counts": counts,
        "provenance": provenance, "labels": np.asarray(labels).tolist()}, "--data-dir")


def pack_files(path, files, shape, provenance, block=4096):
    """Read and resize image files into the .npy `path`, by blocks, through path.partial and a mark of how far it has come."""
    partial, mark = path.with_name(path.name + ".partial"), path.with_name(path.name + ".mark")
    with writing(path, "--pack-dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        done = read_json(mark) or {}
        try:
            going_on = done["shape"] == shape and done["provenance"] == provenance
            packed = np.lib.format.open_memmap(partial, "r+") if going_on else None
        except (OSError, ValueError, KeyError):
            packed = None
        first = done["done"] if packed is not None else 0
        if packed is None:
            packed = np.lib.format.open_memmap(partial, "w+", np.uint8, tuple(shape))

        def pack(i):
            packed[i] = read_image(files[i], shape[1])
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool, progress(total=shape[0], initial=first, desc="packing", unit="img") as bar:
                for start in range(first, shape[0], block):
                    rows = range(start, min(start + block, shape[0]))
                    for _ in pool.map(pack, rows):          # Pillow decodes and resizes outside the GIL
                        bar.update()
                    packed.flush()
                    write_json(mark, {"shape": shape, "provenance": provenance, "done": rows.stop}, "--pack-dir")
        finally:
            if not mark.exists():                           # nothing yet that is worth keeping
                partial.unlink(missing_ok=True)
        os.replace(partial, path)
        mark.unlink(missing_ok=True)


def read_pack(base, provenance):
    """(images as a memory map, the JSON) of a pack, or None where it is missing, not whole or of another provenance."""
    try:
        meta = json.loads(base.with_name(base.name + ".json").read_text())
        images = np.load(base.with_name(base.name + ".npy"), mmap_mode="r")
        return (images, meta) if list(images.shape) == meta["shape"] and meta["provenance"] == provenance else None
    except (OSError, ValueError, KeyError):
        return None


def resolve_classes(text, class_names, flag="--classes"):
    """Class numbers from a string such as "0-2,7" or "cat,dog", in the order given; raises UserError naming `flag`."""
    result = []
    for word in str(text).split(","):
        word = word.strip()
        first, dash, last = word.partition("-")
        if word in class_names and not word.isdigit():
            result.append(class_names.index(word))
        elif first.isdigit() and (last.isdigit() if dash else True):
            if int(last or first) < int(first):
                raise UserError(f"{flag} {text}: write the range {word} from low to high")
            result.extend(range(int(first), int(last or first) + 1))
        else:
            raise UserError(f"{flag} {text}: {word!r} is neither a class number, nor a range like 6-9, nor a class name")
    if not result or max(result) >= len(class_names):
        raise UserError(f"{flag} {text}: classes are 0 to {len(class_names) - 1}")
    return result


def load_reference(name, data_dir="data", split=None, resolution=None, pack_dir=None):
    """The class-balanced real images that samples are measured against, as (ImageSet, a few words that say what it is).

    split "train" or "test" takes that split whole. None: the set's own choice, the full training set or (ImageNet-LT,
    iNaturalist, a folder that has one) the test set; if its largest class has more than 1.5 times the images of its
    smallest, equally many of each class, as many as the smallest has.
    """
    if split:
        return load(name, data_dir, split, resolution, None, pack_dir), f"{split} set"
    split = READERS[name].reference if name in READERS else "train"
    try:
        images = load(name, data_dir, split, resolution, None, pack_dir)
    except NoSuchSplit:
        split, images = "train", load(name, data_dir, "train", resolution, None, pack_dir)
    words, n = {"train": "training set", "test": "test set"}[split], images.counts.min()
    if images.counts.max() <= 1.5 * n:
        return images, "full " + words
    order = np.random.RandomState(0).permutation(len(images.labels))
    by_class = order[np.argsort(images.labels[order], kind="stable")]           # shuffled within each class
    starts = np.cumsum(images.counts) - images.counts
    rows = by_class[(starts[:, None] + np.arange(n)).ravel()]
    return images.take(rows), f"{words}, {n} images of each class"


# ----------------------------------------------------------------------------------------------------------------------
# Imbalance (Sec. 4.1)

def long_tail_counts(available, ir):
    """Class sizes n_max * IR^(-c / (C - 1)), rounded down, for c = 0 ... C - 1: Cao et al.'s exponential profile.

    n_max is the largest whole number, at most N / C, for which every class c has the images that it needs
    (`available`, (C,)). Raises UserError where a class would be empty.
    """
    available = np.asarray(available)
    C = len(available)
    if C < 2:
        raise UserError("--ir: a long tail needs at least two classes")
    decay = np.array([(1 / ir) ** (c / (C - 1)) for c in range(C)])
    n_max = available.sum() // C
    while n_max and ((n_max * decay).astype(int) > available).any():
        n_max -= 1
    counts = (n_max * decay).astype(int)
    if counts.min() < 1:
        raise UserError(f"--ir {ir:g}: the smallest of {C} classes would have no image; at most --ir {n_max} is possible")
    return counts


def long_tail(labels, ir, seed=0):
    """Rows of the long-tailed subset, exactly Cao et al. (2019): class by class, RandomState(seed).shuffle, the first n_c.

    labels (N,), ir = N_max / N_min >= 1; returns ascending rows. NumPy's global generator is left alone.
    """
    labels = np.asarray(labels)
    rng, rows = np.random.RandomState(seed), []
    counts = long_tail_counts(np.bincount(labels), ir)
    for c, n in enumerate(counts):
        members = np.flatnonzero(labels == c)
        rng.shuffle(members)
        rows.append(members[:n])
    return np.sort(np.concatenate(rows))


def splits(counts):
    """{"Many": classes, "Medium": ..., "Few": ...}: thirds of the classes by size, the rest going to Few (Sec. 4.1).

    counts (C,), ties by class number; values are ascending lists. Fewer than three classes have no splits: {}.
    """
    if len(counts) < 3:
        return {}
    order, third = np.argsort(-np.asarray(counts), kind="stable"), len(counts) // 3
    parts = {"Many": order[:third], "Medium": order[third:2 * third], "Few": order[2 * third:]}
    return {name: sorted(int(c) for c in classes) for name, classes in parts.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Batches

def to_float(images):
    """uint8 (N, H, W, C) in 0 ... 255 -> float32 (N, C, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_uint8(x):
    """float (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C), clipped and rounded (never truncated)."""
    return x.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


class Batches:
    """The training batches: `at(step)` is a pure function of (seed, step), so resuming needs no saved state.

    Step s takes positions s B ... (s + 1) B - 1 of an endless sequence of epochs, each a permutation of all images
    seeded by (seed, epoch). The images live on `device` if they take at most `limit` bytes, else where they are.
    resample Q (+RS): class c is drawn with probability proportional to N_c^Q instead, with replacement: 0 balances
    the classes, 0.5 takes square roots, 1 changes nothing.
    """

    def __init__(self, images, batch_size, seed, device, limit=4 << 30, resample=1.0):
        self.images, self.batch_size, self.seed, self.device = images, batch_size, seed, device
        self.on_device = images.images.nbytes <= limit
        self.pixels = torch.from_numpy(np.array(images.images)).to(device) if self.on_device else images.images
        self.labels = torch.from_numpy(images.labels).to(device)
        self.orders, self.weights = {}, None
        if resample != 1:
            weights = images.counts[images.labels].astype(float) ** (resample - 1)      # of an image: N_c^Q / N_c
            self.weights = weights / weights.sum()

    def order(self, epoch):
        """The rows of one epoch, (N,) int64 on the CPU: a permutation, or draws by weight; the last two are kept."""
        if epoch not in self.orders:
            self.orders = {e: o for e, o in self.orders.items() if e == epoch - 1}
            rng = np.random.default_rng(seed_of(self.seed, "epoch", epoch))
            N = len(self.labels)
            self.orders[epoch] = rng.permutation(N) if self.weights is None else rng.choice(N, N, p=self.weights)
        return self.orders[epoch]

    def rows(self, step):
        """Which images step `step` takes: (B,) int64."""
        N, first = len(self.labels), step * self.batch_size
        positions = np.arange(first, first + self.batch_size)
        return np.concatenate([self.order(e)[positions[positions // N == e] % N]
                               for e in range(first // N, (first + self.batch_size - 1) // N + 1)])

    def at(self, step):
        """The global batch of a step on the device: x_0 (B, C, H, W) float32 in [-1, 1], y (B,) int64."""
        rows = self.rows(step)
        index = torch.from_numpy(rows).to(self.device, non_blocking=True)
        pixels = self.pixels[index] if self.on_device else torch.from_numpy(self.pixels[rows]).to(self.device)
        return to_float(pixels), self.labels[index]


def add_data_flags(parser, dataset="cifar100", ir=None):
    """The flags that choose the data, the same in every script that reads a data set; the defaults of two of them."""
    g = parser.add_argument_group("data")
    g.add_argument("--dataset", default=dataset, help=f"one of {', '.join(READERS)} (default: {dataset})")
    g.add_argument("--data-dir", default="data", help="where data sets are, or are downloaded to; for folder: the images, one "
                   "sub-folder a class (default: data)")
    g.add_argument("--pack-dir", help="where packed arrays go (default: packed in --data-dir; folder: data/packed)")
    g.add_argument("--resolution", type=integer(1), help="pixels a side, of sets of image files (default: the set's own; folder: 64)")
    g.add_argument("--ir", type=number(low=1), default=ir, help="imbalance ratio N_max / N_min of the draw; 1: every image, as it is"
                   + (f" (default: {ir:g})" if ir else ""))
    g.add_argument("--split-seed", type=integer(0), default=0, help="seed of the long-tail draw (default: 0, Cao et al.)")
    g.add_argument("--class-order", help="classes, the most populous first: names or numbers with commas (default: as is)")
    return g


def load_long_tailed(args):
    """The training set that these flags describe: `load`, then `long_tail` unless --ir is 1."""
    images = load(args.dataset, args.data_dir, "train", args.resolution, args.class_order, args.pack_dir)
    return images if args.ir == 1 else images.take(long_tail(images.labels, args.ir, args.split_seed))


def main():
    parser = Parser(__doc__)
    add_data_flags(parser, ir=1)
    args = parser.parse_args()
    images = load_long_tailed(args)
    print(images.summary())
    for name, classes in splits(images.counts).items():
        print(f"  {name}: {len(classes)} classes, {images.counts[classes].sum():,} images")


if __name__ == "__main__":
    run(main)
