"""Measure images against real ones: FID, KID, precision, recall and IS.

All but IS also per group and per class.

    python evaluate.py --ckpt out/NAME/ckpt.pt          # generate the protocol's images, measure
    python evaluate.py --samples A --reference B        # any images: .npz, folders, data sets
    python evaluate.py --samples cifar10:test --reference cifar10 --save-stats cifar10.npz
                                                        # the reference's features, computed once

Protocol (Sec. 4.1): 50,000 class-balanced images against the balanced full training set. Per group
(Many, Medium, Few): 20,000 images of its classes against the real images of its classes. Features
are those of Inception (inception.py), so that FID, KID and IS are what torch-fidelity computes. On
digits, or with --features, they are those of another network; the Frechet distance and the kernel
distance are then named FD and KD, never FID and KID.
"""
import json
import time
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
import torch

import disk
import runtime
from data import by_size, to_rgb
from metrics.features import DIGITS_CLASSIFIER, Extractor, Features
from metrics.image_sets import (compare, find_reference, fit_names, from_checkpoint, from_samples,
                                parse_about, protocol_of)
from metrics.scores import (FLOOR_IMAGES, IS_SPLITS, KID_SIZE, KID_SUBSETS, METRIC_SEED,
                            distance_of, floor_of, inception_score, kernel_distance, placed,
                            precision_recall)
from runtime import Parser, UserError, integer, run
from networks import KINDS
from sample import add_sampling_flags, dtype_of, generate, prepare, sample_batch

FEW = 2048          # with fewer images a Frechet distance depends mostly on their number


# --------------------------------------------------------------------------------------------------
# Features of both sides

def refuse_non_finite(features, what, extractor):
    """Raise UserError where features or logits of `what` are not finite; None on other ranks."""
    for values in features:
        if values is not None and not np.isfinite(values).all():
            raise UserError(f"--features {extractor.name}: features of {what} are not finite "
                            "numbers; no metric can be computed from them. Its weights, or the "
                            "file of --save-stats, are damaged")


def make_extractor(args, subject, reference, rt):
    """The Extractor of --features; by default the reference's own one, or the protocol's."""
    features = args.features
    if not features and reference.features:
        features = reference.about["made_by"]
        if features.startswith("inception"):
            features = "inception"
    features = features or protocol_of(subject, reference)["features"]
    if features != "inception":
        weights = {"inception_weights": args.inception_weights,
                   "trust_weights": args.trust_weights}
        why = f"the features are those of {features}"
        runtime.refuse_unused({name for name, value in weights.items() if value},
                              dict.fromkeys(weights, why))
    return Extractor(features, rt, args.features_batch_size, args.inception_weights,
                     args.trust_weights)


def extract_both(args, comparison, extractor, rt):
    """Generate images where there are none yet; Features of both sides, on rank 0; the seconds."""
    subject, reference = comparison.subject, comparison.reference
    title = "features of the samples"
    start = time.time()
    if subject.images:
        sampled = start
        fake = extractor.of(subject.images, title)
    else:
        images = generate(subject.net, comparison.labels, comparison.indices, subject.shape, rt,
                          subject.sampling, args.batch_size, gather=False)
        sampled = time.time()
        fake = extractor.extract(lambda rows: to_rgb(images[rows]), len(images), title,
                                 shared=False)
    real = extractor.of(reference, "features of the reference")
    refuse_non_finite(fake, "the samples", extractor)
    refuse_non_finite(real, "the reference", extractor)
    seconds = {"sampling": sampled - start, "features": time.time() - sampled}
    return Features(*fake, comparison.labels), Features(*real, reference.labels), seconds


# --------------------------------------------------------------------------------------------------
# Numbers

