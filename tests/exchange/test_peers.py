"""peers.py: a network in the peers' layout, computed literally from its names, becomes ours."""
import math

import pytest
import torch
from conftest import call, refuses
from torch.nn import functional as F

import disk
import sample
from exchange import peers
from runtime import UserError

CH = 128
TABLE = "time_embedding.timembedding.0.weight"


class Weights(dict):
    """A state dict of random weights, filled layer by layer."""

    def __init__(self):
        super().__init__()
        self.g = torch.Generator().manual_seed(0)

    def layer(self, name, *shape):
        """A weight and a bias."""
        fan_in = math.prod(shape[1:])
        self[f"{name}.weight"] = torch.randn(shape, generator=self.g) / fan_in ** 0.5
        self[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=self.g)

    def norm(self, name, ch):
        """A group norm."""
        self.layer(name, ch)
        self[f"{name}.weight"] = 1 + 0.1 * self[f"{name}.bias"].flip(0)

    def block(self, name, in_ch, out_ch, attention):
        """A residual block."""
        self.norm(f"{name}.block1.0", in_ch)
        self.layer(f"{name}.block1.2", out_ch, in_ch, 3, 3)
        self.layer(f"{name}.temb_proj.1", out_ch, 4 * CH)
        self.norm(f"{name}.block2.0", out_ch)
        self.layer(f"{name}.block2.3", out_ch, out_ch, 3, 3)
        if in_ch != out_ch:
            self.layer(f"{name}.shortcut", out_ch, in_ch, 1, 1)
        if attention:
            self.norm(f"{name}.attn.group_norm", out_ch)
            for part in ("proj_q", "proj_k", "proj_v", "proj"):
                self.layer(f"{name}.attn.{part}", out_ch, out_ch, 1, 1)


def their_state(classes=10, channels=1):
    """Random weights of a network of two levels with one block each."""
    w = Weights()
    angles = torch.arange(1000.)[:, None] * torch.exp(
        -math.log(10000) * torch.arange(0, CH, 2) / CH)
    table = torch.stack([angles.sin(), angles.cos()], 2).flatten(1)
    w[TABLE] = table
    w.layer("time_embedding.timembedding.1", 4 * CH, CH)
    w.layer("time_embedding.timembedding.3", 4 * CH, 4 * CH)
    w["label_embedding.weight"] = torch.randn(classes, 4 * CH, generator=w.g)
    w["augm_embedding.weight"] = torch.randn(4 * CH, 9, generator=w.g)
    w.layer("head", CH, channels, 3, 3)
    w.block("downblocks.0", CH, CH, False)
    w.layer("downblocks.1.main", CH, CH, 3, 3)
    w.block("downblocks.2", CH, 2 * CH, True)
    w.block("middleblocks.0", 2 * CH, 2 * CH, True)
    w.block("middleblocks.1", 2 * CH, 2 * CH, False)
    w.block("upblocks.0", 4 * CH, 2 * CH, True)
    w.block("upblocks.1", 3 * CH, 2 * CH, True)
    w.layer("upblocks.2.main", 2 * CH, 2 * CH, 3, 3)
    w.block("upblocks.3", 3 * CH, CH, False)
    w.block("upblocks.4", 2 * CH, CH, False)
    w.norm("tail.0", CH)
    w.layer("tail.2", channels, CH, 3, 3)
    return dict(w)


