"""Data sets as one packed uint8 array, the long-tail draw, the groups of classes, the batches.

    images = load("cifar100", "data")               # downloads, packs once to data/packed/
    subset = images.take(long_tail(images.labels, ir=100))      # Sec. 4.1: 10,847 of 50,000 images
    x_0, y = Batches(subset, 64, seed=0, device="cpu").at(step=0)

`python data.py --dataset cifar100 --ir 100` packs the set and prints the class counts;
`python data.py split --data-dir DIR` divides a folder of images into train/ and test/.
A new data set is one function that returns images (N x H x W x C uint8, or N paths of image files),
labels (N,) and class names: see sets/readers.py.
"""
import csv
import hashlib
import re
import sys
from argparse import Namespace
from dataclasses import dataclass, field, replace
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from disk import Checkpoint, fingerprint, path_id, read_json
from runtime import Parser, UserError, integer, number, print_next, refuse_unused, run, seed_of
from sets import splits
from sets.packing import labels_hash, names_and_sizes, pack_once
from sets.readers import READERS, NoSuchSplit, Source


# --------------------------------------------------------------------------------------------------
# A set of images, packed

@dataclass
class ImageSet:
    """Images, their labels, and where they come from."""
    name: str
    images: np.ndarray              # (N, H, W, 1 or 3) uint8, a memory map where packed
    labels: np.ndarray              # (N,) int64, each the number of a name in class_names
    class_names: list
    flip: bool = False              # whether a mirrored image is as good
    provenance: dict = field(default_factory=dict)
    sha256: str | None = None       # of the set as it was packed, see packing.content_hash
    rows: np.ndarray | None = None  # where the images are in that set; None: all, as packed
    total: int = 0                  # how many images that set has

    @property
    def counts(self) -> np.ndarray:
        """Images per class, (C,) int64: the N_c of Sec. 2.1."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def take(self, rows: np.ndarray) -> "ImageSet":
        """The subset of these rows, in ascending order (a memory map is then read forwards)."""
        rows = np.sort(rows)
        packed = rows if self.rows is None else self.rows[rows]
        return replace(self, images=self.images[rows], labels=self.labels[rows], rows=packed)

    def table(self, groups: dict[str, list[int]] | None = None,
              rule: str = "thirds of the classes, by size") -> str:
        """What is used, and of each class its name, its images and its group; the largest first.

        groups, rule: other ones than those of class_groups, and what makes them, in words. Of more
        than 12 classes the first five and the last five.
        """
        n = self.counts
        N = len(self.labels)
        used = f"{N:,}" if N == self.total else f"uses {N:,} of {self.total:,}"
        lines = [f"{self.name}: {used} images, {len(n)} classes, IR {n.max() / n.min():.4g}"]
        if n.min() == n.max():
            return f"{lines[0]}, {n[0]:,} of each class"
        groups = class_groups(n) if groups is None else groups
        group_of = {c: name for name, classes in groups.items() for c in classes}
        order = np.argsort(-n, kind="stable").tolist()
        ends = [*order[:5], *order[-5:]] if len(order) > 12 else order
        width = max(len(self.class_names[c]) for c in ends)
        lines += [f"  {self.class_names[c]:<{width}} {n[c]:>9,}  {group_of.get(c, '')}".rstrip()
                  for c in ends]
        if len(order) > 12:
            lines.insert(6, "  ...")
        if groups:
            sizes = [f"{name} {n[classes].sum():,}" for name, classes in groups.items()]
            lines.append(f"  images of the groups ({rule}): {', '.join(sizes)}")
        return "\n".join(lines)

    def record(self) -> dict:
        """What a checkpoint keeps of its training data, as plain types."""
        return {"dataset": self.name, "class_names": self.class_names,
                "class_counts": self.counts.tolist(), "resolution": self.images.shape[1],
                "provenance": self.provenance, "sha256": self.sha256}


def load(name: str, data_dir: str | Path = "data", split: str = "train",
         resolution: int | None = None, class_order: str | list[str] | None = None,
         pack_dir: str | Path | None = None) -> ImageSet:
    """Read a data set, packing it on first use, and anew where it has changed.

    split: "train" or "test". resolution: None for the set's own. class_order: the classes, the most
    populous first (see order_of); class i of the result is the i-th of them, so that the long-tail
    draw follows that order. pack_dir: where packs are, see pack_path. Raises UserError that names
    the flag.
    """
    if name not in READERS:
        raise UserError(f"--dataset {name}: unknown; choose one of {', '.join(READERS)}, or name "
                        "the file of your own with --plugin")
    source = READERS[name]
    if resolution not in (None, source.resolution) and not source.files:
        raise UserError(f"--resolution {resolution}: {name} is {source.resolution} x "
                        f"{source.resolution}")
    resolution = resolution or source.resolution
    base = pack_path(name, data_dir, split, resolution, pack_dir)

    # provenance: what the set is. stamp: what it was made from; a pack with another one is stale.
    # contents: what the reader gives, or None where the pack that is there needs no reading
    provenance = {"dataset": name, "split": split}
    contents = None
    if source.constant:
        stamp = {"reader": None}
    elif not source.files:
        contents = pixels, labels, names = source.read(data_dir, split)
        stamp = {"reader": hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest(),
                 "labels": labels_hash(labels, names)}
    elif contents := read_if_there(name, data_dir, split, base):
        paths, labels, names = contents
        stamp = {"reader": None, "files": fingerprint(paths, data_dir),
                 "labels": labels_hash(labels, names)}
        if not source.listed:
            provenance["files_sha256"] = names_and_sizes(paths, data_dir)
    else:
        stamp = read_json(base.with_name(base.name + ".json"))["stamp"]

    images, meta = pack_once(base, lambda: contents or source.read(data_dir, split), provenance,
                             stamp, resolution if source.files else None, name)
    names = meta["class_names"]
    order = order_of(class_order, names, source, meta["class_counts"])
    new_number = np.argsort(order)          # of each class
    return ImageSet(name, images, new_number[meta["labels"]], [names[c] for c in order],
                    source.flip, meta["provenance"], meta["sha256"], total=len(images))


def read_if_there(name: str, data_dir: str | Path, split: str, base: Path) -> tuple | None:
    """What a set's reader gives; None, with a line, where the files are gone and a pack is there.

    Packs of sets with lists can be moved to another machine without the image files.
    """
    try:
        return READERS[name].read(data_dir, split)
    except NoSuchSplit:
        raise
    except UserError as e:
        if not READERS[name].listed or read_json(base.with_name(base.name + ".json")) is None:
            raise
        print(f"{name}: packed images, which cannot be compared with their files ({e})")
        return None


def pack_path(name: str, data_dir: str | Path, split: str, resolution: int,
              pack_dir: str | Path | None) -> Path:
    """Where a set's pack is, without its suffixes: in pack_dir, or data_dir/packed.

    That of a user's own folder is in data/packed. In a place that several --data-dir may share, its
    name says which one it belongs to.
    """
    if name == "folder":
        return Path(pack_dir or "data/packed") / f"{path_id(data_dir)}-{split}-{resolution}"
    if pack_dir:
        return Path(pack_dir) / f"{name}-{path_id(data_dir)}-{split}-{resolution}"
    return Path(data_dir) / "packed" / f"{name}-{split}-{resolution}"


# --------------------------------------------------------------------------------------------------
# The long-tail draw (Sec. 4.1)

def long_tail_counts(available: ArrayLike, ir: float) -> np.ndarray:
    """Class sizes n_max * IR^(-c / (C - 1)), rounded down, for c = 0 ... C - 1 (Cao et al., 2019).

    n_max is the largest whole number, at most N / C, for which every class c has the images that it
    needs (`available`, (C,)). Raises UserError where a class would be empty.
    """
    available = np.asarray(available)
    C = len(available)
    decay = np.array([(1 / ir) ** (c / (C - 1)) for c in range(C)])
    n_max = available.sum() // C
    while n_max and ((n_max * decay).astype(int) > available).any():
        n_max -= 1
    counts = (n_max * decay).astype(int)
    if counts.min() < 1:
        raise UserError(f"--ir {ir:g}: the smallest of {C} classes would have no image; take an "
                        f"--ir below {n_max}")
    return counts


def long_tail(labels: ArrayLike, ir: float, seed: int = 0) -> np.ndarray:
    """Ascending rows of the long-tailed subset, exactly those of Cao et al. (2019).

    Class by class: RandomState(seed).shuffle, then the first n_c. labels (N,), ir = N_max / N_min
    >= 1. NumPy's global generator is not used.
    """
    labels = np.asarray(labels)
    rng = np.random.RandomState(seed)
    rows = []
    for c, n in enumerate(long_tail_counts(np.bincount(labels), ir)):
        members = np.flatnonzero(labels == c)
        rng.shuffle(members)
        rows.append(members[:n])
    return np.sort(np.concatenate(rows))


def load_long_tailed(args: Namespace, ckpt: Checkpoint | None = None) -> ImageSet:
    """The training set that the data flags describe: `load`, then `long_tail` unless IR is 1.

    ckpt: the checkpoint that a run goes on or starts from, in whose order the classes stay.
    """
    order = args.class_order
    if order is None and ckpt:
        order = ckpt["data"]["class_names"]
    images = load(args.dataset, args.data_dir, "train", args.resolution, order, args.pack_dir)
    empty = [images.class_names[c] for c in np.flatnonzero(images.counts == 0)]
    if empty:
        raise UserError(f"--dataset {args.dataset}: class {empty[0]} has no training images; its "
                        "reader must leave it out")
    if args.ir == 1:
        return images
    return images.take(long_tail(images.labels, args.ir, args.tail_seed))


def folders_of(config: dict, data_dir: str | Path | None = None,
               pack_dir: str | Path | None = None) -> tuple[str | Path, str | Path | None]:
    """(data_dir, pack_dir): what is given, else those of a checkpoint's settings, where they exist.

    A folder that a checkpoint names may be another machine's, and is not made here.
    """
    own = {key: config.get(key) for key in ("data_dir", "pack_dir")}
    there = {key: path for key, path in own.items() if path and Path(path).is_dir()}
    return data_dir or there.get("data_dir", "data"), pack_dir or there.get("pack_dir")


def training_images(ckpt: Checkpoint, data_dir: str | Path | None = None) -> ImageSet:
    """The long-tailed set that a checkpoint was trained on. Raises UserError for another one.

    data_dir: where data sets are; None for where they were in training.
    """
    data_dir, pack_dir = folders_of(ckpt["config"], data_dir)
    images = load_long_tailed(
        Namespace(**{**ckpt["config"], "data_dir": data_dir, "pack_dir": pack_dir}), ckpt)
    record = images.record()
    if any(record[key] != ckpt["data"][key] for key in ("class_counts", "class_names")):
        raise UserError(f"--data-dir {data_dir}: not the images that --ckpt was trained on")
    refuse_other_source(images, ckpt["data"], data_dir)
    return images


def refuse_other_source(images: ImageSet, old: dict, data_dir: str | Path) -> None:
    """Raise UserError where a checkpoint was trained on other images of the same data set.

    images: the split that it was trained on, or another one, of which it has no record.
    old: the record of the training data.
    """
    provenance = old.get("provenance", {})          # of others' samples not known
    same_split = all(images.provenance.get(key) == provenance.get(key)
                     for key in ("dataset", "split"))
    if same_split and old["sha256"] and images.sha256 != old["sha256"]:
        raise UserError(f"--data-dir {data_dir}: not the images of the set that the checkpoint was "
                        "trained on; name the folder where those are")


# --------------------------------------------------------------------------------------------------
# Classes: their groups, their order, their names

def class_groups(counts: ArrayLike) -> dict[str, list[int]]:
    """{"Many": classes, "Medium": ..., "Few": ...} by size (Sec. 4.1).

    A third of the classes each; the rest of the division goes to Few. counts (C,), ties by class
    number; the lists are ascending. Fewer than three classes have no groups: {}.
    """
    if len(counts) < 3:
        return {}
    order = np.argsort(-np.asarray(counts), kind="stable")
    third = len(counts) // 3
    parts = {"Many": order[:third], "Medium": order[third:2 * third], "Few": order[2 * third:]}
    return {name: sorted(int(c) for c in classes) for name, classes in parts.items()}


def by_size(data: dict) -> list[str] | None:
    """The class names of a training set's record, the most populous first; None for no record."""
    if not {"class_counts", "class_names"} <= set(data):
        return None
    order = np.argsort(-np.array(data["class_counts"]), kind="stable")
    return [data["class_names"][c] for c in order]