@dataclass
class Metrics:
    """How numbers are computed from features."""
    inception: bool = True              # they are Inception's: the distances are FID and KID
    k: int = 3                          # neighbours in precision and recall
    floor: int = 0                      # halvings of the reference for the floor; 0: no floor
    device: torch.device | str = "cpu"
    output_classes: np.ndarray | None = None    # the class of each output of a classifier

    def of(self, fake, real, score=False):
        """The numbers of one set of images; fake, real: Features; score: also the IS."""
        frechet, kernel = ("fid", "kid") if self.inception else ("fd", "kd")
        generated, reference = (placed(x.features, self.device) for x in (fake, real))
        mean, std, size = kernel_distance(generated, reference)
        precision, recall = precision_recall(fake.features, real.features, self.k,
                                             device=self.device)
        result = {frechet: distance_of(generated, reference),
                  kernel: mean, f"{kernel}_std": std, "kid_subset_size": size,
                  "precision": precision, "recall": recall}
        others = min(len(fake.features), len(real.features)) - 1
        if others < self.k:
            result["k"] = others
        if score and len(fake.logits) >= IS_SPLITS:
            result["is"], result["is_std"] = inception_score(fake.logits)
        if self.output_classes is not None and fake.labels is not None:
            predicted = self.output_classes[fake.logits.argmax(1)]
            result["accuracy"] = float((predicted == fake.labels).mean())
        result["num"] = len(fake.features)
        result["num_real"] = len(real.features)
        if self.floor and len(real.features) >= FLOOR_IMAGES:
            result["floor"] = floor_of(reference, self.floor, real.labels)
        return result


def make_metrics(args, comparison, extractor, rt):
    """The Metrics that the flags ask for; with the accuracy if the classifier knows the classes."""
    ours, theirs = fit_names(comparison.class_names, extractor.class_names)
    output_classes = None
    if ours and theirs and sorted(ours) == sorted(theirs):      # in any order
        output_classes = np.array([ours.index(name) for name in theirs])
    device = rt.device if rt.device.type == "cuda" else "cpu"       # MPS has no float64
    return Metrics(extractor.inception, args.k, args.floor, device, output_classes)


def weak_classes(real, metrics, class_names):
    """{class: accuracy} of the classes of which a classifier takes most real images for others.

    real: Features of the reference. {} where the features are no classifier's of these classes.
    """
    if metrics.output_classes is None or real.labels is None:
        return {}
    right = metrics.output_classes[real.logits.argmax(1)] == real.labels
    found = {class_names[c]: float(right[real.labels == c].mean()) for c in np.unique(real.labels)}
    return {name: accuracy for name, accuracy in found.items() if accuracy < 0.5}


def weak_words(weak, extractor):
    """The warning about weak_classes, as a list of lines."""
    if not weak:
        return []
    shown = first(f"{name} {accuracy:.0%}" for name, accuracy in weak.items())
    return [f"warning: the classifier {extractor.name} knows fewer than half of the real images of "
            f"some classes ({shown}): what it says of these says little; train one on balanced "
            "images, or take --features torchvision:resnet50"]


def rank_in_class(labels):
    """For each image, how many of its class come before it: (N,)."""
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    ranks = np.empty(len(labels), int)
    by_class = np.argsort(labels, kind="stable")
    ranks[by_class] = np.arange(len(labels)) - np.repeat(starts, counts)
    return ranks


def balanced_rows(labels, n, num):
    """Rows of `num` of n images, the first ones of each class; without labels, of all."""
    if num == n:
        return slice(None)
    if labels is None:
        return slice(0, num)
    in_turn = np.argsort(rank_in_class(labels), kind="stable")
    return np.sort(in_turn[:num])       # class sizes differ by at most one, if there are enough


class Part(NamedTuple):
    """Images that are measured together: rows of what is measured, and of the reference."""
    kind: str               # "overall", "groups" or "classes"
    name: str
    fake: np.ndarray | slice
    real: np.ndarray | slice


