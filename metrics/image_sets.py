"""Which images are compared with which: sets of images as evaluate.py's flags name them.

A set is an .npz, a folder, a data set, features that --save-stats kept, or a network's samples.
"""
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import disk
from data import class_groups, folders_of, is_balanced, load_reference, to_classes, to_rgb
from metrics.features import DIGITS_CLASSIFIER
from networks import load_merged
from runtime import UserError
from sample import describe, sampling_in_words, sampling_of, space_of
from samplers import Sampling
from sets.packing import open_image, read_image
from sets.readers import READERS, image_folder
from sets.samples import images_of_npz, open_npz, read_record

PROTOCOL = {
    "paper": {"num": 50_000, "num_group": 20_000, "features": "inception"},
    "digits": {"num": 2000, "num_group": 0, "features": DIGITS_CLASSIFIER},
}


# --------------------------------------------------------------------------------------------------
# Sets of images: an .npz, a folder, a data set

@dataclass
class Images:
    """A set of images; or, without `at`, only the features that --save-stats kept of one."""
    name: str                           # as on the command line
    n: int
    at: Callable | None = None          # at(rows) -> uint8 (len(rows), H, W, 3)
    labels: np.ndarray | None = None    # (n,)
    class_names: list | None = None
    features: tuple | None = None       # features (n, D) and logits (n, K), from --save-stats
    about: dict = field(default_factory=dict)       # plain facts for the settings in the result
    sha256: str | None = None           # of its content, see read_set
    size: tuple | None = None           # (height, width) in pixels, where it is known

    @property
    def words(self):
        """What the set is: "cifar10, full training set", or the name of its file."""
        return self.about.get("what", self.name)

    @property
    def per_class(self):
        """(images of the smallest class, of the largest); None without labels."""
        if self.labels is None:
            return None
        counts = np.unique(self.labels, return_counts=True)[1]
        return int(counts.min()), int(counts.max())

    @property
    def is_weighted(self):
        """Whether its classes differ so much in size that the metrics weigh them."""
        return self.labels is not None and not is_balanced(self.per_class)

    @property
    def is_folder(self):
        """Whether it is a user's own folder."""
        return self.name.partition(":")[0] == "folder" or Path(self.name).is_dir()


def read_set(text, flag, args, split=None, resolution=None, trained_on=None):
    """The Images that --samples or --reference names: an .npz, a folder, a data set.

    split: of a data set; None for its reference. resolution: to which image files are brought, as
    for training; None for a data set's own, and for files as they are. trained_on: see
    load_reference. Its `sha256` is the hash of a file, of the content of a data set, or of the
    names and content of a folder's files.
    """
    dataset, _, own_split = text.partition(":")
    path = Path(text)
    if (path / "samples.npz").is_file():        # the folder of sample.py
        path = path / "samples.npz"
    if own_split not in ("", "train", "test"):
        raise UserError(f"{flag} {text}: a data set's split is train or test, as in {dataset}:test")
    if split and (dataset not in READERS or own_split not in ("", split)):
        raise UserError(f"--reference-split {split}: {flag} {text} has no such split; leave it out")
    if dataset in READERS:
        images, words = load_reference(dataset, args.data_dir or "data", own_split or split,
                                       resolution, args.pack_dir, trained_on)
        found = Images(text, len(images.labels), lambda rows: to_rgb(images.images[rows]),
                       images.labels, images.class_names, about={"what": f"{dataset}, {words}"},
                       sha256=images.sha256)
    elif path.is_dir():
        found = read_image_files(text, path, flag, resolution)
    elif path.exists():
        found = read_npz(text, path, flag)
    else:
        raise UserError(f"{flag} {text}: neither a file or folder nor a data set "
                        f"({', '.join(READERS)}; for one of your own, name its file with --plugin)")
    if found.n < 2:
        raise UserError(f"{flag} {text}: fewer than two images; a distance needs many")
    if found.labels is not None and found.labels.min() < 0:
        raise UserError(f"{flag} {text}: the label {found.labels.min()} is none; "
                        "labels are 0, 1, 2 ...")
    if found.at:
        found.size = found.at(np.arange(1)).shape[1:3]
    return found


