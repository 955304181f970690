"""--recipe: the authors' release against a slow version of its formulas; each piece by a flag.

The slow version is written from what the release does (docs/DIFFERENCES.md), not from losses.py.
"""
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import COUNTS, TINY, a_step, call, ckpt_of, randomize, read_log, resolved, tiny_net
from torch.func import functional_call

import cm_layers
import disk
import evaluate
import losses
import networks
import sample
import samplers
import train
from losses import CMConfig, Objective, bind
from model import Attention, make_alphas_bar

CIFAR = {name: [int(n * 0.01 ** (c / (C - 1))) for c in range(C)]       # IR 100
         for name, n, C in (("cifar10", 5000, 10), ("cifar100", 500, 100))}
RELEASE = train.RECIPES["release"]


class WholePass(torch.nn.Module):
    """One forward pass of a plain network, with its dropout masks."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x_t, t, y, encode, decode):
        return self.net.decode(*self.net.encode(x_t, t, y, encode), decode)


def slow_target(x_t, batch, i, ab, counts):
    """OC's target of image i, "t2h": a reference of a class at least as large, or the noise."""
    log_q = [-((x_t - math.sqrt(ab) * x_ref.double()) ** 2).sum() / (2 * (1 - ab)) + gumbel.double()
             for x_ref, gumbel in zip(batch.pool.x_0, batch.pool.gumbel[i])]
    j = int(torch.stack(log_q).argmax())
    if counts[batch.pool.y[j]] < counts[batch.y[i]]:
        return batch.eps[i].double(), False
    target = (x_t - math.sqrt(ab) * batch.pool.x_0[j].double()) / math.sqrt(1 - ab)
    return target, bool((target - batch.eps[i]).abs().max() > 1e-3)


