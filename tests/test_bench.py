"""bench.py: it measures train.py's step, and both sides of its table of metrics agree."""
import numpy as np
import pytest
from conftest import call

import bench
import disk
import train
from data import ImageSet


def test_bench_measures_the_papers_network(tmp_path, capsys):
    call(bench.main, "--batch-size", 1, "--rounds", 1, "--dtype", "float32", "--device", "cpu",
         "--methods", "DDPM", "CM on DDPM", "--out", tmp_path)
    ddpm, cm = disk.read_json(tmp_path / "bench.json")["rows"]
    assert ddpm["ratio"] == 1
    assert cm["ratio"] == pytest.approx(cm["step_ms"] / ddpm["step_ms"])
    assert cm["images_per_s"] > 0
    assert ddpm["run_hours"] == pytest.approx(300_000 * 64 * ddpm["step_ms"] / 1000 / 3600)
    assert ddpm["peak_share"] > 0.02
    assert "| CM on DDPM | 1 | float32 | no |" in capsys.readouterr().out


def test_a_step_trains(cpu):
    """What is timed is training: a timed step changes the weights and leaves no gradients."""
    parser = train.make_parser()
    settings = train.resolve(parser.parse_args(["--warmup", "1", "--lr", "0.001"]))
    pixels = np.full((64, 32, 32, 3), 60, np.uint8)
    names = [str(c) for c in range(100)]
    images = ImageSet("flat", pixels, np.zeros(64, np.int64), names)
    step = bench.make_step("DDPM", images, 2, cpu, False, settings)
    before = [p.detach().clone() for p in step.net.parameters()]
    step.call()
    changes = [(p - old).detach().abs().sum() for p, old in zip(step.net.parameters(), before)]
    assert sum(map(float, changes)) > 0
    assert step.flops > 2e9
    assert all(p.grad is None for p in step.net.parameters())


@pytest.mark.parametrize("metric", ["fid", "kid", "is", "prc"])
def test_both_sides_of_the_metrics_table_agree(metric):
    fake, real = bench.make_features(1000, 64)
    ours = bench.ours()[metric](fake, real)
    theirs = bench.theirs()[metric](fake, real)
    # KID's subsets are of 1,000 features: here all of them, so the deviation is 0 but for rounding
    smallest = 2e-3 if metric == "prc" else 1e-6
    assert list(ours) == pytest.approx(list(theirs), rel=1e-3, abs=smallest)
