"""bench.py: it measures train.py's step, and both sides of its table of metrics agree."""
import numpy as np
import pytest
import torch
from conftest import TINY, call, refuses
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import disk
import train
from data import Batches, ImageSet
from probes import bench


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
    of_ddpm, of_cm = result["sampling"]
    assert of_cm["ratio"] == pytest.approx(of_cm["images_per_s"] / of_ddpm["images_per_s"])
    # No cost at inference: merged, the same weights (35.8 million of four bytes) and activations
    assert of_cm["memory_gib"] == of_ddpm["memory_gib"] > 4 * 35.7e6 / 2 ** 30
    printed = capsys.readouterr().out
    assert "| CM on DDPM | 1 | float32 | no |" in printed
    assert "| CM, merged | 1 | float32 | " in printed


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
    monkeypatch.setattr(bench, "sampling_costs", lambda *_: {"DDPM": (1.0, 2 ** 30)})
    call(bench.main, "--methods", "DDPM", "OC", "CBDM", "CM on OC", "--rounds", 2, "--dtype",
         "float32", "--device", "cpu", "--out", tmp_path)
    rows = disk.read_json(tmp_path / "bench.json")["rows"]
    assert [row["method"] for row in rows] == ["DDPM", "CM on OC"]
    assert rows[0]["memory_gib"] == 0.5
    printed = capsys.readouterr().out
    assert "OC, float32: out of memory, left out" in printed
    assert "CBDM, float32: out of memory, left out" in printed


def test_what_was_measured_is_written_before_a_larger_batch(monkeypatch, tmp_path):
    """A CPU that has no memory left ends the process, or raises what is not caught."""
    def make_step(method, images, batch_size, *_):
        if batch_size == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return bench.Step(lambda: None, None, 1, 2 ** 29, False)
    monkeypatch.setattr(bench, "make_step", make_step)
    monkeypatch.setattr(bench, "matmul_peak", lambda *_: 1e12)
    monkeypatch.setattr(bench, "sampling_costs", lambda *_: {"DDPM": (1.0, 2 ** 30)})
    with pytest.raises(RuntimeError, match="can't allocate"):
        call(bench.main, "--methods", "DDPM", "--batch-size", 1, 2, "--rounds", 1, "--dtype",
             "float32", "--device", "cpu", "--out", tmp_path)
    found = disk.read_json(tmp_path / "bench.json")
    assert [row["batch"] for row in found["rows"]] == [1] and len(found["sampling"]) == 1


def test_a_step_trains(cpu):
    """What is timed is training: a timed step changes the weights and leaves no gradients."""
    parser = train.make_parser()
    settings = train.resolve(parser.parse_args(["--warmup", "1", "--lr", "0.001"]))
    pixels = np.full((100, 32, 32, 3), 60, np.uint8)
    names = [str(c) for c in range(100)]
    images = ImageSet("flat", pixels, np.arange(100), names)
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


# --------------------------------------------------------------------------------------------------
# The plan

def test_operations_of_a_small_module():
    """Views and empty memory are nothing; what was expanded is read once."""
    with FakeTensorMode(), bench.Operations() as counted:
        x = torch.ones(4, 8)                        # writes 128 bytes
        w = torch.ones(8, 2, dtype=torch.float64)   # 128
        y = torch.mm(x, w.float()).t()              # 128 + 64, then 128 + 64 + 32 with 2 x 64 flops
        y.add_(x[:, :2].t())                        # 2 x 32 read, 32 written
        torch.empty(100)
        z = y[:, :1].expand(2, 9) * 2               # 8 read, 72 written
    assert z.shape == (2, 9)
    assert [tuple(o) for o in counted.found] == [
        (128, 0), (128, 0), (192, 0), (224, 128), (96, 0), (80, 0)]


