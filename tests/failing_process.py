"""What test_processes.py starts under torchrun: train.py, in which one rank fails after a step.

    torchrun ... tests/failing_process.py HOW RANK FILE flags of train.py   # FILE: written then
"""
import errno
import os
import sys
from pathlib import Path

import torch
from conftest import call
from PIL import Image

import loop
import train
from runtime import UserError, run

ERRORS = {
    "memory": torch.OutOfMemoryError("CUDA out of memory"),
    "disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "user": UserError("--flag: a mistake of one rank"),
    "bug": ZeroDivisionError("a mistake of the program"),
}


def main():
    """Run train.py with one function replaced: the writing of a picture, or the second update."""
    _, how, rank, file, *flags = sys.argv
    update = loop.Training.update

    def fail(*args, **kwargs):
        Path(file).touch()
        raise ERRORS[how]

    def second_fails(training):
        return fail() if training.step else update(training)
    if os.environ["RANK"] == rank and how == "disk":
        Image.Image.save = fail
    elif os.environ["RANK"] == rank:
        loop.Training.update = second_fails
    call(train.main, *flags)


if __name__ == "__main__":
    run(main)
