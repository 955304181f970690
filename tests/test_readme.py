"""The README's "Hack it" blocks run as printed, and its file map names every file."""
import re

import pytest
import torch
from conftest import ROOT, TINY_FLAGS, call

import losses
import readers
import runtime
import train

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT.split("## Hack it")[1], re.S)


def test_file_map():
    for path in [*ROOT.glob("*.py"), ROOT / "run_all.sh"]:
        assert f"`{path.name}`" in TEXT, path.name


@pytest.mark.parametrize("cm", ["--cm", "--no-cm"])
def test_a_loss_of_your_own(tmp_path, data_dir, monkeypatch, cm):
    monkeypatch.setattr(losses, "BASES", losses.BASES.copy())
    monkeypatch.setattr(train, "BASES", losses.BASES)
    exec(BLOCKS[0], {})
    call(train.main, *TINY_FLAGS, "--base", "huber", cm, "--steps", 2, "--data-dir", data_dir, "--out", tmp_path)
    ckpt = runtime.load(tmp_path / "ckpt.pt", ["diffusion"])
    assert (ckpt["step"], ckpt["config"]["base"], ckpt["rank_ratio"]) == (2, "huber", 0.1 if cm == "--cm" else None)


def test_a_data_set_of_your_own(tmp_path, monkeypatch):
    exec(BLOCKS[1], {})
    monkeypatch.setitem(readers.READERS, "stripes", readers.READERS.pop("stripes"))         # gone again afterwards
    flags = [*TINY_FLAGS, "--dataset", "stripes", "--ir", 10, "--ch-mult", 1, 2, "--num-res-blocks", 1, "--steps", 2]
    call(train.main, *flags, "--data-dir", tmp_path, "--out", tmp_path / "run")
    record = runtime.load(tmp_path / "run/ckpt.pt", ["diffusion"])["data"]
    assert record["class_names"] == ["top", "middle", "bottom"] and record["class_counts"] == [100, 31, 10]


def test_cm_on_your_own_network():
    scope = {}
    exec(BLOCKS[2], scope)
    assert torch.equal(scope["full"], scope["general"])             # B = 0: nothing has been trained


def test_blocks_are_short():
    assert len(BLOCKS) == 3 and all(len([l for l in b.splitlines() if l.strip()]) <= 10 for b in BLOCKS)
