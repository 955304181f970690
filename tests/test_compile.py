"""Compiled losses against eager ones, with the real compiler; where there is none, the line that says so.

The networks are small, so that the compiler has little to do.
"""
import shutil
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import classify
import consistency      # noqa: F401, which enters its loss
import runtime
from cm_layers import reserve, reserved
from losses import Objective, draw
from model import make_alphas_bar

COUNTS = [9, 8, 7, 6, 5, 5, 4, 3, 2, 1]


class Small(nn.Module):
    """A UNet's methods on two convolutions."""

    def __init__(self):
        super().__init__()
        self.encoder, self.label, self.decoder = nn.Conv2d(1, 8, 3, padding=1), nn.Embedding(11, 8), nn.Conv2d(8, 1, 3, padding=1)

    def encode(self, x, t, y, masks, a):
        return self.encoder(x) + self.label(y + 1)[:, :, None, None],

    def decode(self, h, masks):
        return self.decoder(h.sigmoid())

    def draw_masks(self, *_):
        return [], []


def diffusion(base, cm):
    net = Small()
    if cm:
        reserve(net.decoder, 0.3)
    o = Objective(net, base, COUNTS, make_alphas_bar())
    return o, (draw(torch.rand(8, 1, 8, 8) * 2 - 1, torch.arange(8), o, seed=0, step=3),)


def recognition(loss, cm):
    net = nn.Sequential(OrderedDict(conv1=nn.Conv2d(1, 8, 3), layer4=nn.Conv2d(8, 8, 3), bn=nn.BatchNorm2d(8),
                                    pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(8, 10)))
    if cm:
        reserve(net.layer4, 0.3)
    return classify.Objective(net, loss, COUNTS, reserved=("layer4",) if cm else ()), (torch.rand(8, 1, 8, 8) * 2 - 1, torch.arange(8))


@pytest.mark.parametrize("make, loss, cm", [(diffusion, "ddpm", False), (diffusion, "oc", True), (diffusion, "consistency", True), (recognition, "ce", False),
                                            (recognition, "la", True)], ids=["ddpm", "oc + cm", "consistency + cm", "ce", "la + cm"])
def test_compiled_is_eager(make, loss, cm, cpu, capsys):
    """One term or several: loss, terms and gradients are the eager module's; and it was compiled."""
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        o, inputs = make(loss, cm)
        for _, _, low_rank in reserved(o):
            nn.init.normal_(low_rank.B)
        modules.append(o)
    o, twin = modules
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = runtime.compile_or_not(twin, lambda m: m(*inputs)[0], cpu)
    if shutil.which("c++") or shutil.which("g++"):
        assert compiled is not twin, capsys.readouterr().out
    else:
        assert "going on without" in capsys.readouterr().out
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):                          # one graph for all steps, not one a step
        compiled(*inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs and (compiled is twin or graphs == 1), dict(torch._dynamo.utils.counters)
    (a, terms_a, *_), (b, terms_b, *_) = o(*inputs), compiled(*inputs)
    a.backward()
    b.backward()
    assert_close((b, terms_b), (a, terms_a), rtol=1e-4, atol=1e-6)
    for (name, p), q in zip(o.named_parameters(), twin.parameters()):
        assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=lambda m: f"{name}: {m}")


def test_the_trial_leaves_buffers_and_gradients_alone(cpu):
    """Batch norm's statistics are those before the compilation's own pass, so that a resumed run is the same run."""
    o, inputs = recognition("ce", False)
    before = {n: b.clone() for n, b in o.named_buffers()}
    runtime.compile_or_not(o, lambda m: m(*inputs)[0], cpu)
    assert all(torch.equal(b, before[n]) for n, b in o.named_buffers()) and all(p.grad is None for p in o.parameters())
