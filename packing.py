"""Image files read as pixels, and a data set packed into one array: NAME.npy beside NAME.json.

    write_pack(Path("data/packed/birds"), paths, labels, class_names, provenance, resolution=64)
    images, meta = read_pack(Path("data/packed/birds"), provenance)

Packing is done once per data set and resolution, on all cores; stopped, it goes on where it was.
The array is then memory-mapped: training needs no image files and no worker processes.
"""
import hashlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from disk import read_json, write_atomic, write_json, writing
from runtime import UserError, progress


# --------------------------------------------------------------------------------------------------
# Image files

def read_image(path, resolution: int) -> np.ndarray:
    """One image file as (resolution, resolution, 3) uint8.

    Upright by its EXIF, short side resized, centre-cropped. Grey, palette, CMYK and 16-bit images
    become RGB; transparent ones are put on white. Raises UserError with the path of a file that
    cannot be read.
    """
    try:
        with warnings.catch_warnings():
            # Large photographs are fine
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
            # JPEG: decode no more than is needed
            image.draft(None, (2 * resolution, 2 * resolution))
            image = ImageOps.exif_transpose(image)
            image.load()
        return resize_and_crop(to_rgb_image(image), resolution)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        # SyntaxError: a broken PNG
        raise UserError(f"--data-dir: {path} cannot be read as an image ({e}); fix or remove "
                        "it") from e


def to_rgb_image(image):
    """A PIL image of any mode in RGB. Raises ValueError for floating-point pixels."""
    if image.mode.startswith("I"):                                          # 16-bit grey
        grey = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(grey.round().astype(np.uint8))
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


def fingerprint(paths, data_dir) -> str:
    """A hash of the names and sizes of image files; where it differs, the set is packed anew."""
    digest = hashlib.sha256()
    for path in paths:
        name = os.path.relpath(path, data_dir)
        digest.update(f"{name} {os.path.getsize(path)}\n".encode())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Packs

def write_pack(base: Path, images, labels, class_names, provenance, resolution=None):
    """Write base.npy (the images) and base.json (labels, class names, provenance).

    The JSON comes last: without it the pack does not count. images: an array, or paths of image
    files, which are read on all cores, each straight into its place; stopped and started again, it
    goes on with the block of images that it was at.
    """
    path = base.with_name(base.name + ".npy")
    if resolution:
        shape = [len(images), resolution, resolution, 3]
        pack_files(path, images, shape, provenance)
    else:
        shape = list(images.shape)

        def write_images(temporary):
            with open(temporary, "wb") as f:
                np.save(f, np.ascontiguousarray(images, dtype=np.uint8))
        write_atomic(path, write_images, "--data-dir")
    counts = np.bincount(labels, minlength=len(class_names)).tolist()
    write_json(base.with_name(base.name + ".json"), {
        "shape": shape, "class_names": list(class_names), "class_counts": counts,
        "provenance": provenance, "labels": np.asarray(labels).tolist()}, "--data-dir")


def pack_files(path: Path, files, shape, provenance, block=4096):
    """Read and resize image files into the .npy `path`, block by block.

    They go to path.partial first; path.mark says how many of its images are there.
    """
    partial = path.with_name(path.name + ".partial")
    mark = path.with_name(path.name + ".mark")
    with writing(path, "--pack-dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        first = packed_so_far(partial, mark, shape, provenance)
        if first is None:
            np.lib.format.open_memmap(partial, "w+", np.uint8, tuple(shape))
            first = 0
        try:
            with progress(total=shape[0], initial=first, desc="packing", unit="img") as bar:
                for start in range(first, shape[0], block):
                    rows = range(start, min(start + block, shape[0]))
                    pack_block(partial, files, rows, shape[1], bar)
                    done = {"shape": shape, "provenance": provenance, "done": rows.stop}
                    write_json(mark, done, "--pack-dir")
        finally:
            if not mark.exists():                           # nothing yet that is worth keeping
                partial.unlink(missing_ok=True)
        os.replace(partial, path)
        mark.unlink(missing_ok=True)


def packed_so_far(partial, mark, shape, provenance):
    """How many images an earlier, stopped packing of the same set has packed; None for none."""
    done = read_json(mark) or {}
    try:
        same = done["shape"] == shape and done["provenance"] == provenance
        if same and list(np.load(partial, mmap_mode="r").shape) == shape:
            return done["done"]
    except (OSError, ValueError, KeyError):
        pass
    return None


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


def read_pack(base: Path, provenance):
    """(images as a memory map, the JSON) of a pack.

    None where it is missing, not whole or of another provenance.
    """
    meta = read_json(base.with_name(base.name + ".json"))
    try:
        images = np.load(base.with_name(base.name + ".npy"), mmap_mode="r")
        whole = list(images.shape) == meta["shape"] and meta["provenance"] == provenance
        return (images, meta) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
