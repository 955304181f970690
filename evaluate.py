"""Measure images against real ones: FID, KID, precision, recall, density, coverage and IS.

All but IS also per group and per class.

    python evaluate.py --ckpt out/NAME/ckpt.pt          # generate the protocol's images, measure
    python evaluate.py --samples A --reference B        # any images: .npz, folders, data sets
    python evaluate.py --samples cifar10:test --reference cifar10 --save-stats cifar10.npz
                                                        # the reference's features, computed once

Protocol (Sec. 4.1): 50,000 class-balanced images against the balanced full training set. Per group
(Many, Medium, Few): 20,000 images of its classes against the real images of its classes. Where the
reference is not balanced, its classes get equal weights (data.is_balanced). Features
are those of Inception (inception.py), so that FID, KID and IS are what torch-fidelity computes. On
digits, or with --features, they are those of another network; the Frechet distance and the kernel
distance are then named FD and KD, never FID and KID.
"""
import json
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import scipy
import torch

import disk
import runtime
from data import by_size, equal_rows, is_balanced, note_on_num
from metrics.features import DIGITS_CLASSIFIER, INCEPTION, Extractor, Features
from metrics.image_sets import (about_stats, compare, find_reference, from_checkpoint, from_samples,
                                protocol_of, read_npz)
from metrics.inception import INPUTS
from metrics.scores import (DENSITY_K, FLOOR_IMAGES, IS_SPLITS, KID_SIZE, KID_SUBSETS, LEAST_REAL,
                            METRIC_SEED, distance_of, floor_of, inception_score, kernel_distance,
                            neighbour_metrics, placed, weights_of)
from networks import KINDS
from runtime import Parser, UserError, integer, run
from sample import (add_latents_flag, add_sampling_flags, dtype_of, generate, make_fast,
                    make_samples)

FEW = 2048          # with fewer images a Frechet distance depends mostly on their number
FLOOR_ROUNDS = 3    # of a user's folder, whose numbers compare with no one else's


# --------------------------------------------------------------------------------------------------
# Images to features

def make_extractor(args, subject, reference, rt):
    """The Extractor of --features; by default the reference's own one, or the protocol's."""
    features = args.features
    if not features and reference.features:
        features = reference.about["made_by"].replace(INCEPTION, "inception")
    features = features or protocol_of(subject.dataset or reference.name)["features"]
    if features not in INPUTS:
        given = {name for name in ("inception_weights", "trust_weights") if getattr(args, name)}
        runtime.refuse_unused(given, dict.fromkeys(given, f"the features are those of {features}"))
    return Extractor(features, rt, args.features_batch_size, args.inception_weights,
                     args.trust_weights)


def images_of_checkpoint(args, comparison, folder, rt):
    """The Images of --ckpt, which stay in a folder in `folder` for other features or references."""
    subject = comparison.subject
    record = {**subject.made, "num": comparison.num, "num_group": comparison.num_group}
    out = folder / f"eval-samples-{disk.settings_id(record)}"

    def make_images(keep_in):
        net = make_fast(subject.net, rt, subject.shape, len(comparison.labels), args.batch_size)
        return generate(net, comparison.labels, comparison.indices, subject.shape, rt,
                        subject.sampling, args.batch_size, to_image=subject.to_image,
                        keep_in=keep_in)
    make_samples(out, subject.data, rt, record, comparison.labels.tolist(), make_images,
                 if_needed=True)
    return read_npz(str(out), out / "samples.npz", "--ckpt")


def extract_both(args, comparison, extractor, folder, rt):
    """Features of both sides, on rank 0; the seconds. folder: of --ckpt's generated images.

    Raises UserError where features or logits are not finite.
    """
    subject, reference = comparison.subject, comparison.reference
    start = time.time()
    images = subject.images or images_of_checkpoint(args, comparison, folder, rt)
    sampled = time.time()
    fake = extractor.of(images, "features of the samples")
    real = extractor.of(reference, "features of the reference")
    for values in (*fake, *real):
        if values is not None and not np.isfinite(values).all():        # None: not on rank 0
            raise UserError(f"--features {extractor.name}: some features are not finite; its "
                            "weights, or the file of --save-stats, are damaged")
    seconds = {"sampling": sampled - start, "features": time.time() - sampled}
    return Features(*fake, comparison.labels), Features(*real, reference.labels), seconds


