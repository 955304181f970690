"""cm_layers.py: Eq. (1) on our network and on others' layers; theta^g; merging."""
import copy

import pytest
import torch
import torchvision
from conftest import TINY, tiny_net
from torch import nn
from torch.testing import assert_close

from cm_layers import count, general_only, merge, reserve, reserved
from model import UNet, UNetConfig
from sample import build_network


def unet():
    net = tiny_net(None)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 2])
    return net.decoder, lambda: net(x, t, y)


def resnet():
    net, x = torchvision.models.resnet18(num_classes=5).eval(), torch.randn(2, 3, 32, 32)
    return net, lambda: net(x)


def grouped():
    net, x = nn.Sequential(nn.Conv2d(8, 12, (3, 1), groups=4), nn.ReLU()), torch.randn(2, 8, 5, 5)
    return net, lambda: net(x)


def transformer(train):
    torch.manual_seed(0)
    net, x = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).train(train), torch.randn(2, 5, 16)

    def call():
        if train:
            return net(x)
        with torch.no_grad():           # without gradients, eval mode takes the fused path that reads weights directly
            return net(x)
    return net, call


CASES = {"unet": unet, "resnet18": resnet, "grouped": grouped, "transformer-train": lambda: transformer(True),
         "transformer-eval": lambda: transformer(False)}


@pytest.mark.parametrize("form", ["flat", "kernel"])
@pytest.mark.parametrize("case", CASES)
def test_reserve_general_merge(case, form):
    torch.manual_seed(0)
    module, run = CASES[case]()
    keys, shapes, plain = set(module.state_dict()), {k: v.shape for k, v in module.state_dict().items()}, run()
    reserve(module, 0.25, form)
    assert torch.equal(run(), plain)                                    # B = 0
    for _, _, part in reserved(module):
        nn.init.normal_(part.A, std=0.3)
        nn.init.normal_(part.B, std=0.3)
    full = run()
    assert (full - plain).abs().max() > 1e-3
    with general_only(module):
        assert_close(run(), plain)
    assert_close(run(), full)                                           # the switch goes back
    merge(module)
    assert_close(run(), full, atol=1e-5, rtol=1e-5)
    assert set(module.state_dict()) == keys and {k: v.shape for k, v in module.state_dict().items()} == shapes
    merge(module)                                                       # a second time does nothing
    assert_close(run(), full, atol=1e-5, rtol=1e-5)


def test_merged_weight_is_w_plus_ba():
    layer = nn.Conv2d(6, 8, 3)
    reserve(layer, 0.5)
    part = layer.parametrizations.weight[0]
    nn.init.normal_(part.B)
    W_g = layer.parametrizations.weight.original.detach().clone()
    expected = torch.zeros_like(W_g)
    for o in range(8):                                                  # literally, element by element
        for i in range(6):
            for a in range(3):
                for b in range(3):
                    expected[o, i, a, b] = W_g[o, i, a, b] + sum(part.B[o, r] * part.A[r, (i * 3 + a) * 3 + b] for r in range(4))
    assert_close(merge(layer).weight, expected)


def test_merge_general_keeps_the_general_weights():
    layer = reserve(nn.Linear(6, 8), 0.5)
    nn.init.normal_(layer.parametrizations.weight[0].B)
    W_g = layer.parametrizations.weight.original.detach().clone()
    assert torch.equal(merge(layer, "general").weight, W_g)


@pytest.mark.parametrize("layer, form, rank, A, B", [
    (nn.Conv2d(128, 256, 3), "flat", 25, (25, 1152), (256, 25)),
    (nn.Conv2d(128, 256, 3), "kernel", 12, (36, 384), (768, 36)),        # the release: min(out, in), per kernel row
    (nn.Linear(512, 256), "kernel", 25, (25, 512), (256, 25)),
    (nn.Conv2d(128, 3, 3), "flat", 1, (1, 1152), (3, 1)),                # floor(0.3) = 0, at least 1
])
def test_ranks(layer, form, rank, A, B):
    part = reserve(layer, 0.1, form).parametrizations.weight[0]
    assert (part.rank, tuple(part.A.shape), tuple(part.B.shape)) == (rank, A, B)
    assert (part.B == 0).all() and part.A.std() > 0


def test_gradients_reach_w_a_and_b():
    module, run = unet()
    reserve(module)
    run().square().sum().backward()
    for _, _, part in reserved(module):
        assert part.B.grad.abs().max() > 0 and (part.A.grad == 0).all()  # B = 0 hides A for one step
        nn.init.normal_(part.B)
    run().square().sum().backward()
    for owner, name, part in reserved(module):
        assert part.A.grad.abs().max() > 0 and owner.parametrizations[name].original.grad.abs().max() > 0


def test_only_the_decoder_is_reserved_and_counts_add_up():
    net = build_network(TINY, 0.1)
    assert not list(reserved(net.encoder)) and len(list(reserved(net.decoder))) == len([
        m for m in UNet(UNetConfig(**TINY)).decoder.modules() if isinstance(m, (nn.Conv2d, nn.Linear))])
    numbers = count(net)
    assert numbers["general"] == count(UNet(UNetConfig(**TINY)))["general"]
    assert sum(numbers.values()) == sum(p.numel() for p in net.parameters())


def test_where_picks_layers():
    module, _ = unet()
    reserve(module, where=lambda name, layer: isinstance(layer, nn.Conv2d) and "up.0" in name)
    assert {tuple(owner.weight.shape) for owner, _, _ in reserved(module)} <= {(32, 64, 3, 3), (32, 32, 3, 3), (32, 64, 1, 1), (32, 32, 1, 1)}


def test_merging_a_deep_copy_leaves_the_original_alone():
    module, run = unet()
    reserve(module)
    for _, _, part in reserved(module):
        nn.init.normal_(part.B, std=0.3)
    before, twin = run(), copy.deepcopy(module)
    merge(twin)
    assert torch.equal(run(), before) and len(list(reserved(module))) > 0 and not list(reserved(twin))
    merge(module)
    assert_close(run(), before, atol=1e-5, rtol=1e-5)


def test_errors():
    for ratio in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="rank_ratio"):
            reserve(nn.Linear(4, 4), ratio)
    with pytest.raises(ValueError, match="already"):
        reserve(reserve(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="found no"):
        reserve(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="form"):
        reserve(nn.Linear(4, 4), form="other")
    with pytest.raises(ValueError, match="branch"):
        merge(nn.Linear(4, 4), "expert")
