"""model.py: the peers' network to the parameter, conditioned at every level; the forward process."""
import math

import pytest
import torch
from conftest import TINY, randomize, tiny_net
from torch.testing import assert_close

from model import ResBlock, UNet, UNetConfig, make_alphas_bar, q_sample, sinusoid


def test_parameter_counts_are_the_papers():
    count = lambda **k: sum(p.numel() for p in UNet(UNetConfig(**k)).parameters())
    assert count() == 35_797_507                # the peers count 128,000 more: a fixed sinusoid table
    assert count(num_classes=10) == 35_797_507 - 90 * 512
    assert count(ch_mult=(1, 2, 2)) < count() < count(ch_mult=(1, 2, 3, 4))     # Fig. 4(d)


def test_schedule_is_the_products_of_a_linear_schedule():
    ab, product = make_alphas_bar(), 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert math.isclose(float(ab[t]), product, rel_tol=1e-12)
    assert ab.dtype == torch.float64 and len(ab) == 1000


def test_q_sample_against_the_equation():
    ab, g = make_alphas_bar(), torch.Generator().manual_seed(0)
    x_0, eps, t = torch.randn(4, 3, 2, 2, generator=g), torch.randn(4, 3, 2, 2, generator=g), torch.tensor([0, 10, 500, 999])
    x_t = q_sample(x_0, t, eps, ab)
    for i in range(4):
        a = float(ab[t[i]])
        assert_close(x_t[i], math.sqrt(a) * x_0[i] + math.sqrt(1 - a) * eps[i])


def test_sinusoid_has_the_frequencies_of_the_ddpm_code():
    emb = sinusoid(torch.tensor([7]), 8)[0]
    angles = [7 * 10000 ** (-2 * i / 8) for i in range(4)]
    assert_close(emb, torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles]))


@pytest.mark.parametrize("ch, ch_mult, size", [(8, (1, 2), 8), (16, (1, 2, 2), 8), (32, (1, 2, 3, 4), 16), (64, (1, 2), 4)])
def test_every_block_depends_on_t_and_y(ch, ch_mult, size):
    """With 32 groups on 32 channels, group norm would remove the added embedding exactly; here every block feels it."""
    cfg = UNetConfig(channels=1, num_classes=10, ch=ch, ch_mult=ch_mult, attn=(1,), num_res_blocks=1)
    net = randomize(UNet(cfg), scale=0.1)
    x, t, y = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0)), torch.tensor([300]), torch.tensor([3])
    blocks = [m for m in net.modules() if isinstance(m, ResBlock)]
    weights = [b.emb_proj.weight.detach().clone() for b in blocks]
    for kept in range(len(blocks)):             # only this block sees the embedding
        for b, w, k in zip(blocks, weights, range(len(blocks))):
            b.emb_proj.weight.data = w if k == kept else torch.zeros_like(w)
        with torch.no_grad():
            out = net(x, t, y)
            for other in (net(x, torch.tensor([310]), y), net(x, t, torch.tensor([4])), net(x, t, torch.tensor([-1]))):
                assert (out - other).abs().max() > 1e-5, f"block {kept} at level {blocks[kept].level}"


def test_null_label_adds_no_embedding():
    net = tiny_net(None)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([-1, -1])
    before = net(x, t, y)
    with torch.no_grad():
        net.encoder.embedding.label.weight.add_(1.0)
    assert_close(net(x, t, y), before)
    assert (net(x, t, torch.tensor([0, -1]))[1] - before[1]).abs().max() < 1e-6


def test_forward_is_decode_of_encode_and_train_mode_changes_nothing():
    net = tiny_net(None)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 2])
    encoded = net.encode(x, t, y)
    assert_close(net.decode(*encoded), net(x, t, y))
    assert_close(net.decode(*encoded), net(x, t, y))        # decode does not consume the encoding
    assert torch.equal(net.train()(x, t, y), net.eval()(x, t, y))


def test_dropout_masks():
    net = tiny_net(None, dropout=0.25)
    encode, decode = net.draw_masks(64, 8, torch.Generator().manual_seed(0))
    assert (len(encode), len(decode)) == (4, 4)             # 2 levels + 2 middle blocks; 2 x 2 up blocks
    values = torch.cat([m.flatten() for m in encode + decode])
    assert_close(values.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert abs((values == 0).float().mean() - 0.25) < 0.005
    x, t, y = torch.randn(64, 1, 8, 8), torch.full((64,), 100), torch.zeros(64, dtype=torch.int64)
    run = lambda e, d: net.decode(*net.encode(x, t, y, e), d)
    assert torch.equal(run(encode, decode), run(encode, decode))
    for masks in (encode, decode):                          # each mask reaches the output
        for i in range(len(masks)):
            off = [torch.ones_like(m) if j == i else m for j, m in enumerate(masks)]
            other = run(off, decode) if masks is encode else run(encode, off)
            assert (other - run(encode, decode)).abs().max() > 1e-7
    assert tiny_net(None, dropout=0.0).draw_masks(2, 8, torch.Generator()) == ([], [])


def test_any_channels_and_sizes_and_a_clear_error():
    net = UNet(UNetConfig(channels=2, num_classes=3, ch=8, ch_mult=(1, 2, 2), attn=(0, 2), num_res_blocks=2))
    assert net(torch.randn(2, 2, 12, 20), torch.tensor([1, 2]), torch.tensor([0, -1])).shape == (2, 2, 12, 20)
    with pytest.raises(AssertionError, match="not divisible by 4"):
        net(torch.randn(1, 2, 10, 10), torch.tensor([1]), torch.tensor([0]))
    with pytest.raises(ValueError, match="group norm cannot split 130"):
        UNet(UNetConfig(ch=130))
    assert UNetConfig(**UNetConfig(**TINY).to_dict()) is not None
