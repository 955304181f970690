"""Exports of stable_diffusion.py: LoRA files in PEFT's format, and folders that are written whole.

    write_folder(folder, "lora", record, write, "--lora")   # write(a folder of another name)
    pipe.load_lora_weights(folder, weight_name="general.safetensors", adapter_name="general")

A folder that is exported holds export.json, which says what made it and which files are its own.
Only such a folder is replaced.
"""
import os
import re
import shutil
from glob import escape
from pathlib import Path

import torch

import disk
from runtime import UserError

RECORD = "export.json"
# Our name of a parameter; of the two parts of a weight the LoRA is number 0, the reserved part 1
NAME = re.compile(r"(?:encoder|decoder)\.(.+)\.parametrizations\.weight\.([01])\.([AB])")
PARTS = {"0": "general", "1": "minority"}


# --------------------------------------------------------------------------------------------------
# PEFT's format

def to_peft(values):
    """{"general": B_1 A_1, "minority": BA}, each as PEFT names it; a part that is not there lacks.

    values: {name: tensor} of a checkpoint's low-rank parts. A part is {name: tensor} with
    "unet.LAYER.lora_A.weight" (r, k) and "...lora_B.weight" (d, r), to be added with scale 1.
    Raises UserError where a checkpoint has something else.
    """
    found = {}
    for name, value in values.items():
        match = NAME.fullmatch(name)
        if not match:
            raise UserError(f"--ckpt: its part {name!r} is not one that "
                            "stable_diffusion.py train makes")
        layer, part, matrix = match.groups()
        own = found.setdefault(PARTS[part], {})
        own[f"unet.{layer}.lora_{matrix}.weight"] = value
    if not found:
        raise UserError("--ckpt: it holds no low-rank parts; it is not whole")
    return {part: with_one_rank(found[part]) for part in PARTS.values() if part in found}


def with_one_rank(tensors):
    """A and B of all layers with the largest of their ranks, filled up with zeros.

    A narrow layer's rank is cut. Where a file has several ranks, older versions of diffusers scale
    every layer by one of them.
    """
    rank = max(min(value.shape) for value in tensors.values())
    filled = {}
    for name, value in tensors.items():
        axis = 0 if ".lora_A." in name else 1
        shape = list(value.shape)
        shape[axis] = rank
        filled[name] = torch.zeros(shape, dtype=torch.float32)
        filled[name].narrow(axis, 0, value.shape[axis]).copy_(value)
    return filled


def write_lora(parts, folder):
    """FOLDER/general.safetensors and, where there is one, minority.safetensors, of to_peft."""
    from safetensors.torch import save_file     # diffusers needs it, too
    Path(folder).mkdir()
    for part, tensors in parts.items():
        save_file(tensors, Path(folder) / f"{part}.safetensors", metadata={"format": "pt"})


# --------------------------------------------------------------------------------------------------
# A folder that is written whole

def files_in(folder):
    """The names of all files and links in a folder, sorted."""
    paths = [p for p in Path(folder).rglob("*") if p.is_symlink() or not p.is_dir()]
    return sorted(str(p.relative_to(folder)) for p in paths)


def refuse_other_folder(folder, kind, flag):
    """Raise UserError where write_folder would fail, or destroy what is no export of this kind."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{flag} {folder}: a file or a link; name a folder")
    there = files_in(folder)
    record = disk.read_json(folder / RECORD)
    known = isinstance(record, dict) and (record.get("format"), record.get("kind")) == (
        disk.FORMAT, kind)
    own = [RECORD, *record.get("files", [])] if known else []
    others = [name for name in there if name not in own]
    if others:
        raise UserError(f"{flag} {folder}: holds files that are not those of an earlier {flag}, "
                        f"such as {others[0]}; choose another folder, or move them")
    disk.check_writable(folder.with_name(f".{folder.name}.try"), flag)


def write_folder(folder, kind, settings, write, flag):
    """Make a folder under a temporary name, then rename it, in place of an earlier export.

    write(path): makes the folder. settings: what its export.json says. Raises UserError that names
    `flag`.
    """
    folder = Path(os.path.abspath(folder))
    refuse_other_folder(folder, kind, flag)
    new = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with disk.writing(folder, flag):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for path in folder.parent.glob(f".{escape(folder.name)}.*.tmp"):
            if disk.is_left_over(path):         # of a call that was killed
                shutil.rmtree(path)
        try:
            write_or_fail(write, new)
            disk.write_json(new / RECORD, {"format": disk.FORMAT, "kind": kind,
                                           "settings": settings, "files": files_in(new)}, flag)
            put_in_place(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def write_or_fail(write, path):
    """write(path); a failure of safetensors' to write becomes an OSError, as other failures are."""
    from safetensors import SafetensorError
    try:
        write(path)
    except SafetensorError as e:
        raise OSError(str(e)) from e


def put_in_place(new, folder):
    """Rename the folder `new` to `folder`; what was there is removed after that."""
    before = new.with_name(f".{folder.name}.old.{os.getpid()}.tmp")
    if folder.exists():
        os.replace(folder, before)
    try:
        os.replace(new, folder)
    except OSError:
        if before.exists():
            os.replace(before, folder)
        raise
    shutil.rmtree(before, ignore_errors=True)