def test_an_estimate_is_the_longer_of_each():
    plan = bench.Plan([bench.Operation(100, 10), bench.Operation(10, 300)], 2 ** 30, 50)
    assert plan.seconds(bench.Device(10.0, 20.0, 1.0)) == 10 + 15 + 5
    assert plan.seconds(bench.Device(10.0, 20.0, 20.0)) == 40 + 5
    assert plan.counts(5) == {"launches": 2, "gb_moved": 160e-9, "gflop_per_image": 62e-9,
                              "memory_gib": 1}


@pytest.mark.parametrize("method", ["DDPM", "OC", "CM on OC", "CM on OC, 0.5"])
def test_a_plan_counts_what_a_real_step_does(cpu, method):
    network = {**TINY, "channels": 3, "num_classes": 100, "ch": 32}
    images = bench.noise_images()
    plan = bench.plan_step(method, images, 6, torch.float32, network)
    net = bench.make_network(method, network).to(memory_format=torch.channels_last)
    objective = bench.make_objective(method, net, images)
    batch = objective.draw_batch(*Batches(images, 6, 0, cpu.device).at(0), seed=0, step=0,
                       flip=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        objective(batch)[0].backward()
    net.zero_grad()
    with sdpa_kernel(SDPBackend.MATH), bench.Operations() as counted:
        objective(batch)[0].backward()
    assert sum(o.flops for o in plan.operations) == flops.get_total_flops() > 1e8
    assert len(plan.operations) == pytest.approx(len(counted.found), rel=0.01)
    moved, expected = (sum(o.bytes for o in found) for found in (plan.operations, counted.found))
    assert moved == pytest.approx(expected, rel=0.01)
    weights = 4 * sum(p.numel() for p in net.parameters())
    assert plan.update == 13 * weights
    drawn = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
             for t in bench.tensors_of(batch)}
    expected = counted.peak + sum(drawn.values()) + 4 * weights
    assert plan.memory == pytest.approx(expected, rel=0.001)


def test_a_plan_of_the_papers_network(tmp_path, capsys):
    def rows(*flags):
        call(bench.main, "--plan", "--batch-size", 64, "--methods", "DDPM", "CM on OC", "--out",
             tmp_path, *flags)
        return disk.read_json(tmp_path / "plan.json")
    fast = rows()
    header = next(line for line in capsys.readouterr().out.splitlines() if "| method" in line)
    assert all("(estimate)" in name for name in header.split("|")[3:-1])
    ddpm, cm = fast["rows"]
    assert fast["dtype"] == "bfloat16" and fast["peak_tflop_s"] == 989
    assert cm["gflop_per_image"] / ddpm["gflop_per_image"] == pytest.approx(1.73, abs=0.01)
    assert ddpm["run_hours"] == pytest.approx(300_000 * ddpm["step_ms"] / 3.6e6)
    assert cm["ratio"] == pytest.approx(cm["step_ms"] / ddpm["step_ms"]) and cm["ratio"] > 1.5
    slow = rows("--dtype", "float32", "--bandwidth", 1e9, "--peak", 1, "--launch-us", 0)["rows"][0]
    assert slow["step_ms"] == pytest.approx(64 * ddpm["gflop_per_image"], rel=1e-3)
    assert slow["memory_gib"] > ddpm["memory_gib"] and slow["launches"] < ddpm["launches"]


def test_flags_of_the_plan(capsys, tmp_path):
    refuses(capsys, bench.main, "--bandwidth", 5, says=["--bandwidth", "--plan"])
    refuses(capsys, bench.main, "--plan", "--rounds", 3, says=["--rounds", "measures nothing"])
    (tmp_path / "file").touch()
    refuses(capsys, bench.main, "--plan", "--out", tmp_path / "file", says=["--out"])


# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("metric", ["fid", "kid", "is", "prc"])
def test_both_sides_of_the_metrics_table_agree(metric):
    fake, real = bench.make_features(1000, 64)
    ours = bench.ours()[metric](fake, real)
    theirs = bench.theirs()[metric](fake, real)
    # KID's subsets are of 1,000 features: here all of them, so the deviation is 0 but for rounding
    smallest = 2e-3 if metric == "prc" else 1e-6
    assert list(ours) == pytest.approx(list(theirs), rel=1e-3, abs=smallest)
