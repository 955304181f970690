"""Ten steps of every loss, samples, metrics, classifiers and probes give what they gave before.

`python tests/same_numbers.py --write tests/numbers.json .` wrote numbers.json. On a machine like
the one that wrote it every bit of what torch computes must agree, and five digits of what NumPy
and SciPy do; elsewhere the last digits of numbers may differ.
"""
import json

import pytest
from conftest import ROOT
from same_numbers import machine, run

KEPT = json.loads((ROOT / "tests/numbers.json").read_text())
LOOSE = {"drawn", "given", "kept"}          # Frechet distances of a few rounded images move most
# NumPy's BLAS has kernels of its own for each kind of CPU
NUMPYS = {*LOOSE, "prune/probe", "allocation", "dominance", "theory"}


@pytest.fixture(scope="module")
def now(tmp_path_factory):
    """What this checkout gives."""
    out = tmp_path_factory.mktemp("numbers")
    return run(ROOT, out / "runs", out / "results")


def test_nothing_is_missing(now):
    assert {name: set(part) for name, part in now.items()} == {
        name: set(part) for name, part in KEPT["results"].items()}


@pytest.mark.parametrize("name", KEPT["results"])
def test_same(now, name):
    expected = KEPT["results"][name]
    if KEPT["machine"] == machine():
        if name in NUMPYS:
            expected = pytest.approx(expected, rel=1e-5, abs=1e-9)
        assert now[name] == expected
        return
    numbers = {k: v for k, v in expected.items() if not isinstance(v, str)}
    tolerance = 0.1 if name in LOOSE or name.startswith("classify") else 0.005
    assert {k: now[name][k] for k in numbers} == pytest.approx(numbers, rel=tolerance, abs=0.02)
