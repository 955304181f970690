"""Does a model copy its training images? Nearest neighbours of generated images, per group.

    python -m probes.copies --ckpt out/NAME/ckpt.pt --samples out/NAME/samples/samples.npz

A generated image counts as a copy where its nearest training image is nearer to it than to any
other training image: in pixels, and in the features of a network. Real images that the model has
not seen do so by chance too; their share is printed beside those of the models. A model that has
seen 7 images of a class and copies them has a good Frechet distance, but generates nothing new.

Several --samples of one training set stand in one table. --ckpt says which training set: that of
the long-tailed draw, not the balanced one.
"""
from pathlib import Path

import numpy as np
import torch

import disk
import runtime
from data import class_groups, folders_of, load, to_rgb, training_images
from metrics.features import Extractor
from metrics.image_sets import protocol_of
from metrics.scores import radii, squared_distances
from networks import KINDS
from runtime import Parser, UserError, integer, run
from sample import grid_image
from sets.readers import NoSuchSplit
from sets.samples import read_samples

BLOCK = 2048        # rows whose distances are in memory at once


# --------------------------------------------------------------------------------------------------
# Copies

def copies(images, train):
    """Which images are copies, (N,) bool, and each one's nearest training image, (N,).

    images (N, D), train (M, D), M at least 2: float64 tensors. An image is a copy where the nearest
    training image x has no other training image as near as this one; so train's rows are distinct.
    """
    found = [squared_distances(part, train).min(1) for part in images.split(BLOCK)]
    index, distance = (torch.cat([getattr(f, key) for f in found]) for key in ("indices", "values"))
    return distance < radii(train, 1, BLOCK)[index], index


def shares(is_copy, labels, groups):
    """{"all": share of copies, group: its share}; groups without an image are left out."""
    result = {"all": float(is_copy.double().mean())}
    for name, classes in groups.items():
        mine = torch.from_numpy(np.isin(labels, classes))
        if mine.any():
            result[name] = float(is_copy[mine].double().mean())
    return result


def points_of(extractor, images, title):
    """uint8 images (N, H, W, 3) as float64 rows: {"pixels": (N, H W 3), "features": (N, D)}."""
    features, _ = extractor.extract(lambda rows: images[rows], len(images), title)
    return {"pixels": torch.from_numpy(images.reshape(len(images), -1)).double(),
            "features": torch.from_numpy(features).double()}


# --------------------------------------------------------------------------------------------------

def unseen_images(args, ckpt, images):
    """(images uint8 (N, H, W, 3), labels) that the draw left out, or of the test set; or None."""
    config = ckpt["config"]
    data_dir, pack_dir = folders_of(config, args.data_dir)
    seen = {image.tobytes() for image in images.images}
    for split in ("train", "test"):
        try:
            whole = load(config["dataset"], data_dir, split, config["resolution"],
                         ckpt["data"]["class_names"], pack_dir)
        except NoSuchSplit:
            break
        rows = [i for i, image in enumerate(whole.images) if image.tobytes() not in seen]
        if rows:
            return to_rgb(whole.images[rows]), whole.labels[rows]
    return None


def pairs_picture(images, labels, index, train, data, groups):
    """A grid of generated images of Few, each with its nearest training image at its right.

    Of all classes where there are no groups, or no images of Few.
    """
    few = np.flatnonzero(np.isin(labels, groups.get("Few", [])))
    rows = few if len(few) else np.arange(len(labels))
    both = np.stack([images[rows], train[index[rows]]], 1).reshape(-1, *images.shape[1:])
    title = "in pairs: a generated image, its nearest training image"
    return grid_image({title: (both, np.repeat(labels[rows], 2))}, data["class_names"],
                      data["class_counts"])


def make_parser():
    """All flags."""
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", required=True,
                        help="a checkpoint of train.py: its training set is compared with")
    parser.add_argument("--samples", nargs="+", required=True,
                        help=".npz files of sample.py, of models of this training set")
    parser.add_argument("--features", help="a network's name or a checkpoint of classify.py, as "
                        "evaluate.py's, and the same default")
    parser.add_argument("--data-dir", help="where data sets are (default: the checkpoint's)")
    parser.add_argument("--batch-size", type=integer(1), default=64,
                        help="images at a time in the feature network (default: 64)")
    parser.add_common("folder of copies.json and pairs.png (default: copies beside --ckpt)")
    return parser


def main():
    """Measure every set of images and the unseen real ones; print and write."""
    args = make_parser().parse_args()
    out = Path(args.out or Path(args.ckpt).parent / "copies")

    # What is measured
    ckpt = disk.load(args.ckpt, KINDS)
    data = ckpt["data"]
    sets = {}
    for path in args.samples:
        images, labels, record = read_samples(path)
        if labels is None or record["data"] != data:
            raise UserError(f"--samples {path}: not of the training set of --ckpt {args.ckpt}")
        sets[path] = images, labels
    disk.check_writable(out / "copies.json")
    rt = runtime.setup(args.device, args.dtype)
    train = training_images(ckpt, args.data_dir)
    print(train.table())
    unseen = unseen_images(args, ckpt, train)
    features = args.features or protocol_of(data["dataset"])["features"]
    extractor = Extractor(features, rt, args.batch_size)
    extractor.refuse_other_size((data["resolution"],) * 2, "--ckpt")
    groups = class_groups(data["class_counts"])

    # Measure
    # Each image once: two of one have no distance, and nothing is nearer than that
    distinct = {image.tobytes(): row for row, image in enumerate(train.images)}
    real = to_rgb(train.images[list(distinct.values())])
    of_train = points_of(extractor, real, "training images")
    if unseen:
        sets = {"real, not in the training set": unseen, **sets}
    else:
        print("note: no real images that the model has not seen, so what is a copy by chance is "
              "not measured; of a folder, `python data.py split` holds some out")
    rows, indices = {}, {}
    for name, (images, labels) in sets.items():
        rows[name] = {"num": {"all": len(labels), **{
            group: int(np.isin(labels, classes).sum()) for group, classes in groups.items()}}}
        for space, points in points_of(extractor, images, name).items():
            is_copy, index = copies(points, of_train[space])
            rows[name][space] = shares(is_copy, labels, groups)
            indices[name] = index.numpy()

    # Print and write
    print(f"share of images that are nearer to a training image than any other training image is "
          f"({len(real):,} distinct training images; features of {extractor.name})")
    for name, result in rows.items():
        for space in of_train:
            words = "  ".join(f"{key} {share:.1%}" for key, share in result[space].items())
            print(f"{name}  {space}: {words}")
    disk.write_json(out / "copies.json", {
        "rows": rows, "ckpt": args.ckpt, "data": data, "features": extractor.name,
        "features_sha256": extractor.sha256,
        "samples_sha256": {path: disk.sha256(path) for path in args.samples}})
    first = args.samples[0]
    picture = pairs_picture(*sets[first], indices[first], real, data, groups)
    disk.write_png(out / "pairs.png", picture)
    print(f"wrote {out}: copies.json; pairs.png, images of {first} with their nearest ones")


if __name__ == "__main__":
    run(main)
