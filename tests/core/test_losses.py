"""losses.py against a slow NumPy version of the corrected equations; the table of base losses.

Corrections: (D.3) is printed as x_t / sqrt(a_t) - x_ref, here (x_t - sqrt(ab) x_ref) / sqrt(1 -
ab). Algorithm C.1 is printed with sqrt(a_t) x + (1 - a_t) eps, here sqrt(ab) x_0 + sqrt(1 - ab)
eps. Eq. (2)'s divergence is printed without a bound.
"""
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import COUNTS, a_step, fill_reserved, gradient_of, tiny_net
from scipy import stats
from torch import nn
from torch.testing import assert_close

from cm_layers import general_only
from losses import (CMConfig, Objective, Predictions, bind, cbdm, choose, class_weights, focal,
                    oc_target)
from model import distance, make_alphas_bar, q_sample, signal_and_sigma

AB = make_alphas_bar()
ROOTS = signal_and_sigma(AB)


def numpy_x_t(batch):
    """x_t of a batch, (B, C, H, W) float64, from the betas."""
    x_t = np.empty(batch.x_0.shape)
    for i, t in enumerate(batch.t.tolist()):
        ab = math.prod(1 - (1e-4 + (0.02 - 1e-4) * s / 999) for s in range(t + 1))
        x_t[i] = math.sqrt(ab) * batch.x_0[i].numpy() + math.sqrt(1 - ab) * batch.eps[i].numpy()
    return x_t


def predictions(objective, batch, y):
    """What the network predicts for a batch under labels y, as an array."""
    x_t = torch.from_numpy(numpy_x_t(batch)).float()
    with torch.no_grad():
        return objective.net(x_t, batch.t, y).numpy()


def mse(a, b):
    """Mean squared difference per image: (B,)."""
    return np.array([np.mean((p - q) ** 2) for p, q in zip(a, b)])


def test_ddpm(digits):
    objective, batch = a_step(digits, rank_ratio=None)
    total, terms, _ = objective(batch)
    errors = mse(predictions(objective, batch, batch.y_cond), batch.eps.numpy())
    assert terms["base"].item() == pytest.approx(errors.mean(), rel=1e-4)
    assert total.item() == terms["base"].item() and set(terms) == {"base"}


def test_cbdm(digits):
    objective, batch = a_step(digits, "cbdm", rank_ratio=None, label_drop=0.5, cbdm_tau=0.002,
                             cbdm_gamma=0.25)
    assert (batch.y_cond < 0).any()
    own = predictions(objective, batch, batch.y_cond)
    other = predictions(objective, batch, batch.y_other)
    per_image = zip(batch.t.tolist(), batch.y_cond.tolist(), mse(own, other))
    cb = np.mean([t * (y >= 0) * 1.25 * error for t, y, error in per_image])
    total, terms, _ = objective(batch)
    assert terms["cb"].item() == pytest.approx(cb, rel=1e-4)
    assert total.item() == pytest.approx(terms["base"].item() + 0.002 * cb, rel=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.25])
def test_cbdm_stops_gradients_as_printed(digits, gamma):
    """Of the first distance eps(y) alone is trained, of the second eps(y') alone."""
    objective, batch = a_step(digits, "cbdm", rank_ratio=None, label_drop=0.0)
    y_other = (batch.y + 1) % 10
    batch = batch._replace(y_other=y_other, y_other_cond=y_other)
    pred = Predictions(objective.net, batch, q_sample(batch.x_0, batch.t, batch.eps, *ROOTS))
    got = gradient_of(cbdm(pred, batch, objective, cbdm_gamma=gamma)[1]["cb"], objective.net)
    own, other = (objective.net(pred.x_t, batch.t, y) for y in (batch.y, y_other))
    gap = 2 * batch.t[:, None, None, None] * (own - other).detach()
    expected = gradient_of((gap * (own - gamma * other)).mean(), objective.net)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("label_drop", [0.1, 1.0])
