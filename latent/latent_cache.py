"""Latents of a set of images, encoded once by all processes, and kept beside the packed images.

    moments = latent_cache.kept(base, made_from, shape, encode, rt)     # a memory map

The file is BASE-latents-HASH.npy, with a JSON beside it; HASH is that of all it was made from.
"""
import hashlib
import json
import os
from contextlib import ExitStack

import numpy as np

from disk import lock, write_json, writing
from runtime import UserError, progress
from sets.packing import content_hash, new_array, read_pack, state_of

BATCH = 16      # images that are encoded at a time


def kept(base, made_from, shape, encode, rt):
    """The moments of all images, float32 (N, 2, C, h, w), memory-mapped; encoded unless there.

    base: of the packed images, see data.pack_path. made_from: plain values that name the content
    of everything which the moments depend on. shape: theirs. encode(rows): those of a range of
    images, NumPy. One process group at a time encodes. Raises UserError.
    """
    base = path_of(base, made_from)
    with ExitStack() as held:
        moments = None

        def look():
            nonlocal moments
            moments = read(base, made_from, shape)
            if moments is None:
                held.enter_context(lock(base.parent, "--pack-dir", name=f".{base.name}.lock",
                                        wait=True))
                moments = read(base, made_from, shape)      # another run may have encoded them
                if moments is None:
                    say_what_is_there(base)
        rt.on_rank_0(look)
        if not rt.maximum(int(moments is not None)):
            encode_all(base, made_from, shape, encode, rt)
    moments = read(base, made_from, shape) if moments is None else moments
    if rt.maximum(int(moments is None)):
        raise UserError(f"--pack-dir: a process does not find {npy(base)}, which another has "
                        "written; all nodes must share this folder")
    return moments


def path_of(base, made_from):
    """The path of the moments, without its suffix; base: of the packed images."""
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    return base.with_name(f"{base.name}-latents-{digest[:16]}")


def npy(base):
    """base.npy."""
    return base.with_name(base.name + ".npy")


def say_what_is_there(base):
    """Print that a file is replaced, where there is one."""
    if npy(base).exists():
        print(f"{npy(base)}: damaged or not whole; the images are encoded again", flush=True)


def read(base, made_from, shape):
    """The moments in base.npy, memory-mapped; None where they are missing, damaged or others."""
    found = read_pack(base, made_from)
    if found is None or found[0].dtype != np.float32 or found[0].shape != tuple(shape):
        return None
    return found[0]


def encode_all(base, made_from, shape, encode, rt):
    """Write base.npy and base.json: each rank encodes every rt.world-th batch, rank 0 writes."""
    partial = None

    def begin():
        nonlocal partial
        with writing(npy(base), "--pack-dir"):
            base.with_name(base.name + ".json").unlink(missing_ok=True)
            partial = npy(base).with_name(npy(base).name + ".partial")
            new_array(partial, shape, np.float32)
    rt.on_rank_0(begin)
    try:
        out = np.load(partial, mmap_mode="r+") if partial else None
        step = BATCH * rt.world
        for first in progress(range(0, shape[0], step), desc="latents", unit="batch",
                              disable=rt.rank > 0):
            rows = share(first, shape[0], rt.rank)
            part = encode(rows) if rows else np.empty((0, *shape[1:]), np.float32)
            parts = rt.gather([part])
            if out is not None:
                out[first:first + step] = parts
        rt.on_rank_0(lambda: finish(base, partial, out, made_from))
    finally:
        if partial:
            partial.unlink(missing_ok=True)


def share(first, total, rank):
    """The rows of a rank among the batches that begin at row `first`: a range, perhaps empty."""
    start = min(first + rank * BATCH, total)
    return range(start, min(start + BATCH, total))


def finish(base, partial, out, made_from):
    """Give a file that is whole its name, and write its JSON."""
    out.flush()
    with writing(npy(base), "--pack-dir"):
        os.replace(partial, npy(base))
        state = state_of(npy(base))
    write_json(base.with_name(base.name + ".json"), {
        "shape": list(out.shape), "class_names": [], "labels": [], "provenance": made_from,
        "stamp": None, "file": state, "sha256": content_hash(out, [], [])}, "--pack-dir")
