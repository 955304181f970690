"""budget.py: what a step needs is counted right, and the fewest passes that fit are taken."""
import json

import pytest
import torch
from conftest import TINY_FLAGS, call, read_log, refuses
from torch import nn

import budget
import disk
import train


def test_what_a_pass_keeps_is_counted():
    """tanh keeps its output, a Linear its input: n x 8 and n x 16 floats, a mask 100 once."""
    net = nn.Sequential(nn.Linear(16, 8), nn.Tanh())
    x = torch.randn(4, 16)

    def loss_of(n):
        once = torch.ones(100, requires_grad=True)
        return net(x[:n].clone()).sum() + (once * torch.rand(100)).sum()
    need = budget.measure_memory(net, loss_of, 4)
    weights = 4 * (16 * 8 + 8)
    assert need.per_image == 4 * (16 + 8)
    assert 3 * weights + 400 <= need.fixed <= 3 * weights + 800
    more = 2 * need.per_image * budget.WORKSPACE
    assert need.of(4) - need.of(2) == pytest.approx(more, abs=1)
    assert all(p.grad is None for p in net.parameters())


def test_passes_of_one_image_and_frozen_weights():
    """Where a pass has one image all that it keeps is that image's; what is frozen has no Adam."""
    net = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    net[0].requires_grad_(False)
    x = torch.randn(1, 16)
    need = budget.measure_memory(net, lambda n: net(x[:n]).sum(), 1)
    assert need == (3 * 4 * (8 * 4 + 4), need.per_image) and need.per_image >= 4 * 8
    assert budget.Memory(10, 100).of(2) == 10 + (200 << 20) + 1.3 * 200
    assert budget.passes_that_fit(budget.Memory(10, 100), 2, need.of(2)) is None


@pytest.mark.parametrize("free, passes", [(100, 1), (60, 2), (30, 4), (15, 12), (1, None)])
def test_the_fewest_passes_that_fit(monkeypatch, free, passes):
    monkeypatch.setattr(budget, "PROCESS", 0)
    monkeypatch.setattr(budget, "WORKSPACE", 1)
    monkeypatch.setattr(budget, "MARGIN", 1)
    assert budget.passes_that_fit(budget.Memory(8, 7), 12, free) == passes


def test_a_container_has_less_than_its_machine(tmp_path, monkeypatch):
    limit, usage = tmp_path / "max", tmp_path / "current"
    limit.write_text("5000000\n")
    usage.write_text("2000000\n")
    monkeypatch.setattr(budget, "CGROUPS", ((tmp_path, "max", "current", ""),))
    assert budget.free_memory(torch.device("cpu")) == 3_000_000
    # Copies of files in memory make room
    (tmp_path / "memory.stat").write_text("anon 9\ninactive_file 500000\nactive_file 40\n")
    assert budget.free_memory(torch.device("cpu")) == 3_500_040
    limit.write_text("1000000\n")
    assert budget.free_memory(torch.device("cpu")) == 0
    (tmp_path / "memory.stat").unlink()
    limit.write_text("5000000\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert budget.free_memory(torch.device("cpu")) == 1_000_000
    limit.write_text("max\n")
    assert budget.free_memory(torch.device("cpu")) > 3_000_000
    assert budget.free_memory(torch.device("mps")) is None


def test_accumulate_auto_takes_what_fits(tmp_path, data_dir, monkeypatch, capsys):
    """Little memory: passes of 4 images. The same numbers as with --accumulate 4 (dropout 0)."""
    flags = [*TINY_FLAGS, "--steps", 2, "--data-dir", data_dir, "--out"]
    measure = budget.measure_memory
    needs = []

    def measured(*args):
        needs.append(measure(*args))
        return needs[-1]
    monkeypatch.setattr(budget, "measure_memory", measured)
    call(train.main, *flags, tmp_path / "four", "--accumulate", 4)
    fits = round(needs[0].of(5) / budget.MARGIN)
    monkeypatch.setattr(budget, "free_memory", lambda device: fits)
    call(train.main, *flags, tmp_path / "auto")
    assert "each step takes 4 passes (--accumulate 4)" in capsys.readouterr().out
    assert read_log(tmp_path / "auto") == read_log(tmp_path / "four")
    assert json.loads((tmp_path / "auto/config.json").read_text())["config"]["accumulate"] == 4
    # Going on where memory suffices again: in the passes that it began with
    monkeypatch.setattr(budget, "free_memory", lambda device: 1 << 40)
    call(train.main, *flags, tmp_path / "auto", "--steps", 3)
    assert disk.load(tmp_path / "auto/ckpt.pt", ["diffusion"])["config"]["accumulate"] == 4
    monkeypatch.setattr(budget, "free_memory", lambda device: 1000)
    refuses(capsys, train.main, *flags, tmp_path / "none",
            says=["--accumulate auto", "one image needs", "--accumulate 16"])
