"""Image files read as pixels, and a data set packed into one array: NAME.npy beside NAME.json.

    images, meta = pack_once(Path("data/packed/birds"), read, provenance, stamp, 64, "birds")

Packing is done once per data set and resolution, on all cores; stopped, it goes on where it was.
The array is then memory-mapped: training needs no image files and no worker processes.
"""
import hashlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from disk import lock, read_json, write_atomic, write_json, writing
from runtime import UserError, progress


# --------------------------------------------------------------------------------------------------
# Image files

def read_image(path, resolution: int) -> np.ndarray:
    """One image file as (R, R, 3) uint8: short side resized (Lanczos), the centre square."""
    image = open_image(path, at_least=resolution)
    scale = resolution / min(image.size)
    size = [max(resolution, round(side * scale)) for side in image.size]
    left, top = ((side - resolution) // 2 for side in size)
    image = image.resize(size, Image.LANCZOS, reducing_gap=3.0)
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def open_image(path, flag="--data-dir", at_least=None):
    """One image file as an upright RGB image of PIL's.

    Turned by its EXIF. Grey, palette, CMYK and 16-bit images become RGB; transparent ones are put
    on white. at_least: pixels of the short side that are needed; a JPEG is decoded at no more than
    twice that. Raises UserError with the path of a file that cannot be read.
    """
    try:
        with warnings.catch_warnings():
            # Large photographs are fine
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
            # An "I" of PNG and PPM has 16 bits
            if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
                raise ValueError("pixels of 32 bits have no known range")
            if at_least:
                image.draft(None, (2 * at_least, 2 * at_least))
            image = ImageOps.exif_transpose(image)
            image.load()
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as e:      # of many kinds: Pillow's decoders pass on what they meet
        raise UserError(f"{flag}: {path} cannot be read as an image ({e}); fix or remove it") from e


# --------------------------------------------------------------------------------------------------
# Packs

def pack_once(base: Path, read, provenance, stamp, resolution, name):
    """The pack of a set, as read_pack; packed now unless it is there: one process at a time.

    read() -> (images, labels, class names). resolution: of image files; None for arrays. name: of
    the set.
    """
    if packed := read_pack(base, provenance, stamp):
        return packed
    contents = read()
    check_contents(*contents, name, files=resolution is not None)
    with lock(base.parent, "--pack-dir", name=f".{base.name}.lock", wait=True):
        if not read_pack(base, provenance, stamp):          # another process may have packed it
            write_pack(base, *contents, provenance, resolution, stamp)
    return read_pack(base, provenance, stamp)


def read_pack(base: Path, provenance, stamp=None):
    """(images as a memory map, the JSON) of a pack; None where it is not there, or is another one.

    provenance: what the set is. stamp: what it was made from, such as the fingerprint of its files.
    """
    path, record = base.with_name(base.name + ".npy"), base.with_name(base.name + ".json")
    meta = read_json(record)
    try:
        images = np.load(path, mmap_mode="r")
        if (meta["shape"], meta["provenance"], meta["stamp"]) != (
                list(images.shape), provenance, stamp):
            return None
        if meta["file"] != state_of(path):          # moved, or replaced: its content says which
            if content_hash(images, meta["labels"], meta["class_names"]) != meta["sha256"]:
                return None
            meta["file"] = state_of(path)
            with suppress(UserError):               # a folder that only others may write to
                write_json(record, meta, "--pack-dir")
        return images, meta
    except (OSError, ValueError, KeyError, TypeError, EOFError):    # missing, or cut short
        return None


def write_pack(base: Path, images, labels, class_names, provenance, resolution=None, stamp=None):
    """Write base.npy (the images) and base.json (labels, class names, provenance, hash).

    The JSON comes last: without it the pack does not count. images: an array, or paths of image
    files, which are read on all cores, each straight into its place.
    """
    path, record = base.with_name(base.name + ".npy"), base.with_name(base.name + ".json")
    record.unlink(missing_ok=True)
    source = {"provenance": provenance, "stamp": stamp}
    if resolution:
        pack_files(path, images, [len(images), resolution, resolution, 3], source)
        images = np.load(path, mmap_mode="r")
    else:
        images = np.ascontiguousarray(images, dtype=np.uint8)
        write_atomic(path, lambda f: np.save(f, images), "--pack-dir")
    counts = np.bincount(labels, minlength=len(class_names)).tolist()
    write_json(record, {
        "shape": list(images.shape), "class_names": list(class_names), "class_counts": counts,
        **source, "file": state_of(path), "sha256": content_hash(images, labels, class_names),
        "labels": np.asarray(labels).tolist()}, "--pack-dir")


def pack_files(path: Path, files, shape, source, block=4096):
    """Read and resize image files into the .npy `path`, block by block.

    They go to path.partial first; path.mark says how many of which set are there, so that a stopped
    packing goes on with the block that it was at. Raises UserError that names the files that cannot
    be read, once all have been tried.
    """
    def read(file):
        try:
            return read_image(file, shape[1])
        except UserError as e:
            return e

    partial, mark = (path.with_name(path.name + end) for end in (".partial", ".mark"))
    made = {"shape": shape, "source": source}
    before = read_json(mark) or {}
    goes_on = partial.exists() and before == {**made, "done": before.get("done")}
    first = before["done"] if goes_on else 0
    bad = {}            # file: why it cannot be read
    with writing(path, "--pack-dir"):
        if not goes_on:
            mark.unlink(missing_ok=True)
            new_array(partial, shape, np.uint8)
        with progress(total=shape[0], initial=first, desc="packing", unit="img") as bar:
            for start in range(first, shape[0], block):
                # Mapped anew for each block, so that no more than a block stays in memory
                packed = np.lib.format.open_memmap(partial, "r+")
                own = files[start:start + block]
                with ThreadPoolExecutor(os.cpu_count()) as pool:    # Pillow works outside the GIL
                    for i, image in enumerate(pool.map(read, own), start):
                        if isinstance(image, UserError):
                            bad[files[i]] = image
                        else:
                            packed[i] = image
                        bar.update()
                packed.flush()
                if not bad:
                    write_json(mark, {**made, "done": start + len(own)}, "--pack-dir")
        if len(bad) == 1:
            raise bad.popitem()[1]
        if bad:
            more = f" and {len(bad) - 10:,} more" if len(bad) > 10 else ""
            raise UserError(f"--data-dir: {len(bad):,} files cannot be read as images; fix or "
                            f"remove them: {', '.join(map(str, list(bad)[:10]))}{more}")
        os.replace(partial, path)
    mark.unlink(missing_ok=True)


def new_array(path, shape, dtype):
    """An empty .npy, with its space on the disk reserved.

    A full disk is an error here; while writing to the mapped file it would be a signal.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    np.lib.format.open_memmap(path, "w+", dtype, tuple(shape))
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))


# --------------------------------------------------------------------------------------------------
# What a pack is made of

def check_contents(images, labels, class_names, name, files):
    """Raise UserError where what a reader gives is not what readers.py says: else wrong labels.

    name: of the set. files: whether images are paths.
    """
    labels = np.asarray(labels)
    N, C = len(images), len(class_names)
    pixels = (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4
              and images.shape[1] == images.shape[2] and images.shape[3] in (1, 3))
    right = {
        "different class names": C and len(set(class_names)) == C,
        f"a whole number from 0 to {C - 1} for each of {N} images":
            N and labels.shape == (N,) and np.issubdtype(labels.dtype, np.integer)
            and 0 <= labels.min() <= labels.max() < C,
        "images as a uint8 array N x H x H x 3, or x 1 (paths of files need files=True in READERS)":
            files or pixels}
    for what, given in right.items():
        if not given:
            raise UserError(f"--dataset {name}: its reader does not give {what}")


def content_hash(images, labels, class_names, block=4096) -> str:
    """The SHA-256 of what a set consists of: pixels, labels and class names."""
    digest = hashlib.sha256(json.dumps([list(images.shape), list(class_names)]).encode())
    for start in range(0, len(images), block):
        digest.update(np.ascontiguousarray(images[start:start + block]))
    digest.update(np.asarray(labels, np.int64))
    return digest.hexdigest()


def labels_hash(labels, class_names) -> str:
    """A hash of labels (N,) and of the class names that they stand for."""
    text = json.dumps([np.asarray(labels).tolist(), list(class_names)])
    return hashlib.sha256(text.encode()).hexdigest()


def names_and_sizes(paths, data_dir) -> str:
    """A hash of the names and sizes of image files; where it differs, the set is another one."""
    digest = hashlib.sha256()
    for path in paths:
        name = os.path.relpath(path, data_dir)
        digest.update(os.fsencode(f"{name} {os.path.getsize(path)}\n"))
    return digest.hexdigest()


def state_of(path):
    """[size, times of change] of a file: where they are the same, so is its content."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
