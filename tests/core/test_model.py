"""model.py: the peers' network to the parameter, conditioned at every level; forward process."""
import math

import numpy as np
import pytest
import torch
from conftest import randomize, tiny_net
from torch.testing import assert_close

from model import (ResBlock, UNet, UNetConfig, drop, make_alphas_bar, q_sample, signal_and_sigma,
                   sinusoid, stratified_timesteps)
from variants.fused_norm import GroupNormSiLU


def parameters(**settings):
    """The number of parameters of a UNet with these settings."""
    return sum(p.numel() for p in UNet(UNetConfig(**settings)).parameters())


def two_images():
    """x_t, t, y of two noisy digits."""
    return torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 2])


def test_parameter_counts_are_the_papers():
    # The peers count 128,000 more: a fixed sinusoid table
    assert parameters() == 35_797_507
    assert parameters(num_classes=10) == 35_797_507 - 90 * 512
    smaller = parameters(ch_mult=(1, 2, 2))
    larger = parameters(ch_mult=(1, 2, 3, 4))
    assert smaller < parameters() < larger              # Fig. 4(d)


def test_the_forward_process():
    """alphas_bar are the products of a linear schedule, and x_t is the equation's."""
    alphas_bar = make_alphas_bar()
    product = 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert math.isclose(float(alphas_bar[t]), product, rel_tol=1e-12)
    g = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 4, 3, 2, 2, generator=g)
    t = torch.tensor([0, 10, 500, 999])
    x_t = q_sample(x_0, t, eps, *signal_and_sigma(alphas_bar))
    for i, a in enumerate(alphas_bar[t].tolist()):
        assert_close(x_t[i], math.sqrt(a) * x_0[i] + math.sqrt(1 - a) * eps[i])


@pytest.mark.parametrize("n, repeats, T", [(1, 1, 1000), (7, 10, 37), (5000, 10, 1000)])
def test_stratified_timesteps_are_the_literal_formula(n, repeats, T):
    """Bit for bit what NumPy gives."""
    offset = (np.arange(n) * 0.6180339887498949) % 1
    expected = ((np.arange(repeats)[None] + offset[:, None]) * T / repeats).astype(np.int64)
    t = stratified_timesteps(n, repeats, T)
    assert t.dtype == torch.int64 and t.shape == (n, repeats)
    assert np.array_equal(t.numpy(), expected)
    assert 0 <= t.min() and t.max() < T


def test_sinusoid_has_the_frequencies_of_the_ddpm_code():
    emb = sinusoid(torch.tensor([7]), 8)[0]
    angles = [7 * 10000 ** (-2 * i / 8) for i in range(4)]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    assert_close(emb, torch.tensor(expected))


@pytest.mark.parametrize("ch, ch_mult, size", [(8, (1, 2), 8), (32, (1, 2, 3, 4), 16)])
def test_every_block_depends_on_t_and_y(ch, ch_mult, size):
    """With 32 groups on 32 channels, group norm would remove the added embedding exactly.

    Here every block depends on it.
    """
    cfg = UNetConfig(channels=1, num_classes=10, ch=ch, ch_mult=ch_mult, attn=(1,),
                     num_res_blocks=1)
    net = randomize(UNet(cfg), scale=0.1)
    x = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([300])
    y = torch.tensor([3])
    others = [(torch.tensor([310]), y), (t, torch.tensor([4])), (t, torch.tensor([-1]))]
    blocks = [m for m in net.modules() if isinstance(m, ResBlock)]
    weights = [b.emb_proj.weight.detach().clone() for b in blocks]
    for kept, block in enumerate(blocks):
        # Only this block sees the embedding
        for k, (b, w) in enumerate(zip(blocks, weights)):
            b.emb_proj.weight.data = w if k == kept else torch.zeros_like(w)
        with torch.no_grad():
            out = net(x, t, y)
            for other_t, other_y in others:
                change = (out - net(x, other_t, other_y)).abs().max()
                assert change > 1e-5, f"block {kept} at level {block.level}"


def test_null_label_adds_no_embedding():
    net = tiny_net(None)
    x, t, _ = two_images()
    null = torch.tensor([-1, -1])
    before = net(x, t, null)
    with torch.no_grad():
        net.encoder.embedding.label.weight.add_(1.0)
    assert_close(net(x, t, null), before)
    one_null = net(x, t, torch.tensor([0, -1]))
    assert (one_null[1] - before[1]).abs().max() < 1e-6


def test_forward_is_decode_of_encode_and_train_mode_changes_nothing():
    net = tiny_net(None)
    x, t, y = two_images()
    encoded = net.encode(x, t, y)
    assert_close(net.decode(*encoded), net(x, t, y))
    assert_close(net.decode(*encoded), net(x, t, y))        # decode does not consume the encoding
    assert torch.equal(net.train()(x, t, y), net.eval()(x, t, y))


def test_dropout_masks():
    net = tiny_net(None, dropout=0.25)
    encode, decode = net.draw_masks(64, 8, torch.Generator().manual_seed(0))
    assert (len(encode), len(decode)) == (4, 4)     # 2 levels + 2 middle blocks; 2 x 2 up blocks
    kept = torch.cat([m.flatten() for m in encode + decode])
    assert kept.dtype == torch.bool and abs(kept.float().mean() - 0.75) < 0.005
    x, t, y = torch.randn(64, 1, 8, 8), torch.full((64,), 100), torch.zeros(64, dtype=torch.int64)

    def predict(without=None):
        """The prediction, with one mask that drops nothing."""
        masks = [torch.ones_like(m) if j == without else m for j, m in enumerate(encode + decode)]
        return net.decode(*net.encode(x, t, y, masks[:4]), masks[4:])
    assert torch.equal(predict(), predict())
    assert all((predict(i) - predict()).abs().max() > 1e-7 for i in range(8))   # each has an effect
    assert tiny_net(None, dropout=0.0).draw_masks(2, 8, torch.Generator()) == ([], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_mean(dtype):
    """What a mask keeps is scaled by 1 / (1 - dropout), backwards too, in the input's dtype."""
    h = torch.tensor([3.0, -2.0], dtype=dtype, requires_grad=True)
    dropped = drop(h, torch.tensor([True, False]), 0.25)
    assert dropped.dtype == dtype and dropped.tolist() == [4.0, 0.0]
    dropped.sum().backward()
    assert h.grad.tolist() == torch.tensor([1 / 0.75, 0.0]).to(dtype).tolist()
    assert drop(h, None, 0.25) is h


# What stands for torch's group norm in code that is compiled for CUDA
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape, groups", [
    ((3, 16, 5, 4), 4), ((2, 6, 1, 2), 3), ((1, 8, 7, 7), 1)])
def test_group_norm_silu_is_torchs(silu, shape, groups):
    g = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(shape, generator=g, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    norm = torch.nn.GroupNorm(groups, shape[1]).double()
    for p in norm.parameters():
        torch.nn.init.normal_(p, generator=g)
    y = GroupNormSiLU.apply(x, norm.weight, norm.bias, groups, norm.eps, silu)
    theirs = torch.nn.functional.silu(norm(x)) if silu else norm(x)
    assert_close(y, theirs, rtol=0, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)
    weights = torch.randn(shape, generator=g, dtype=torch.float64)
    inputs = [x, norm.weight, norm.bias]
    grads = [torch.autograd.grad((weights * out).sum(), inputs) for out in (y, theirs)]
    assert_close(*grads, rtol=0, atol=1e-12)
    assert grads[0][0].is_contiguous(memory_format=torch.channels_last)