def order_of(class_order: str | list[str] | None, class_names: list[str], source: Source,
             counts: list[int]) -> list[int]:
    """The numbers of all classes, the most populous first.

    class_order: what --class-order says of each class, by names or numbers; a list of names, of a
    checkpoint; or None for the order of the set's `source`. Classes that such a list lacks follow
    as they are numbered. counts (C,): images of each class. Raises UserError where --class-order
    does not name each class once.
    """
    if class_order is None and source.by_size:
        return np.argsort(-np.asarray(counts), kind="stable").tolist()
    C = len(class_names)
    if isinstance(class_order, str):
        order = resolve_classes(class_order, class_names, "--class-order", counts)
        if sorted(order) != list(range(C)):
            raise UserError(f"--class-order: name each of the {C} classes once, the most populous "
                            "first")
        return order
    numbers = {name: c for c, name in enumerate(class_names)}
    known = [numbers[name] for name in class_order or source.order if name in numbers]
    return known + sorted(set(range(C)) - set(known))


def resolve_classes(text: str, class_names: list[str], flag: str = "--classes",
                    counts: ArrayLike | None = None) -> list[int]:
    """Class numbers from a string such as "0-2,7" or 'cat,"ducks, geese"', in the order given.

    A name by itself needs no quotes. counts (C,): images of each class, for the message. Raises
    UserError that names `flag`: also for a word that is one class's name and another's number.
    """
    text = normalize("NFC", str(text))
    words = next(csv.reader([text], skipinitialspace=True)) or [""]
    result = []
    for word in [text] if text in class_names else map(str.strip, words):
        named = [class_names.index(word)] if word in class_names else []
        found = re.fullmatch("([0-9]{1,9})(?:-([0-9]{1,9}))?", word)
        numbered = range(int(found[1]), int(found[2] or found[1]) + 1) if found else []
        if named and numbered and named != list(numbered):
            raise UserError(f"{flag} {text}: {word} is the name of class number {named[0]}, and a "
                            f"number, too; write {named[0]}-{named[0]}, or {word}-{word}")
        chosen = named or numbered
        if not chosen or chosen[-1] >= len(class_names):
            known = class_names if counts is None else [
                f"{name} ({n:,})" for name, n in zip(class_names, counts)]
            more = f" and {len(known) - 12:,} more" if len(known) > 12 else ""
            raise UserError(f"{flag} {text}: {word!r} is none of the classes; write names (in "
                            "double quotes where they have commas), numbers from 0 to "
                            f"{len(known) - 1}, or ranges like 6-9. There are "
                            f"{', '.join(known[:12])}{more}")
        result.extend(chosen)
    return result