def slow_loss(settings, parameters, batch, counts):
    """(the release's total, how many targets are another image's); parameters: {name: tensor}."""
    general, full = {}, {}
    for name, p in parameters.items():
        layer, reserved, what = name.partition(".parametrizations.weight.")
        if what == "original":
            out, inner, k, _ = p.shape
            A, B = (parameters[f"{layer}{reserved}0.{letter}"] for letter in "AB")
            r = max(1, int(0.1 * min(inner, out)))
            assert A.shape == (r * k, inner * k) and B.shape == (out * k, r * k)
            general[f"net.{layer}.weight"] = p
            full[f"net.{layer}.weight"] = p + torch.einsum("or,ri->oi", B, A).reshape(p.shape)
        elif not reserved:
            general[f"net.{name}"] = full[f"net.{name}"] = p
    ab = [math.prod(1 - (1e-4 + (0.02 - 1e-4) * s / 999) for s in range(t + 1))
          for t in batch.t.tolist()]
    x_t = torch.stack([math.sqrt(a) * x.double() + math.sqrt(1 - a) * eps.double()
                       for a, x, eps in zip(ab, batch.x_0, batch.eps)])
    once = WholePass(networks.build(settings))
    eps, eps_g = (functional_call(once, weights, (x_t.float(), batch.t, batch.y_cond, *masks))
                  for weights, masks in ((full, (batch.masks.encode, batch.masks.decode)),
                                         (general, (batch.masks.general_encode,
                                                    batch.masks.general))))
    total, others = 0, 0
    B, C, N = len(batch.y), len(counts), sum(counts)
    for i, y in enumerate(batch.y.tolist()):
        target, other = slow_target(x_t[i], batch, i, ab[i], counts)
        p = counts[y] / N
        q = (N / counts[y]) / sum(N / n for n in counts)
        mse = ((eps[i] - eps_g[i]).double() ** 2).mean()
        total = total + ((eps[i].double() - target) ** 2).mean() / B
        total = total + C * (1.0 * p - 0.2 * q) * mse / B
        others += other
    return total, others


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("step", [0, 1])
def test_the_releases_loss(name, step):
    counts = CIFAR[name]
    assert sum(counts) == {"cifar10": 12_406, "cifar100": 10_847}[name]
    settings = {**TINY, "channels": 3, "num_classes": len(counts)}
    net = randomize(networks.build(settings, 0.1, None, "kernel", "conv3x3"), scale=0.2)
    args = resolved("--dataset", name, "--recipe", "release", "--preset", "paper")
    objective = Objective(net=net, base=bind(args.base), counts=counts, cm=CMConfig.of(args),
                          alphas_bar=make_alphas_bar(), drop_batch=args.drop_batch)
    g = torch.Generator().manual_seed(step)
    y = torch.randint(len(counts), (24,), generator=g)
    x_0 = 0.1 * torch.randn(24, 3, 8, 8, generator=g).clamp(-1, 1)      # near each other
    batch = objective.draw_batch(x_0, y, seed=step, step=step)
    batch = batch._replace(y_cond=y if step else torch.full_like(y, -1), t=batch.t // 2 + 500)

    parameters = dict(net.named_parameters())
    expected, others = slow_loss(settings, parameters, batch, counts)
    assert 3 < others < 24
    total, terms, D = objective(batch)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert abs((total - terms["base"]).item()) > 1e-3 * total.item()
    ours, theirs = (torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                    for loss in (total, expected))
    for parameter, a, b in zip(parameters, ours, theirs):
        assert (a is None) == (b is None), parameter
        if a is not None:
            assert (a - b).norm() <= 1e-6 * max(1, b.norm()), parameter
    assert sum(parameter.endswith((".A", ".B")) for parameter in parameters) == 2 * 9


def test_labels_of_a_batch_are_dropped_together(digits):
    objective, batch = a_step(digits, label_drop=0.1)
    objective.drop_batch = True
    drawn = [objective.draw_batch(batch.pool.x_0, batch.pool.y, seed=0, step=s) for s in range(300)]
    assert all(torch.equal(b.y, batch.y) for b in drawn)
    whole = [bool((b.y_cond == -1).all()) for b in drawn]
    assert all(w or torch.equal(b.y_cond, b.y) for w, b in zip(whole, drawn))
    assert 15 < sum(whole) < 50


def test_which_masks_are_drawn(digits):
    """none: the same; decoder: other ones for decode; all: for encode, too."""
    objective, batch = a_step(digits, dropout=0.5)
    masks = {}
    for where in losses.DROPOUT:
        objective.cm = CMConfig(independent_dropout=where)
        masks[where] = objective.draw_batch(batch.pool.x_0, batch.pool.y, seed=0, step=3).masks
        assert all(map(torch.equal, masks[where].encode, masks["none"].encode))
        assert all(map(torch.equal, masks[where].decode, masks["none"].decode))
    assert masks["none"].general is masks["none"].decode
    assert masks["none"].general_encode is None is masks["decoder"].general_encode
    assert all(map(torch.equal, masks["decoder"].general, masks["all"].general))
    for a, b in zip(masks["all"].encode + masks["all"].decode,
                    masks["all"].general_encode + masks["all"].general):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("recipe, matrices, millions", [("ours", 64, 2.52), ("release", 27, 3.13)])
def test_what_is_reserved_at_the_papers_width(recipe, matrices, millions):
    args = resolved("--recipe", recipe, "--preset", "paper")
    with torch.device("meta"):
        net = networks.build({}, args.rank_ratio, None, args.form, args.reserve)
    parts = list(cm_layers.reserved(net))
    assert len(parts) == matrices
    size = sum(part.A.numel() + part.B.numel() for _, _, part in parts)
    assert round(size / 1e6, 2) == millions
    if recipe == "release":
        shapes = [owner.weight.shape for owner, _, _ in parts]
        assert {tuple(shape[2:]) for shape in shapes} == {(3, 3)}
        ranks = [max(1, int(0.1 * min(shape[:2]))) for shape in shapes]
        assert size == sum(9 * r * (shape[0] + shape[1]) for r, shape in zip(ranks, shapes))


@pytest.mark.parametrize("recipe, gain", [("ours", 1e-5), ("release", 1.0)])
def test_initial_values(recipe, gain, tiny, tmp_path):
    """A is Kaiming-normal, and the attention's output as large as any other layer's."""
    call(train.main, *tiny, "--ch", 64, "--recipe", recipe, "--steps", 1, "--lr", 1e-9,
         "--out", tmp_path)
    net = networks.load_unmerged(ckpt_of(tmp_path), "raw")
    A = torch.cat([part.A.detach().flatten() * (3 * part.A.shape[1]) ** 0.5
                   for _, _, part in cm_layers.reserved(net)])
    assert A.std().item() == pytest.approx(1, abs=0.05)
    assert (A.abs().max() > 3) == (recipe == "release")             # a uniform one ends at 1.73
    for layer in net.modules():
        if isinstance(layer, Attention):
            ratio = layer.proj.weight.std() / layer.v.weight.std()
            assert ratio.item() == pytest.approx(gain, rel=0.1)


def test_recipes():
    ours, paper, release = (vars(resolved("--recipe", name)) for name in train.RECIPES)
    assert ours == vars(resolved())
    changed = {key for key in ours if ours[key] != paper[key]} - {"recipe", "out"}
    assert changed == {"div_bound"} and paper["div_bound"] == 0
    changed = {key for key in ours if ours[key] != release[key]} - {"recipe", "out"}
    assert changed == set(RELEASE) and all(release[key] == RELEASE[key] for key in RELEASE)
    assert (release["w_con"], release["w_div"], release["base"]) == (1.0, 0.2, "oc")
    assert resolved("--recipe", "release", "--dataset", "cifar10").steps == 200_000
    assert resolved("--recipe", "release", "--dataset", "cifar10", "--steps", 7).steps == 7
    own = resolved("--recipe", "release", "--w-div", 0, "--reserve", "all")
    assert (own.w_div, own.reserve, own.drop_batch) == (0, "all", True)
    names = [resolved(*flags).out for flags in ((), ("--recipe", "release"), (
        "--recipe", "release", "--w-div", 1), ("--w-div", 0.2))]
    assert len(set(names)) == 4 and names[1] == "out/cifar100-ir100-oc-cm-seed0-release"


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_a_recipe_reaches_the_step_and_the_grids(recipe, monkeypatch, tiny, tmp_path):
    found = []
    monkeypatch.setattr(train, "loop", lambda *given: found.extend(given[:2]))
    monkeypatch.setattr(train, "generate", lambda *args, **_: found.append(args[5]))
    call(train.main, *tiny, "--recipe", recipe, "--out", tmp_path)
    (training, samples), settings = found, {**train.RECIPES["ours"], **train.RECIPES[recipe]}
    objective = training.objective
    for key in ("w_div", "div_bound", "independent_dropout"):
        assert getattr(objective.cm, key) == settings[key]
    assert objective.drop_batch == settings["drop_batch"] and objective.two_passes
    kernels = [owner.weight.shape[2:] == (3, 3)
               for owner, _, _ in cm_layers.reserved(objective.net)]
    assert all(kernels) == (recipe == "release")
    samples(training.state(), [0, 1], training.rt)
    assert found[2] == samplers.Sampling.of("diffusion", recipe)


def test_warm_up_from_zero_and_averages_without_a_ramp(tiny, tmp_path):
    """lr min(s, warmup) / warmup at step s, 0 at first; the average moves by 1 - decay at once."""
    call(train.main, *tiny, "--recipe", "release", "--steps", 2, "--keep-every", 1, "--warmup", 4,
         "--ema", 0.75, "--out", tmp_path)
    first, second = (disk.load(tmp_path / f"ckpt-000000{step}.pt", ["diffusion"])
                     for step in (1, 2))
    assert [record["lr"] for record in read_log(tmp_path)] == [0, 1e-3 / 4]
    assert any((p != second["model"][name]).any() for name, p in first["model"].items())
    for name, p in first["model"].items():
        assert torch.equal(p, first["ema"][name])
        expected = 0.75 * p + 0.25 * second["model"][name]
        torch.testing.assert_close(second["ema"][name], expected, rtol=1e-5, atol=1e-8)


def test_consistency_without_reserved_capacity(tiny, tmp_path, digits):
    """--rank-ratio 0: two passes of a plain network that differ by their dropout masks alone."""
    flags = ["--recipe", "release", "--rank-ratio", 0, "--w-div", 0]
    args = resolved("--dataset", "digits", *flags)
    for equal in (False, True):
        cm = CMConfig.of(args)._replace(equal_weights=equal)
        net = tiny_net(None, dropout=0.3)
        objective = Objective(net=net, base=bind("ddpm"), counts=COUNTS, cm=cm,
                              alphas_bar=make_alphas_bar())
        _, batch = a_step(digits)
        batch = objective.draw_batch(batch.pool.x_0, batch.pool.y, seed=0, step=3)
        total, terms, D = objective(batch)
        x_t = sum(values[batch.t].view(-1, 1, 1, 1) * x for values, x in (
            (objective.signal, batch.x_0), (objective.sigma, batch.eps)))
        once = WholePass(net)
        m = batch.masks
        gap = (once(x_t, batch.t, batch.y_cond, m.encode, m.decode)
               - once(x_t, batch.t, batch.y_cond, m.general_encode, m.general))
        expected = gap.square().mean((1, 2, 3))
        assert torch.allclose(D, expected, rtol=1e-4) and D.min() > 0
        w = torch.ones(12) if equal else 10 * torch.tensor(COUNTS)[batch.y] / sum(COUNTS)
        assert terms["con"].item() == pytest.approx((w * expected).mean().item(), rel=1e-3)
        assert torch.equal(total, terms["base"] + terms["con"])
    call(train.main, *tiny, *flags, "--equal-weights", "--steps", 2, "--out", tmp_path)
    ckpt = ckpt_of(tmp_path)
    assert ckpt["rank_ratio"] is None and "decoder.conv.weight" in ckpt["model"]
    last = read_log(tmp_path)[-1]
    assert last["con"] > 0 and last["D_Few"] > 0


def test_the_releases_ddim(cpu):
    """t = 980 ... 0, the one before clamp(t - 20, 0): the last step's coefficients are 1 and 0."""
    ab = make_alphas_bar()
    x = x_T = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def predict(x, t):
        return torch.sin(3 * x) + t / 1000
    for t in range(980, -1, -20):
        a, a_prev = float(ab[t]), float(ab[max(t - 20, 0)])
        of_x = (a_prev / a) ** 0.5
        of_eps = (1 - a_prev) ** 0.5 - (a_prev * (1 - a) / a) ** 0.5
        x = of_x * x + of_eps * predict(x, t)
    assert (of_x, of_eps) == (1, 0)
    sampling = samplers.Sampling.of("diffusion", "release")
    assert (sampling.steps, sampling.guidance, sampling.clip) == (50, 1.5, False)
    got = samplers.ddim(predict, x_T, ab, sampling.timesteps(ab), None, eta=sampling.eta,
                      last_step=sampling.last_step)
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)
    usual = samplers.ddim(predict, x_T, ab, sampling.timesteps(ab), None)
    assert (usual - got).abs().max() > 1e-3
    a, b = (sample.sample_batch(tiny_net(None), torch.tensor([0, 1]), [0, 1], (1, 8, 8), cpu,
                                replace(sampling, steps=3, last_step=end))
            for end in sample.LAST_STEPS)
    assert (a - b).abs().max() > 1e-4


def test_default_sampling_of_each_recipe():
    of = partial(samplers.Sampling.of, "diffusion")
    usual = of()
    assert of("ours") == of("paper") == of("release", clip=True, last_step="x_0") == usual
    assert of("release").record() == {**usual.record(), "clip": False, "last_step": "identity"}
    assert of("release", sampler="dpm") == of(sampler="dpm", clip=False)


def test_train_sample_evaluate(tiny, tmp_path, classifier):
    call(train.main, *tiny, "--recipe", "release", "--steps", 3, "--out", tmp_path)
    own = ("--ckpt", tmp_path / "ckpt.pt", "--steps", 4, "--device", "cpu")
    call(sample.main, *own, "--num", 10)
    call(evaluate.main, *own, "--num", 20, "--num-group", 10, "--features", classifier)
    for file in ("samples/samples.json", "eval.json"):
        settings = disk.read_json(tmp_path / file)["settings"]
        assert (settings["clip"], settings["last_step"]) == (False, "identity")
