"""bench.py: it measures the step that train.py takes, and our metrics beside torch-fidelity's."""
import pytest
from conftest import call

import bench
import runtime
import train


def test_bench_measures_the_papers_network(tmp_path, capsys):
    call(bench.main, "--batch-size", 1, "--rounds", 1, "--dtype", "float32", "--device", "cpu", "--methods", "DDPM", "CM on DDPM", "--out", tmp_path)
    ddpm, cm = runtime.read_json(tmp_path / "bench.json")["rows"]
    assert ddpm["ratio"] == 1 and cm["ratio"] == pytest.approx(cm["step_ms"] / ddpm["step_ms"]) and cm["images_per_s"] > 0
    assert ddpm["run_hours"] == pytest.approx(300_000 * 64 * ddpm["step_ms"] / 1000 / 3600) and ddpm["peak_share"] > 0.02
    assert "| CM on DDPM | 1 | float32 | no |" in capsys.readouterr().out


def test_a_step_trains(cpu):
    """What is timed is training: the loss of a fixed batch falls over the timed steps."""
    args = train.resolve(train.make_parser().parse_args(["--warmup", "1", "--lr", "0.001"]))
    from data import ImageSet
    import numpy as np
    images = ImageSet("flat", np.full((64, 32, 32, 3), 60, np.uint8), np.zeros(64, np.int64), [str(c) for c in range(100)])
    step, net, flops, _ = bench.make_step("DDPM", images, 2, cpu, False, args)
    before = [p.detach().clone() for p in net.parameters()]
    step()
    assert sum(float((a - b).detach().abs().sum()) for a, b in zip(before, net.parameters())) > 0 and flops > 2e9
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("metric", ["fid", "kid", "is", "prc"])
def test_both_sides_of_the_metrics_table_agree(metric):
    values = []
    for whose in ("ours", "theirs"):
        work = bench.compute_metric(metric, whose, 1000, 64)
        next(work)
        values.append(next(work))
    assert values[0] == pytest.approx(values[1], rel=1e-3, abs=2e-3 if metric == "prc" else 1e-6)       # of 1,000 features all of KID's subsets are one: deviation 0