def to_classes(labels: np.ndarray | None, from_names: list[str] | None,
               to_names: list[str] | None, flag: str) -> np.ndarray | None:
    """Labels renumbered from one list of class names to another.

    None for labels or names that are not known. Raises UserError, which names the flag, for a class
    that is not in the list and a label that is none.
    """
    if labels is None or to_names is None:
        return labels
    C = len(from_names or to_names)
    if len(labels) and not 0 <= labels.min() <= labels.max() < C:
        raise UserError(f"{flag}: labels run from {labels.min()} to {labels.max()}; the {C} "
                        f"classes are 0 to {C - 1}")
    if from_names is None or from_names == to_names:
        return labels
    missing = [n for n in from_names if n not in to_names]
    if missing:
        known = ", ".join(to_names[:5])
        raise UserError(f"{flag}: its class {missing[0]} is not one of the {len(to_names)} to "
                        f"compare with ({known} ...)")
    return np.array([to_names.index(n) for n in from_names])[labels]


def note_on_num(num: int, C: int, flag: str) -> str:
    """A note where there are few images for each of C classes, else "". num: of them all.

    Raises UserError, which names the flag, where there are fewer than classes: the first images are
    then of the first classes only.
    """
    if num < C:
        raise UserError(f"{flag} {num}: fewer images than the {C} classes, and then of the first "
                        f"ones only; take {C} or more")
    return f"note: {num:,} images are {num // C} of a class; take more" if num < 5 * C else ""