def why_left_out(members, fake, real):
    """Why these classes together cannot be measured, in words; "" where they can."""
    for labels, side in ((fake.labels, "samples"), (real.labels, "reference")):
        if not np.isin(members, labels).all():
            return f"no image of a class in the {side}"
        if np.isin(labels, members).sum() < 2:
            return f"fewer than two images in the {side}"
    return ""


def parts_of(fake, real, num, groups, classes):
    """The Parts that are measured (see measure_all), the overall one first; {left out: why}."""
    labelled = fake.labels is not None and real.labels is not None
    overall = balanced_rows(fake.labels, len(fake.features), num)
    same_classes = np.isin(real.labels, fake.labels) if labelled else slice(None)
    parts, left_out = [Part("overall", "overall", overall, same_classes)], {}
    if not labelled:
        return parts, left_out
    single = {name: [c] for name, c in classes.items()}
    for kind, sets in (("groups", groups), ("classes", single)):
        for name, members in sets.items():
            if why := why_left_out(members, fake, real):
                left_out[name] = why
                continue
            parts.append(Part(kind, name, np.isin(fake.labels, members),
                              np.isin(real.labels, members)))
    return parts, left_out


def measure_all(fake, real, num, groups, classes, metrics):
    """All numbers: overall on `num` images, the first ones of each class; per group and per class.

    fake, real: Features. groups: {group: its classes}; classes: {name: class}. Groups and classes
    are measured on all images that there are. One with a class that has no image, or with fewer
    than two images on either side, is left out; "left_out" then says why, by name.
    """
    numbers = {"overall": {}, "groups": {}, "classes": {}}
    parts, left_out = parts_of(fake, real, num, groups, classes)
    for part in runtime.progress(parts, desc="metrics", unit="group"):
        score = metrics.inception and part.kind == "overall"
        of_part = metrics.of(fake.take(part.fake), real.take(part.real), score)
        numbers[part.kind][part.name] = of_part
    overall = numbers.pop("overall")["overall"]
    return {**overall, **numbers, **({"left_out": left_out} if left_out else {})}


# --------------------------------------------------------------------------------------------------
# What is printed

def estimate(args, comparison, extractor, rt):
    """Seconds that sampling and features will take, from a few images of each."""
    subject, reference = comparison.subject, comparison.reference
    on_cpu = rt.device.type == "cpu"
    seconds = 0.0
    if subject.net is not None:
        n = min(args.batch_size, 8) if on_cpu else args.batch_size
        one_step = replace(subject.sampling, steps=1, grid="uniform")
        y = torch.zeros(n, dtype=torch.int64, device=rt.device)
        per_step = time_of(lambda: sample_batch(subject.net, y, range(n), subject.shape, rt,
                                                one_step).sum().item())
        seconds += per_step * subject.sampling.steps * comparison.n / n
    m = min(args.features_batch_size, 8) if on_cpu else args.features_batch_size
    size = subject.shape[1] if subject.shape else extractor.size or 32
    images = np.zeros((m, size, size, 3), np.uint8)
    sides = [(reference.features, reference.n),
             (subject.images and subject.images.features, comparison.n)]
    missing = sum(n for features, n in sides if not features)
    seconds += time_of(lambda: extractor.batch(images)) * missing / m
    return seconds / rt.world


def time_of(function):
    """Seconds that the second of two calls takes: the first one warms up."""
    function()
    start = time.time()
    function()
    return time.time() - start


