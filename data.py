"""Data sets as one packed uint8 array, the long-tail draw, the Many / Medium / Few splits, and the batches.

    images = load("cifar100", "data")               # downloads, packs once to data/packed/, memory-maps
    subset = images.take(long_tail(images.labels, ir=100))      # Sec. 4.1: 10,847 of 50,000 images
    x_0, y = Batches(subset, 64, seed=0, device="cpu").at(step=0)

`python data.py --dataset cifar100 --ir 100` packs the set and prints the class counts.
A new data set is one function that returns images (N x H x W x C uint8, or N paths of image files), labels (N,) and
class names: see readers.py.
"""
import hashlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from readers import READERS, NoSuchSplit, read_artbench10, read_folder
from runtime import (Parser, UserError, integer, number, progress, read_json, run, seed_of, write_atomic, write_json,
                     writing)


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
    if source.read in (read_folder, read_artbench10):       # without a list of its files: another set of them is packed anew
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
            going_on = going_on and list(np.load(partial, mmap_mode="r").shape) == shape
        except (OSError, ValueError, KeyError):
            going_on = False
        first = done["done"] if going_on else 0
        if not going_on:
            np.lib.format.open_memmap(partial, "w+", np.uint8, tuple(shape))

        def pack(packed, i):
            packed[i] = read_image(files[i], shape[1])
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool, progress(total=shape[0], initial=first, desc="packing", unit="img") as bar:
                for start in range(first, shape[0], block):
                    rows = range(start, min(start + block, shape[0]))
                    packed = np.lib.format.open_memmap(partial, "r+")       # mapped anew, so that no more than a block stays in memory
                    for _ in pool.map(pack, repeat(packed), rows):      # Pillow decodes and resizes outside the GIL
                        bar.update()
                    packed.flush()
                    del packed
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
    if not n:
        raise UserError(f"--data-dir {data_dir}: class {images.class_names[int(np.argmin(images.counts))]} has no image in the {words}")
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
        raise UserError(f"--ir {ir:g}: the smallest of {C} classes would have no image; take an --ir below {n_max}")
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


def to_classes(labels, from_names, to_names, flag):
    """Labels renumbered from one list of class names to another; None for labels or names that are not known.

    Raises UserError, which names the flag, for a class that is not in the list and a label that is none.
    """
    if labels is None or to_names is None:
        return labels
    C = len(from_names or to_names)
    if len(labels) and not 0 <= labels.min() <= labels.max() < C:
        raise UserError(f"{flag}: labels run from {labels.min()} to {labels.max()}; the {C} classes are 0 to {C - 1}")
    if from_names is None or from_names == to_names:
        return labels
    if missing := [n for n in from_names if n not in to_names]:
        raise UserError(f"{flag}: its class {missing[0]} is not one of the {len(to_names)} to compare with ({', '.join(to_names[:5])} ...)")
    return np.array([to_names.index(n) for n in from_names])[labels]


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
    """Pack a data set and print its class sizes."""
    parser = Parser(__doc__)
    add_data_flags(parser, ir=1)
    args = parser.parse_args()
    images = load_long_tailed(args)
    print(images.summary())
    for name, classes in splits(images.counts).items():
        print(f"  {name}: {len(classes)} classes, {images.counts[classes].sum():,} images")


if __name__ == "__main__":
    run(main)
