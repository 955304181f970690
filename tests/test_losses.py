"""losses.py against a slow NumPy version of the corrected equations.

Corrections: (D.3) printed as x_t / sqrt(a_t) - x_ref, here (x_t - sqrt(ab) x_ref) / sqrt(1 - ab); Algorithm C.1 printed
with sqrt(a_t) x + (1 - a_t) eps, here sqrt(ab) x_0 + sqrt(1 - ab) eps; Eq. (2)'s divergence printed without a bound.
"""
import math

import numpy as np
import pytest
import torch
from conftest import tiny_net
from torch import nn

from cm_layers import general_only, reserved
from data import to_float
from losses import Objective, class_weights, distance, draw, oc_target
from model import make_alphas_bar, q_sample

COUNTS = [148, 106, 76, 54, 39, 28, 20, 14, 10, 7]
AB = make_alphas_bar()


def setup(digits, base="ddpm", rank_ratio=0.1, dropout=0.0, **options):
    """An objective on a random tiny network, and a batch of 12 digits."""
    o = Objective(tiny_net(rank_ratio, dropout=dropout), base, COUNTS, AB, **options)
    rows = np.linspace(0, len(digits.labels) - 1, 12).astype(int)
    x_0, y = to_float(torch.from_numpy(digits.images[rows])), torch.from_numpy(digits.labels[rows])
    return o, draw(x_0, y, o, seed=0, step=3)


def numpy_x_t(b):
    x_t = np.empty(b.x_0.shape)
    for i, t in enumerate(b.t.tolist()):
        a = math.prod(1 - (1e-4 + (0.02 - 1e-4) * s / 999) for s in range(t + 1))
        x_t[i] = math.sqrt(a) * b.x_0[i].numpy() + math.sqrt(1 - a) * b.eps[i].numpy()
    return x_t


def predictions(o, b, y):
    with torch.no_grad():
        return o.net(torch.from_numpy(numpy_x_t(b)).float(), b.t, y).numpy()


def mse(a, b):
    return np.array([np.mean((p - q) ** 2) for p, q in zip(a, b)])


def test_ddpm(digits):
    o, b = setup(digits, rank_ratio=None)
    total, terms, _ = o(b)
    assert terms["base"].item() == pytest.approx(mse(predictions(o, b, b.y_in), b.eps.numpy()).mean(), rel=1e-4)
    assert total.item() == terms["base"].item() and set(terms) == {"base"}


def test_cbdm(digits):
    o, b = setup(digits, "cbdm", rank_ratio=None, tau=0.002, gamma=0.25)
    own, other = predictions(o, b, b.y_in), predictions(o, b, b.y_prime)
    cb = np.mean([t * (y >= 0) * 1.25 * m for t, y, m in zip(b.t.tolist(), b.y_in.tolist(), mse(own, other))])
    total, terms, _ = o(b)
    assert terms["cb"].item() == pytest.approx(cb, rel=1e-4)
    assert total.item() == pytest.approx(terms["base"].item() + 0.002 * cb, rel=1e-4)


def test_cbdm_stops_gradients_as_printed(digits):
    o, b = setup(digits, "cbdm", rank_ratio=None, gamma=0.0)
    b = b._replace(y_in=b.y, y_prime=(b.y + 1) % 10)
    from losses import Predictions, cbdm
    p = Predictions(o.net, b, q_sample(b.x_0, b.t, b.eps, AB))
    grad = torch.autograd.grad(cbdm(p, b, o)["cb"], p.eps)[0]
    with torch.no_grad():
        expected = 2 * b.t[:, None, None, None] * (p.eps - p.under(b.y_prime)) / p.eps[0].numel() / len(b.t)
    torch.testing.assert_close(grad, expected)


def test_oc_target(digits):
    o, b = setup(digits, "oc")
    x_t, target = numpy_x_t(b), oc_target(q_sample(b.x_0, b.t, b.eps, AB), b, o).numpy()
    moved = 0
    for i, t in enumerate(b.t.tolist()):
        a = float(AB[t])
        log_q = [-((x_t[i] - math.sqrt(a) * x.numpy()) ** 2).sum() / (2 * (1 - a)) for x in b.pool_x_0]
        j = int(np.argmax(np.array(log_q) + b.gumbel[i].numpy()))
        keep = COUNTS[b.pool_y[j]] >= COUNTS[b.y[i]]
        expected = (x_t[i] - math.sqrt(a) * b.pool_x_0[j].numpy()) / math.sqrt(1 - a) if keep else b.eps[i].numpy()
        assert np.allclose(target[i], expected, atol=1e-3)
        moved += j != i
    assert moved >= 3