# --------------------------------------------------------------------------------------------------
# Features to numbers

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
        weights = weights_of(real.labels)
        result = {frechet: distance_of(generated, reference, weights)}
        rows = slice(None) if weights is None else equal_rows(real.labels)
        if len(reference[rows]) >= LEAST_REAL:
            mean, std, size = kernel_distance(generated, reference[rows])
            result |= {kernel: mean, f"{kernel}_std": std, "kid_subset_size": size}
        result |= neighbour_metrics(fake.features, real.features, self.k, device=self.device,
                                    weights=weights)
        if score and len(fake.logits) >= IS_SPLITS:
            result["is"], result["is_std"] = inception_score(fake.logits)
        if self.output_classes is not None and fake.labels is not None:
            result["accuracy"] = float(self.is_right(fake).mean())
        result |= {"num": len(fake.features), "num_real": len(real.features)}
        alone = weights is not None and np.unique(real.labels, return_counts=True)[1].min() < 2
        if self.floor and len(real.features) >= FLOOR_IMAGES and not alone:
            result["floor"] = floor_of(reference, self.floor, real.labels)
        return result

    def is_right(self, images):
        """Which of the Features' images the classifier takes for their own class: (n,) bool."""
        return self.output_classes[images.logits.argmax(1)] == images.labels


def balanced_rows(labels, n, num):
    """Rows of `num` of n images, the first ones of each class; without labels, of all."""
    if num == n or labels is None:
        return slice(0, num)
    rank = np.empty(n, int)             # how many of its class come before an image
    for c in np.unique(labels):
        mine = np.flatnonzero(labels == c)
        rank[mine] = np.arange(len(mine))
    in_turn = np.argsort(rank, kind="stable")
    return np.sort(in_turn[:num])       # class sizes differ by at most one, if there are enough


def why_left_out(members, fake, real):
    """Why these classes together cannot be measured, in words; "" where they can."""
    sides = (fake.labels, "samples", 2), (real.labels, "reference", LEAST_REAL)
    for labels, side, least in sides:
        if not np.isin(members, labels).all():
            return f"no image of a class in the {side}"
        if np.isin(labels, members).sum() < least:
            return f"fewer than {least} images in the {side}"
    return ""


def measure_all(fake, real, num, groups, classes, metrics):
    """All numbers: overall on `num` images, the first ones of each class; per group and per class.

    fake, real: Features. The overall numbers are against the real images of the samples' classes.
    groups: {group: its classes}; classes: {name: class}. Both are measured on all images that there
    are. One with a class that has no image, or with fewer than two samples or LEAST_REAL real
    images, is left out; "left_out" then says why, by name.
    """
    labelled = fake.labels is not None and real.labels is not None
    rows = balanced_rows(fake.labels, len(fake.features), num)
    same_classes = np.isin(real.labels, fake.labels) if labelled else slice(None)
    result = {**metrics.of(fake.take(rows), real.take(same_classes), score=metrics.inception),
              "groups": {}, "classes": {}}
    parts = [("groups", name, members) for name, members in groups.items()]
    parts += [("classes", name, [c]) for name, c in classes.items()]
    left_out = {}
    for kind, name, members in runtime.progress(parts if labelled else [], desc="metrics"):
        if why := why_left_out(members, fake, real):
            left_out[name] = why
        else:
            result[kind][name] = metrics.of(*(side.take(np.isin(side.labels, members))
                                              for side in (fake, real)))
    if left_out:
        result["left_out"] = left_out
    return result


def warnings_of(real, metrics, class_names, extractor):
    """Lines about classes of whose real images a classifier takes more than half for others."""
    if metrics.output_classes is None or real.labels is None:
        return []
    right = metrics.is_right(real)
    shares = {class_names[c]: right[real.labels == c].mean() for c in np.unique(real.labels)}
    weak = [f"{name} {share:.0%}" for name, share in shares.items() if share < 0.5]
    return [f"warning: the classifier {extractor.name} knows fewer than half of the real images of "
            f"some classes ({first(weak)}): what it says of these says little; train one on "
            "balanced images, or take --features torchvision:resnet50"] if weak else []


def measure(args, comparison, extractor, fake, real, rt):
    """All that the flags ask for: measure_all's numbers, what the reference is, the warnings."""
    names = comparison.class_names or []
    output_classes = None       # where a classifier knows the classes, in any order: also accuracy
    if names and extractor.class_names and sorted(names) == sorted(extractor.class_names):
        output_classes = np.array([names.index(name) for name in extractor.class_names])
    device = rt.device if rt.device.type == "cuda" else "cpu"       # MPS has no float64
    metrics = Metrics(extractor.inception, args.k, args.floor, device, output_classes)
    per_class = args.per_class or len(names) < 3
    classes = {name: c for c, name in enumerate(names)} if per_class else {}
    result = measure_all(fake, real, comparison.num, comparison.groups, classes, metrics)
    size = comparison.reference.size
    result["reference"] = {"pixels": size and [*map(int, size)],
                           "images_per_class": comparison.reference.per_class}
    if warnings := warnings_of(real, metrics, names, extractor):
        result["warnings"] = warnings
    return result


