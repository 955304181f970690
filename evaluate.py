"""Measure images against real ones: FID, KID, precision, recall and IS, overall, per split and per class.

    python evaluate.py --ckpt out/NAME/ckpt.pt                              # the paper's protocol: draws, then measures
    python evaluate.py --samples A --reference B                            # anyone's images: .npz, folders, data sets
    python evaluate.py --samples cifar10:test --reference cifar10 --save-stats cifar10.npz      # the reference, once

Protocol (Sec. 4.1): 50,000 class-balanced images against the balanced full training set; per split, 20,000 images of
its classes against its real images. Features are those of Inception (inception.py), so numbers are FID, KID and IS as
torch-fidelity computes them; on digits, or with --features FILE, those of a classifier, and the Frechet distance and
the kernel distance are then named FD and KD: never FID.
"""
import shlex
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import scipy
import torch
from PIL import Image

import runtime
from classify import features_and_logits, load_classifier
from data import load_reference, splits, to_classes, to_float
from inception import load_inception
from metrics import (IS_SPLITS, KID_SIZE, KID_SUBSETS, METRIC_SEED, distance_of, floor_of, inception_score, kernel_distance,
                     precision_recall)
from readers import IMAGE_FILES, READERS
from runtime import Parser, UserError, integer, run
from sample import DEFAULTS, add_sampling_flags, describe, draw, dtype_of, generate, load_network, sampling_settings

PROTOCOL = {"paper": {"num": 50_000, "num_split": 20_000, "features": "inception"},
            "digits": {"num": 2000, "num_split": 0, "features": "out/classifier-digits/ckpt.pt"}}
FEW = 2048                  # below so many images a Frechet distance says more about their number than about them


# ----------------------------------------------------------------------------------------------------------------------
# Images to measure

class Images:
    """A set of images to measure: `at(rows)` gives uint8 (n, H, W, 3), n of them in all; labels (n,) and class_names, or None.

    features: (features (n, D), logits (n, K)) where --save-stats kept them, and then there is no `at`. about: plain facts
    that go into the result's settings.
    """

    def __init__(self, at, n, labels=None, class_names=None, features=None, **about):
        self.at, self.n, self.class_names, self.features, self.about = at, n, class_names, features, about
        self.labels = None if labels is None else np.asarray(labels)


def rgb(images):
    """uint8 (N, H, W, 1 or 3) -> (N, H, W, 3)."""
    return np.repeat(images, 3, 3) if images.shape[3] == 1 else images


def read_npz(path, flag):
    """An .npz of images (arr_0, perhaps labels in arr_1), or a file of --save-stats; the JSON beside it if there is one."""
    try:
        with np.load(path) as f:
            content = {k: f[k] for k in f.files}
    except (OSError, ValueError, KeyError, EOFError, runtime.zipfile.BadZipFile) as e:
        raise UserError(f"{flag} {path}: cannot be read as an .npz ({e})")
    if "features" in content and not {"about", "logits"} <= set(content):
        raise UserError(f"{flag} {path}: features without what --save-stats keeps beside them (logits, about); make it with --save-stats")
    if "features" in content:
        about = runtime.json.loads(str(content["about"]))
        names = about.pop("class_names")
        kept = content["features"], content["logits"]
        return Images(None, len(kept[0]), content.get("labels"), names, kept, **about)
    if "arr_0" not in content:
        raise UserError(f"{flag} {path}: has no arr_0; it must hold images N x H x W x 3 uint8, and perhaps labels in arr_1")
    images, labels = content["arr_0"], content.get("arr_1")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(f"{flag} {path}: arr_0 is {images.dtype} of shape {list(images.shape)}; it must be uint8, N x H x W x 3")
    if labels is not None and (labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer)):
        raise UserError(f"{flag} {path}: arr_1 must hold {len(images)} whole numbers, one label an image")
    record = runtime.read_record(path)
    return Images(lambda rows: rgb(images[rows]), len(images), labels, record.get("data", {}).get("class_names"),
                  sha256=runtime.sha256(path), **record)


