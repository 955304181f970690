"""evaluate.py: the distance against closed forms and torch-fidelity; the pool; the whole path to JSON and report."""
import numpy as np
import pytest
from conftest import call
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

import evaluate
import report
import runtime
import sample
from data import splits


def test_closed_form():
    d = evaluate.frechet_distance(np.array([1.0, 2.0]), np.diag([4.0, 9.0]), np.array([0.0, 0.0]), np.diag([1.0, 16.0]))
    assert d == pytest.approx(5 + (2 - 1) ** 2 + (3 - 4) ** 2)


@pytest.mark.parametrize("n", [500, 20])        # 20 samples of 32 dimensions: singular covariances
def test_equals_torch_fidelity(n):
    import torch
    rng = np.random.RandomState(0)
    a, b = rng.randn(n, 32).astype(np.float32), (rng.randn(n, 32) * 1.3 + 0.2).astype(np.float32)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)), False)
    theirs = theirs["frechet_inception_distance"]
    assert evaluate.distance_of(a, b) == pytest.approx(theirs, rel=1e-4)
    assert abs(evaluate.distance_of(a, a)) < 1e-6


def test_pool_is_the_papers():
    for C, many, few in ((100, 607, 589), (10, 6667, 5000)):
        groups = splits(np.arange(C, 0, -1))
        sizes = evaluate.pool_sizes(50_000, 20_000, groups, C)
        assert set(sizes[groups["Many"]]) == set(sizes[groups["Medium"]]) == {many} and set(sizes[groups["Few"]]) == {few}
    labels, numbers = evaluate.pool_of(np.array([2, 1, 3]))
    assert list(zip(labels, numbers)) == [(0, 0), (1, 1), (2, 2), (0, 3), (2, 5), (2, 8)]


def test_checkpoint_samples_and_report_agree(cm_run, classifier, data_dir, tmp_path):
    draw = ("--ckpt", cm_run / "ckpt.pt", "--num", 60, "--steps", 3, "--device", "cpu", "--dtype", "float32")
    common = ("--features", classifier, "--data-dir", data_dir, "--device", "cpu", "--dtype", "float32")
    call(evaluate.main, *draw, "--features", classifier, "--data-dir", data_dir, "--out-json", tmp_path / "direct.json")
    rows = []
    for branch in ("full", "general"):
        call(sample.main, *draw, "--branch", branch, "--out", tmp_path / branch)
        call(evaluate.main, "--samples", tmp_path / branch / "samples.npz", *common)
        rows += ["--row", f"{branch}={tmp_path / branch / 'eval.json'}"]
    direct, saved = runtime.read_json(tmp_path / "direct.json"), runtime.read_json(tmp_path / "full/eval.json")
    assert saved["fd"] == pytest.approx(direct["fd"], rel=1e-3) and saved["splits"].keys() == {"Many", "Medium", "Few"}
    assert {"ckpt_sha256", "features_sha256", "guidance", "steps", "reference"} <= set(saved["settings"])
    assert saved["floor"]["fd"] < saved["fd"]           # thirty steps do not draw digits
    call(report.main, *rows, "--out", tmp_path / "page/report.md", "--pair", tmp_path / "general/samples.npz",
         tmp_path / "full/samples.npz")
    page = (tmp_path / "page/report.md").read_text()
    assert f"| full | 1.5 | {saved['fd']:.2f} |" in page and (tmp_path / "page/theta_g_theta.png").exists()


def test_real_images_score_well(classifier, data_dir, tmp_path, cm_run):
    """The held-out digits as "samples": near the floor, and nearly all of their own class."""
    from data import load
    test = load("digits", data_dir, "test")
    np.savez(tmp_path / "samples.npz", np.repeat(test.images, 3, 3), test.labels)
    data = runtime.load(cm_run / "ckpt.pt", "diffusion")["data"]
    runtime.write_json(tmp_path / "samples.json", {"settings": {}, "data": data})
    call(evaluate.main, "--samples", tmp_path / "samples.npz", "--features", classifier, "--data-dir", data_dir, "--device", "cpu")
    result = runtime.read_json(tmp_path / "eval.json")
    assert result["accuracy"] > 0.9 and result["num"] == 300