def read_npz(name, path, flag):
    """An .npz of images, with the JSON beside it if there is one; or a file of --save-stats."""
    content = open_npz(path, flag)
    if about := about_stats(path):
        features = content["features"], content["logits"]
        return Images(name, len(features[0]), None, content.get("labels"), about.pop("class_names"),
                      features, about, disk.sha256(path), about.get("size"))
    images, labels = images_of_npz(content, path, flag)
    record = read_record(path, flag)
    class_names = record.get("data", {}).get("class_names")
    return Images(name, len(images), lambda rows: to_rgb(images[rows]), labels, class_names,
                  about=record, sha256=disk.sha256(path))


def about_stats(path):
    """What --save-stats wrote about a file of its own, a dict; None for other files."""
    try:
        with np.load(path) as f:
            about = json.loads(str(f["about"]))
            return about if {"made_by", "features_sha256", "class_names"} <= set(about) else None
    except Exception:       # NumPy raises many kinds for files that are no .npz
        return None


def read_image_files(name, root, flag, resolution=None):
    """A folder of image files: flat, or one sub-folder per class.

    Of one size; or with a resolution of any, brought to it as load_reference does.
    """
    paths, labels, names = image_folder(root, flag)
    made = disk.read_json(root / "export.json")
    if isinstance(made, dict) and made.get("class_names"):      # of sample.py --png: 0003-cat
        labels = np.array([int(folder[:4]) for folder in names])[labels]
        names = made["class_names"]
    first = open_image(paths[0], flag).size

    def at(rows):
        if resolution:
            return np.stack([read_image(paths[row], resolution) for row in rows])
        images = [open_image(paths[row], flag) for row in rows]
        for row, image in zip(rows, images):
            if image.size != first:
                raise UserError(f"{flag} {root}: {paths[row]} has other pixels per side than "
                                f"{paths[0]}; bring them to one size first")
        return np.stack([np.asarray(image) for image in images])
    # Not disk.fingerprint: others of the same sizes and times would be taken for these images
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(f"{os.path.relpath(path, root)} {disk.sha256(path)}\n"))
    return Images(name, len(paths), at, labels, names, sha256=digest.hexdigest())


# --------------------------------------------------------------------------------------------------
# What is measured

@dataclass
class Subject:
    """What is measured: the images of --samples, or a network of --ckpt that generates them."""
    words: str              # what it is, for the line that is printed before the work
    made: dict              # how the images were made, for the settings in the result
    data: dict              # of the training set, or {}: class_names, class_counts, resolution ...
    dataset: str | None     # its training set, the default of --reference
    images: Images | None = None
    net: torch.nn.Module | None = None
    sampling: Sampling | None = None    # how it generates them
    shape: tuple | None = None          # (C, H, W) of what the network generates, and
    to_image: Callable | None = None    # what makes images of it: see sample.space_of

    @property
    def class_names(self):
        """Class names of the training set, or of --samples; None where they are not known."""
        names = self.data.get("class_names")
        return self.images.class_names if names is None and self.images else names


def from_checkpoint(args, ckpt, rt):
    """The Subject that --ckpt names."""
    sampling = sampling_of(args, ckpt)
    net = load_merged(ckpt, args.weights, args.branch, rt.device)
    made = describe(args, ckpt, sampling, rt)
    data = ckpt["data"]
    words = (f"{args.ckpt} (step {ckpt['step']:,}, {made['weights']} weights, {made['branch']} "
             f"branch; {sampling_in_words(sampling.record())}, {rt.dtype_name()})")
    return Subject(words, made, data, data["dataset"], None, net, sampling,
                   *space_of(ckpt, rt.device, args.latents))


def from_samples(args, rt):
    """The Subject that --samples names."""
    with rt.rank_0_first():
        images = read_set(args.samples, "--samples", args)
    data = images.about.get("data", {})
    made = {"samples": args.samples, **images.about.get("settings", images.about),
            "samples_sha256": images.sha256}
    name = args.samples.partition(":")[0]
    dataset = data.get("dataset", name if name in READERS else None)
    return Subject(args.samples, made, data, dataset, images)


# --------------------------------------------------------------------------------------------------
# Against what

@dataclass
class Comparison:
    """What is measured against what, with one list of class names, and how many images."""
    subject: Subject
    reference: Images
    class_names: list | None            # what the labels of both sides refer to
    groups: dict                        # {"Many": classes, "Medium": ..., "Few": ...}, or {}
    num: int                            # class-balanced images for the overall numbers
    num_group: int                      # images per group, at least, where they are generated
    labels: np.ndarray | None           # (n,) of all images of the subject, in class_names
    indices: list | None = None         # their numbers (see pool_of), where they are generated
    assumed: dict = field(default_factory=dict)     # what was taken for granted, for the settings