def announce(args, comparison, extractor, rt):
    """Say what will be measured, and how long it will take."""
    subject, reference = comparison.subject, comparison.reference
    seconds = estimate(args, comparison, extractor, rt)
    labelled = comparison.labels is not None and reference.labels is not None
    wanted = {"group": labelled and bool(comparison.groups), "class": labelled and args.per_class}
    kinds = " and ".join(kind for kind, yes in wanted.items() if yes)
    per = f", per {kinds}" if kinds else ""
    processes = f" x {rt.world}" if rt.world > 1 else ""
    rt.print(f"{comparison.n:,} images of {subject.words}: overall on {comparison.num:,}{per}, "
             f"against {reference.words} ({reference.n:,} images), "
             f"in features of {extractor.name}, float32; "
             f"about {runtime.duration(seconds)} on {rt.device}{processes}")
    if comparison.used < reference.n:
        rt.print(f"the samples lack some classes of the reference: overall against its "
                 f"{comparison.used:,} images of the samples' classes")
    if comparison.assumed:
        rt.print(f"labels {comparison.assumed['labels']}")
    if args.per_class and not labelled:
        rt.print("--per-class: one side has no labels; overall numbers only")
    no_sizes = subject.data.get("class_counts") is None
    if no_sizes and comparison.groups and comparison.labels is not None:
        rt.print("the samples come without class sizes: Many / Medium / Few are thirds of the "
                 "classes in the order of their numbers")


def thousands(n):
    """50000 -> "50k", 16500 -> "16.5k", 1488 -> "1,488"."""
    return f"{n / 1000:g}k" if n >= 1000 and n % 100 == 0 else f"{n:,}"


def line_of(numbers, n):
    """The numbers of one group in one line; n: the number of images, as text, after each metric."""
    frechet, kernel = ("fid", "kid") if "fid" in numbers else ("fd", "kd")
    kernels = []
    if numbers["kid_subset_size"] == KID_SIZE:
        kernels = [f"{kernel.upper()} ({n}) {numbers[kernel]:.5f} ± {numbers[f'{kernel}_std']:.5f}"]
    words = [f"{frechet.upper()} ({n}) {numbers[frechet]:8.3f}",
             *kernels,
             f"precision ({n}) {numbers['precision']:.3f}",
             f"recall ({n}) {numbers['recall']:.3f}"]
    if "is" in numbers:
        words.append(f"IS ({n}) {numbers['is']:.3f} ± {numbers['is_std']:.3f}")
    if "accuracy" in numbers:
        words.append(f"accuracy ({n}) {numbers['accuracy']:.1%}")
    return "  ".join(words)


def print_result(result, k, floor=0):
    """One line per group and class, what is left out, and warnings; k, floor: of the flags."""
    # A list: a class may be called like a group
    rows = [("overall", result), *result["groups"].items(), *result["classes"].items()]
    name_width = max(len(name) for name, _ in rows)
    count_width = max(len(thousands(r["num"])) for _, r in rows)
    for name, numbers in rows:
        n = thousands(numbers["num"]).rjust(count_width)
        print(f"{name:<{name_width}}  {line_of(numbers, n)}")
    left_out = result.get("left_out", {})
    why = [f"{first(name for name in left_out if left_out[name] == reason)} ({reason})"
           for reason in dict.fromkeys(left_out.values())]
    if why:
        print(f"left out: {'; '.join(why)}")
    print_warnings(rows, k)
    if "fid" in result and "is" not in result:
        print(f"note: no IS; it needs at least {IS_SPLITS} images")
    no_floor = [name for name, r in rows if floor and "floor" not in r]
    if no_floor:
        print(f"note: --floor: none for {first(no_floor)}; the halves need at least "
              f"{FLOOR_IMAGES} images of the reference")


def first(names):
    """The first six of some names, in words."""
    names = list(names)
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")


def print_warnings(rows, k):
    """Warn about small numbers of images; rows: [(name, its numbers)]; k: of --k."""
    small = [name for name, r in rows if min(r["num"], r["num_real"]) < FEW]
    if small:
        print(f"warning: {first(small)}: fewer than {FEW:,} images on one side; a Frechet "
              "distance is then biased upwards and can be compared only at equal counts; KID is "
              "not biased")
    kernel = "KID" if "kid" in rows[0][1] else "KD"
    reduced = [name for name, r in rows if r["kid_subset_size"] < KID_SIZE]
    if reduced:
        print(f"note: no {kernel} of {first(reduced)}: one of its subsets has {KID_SIZE:,} images, "
              "and one side has fewer")
    fewer = [name for name, r in rows if "k" in r]
    if fewer:
        print(f"warning: {first(fewer)}: precision and recall with fewer than {k} "
              "neighbours, since there are no more images on one side; they do not compare")