# --------------------------------------------------------------------------------------------------
# The real images that samples are measured against

def is_balanced(counts: ArrayLike) -> bool:
    """Whether classes of these sizes count equally as they are: the one rule of the reference.

    The largest has at most 1.5 times the images of the smallest. Elsewhere the metrics weigh the
    classes (scores.weights_of), or take equally many of each (equal_rows).
    """
    return max(counts) <= 1.5 * min(counts)


def equal_rows(labels: np.ndarray) -> np.ndarray:
    """Rows of as many images of each class as the smallest has; of all where these are balanced.

    labels (N,): the classes are those that occur. The choice is always the same.
    """
    _, labels, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if is_balanced(counts):
        return np.arange(len(labels))
    order = np.random.RandomState(0).permutation(len(labels))
    shuffled = labels[order]
    rows = [order[shuffled == c][:counts.min()] for c in range(len(counts))]
    return np.sort(np.concatenate(rows))


def load_reference(name: str, data_dir: str | Path = "data", split: str | None = None,
                   resolution: int | None = None, pack_dir: str | Path | None = None,
                   trained_on: dict | None = None) -> tuple[ImageSet, str]:
    """The real images that samples are measured against: (ImageSet, what it is in words).

    split: "train", "test", or None for the set's own choice: the training set, or (ImageNet-LT,
    iNaturalist, a folder that has one) the test set. All of its images, see is_balanced.
    trained_on: the record of the training data. Raises UserError where these were others, and where
    a class is empty.
    """
    chosen = split or (READERS[name].reference if name in READERS else "train")
    try:
        images = load(name, data_dir, chosen, resolution, None, pack_dir)
    except NoSuchSplit:
        if split:
            raise
        chosen = "train"
        images = load(name, data_dir, chosen, resolution, None, pack_dir)
    if trained_on:
        refuse_other_source(images, trained_on, data_dir)
    words = {"train": "training set", "test": "test set"}[chosen]
    if not images.counts.min():
        empty = images.class_names[int(np.argmin(images.counts))]
        raise UserError(f"--data-dir {data_dir}: class {empty} has no image in the {words}")
    return images, "full " + words


