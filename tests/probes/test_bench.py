"""bench.py: it measures train.py's step."""
import numpy as np
import pytest
import torch
from conftest import call

import disk
import train
from data import ImageSet
from probes import bench


@pytest.mark.slow
def test_bench_measures_the_papers_network(tmp_path):
    call(bench.main, "--batch-size", 1, "--rounds", 1, "--dtype", "float32", "--device", "cpu",
         "--methods", "DDPM", "CM on DDPM", "--out", tmp_path)
    result = disk.read_json(tmp_path / "bench.json")
    ddpm, cm = result["rows"]
    assert ddpm["ratio"] == 1 and cm["ratio"] == pytest.approx(cm["step_ms"] / ddpm["step_ms"])
    assert ddpm["run_hours"] == pytest.approx(300_000 * 64 * ddpm["step_ms"] / 1000 / 3600)
    assert cm["images_per_s"] > 0
    of_ddpm, of_cm = result["sampling"]
    assert of_cm["ratio"] == pytest.approx(of_cm["images_per_s"] / of_ddpm["images_per_s"])


def test_a_step_trains(cpu):
    """What is timed is training: a timed step changes the weights and leaves no gradients."""
    settings = train.resolve(train.make_parser().parse_args(["--warmup", "1", "--lr", "0.001"]))
    pixels = np.full((100, 32, 32, 3), 60, np.uint8)
    images = ImageSet("flat", pixels, np.arange(100), [str(c) for c in range(100)])
    step = bench.make_step(bench.Cell("DDPM", "float32", False), images, 2, cpu, settings)
    params = step.args[0].net.parameters
    before = [p.detach().clone() for p in params()]
    step()
    assert not all(torch.equal(p, old) for p, old in zip(params(), before))
    assert all(p.grad is None for p in params())