def theirs(w, x, t, y):
    """What a network of these weights predicts; y: labels, or None."""
    def conv(name, x, stride=1):
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, w[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def swish_norm(name, x):
        return F.silu(F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"]))

    def attention(name, x):
        N, C, H, W = x.shape
        h = F.group_norm(x, 32, w[f"{name}.group_norm.weight"], w[f"{name}.group_norm.bias"])
        q, k, v = (conv(f"{name}.proj_{part}", h).view(N, C, H * W) for part in "qkv")
        share = (torch.einsum("nci,ncj->nij", q, k) / C ** 0.5).softmax(2)
        return x + conv(f"{name}.proj", torch.einsum("nij,ncj->nci", share, v).view(N, C, H, W))

    def block(name, x):
        h = conv(f"{name}.block1.2", swish_norm(f"{name}.block1.0", x))
        h = h + linear(f"{name}.temb_proj.1", F.silu(emb))[:, :, None, None]
        h = conv(f"{name}.block2.3", swish_norm(f"{name}.block2.0", h))
        h = h + (conv(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in w else x)
        return attention(f"{name}.attn", h) if f"{name}.attn.proj.weight" in w else h
    time = "time_embedding.timembedding"
    emb = linear(f"{time}.3", F.silu(linear(f"{time}.1", w[f"{time}.0.weight"][t])))
    if y is not None:
        emb = emb + w["label_embedding.weight"][y]
    a = conv("head", x)
    b = block("downblocks.0", a)
    c = conv("downblocks.1.main", b, stride=2)
    d = block("downblocks.2", c)
    h = block("middleblocks.1", block("middleblocks.0", d))
    h = block("upblocks.1", torch.cat([block("upblocks.0", torch.cat([h, d], 1)), c], 1))
    h = conv("upblocks.2.main", F.interpolate(h, scale_factor=2, mode="nearest"))
    h = block("upblocks.4", torch.cat([block("upblocks.3", torch.cat([h, b], 1)), a], 1))
    return conv("tail.2", swish_norm("tail.0", h))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A checkpoint as their main.py writes it; its other weights are others."""
    path = tmp_path_factory.mktemp("peers") / "ckpt_300000.pt"
    state = their_state()
    raw = {name: value + 1 for name, value in state.items()}
    torch.save({"net_model": raw, "ema_model": state, "sched": {"last_epoch": 3},
                "optim": {"state": {}}, "step": 300000, "fixed_x_T": torch.zeros(2, 1, 8, 8)}, path)
    return path


@pytest.fixture(scope="module")
def imported(file, data_dir):
    """The path of what peers.py made of it."""
    path = file.with_name("ours.pt")
    call(peers.main, "--ckpt", file, "--to", path, "--dataset", "digits", "--ir", 20,
         "--data-dir", data_dir)
    return path


def test_it_predicts_what_theirs_does(imported):
    ckpt = disk.load(imported, ["diffusion"])
    net = sample.load_merged(ckpt)
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, 1, 8, 8, generator=g), torch.tensor([0, 7, 500, 999])
    with torch.no_grad():
        expected = theirs(their_state(), x, t, torch.tensor([0, 3, 9, 5]))
        without = theirs(their_state(), x, t, None)
        got = net(x, t, torch.tensor([0, 3, 9, 5]))
        null = net(x, t, torch.tensor([-1] * 4))
    assert (expected - without).abs().max() > 0.1
    for ours, peer in ((got, expected), (null, without)):
        torch.testing.assert_close(ours, peer, rtol=1e-4, atol=1e-5 * peer.abs().max().item())
    assert (ckpt["step"], ckpt["network"]["ch_mult"], ckpt["network"]["attn"]) == (
        300000, [1, 2], [1])
    assert sum(ckpt["data"]["class_counts"]) == 502


@pytest.mark.parametrize("changes", [
    {"label_embedding.weight": None},                                   # it takes no labels
    {"middleblocks.0.attn.proj.weight": None},
    {"something.weight": torch.ones(2)},
    {TABLE: torch.zeros(400, CH)},                                      # of another schedule
], ids=str)
def test_other_networks_are_refused(changes):
    state = {**their_state(), **changes}
    with pytest.raises(UserError, match="--ckpt"):
        peers.translate({name: value for name, value in state.items() if value is not None})


def test_other_files_are_refused(file, cm_run, tmp_path, data_dir, capsys):
    def check(path, to, says):
        refuses(capsys, peers.main, "--data-dir", data_dir, "--ir", 20, "--dataset", "digits",
                "--ckpt", path, "--to", to, says=[says])
    check(cm_run / "ckpt.pt", tmp_path / "new.pt", "--ckpt")
    torch.save({"ema_model": print}, tmp_path / "code.pt")
    check(tmp_path / "code.pt", tmp_path / "new.pt", "--ckpt")
    check(file, file, "--to")
    torch.save({"ema_model": their_state(classes=7)}, tmp_path / "seven.pt")
    check(tmp_path / "seven.pt", tmp_path / "new.pt", "--dataset")
    assert not (tmp_path / "new.pt").exists()