def reference_images(ckpt: Checkpoint, data_dir: str | Path | None = None,
                     split: str | None = None) -> tuple[ImageSet, np.ndarray, str]:
    """equal_rows of load_reference: (images, labels (N,) in a checkpoint's classes, the words).

    data_dir: where data sets are; None for where they were in training. split: as there. Raises
    UserError for a data set with other images, or classes, than in training.
    """
    data = ckpt["data"]
    data_dir, pack_dir = folders_of(ckpt["config"], data_dir)
    images, words = load_reference(data["dataset"], data_dir, split, data["resolution"], pack_dir,
                                   data)
    if not is_balanced(images.counts):
        images = images.take(equal_rows(images.labels))
        words = f"{images.counts[0]} images of each class of the {words}"
    labels = to_classes(images.labels, images.class_names, data["class_names"], "--data-dir")
    return images, labels, f"{data['dataset']}, {words}"


# --------------------------------------------------------------------------------------------------
# Images as numbers, and the training batches

def to_float(images: Tensor) -> Tensor:
    """uint8 (N, H, W, C) in 0 ... 255 -> float32 (N, C, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_uint8(x: Tensor) -> Tensor:
    """float (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C), clipped and rounded (not truncated)."""
    pixels = x.float().add(1).mul(127.5).round().clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).contiguous()


def to_rgb(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 1 or 3) -> (N, H, W, 3), grey repeated."""
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images