# --------------------------------------------------------------------------------------------------
# What is printed

def announce(args, comparison, extractor, rt):
    """Say what will be measured, and what was taken for granted."""
    subject, reference = comparison.subject, comparison.reference
    labelled = comparison.labels is not None and reference.labels is not None
    grouped = labelled and comparison.groups
    per = ", per group" if grouped else ""
    per += ", per class" if labelled and args.per_class else ""
    pixels = " of {1} x {0} pixels".format(*reference.size) if reference.size else ""
    n = subject.images.n if subject.images else len(comparison.labels)
    rt.print(f"{n:,} images of {subject.words}: overall on {comparison.num:,}{per}, "
             f"against {reference.words} ({reference.n:,} images{pixels}), in features of "
             f"{extractor.name}, float32, on {rt.device} x {rt.world}")
    if reference.is_weighted:
        low, high = reference.per_class
        rt.print(f"the reference has {low:,} to {high:,} images of a class: the Frechet distance, "
                 "recall and coverage weigh its classes equally, the kernel distance takes equally "
                 "many of each, precision and density take all")
    if comparison.labels is not None:
        found, counts = np.unique(comparison.labels, return_counts=True)
        if note := note_on_num(comparison.num, len(found), "--num"):
            rt.print(note)
        if subject.images and not is_balanced(counts):
            names = comparison.class_names or range(max(found) + 1)
            sizes = [f"{names[found[i]]} {counts[i]:,}" for i in np.argsort(counts)]
            rt.print(f"note: the samples differ in number from class to class ({first(sizes)}, "
                     f"{sizes[-1]}), and count as they are")
    used = np.isin(reference.labels, comparison.labels).sum() if labelled else reference.n
    if used < reference.n:
        rt.print(f"the samples lack some classes of the reference: overall against its {used:,} "
                 "images of the samples' classes")
    if comparison.assumed:
        rt.print(f"labels {comparison.assumed['labels']}")
    if args.per_class and not labelled:
        rt.print("--per-class: one side has no labels; overall numbers only")
    if grouped:
        order = "by size" if subject.data.get("class_counts") else (
            "in the order of their numbers, since the samples come without class sizes")
        rt.print(f"Many / Medium / Few: thirds of the classes, {order}")