# --------------------------------------------------------------------------------------------------
# What is written

def settings_of(args, comparison, extractor, rt):
    """Everything that moves a number of the result: a plain dict."""
    made, data = comparison.subject.made, comparison.subject.data
    plugins = list(dict.fromkeys([*made.get("plugin", []), *runtime.Plugins.found]))
    counts = data.get("class_counts")
    return {
        **made, **({"plugin": plugins} if plugins else {}),
        "trained_on": counts and f"{sum(counts):,} images, {max(counts):,} to {min(counts):,} of "
                                 "a class",
        "reference": comparison.reference.words,
        "reference_sha256": comparison.reference.sha256, **comparison.assumed,
        "num": comparison.num, "num_group": comparison.num_group, "per_class": args.per_class,
        "k": args.k, "features": extractor.name, "features_sha256": extractor.sha256,
        "dtype": made.get("dtype") or rt.dtype_name(), "floor": args.floor,
        "kid_subsets": KID_SUBSETS, "kid_subset_size": KID_SIZE, "is_splits": IS_SPLITS,
        "metric_seed": METRIC_SEED}


def is_result(path):
    """Whether a file is a result of this script."""
    result = disk.read_json(path)
    return result is not None and {"settings", "num_real", "precision", "recall"} <= set(result)


def about_stats(path):
    """What save_stats wrote about a file of its own, a dict; None for other files."""
    try:
        with np.load(path) as f:
            return parse_about(f["about"]) if "features" in f.files else None
    except Exception:       # NumPy raises many kinds for files that are no .npz
        return None


def check_outputs(args, comparison):
    """Raise UserError where a result cannot be written, or would replace something else."""
    out = args.out_json
    disk.refuse_overwriting(out, is_result, "--out-json", "a result of evaluate.py")
    if args.samples and out.resolve() == record_of(args.samples):
        raise UserError(f"--out-json {out}: the record of the samples is looked for under this "
                        "name; choose another name")
    disk.check_writable(out, "--out-json")
    if not args.save_stats:
        return
    stats = Path(args.save_stats)
    disk.refuse_overwriting(stats, about_stats, "--save-stats", "a file of --save-stats")
    read = [args.samples, comparison.reference.name, out]
    if stats.resolve() in [Path(path).resolve() for path in read if path]:
        raise UserError(f"--save-stats {stats}: this call also reads or writes this file under "
                        "another flag; choose another name")
    disk.check_writable(stats, "--save-stats")


def record_of(samples):
    """The JSON in which read_record looks for what made an .npz, or the folder of one."""
    path = Path(samples)
    if path.is_dir():
        path = path / "samples.npz"
    return path.with_suffix(".json").resolve() if path.is_file() else None


def is_done(args, out_json, settings, comparison, extractor):
    """Whether an earlier call with these settings wrote everything that this one would write."""
    if args.save_stats and about_stats(args.save_stats) != stats_of(comparison, extractor):
        return False
    return disk.up_to_date(out_json, settings)


def stats_of(comparison, extractor):
    """What save_stats keeps beside the features: whose they are, and what made them."""
    reference = comparison.reference
    return {"what": reference.words, "made_by": extractor.name,
            "features_sha256": extractor.sha256, "class_names": comparison.class_names,
            "reference_sha256": reference.sha256,
            "size": list(reference.size) if reference.size else None}