def device_limit(device: torch.device | str) -> int:
    """How many bytes of training data go to a device: a quarter of CUDA's free memory, or 4 GiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    return 4 << 30


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; from the CPU's memory to a GPU's so that neither waits for the copy."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Batches:
    """The training batches: `at(step)` is a pure function of (seed, step); no state to save.

    Step s takes positions s B ... (s + 1) B - 1 of an endless sequence of epochs, each a
    permutation of all images seeded by (seed, epoch). The images are copied to `device` if they
    take at most device_limit's bytes, else they stay where they are.
    resample Q (+RS): class c is drawn with probability proportional to N_c^Q instead, with
    replacement: 0 balances the classes, 0.5 takes square roots, 1 changes nothing.
    """

    def __init__(self, images: ImageSet, batch_size: int, seed: int, device: torch.device | str,
                 resample: float = 1.0):
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.on_device = images.images.nbytes <= device_limit(device)
        self.pixels = images.images
        if self.on_device:
            self.pixels = torch.from_numpy(np.array(images.images)).to(device)
        self.labels = torch.from_numpy(images.labels).to(device)
        self.orders = {}
        self.weights = None
        if resample != 1:
            # Of an image: N_c^Q / N_c
            weights = images.counts[images.labels].astype(float) ** (resample - 1)
            self.weights = weights / weights.sum()

    def order(self, epoch: int) -> np.ndarray:
        """The rows of one epoch, (N,): a permutation, or drawn by weight; the last two are kept."""
        if epoch not in self.orders:
            self.orders = {e: o for e, o in self.orders.items() if e == epoch - 1}
            rng = np.random.default_rng(seed_of(self.seed, "epoch", epoch))
            N = len(self.labels)
            if self.weights is None:
                self.orders[epoch] = rng.permutation(N)
            else:
                self.orders[epoch] = rng.choice(N, N, p=self.weights)
        return self.orders[epoch]

    def rows(self, step: int) -> np.ndarray:
        """Which images step `step` takes: (B,) int64."""
        N = len(self.labels)
        first = step * self.batch_size
        positions = np.arange(first, first + self.batch_size)
        epochs = range(first // N, (first + self.batch_size - 1) // N + 1)
        parts = [self.order(e)[positions[positions // N == e] % N] for e in epochs]
        return np.concatenate(parts)

    def take(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The images of these rows as they are stored, and their labels, on the device."""
        index = send(torch.from_numpy(rows), self.device)
        if self.on_device:
            pixels = self.pixels[index]
        else:
            pixels = send(torch.from_numpy(self.pixels[rows]), self.device)
        return pixels, self.labels[index]

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """The global batch of a step: x_0 (B, C, H, W) float32 in [-1, 1], y (B,) int64."""
        pixels, y = self.take(self.rows(step))
        return to_float(pixels), y


# --------------------------------------------------------------------------------------------------

def add_data_flags(parser: Parser, dataset: str = "cifar100", ir: float | None = None):
    """The flags that choose the data, the same in every script; the defaults of two of them."""
    g = parser.add_argument_group("data")
    g.add_argument("--dataset", default=dataset,
                   help=f"one of {', '.join(READERS)} (default: {dataset})")
    g.add_argument("--data-dir", default="data",
                   help="where data sets are, or go; folder: the images, one sub-folder per class "
                   "(default: data)")
    g.add_argument("--pack-dir", help="where packed arrays go (default: DATA_DIR/packed; folder: "
                   "data/packed)")
    g.add_argument("--resolution", type=integer(1),
                   help="pixels per side (default: the set's own; folder: 64)")
    known = f" (default: {ir:g})" if ir else ""
    g.add_argument("--ir", type=number(low=1), default=ir,
                   help="imbalance ratio N_max / N_min; 1: every image, as it is" + known)
    g.add_argument("--tail-seed", type=integer(0, 2**32 - 1), default=0, metavar="SEED",
                   help="seed of the long-tail draw (default: 0, Cao et al.)")
    g.add_argument("--class-order", help="classes, the most populous first: names or numbers with "
                   "commas (default: the set's own; folder: by size)")
    return g


def data_flags(config: dict) -> list[str]:
    """The flags with which another script takes the data set of these settings."""
    return ["--dataset", config["dataset"], "--data-dir", config["data_dir"]]


def unused_data_flags(args: Namespace) -> dict[str, str]:
    """{flag: why it does nothing}, of the data flags beside each other."""
    return {"tail_seed": "--ir 1 takes every image, and draws none"} if args.ir == 1 else {}


def main():
    """Pack a data set and print its class sizes; or, after "split", divide a folder."""
    if sys.argv[1:2] == ["split"]:
        return splits.main(sys.argv[2:])
    parser = Parser(__doc__)
    add_data_flags(parser, ir=1)
    args = parser.parse_args()
    refuse_unused(parser.given, unused_data_flags(args))
    images = load_long_tailed(args)
    print(images.table())
    print_next("train.py", *sys.argv[1:])


if __name__ == "__main__":
    run(main)