def test_oc_target(digits, label_drop):
    """The true class decides on the transfer, also where the label is dropped."""
    objective, batch = a_step(digits, "oc", label_drop=label_drop)
    x_t = numpy_x_t(batch)
    target = oc_target(q_sample(batch.x_0, batch.t, batch.eps, *ROOTS), batch, objective).numpy()
    moved = 0
    for i, t in enumerate(batch.t.tolist()):
        ab = float(AB[t])
        squares = [((x_t[i] - math.sqrt(ab) * x.numpy()) ** 2).sum() for x in batch.pool.x_0]
        log_q = -np.array(squares) / (2 * (1 - ab))
        j = int(np.argmax(log_q + batch.pool.gumbel[i].numpy()))
        expected = batch.eps[i].numpy()
        if COUNTS[batch.pool.y[j]] >= COUNTS[batch.y[i]]:
            x_ref = batch.pool.x_0[j].numpy()
            expected = (x_t[i] - math.sqrt(ab) * x_ref) / math.sqrt(1 - ab)
        assert np.allclose(target[i], expected, atol=1e-3)
        moved += j != i
    assert moved >= 3


def test_focal(digits):
    objective, batch = a_step(digits, "focal", rank_ratio=None, focal_gamma=1.5)
    errors = mse(predictions(objective, batch, batch.y_cond), batch.eps.numpy())
    weights = (1 - np.exp(-errors)) ** 1.5
    assert objective(batch)[0].item() == pytest.approx((weights * errors).mean(), rel=1e-4)
    # The factor has no gradient
    eps = torch.from_numpy(predictions(objective, batch, batch.y_cond)).requires_grad_()
    focal(SimpleNamespace(eps=eps), batch, objective, focal_gamma=1.5)[0].backward()
    each = 2 * (eps.detach() - batch.eps) / batch.eps[0].numel() / len(errors)
    assert_close(eps.grad, torch.from_numpy(weights).float()[:, None, None, None] * each.float(),
                 check_dtype=False)
    objective.base = bind("focal", {"focal_gamma": 0.0})
    assert objective(batch)[0].item() == pytest.approx(errors.mean(), rel=1e-4)


def kl_weights():
    """KL of two Gaussians of variance beta_t whose means differ as eps does, over its mean."""
    betas = np.linspace(1e-4, 0.02, 1000)
    kl = []
    for beta, ab in zip(betas, np.cumprod(1 - betas)):
        shift = beta / math.sqrt(1 - ab) / math.sqrt(1 - beta)
        kl.append(shift ** 2 / (2 * beta))
    return np.array(kl) / np.mean(kl)


def test_overlap(digits):
    objective, batch = a_step(digits, "rop", rank_ratio=None, label_drop=0.5, rop_margin=0.05,
                             rop_weight=0.3)
    y_other = torch.where(torch.arange(12) % 3 > 0, batch.y_other, batch.y)
    batch = batch._replace(y_other=y_other, y_other_cond=y_other)
    assert (batch.y_cond[::3] >= 0).any() and (batch.y_cond[1::3] < 0).any()
    own = predictions(objective, batch, batch.y_cond)
    other = predictions(objective, batch, batch.y_other)
    active = (batch.y_cond.numpy() >= 0) & (batch.y_other.numpy() != batch.y.numpy())
    hinge = np.maximum(0, 0.05 - mse(own, other)) * active
    expected = np.mean(kl_weights()[batch.t.numpy()] * hinge)
    total, terms, _ = objective(batch)
    assert expected > 0
    assert terms["overlap"].item() == pytest.approx(expected, rel=1e-3)
    assert total.item() == pytest.approx(terms["base"].item() + 0.3 * expected, rel=1e-4)
    # Nothing is pushed beyond the margin
    objective.base = bind("rop", {"rop_margin": 1e-12, "rop_weight": 0.3})
    assert objective(batch)[1]["overlap"].item() == pytest.approx(0, abs=1e-9)


def test_dropout_masks_and_augmentation_reach_every_prediction(digits):
    """theta, theta^g and theta under other labels: the masks of the batch, and its vector a."""
    objective, batch = a_step(digits, dropout=0.3)
    net = objective.net
    net.encoder.embedding.augment = nn.Linear(4, 4 * net.cfg.ch, bias=False)
    batch = batch._replace(augmentation=torch.randn(12, 4))
    pred = Predictions(net, batch, q_sample(batch.x_0, batch.t, batch.eps, *ROOTS))
    y_other = (batch.y + 1) % 10

    def expected(y, **changes):
        b = batch._replace(**changes)
        encoded = net.encode(pred.x_t, b.t, y, b.masks.encode, b.augmentation)
        return net.decode(*encoded, b.masks.decode)
    assert torch.equal(pred.eps, expected(batch.y_cond))
    assert torch.equal(pred.under(y_other), expected(y_other))
    with general_only(net.decoder):
        assert torch.equal(pred.general(), expected(batch.y_cond))
    masks = batch.masks
    for changes in ({"augmentation": None}, {"masks": masks._replace(encode=())},
                    {"masks": masks._replace(decode=())}):
        assert (pred.eps - expected(batch.y_cond, **changes)).abs().max() > 1e-4, changes


