"""What test_processes.py starts under torchrun with two gloo processes.

Several runs share one pair of interpreters.
"""
import json
import sys
from pathlib import Path

from conftest import call

import evaluate
import sample
import train
from runtime import run


def main():
    """Run each [script, flags ...] of the JSON file in sys.argv[1], in turn."""
    scripts = {"train": train.main, "sample": sample.main, "evaluate": evaluate.main}
    for script, *flags in json.loads(Path(sys.argv[1]).read_text()):
        call(scripts[script], *flags)


if __name__ == "__main__":
    run(main)
