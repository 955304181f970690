"""prune_probe.py and capacity.py: each number against a literal version, a planted effect,
and what must not change.
"""
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, call, refuses, tiny_net
from scipy.stats import spearmanr
from torch.testing import assert_close

import disk
import prune_probe as pp
import runtime
import train
from cm_layers import merge, reserved
from data import load, to_float
from losses import Masks, Objective, bind
from model import make_alphas_bar, stratified_timesteps
from probes import capacity as cp


@pytest.mark.parametrize("scope, tensors", [
    ("global", "weights"), ("layer", "weights"), ("global", "all")])
def test_prune_zeroes_the_smallest(scope, tensors):
    """Of the weights, or of every parameter that there is, biases and label embeddings too."""
    net = tiny_net(None)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    pp.prune(net, 0.3, scope, tensors)
    after = net.state_dict()
    weights = {k for k, v in before.items() if tensors == "all"
               or k.endswith("weight") and v.dim() > 1 and "label" not in k}
    assert set(pp.prunable(net, tensors)) == weights
    for k, v in after.items():
        if k not in weights:
            assert torch.equal(v, before[k])
            continue
        together = [before[name] for name in weights] if scope == "global" else [before[k]]
        magnitudes = np.sort(np.concatenate([w.abs().flatten().numpy() for w in together]))
        cut = magnitudes[int(0.3 * len(magnitudes))]
        assert torch.equal(v, torch.where(before[k].abs() < cut, 0, before[k]))


def noisy(image, t, eps):
    """(x_t, t) of one image (H, W, C) uint8, each as a batch of one, literally."""
    x_0 = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    ab = make_alphas_bar()[t]
    x_t = math.sqrt(ab) * x_0 + math.sqrt(1 - ab) * eps
    return x_t[None].float(), torch.tensor([t])


