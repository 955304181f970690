"""Pictures of samples, as in the paper's figures: a row per class, a column per method.

    python -m pages.figures --column DDPM=A/samples.npz --column CM=B/samples.npz --out figure.png
    python -m pages.figures --column DDPM=A/samples.npz --column CM=B/samples.npz --classes cat \\
        --across 5 --down 5 --out cat.png                   # Fig. G.5: one class, many images
    python -m pages.figures --column "theta_g=A/samples-general/samples.npz" \\
        --column "theta=A/samples/samples.npz" --no-real --out theta.png            # Fig. G.4

The first column has training images, as many as there are. Beside each class stands its number of
training images, and below the picture how the samples were made, and whether the images of the
columns began with the same noise: they did where seed and labels are the same. Each picture is
written twice: as PNG, and as PDF with text that is text.
"""
import textwrap
from argparse import BooleanOptionalAction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import disk
import runtime
from data import class_groups, read_samples, to_rgb, training_images
from runtime import Parser, UserError, integer, run
from networks import KINDS
from sample import chosen_classes, printable, sampling_in_words, ten_classes

DPI = 100
TILE = 56           # pixels of an image in a picture, about
GAP = 4             # pixels between images
BETWEEN = 24        # pixels between columns
TITLE = 30          # pixels above the images
LINE = 18           # pixels of a line below them
TEXT = 11           # points
SMALL = 9           # points, of the line below
DATA = ("class_names", "class_counts", "sha256")        # what the columns' records must agree in,
DRAW = ("dataset", "ir", "tail_seed", "class_order", "resolution")      # and their configurations


class Samples(NamedTuple):
    """One column of a picture."""
    title: str
    images: np.ndarray      # uint8 (N, H, W, 3)
    labels: np.ndarray      # (N,), class numbers
    settings: dict | None = None        # how sample.py made them; None for training images


# --------------------------------------------------------------------------------------------------
# What is shown

def by_frequency(classes, counts):
    """Class numbers, the most frequent class first, as class_groups; as they are without counts."""
    return sorted(classes, key=lambda c: (-counts[c], c)) if counts is not None else list(classes)


def common_classes(columns):
    """At most ten classes of which every column has images, evenly spread, ascending."""
    common = sorted(set.intersection(*(set(c.labels.tolist()) for c in columns)))
    if not common:
        raise UserError("--column: no class of which every column has images; sample the same "
                        "classes for each")
    return [common[i] for i in ten_classes(len(common))]


def from_same_noise(columns, classes, n):
    """Whether the first n images of each class began with the same noise in all sampled columns.

    sample.py draws it from the seed and the image's number alone; None where that is not known.
    """
    sampled = [c for c in columns if c.settings is not None]
    if any("seed" not in c.settings for c in sampled):
        return None
    # stable_diffusion.py names its Stable Diffusion, whose noise has another shape
    made = [(c.settings["seed"], c.settings.get("model"),
             [np.flatnonzero(c.labels == k)[:n].tolist() for k in classes]) for c in sampled]
    return all(one == made[0] for one in made)


def caption_of(columns, classes, n):
    """The line below a picture: how its samples were made, and whether from the same noise.

    n: how many images of each class are shown.
    """
    sampled = [c for c in columns if c.settings is not None]
    if not sampled:
        return ""
    ways = list(dict.fromkeys(sampling_in_words(c.settings) for c in sampled))
    text = ways[0] if len(ways) == 1 else "; ".join(f"{c.title}: {sampling_in_words(c.settings)}"
                                                    for c in sampled)
    if len(sampled) > 1:
        text += {True: "; the same noise in each column", False: "; the columns' noise differs",
                 None: "; it is not known whether from the same noise"}[
                     from_same_noise(columns, classes, n)]
    return text


# --------------------------------------------------------------------------------------------------
# The picture

