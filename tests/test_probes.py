"""prune_probe.py and capacity_probe.py: each number against a literal version, a planted effect, and what must not change."""
import copy
import math

import numpy as np
import pytest
import torch
from conftest import call, tiny_net
from scipy.stats import spearmanr
from torch.testing import assert_close

import capacity_probe as cp
import prune_probe as pp
import runtime
from cm_layers import reserved
from data import to_float
from losses import Objective, draw
from model import make_alphas_bar
from runtime import UserError

# ----------------------------------------------------------------------------------------------------------------------
# Pruning


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_prune_zeroes_the_smallest(scope):
    net = tiny_net(None)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    pp.prune(net, 0.3, scope)
    weights = {k for k in before if k.endswith("weight") and before[k].dim() > 1 and "label" not in k}
    assert set(pp.prunable(net)) == weights
    total = sum(before[k].numel() for k in weights)
    if scope == "global":
        threshold = np.sort(np.concatenate([before[k].abs().flatten().numpy() for k in weights]))[int(0.3 * total)]
        assert sum(int((net.state_dict()[k] == 0).sum()) for k in weights) == int(0.3 * total)
    for k, v in net.state_dict().items():
        if k not in weights:
            assert torch.equal(v, before[k])
            continue
        cut = threshold if scope == "global" else np.sort(before[k].abs().flatten().numpy())[int(0.3 * v.numel())]
        assert torch.equal(v, torch.where(before[k].abs() < cut, 0, before[k]))