@pytest.mark.parametrize("bound", [0.0, 0.2535, 100.0])
def test_cm_terms_and_total(digits, bound):
    cm = CMConfig(lam=0.7, w_con=1.5, w_div=0.5, div_bound=bound)
    objective, batch = a_step(digits, cm=cm, label_drop=0.5)
    assert (batch.y_cond < 0).any()                   # and yet the true class weighs
    fill_reserved(objective.net.decoder, A=1.0)             # so that L_CM counts beside L_base
    full = predictions(objective, batch, batch.y_cond)
    with general_only(objective.net.decoder):
        D = mse(full, predictions(objective, batch, batch.y_cond))
    assert (D < 0.2535).sum() > 2 < (D > 0.2535).sum()
    counts, C = np.array(COUNTS, float)[batch.y.numpy()], len(COUNTS)
    con = np.mean(C * counts / sum(COUNTS) * D)
    w_div = C / (counts * sum(1 / n for n in COUNTS))
    div = np.mean(-w_div * (np.minimum(D, bound) if bound else D))
    total, terms, distances = objective(batch)
    assert np.allclose(distances.numpy(), D, rtol=1e-3) and D.min() > 0
    assert terms["con"].item() == pytest.approx(con, rel=1e-3)
    assert terms["div"].item() == pytest.approx(div, rel=1e-3)
    l_cm = (total - terms["base"]).item()
    assert l_cm == pytest.approx(0.7 * (1.5 * con + 0.5 * div), rel=1e-3)


@pytest.mark.parametrize("B, fraction, m", [(1, 0.5, 1), (5, 0.9, 4), (12, 0.5, 6)])
def test_a_chosen_part_stands_for_the_whole_batch(B, fraction, m):
    """--cm-fraction: over many draws the weighted mean of the chosen is the mean of all."""
    importance = torch.tensor([9.0, 0.2, 1, 3, 0.1, 2, 2, 0.5, 30, 1, 0.3, 4])[:B]
    f = torch.linspace(-1, 2, B, dtype=torch.float64)
    means, chosen = [], torch.zeros(B)
    for seed in range(600):
        order, scale = choose(importance, fraction, torch.Generator().manual_seed(seed))
        assert order.sort().values.tolist() == list(range(B)) and len(scale) == m
        means.append((scale * f[order[:m]]).mean())
        chosen[order[:m]] += 1 / 600
    means = torch.stack(means)
    error = means.std(unbiased=False) / 600 ** 0.5
    assert abs(means.mean() - f.mean()) <= 4 * error + 1e-6
    # As often as the importance says, but not more often than always
    c = (m - (chosen > 0.999).sum()) / importance[chosen <= 0.999].sum()
    assert torch.allclose(chosen, (c * importance).where(chosen <= 0.999, 1), atol=0.1)


@pytest.mark.parametrize("dropout", ["none", "all"])
def test_cm_fraction_evaluates_the_chosen_images_alone(digits, dropout):
    """The terms and gradients are those of the whole batch with factors 0 and m / (B p).

    dropout: "all" for two whole passes.
    """
    cm = CMConfig(cm_fraction=0.5, div_bound=0.252, independent_dropout=dropout)
    objective, batch = a_step(digits, cm=cm, dropout=0.1)
    fill_reserved(objective.net.decoder, A=1.0)
    assert len(batch.cm_weight) == 6
    total, terms, D = objective(batch)
    of_chosen = terms["con"] + terms["div"]
    assert total.item() == pytest.approx(terms["base"].item() + of_chosen.item())
    # Eq. (2) of the whole batch
    factors = torch.cat([batch.cm_weight * 2, torch.zeros(6)])
    everyone = batch._replace(cm_weight=None)
    pred = Predictions(objective.net, everyone, q_sample(batch.x_0, batch.t, batch.eps, *ROOTS))
    all_D = distance(pred.eps, pred.general())
    assert torch.allclose(D, all_D[:6], rtol=1e-4) and D.min() < 0.252 < D.max()
    con = objective.w_con_y[batch.y] * all_D
    div = objective.w_div_y[batch.y] * all_D.clamp(max=0.252)
    expected = (factors * (con - div)).mean()
    assert of_chosen.item() == pytest.approx(expected.item(), rel=1e-3)
    got, expected = (gradient_of(value, objective.net) for value in (of_chosen, expected))
    assert (got - expected).norm() <= 1e-3 * expected.norm() and expected.norm() > 0
    # The base loss sees every image once
    everything = a_step(digits)[1]
    assert everything.cm_weight is None
    assert sorted(batch.t.tolist()) == sorted(everything.t.tolist())


