"""cm_layers.py: Eq. (1) on our network and on others' layers; theta^g; merging."""
import copy
import itertools
from functools import partial

import pytest
import torch
import torchvision
from conftest import fill_reserved, tiny_net
from torch import nn
from torch.nn.utils import parametrize, spectral_norm
from torch.testing import assert_close

from cm_layers import checkpoint, general_only, merge, reserve


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
        # Without gradients, eval mode takes the fused path, which reads weights directly
        with torch.set_grad_enabled(train):
            return net(x)
    return net, call


CASES = {
    "unet": unet, "resnet18": resnet, "grouped": grouped,
    "transformer-train": partial(transformer, True),
    "transformer-eval": partial(transformer, False)}


@pytest.mark.parametrize("form", ["flat", "kernel"])
@pytest.mark.parametrize("case", CASES)
def test_reserve_general_merge(case, form):
    torch.manual_seed(0)
    module, run = CASES[case]()
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    plain = run()
    reserve(module, 0.25, form)
    assert torch.equal(run(), plain)                                    # B = 0
    fill_reserved(module, 0.3, A=0.3)
    full = run()
    assert (full - plain).abs().max() > 1e-3
    with general_only(module):
        assert_close(run(), plain)
    assert_close(run(), full)                                           # the switch goes back
    merge(module)
    assert_close(run(), full, atol=1e-5, rtol=1e-5)
    assert {name: value.shape for name, value in module.state_dict().items()} == shapes
    merge(module)                                                       # a second time: nothing
    assert_close(run(), full, atol=1e-5, rtol=1e-5)


def test_merged_weight_is_w_plus_ba():
    layer = nn.Conv2d(6, 8, 3)
    reserve(layer, 0.5)
    part = layer.parametrizations.weight[0]
    nn.init.normal_(part.B)
    expected = layer.parametrizations.weight.original.detach().clone()
    for o, i, a, b in itertools.product(range(8), range(6), range(3), range(3)):
        column = (i * 3 + a) * 3 + b
        expected[o, i, a, b] += sum(part.B[o, r] * part.A[r, column] for r in range(4))
    assert_close(merge(layer).weight, expected)


@pytest.mark.parametrize("layer, form, rank, A, B", [
    (nn.Conv2d(128, 256, 3), "flat", 25, (25, 1152), (256, 25)),
    # The authors' release: min(out, in), per kernel row
    (nn.Conv2d(128, 256, 3), "kernel", 12, (36, 384), (768, 36)),
    (nn.Linear(512, 256), "kernel", 25, (25, 512), (256, 25)),
    (nn.Conv2d(80, 120, (3, 1)), "kernel", 8, (24, 80), (360, 24)),
    (nn.Conv2d(128, 3, 3), "flat", 1, (1, 1152), (3, 1)),               # floor(0.3) = 0; at least 1
])
def test_ranks(layer, form, rank, A, B):
    part = reserve(layer, 0.1, form).parametrizations.weight[0]
    assert (part.rank, tuple(part.A.shape), tuple(part.B.shape)) == (rank, A, B)
    assert (part.B == 0).all() and part.A.std() > 0
    part = reserve(nn.Linear(4, 6), rank=100).parametrizations.weight[0]
    assert reserve(nn.Linear(100, 100), 0.29).parametrizations.weight[0].rank == 29
    assert part.rank == 4 and 0.35 < part.A.abs().max() <= 0.5          # uniform to 1 / sqrt(k)


@pytest.mark.parametrize("wrong", [
    lambda: reserve(nn.Linear(4, 4), 0), lambda: reserve(nn.Linear(4, 4), 1.1),
    lambda: reserve(nn.LayerNorm(4)), lambda: reserve(reserve(nn.Linear(4, 4))),
    lambda: reserve(nn.Linear(4, 4), form="other"), lambda: merge(nn.Linear(4, 4), "expert"),
    lambda: reserve(nn.Sequential(spectral_norm(nn.Linear(4, 4))))])        # computed by a hook
def test_errors(wrong):
    with pytest.raises(ValueError):
        wrong()


def test_theta_g_is_refused_where_thetas_weights_are_kept():
    layer = reserve(nn.Linear(4, 4))
    with pytest.raises(ValueError), parametrize.cached(), general_only(layer):
        pass


def test_recurrent_layers_are_named():
    net = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "head": nn.Linear(4, 2),
                         "words": nn.Embedding(3, 4)})
    with pytest.warns(UserWarning):
        reserve(net)
    assert [name for name, module in net.items() if parametrize.is_parametrized(module)] == ["head"]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_passes_of_an_unknown_branch_are_refused(use_reentrant):
    """torch's own checkpoint would compute theta^g's pass anew with theta; ours does not."""
    net = reserve(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), 0.5)
    fill_reserved(net, 0.5)
    x = torch.randn(5, 4, requires_grad=True)

    def gradients(call):
        """Of a loss on theta's and theta^g's pass, each by `call(function, x)`."""
        net.zero_grad()
        full = call(net, x)
        with general_only(net):
            general = call(net, x)
        (full - 2 * general).square().sum().backward()
        return [p.grad for p in net.parameters()]
    others = partial(torch.utils.checkpoint.checkpoint, use_reentrant=use_reentrant)
    others(net, x).sum().backward()             # theta alone is known
    with pytest.raises(RuntimeError):
        gradients(others)
    assert_close(gradients(partial(checkpoint, net)), gradients(lambda f, x: f(x)))


def bert_with_adapter():
    """transformers' BERT with PEFT's LoRA on its queries, and a function that runs a network."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32)
    adapter = LoraConfig(r=2, lora_alpha=6, target_modules=["query"], init_lora_weights=False)
    net = get_peft_model(BertModel(config), adapter).eval()
    words = torch.arange(6)[None]
    return net, lambda net: net(words).last_hidden_state


def query_of(net):
    """The query layer of bert_with_adapter's network, PEFT's or BERT's own."""
    return dict(net.named_modules())[next(
        name for name, _ in net.named_modules() if name.endswith("attention.self.query"))]


def test_a_peft_adapter_merged_after_ours_adds_up():
    net, run = bert_with_adapter()
    plain = run(net)
    reserve(net, 0.5, where=lambda name, layer: "lora" not in name)
    assert torch.equal(run(net), plain)
    fill_reserved(net, 0.3)
    before = run(net)
    with general_only(net):
        assert_close(run(net), plain)
    query = query_of(net)
    chain = query.base_layer.parametrizations.weight
    lora = query.lora_B["default"].weight @ query.lora_A["default"].weight
    expected = chain.original + chain[0].B @ chain[0].A + 6 / 2 * lora
    merge(net)
    # PEFT freezes W^g, and the merged weight stays frozen
    assert not query.base_layer.weight.requires_grad
    net = net.merge_and_unload()
    assert_close(query_of(net).weight, expected)
    assert_close(run(net), before, atol=1e-5, rtol=1e-5)


def test_a_peft_adapter_merged_before_ours():
    net, run = bert_with_adapter()
    reserve(net, 0.5)
    fill_reserved(net, 0.3)
    before = run(net)
    unloaded = copy.deepcopy(net).merge_and_unload()
    assert (run(merge(unloaded)) - before).abs().max() > 0.01           # it is lost
    net.merge_adapter()
    with pytest.raises(ValueError):
        merge(net)
    net.unmerge_adapter()
    assert_close(run(merge(net)), before, atol=1e-5, rtol=1e-5)
    net.merge_adapter()
    with pytest.raises(ValueError):
        reserve(net)
    assert_close(run(merge(net)), before, atol=1e-5, rtol=1e-5)         # nothing reserved: nothing