def read_files(root, flag):
    """A folder of PNG or JPEG files of one size: flat, or one sub-folder a class (in alphabetical order)."""
    files = lambda folder: sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_FILES)
    folders = [f for f in sorted(root.iterdir()) if f.is_dir() and files(f)]
    paths = [p for f in folders for p in files(f)] if folders else files(root)
    if not paths:
        raise UserError(f"{flag} {root}: no images in it, and no sub-folders of images")
    labels = [c for c, f in enumerate(folders) for _ in files(f)] if folders else None
    names = [f.name for f in folders] or None
    if names and all(name[:4].isdigit() and name[4:5] == "-" for name in names):      # as sample.py --png writes them
        names = [name[5:] for name in names]

    def open_rgb(path):
        try:
            return np.asarray(Image.open(path).convert("RGB"))
        except OSError as e:
            raise UserError(f"{flag} {root}: {path} cannot be read as an image ({e})")
    shape = open_rgb(paths[0]).shape

    def at(rows):
        images = [open_rgb(paths[r]) for r in rows]
        for row, image in zip(rows, images):
            if image.shape != shape:
                raise UserError(f"{flag} {root}: {paths[row].name} has {image.shape[1]} x {image.shape[0]} pixels and "
                                f"{paths[0].name} {shape[1]} x {shape[0]}; bring them to one size first")
        return np.stack(images)
    return Images(at, len(paths), labels, names)


def read_set(text, flag, args, split=None, resolution=None):
    """What --samples or --reference names: an .npz, a folder, a data set (its balanced reference, or `split`)."""
    name, _, own_split = text.partition(":")
    if name in READERS:
        if own_split not in ("", "train", "test"):
            raise UserError(f"{flag} {text}: a data set's split is train or test, as in {name}:test")
        images, words = load_reference(name, args.data_dir, own_split or split, resolution, args.pack_dir)
        return Images(lambda rows: rgb(images.images[rows]), len(images.labels), images.labels, images.class_names, what=f"{name}, {words}")
    path = Path(text)
    if (path / "samples.npz").is_file():        # the folder of sample.py
        path = path / "samples.npz"
    if path.is_dir():
        return read_files(path, flag)
    if not path.exists():
        raise UserError(f"{flag} {text}: neither a file or folder nor a data set ({', '.join(READERS)})")
    return read_npz(path, flag)


def read_samples(path):
    """Images (N, H, W, 3) uint8, labels (N,) and the JSON beside an .npz of sample.py. Raises UserError."""
    images = read_npz(path, "--samples")
    if "settings" not in images.about:
        raise UserError(f"--samples {path}: the .json that sample.py writes beside it is missing")
    return images.at(slice(None)), images.labels, images.about


