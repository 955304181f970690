"""Ten steps of every loss, samples, metrics, classifiers and probes give what they gave before.

`python tests/same_numbers.py --write tests/numbers.json .` wrote numbers.json. On a machine like
the one that wrote it every bit must agree, but of metrics, for which NumPy's sums differ from
processor to processor; elsewhere the last digits of all numbers may differ.
"""
import json

import pytest
from conftest import ROOT
from same_numbers import machine, run

KEPT = json.loads((ROOT / "tests/numbers.json").read_text())
BY_NUMPY = {"drawn", "given", "kept", "prune/probe", "allocation", "dominance", "theory"}
LOOSE = {"drawn", "given", "kept"}          # Frechet distances of a few rounded images move most


@pytest.fixture(scope="module")
def now(tmp_path_factory):
    """What this checkout gives."""
    out = tmp_path_factory.mktemp("numbers")
    return run(ROOT, out / "runs", out / "results", 10)


def test_nothing_is_missing(now):
    assert {name: set(part) for name, part in now.items()} == {
        name: set(part) for name, part in KEPT["results"].items()}


@pytest.mark.parametrize("name", KEPT["results"])
def test_same(now, name):
    expected = KEPT["results"][name]
    if KEPT["machine"] == machine() and name in BY_NUMPY:
        assert now[name] == pytest.approx(expected, rel=1e-5, abs=1e-9)
    elif KEPT["machine"] == machine():
        assert now[name] == expected
    numbers = {k: v for k, v in expected.items() if not isinstance(v, str)}
    tolerance = 0.1 if name in LOOSE or name.startswith("classify") else 0.005
    assert {k: now[name][k] for k in numbers} == pytest.approx(numbers, rel=tolerance, abs=0.02)