def test_oc_draw_follows_eq_d4():
    """Gumbel-max over log q is a draw from softmax(log q): frequencies against the probabilities."""
    g, log_q = torch.Generator().manual_seed(0), torch.tensor([0.0, -1.0, -2.0, -0.5])
    gumbel = -torch.empty(20000, 4).exponential_(generator=g).log()
    frequency = torch.bincount((log_q + gumbel).argmax(1), minlength=4) / 20000
    assert (frequency - log_q.softmax(0)).abs().max() < 0.015


def test_choosing_oneself_gives_eps_and_as_printed_it_does_not(digits):
    o, b = setup(digits, "oc")
    b = b._replace(gumbel=torch.full((12, 12), -1e9).fill_diagonal_(1e9))
    x_t = q_sample(b.x_0, b.t, b.eps, AB)
    torch.testing.assert_close(oc_target(x_t, b, o), b.eps, atol=1e-4, rtol=1e-4)
    a = AB.sqrt()[b.t].float()[:, None, None, None]
    assert distance(x_t / a - b.x_0, b.eps).max() > 0.5


@pytest.mark.parametrize("bound", [0.0, 0.0005, 100.0])
def test_cm_terms_and_total(digits, bound):
    o, b = setup(digits, lam=0.7, w_con=1.5, w_div=0.5, div_bound=bound)
    for _, _, part in reserved(o.net.decoder):
        nn.init.normal_(part.B, std=0.1, generator=torch.Generator().manual_seed(1))
    full = predictions(o, b, b.y_in)
    with general_only(o.net.decoder):
        D = mse(full, predictions(o, b, b.y_in))
    N, C = sum(COUNTS), len(COUNTS)
    con = np.mean([C * COUNTS[y] / N * d for y, d in zip(b.y.tolist(), D)])
    div = np.mean([-C / (COUNTS[y] * sum(1 / n for n in COUNTS)) * (min(d, bound) if bound else d) for y, d in zip(b.y.tolist(), D)])
    total, terms, distances = o(b)
    assert np.allclose(distances.numpy(), D, rtol=1e-3) and D.min() > 0
    assert terms["con"].item() == pytest.approx(con, rel=1e-3) and terms["div"].item() == pytest.approx(div, rel=1e-3)
    assert total.item() == pytest.approx(terms["base"].item() + 0.7 * (1.5 * con + 0.5 * div), rel=1e-3)


def test_the_bound_stops_the_divergence_gradient_above_it_only(digits):
    from losses import cm
    o, b = setup(digits, div_bound=0.01)
    D = torch.tensor([0.009, 0.011] * 6, requires_grad=True)
    grad = torch.autograd.grad(cm(D, b, o)["div"], D)[0]
    assert (grad[::2] < 0).all() and (grad[1::2] == 0).all()


def test_d_is_exactly_zero_while_b_is_zero(digits):
    o, b = setup(digits, dropout=0.1)
    for _, _, part in reserved(o.net.decoder):
        nn.init.zeros_(part.B)
    assert (o(b)[2] == 0).all()                     # the same masks in both passes
    o.independent_dropout = True
    b2 = draw(b.pool_x_0, b.pool_y, o, 0, 3)
    assert (o(b2)[2] > 0).all()                     # independent masks put a floor under D


def test_class_weights():
    cifar100 = [int(500 * 0.01 ** (c / 99)) for c in range(100)]
    con, div = class_weights(cifar100)
    assert con.mean().item() == pytest.approx(1) and div.mean().item() == pytest.approx(1)
    difference = con - div
    assert difference[0].item() == pytest.approx(4.57, abs=0.01) and difference[-1].item() == pytest.approx(-4.34, abs=0.01)
    assert all((w == 1).all() for w in class_weights([7, 7, 7]))


def test_draw_is_pure_and_shared_between_ranks(digits):
    o, b = setup(digits)
    again = draw(b.pool_x_0, b.pool_y, o, 0, 3)
    assert all(torch.equal(u, v) for u, v in zip(b[:9], again[:9]))
    halves = [draw(b.pool_x_0, b.pool_y, o, 0, 3, rank, 2) for rank in (0, 1)]
    for k, name in enumerate(b._fields[:9]):
        if not name.startswith("pool"):
            assert torch.equal(torch.cat([h[k] for h in halves]), b[k]), name
    assert not torch.equal(draw(b.pool_x_0, b.pool_y, o, 0, 4).eps, b.eps)


def test_label_drop_is_per_image(digits):
    o, _ = setup(digits, label_drop=0.5)
    y = torch.arange(1000) % 10
    y_in = draw(torch.zeros(1000, 1, 8, 8), y, o, 0, 0).y_in
    assert 400 < (y_in == -1).sum() < 600 and ((y_in == -1) | (y_in == y)).all()