def save_stats(path, real, comparison, extractor):
    """Write what --reference FILE reads: all that the metrics need of the reference."""
    about = stats_of(comparison, extractor)
    arrays = {"features": real.features, "logits": real.logits,
              "about": np.array(json.dumps(about))}
    if real.labels is not None:
        arrays["labels"] = real.labels
    disk.write_npz(path, "--save-stats", **arrays)
    print(f"wrote {path}: name it with --reference")


def keep_earlier(out_json, settings):
    """Rename an earlier result of other settings, which may be hours of work: eval-1.json, ..."""
    if not disk.read_json(out_json) or disk.up_to_date(out_json, settings):
        return
    names = (out_json.with_name(f"{out_json.stem}-{i}.json") for i in count(1))
    kept = next(path for path in names if not path.exists())
    out_json.rename(kept)
    print(f"{out_json} had numbers of other settings; they are kept as {kept.name}")


def write_result(out_json, result, settings, seconds, class_order):
    """Write the numbers, and what is needed to get them again; class_order: see data.by_size."""
    keep_earlier(out_json, settings)
    disk.write_json(out_json, {
        **result, "settings": settings, "class_order": class_order, "git_commit": disk.git_commit(),
        "command": runtime.command_line("evaluate.py"),
        "seconds": {what: round(value, 1) for what, value in seconds.items()},
        "versions": {"torch": torch.__version__, "numpy": np.__version__,
                     "scipy": scipy.__version__}}, "--out-json")


# --------------------------------------------------------------------------------------------------

def add_protocol_flags(parser):
    """The flags that choose the reference, the features and the numbers."""
    g = parser.add_argument_group("protocol")
    g.add_argument("--reference", help="what to compare with, of the same kinds as --samples "
                   "(default: the balanced images of the set that was trained on)")
    g.add_argument("--reference-split", choices=("train", "test"),
                   help="of a data set as --reference; the same as writing NAME:test (default: "
                   "train; imagenet-lt, inat2018: test, their validation images; folder: test "
                   "where it has one). Of a long-tailed split, equally many of each class")
    g.add_argument("--data-dir", help="where data sets are (default: the checkpoint's, or data)")
    g.add_argument("--pack-dir", help="where packed arrays are "
                   "(default: the checkpoint's, or packed in --data-dir)")
    g.add_argument("--num", type=integer(2, 10_000_000), help="class-balanced images overall "
                   "(default: 50,000; digits: 2,000; or all there are)")
    g.add_argument("--num-group", "--num-split", type=integer(0, 10_000_000), dest="num_group",
                   help="images per group (Many, Medium, Few), at least "
                   "(default: 20,000; with --num, and on digits: what --num gives)")
    g.add_argument("--per-class", action="store_true", help="also each class by itself")
    g.add_argument("--floor", type=integer(0), default=0, metavar="R",
                   help="also the Frechet distance between random halves of the reference, each "
                   "class halved, the mean of R halvings (default: 0, none)")
    g.add_argument("--k", type=integer(1), default=3,
                   help="neighbours in precision and recall (default: 3)")


def add_features_flags(parser):
    """The flags that choose the network whose features are compared."""
    g = parser.add_argument_group("features")
    g.add_argument("--features", help='"inception", a checkpoint of classify.py, or a network '
                   'pre-trained on ImageNet, such as "torchvision:resnet50" '
                   f"(default: inception; digits: {DIGITS_CLASSIFIER})")
    g.add_argument("--inception-weights", metavar="FILE",
                   help="weights-inception-2015-12-05-6726825d.pth "
                   "(default: from torch.hub's cache, or downloaded there)")
    g.add_argument("--trust-weights", action="store_true",
                   help="take Inception weights with another hash")
    g.add_argument("--features-batch-size", type=integer(1), default=64,
                   help="images at a time in the extractor (default: 64)")
    g.add_argument("--save-stats", metavar="FILE",
                   help="keep the reference's features in FILE, for a later --reference FILE")