def pool_sizes(num, num_split, groups, C):
    """Images a class, (C,), so that all classes together give `num` and every split at least `num_split`, balanced.

    The overall number is measured on the first num / C of each class. Paper, CIFAR-100: 607 a class in Many and
    Medium (33 classes), 589 in Few (34).
    """
    sizes = np.full(C, -(-num // C))
    for classes in groups.values():
        sizes[classes] = np.maximum(sizes[classes], -(-num_split // len(classes)))
    return sizes


def pool_of(sizes):
    """(labels, image numbers) of a pool: the j-th image of class c is number j C + c, whatever the other sizes."""
    C = len(sizes)
    members = [(c, j * C + c) for j in range(max(sizes)) for c in range(C) if j < sizes[c]]
    return [c for c, _ in members], [i for _, i in members]


# ----------------------------------------------------------------------------------------------------------------------
# Features

class Extractor:
    """Features and logits of images by a network in eval mode: Inception, or a classifier of classify.py."""

    def __init__(self, features, args, rt):
        self.rt, self.inception, self.batch_size = rt, features == "inception", args.features_batch_size
        if self.inception:
            self.net, self.sha256 = load_inception(args.inception_weights, rt.device, args.trust_weights)
            self.name, self.channels = "inception-2015-12-05", 3
        else:
            if not Path(features).is_file():
                raise UserError(f"--features {features}: there is no such file; make one with: python classify.py --dataset NAME")
            self.net, ckpt = load_classifier(features, rt.device)
            self.name, self.sha256, self.channels = str(features), runtime.sha256(features), ckpt["network"]["channels"]
        self.class_names = None if self.inception else ckpt["data"]["class_names"]
        self.size = None if self.inception else ckpt["data"].get("resolution")         # Inception brings images to its own

    @torch.no_grad()
    def batch(self, images):
        """uint8 (n, H, W, 3) -> features (n, D) and logits (n, K), float32 NumPy."""
        if self.size not in (None, images.shape[1]):
            raise UserError(f"--features {self.name}: this classifier was trained on images of {self.size} pixels a side, and these have "
                            f"{images.shape[1]}; train one with --resolution {images.shape[1]}, or measure images of its size")
        if self.channels == 1:
            if (images != images[..., :1]).any():
                raise UserError("--features: this classifier takes grey images, and these are in colour")
            images = images[..., :1]
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self.rt.device)
        features, logits = self.net(x.permute(0, 3, 1, 2)) if self.inception else features_and_logits(self.net, to_float(x))
        return features.float().cpu().numpy(), logits.float().cpu().numpy()

    def of(self, images, title):
        """Features and logits of an Images: those that it came with, or extracted."""
        return images.features or self(images.at, images.n, title)

    def __call__(self, at, n, title, shared=True):
        """Features and logits of images at(rows), rows 0 ... n - 1, each process a share; gathered on rank 0.

        shared: False where every process has images of its own, numbered from 0 in each.
        """
        rows = np.array_split(np.arange(n), self.rt.world)[self.rt.rank] if shared else np.arange(n)
        features, logits = [], []
        with runtime.progress(total=len(rows), desc=title, unit="img", disable=self.rt.rank > 0) as bar:
            for part in np.array_split(rows, max(1, -(-len(rows) // self.batch_size))):
                if len(part):
                    f, z = self.batch(at(part))
                    features.append(f)
                    logits.append(z)
                    bar.update(len(part))
        return self.rt.gather(features), self.rt.gather(logits)


# ----------------------------------------------------------------------------------------------------------------------
# Which rows are measured together

def rank_in_class(labels):
    """For each image, how many of its class come before it: (N,)."""
    order, ranks = np.argsort(labels, kind="stable"), np.empty(len(labels), int)
    counts = np.bincount(labels)
    ranks[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def measure(fake, real, names, k, device, score=False, named=None):
    """The numbers of one group of images; fake and real are (features, logits, labels or None).

    score: also the IS. named: for each of a classifier's outputs the class that it stands for, for the accuracy; or None.
    """
    result = {names["fid"]: distance_of(fake[0], real[0])}
    result[names["kid"]], result[names["kid"] + "_std"], result["kid_subset_size"] = kernel_distance(fake[0], real[0])
    result["precision"], result["recall"] = precision_recall(fake[0], real[0], k, device=device)
    if score:
        result["is"], result["is_std"] = inception_score(fake[1])
    if named is not None and fake[2] is not None:
        result["accuracy"] = float((named[fake[1].argmax(1)] == fake[2]).mean())
    return {**result, "num": len(fake[0]), "num_real": len(real[0])}


def measure_all(fake, real, groups, classes, num, inception, k, device, rounds, named=None):
    """All numbers: overall on num images, the first ones of each class, per split and class on all there are, and floors.

    fake, real: (features, logits, labels). groups: {split: classes}; classes: {name: class}; rounds: of floor_of; named:
    as in `measure`. A group of fewer than two images on either side has no distance and is left out.
    """
    names = {"fid": "fid", "kid": "kid"} if inception else {"fid": "fd", "kid": "kd"}

    def part(data, rows):
        return tuple(None if x is None else x[rows] for x in data)
    everything = slice(None)
    if fake[2] is not None:
        everything = np.sort(np.argsort(rank_in_class(fake[2]), kind="stable")[:num])       # no class more than one ahead
        mine = np.isin(real[2], fake[2]) if real[2] is not None else slice(None)
    else:
        everything, mine = slice(0, num), slice(None)
    if num == len(fake[0]):
        everything = slice(None)
    jobs = [("overall", None, everything, mine)]
    if real[2] is not None and fake[2] is not None:
        for kind, sets in (("splits", groups), ("classes", {n: [c] for n, c in classes.items()})):
            jobs += [(kind, n, np.isin(fake[2], c), np.isin(real[2], c)) for n, c in sets.items() if np.isin(c, fake[2]).all()]
    jobs = jobs[:1] + [job for job in jobs[1:] if min(job[2].sum(), job[3].sum()) > 1]
    result = {"splits": {}, "classes": {}}
    for kind, name, rows, reals in runtime.progress(jobs, desc="metrics", unit="group"):
        numbers = measure(part(fake, rows), part(real, reals), names, k, device, inception and kind == "overall", named)
        if rounds:
            numbers["floor"] = floor_of(real[0][reals], rounds)
        if kind == "overall":
            result = {**numbers, **result}
        else:
            result[kind][name] = numbers
    return result


def thousands(n):
    """50000 -> "50k", 16500 -> "16.5k", 1488 -> "1,488"."""
    return f"{n / 1000:g}k" if n >= 1000 and n % 100 == 0 else f"{n:,}"


def print_result(result):
    """One line a group; every metric names the number of images it was measured on."""
    rows = {"overall": result, **result["splits"], **result["classes"]}
    width, count = max(map(len, rows)), max(len(thousands(r["num"])) for r in rows.values())
    for name, r in rows.items():
        frechet, kernel = ("fid", "kid") if "fid" in r else ("fd", "kd")
        n = thousands(r["num"]).rjust(count)
        words = [f"{frechet.upper()} ({n}) {r[frechet]:8.3f}", f"{kernel.upper()} ({n}) {r[kernel]:.5f} +- {r[kernel + '_std']:.5f}",
                 f"precision ({n}) {r['precision']:.3f}", f"recall ({n}) {r['recall']:.3f}"]
        words += [f"IS ({n}) {r['is']:.3f} +- {r['is_std']:.3f}"] if "is" in r else []
        words += [f"accuracy ({n}) {r['accuracy']:.1%}"] if "accuracy" in r else []
        print(f"{name:<{width}}  " + "  ".join(words))
    small = [name for name, r in rows.items() if min(r["num"], r["num_real"]) < FEW]
    if small:
        print(f"warning: {', '.join(small[:6])}{' ...' * (len(small) > 6)}: fewer than {FEW:,} images on one side; a Frechet distance "
              f"is then biased upwards and compares only with one of equal counts; KID is not biased")
    reduced = {r["kid_subset_size"] for r in rows.values()} - {KID_SIZE}
    if reduced:
        print(f"note: KID's subsets are of {', '.join(map(str, sorted(reduced)))} images instead of {KID_SIZE:,} where there are fewer")


# ----------------------------------------------------------------------------------------------------------------------

def make_parser():
    """All flags."""
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", help="a checkpoint: draw the images that the protocol needs")
    source.add_argument("--samples", help="an .npz (arr_0 N x H x W x 3 uint8, perhaps labels in arr_1), a folder of images "
                        "(flat, or one folder a class), a data set's name (also NAME:test), or a file of --save-stats")
    g = parser.add_argument_group("protocol")
    g.add_argument("--reference", help="the same kinds of things (default: the balanced images of the set that was trained on)")
    g.add_argument("--reference-split", choices=("train", "test"), help="of a data set as --reference; the same as writing NAME:test "
                   "(default: full training set; folder: test images, else equally many of each class)")
    g.add_argument("--data-dir", help="where data sets are (default: the checkpoint's, or data)")
    g.add_argument("--pack-dir", help="where packed arrays are (default: the checkpoint's, or packed in --data-dir)")
    g.add_argument("--features", help='"inception", or a checkpoint of classify.py (default: inception; digits: '
                   "out/classifier-digits/ckpt.pt)")
    g.add_argument("--inception-weights", metavar="FILE", help="weights-inception-2015-12-05-6726825d.pth (default: from "
                   "torch.hub's cache, or downloaded there)")
    g.add_argument("--trust-weights", action="store_true", help="take Inception weights with another hash")
    g.add_argument("--features-batch-size", type=integer(1), default=64, help="images at a time in the extractor (default: 64)")
    g.add_argument("--num", type=integer(2), help="class-balanced images overall (default: 50,000; digits: 2,000; or all there are)")
    g.add_argument("--num-split", type=integer(0), help="images a split, at least (default: 20,000; with --num, and on digits: what "
                   "--num gives)")
    g.add_argument("--per-class", action="store_true", help="also each class by itself")
    g.add_argument("--floor", type=integer(0), default=0, metavar="R", help="also the Frechet distance between random halves of the "
                   "reference, the mean of R halvings (default: 0, none)")
    g.add_argument("--k", type=integer(1), default=3, help="neighbours in precision and recall (default: 3)")
    add_sampling_flags(parser)
    parser.add_argument("--save-stats", metavar="FILE", help="keep the reference's features in FILE, for a later --reference FILE")
    parser.add_argument("--out-json", help="the numbers and every setting that moves them (default: eval.json in --out)")
    parser.add_argument("--if-needed", action="store_true", help="do nothing where --out-json was made with these settings")
    parser.add_common("folder of eval.json (default: beside --ckpt or --samples)")
    return parser


def estimate(extractor, n_fake, n_real, net, ckpt, settings, args, rt):
    """Seconds that sampling and features will take, from a few images of each."""
    n = min(args.batch_size, 8) if rt.device.type == "cpu" else args.batch_size
    total = 0.0
    if net is not None:
        y, shape = torch.zeros(n, dtype=torch.int64, device=rt.device), (ckpt["network"]["channels"],) + (ckpt["data"]["resolution"],) * 2
        for _ in range(2):                      # the first call warms up
            start = time.time()
            draw(net, y, range(n), shape, rt, **{**settings, "steps": 1, "grid": "uniform"}).sum().item()
        total += (time.time() - start) * settings["steps"] * n_fake / n
    size = ckpt["data"]["resolution"] if ckpt else extractor.size or 32
    images, m = np.zeros((args.features_batch_size, size, size, 3), np.uint8), args.features_batch_size
    if rt.device.type == "cpu":
        images, m = images[:8], min(8, m)
    for _ in range(2):
        start = time.time()
        extractor.batch(images)
    return (total + (time.time() - start) * (n_real + n_fake) / m) / rt.world


def duration(seconds):
    """"40 s", "25 min" or "3 h 20 min"."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def refuse_long_tailed(labels, text, class_counts):
    """Raise UserError where the reference is the long-tailed set that the model was trained on (Sec. 4.1: a balanced one)."""
    if class_counts is None or labels is None:
        return
    counts = np.bincount(labels, minlength=len(class_counts)).tolist()
    if counts == list(class_counts) and max(counts) > 1.5 * min(counts):
        raise UserError(f"--reference {text}: this is the long-tailed set that the model was trained on; the distance to it rewards "
                        f"the imbalance. Leave --reference out, or name balanced images")


def main():
    """What is measured, against what; say so; draw and extract; measure and write."""
    args = make_parser().parse_args()
    ckpt = runtime.load(args.ckpt, DEFAULTS) if args.ckpt else None
    rt = runtime.setup(args.device, dtype_of(args, ckpt) if ckpt else args.dtype)

    # What is measured
    net, settings, samples = None, None, None
    if args.ckpt:
        settings = sampling_settings(args, ckpt["kind"])
        net = load_network(ckpt, args.weights, args.branch, rt.device)
        data, made = ckpt["data"], describe(args, ckpt, settings)
        dataset, config = data["dataset"], ckpt["config"]
        args.data_dir, args.pack_dir = args.data_dir or config["data_dir"], args.pack_dir or config["pack_dir"]
    args.data_dir = args.data_dir or "data"
    if args.samples:
        with rt.rank_0_first():
            samples = read_set(args.samples, "--samples", args)
        data = samples.about.get("data", {})
        dataset = data.get("dataset", args.samples.partition(":")[0] if args.samples.partition(":")[0] in READERS else None)
        made = {"samples": args.samples, **samples.about.get("settings", samples.about)}
    reference_name = args.reference or dataset
    if reference_name is None:
        raise UserError("--reference: name what the samples are measured against: a data set, an .npz, a folder, or a file of --save-stats")
    class_names, class_counts = data.get("class_names"), data.get("class_counts")
    if args.samples and class_names is None:
        class_names = samples.class_names
    protocol = PROTOCOL.get(dataset or reference_name, PROTOCOL["paper"])
    num_split = args.num_split if args.num_split is not None else 0 if args.num else protocol["num_split"]

    # Against what, in which features
    resolution, source = data.get("resolution"), READERS.get(reference_name.partition(":")[0])
    if resolution is None and source and source.files and samples is not None and samples.at:
        resolution = samples.at(np.arange(1)).shape[1]          # images of any size are read at the samples'
    with rt.rank_0_first():
        reference = read_set(reference_name, "--reference", args, args.reference_split, resolution)
    theirs = reference.about["made_by"] if reference.features else protocol["features"]
    extractor = Extractor(args.features or ("inception" if theirs.startswith("inception") else theirs), args, rt)
    class_names = class_names or reference.class_names
    reference_labels = to_classes(reference.labels, reference.class_names, class_names, "--reference")
    refuse_long_tailed(reference_labels, reference_name, class_counts)
    for flag, kept in (("--reference", reference), ("--samples", samples)):
        if kept is not None and kept.features and kept.about["features_sha256"] != extractor.sha256:
            raise UserError(f"{flag}: its features were made by {kept.about['made_by']}, not by {extractor.name}")
    C = len(class_names) if class_names else None
    groups = splits(class_counts if class_counts else np.arange(C, 0, -1)) if C else {}

    if args.ckpt:
        num = args.num or protocol["num"]
        labels, indices = pool_of(pool_sizes(num, num_split, groups, C))
        n_fake, labels = len(labels), np.array(labels)
    else:
        labels = to_classes(samples.labels, samples.class_names, class_names, "--samples")
        n_fake = samples.n
        num = min(args.num or n_fake, n_fake)
        if n_fake < 2:
            raise UserError(f"--samples {args.samples}: one image only; a distance needs many")
    reference_words = reference.about.get("what", reference_name)
    record = {**made, "reference": reference_words, "num": num, "num_split": num_split, "per_class": args.per_class, "k": args.k,
              "features": extractor.name, "features_sha256": extractor.sha256, "dtype": str(rt.dtype), "floor": args.floor,
              "kid_subsets": KID_SUBSETS, "kid_subset_size": KID_SIZE, "is_splits": IS_SPLITS, "metric_seed": METRIC_SEED}
    out_json = Path(args.out_json or Path(args.out or Path(args.ckpt or args.samples).parent) / "eval.json")
    if args.if_needed and runtime.up_to_date(out_json, record) and (not args.save_stats or Path(args.save_stats).exists()):
        return rt.print(f"{out_json}: up to date")

    # Say what will happen, then do it
    what = (f"{args.ckpt} (step {ckpt['step']:,}, {args.weights} weights, {args.branch} branch; {settings['sampler']}, "
            f"{settings['steps']} steps, guidance {settings['guidance']:g})" if ckpt else args.samples)
    seconds = estimate(extractor, 0 if samples and samples.features else n_fake, 0 if reference.features else reference.n, net, ckpt,
                       settings, args, rt)
    rt.print(f"{n_fake:,} images of {what}: overall on {num:,}{', per split' * bool(groups)}{' and class' * args.per_class}, "
             f"against {reference_words} ({reference.n:,} images), in features of {extractor.name}, "
             f"{record['dtype'].removeprefix('torch.')}; about {duration(seconds)} on {rt.device}" + (f" x {rt.world}" if rt.world > 1 else ""))
    if class_counts is None and groups and labels is not None:
        rt.print("the samples come without class sizes: Many / Medium / Few are thirds of the classes in the order of their numbers")
    clock = time.time()
    if ckpt:
        shape = (ckpt["network"]["channels"],) + (data["resolution"],) * 2
        images = generate(net, labels, indices, shape, rt, args.batch_size, gather=False, **settings)
        sampled, clock = time.time() - clock, time.time()
        fake = extractor(lambda rows: rgb(images[rows]), len(images), "features of the samples", shared=False)
    else:
        sampled, fake = 0.0, extractor.of(samples, "features of the samples")
    real = extractor.of(reference, "features of the reference")
    extracted, clock = time.time() - clock, time.time()
    if rt.rank > 0:
        return
    if args.save_stats:
        save_stats(args.save_stats, real, reference_labels, class_names, reference_words, extractor)
    classes = {n: c for c, n in enumerate(class_names)} if class_names and (args.per_class or not groups) else {}
    named = None        # a classifier of these very classes, in whatever order, also gives the accuracy
    if extractor.class_names and class_names and sorted(extractor.class_names) == sorted(class_names):
        named = np.array([class_names.index(n) for n in extractor.class_names])
    result = measure_all((*fake, labels), (*real, reference_labels), groups, classes, num, extractor.inception, args.k, rt.device,
                         args.floor, named)
    earlier = runtime.read_json(out_json)
    if earlier and earlier.get("settings") != runtime.json.loads(runtime.json.dumps(record)):      # hours of work, perhaps
        kept = next(p for i in count(1) if not (p := out_json.with_name(f"{out_json.stem}-{i}.json")).exists())
        out_json.rename(kept)
        print(f"{out_json} had numbers of other settings; they are kept as {kept.name}")
    runtime.write_json(out_json, {**result, "settings": record, "command": shlex.join(["python", "evaluate.py", *sys.argv[1:]]),
                                  "seconds": {"sampling": round(sampled, 1), "features": round(extracted, 1),
                                              "metrics": round(time.time() - clock, 1)},
                                  "versions": {"torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__}})
    print_result(result)
    print(f"wrote {out_json}")


def save_stats(path, real, labels, class_names, words, extractor):
    """What --reference FILE reads: all that the metrics need of the reference."""
    about = runtime.json.dumps({"what": words, "made_by": extractor.name, "features_sha256": extractor.sha256, "class_names": class_names})
    arrays = {"features": real[0], "logits": real[1], "about": np.array(about), **({} if labels is None else {"labels": labels})}

    def write(temporary):
        with open(temporary, "wb") as f:
            np.savez(f, **arrays)
    runtime.write_atomic(path, write, "--save-stats")
    print(f"wrote {path}: name it with --reference")


if __name__ == "__main__":
    run(main)