def enlarged(image, size):
    """An image (H, W, 3) at `size` x `size` pixels, a multiple of its own: no pixel is blurred."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.NEAREST))


def column_pixels(column, classes, across, down, size):
    """The images of a column as one picture: uint8, `down` rows of `across` images per class."""
    cell = size + GAP
    canvas = np.full((len(classes) * down * cell - GAP, across * cell - GAP, 3), 255, np.uint8)
    for r, c in enumerate(classes):
        chosen = column.images[np.flatnonzero(column.labels == c)[:across * down]]
        for k, image in enumerate(to_rgb(chosen)):
            y, x = (r * down + k // across) * cell, k % across * cell
            canvas[y:y + size, x:x + size] = enlarged(image, size)
    return canvas


def width_of(texts, plt, points=TEXT):
    """The width in pixels of the longest of some texts."""
    fig = plt.figure(dpi=DPI)
    widths = [fig.text(0, 0, text, fontsize=points).get_window_extent().width for text in texts]
    plt.close(fig)
    return round(max(widths, default=0))


def draw_names(ax, classes, class_names, counts, height, top, left):
    """The classes' names and numbers of images beside their rows; brackets of their groups.

    height: pixels of a class; top: where the first one begins; left: where the images begin.
    """
    for r, c in enumerate(classes):
        ax.text(left - 10, top + (r + 0.5) * height - GAP / 2, label_of(c, class_names, counts),
                fontsize=TEXT, ha="right", va="center")
    groups = class_groups(counts) if counts is not None else {}
    for name, members in groups.items():
        rows = [r for r, c in enumerate(classes) if c in members]
        if rows:
            begin = top + rows[0] * height + 3
            end = top + (rows[-1] + 1) * height - GAP - 3
            ax.text(8, (begin + end) / 2, name, fontsize=TEXT, ha="left", va="center")
            ax.plot([88, 82, 82, 88], [begin, begin, end, end], "black", linewidth=1.4)


def label_of(c, class_names, counts):
    """A class's name, and its number of training images where that is known."""
    name = disk.in_figure(printable(class_names[c])[:60])
    return name if counts is None else f"{name} ({counts[c]})"


