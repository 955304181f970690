"""bench.py: it measures train.py's step; what fits no more is left out, what was measured stays."""
import numpy as np
import pytest
import torch
from conftest import call

import disk
import train
from data import ImageSet
from probes import bench


@pytest.mark.slow
def test_bench_measures_the_papers_network(tmp_path, capsys):
    call(bench.main, "--batch-size", 1, "--rounds", 1, "--dtype", "float32", "--device", "cpu",
         "--methods", "DDPM", "CM on DDPM", "--out", tmp_path)
    result = disk.read_json(tmp_path / "bench.json")
    ddpm, cm = result["rows"]
    assert ddpm["ratio"] == 1 and cm["ratio"] == pytest.approx(cm["step_ms"] / ddpm["step_ms"])
    assert ddpm["run_hours"] == pytest.approx(300_000 * 64 * ddpm["step_ms"] / 1000 / 3600)
    assert cm["images_per_s"] > 0
    of_ddpm, of_cm = result["sampling"]
    assert of_cm["ratio"] == pytest.approx(of_cm["images_per_s"] / of_ddpm["images_per_s"])
    printed = capsys.readouterr().out
    assert "| CM on DDPM | 1 | float32 | no |" in printed
    assert "| CM, merged | 1 | float32 | " in printed


def test_what_was_measured_stays(monkeypatch, tmp_path, capsys):
    """A cell that runs out of memory is left out; a CPU's larger batch ends the process."""
    def make_step(method, images, batch_size, *_):
        calls = []

        def call():
            calls.append(method)
            if method == "OC" and len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
        if method == "CBDM":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if batch_size == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return bench.Step(call, None, False)
    monkeypatch.setattr(bench, "make_step", make_step)
    monkeypatch.setattr(bench, "bench_sampling", lambda *_: [{
        "network": "DDPM"}])
    with pytest.raises(RuntimeError):
        call(bench.main, "--methods", "DDPM", "OC", "CBDM", "CM on OC", "--rounds", 2,
             "--batch-size", 1, 2, "--dtype", "float32", "--device", "cpu", "--out", tmp_path)
    found = disk.read_json(tmp_path / "bench.json")
    assert [row["method"] for row in found["rows"]] == ["DDPM", "CM on OC"]
    assert len(found["sampling"]) == 1
    printed = capsys.readouterr().out
    assert "OC, float32: out of memory" in printed and "CBDM, float32: out of memory" in printed


def test_a_step_trains(cpu):
    """What is timed is training: a timed step changes the weights and leaves no gradients."""
    settings = train.resolve(train.make_parser().parse_args(["--warmup", "1", "--lr", "0.001"]))
    pixels = np.full((100, 32, 32, 3), 60, np.uint8)
    images = ImageSet("flat", pixels, np.arange(100), [str(c) for c in range(100)])
    step = bench.make_step("DDPM", images, 2, cpu, False, settings)
    before = [p.detach().clone() for p in step.net.parameters()]
    step.call()
    changes = [(p - old).detach().abs().sum() for p, old in zip(step.net.parameters(), before)]
    assert sum(map(float, changes)) > 0
    assert all(p.grad is None for p in step.net.parameters())
