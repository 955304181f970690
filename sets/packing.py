"""Image files read as pixels, and a data set packed into one array: NAME.npy beside NAME.json.

    write_pack(Path("data/packed/birds"), paths, labels, class_names, provenance, resolution=64)
    images, meta = read_pack(Path("data/packed/birds"), provenance)

Packing is done once per data set and resolution, on all cores; stopped, it goes on where it was.
The array is then memory-mapped: training needs no image files and no worker processes.
"""
import hashlib
import json
import os
import secrets
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from tokenize import TokenError

import numpy as np
from PIL import Image, ImageOps

from disk import lock, read_json, write_atomic, write_json, writing
from runtime import UserError, progress

# What a damaged .npy, or a JSON that lacks something, leads to
NOT_WHOLE = (OSError, ValueError, KeyError, TypeError, EOFError, SyntaxError, TokenError,
             MemoryError, OverflowError)


# --------------------------------------------------------------------------------------------------
# Image files

def read_image(path, resolution: int) -> np.ndarray:
    """One image file as (resolution, resolution, 3) uint8: short side resized, centre-cropped.

    The rest as open_image.
    """
    image = open_image(path, at_least=resolution)
    return resize_and_crop(image, resolution)


def open_image(path, flag="--data-dir", at_least=None):
    """One image file as an upright RGB image of PIL's.

    Turned by its EXIF. Grey, palette, CMYK and 16-bit images become RGB; transparent ones are put
    on white. at_least: pixels of the short side that are needed; a JPEG is decoded at no more than
    twice that. Raises UserError with the path of a file that cannot be read.
    """
    try:
        if not os.path.isfile(path):
            raise ValueError("it is not a regular file")
        with warnings.catch_warnings():
            # Large photographs are fine
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
            if image.mode == "I" and image.format not in ("PNG", "PPM"):    # 16-bit in those
                raise ValueError("32-bit pixels have no known range")
            if at_least:
                image.draft(None, (2 * at_least, 2 * at_least))
            image = ImageOps.exif_transpose(image)
            image.load()
        return to_rgb_image(image)
    except Exception as e:      # of many kinds: Pillow's decoders pass on what they meet
        raise UserError(f"{flag}: {path} cannot be read as an image ({e}); fix or remove it") from e


