"""cm_layers.py: Eq. (1) on our network and on others' layers; theta^g; merging."""
import copy
from functools import partial

import pytest
import torch
import torchvision
from conftest import TINY, tiny_net
from torch import nn
from torch.testing import assert_close

from cm_layers import count, general_only, merge, reserve, reserved
from model import UNet, UNetConfig
from sample import build_network


# --------------------------------------------------------------------------------------------------
# Modules to reserve: each function returns (the module, a function that runs a network with it)

def unet():
    net = tiny_net(None)
    x = torch.randn(2, 1, 8, 8)
    t = torch.tensor([5, 900])
    y = torch.tensor([1, 2])
    return net.decoder, lambda: net(x, t, y)


def resnet():
    net = torchvision.models.resnet18(num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    return net, lambda: net(x)


def grouped():
    net = nn.Sequential(nn.Conv2d(8, 12, (3, 1), groups=4), nn.ReLU())
    x = torch.randn(2, 8, 5, 5)
    return net, lambda: net(x)


def transformer(train):
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).train(train)
    x = torch.randn(2, 5, 16)

    def call():
        if train:
            return net(x)
        # Without gradients, eval mode takes the fused path, which reads weights directly
        with torch.no_grad():
            return net(x)
    return net, call


CASES = {
    "unet": unet, "resnet18": resnet, "grouped": grouped,
    "transformer-train": partial(transformer, True),
    "transformer-eval": partial(transformer, False)}


def randomize_B(module, std=1.0):
    """Give every B normal values, as after training."""
    for _, _, part in reserved(module):
        nn.init.normal_(part.B, std=std)


def state_shapes(module):
    """{key: shape} of a module's state dict."""
    return {k: v.shape for k, v in module.state_dict().items()}


# --------------------------------------------------------------------------------------------------
# Reserve, theta^g, merge

@pytest.mark.parametrize("form", ["flat", "kernel"])
@pytest.mark.parametrize("case", CASES)
def test_reserve_general_merge(case, form):
    torch.manual_seed(0)
    module, run = CASES[case]()
    shapes = state_shapes(module)
    plain = run()
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
    assert state_shapes(module) == shapes
    merge(module)                                                       # a second time: nothing
    assert_close(run(), full, atol=1e-5, rtol=1e-5)


def test_merged_weight_is_w_plus_ba():
    layer = nn.Conv2d(6, 8, 3)
    reserve(layer, 0.5)
    part = layer.parametrizations.weight[0]
    nn.init.normal_(part.B)
    W_g = layer.parametrizations.weight.original.detach().clone()
    expected = torch.zeros_like(W_g)
    for o in range(8):                                                  # element by element
        for i in range(6):
            for a in range(3):
                for b in range(3):
                    column = (i * 3 + a) * 3 + b
                    BA = sum(part.B[o, r] * part.A[r, column] for r in range(4))
                    expected[o, i, a, b] = W_g[o, i, a, b] + BA
    assert_close(merge(layer).weight, expected)


def test_merge_general_keeps_the_general_weights():
    layer = reserve(nn.Linear(6, 8), 0.5)
    randomize_B(layer)
    W_g = layer.parametrizations.weight.original.detach().clone()
    assert torch.equal(merge(layer, "general").weight, W_g)


def test_merging_a_deep_copy_leaves_the_original_alone():
    module, run = unet()
    reserve(module)
    randomize_B(module, std=0.3)
    before = run()
    twin = copy.deepcopy(module)
    merge(twin)
    assert torch.equal(run(), before)
    assert len(list(reserved(module))) > 0 and not list(reserved(twin))
    merge(module)
    assert_close(run(), before, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Ranks, gradients, which layers

@pytest.mark.parametrize("layer, form, rank, A, B", [
    (nn.Conv2d(128, 256, 3), "flat", 25, (25, 1152), (256, 25)),
    # The authors' release: min(out, in), per kernel row
    (nn.Conv2d(128, 256, 3), "kernel", 12, (36, 384), (768, 36)),
    (nn.Linear(512, 256), "kernel", 25, (25, 512), (256, 25)),
    (nn.Conv2d(128, 3, 3), "flat", 1, (1, 1152), (3, 1)),               # floor(0.3) = 0; at least 1
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
        # B = 0 hides A for one step
        assert part.B.grad.abs().max() > 0 and (part.A.grad == 0).all()
    randomize_B(module)
    run().square().sum().backward()
    for owner, name, part in reserved(module):
        W_g = owner.parametrizations[name].original
        assert part.A.grad.abs().max() > 0 and W_g.grad.abs().max() > 0


def test_only_the_decoder_is_reserved_and_counts_add_up():
    net = build_network(TINY, 0.1)
    plain = UNet(UNetConfig(**TINY))
    kinds = (nn.Conv2d, nn.Linear)
    layers = [m for m in plain.decoder.modules() if isinstance(m, kinds)]
    assert not list(reserved(net.encoder))
    assert len(list(reserved(net.decoder))) == len(layers)
    numbers = count(net)
    assert numbers["general"] == count(plain)["general"]
    assert sum(numbers.values()) == sum(p.numel() for p in net.parameters())


def test_where_picks_layers():
    module, _ = unet()
    reserve(module, where=lambda name, layer: isinstance(layer, nn.Conv2d) and "up.0" in name)
    shapes = {tuple(owner.weight.shape) for owner, _, _ in reserved(module)}
    assert shapes <= {(32, 64, 3, 3), (32, 32, 3, 3), (32, 64, 1, 1), (32, 32, 1, 1)}


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
