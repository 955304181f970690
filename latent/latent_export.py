"""Exports of stable_diffusion.py: LoRA files in PEFT's format.

    pipe.load_lora_weights(folder, weight_name="general.safetensors", adapter_name="general")
"""
import re
from pathlib import Path

import torch

from runtime import UserError

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
    for part, tensors in parts.items():
        save_file(tensors, Path(folder) / f"{part}.safetensors", metadata={"format": "pt"})
