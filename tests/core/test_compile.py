"""Compiled losses give what eager ones give; without a compiler, a line says so.

The compiler is the real one, and the networks are small, so that it has little to do.
"""
import shutil
from collections import OrderedDict

import pytest
import torch
from conftest import fill_reserved, tiny_net
from torch import nn
from torch.testing import assert_close

import runtime
from cm_layers import general_only, reserve
from losses import CMConfig, Objective, bind
from model import make_alphas_bar
from recognition import resnet
from variants import fused_norm

pytestmark = pytest.mark.slow
COUNTS = [9, 8, 7, 6, 5, 5, 4, 3, 2, 1]


class Small(nn.Module):
    """A UNet's methods on two convolutions."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(1, 8, 3, padding=1)
        self.label = nn.Embedding(11, 8)
        self.decoder = nn.Conv2d(8, 1, 3, padding=1)

    def encode(self, x, t, y, masks, a):
        return (self.encoder(x) + self.label(y + 1)[:, :, None, None],)

    def decode(self, h, masks):
        return self.decoder(h.sigmoid())

    def draw_masks(self, *_):
        return [], []


def diffusion(base, cm):
    """(an Objective, its inputs). cm: --cm-fraction, or False."""
    net = Small()
    if cm:
        reserve(net.decoder, 0.3)
    objective = Objective(net=net, base=bind(base), counts=COUNTS, alphas_bar=make_alphas_bar(),
                          cm=CMConfig(cm_fraction=cm or 1.0))
    x_0 = torch.rand(8, 1, 8, 8) * 2 - 1
    return objective, (objective.draw_batch(x_0, torch.arange(8), seed=0, step=3),)


def recognition(loss, cm):
    """(a ClassifierLoss, its inputs)."""
    net = nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(1, 8, 3), layer4=nn.Conv2d(8, 8, 3), bn=nn.BatchNorm2d(8),
        pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(8, 10)))
    stages = ()
    if cm:
        reserve(net.layer4, 0.3)
        stages = ("layer4",)
    objective = resnet.ClassifierLoss(net=net, loss=loss, counts=COUNTS, reserved=stages)
    return objective, (resnet.Images(torch.rand(8, 1, 8, 8) * 2 - 1, torch.arange(8)),)


def twins(make, loss, cm):
    """Two equal objectives, every B of them random, and the inputs of one step."""
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        module, inputs = make(loss, cm)
        fill_reserved(module)
        modules.append(module)
    return *modules, inputs


@pytest.mark.parametrize("make, loss, cm", [
    pytest.param(diffusion, "ddpm", False, id="ddpm"),
    pytest.param(diffusion, "oc", 1.0, id="oc + cm"),
    pytest.param(diffusion, "oc", 0.5, id="oc + cm, half"),
    pytest.param(diffusion, "consistency", 1.0, id="consistency + cm"),
    pytest.param(recognition, "ce", False, id="ce"),
    pytest.param(recognition, "la", True, id="la + cm"),
])
def test_compiled_is_eager(make, loss, cm, cpu, capsys):
    """One term or several: loss, terms and gradients are the eager module's; it was compiled."""
    eager, twin, inputs = twins(make, loss, cm)
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    compiled, _ = runtime.compile_or_not(twin, lambda m: m(*inputs)[0], cpu)
    printed = capsys.readouterr().err
    if shutil.which("c++") or shutil.which("g++"):
        assert compiled is not twin, printed
    else:
        assert "going on without" in printed
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(2):                          # one graph for all steps, not one per step
        compiled(*inputs)
    assert counters["stats"]["unique_graphs"] == graphs, dict(counters)
    assert compiled is twin or graphs == 1, dict(counters)

    total, terms, *_ = eager(*inputs)
    total_compiled, terms_compiled, *_ = compiled(*inputs)
    total.backward()
    total_compiled.backward()
    assert_close((total_compiled, terms_compiled), (total, terms), rtol=1e-4, atol=1e-6)
    for p, q in zip(eager.parameters(), twin.parameters()):
        assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_what_is_compiled_for_cuda_can_be_traced(monkeypatch, dtype, atol):
    """One graph, forwards and backwards, of theta and theta^g; the numbers of the eager network."""
    net = tiny_net(0.3, dropout=0.3)
    x_t, t, y = torch.randn(3, 1, 8, 8), torch.tensor([5, 300, 900]), torch.tensor([1, 2, -1])
    masks = net.draw_masks(3, 8, torch.Generator().manual_seed(0))

    def distance():
        encoded = net.encode(x_t, t, y, masks[0])
        with general_only(net.decoder):
            eps_g = net.decode(*encoded, masks[1])
        return net.decode(*encoded, masks[1]).float(), eps_g.float()

    def results(function):
        net.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            eps, eps_g = function()
        (eps - eps_g).square().sum().backward()
        return [eps.detach(), eps_g.detach(), *(p.grad for p in net.parameters())]
    expected = results(distance)
    monkeypatch.setattr(fused_norm, "compiled_for_cuda", lambda x: True)
    torch._dynamo.reset()
    compiled = results(torch.compile(distance, backend="aot_eager", fullgraph=True))
    for a, b in zip(compiled, expected):
        assert_close(a, b, rtol=0, atol=atol * (1 + b.abs().max().item()))


def test_the_trial_leaves_buffers_and_gradients_alone(cpu):
    """Batch norm's statistics are those before the trial: a resumed run is the same run."""
    objective, inputs = recognition("ce", False)
    before = {name: b.clone() for name, b in objective.named_buffers()}
    runtime.compile_or_not(objective, lambda m: m(*inputs)[0], cpu)
    assert all(torch.equal(b, before[name]) for name, b in objective.named_buffers())
    assert all(p.grad is None for p in objective.parameters())
