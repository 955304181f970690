"""theory_sim.py: the simulation against closed forms with exact binomial tests, and the forms against the paper's text."""
import math

import numpy as np
import pytest
from conftest import call
from scipy.stats import binomtest

import runtime
import theory_sim as ts


@pytest.fixture(scope="module")
def points():
    return ts.results(20_000, seed=1)


def test_closed_forms_agree_with_the_simulation(points):
    """Exact binomial p-values over all points with a probability between 0.01 and 0.99, Bonferroni-corrected."""
    inner = [p for p in points if 0.01 < p["theory"] < 0.99]
    assert len(inner) > 0.8 * len(points)
    p_values = [binomtest(p["hits"], p["trials"], p["theory"]).pvalue for p in inner]
    assert min(p_values) > 0.01 / len(inner)
    assert max(p_values) <= 1 and sum(v < 0.05 for v in p_values) < 0.15 * len(p_values)


def test_the_test_would_notice_a_wrong_formula(points):
    """Without the factor (2a - 1), or with (F.16) for (F.15), the same test fails."""
    wrong = [(p, ts.theorem_2_1(1.0, 100, 3.0, math.pi / 2)) for p in points if p["sweep"] == "Theorem 2.1: a"]
    wrong += [(p, p["simplified"]) for p in points if "simplified" in p]
    assert min(binomtest(p["hits"], p["trials"], q).pvalue for p, q in wrong) < 1e-10
    f1 = [p for p in points if "simplified" in p]
    assert max(abs(p["simplified"] - p["theory"]) for p in f1) > 0.1
    at_0 = ts.orthogonal_means(5, 0.0)
    assert ts.theorem_f1(ts.LONG_TAIL, at_0, 4.0) == pytest.approx(ts.theorem_f1_simplified(ts.LONG_TAIL, at_0, 4.0))


def test_one_gaussian_is_the_literal_sum():
    counts, means, trials = np.array([14, 6]), ts.two_means(1.0), 20_000
    one = ts.simulate(counts, means, 3.0, trials, np.random.default_rng(0))
    many = ts.simulate(counts, means, 3.0, trials, np.random.default_rng(1), literal=True)
    assert abs(one - many) < 5 * math.sqrt(trials / 2)
    assert binomtest(many, trials, ts.theorem_2_1(0.7, 20, 3.0, 1.0)).pvalue > 1e-4
    a, b = (ts.sums(counts, means, 3.0, trials, np.random.default_rng(s), literal=s == 3) for s in (2, 3))
    assert np.allclose(a.mean(1), b.mean(1), atol=0.6) and np.allclose(a.std(1), b.std(1), rtol=0.05)


def test_the_angle_criterion_is_the_product_criterion():
    """"Smaller angle to mu_1 than to mu_2" literally, by arccos."""
    rng, means = np.random.default_rng(0), ts.two_means(1.2)
    update = ts.sums([7, 3], means, 3.0, 1000, rng).sum(0)
    angle = lambda m: np.arccos(update @ m / np.linalg.norm(update, axis=1) / np.linalg.norm(m))
    assert np.array_equal(angle(means[0]) < angle(means[1]), update @ (means[0] - means[1]) > 0)


def test_theorem_3_1s_bound_holds_and_f2s_does_not_always(points):
    above = ts.violations(points)
    assert not [p for p in above if p["sweep"].startswith("Theorem 3.1") or "orthogonal" in p["sweep"]]
    assert len([p for p in above if "tilted by 75" in p["sweep"]]) >= 2


def test_theorem_3_1s_bound_over_many_settings():
    """The exact value of the model stays under the bound for every ratio, angle, alpha and N_2, N_2 > N_1 included."""
    for n_2 in (1, 5, 20, 49, 50, 51, 80, 99):
        for alpha in (0, 0.2, 0.7, 0.99, 1):
            for angle in (0.1, 1.0, 2.0, math.pi):
                for ratio in (0.5, 5.0, 50.0):
                    exact = ts.exact_3_1(alpha, np.array([100.0 - n_2, n_2]), ts.two_means(angle), ratio)
                    assert exact <= ts.theorem_3_1(alpha, 100, ratio, angle) + 1e-12


def test_files_and_seed(tmp_path, capsys):
    for seed, folder in ((0, "a"), (0, "b"), (1, "c")):
        call(ts.main, "--trials", 200, "--seed", seed, "--out", tmp_path / folder)
    text = capsys.readouterr().out
    assert "points above the printed bound" in text and (tmp_path / "a/theory.png").exists() and (tmp_path / "a/theory.pdf").exists()
    a, b, c = (runtime.read_json(tmp_path / f / "theory.json")["points"] for f in "abc")
    assert a == b != c
