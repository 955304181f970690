"""bench.py: it measures train.py's step, and both sides of its table of metrics agree."""
import numpy as np
import pytest
import torch
from conftest import call

import bench
import disk
import train
from data import ImageSet


def test_bench_measures_the_papers_network(tmp_path, capsys):
    call(bench.main, "--batch-size", 1, "--rounds", 1, "--dtype", "float32", "--device", "cpu",
         "--methods", "DDPM", "CM on DDPM", "--out", tmp_path)
    result = disk.read_json(tmp_path / "bench.json")
    ddpm, cm = result["rows"]
    assert ddpm["ratio"] == 1
    assert cm["ratio"] == pytest.approx(cm["step_ms"] / ddpm["step_ms"])
    assert cm["images_per_s"] > 0
    assert ddpm["run_hours"] == pytest.approx(300_000 * 64 * ddpm["step_ms"] / 1000 / 3600)
    assert ddpm["peak_share"] > 0.02
    assert [row["network"] for row in result["sampling"]] == ["DDPM", "CM, merged"]
    assert all(row["images_per_s"] > 0 for row in result["sampling"])
    assert "| CM on DDPM | 1 | float32 | no |" in capsys.readouterr().out


def test_what_was_measured_stays_where_a_cell_runs_out_of_memory(monkeypatch, tmp_path, capsys):
    """One cell cannot be prepared, one fails while it is measured: two rows are left."""
    def make_step(method, *_):
        calls = []

        def call():
            calls.append(method)
            if method == "OC" and len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
        if method == "CBDM":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return bench.Step(call, None, 1, 2 ** 29, False)
    monkeypatch.setattr(bench, "make_step", make_step)
    monkeypatch.setattr(bench, "matmul_peak", lambda *_: 1e12)
    monkeypatch.setattr(bench, "sampling_speeds", lambda *_: {"DDPM": 1.0})
    call(bench.main, "--methods", "DDPM", "OC", "CBDM", "CM on OC", "--rounds", 2, "--dtype",
         "float32", "--device", "cpu", "--out", tmp_path)
    rows = disk.read_json(tmp_path / "bench.json")["rows"]
    assert [row["method"] for row in rows] == ["DDPM", "CM on OC"]
    assert rows[0]["memory_gib"] == 0.5
    printed = capsys.readouterr().out
    assert "OC, float32: out of memory, left out" in printed
    assert "CBDM, float32: out of memory, left out" in printed


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


def test_memory_of_tensors():
    """What is made within counts while it lives; views and what was there before do not."""
    before = torch.zeros(1000, requires_grad=True)
    with bench.TensorMemory() as memory:
        a = before.view(10, 100) * 2                # 4,000 bytes
        b = a[:5].exp()                             # 2,000, which its gradient needs
        del a
        c = torch.ones(250)                         # 1,000, while a is gone
    assert memory.peak == 6000
    del b, c
    assert sum(memory.sizes.values()) == 0


@pytest.mark.parametrize("metric", ["fid", "kid", "is", "prc"])
def test_both_sides_of_the_metrics_table_agree(metric):
    fake, real = bench.make_features(1000, 64)
    ours = bench.ours()[metric](fake, real)
    theirs = bench.theirs()[metric](fake, real)
    # KID's subsets are of 1,000 features: here all of them, so the deviation is 0 but for rounding
    smallest = 2e-3 if metric == "prc" else 1e-6
    assert list(ours) == pytest.approx(list(theirs), rel=1e-3, abs=smallest)
