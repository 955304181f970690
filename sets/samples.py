"""Samples in an .npz: images in arr_0, perhaps labels in arr_1, as the ADM evaluator reads them.

    images, labels, record = read_samples("out/NAME/samples/samples.npz")

The JSON beside an .npz of sample.py says what made it, and for which file it stands.
"""
from pathlib import Path

import numpy as np

from data import to_classes, to_rgb
from disk import read_json, sha256
from runtime import UserError


def open_npz(path: str | Path, flag: str) -> dict[str, np.ndarray]:
    """{name: array} of an .npz file. Raises UserError where it cannot be read as one."""
    try:
        with np.load(path) as f:
            return {name: f[name] for name in f.files}
    except Exception as e:      # NumPy raises many kinds
        raise UserError(f"{flag} {path}: cannot be read as an .npz ({e})") from e


def images_of_npz(content: dict[str, np.ndarray], path: str | Path,
                  flag: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(images (N, H, W, 1 or 3) uint8, labels (N,) or None) of open_npz's result.

    arr_0 holds the images, arr_1 perhaps labels: the layout of the ADM evaluator. Raises UserError
    where they are of another kind.
    """
    images = content.get("arr_0", np.empty(0))
    labels = content.get("arr_1")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(f"{flag} {path}: must hold images in arr_0, N x H x W x 3 uint8, and "
                        f"perhaps labels in arr_1 (arr_0: {images.dtype}, {list(images.shape)})")
    if labels is not None and (labels.shape != (len(images),)
                               or not np.issubdtype(labels.dtype, np.integer)):
        raise UserError(f"{flag} {path}: arr_1 must hold {len(images)} whole numbers, one label "
                        "per image")
    return images, labels


def read_record(npz: str | Path, flag: str = "--samples") -> dict:
    """What sample.py wrote in the JSON beside an .npz: its "settings" and "data"; {} for none.

    Raises UserError where sample.py wrote the JSON for another .npz.
    """
    path = Path(npz).with_suffix(".json")
    record = read_json(path)
    if not isinstance(record, dict) or "settings" not in record:
        return {}                       # none, or not of sample.py
    if record.get("npz_sha256") != sha256(npz):
        raise UserError(f"{flag} {npz}: {path.name} beside it does not belong to it; run sample.py "
                        f"again, or remove {path.name}")
    return {"settings": record["settings"], "data": record.get("data", {})}


def read_samples(path: str | Path,
                 flag: str = "--samples") -> tuple[np.ndarray, np.ndarray | None, dict]:
    """Images (N, H, W, 3) uint8, labels (N,) and the record of an .npz that sample.py wrote.

    Raises UserError where the JSON beside it is missing, or not its own.
    """
    images, labels = images_of_npz(open_npz(path, flag), path, flag)
    record = read_record(path, flag)
    if not record:
        raise UserError(f"{flag} {path}: the .json that sample.py writes beside it is missing")
    names = record["data"].get("class_names")
    return to_rgb(images), to_classes(labels, names, names, f"{flag} {path}"), record