def test_cm_fraction_per_part_of_a_batch(digits):
    objective, batch = a_step(digits, cm=CMConfig(cm_fraction=0.5))
    parts = [objective.draw_batch(batch.pool.x_0, batch.pool.y, seed=0, step=3, part=k, parts=3)
             for k in range(3)]
    assert [len(part.cm_weight) for part in parts] == [2, 2, 2]
    everyone = torch.cat([part.y for part in parts])
    assert sorted(everyone.tolist()) == sorted(batch.pool.y.tolist())


def test_class_weights():
    cifar100 = [int(500 * 0.01 ** (c / 99)) for c in range(100)]
    con, div = class_weights(cifar100)
    assert [con.mean().item(), div.mean().item()] == pytest.approx([1, 1])
    assert (con - div)[[0, -1]].tolist() == pytest.approx([4.57, -4.34], abs=0.01)
    assert all((w == 1).all() for w in class_weights([7, 7, 7]))
    with pytest.raises(ValueError):
        class_weights([100, 10, 0])         # w_div would be 0, 0 and not a number


def test_a_batch_is_pure_and_shared_between_ranks(digits):
    objective, batch = a_step(digits)
    objective.ada = 0.5
    draw = partial(objective.draw_batch, batch.pool.x_0, batch.pool.y, seed=0)
    batch, again = draw(step=3), draw(step=3)
    halves = [draw(step=3, part=part, parts=2) for part in (0, 1)]
    for name in ("x_0", "y", "y_cond", "t", "eps", "y_other", "y_other_cond", "augmentation"):
        whole = getattr(batch, name)
        assert torch.equal(getattr(again, name), whole), name
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), whole), name
    assert torch.equal(torch.cat([half.pool.gumbel for half in halves]), batch.pool.gumbel)
    assert torch.equal(batch.pool.x_0, halves[1].pool.x_0)
    assert not torch.equal(draw(step=4).eps, batch.eps)


@pytest.mark.parametrize("y_other, shares", [("uniform", [1] * 10), ("train", COUNTS)])
def test_what_a_batch_draws_has_its_distribution(y_other, shares):
    """Timesteps, noise, OC's Gumbel noise, other classes, dropped labels, mirrored images."""
    objective = Objective(net=tiny_net(), base=bind("ddpm"), counts=COUNTS, alphas_bar=AB,
                          label_drop=0.5, y_other=y_other, flip=True)
    y = torch.arange(2000) % 10
    x_0 = torch.zeros(2000, 1, 8, 8)
    x_0[..., 0] = 1
    batch = objective.draw_batch(x_0, y, seed=0, step=0)
    assert stats.binomtest(int(batch.x_0[:, 0, 0, 7].sum()), 2000).pvalue > 1e-3
    assert stats.kstest(batch.t / 1000, "uniform").pvalue > 1e-3
    assert stats.kstest(batch.eps.flatten(), "norm").pvalue > 1e-3
    assert stats.kstest(batch.pool.gumbel[:99].flatten(), "gumbel_r").pvalue > 1e-3
    expected = 2000 * np.array(shares) / sum(shares)
    assert stats.chisquare(np.bincount(batch.y_other, minlength=10), expected).pvalue > 1e-3
    assert stats.binomtest(int((batch.y_cond == -1).sum()), 2000).pvalue > 1e-3
    assert ((batch.y_cond == -1) | (batch.y_cond == y)).all()


def test_another_seed_draws_everything_anew(digits):
    """Noise, masks, augmentation, and with --cm-fraction the images that theta^g sees."""
    objective, batch = a_step(digits, cm=CMConfig(cm_fraction=0.5), dropout=0.5)
    objective.ada = 1.0

    def drawn(seed):
        b = objective.draw_batch(batch.pool.x_0, batch.pool.y, seed=seed, step=3)
        # Sorted: whichever images come first
        return {"t": b.t.sort().values, "augmentation": b.augmentation.sort(0).values, "y": b.y,
                "encode": b.masks.encode[0], "decode": b.masks.decode[0], "weight": b.cm_weight}
    first, again, other = drawn(0), drawn(0), drawn(1)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert not torch.equal(value, other[name]), name