def print_result(result, k=3, floor=0):
    """A table, a line per group and class; then what is left out, and what weakens some numbers.

    k, floor: those of the flags.
    """
    rows = [("overall", result), *result["groups"].items(), *result["classes"].items()]
    frechet, kernel = ("fid", "kid") if "fid" in result else ("fd", "kd")
    columns = [
        ("images", "num", ","), (frechet.upper(), frechet, ".3f"), ("floor", "floor", ".3f"),
        (kernel.upper(), kernel, ".5f"), ("±", f"{kernel}_std", ".5f"),
        ("subsets of", "kid_subset_size", ","),
        ("precision", "precision", ".3f"), ("recall", "recall", ".3f"), ("k", "k", ""),
        ("density", "density", ".3f"), ("coverage", "coverage", ".3f"), ("k", "density_k", ""),
        ("IS", "is", ".3f"), ("±", "is_std", ".3f"), ("accuracy", "accuracy", ".1%")]
    table = [["", *(name for name, _ in rows)]]
    for title, key, form in columns:
        if any(key in r for _, r in rows):
            table.append([title, *(f"{r[key]:{form}}" if key in r else "-" for _, r in rows)])
    widths = [max(map(len, cells)) for cells in table]
    for name, *cells in zip(*table):
        print(f"{name:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(cells, widths[1:])), sep="  ")
    left_out = result.get("left_out", {})
    for why in dict.fromkeys(left_out.values()):
        print(f"left out: {first(name for name in left_out if left_out[name] == why)} ({why})")
    biased = "upwards, IS downwards" if "is" in result else "upwards"
    notes = [
        ("warning", lambda r: min(r["num"], r["num_real"]) < FEW,
         f"fewer than {FEW:,} images on one side; a Frechet distance is then biased {biased}, and "
         f"can be compared only at equal counts; {kernel.upper()} is not biased"),
        ("warning", lambda r: r["k"] < k or r["density_k"] < DENSITY_K,
         f"fewer neighbours than {k} in precision and recall, or than {DENSITY_K} in density and "
         "coverage, since there are no more images on one side; these do not compare"),
        ("note", lambda r: kernel not in r,
         f"no {kernel.upper()}; equally many real images of each class are fewer than "
         f"{LEAST_REAL}"),
        ("note", lambda r: r is result and "fid" in r and "is" not in r,
         f"no IS; it needs at least {IS_SPLITS} images"),
        ("note", lambda r: floor and "floor" not in r,
         f"no floor; it needs at least {FLOOR_IMAGES} real images, two of each class")]
    for kind, holds, words in notes:
        if names := [name for name, r in rows if holds(r)]:
            print(f"{kind}: {first(names)}: {words}")
    for warning in result.get("warnings", ()):
        print(warning)


def first(names):
    """The first six of some names, in words."""
    names = list(names)
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")


# --------------------------------------------------------------------------------------------------
# What is written

def settings_of(args, comparison, extractor, rt):
    """Everything that moves a number of the result: a plain dict."""
    made, data = comparison.subject.made, comparison.subject.data
    plugins = list(dict.fromkeys([*made.get("plugin", []), *runtime.Plugins.found]))
    counts = data.get("class_counts")
    return {
        **made, **({"plugin": plugins} if plugins else {}),
        **({"reference_weights": "equal classes"} if comparison.reference.is_weighted else {}),
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
    return isinstance(result, dict) and {"settings", "num_real", "precision"} <= set(result)


def check_outputs(out_json, stats):
    """Raise UserError where a result cannot be written, or would replace something else."""
    disk.refuse_overwriting(out_json, is_result, "--out-json", "a result of evaluate.py")
    disk.check_writable(out_json, "--out-json")
    if stats:
        disk.refuse_overwriting(stats, about_stats, "--save-stats", "a file of --save-stats")
        disk.check_writable(stats, "--save-stats")


def stats_of(comparison, extractor):
    """What save_stats keeps beside the features: whose they are, and what made them."""
    reference = comparison.reference
    return {"what": reference.words, "made_by": extractor.name,
            "features_sha256": extractor.sha256, "class_names": comparison.class_names,
            "reference_sha256": reference.sha256,
            "size": list(reference.size) if reference.size else None}


def save_stats(path, real, about):
    """Write what --reference FILE reads: all that the metrics need of the reference."""
    arrays = {"features": real.features, "logits": real.logits,
              "about": np.array(json.dumps(about))}
    if real.labels is not None:
        arrays["labels"] = real.labels
    disk.write_npz(path, "--save-stats", **arrays)
    print(f"wrote {path}: name it with --reference")


def write_result(out_json, result, settings, seconds, class_order):
    """Write the numbers, and what is needed to get them again; class_order: see data.by_size.

    An earlier result of other settings, which may be hours of work, is kept as eval-1.json, ...
    """
    if disk.read_json(out_json) and not disk.up_to_date(out_json, settings):
        names = (out_json.with_name(f"{out_json.stem}-{i}.json") for i in count(1))
        kept = next(path for path in names if not path.exists())
        out_json.rename(kept)
        print(f"{out_json} had numbers of other settings; they are kept as {kept.name}")
    disk.write_json(out_json, {
        **result, "settings": settings, "class_order": class_order, "git_commit": disk.git_commit(),
        "command": runtime.command_line("evaluate.py"),
        "seconds": {what: round(value, 1) for what, value in seconds.items()},
        "versions": {"torch": torch.__version__, "numpy": np.__version__,
                     "scipy": scipy.__version__}}, "--out-json")
    print(f"wrote {out_json}")


# --------------------------------------------------------------------------------------------------
# The script

def make_parser():
    """All flags."""
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", help="a checkpoint: sample the images that the protocol needs")
    source.add_argument("--samples", help="an .npz (arr_0 N x H x W x 3 uint8, perhaps labels in "
                        "arr_1), a folder of images (flat, or one folder per class), a data set's "
                        "name (also NAME:test), or a file of --save-stats")
    g = parser.add_argument_group("protocol")
    g.add_argument("--reference", help="what to compare with, of the same kinds as --samples "
                   "(default: the real images of the set that was trained on)")
    g.add_argument("--reference-split", choices=("train", "test"),
                   help="of a data set as --reference; the same as writing NAME:test (default: "
                   "train; imagenet-lt, inat2018: test, their validation images; folder: test "
                   "where it has one)")
    g.add_argument("--data-dir", help="where data sets are (default: where they were in training, "
                   "or data)")
    g.add_argument("--pack-dir", help="where packed arrays are "
                   "(default: the checkpoint's, or packed in --data-dir)")
    g.add_argument("--num", type=integer(2, 10_000_000), help="class-balanced images overall "
                   "(default: 50,000; digits: 2,000; or all there are)")
    g.add_argument("--num-group", type=integer(0, 10_000_000),
                   help="images per group (Many, Medium, Few), at least "
                   "(default: 20,000; with --num, and on digits: what --num gives)")
    g.add_argument("--per-class", action="store_true", help="also each class by itself")
    g.add_argument("--floor", type=integer(0), metavar="R",
                   help="also the Frechet distance between random halves of the reference, each "
                   f"class halved, the mean of R halvings (default: folders {FLOOR_ROUNDS}, "
                   "others 0, none)")
    g.add_argument("--k", type=integer(1), default=3,
                   help="neighbours in precision and recall (default: 3); density and coverage "
                   f"always take {DENSITY_K}")
    g = parser.add_argument_group("features")
    g.add_argument("--features", help='"inception"; "inception:pytorch-fid", the same with '
                   "pytorch-fid's resize, as in the authors' release; a network pre-trained on "
                   'ImageNet, such as "torchvision:resnet50"; "dinov2" or "clip" by the package '
                   'transformers, also "dinov2:FOLDER" with weights that are there; or a '
                   "checkpoint of python -m recognition.classify, which needs no network "
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
    add_latents_flag(add_sampling_flags(parser))
    parser.add_argument("--out-json", help="the numbers and every setting that moves them "
                        "(default: eval.json in --out). The images of --ckpt stay beside it, in "
                        "eval-samples-..., for a later call with the same sampling, and may be "
                        "removed (50,000 of 32 pixels: 150 MB)")
    parser.add_argument("--if-needed", action="store_true",
                        help="do nothing where --out-json was made with these settings")
    parser.add_common("folder of eval.json (default: beside --ckpt or --samples)")
    return parser


def read_flags():
    """The flags. Raises UserError for those of sampling where --samples has the images."""
    parser = make_parser()
    args = parser.parse_args()
    if args.samples:
        sampling = ("sampler", "steps", "grid", "order", "eta", "last_step", "guidance", "clip",
                    "branch", "weights", "batch_size", "latents", "seed", "dtype", "num_group")
        runtime.refuse_unused(parser.given, dict.fromkeys(
            sampling, "says how --ckpt generates images, and those of --samples are there"))
    return args


def main():
    """What is compared, in which features; the numbers; what is printed and written."""
    args = read_flags()
    ckpt = disk.load(args.ckpt, KINDS) if args.ckpt else None
    # Features are always computed in float32, so a dtype is that of sampling
    rt = runtime.setup(args.device, dtype_of(args, ckpt) if ckpt else "float32")
    out = Path(args.out or Path(args.ckpt or args.samples).parent)
    out_json = Path(args.out_json or out / "eval.json")

    # What is compared, in which features
    subject = from_checkpoint(args, ckpt, rt) if ckpt else from_samples(args, rt)
    reference = find_reference(args, subject, rt)
    if args.floor is None:
        args.floor = FLOOR_ROUNDS if reference.is_folder else 0
    extractor = make_extractor(args, subject, reference, rt)
    comparison = compare(args, subject, reference, extractor)
    settings = settings_of(args, comparison, extractor, rt)
    about = stats_of(comparison, extractor)
    saved = not args.save_stats or about_stats(args.save_stats) == about
    if args.if_needed and saved and disk.up_to_date(out_json, settings):
        return rt.print(f"{out_json}: up to date")
    rt.on_rank_0(lambda: check_outputs(out_json, args.save_stats))
    announce(args, comparison, extractor, rt)

    # The numbers; on rank 0 only
    fake, real, seconds = extract_both(args, comparison, extractor, out_json.parent, rt)
    if rt.rank > 0:
        return
    start = time.time()
    result = measure(args, comparison, extractor, fake, real, rt)
    seconds["metrics"] = time.time() - start

    # What is printed and written
    print_result(result, args.k, args.floor)
    write_result(out_json, result, settings, seconds, by_size(subject.data))
    if args.save_stats:
        save_stats(args.save_stats, real, about)
    name = out_json.resolve().parent.name
    runtime.print_next("-m", "pages.report", "--row", f"{name}={out_json}")


if __name__ == "__main__":
    run(main)