def test_losses_are_the_diffusion_loss_and_the_batch_size_changes_nothing(digits, cpu):
    net = tiny_net(None)
    images = digits.images[:300]
    labels = digits.labels[:300]
    got = pp.per_image_losses(net, images, labels, 4, cpu, batch_size=300)
    in_sevens = pp.per_image_losses(net, images, labels, 4, cpu, batch_size=7)
    assert np.abs(got - in_sevens).max() < 1e-5
    times = stratified_timesteps(300, 4)
    for i in (3, 290):                  # literally: chunks of 256, noise by (seed, chunk, repeat)
        first = (i // 256) * 256
        n = min(256, 300 - first)
        error = 0.0
        for r in range(4):
            g = runtime.generator("cpu", 0, "probe", first, r)
            eps = torch.randn(n, 1, 8, 8, generator=g)[i - first]
            x_t, t = noisy(images[i], int(times[i, r]), eps)
            with torch.no_grad():
                predicted = net(x_t, t, torch.tensor([labels[i]]))[0]
            error += float((predicted - eps).square().mean()) / 4
        assert got[i] == pytest.approx(error, rel=1e-4)


def test_changes_and_intervals():
    """A planted effect: class k's loss rises by k percent. Spearman's correlation with the sizes
    is -1, and intervals contain the truth.
    """
    rng = np.random.RandomState(0)
    labels = np.repeat(np.arange(6), 200)
    counts = np.array([60, 50, 40, 30, 20, 10])
    raw = rng.gamma(5, 0.02, 1200)
    pruned = raw * (1 + 0.01 * labels) + rng.randn(1200) * 1e-4
    result = pp.changes(raw, pruned, labels, list("abcdef"), counts)
    relative = [result["classes"][c]["relative"] for c in "abcdef"]
    for k, (value, low, high) in enumerate(relative):
        assert high - low < 2e-3
        assert low < value < high
        assert low - 1e-4 < 0.01 * k < high + 1e-4
        assert value == pytest.approx(pruned[labels == k].sum() / raw[labels == k].sum() - 1)
    rho = spearmanr([r[0] for r in relative], counts)[0]
    assert result["spearman"]["relative"]["rho"] == pytest.approx(rho) == -1
    few = np.mean([relative[4][0], relative[5][0]])
    assert result["groups"]["Few"]["relative"] == pytest.approx(few)
    value, low, high = result["classes"]["c"]["absolute"]
    assert value == pytest.approx(pruned[labels == 2].mean() - raw[labels == 2].mean())
    assert low < value < high


def test_each_share_is_pruned_from_the_whole_network(digits, cpu):
    """Whatever the order of the shares; --scope, --tensors and --seed say how."""
    net = tiny_net(None)
    before = {name: w.clone() for name, w in net.state_dict().items()}
    images, labels = digits.images[:20], digits.labels[:20]
    args = SimpleNamespace(repeats=2, seed=5, batch_size=8, scope="layer", tensors="all")
    raw, pruned = pp.measure(net, images, labels, [0.5, 0.1], args, cpu, "a")
    assert all(torch.equal(w, before[name]) for name, w in net.state_dict().items())

    def losses(net):
        return pp.per_image_losses(net, images, labels, 2, cpu, seed=5)
    assert np.allclose(raw, losses(net), rtol=1e-5)
    for fraction in (0.5, 0.1):
        cut = copy.deepcopy(net)
        pp.prune(cut, fraction, "layer", "all")
        assert np.allclose(pruned[fraction], losses(cut), rtol=1e-5)


def test_the_images_are_those_of_the_training(cm_run, data_dir, digits, cpu, tmp_path):
    """By default the loss is that of the long-tailed training images; the paper's "original
    training loss" (Sec. G.2).
    """
    def measured(*flags):
        call(pp.main, "--ckpt", cm_run / "ckpt.pt", "--data-dir", data_dir, "--repeats", 1,
             "--device", "cpu", "--out", tmp_path, *flags)
        return disk.read_json(tmp_path / "probe.json")

    probe = measured()
    classes = probe["results"]["cm"]["0.1"]["classes"]
    assert all(c["images"] == c["train_images"] for c in classes.values())
    assert probe["settings"]["num"] == len(digits.labels) == 502
    net = pp.load_merged(disk.load(cm_run / "ckpt.pt", ["diffusion"]), "ema", "full")
    losses = pp.per_image_losses(net, digits.images, digits.labels, 1, cpu)
    assert classes["9"]["raw"] == pytest.approx(losses[digits.labels == 9].mean(), rel=1e-4)
    assert measured("--images", "balanced")["settings"]["num"] == 1497


def test_prune_probe_end_to_end(cm_run, data_dir, tmp_path, monkeypatch):
    """In float32, also of a network trained in bfloat16; with --if-needed not again."""
    ckpt = disk.load(cm_run / "ckpt.pt", ["diffusion"])
    path = tmp_path / "ckpt.pt"
    disk.save(path, {**ckpt, "config": {**ckpt["config"], "dtype": "bfloat16"}})
    before = path.read_bytes()
    flags = ("--ckpt", path, path, "--names", "a", "b", "--data-dir", data_dir, "--repeats", 2,
             "--device", "cpu", "--images", "test", "--if-needed")
    call(pp.main, *flags, "--fractions", "0.1,0.4")
    assert path.read_bytes() == before              # pruned weights never reach the file
    assert {p.name for p in (tmp_path / "prune").iterdir()} == {
        "probe.json", "relative.png", "absolute.png", "raw.png", "curve.png"}
    probe = disk.read_json(tmp_path / "prune/probe.json")
    assert probe["settings"]["dtype"] == "float32"
    assert probe["results"]["a"] == probe["results"]["b"]
    little, much = (probe["results"]["a"][fraction]["classes"] for fraction in ("0.1", "0.4"))
    assert all(little[c]["raw"] == much[c]["raw"] for c in "0123456789")
    total = [sum(abs(c["absolute"][0]) for c in classes.values()) for classes in (little, much)]
    assert total[1] > total[0]
    monkeypatch.setattr(pp, "measure", None)
    call(pp.main, *flags, "--fractions", "0.1,0.4")
    with pytest.raises(TypeError):              # another measurement
        call(pp.main, *flags, "--fraction", 0.2)


@pytest.mark.parametrize("counts, rises", [
    ([9, 9, 9], [0, 1, 2]), ([9, 8], [0, 1]), ([3, 2, 1], [0.5, 0.5, 0.5])])
def test_what_is_undefined_is_none(counts, rises, tmp_path):
    """There is no correlation where classes are equally large, are two or change alike, and no
    interval of one image (a bootstrap would say that its change is exact). All can be drawn.
    """
    labels = np.repeat(np.arange(len(counts)), counts)
    raw = 1.0 + np.arange(len(labels))
    names = list("abc")[:len(counts)]
    result = pp.changes(raw, raw + np.array(rises)[labels], labels, names, np.array(counts))
    assert result["spearman"]["absolute"] == {"rho": None, "p": None}
    if counts[-1] == 1:
        assert result["classes"]["c"]["absolute"] == [0.5, None, None]
        assert result["classes"]["c"]["relative"] == [pytest.approx(0.5 / 6), None, None]
        assert None not in result["classes"]["b"]["relative"]
    pp.write_figures({"net": {"0.1": result}}, [0.1], 0.1, tmp_path)


@pytest.mark.parametrize("part, key, value", [
    ("data", "class_names", list("9876543210")), ("config", "tail_seed", 5),
    ("data", "sha256", "0" * 64)])
def test_checkpoints_of_different_data_are_refused(part, key, value, cm_run, data_dir, tmp_path,
                                                   capsys):
    other = disk.load(cm_run / "ckpt.pt", ["diffusion"])
    disk.save(tmp_path / "other.pt", {**other, part: {**other[part], key: value}})
    refuses(capsys, pp.main, "--ckpt", cm_run / "ckpt.pt", tmp_path / "other.pt", "--names", "a",
            "b", "--data-dir", data_dir, "--device", "cpu", "--out", tmp_path, says=["--ckpt"])


def test_group_gradients_are_sums_over_images(digits):
    """Against one backward pass per image, on the same noise; each image comes as often as it
    should, in each range of t. Nothing is dropped out.
    """
    net = tiny_net(0.2, dropout=0.3)
    objective = Objective(net=net, base=bind("ddpm"), counts=digits.counts,
                          alphas_bar=make_alphas_bar(), label_drop=0.0)
    params = [p for p in net.parameters() if p.dim() > 1]
    rows = np.arange(40, 52)
    got = cp.group_gradients(objective, digits, rows, 2, params, 0, 5)
    assert (got.batches, got.n, len(got.sums)) == (5, 24, len(params))
    literal = [torch.zeros_like(p) for p in params]
    spread = np.zeros(len(params))
    times = stratified_timesteps(len(digits.labels), 2)
    examples = np.random.RandomState(0).permutation(24)
    for first in range(0, 24, 5):
        mine = examples[first:first + 5]
        part = rows[mine // 2]
        x_0 = to_float(torch.from_numpy(digits.images[part]))
        y = torch.from_numpy(digits.labels[part])
        t = times[part, mine % 2]
        b = objective.draw_batch(x_0, y, seed=0, step=40 * 100_003 + first)
        batch = [torch.zeros_like(p) for p in params]
        for i in range(len(part)):
            one = slice(i, i + 1)
            single = b._replace(x_0=x_0[one], y=y[one], y_cond=y[one], t=t[one], eps=b.eps[one],
                                masks=Masks([], [], []))
            loss, _, _ = objective(single)
            gradients = torch.autograd.grad(loss, params, allow_unused=True)
            batch = [a + (0 if g is None else g) for a, g in zip(batch, gradients)]
        literal = [a + g for a, g in zip(literal, batch)]
        spread += [float(g.square().sum()) / len(part) for g in batch]
    for a, b in zip(got.sums, literal):
        assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert np.allclose(got.squares, spread, rtol=1e-3)
    assert got.squares.max() > 0
    assert sorted(rows[examples // 2]) == sorted([*rows, *rows])


def test_gradients_of_a_run_with_cm_fraction_are_of_whole_batches(cm_run, digits):
    """Else draw_batch gives the images in another order than their labels."""
    ckpt = disk.load(cm_run / "ckpt.pt", ["diffusion"])
    net = tiny_net(0.2, dropout=0.0)
    params = [p for p in net.parameters() if p.dim() > 1]

    def sums(fraction):
        config = {**ckpt["config"], "cm_fraction": fraction}
        objective = cp.objective_of({**ckpt, "config": config}, net, digits.counts)
        assert objective.cm.div_bound == ckpt["config"]["div_bound"] and objective.label_drop == 0
        rows = np.array([0, 200, 300, 400, 480, 500])
        return cp.group_gradients(objective, digits, rows, 1, params, 0, 3).sums
    for a, b in zip(sums(0.5), sums(1.0)):
        assert torch.equal(a, b)


def test_noise_is_estimated_without_bias():
    """Gaussian gradients of known mean and variance: sigma^2, summed over the entries, is found."""
    g = torch.Generator().manual_seed(0)
    d, sigma, sizes = 400, 0.7, [5] * 30 + [3] * 20
    mean = torch.randn(d, generator=g)
    total, squares = torch.zeros(d), torch.zeros(1, dtype=torch.float64)
    for b in sizes:
        G = b * mean + math.sqrt(b) * sigma * torch.randn(d, generator=g)
        total += G
        squares += float(G.double().square().sum()) / b
    got = cp.noise_of(cp.Gradients([total], sum(sizes), squares, len(sizes)))
    assert float(got) == pytest.approx(d * sigma ** 2, rel=0.05)


def test_compare_is_the_theorems_question():
    one = torch.tensor([[300.0, 0.0]])          # of 100 images: the mean is (3, 0)
    last = torch.tensor([[0.0, 30.0]])          # of 10 images: (0, 3)
    points, cosine, theory = cp.compare(one, last, one + last, 100, 10, 50.0, 1)
    mu2 = (9 + 9 - 50 / 100 - 50 / 10) / 2
    argument = (2 * 100 / 110 - 1) * math.sqrt(mu2) * math.sqrt(2 * 110) / (2 * math.sqrt(50 / 2))
    assert points and cosine == pytest.approx(0)
    assert theory == pytest.approx(cp.norm.cdf(argument))
    assert not cp.compare(one, last, torch.tensor([[1.0, 5.0]]), 100, 10, 50.0, 1)[0]
    # The angle as well: two means that differ by little but noise, where s2 / n_1 + s2 / n_K = 5.5
    # of |m_1 - m_K|^2 = 6.5
    near = torch.tensor([[30.0, 10 * 6.5 ** 0.5]])
    _, cosine, theory = cp.compare(one, near, one, 100, 10, 50.0, 1)
    mu2 = (9 + 9 + 6.5 - 5.5) / 2
    argument = (2 * 100 / 110 - 1) * math.sqrt(110 * 1.0) / (2 * 5)
    assert cosine == pytest.approx(1 - 1 / (2 * mu2), abs=1e-6)
    assert theory == pytest.approx(cp.norm.cdf(argument), abs=1e-6)
    assert cp.compare(one, 0 * last, one, 100, 10, 50.0, 1) is None


def test_the_groups_of_dominance_follow_the_sizes():
    members = cp.members_of(np.array([5, 30, 1, 20, 10, 7]))
    assert {name: list(classes) for name, classes in members.items()} == {
        "class 1": [1], "class K": [2], "rest of Many": [3], "Medium": [4, 5], "rest of Few": [0]}


def test_dominance_compares_the_groups_that_it_names(cm_run, data_dir, digits, cpu, monkeypatch):
    """Each group's gradient is a number of its own: which of them make up which sum."""
    asked, compared = [], []

    def gradients(objective, images, rows, repeats, params, seed, batch_size):
        asked.append((sorted(set(images.labels[rows])), len(params), seed))
        sums = [torch.full((1,), 10.0 ** len(asked)) for _ in params]
        return cp.Gradients(sums, len(rows), 1e20 * 2.0 ** len(asked) + torch.zeros(len(params)), 2)
    monkeypatch.setattr(cp, "group_gradients", gradients)
    monkeypatch.setattr(cp, "compare_kinds", lambda *given: compared.append(given) or {})
    args = SimpleNamespace(data_dir=data_dir, repeats=1, seed=4, batch_size=8)
    ckpt = disk.load(cm_run / "ckpt.pt", ["diffusion"])
    cp.dominance(args, cpu, ckpt, cp.load_unmerged(ckpt))
    assert [labels for labels, _, _ in asked] == [[0], [9], [1, 2], [3, 4, 5], [6, 7, 8]]
    for names, _, _, aggregate, sigma2, repeats in compared:
        assert {(n, seed) for _, n, seed in asked} == {(len(names), 4)} and repeats == 1
        assert not any("label" in name for name in names) and any(".A" in name for name in names)
        assert aggregate[0] == 111110 and float(sigma2[0]) == pytest.approx(2e20)
    (one, last), (many, few) = [[row[k] for k in (1, 2)] for row in compared]
    counts = digits.counts
    assert (one[0][0], one[1]) == (10, counts[0]) and (last[0][0], last[1]) == (100, counts[9])
    assert (many[0][0], many[1]) == (1010, counts[:3].sum())
    assert (few[0][0], few[1]) == (100100, counts[6:].sum())


def test_allocations_distances_are_means_of_each_group(cm_run, data_dir, cpu, monkeypatch):
    monkeypatch.setattr(cp, "distances", lambda net, images, labels, grid, rt, seed, batch_size:
                        labels[:, None] + np.arange(len(grid)) * 100.0 + 0 * seed)
    ckpt = disk.load(cm_run / "ckpt.pt", ["diffusion"])
    args = SimpleNamespace(data_dir=data_dir, seed=0, batch_size=8, ckpt="x")
    result = cp.allocation(args, cpu, ckpt, cp.load_unmerged(ckpt))
    labels = load("digits", data_dir).labels
    for name, classes in (("Many", [0, 1, 2]), ("Medium", [3, 4, 5]), ("Few", [6, 7, 8, 9])):
        mean = labels[np.isin(labels, classes)].mean()
        assert result["distance"][name] == pytest.approx(mean + np.arange(11) * 100)


def test_dominance_refuses_group_experts(tmp_path, data_dir, capsys):
    call(train.main, *TINY_FLAGS, "--experts", "group", "--base", "ddpm", "--steps", 1,
         "--data-dir", data_dir, "--out", tmp_path)
    refuses(capsys, cp.main, "dominance", "--ckpt", tmp_path / "ckpt.pt", "--device", "cpu",
            says=["--experts"])


def test_layers_have_known_size_and_rank():
    net = tiny_net(0.5)
    owner, _, part = next(reserved(net.decoder))
    with torch.no_grad():
        part.A.zero_()
        part.B.zero_()
        part.A[0, 0] = part.A[1, 1] = 3.0       # two equal singular values
        part.B[0, 0] = part.B[1, 1] = 1.0
    row = cp.layers_of(net)[0]
    assert row["effective_rank"] == pytest.approx(2, rel=1e-6)
    assert row["rank"] == part.rank
    low = (part.B @ part.A).detach()
    original = owner.parametrizations.weight.original.detach()
    whole = original + low.view(original.shape)
    assert row["ratio"] == pytest.approx(float(low.norm() / whole.norm()), rel=1e-5)


def test_distances_are_eq_2s(digits, cpu):
    net = tiny_net(0.3, dropout=0.0)
    D = cp.distances(net, digits.images[:6], digits.labels[:6], [10, 900], cpu, 0, 4)
    general = copy.deepcopy(net)
    merge(net)
    merge(general, "general")
    for i, first in ((2, 0), (5, 4)):
        n = min(4, 6 - first)
        y = torch.tensor([digits.labels[i]])
        for k, step in enumerate((10, 900)):
            g = runtime.generator("cpu", 0, "allocation", first, k)
            eps = torch.randn(n, 1, 8, 8, generator=g)[i - first]
            x_t, t = noisy(digits.images[i], step, eps)
            with torch.no_grad():
                difference = net(x_t, t, y) - general(x_t, t, y)
            assert D[i, k] == pytest.approx(float(difference.square().mean()), rel=1e-3)


def quality(tmp_path, ckpt, **changed):
    """The flags of evaluate.py's JSON of both branches; changed: settings of the general one."""
    settings = {"guidance": 1.5, "features_sha256": "a", "ckpt_sha256": disk.sha256(ckpt)}
    for branch, fd, more in (("full", 4.0, {}), ("general", 10.0, changed)):
        disk.write_json(tmp_path / f"{branch}.json", {
            "groups": {"Many": {"fd": 2.0}, "Few": {"fd": fd}},
            "settings": {**settings, "branch": branch, **more}})
    return "--quality", tmp_path / "full.json", tmp_path / "general.json"


def test_allocation_end_to_end(cm_run, data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cp, "GRID", [10, 900])
    call(cp.main, "allocation", "--ckpt", cm_run / "ckpt.pt", "--data-dir", data_dir,
         "--device", "cpu", "--out", tmp_path, *quality(tmp_path, cm_run / "ckpt.pt"))
    result = disk.read_json(tmp_path / "allocation.json")
    assert len(result["layers"]) == len(list(reserved(tiny_net(0.1).decoder)))
    assert "Few 10.00 / 4.00 = 2.50" in capsys.readouterr().out
    assert (tmp_path / "allocation.png").exists()
    flags = ("--ckpt", cm_run / "ckpt.pt", "--device", "cpu", "--out", tmp_path, "--if-needed")
    monkeypatch.setattr(cp, "allocation", None)
    call(cp.main, "allocation", *flags, *quality(tmp_path, cm_run / "ckpt.pt"))
    with pytest.raises(TypeError):              # another measurement
        call(cp.main, "allocation", *flags)


@pytest.mark.parametrize("other", [
    {"guidance": 0.0}, {"features_sha256": "b"}, {"ckpt_sha256": "b"}, {"branch": "full"}])
def test_quality_measured_otherwise_is_refused(other, cm_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cp, "load_unmerged", None)          # refused before the network is built
    refuses(capsys, cp.main, "allocation", "--ckpt", cm_run / "ckpt.pt", "--device", "cpu",
            *quality(tmp_path, cm_run / "ckpt.pt", **other), says=["--quality"])


def test_mistakes(cm_run, tmp_path, data_dir, capsys):
    """Flags that do nothing; two measurements of one name; allocation without reserved capacity."""
    ckpt = cm_run / "ckpt.pt"
    refuses(capsys, cp.main, "dominance", "--ckpt", ckpt, "--quality", "a", "b",
            says=["--quality"])
    refuses(capsys, cp.main, "allocation", "--ckpt", ckpt, "--repeats", 3, says=["--repeats"])
    for flags in (["--names", "a", "a"], ["--fractions", "0.1,0.1"]):
        refuses(capsys, pp.main, "--ckpt", ckpt, ckpt, *flags, "--device", "cpu", says=flags[:1])
    call(train.main, *TINY_FLAGS, "--no-cm", "--base", "ddpm", "--steps", 1,
         "--data-dir", data_dir, "--out", tmp_path)
    refuses(capsys, cp.main, "allocation", "--ckpt", tmp_path / "ckpt.pt", "--device", "cpu",
            says=["--ckpt"])