def write(columns, class_names, counts, path, classes=None, across=4, down=1,
          with_caption=False, suffixes=("png",)):
    """Write a picture of several Samples side by side, once per suffix: a row per class.

    class_names: of all classes. counts: training images per class, or None. classes: the rows, the
    most frequent one first whatever their order; None: at most ten that every column has. across:
    images beside each other in each column; down: below each other per class; at most as many as
    there are. with_caption: whether caption_of's line stands below. Raises UserError where the
    columns have no class in common.
    """
    plt = disk.pyplot()
    classes = by_frequency(common_classes(columns) if classes is None else classes, counts)
    most = max(int((c.labels == k).sum()) for c in columns for k in classes)
    across = min(across, most)
    down = min(down, -(-most // across))
    caption = caption_of(columns, classes, across * down) if with_caption else ""
    pixels = columns[0].images.shape[1]
    size = pixels * max(1, round(TILE / pixels))
    height = down * (size + GAP)                    # of a class
    parts = [column_pixels(c, classes, across, down, size) for c in columns]

    names = width_of([label_of(c, class_names, counts) for c in classes], plt)
    left = names + 20 + (90 if counts is not None and class_groups(counts) else 0)
    widths = [max(part.shape[1], width_of([disk.in_figure(column.title)], plt))
              for column, part in zip(columns, parts)]
    images = sum(widths) + BETWEEN * (len(parts) - 1)
    lines = textwrap.wrap(disk.in_figure(caption), max(60, images // 7))
    width = left + max(images, width_of(lines, plt, SMALL)) + 8
    bottom = TITLE + len(classes) * height
    total = bottom + (LINE * len(lines) + 6 if lines else 0)

    fig = plt.figure(figsize=(width / DPI, total / DPI), dpi=DPI)
    ax = fig.add_axes([0, 0, 1, 1])
    ax.set(xlim=(0, width), ylim=(total, 0))        # in pixels, from the upper left corner
    ax.axis("off")
    draw_names(ax, classes, class_names, counts, height, TITLE, left)
    x = left
    for column, part, part_width in zip(columns, parts, widths):
        ax.text(x, TITLE / 2, disk.in_figure(column.title), fontsize=TEXT, va="center")
        ax.imshow(part, extent=(x, x + part.shape[1], TITLE + part.shape[0], TITLE),
                  interpolation="none", aspect="auto")
        x += part_width + BETWEEN
    ax.set(xlim=(0, width), ylim=(total, 0))        # imshow has set its own
    for k, line in enumerate(lines):
        ax.text(left, bottom + (k + 0.5) * LINE, line, fontsize=SMALL, va="center")
    disk.save_figure(fig, path, suffixes, DPI)


# --------------------------------------------------------------------------------------------------

def read_columns(given):
    """(Samples per --column, the data's record). Raises UserError."""
    columns = []
    for text in given:
        name, _, file = text.rpartition("=")
        name = " ".join(name.split())
        if not name:
            raise UserError(f"--column {text}: give NAME=FILE, with a samples.npz of sample.py")
        if name in [c.title for c in columns]:
            raise UserError(f"--column {text}: two columns are called {name}; give each a name of "
                            "its own")
        if Path(file).is_dir():
            file = Path(file) / "samples.npz"
        images, labels, record = read_samples(file, "--column")
        if labels is None or "class_names" not in record.get("data", {}):
            raise UserError(f"--column {text}: without labels or the names of their classes; "
                            "run sample.py again")
        column = Samples(name, images, labels, record["settings"])
        if not columns:
            data, first = record["data"], column
        if any(record["data"].get(key) != data.get(key) for key in DATA):
            raise UserError(f"--column {text}: trained on other images than {given[0]}")
        if images.shape[1:] != first.images.shape[1:]:
            raise UserError(f"--column {text}: images of another size than {given[0]}")
        columns.append(column)
    return columns, data


def training_images_of(columns, data_dir):
    """The images that all columns' networks were trained on, as Samples. Raises UserError."""
    found = []
    for c in columns:
        try:
            ckpt = disk.load(c.settings.get("ckpt", ""), KINDS, "--column")
        except UserError as error:
            raise UserError(f"--real: the checkpoint of {c.title} cannot be read ({error}); start "
                            "where sample.py was started, or leave the training images out with "
                            "--no-real") from error
        if ckpt.sha256 != c.settings.get("ckpt_sha256"):
            raise UserError(f"--column {c.title}: its checkpoint has been trained since; run "
                            "sample.py again, or give --no-real")
        found.append({key: ckpt["config"].get(key) for key in DRAW})
        if found[-1] != found[0]:
            key = next(key for key in DRAW if found[-1][key] != found[0][key])
            raise UserError(f"--column {c.title}: trained on other images than {columns[0].title} "
                            f"({key} {found[-1][key]}, not {found[0][key]}); give --no-real")
    real = training_images(ckpt, data_dir)
    return Samples("training images", real.images, real.labels)


def is_figure(path):
    """Whether a file may be a picture of ours: one that matplotlib wrote."""
    return b"atplotlib" in Path(path).read_bytes()


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
                        help="the picture, a .png; beside it goes a .pdf "
                        "(default: out/figure.png)")
    return parser


def main():
    """Write the picture that the flags ask for."""
    parser = make_parser()
    args = parser.parse_args()
    runtime.refuse_processes("-m pages.figures")
    out = Path(args.out)
    if out.suffix != ".png":
        raise UserError(f"--out {args.out}: names the picture; end it in .png")
    if not args.real and "data_dir" in parser.given:
        raise UserError("--data-dir: belongs to --real; leave it out")
    for path in (out, out.with_suffix(".pdf")):
        disk.check_writable(path)
        disk.refuse_overwriting(path, is_figure, "--out", "a picture of figures.py")
    columns, data = read_columns(args.column)
    names = data["class_names"]
    classes = None
    if args.classes is not None:
        classes = list(dict.fromkeys(chosen_classes(args, data)))
        for column in columns:
            missing = [names[c] for c in classes if c not in column.labels]
            if missing:
                raise UserError(f"--classes: {column.title} has no images of {missing[0]}; choose "
                                "others, or sample it with sample.py --classes")
    if args.real:
        columns.insert(0, training_images_of(columns, args.data_dir))
    write(columns, names, data.get("class_counts"), out, classes, args.across, args.down, True,
          ("png", "pdf"))
    print(f"wrote {out}, {out.with_suffix('.pdf').name}")


if __name__ == "__main__":
    run(main)