def test_losses_are_the_diffusion_loss_and_the_batch_size_changes_nothing(digits, cpu):
    net, images, labels = tiny_net(None), digits.images[:300], digits.labels[:300]
    got = pp.losses(net, images, labels, 4, cpu, batch_size=300)
    assert np.abs(got - pp.losses(net, images, labels, 4, cpu, batch_size=7)).max() < 1e-5
    times, ab = pp.timesteps_of(300, 4), make_alphas_bar()
    assert all(((times[:, r] >= 250 * r) & (times[:, r] < 250 * (r + 1))).all() for r in range(4)) and len(times[:, 0].unique()) > 100
    for i in (3, 290):                              # literally: chunk of 256, noise by (seed, chunk, repeat)
        first, error = (i // 256) * 256, 0.0
        n = min(256, 300 - first)
        for r in range(4):
            eps = torch.randn(n, 1, 8, 8, generator=runtime.generator("cpu", 0, "probe", first, r))[i - first]
            x_0, t = torch.from_numpy(images[i].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1, int(times[i, r])
            x_t = math.sqrt(ab[t]) * x_0 + math.sqrt(1 - ab[t]) * eps
            with torch.no_grad():
                error += float((net(x_t[None].float(), torch.tensor([t]), torch.tensor([labels[i]]))[0] - eps).square().mean()) / 4
        assert got[i] == pytest.approx(error, rel=1e-4)


def test_changes_and_intervals():
    """A planted effect: class k's loss rises by k percent; Spearman against sizes, and intervals that hold the truth."""
    rng = np.random.RandomState(0)
    labels, counts = np.repeat(np.arange(6), 200), np.array([60, 50, 40, 30, 20, 10])
    raw = rng.gamma(5, 0.02, 1200)
    pruned = raw * (1 + 0.01 * labels) + rng.randn(1200) * 1e-4
    result = pp.changes(raw, pruned, labels, list("abcdef"), counts)
    relative = [result["classes"][c]["relative"] for c in "abcdef"]
    for k, (value, low, high) in enumerate(relative):
        assert high - low < 2e-3 and low < value < high and low - 1e-4 < 0.01 * k < high + 1e-4
        assert value == pytest.approx(pruned[labels == k].sum() / raw[labels == k].sum() - 1)
    assert result["spearman"]["relative"]["rho"] == pytest.approx(spearmanr([r[0] for r in relative], counts)[0]) == -1
    assert result["splits"]["Few"]["relative"] == pytest.approx(np.mean([relative[4][0], relative[5][0]]))
    absolute = result["classes"]["c"]["absolute"]
    assert absolute[0] == pytest.approx(pruned[labels == 2].mean() - raw[labels == 2].mean()) and absolute[1] < absolute[0] < absolute[2]


def test_prune_probe_end_to_end(cm_run, data_dir, tmp_path, capsys):
    before = (cm_run / "ckpt.pt").read_bytes()
    flags = ("--data-dir", data_dir, "--repeats", 2, "--device", "cpu", "--out", tmp_path, "--split", "test")
    call(pp.main, "--ckpt", cm_run / "ckpt.pt", cm_run / "ckpt.pt", "--names", "a", "b", "--fractions", "0.1,0.4", *flags)
    assert (cm_run / "ckpt.pt").read_bytes() == before              # pruned weights never touch the file
    probe = runtime.read_json(tmp_path / "probe.json")
    assert probe["results"]["a"] == probe["results"]["b"] and set(probe["results"]["a"]) == {"0.1", "0.4"}
    assert {p.name for p in tmp_path.iterdir()} == {"probe.json", "relative.png", "absolute.png", "raw.png", "curve.png"}
    assert "Spearman with class size" in capsys.readouterr().out
    assert probe["settings"]["dtype"] == "torch.float32"            # the checkpoint's, whatever this machine is fast in
    with pytest.raises(UserError, match="trained on other data"):
        other = {**runtime.load(cm_run / "ckpt.pt", ["diffusion"])}
        other["data"] = {**other["data"], "class_names": other["data"]["class_names"][::-1]}
        runtime.save(tmp_path / "other.pt", other)
        call(pp.main, "--ckpt", cm_run / "ckpt.pt", tmp_path / "other.pt", "--names", "a", "b", *flags)
    a = probe["results"]["a"]
    assert all(a["0.1"]["classes"][c]["raw"] == a["0.4"]["classes"][c]["raw"] for c in "0123456789")
    assert sum(abs(v["absolute"][0]) for v in a["0.4"]["classes"].values()) > sum(abs(v["absolute"][0]) for v in a["0.1"]["classes"].values())


# ----------------------------------------------------------------------------------------------------------------------
# Dominance

def test_group_gradients_are_sums_over_images(digits):
    """Against one backward pass an image, on the same draws; each image comes as often as it should, in each range of t."""
    net = tiny_net(0.2, dropout=0.0)
    o = Objective(net, "ddpm", digits.counts, make_alphas_bar(), label_drop=0.0)
    params, rows = [p for p in net.parameters() if p.dim() > 1], np.arange(40, 52)
    total, squares, batches = cp.group_gradients(o, digits, rows, 2, params, 0, 5)
    assert batches == 5 and len(total) == len(params)
    literal, spread, times = [torch.zeros_like(p) for p in params], np.zeros(len(params)), pp.timesteps_of(len(digits.labels), 2)
    draws = np.random.RandomState(0).permutation(24)
    for first in range(0, 24, 5):
        mine = draws[first:first + 5]
        part = rows[mine // 2]
        x_0, y, t = to_float(torch.from_numpy(digits.images[part])), torch.from_numpy(digits.labels[part]), times[part, mine % 2]
        b, batch = draw(x_0, y, o, 0, 40 * 100_003 + first), [torch.zeros_like(p) for p in params]
        for i in range(len(part)):
            one = slice(i, i + 1)
            loss, _, _ = o(b._replace(x_0=x_0[one], y=y[one], y_in=y[one], t=t[one], eps=b.eps[one], masks_encode=[], masks_decode=[], masks_general=[]))
            batch = [a + (0 if g is None else g) for a, g in zip(batch, torch.autograd.grad(loss, params, allow_unused=True))]
        literal = [a + g for a, g in zip(literal, batch)]
        spread += [float(g.square().sum()) / len(part) for g in batch]
    for a, b in zip(total, literal):
        assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert np.allclose(squares, spread, rtol=1e-3) and squares.max() > 0
    assert sorted(rows[draws // 2]) == sorted([*rows, *rows])


def test_noise_is_estimated_without_bias():
    """Batches of Gaussian gradients of known mean and variance: sigma^2 summed over the entries comes back."""
    g, d, sigma = torch.Generator().manual_seed(0), 400, 0.7
    sizes = [5] * 30 + [3] * 20
    mean = torch.randn(d, generator=g)
    total, squares = torch.zeros(d), torch.zeros(1, dtype=torch.float64)
    for b in sizes:
        G = b * mean + math.sqrt(b) * sigma * torch.randn(d, generator=g)
        total += G
        squares += float(G.double().square().sum()) / b
    got = cp.noise_of([total], squares, len(sizes), sum(sizes))
    assert float(got) == pytest.approx(d * sigma ** 2, rel=0.05)


def test_compare_is_the_theorems_question():
    one, last = [torch.tensor([[300.0, 0.0]])], [torch.tensor([[0.0, 30.0]])]           # means (3, 0) and (0, 3)
    points, cosines, theory = cp.compare(one, last, [one[0] + last[0]], 100, 10, torch.tensor([50.0]), 1)
    mu2 = (9 + 9 - 50 / 100 - 50 / 10) / 2
    expected = cp.norm.cdf((2 * 100 / 110 - 1) * math.sqrt(mu2) * math.sqrt(2 * 110) / (2 * math.sqrt(50 / 2)))
    assert points.tolist() == [True] and cosines[0] == pytest.approx(0) and theory[0] == pytest.approx(expected)
    # The angle as well: of two means that differ in little but noise, s2 / n_1 + s2 / n_K = 5.5 of |m_1 - m_K|^2 = 6.5
    near = [torch.tensor([[300.0, 0.0]])], [torch.tensor([[30.0, 10 * 6.5 ** 0.5]])]
    _, cosines, theory = cp.compare(*near, near[0], 100, 10, torch.tensor([50.0]), 1)
    mu2 = (9 + 9 + 6.5 - 5.5) / 2
    assert cosines[0] == pytest.approx(1 - 1 / (2 * mu2), abs=1e-6)
    assert theory[0] == pytest.approx(cp.norm.cdf((2 * 100 / 110 - 1) * math.sqrt(110 * 1.0) / (2 * 5)), abs=1e-6)
    points, *_ = cp.compare(one, last, [torch.tensor([[1.0, 5.0]])], 100, 10, torch.tensor([50.0]), 1)
    assert points.tolist() == [False]


def test_dominance_end_to_end(cm_run, data_dir, tmp_path, capsys):
    call(cp.main, "dominance", "--ckpt", cm_run / "ckpt.pt", "--data-dir", data_dir, "--repeats", 1, "--device", "cpu", "--out", tmp_path)
    result = runtime.read_json(tmp_path / "dominance.json")
    assert set(result["pairs"]) == {"class 1 against class K", "Many against Few"}
    assert set(result["pairs"]["Many against Few"]) == {"W", "W^g", "A", "B"} and result["images"] == 502
    assert all(0 <= r["share"] <= 1 for kinds in result["pairs"].values() for r in kinds.values())


# ----------------------------------------------------------------------------------------------------------------------
# Allocation

def test_layers_have_known_size_and_rank():
    net = tiny_net(0.5)
    (owner, _, part), *_ = list(reserved(net.decoder))
    with torch.no_grad():
        for p in (part.A, part.B):
            p.zero_()
        part.A[0, 0], part.A[1, 1], part.B[0, 0], part.B[1, 1] = 3.0, 3.0, 1.0, 1.0      # two equal singular values
    row = cp.layers_of(net)[0]
    assert row["effective_rank"] == pytest.approx(2, rel=1e-6) and row["rank"] == part.rank
    low = part.B @ part.A
    original = owner.parametrizations.weight.original
    assert row["ratio"] == pytest.approx(float(low.norm() / (original + low.view(original.shape)).norm()), rel=1e-5)


def test_distances_are_eq_2s(digits, cpu):
    net = tiny_net(0.3, dropout=0.0)
    D = cp.distances(net, digits.images[:6], digits.labels[:6], [10, 900], cpu, 0, 4)
    general = copy.deepcopy(net)
    from cm_layers import merge
    merge(net), merge(general, "general")
    for i, first in ((2, 0), (5, 4)):
        for k, t in enumerate((10, 900)):
            n = min(4, 6 - first)
            eps = torch.randn(n, 1, 8, 8, generator=runtime.generator("cpu", 0, "allocation", first, k))[i - first]
            ab = make_alphas_bar()[t]
            x_t = math.sqrt(ab) * (torch.from_numpy(digits.images[i].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1) + math.sqrt(1 - ab) * eps
            args = (x_t[None].float(), torch.tensor([t]), torch.tensor([digits.labels[i]]))
            with torch.no_grad():
                assert D[i, k] == pytest.approx(float((net(*args) - general(*args)).square().mean()), rel=1e-3)


def test_allocation_end_to_end(cm_run, data_dir, tmp_path, capsys):
    quality = {s: {"splits": {"Many": {"fd": 2.0}, "Few": {"fd": f}}} for s, f in (("full", 4.0), ("general", 10.0))}
    for s, q in quality.items():
        runtime.write_json(tmp_path / f"{s}.json", q)
    call(cp.main, "allocation", "--ckpt", cm_run / "ckpt.pt", "--data-dir", data_dir, "--device", "cpu", "--out", tmp_path, "--quality",
         tmp_path / "full.json", tmp_path / "general.json")
    result = runtime.read_json(tmp_path / "allocation.json")
    assert set(result["distance"]) == {"Many", "Medium", "Few"} and len(result["layers"]) == len(list(reserved(tiny_net(0.1).decoder)))
    assert "Few 10.00 / 4.00 = 2.50" in capsys.readouterr().out and (tmp_path / "allocation.png").exists()


def test_allocation_refuses_a_plain_checkpoint(tmp_path, data_dir, capsys):
    import train
    from conftest import TINY_FLAGS
    from test_mistakes import refuses
    call(train.main, *TINY_FLAGS, "--no-cm", "--base", "ddpm", "--steps", 1, "--data-dir", data_dir, "--out", tmp_path)
    refuses(capsys, cp.main, "allocation", "--ckpt", tmp_path / "ckpt.pt", "--device", "cpu", says=["--ckpt", "no reserved capacity"])