def make_parser():
    """All flags."""
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", help="a checkpoint: sample the images that the protocol needs")
    source.add_argument("--samples", help="an .npz (arr_0 N x H x W x 3 uint8, perhaps labels in "
                        "arr_1), a folder of images (flat, or one folder per class), a data set's "
                        "name (also NAME:test), or a file of --save-stats")
    add_protocol_flags(parser)
    add_features_flags(parser)
    add_sampling_flags(parser)
    parser.add_argument("--out-json", help="the numbers and every setting that moves them "
                        "(default: eval.json in --out)")
    parser.add_argument("--if-needed", action="store_true",
                        help="do nothing where --out-json was made with these settings")
    parser.add_common("folder of eval.json (default: beside --ckpt or --samples)")
    return parser


def resolve(args, ckpt):
    """Fill in the folders that depend on other flags or on the checkpoint."""
    config = ckpt["config"] if ckpt else {}
    args.data_dir = args.data_dir or config.get("data_dir") or "data"
    args.pack_dir = args.pack_dir or config.get("pack_dir")
    args.out = args.out or Path(args.ckpt or args.samples).parent
    args.out_json = Path(args.out_json or Path(args.out) / "eval.json")


def refuse_useless_flags(given, args):
    """Raise UserError for flags that do nothing beside the others, by name."""
    if args.samples:
        sampling = ("sampler", "steps", "grid", "order", "eta", "guidance", "clip", "branch",
                    "weights", "batch_size", "seed", "dtype", "num_group")
        why = "says how --ckpt generates images, and those of --samples are there"
        runtime.refuse_unused(given, dict.fromkeys(sampling, why))


def main():
    """Find out what is measured and against what; measure; write."""
    parser = make_parser()
    args = parser.parse_args()
    refuse_useless_flags(parser.given, args)
    ckpt = disk.load(args.ckpt, KINDS) if args.ckpt else None
    # Features are always computed in float32, so a dtype is that of sampling
    rt = runtime.setup(args.device, dtype_of(args, ckpt) if ckpt else "float32")
    resolve(args, ckpt)

    # 1. What is measured: the images of --samples, or those that the network of --ckpt generates
    subject = from_checkpoint(args, ckpt, rt) if ckpt else from_samples(args, rt)

    # 2. Against what, and in which features
    reference = find_reference(args, subject, rt)
    extractor = make_extractor(args, subject, reference, rt)
    comparison = compare(args, subject, reference, extractor)
    settings = settings_of(args, comparison, extractor, rt)
    if args.if_needed and is_done(args, args.out_json, settings, comparison, extractor):
        return rt.print(f"{args.out_json}: up to date")
    rt.on_rank_0(lambda: check_outputs(args, comparison))
    if subject.net:
        subject.net = prepare(subject.net, rt, subject.shape, comparison.n, args.batch_size)
    announce(args, comparison, extractor, rt)

    # 3. Measure; the metrics on rank 0 only
    fake, real, seconds = extract_both(args, comparison, extractor, rt)
    if rt.rank > 0:
        return
    start = time.time()
    per_class = args.per_class or not comparison.groups
    classes = {name: c for c, name in enumerate(comparison.class_names or [])} if per_class else {}
    metrics = make_metrics(args, comparison, extractor, rt)
    result = measure_all(fake, real, comparison.num, comparison.groups, classes, metrics)
    seconds["metrics"] = time.time() - start
    warnings = weak_words(weak_classes(real, metrics, comparison.class_names), extractor)
    if warnings:
        result["warnings"] = warnings

    # 4. Print, and write: numbers of which one fails are not lost
    try:
        print_result(result, args.k, args.floor)
        print("".join(line + "\n" for line in warnings), end="", flush=True)
    finally:
        write_result(args.out_json, result, settings, seconds, by_size(subject.data))
    print(f"wrote {args.out_json}")
    if args.save_stats:
        save_stats(args.save_stats, real, comparison, extractor)


if __name__ == "__main__":
    run(main)
