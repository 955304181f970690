"""theory_sim.py: closed forms against the simulation (exact binomial tests) and each other."""
import itertools
import math

import numpy as np
import pytest
from conftest import call
from scipy.stats import binomtest

import disk
import theory_sim as ts


@pytest.fixture(scope="module")
def points():
    return ts.results(20_000, seed=1)


def test_closed_forms_agree_with_the_simulation(points):
    """Exact binomial p-values of all points with a probability in (0.01, 0.99), Bonferroni."""
    inner = [p for p in points if 0.01 < p["theory"] < 0.99]
    assert len(inner) > 0.8 * len(points)
    p_values = [binomtest(p["hits"], p["trials"], p["theory"]).pvalue for p in inner]
    assert min(p_values) > 0.01 / len(inner)
    assert max(p_values) <= 1
    assert sum(v < 0.05 for v in p_values) < 0.15 * len(p_values)


def test_the_test_would_notice_a_wrong_formula(points):
    """With (F.16) for (F.15) the same test fails."""
    f1 = [p for p in points if "simplified" in p]
    wrong = [binomtest(p["hits"], p["trials"], p["simplified"]).pvalue for p in f1]
    assert min(wrong) < 1e-10
    at_0 = ts.orthogonal_means(5, 0.0)
    exact = ts.theorem_f1(ts.LONG_TAIL, at_0, 4.0)
    assert exact == pytest.approx(ts.theorem_f1_simplified(ts.LONG_TAIL, at_0, 4.0))


def test_the_bound_of_theorem_3_1_holds_and_that_of_f_2_not_always(points):
    sweeps = [p["sweep"] for p in ts.violations(points)]
    assert not [s for s in sweeps if s.startswith("Theorem 3.1") or "orthogonal" in s]
    assert len([s for s in sweeps if "tilted by 75" in s]) >= 2


def test_the_bound_of_theorem_3_1_over_many_settings():
    """The exact value stays below the bound for every setting, N_2 > N_1 included."""
    settings = itertools.product((1, 5, 20, 49, 50, 51, 80, 99), (0, 0.2, 0.7, 0.99, 1),
                                 (0.1, 1.0, 2.0, math.pi), (0.5, 5.0, 50.0))
    for n_2, alpha, angle, ratio in settings:
        counts = np.array([100.0 - n_2, n_2])
        exact = ts.exact_3_1(alpha, counts, ts.two_means(angle), ratio)
        bound = ts.theorem_3_1(alpha, 100, ratio, angle)
        tighter = ts.line_of_f14(alpha, 100, n_2, ratio, angle)
        assert exact <= tighter + 1e-12
        assert tighter <= bound + 1e-12
        assert alpha in (0, 1) or bound > 0.999 or tighter < bound


def test_the_line_of_f14_is_that_of_its_own_variables():
    """Eq. (F.10) to (F.13), simulated: grad' has class 1's samples only, grad_e is independent."""
    counts, alpha, sigma = np.array([90.0, 10.0]), 0.4, 5.0
    means = ts.two_means(1.2)
    rng = np.random.default_rng(0)
    general = ts.sums([100], means[:1], sigma, 20_000, rng)[0] / 100
    reserved = ts.sums(counts[1:], means[1:], sigma, 20_000, rng)[0] / 10
    hits = int(((general + alpha * reserved) @ (means[0] - means[1]) > 0).sum())
    expected = ts.line_of_f14(alpha, 100, 10, sigma, 1.2)
    assert binomtest(hits, 20_000, expected).pvalue > 1e-3
    assert abs(expected - ts.theorem_3_1(alpha, 100, sigma, 1.2)) > 0.03


def test_files_and_seed(tmp_path):
    call(ts.main, "--trials", 200, "--seed", 1, "--out", tmp_path)
    for name in ("theory.png", "theory.pdf", "theory_low_rank.png", "theory_low_rank.pdf"):
        assert (tmp_path / name).exists()
    points = disk.read_json(tmp_path / "theory.json")["points"]
    assert points == ts.results(200, 1) != ts.results(200, 0)
