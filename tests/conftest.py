"""Shared by all tests: `pytest -n 2` from the project's folder, on the CPU.

No network, and no data but scikit-learn's digits.
"""
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:     # several threads of several workers only wait
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import classify
import runtime
import train
from data import load, long_tail
from sample import build_network

TINY = {"channels": 1, "num_classes": 10, "ch": 16, "ch_mult": [1, 2], "attn": [1],
        "num_res_blocks": 1, "dropout": 0.1}
TINY_FLAGS = ["--dataset", "digits", "--ch", "16", "--batch-size", "16", "--log-every", "1",
              "--sample-every", "0", "--device", "cpu"]


def call(main, *argv):
    """Run a script's main() in this process with these flags, as `run` would; errors are raised."""
    before = sys.argv
    sys.argv = ["script", *map(str, argv)]
    try:
        main()
    finally:
        sys.argv = before


def randomize(net, seed=0, scale=0.05):
    """Give every parameter a normal value, so that no part of the network is almost off."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * scale)
    return net


def tiny_net(rank_ratio=0.1, **changes):
    """A small random UNet for digits; rank_ratio None leaves it plain."""
    return randomize(build_network({**TINY, **changes}, rank_ratio))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder in which the digits are packed once for all tests."""
    folder = tmp_path_factory.mktemp("data")
    load("digits", folder)
    return folder


@pytest.fixture(scope="session")
def digits(data_dir):
    """The long-tailed digits, IR 20."""
    images = load("digits", data_dir)
    return images.take(long_tail(images.labels, 20))


@pytest.fixture(scope="session")
def cm_run(tmp_path_factory, data_dir):
    """The folder of a small CM run with its checkpoint.

    30 steps are enough to be different from its initial weights.
    """
    out = tmp_path_factory.mktemp("run") / "cm"
    call(train.main, *TINY_FLAGS, "--steps", 30, "--data-dir", data_dir, "--out", out)
    return out


@pytest.fixture(scope="session")
def classifier(tmp_path_factory, data_dir):
    """A quickly trained classifier of digits: its checkpoint's path."""
    out = tmp_path_factory.mktemp("classifier")
    call(classify.main, "--epochs", 6, "--width", 8, "--data-dir", data_dir, "--out", out,
         "--device", "cpu")
    return out / "ckpt.pt"


@pytest.fixture
def cpu():
    """A Runtime on the CPU in float32."""
    return runtime.Runtime(torch.device("cpu"), torch.float32)
