"""Data sets as one packed uint8 array, the long-tail draw, the Many / Medium / Few splits, and the batches.

    images = load("cifar100", "data")               # downloads, packs once to data/packed/, memory-maps
    subset = images.take(long_tail(images.labels, ir=100))      # Sec. 4.1: 10,847 of 50,000 images
    x_0, y = Batches(subset, 64, seed=0, device="cpu").at(step=0)

`python data.py --dataset cifar100 --ir 100` packs the set and prints the class counts.
A new data set is one function that returns (images N x H x W x C uint8, labels (N,), class names): see READERS.
"""
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from runtime import Parser, UserError, integer, number, run, seed_of, write_atomic, write_json


# ----------------------------------------------------------------------------------------------------------------------
# Readers: reader(data_dir, split) -> images (N, H, W, C) uint8, labels (N,) int, class names

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


@dataclass(frozen=True)
class Source:
    """How a data set is read and what is natural for it."""
    read: callable
    resolution: int
    flip: bool          # whether a mirrored image is as good: never for digits


READERS = {
    "digits": Source(read_digits, 8, False),
    "cifar10": Source(lambda data_dir, split: read_cifar(data_dir, split, 10), 32, True),
    "cifar100": Source(lambda data_dir, split: read_cifar(data_dir, split, 100), 32, True),
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


def load(name, data_dir="data", split="train", resolution=None, class_order=None):
    """Read a data set, packing it on first use; raises UserError that names the flag.

    split: "train" or "test". resolution: None for the set's own. class_order: names or numbers of all classes, the
    most populous first; class i of the result is the i-th of them, so that the long-tail draw follows that order.
    """
    if name not in READERS:
        raise UserError(f"--dataset {name}: unknown; choose one of {', '.join(READERS)}")
    source = READERS[name]
    if resolution not in (None, source.resolution):
        raise UserError(f"--resolution {resolution}: {name} is {source.resolution} x {source.resolution}")
    base = Path(data_dir) / "packed" / f"{name}-{split}-{source.resolution}"
    packed = read_pack(base)
    if packed is None:
        write_pack(base, *source.read(data_dir, split), {"dataset": name, "split": split})
        packed = read_pack(base)
    images, meta = packed
    labels, names = np.array(meta["labels"]), meta["class_names"]
    if class_order is not None:
        order = resolve_classes(class_order, names, "--class-order")
        if sorted(order) != list(range(len(names))):
            raise UserError(f"--class-order: name each of the {len(names)} classes once, the most populous first")
        labels, names = np.argsort(order)[labels], [names[c] for c in order]
    return ImageSet(name, images, labels, names, source.flip, meta["provenance"])


def write_pack(base, images, labels, class_names, provenance):
    """Write base.npy (the images) and base.json (labels, class names, provenance): the JSON last, as the seal."""
    def write_images(path):
        with open(path, "wb") as f:
            np.save(f, np.ascontiguousarray(images, dtype=np.uint8))
    write_atomic(base.with_name(base.name + ".npy"), write_images, "--data-dir")
    counts = np.bincount(labels, minlength=len(class_names)).tolist()
    write_json(base.with_name(base.name + ".json"), {
        "shape": list(images.shape), "class_names": list(class_names), "class_counts": counts,
        "provenance": provenance, "labels": np.asarray(labels).tolist()}, "--data-dir")


def read_pack(base):
    """(images as a memory map, the JSON) of a pack, or None where it is missing or not whole."""
    try:
        meta = json.loads(base.with_name(base.name + ".json").read_text())
        images = np.load(base.with_name(base.name + ".npy"), mmap_mode="r")
        return (images, meta) if list(images.shape) == meta["shape"] else None
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
            result.extend(range(int(first), int(last or first) + 1))
        else:
            raise UserError(f"{flag} {text}: {word!r} is neither a class number, nor a range like 6-9, nor a class name")
    if not result or max(result) >= len(class_names):
        raise UserError(f"{flag} {text}: classes are 0 to {len(class_names) - 1}")
    return result


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
    """

    def __init__(self, images, batch_size, seed, device, limit=4 << 30):
        self.images, self.batch_size, self.seed, self.device = images, batch_size, seed, device
        self.on_device = images.images.nbytes <= limit
        self.pixels = torch.from_numpy(np.array(images.images)).to(device) if self.on_device else images.images
        self.labels = torch.from_numpy(images.labels).to(device)
        self.orders = {}

    def order(self, epoch):
        """The permutation of one epoch, (N,) int64 on the CPU; the last two are kept."""
        if epoch not in self.orders:
            self.orders = {e: o for e, o in self.orders.items() if e == epoch - 1}
            rng = np.random.default_rng(seed_of(self.seed, "epoch", epoch))
            self.orders[epoch] = rng.permutation(len(self.labels))
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


def add_data_flags(parser):
    """The flags that choose the data, the same in every script that reads a data set."""
    g = parser.add_argument_group("data")
    g.add_argument("--dataset", default="cifar100", help=f"one of {', '.join(READERS)} (default: cifar100)")
    g.add_argument("--data-dir", default="data", help="where data sets are, or are downloaded to, and packed (default: data)")
    g.add_argument("--resolution", type=integer(1), help="pixels a side (default: the set's own)")
    g.add_argument("--ir", type=number(low=1), help="imbalance ratio N_max / N_min, 1 for balanced")
    g.add_argument("--split-seed", type=integer(0), default=0, help="seed of the long-tail draw (default: 0, Cao et al.)")
    g.add_argument("--class-order", help="classes, the most populous first: names or numbers with commas (default: as is)")
    return g


def load_long_tailed(args):
    """The training set that these flags describe: `load`, then `long_tail` unless --ir is 1."""
    images = load(args.dataset, args.data_dir, "train", args.resolution, args.class_order)
    return images if args.ir == 1 else images.take(long_tail(images.labels, args.ir, args.split_seed))


def main():
    parser = Parser(__doc__)
    add_data_flags(parser).set_defaults(ir=1)
    args = parser.parse_args()
    images = load_long_tailed(args)
    print(images.summary())
    for name, classes in splits(images.counts).items():
        print(f"  {name}: {len(classes)} classes, {images.counts[classes].sum():,} images")


if __name__ == "__main__":
    run(main)
