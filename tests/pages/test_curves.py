"""curves.py: differences at equal time, paired by seed, and Holm's correction."""
import numpy as np
import pytest
from conftest import call
from PIL import Image

import disk
from pages import curves


def write(folder, method, seed, step, few, ch=16, omega=0.0):
    """A result of evaluate.py, of one checkpoint."""
    part = {"fd": few / 2, "recall": 0.5}
    disk.write_json(folder / f"{method}-{ch}-{omega:g}-{seed}-{step}.json", {
        "settings": {"step": step, "guidance": omega, "config": {"ch": ch, "seed": seed}},
        **part, "classes": {},
        "groups": {"Many": part, "Medium": part, "Few": {"fd": few, "recall": 0.5}}})


def test_pairs_are_of_one_seed_and_one_time(tmp_path):
    for seed in range(3):
        for step, few in {1000: 9, 1700: 5, 2500: 4}.items():
            write(tmp_path, "ddpm", seed, step, few + 10 * seed)
        write(tmp_path, "cm", seed, 1000, 3 + 10 * seed + 0.1 * seed)       # at 1,700: -2, -1.9 ...
        write(tmp_path, "cm", seed, 600, 8)                                 # at 1,020: within 3 %
        write(tmp_path, "cm", seed, 1250, 8)                                # at 2,125: no partner
    found = dict(map(curves.read_curve, [f"DDPM={tmp_path}/ddpm-*", f"CM={tmp_path}/cm-*"]))
    gains = curves.compare([*found.items()], [1.0, 1.7])
    assert [(panel, time) for panel, time, *_ in gains[::len(curves.COLUMNS)]] == [
        ((16, 0.0), 1000), ((16, 0.0), 1700)]
    few = curves.COLUMNS.index("Few fid")
    np.testing.assert_allclose(gains[few][-1], [-1, -11, -21])
    np.testing.assert_allclose(gains[len(curves.COLUMNS) + few][-1], [-2, -1.9, -1.8])
    out = tmp_path / "page.md"
    call(curves.main, "--curve", f"DDPM={tmp_path}/ddpm-*", "--curve", f"CM={tmp_path}/cm-*",
         "--cost", 1.7, "--out", out)
    rows = [line for line in out.read_text().splitlines() if line.startswith("| CM")]
    # t(2) at 97.5 % is 4.3027, the standard error of the three gains 0.1 / sqrt(3)
    assert "-1.90 (-2.15 to -1.65)" in rows[1] and "-11.00" in rows[0]
    assert Image.open(out.with_suffix(".png")).size[0] > 100


@pytest.mark.parametrize("p, corrected", [
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.5, 0.9], [1, 1]), ([0.02], [0.02])])
def test_holm(p, corrected):
    np.testing.assert_allclose(curves.holm(p), corrected)