def to_rgb_image(image):
    """A PIL image of any mode in RGB. Raises ValueError for pixels without a known range."""
    if image.mode.startswith("I"):                                          # 16-bit grey
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("pixels outside 0 ... 65535 have no known range")
        image = Image.fromarray((grey / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if "A" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def resize_and_crop(image, resolution: int) -> np.ndarray:
    """An RGB image with its short side resized (Lanczos), the centre square: (R, R, 3) uint8."""
    scale = resolution / min(image.size)
    size = [max(resolution, round(side * scale)) for side in image.size]
    left, top = ((side - resolution) // 2 for side in size)
    image = image.resize(size, Image.LANCZOS, reducing_gap=3.0)
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def names_and_sizes(paths, data_dir) -> str:
    """A hash of the names and sizes of image files; where it differs, the set is another one.

    Raises UserError for one that is not there, such as a link that leads nowhere.
    """
    digest = hashlib.sha256()
    for path in paths:
        name = os.path.relpath(path, data_dir)
        try:
            digest.update(os.fsencode(f"{name} {os.path.getsize(path)}\n"))
        except OSError as e:
            raise UserError(f"--data-dir: {path} cannot be read ({e.strerror}); fix or remove "
                            "it") from e
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Packs

def check_contents(images, labels, class_names, name, files):
    """Raise UserError where what a reader gives is not what readers.py says.

    name: of the set. files: whether images are paths.
    """
    what = f"--dataset {name}: its reader gives"
    check_labels(images, labels, class_names, what)
    if files:
        other = [path for path in images if not isinstance(path, (str, os.PathLike))]
        if other:
            raise UserError(f"{what} a {type(other[0]).__name__} where READERS says files=True; "
                            "there must be paths of image files")
    else:
        check_pixels(images, what)


def check_labels(images, labels, class_names, what):
    """Raise UserError, which begins with `what`, unless each image has a label of a class."""
    if not class_names or len(set(class_names)) < len(class_names):
        raise UserError(f"{what} the class names {list(class_names)[:5]}; there must be one per "
                        "class, each another")
    labels = np.asarray(labels)
    C = len(class_names)
    if len(labels) != len(images) or labels.ndim != 1 or not len(images):
        raise UserError(f"{what} {len(images)} images and labels of shape {list(labels.shape)}; "
                        "there must be one label per image")
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{what} labels of type {labels.dtype}; they must be whole numbers")
    if labels.min() < 0 or labels.max() >= C:
        raise UserError(f"{what} labels from {labels.min()} to {labels.max()} and {C} class names; "
                        f"labels must be 0 to {C - 1}")


def check_pixels(images, what):
    """Raise UserError, which begins with `what`, unless this is an array of square images."""
    if not isinstance(images, np.ndarray) or images.dtype.kind not in "iuf":
        kind = getattr(images, "dtype", type(images).__name__)
        raise UserError(f"{what} images of type {kind}; they must be an array, uint8; for paths of "
                        "image files READERS must say files=True")
    N, H, W, C = images.shape if images.ndim == 4 else (0, 0, 0, 0)
    if H != W or C not in (1, 3):
        raise UserError(f"{what} images of shape {list(images.shape)}; they must be N x H x W x "
                        "3, or x 1, as high as wide")
    low, high = images.min(), images.max()
    if images.dtype.kind == "f" or low < 0 or high > 255:
        raise UserError(f"{what} images of type {images.dtype} from {low:g} to {high:g}; they must "
                        "be uint8, from 0 to 255")


def content_hash(images, labels, class_names, block=4096) -> str:
    """The SHA-256 of what a set consists of: pixels, labels and class names."""
    digest = hashlib.sha256(json.dumps([list(images.shape), list(class_names)]).encode())
    for start in range(0, len(images), block):
        digest.update(np.ascontiguousarray(images[start:start + block]))
    digest.update(np.asarray(labels, np.int64))
    return digest.hexdigest()


def write_pack(base: Path, images, labels, class_names, provenance, resolution=None, stamp=None):
    """Write base.npy (the images) and base.json (labels, class names, provenance, hash).

    The JSON comes last: without it the pack does not count. images: an array, or paths of image
    files, which are read on all cores, each straight into its place; stopped and started again, it
    goes on with the block of images that it was at. stamp: what a pack that is current says of its
    sources (see read_pack).
    """
    record = base.with_name(base.name + ".json")
    record.unlink(missing_ok=True)
    path = base.with_name(base.name + ".npy")
    source = {"provenance": provenance, "stamp": stamp}
    if resolution:
        shape = [len(images), resolution, resolution, 3]
        pack_files(path, images, shape, source)
        images = np.load(path, mmap_mode="r")
    else:
        shape = list(images.shape)
        images = np.ascontiguousarray(images, dtype=np.uint8)

        def write_images(temporary):
            with open(temporary, "wb") as f:
                np.save(f, images)
        write_atomic(path, write_images, "--pack-dir")
    counts = np.bincount(labels, minlength=len(class_names)).tolist()
    write_json(record, {
        "shape": shape, "class_names": list(class_names), "class_counts": counts, **source,
        "file": state_of(path),
        "sha256": content_hash(images, labels, class_names),
        "labels": np.asarray(labels).tolist()}, "--pack-dir")


def pack_files(path: Path, files, shape, source, block=4096):
    """Read and resize image files into the .npy `path`, block by block.

    They go to a file of another name first. path.mark says which one, and how many of its images
    are there: only the file that a mark names is gone on with.
    """
    mark = path.with_name(path.name + ".mark")
    with writing(path, "--pack-dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial, first = packed_so_far(path, mark, shape, source)
        if partial is None:
            partial, first = new_partial(path, shape, np.uint8), 0
        try:
            with progress(total=shape[0], initial=first, desc="packing", unit="img") as bar:
                for start in range(first, shape[0], block):
                    rows = range(start, min(start + block, shape[0]))
                    pack_block(partial, files, rows, shape[1], bar)
                    first = rows.stop
                    write_json(mark, {"partial": partial.name, "shape": shape, "source": source,
                                      "done": first}, "--pack-dir")
        finally:
            if not mark.exists():                           # nothing yet that is worth keeping
                partial.unlink(missing_ok=True)
        if first != shape[0]:
            raise UserError(f"--pack-dir: {path} has {first} of {shape[0]} images; start again")
        os.replace(partial, path)
        mark.unlink(missing_ok=True)


def packed_so_far(path, mark, shape, source):
    """(the file, how many of its images are there) of an earlier, stopped packing of the same set.

    (None, 0) where there is none; what is left of others is removed.
    """
    done = read_json(mark) or {}
    try:
        partial = path.with_name(done["partial"])
        same = done["shape"] == shape and done["source"] == source
        if same and list(np.load(partial, mmap_mode="r").shape) == shape:
            return partial, done["done"]
    except NOT_WHOLE:
        pass
    mark.unlink(missing_ok=True)
    for left in path.parent.glob(f"{path.name}.*.partial"):
        left.unlink(missing_ok=True)
    return None, 0


def new_partial(path, shape, dtype):
    """An empty array in a file of a new name beside `path`, with its space on the disk reserved."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        np.lib.format.open_memmap(partial, "w+", dtype, tuple(shape))
        if hasattr(os, "posix_fallocate"):
            # A full disk is an error here; while writing to the mapped file it would be a signal
            with open(partial, "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, os.path.getsize(partial))
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return partial


def pack_block(partial, files, rows, resolution, bar):
    """Read the image files number `rows` into their places in the array `partial`, on all cores."""
    def pack(packed, i):
        packed[i] = read_image(files[i], resolution)
    # Mapped anew for each block, so that no more than a block stays in memory
    packed = np.lib.format.open_memmap(partial, "r+")
    with ThreadPoolExecutor(os.cpu_count()) as pool:        # Pillow works outside the GIL
        for _ in pool.map(pack, repeat(packed), rows):
            bar.update()
    packed.flush()


def read_pack(base: Path, provenance, stamp=None):
    """(images as a memory map, the JSON) of a pack.

    None where it is missing, not whole, of another provenance or stamp, or of an older version
    that did not write down the hash of its content.
    """
    record = base.with_name(base.name + ".json")
    path = base.with_name(base.name + ".npy")
    meta = read_json(record)
    try:
        images = np.load(path, mmap_mode="r")
        whole = list(images.shape) == meta["shape"] and meta["sha256"]
        current = meta["provenance"] == provenance and meta["stamp"] == stamp
        if not whole or not current:
            return None
        if meta.get("file") != state_of(path):      # moved, or replaced: its content says which
            if content_hash(images, meta["labels"], meta["class_names"]) != meta["sha256"]:
                return None
            meta["file"] = state_of(path)
            with suppress(UserError):               # a folder that only others may write to
                write_json(record, meta, "--pack-dir")
        return images, meta
    except NOT_WHOLE:
        return None


def state_of(path):
    """[size, times of change] of a file: where they are the same, so is its content."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def pack_once(base: Path, read, provenance, stamp, resolution, name):
    """The pack of a set, as read_pack; packed now unless it is there: one process at a time.

    read() -> (images, labels, class names).
    """
    packed = read_pack(base, provenance, stamp)
    if packed:
        return packed
    contents = read()
    check_contents(*contents, name, files=resolution is not None)
    with lock(base.parent, "--pack-dir", name=f".{base.name}.lock", wait=True):
        packed = read_pack(base, provenance, stamp)         # another process may have packed it
        if packed is None:
            write_pack(base, *contents, provenance, resolution, stamp)
            packed = read_pack(base, provenance, stamp)
    return packed
