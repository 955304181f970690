"""Pictures of samples, as in the paper's figures: a row per class, a column per method.

    python -m pages.figures --column DDPM=A/samples.npz --column CM=B/samples.npz --out figure.png
    python -m pages.figures --column DDPM=A/samples.npz --column CM=B/samples.npz --classes cat \\
        --across 5 --down 5 --out cat.png                   # Fig. G.5: one class, many images
    python -m pages.figures --column "theta_g=A/samples-general/samples.npz" \\
        --column "theta=A/samples/samples.npz" --no-real --out theta.png            # Fig. G.4

The first column has training images, as many as there are. Beside each class stands its number of
training images, and below the picture how the samples were made, and whether the images of the
columns began with the same noise: they did where seed and labels are the same.
"""
from argparse import BooleanOptionalAction
from pathlib import Path
from typing import NamedTuple

import numpy as np

import disk
from data import training_images
from networks import KINDS
from pages.page import named
from runtime import Parser, UserError, integer, run
from sample import chosen_classes, grid_image, sampling_in_words
from sets.samples import read_samples

DATA = ("class_names", "class_counts", "sha256")        # what the columns' records must agree in


class Samples(NamedTuple):
    """One column of a picture."""
    images: np.ndarray      # uint8 (N, H, W, 3)
    labels: np.ndarray      # (N,), class numbers
    settings: dict          # how sample.py made them
    data: dict              # the record of their network's training data
    file: Path | None = None


def read_column(file, flag):
    """The Samples of an .npz of sample.py, or of its folder. Raises UserError."""
    file = Path(file) / "samples.npz" if Path(file).is_dir() else Path(file)
    images, labels, record = read_samples(file, flag)
    if labels is None or "class_names" not in record.get("data", {}):
        raise UserError(f"{flag} {file}: without labels or the names of their classes; run "
                        "sample.py again")
    return Samples(images, labels, record["settings"], record["data"], file)


def fit_together(a, b):
    """Whether two Samples can be columns of one picture: of one size, of the same training data."""
    return (a.images.shape[1:] == b.images.shape[1:]
            and all(a.data.get(key) == b.data.get(key) for key in DATA))


def caption_of(columns, classes, n):
    """The line below a picture: how its samples were made, and whether from the same noise.

    n: how many images of each class are shown. sample.py draws the noise from the seed and the
    image's number alone; stable_diffusion.py names its "model", whose noise has another shape.
    """
    ways = {name: sampling_in_words(c.settings) for name, c in columns.items()}
    text = "; ".join(f"{name}: {way}" for name, way in ways.items())
    if len(set(ways.values())) == 1:
        text = next(iter(ways.values()))
    noise = [(c.settings.get("seed"), c.settings.get("model"),
              [np.flatnonzero(c.labels == k)[:n].tolist() for k in classes])
             for c in columns.values()]
    if len(noise) > 1:
        same = all(one == noise[0] for one in noise)
        text += "; the same noise in each column" if same else "; the columns' noise differs"
    return text


def make_parser():
    """The flags."""
    parser = Parser(__doc__)
    parser.add_argument("--column", action="append", required=True, metavar="NAME=FILE",
                        help="images of this samples.npz below this name; repeatable")
    parser.add_argument("--classes", help="the rows, by numbers, ranges or names: 6-9 or 0,3,cat; "
                        "or rarest (default: at most ten, evenly spread)")
    parser.add_argument("--across", type=integer(1, 100), default=4,
                        help="images beside each other in each column (default: 4)")
    parser.add_argument("--down", type=integer(1, 100), default=1,
                        help="images below each other, per class (default: 1)")
    parser.add_argument("--real", action=BooleanOptionalAction, default=True,
                        help="training images as the first column (default: yes)")
    parser.add_argument("--data-dir",
                        help="where the data set is (default: where it was in training)")
    parser.add_argument("--out", default="out/figure.png",
                        help="the picture, a PNG (default: out/figure.png)")
    return parser


def main():
    """Write the picture that the flags ask for."""
    parser = make_parser()
    args = parser.parse_args()
    if not args.real and args.data_dir:
        raise UserError("--data-dir: belongs to --real; leave it out")
    columns = {}
    for text in args.column:
        name, file = named(text, "--column")
        columns[name] = read_column(file, "--column")
        first_name, first = next(iter(columns.items()))
        if not fit_together(first, columns[name]):
            raise UserError(f"--column {text}: images of another size than those of {first_name}, "
                            "or its network was trained on other data")
    data = first.data

    common = set.intersection(*(set(c.labels.tolist()) for c in columns.values()))
    classes = sorted(common)
    if args.classes is not None:
        classes = list(dict.fromkeys(chosen_classes(args, data)))
    if not classes or not common.issuperset(classes):
        raise UserError(f"--classes {args.classes}: not every column has images of them; choose "
                        "others, or sample the same classes for each")
    caption = caption_of(columns, classes, args.across * args.down)
    shown = {name: (c.images, c.labels) for name, c in columns.items()}
    if args.real:
        ckpt = disk.load(first.settings.get("ckpt", ""), [*KINDS, "latent", "text"], "--real")
        real = training_images(ckpt, args.data_dir)
        shown = {"training images": (real.images, real.labels), **shown}
    picture = grid_image(shown, data["class_names"], data.get("class_counts"),
                         classes if args.classes else None, args.across, args.down, caption=caption)
    disk.write_png(args.out, picture)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