def find_reference(args, subject, rt):
    """The Images that --reference names, by default those of the subject's training set."""
    args.data_dir, args.pack_dir = folders_of(subject.made.get("config", {}), args.data_dir,
                                              args.pack_dir)
    name = args.reference or subject.dataset
    if name is None:
        raise UserError("--reference: name what the samples are measured against: "
                        "a data set, an .npz, a folder, or a file of --save-stats")
    source = READERS.get(name.partition(":")[0])
    resolution = subject.data.get("resolution")
    if resolution is None and (not source or source.files):     # files of any size: the samples'
        height, width = subject.images.size or (0, 1)
        resolution = height if height == width else None
    with rt.rank_0_first():
        return read_set(name, "--reference", args, args.reference_split, resolution, subject.data)


def protocol_of(dataset):
    """The defaults of a data set: numbers of images, and the features."""
    return PROTOCOL.get(dataset, PROTOCOL["paper"])


def compare(args, subject, reference, extractor):
    """The Comparison that the flags describe. Raises UserError where the two do not fit."""
    class_names = subject.class_names or reference.class_names
    class_counts = subject.data.get("class_counts")
    assumed = assumed_labels(subject, reference)
    labels = to_classes(reference.labels, reference.class_names, class_names, "--reference")
    reference = replace(reference, labels=labels, class_names=class_names)
    for flag, images in (("--reference", reference), ("--samples", subject.images)):
        if images and images.features and images.about["features_sha256"] != extractor.sha256:
            raise UserError(f"{flag}: its features were made by {images.about['made_by']}, "
                            f"not by {extractor.name}")
        if images:
            extractor.refuse_other_size(images.size, flag)

    groups = {}                         # none where the training set was balanced
    if class_names and not (class_counts and is_balanced(class_counts)):
        groups = class_groups(class_counts or np.arange(len(class_names), 0, -1))
    protocol = protocol_of(subject.dataset or reference.name)
    num_group = args.num_group
    if num_group is None:
        num_group = 0 if args.num else protocol["num_group"]
    if subject.images:
        images = subject.images
        num = args.num or images.n
        if num > images.n:
            raise UserError(f"--num {num}: there are only {images.n} images in --samples "
                            f"{images.name}; leave it out to measure all of them")
        labels = to_classes(images.labels, images.class_names, class_names, "--samples")
        indices = None
    else:
        extractor.refuse_other_size((subject.data["resolution"],) * 2, "--ckpt")
        num = args.num or protocol["num"]
        labels, indices = pool_of(pool_sizes(num, num_group, groups, len(class_names)))

    # Else the overall distance would count such samples as wrong, whatever they look like
    if labels is not None and reference.labels is not None:
        lacking = np.setdiff1d(labels, reference.labels)
        if len(lacking):
            first = class_names[lacking[0]] if class_names else lacking[0]
            raise UserError(f"--reference {reference.name}: it has no image of {len(lacking)} of "
                            f"the samples' classes, such as {first}; name one with all of them, or "
                            "measure samples without these classes")
    return Comparison(subject, reference, class_names, groups, num, num_group, labels, indices,
                      assumed)


def assumed_labels(subject, reference):
    """{"labels": what was assumed} where labels of one side come without names of their classes."""
    labelled = subject.images is None or subject.images.labels is not None
    named = (subject.class_names is not None, reference.class_names is not None)
    if not labelled or reference.labels is None or all(named):
        return {}
    return {"labels": {
        (False, False): "of both sides without names: the same number is the same class",
        (False, True): "of the samples without names: taken in the order of the reference's",
        (True, False): "of the reference without names: taken in the order of the samples'"}[named]}


def pool_sizes(num, num_group, groups, C):
    """Images per class, (C,): balanced, `num` in all and `num_group` in every group, at least.

    The overall numbers are measured on the first num / C of each class. The paper's numbers on
    CIFAR-100: 607 per class in Many and Medium (33 classes each), 589 in Few (34 classes).
    """
    sizes = np.full(C, -(-num // C))
    for classes in groups.values():
        sizes[classes] = np.maximum(sizes[classes], -(-num_group // len(classes)))
    return sizes


def pool_of(sizes):
    """Labels (n,) and image numbers of a pool with `sizes` images per class.

    The j-th image of class c is number j C + c, whatever the sizes of the other classes.
    """
    C = len(sizes)
    numbers = [j * C + c for j in range(max(sizes)) for c in range(C) if j < sizes[c]]
    return np.array(numbers) % C, numbers
