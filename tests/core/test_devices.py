"""Devices and dtypes that this machine does not have: MPS, float16 with a scaled loss, TF32."""
import copy
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from conftest import a_step, assert_equal, call, ckpt_of, tiny_net
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import loop
import runtime
import sample
import samplers
import train
from losses import BASES, CMConfig
from metrics import features
from runtime import UserError

# A device without float64: torch's "meta" plays MPS
class NoFloat64(TorchDispatchMode):
    """Raises, as MPS does, where a float64 tensor would be on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            # "meta" has no content to copy to the CPU
            args = (torch.ones(args[0].shape, dtype=args[0].dtype), *args[1:])
        result = func(*args, **kwargs)
        for x in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(x, torch.Tensor) and x.is_meta and x.dtype == torch.float64:
                raise TypeError(f"{func}: the device has no float64")
        return result


@pytest.fixture
def meta():
    with NoFloat64():
        yield torch.device("meta")


@pytest.mark.parametrize("fraction", (1.0, 0.5))
@pytest.mark.parametrize("base", BASES)
def test_a_step_needs_no_float64_of_the_device(meta, digits, base, fraction):
    cm = CMConfig(cm_fraction=fraction, independent_dropout="all")
    objective, batch = a_step(digits, base, dropout=0.1, cm=cm)     # on the CPU, as for MPS
    objective.to(meta)
    batch = tree_map_only(torch.Tensor, lambda values: values.to(meta), batch)
    total, _, D = objective(batch)
    total.backward()
    assert D.is_meta and total.dtype == torch.float32


def test_sampling_needs_no_float64_of_the_device(meta):
    net = tiny_net().to(meta)
    rt = runtime.Runtime(meta, torch.float32)
    y = torch.zeros(2, dtype=torch.int64, device=meta)
    for name in samplers.SAMPLERS:
        sampling = samplers.Sampling(name, steps=2, guidance=1.0)
        x = sample.sample_batch(net, y, [0, 1], (1, 8, 8), rt, sampling)
        assert x.is_meta and x.dtype == torch.float32


@pytest.fixture
def training(digits):
    """One in float16: the loss is multiplied by a scale, and its gradients divided."""
    args = Namespace(seed=0, steps=9, accumulate=1, lr=1e-3, warmup=1, grad_clip=1.0, ema=0.9,
                     out="nowhere", cm=True, div_bound=0.01, lr_decay=False)
    rt = runtime.Runtime(torch.device("cpu"), torch.float16)
    objective, batch = a_step(digits, "oc")
    optimizer = torch.optim.Adam(objective.net.parameters(), lr=args.lr, fused=True)
    record = {"data": digits.record(), "config": {}}
    batches = SimpleNamespace(at=lambda step: (batch.pool.x_0, batch.pool.y))
    return loop.Training(args, rt, objective.net, objective, batches, optimizer, record)


def test_the_loss_is_scaled_and_an_overflow_skips_the_update(training):
    seen = []
    last = training.params["decoder.conv.bias"]         # the others' gradients begin near 0
    last.register_hook(lambda g: seen.append(g.abs().max().item()))
    before = copy.deepcopy(training.params)
    loop.train_step(training, training.objective)
    assert any(not torch.equal(before[n], p) for n, p in training.params.items())
    scaled = seen[-1]
    training.scaler.update(1024.0)
    with torch.no_grad():
        for n, p in training.params.items():
            p.copy_(before[n])
    training.step = 0
    loop.train_step(training, training.objective)
    assert scaled == pytest.approx(64 * seen[-1], rel=0.02)

    before = copy.deepcopy(training.params)
    last.register_hook(lambda g: g * float("inf"))
    loop.train_step(training, training.objective)
    assert all(torch.equal(before[n], p) for n, p in training.params.items())
    assert training.scaler.get_scale() == 512
    means = training.meter.means(training.rt)
    assert means["skipped"] == pytest.approx(1 / 3)
    assert 0 < means["grad_norm"] < 100             # of the two steps that were taken
    training.refuse_divergence(means)


def test_gradients_that_always_overflow_end_the_run(training):
    training.scaler.scale(torch.zeros(()))
    training.refuse_divergence({"skipped": 1.0})    # the scale still falls
    training.scaler.update(0.5)
    with pytest.raises(UserError, match="--lr"):
        training.refuse_divergence({"skipped": 1.0})
    training.refuse_divergence({"skipped": 0.9})


def test_a_float16_run_goes_on_to_the_bit(tmp_path, tiny):
    """Killed and resumed: the weights, and the scale, are those of an uninterrupted run."""
    flags = (*tiny, "--ch", 8, "--batch-size", 4, "--dtype", "float16", "--save-every", 1)
    for name, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        call(train.main, *flags, "--steps", steps, "--out", tmp_path / name)
    a, b = (ckpt_of(tmp_path / name) for name in ("whole", "parts"))
    assert_equal(a["model"], b["model"])
    assert a["scaler"] == b["scaler"] and a["scaler"]["_growth_tracker"] == 4
    assert a["config"]["dtype"] == "float16"


@pytest.fixture
def cuda(monkeypatch):
    """setup() believes that there is a GPU; what it allows is put back."""
    monkeypatch.setattr(runtime, "find_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    yield
    runtime.allow_tf32(False)


def allowed():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_tf32_is_on_for_its_dtype_only(cuda):
    rt = runtime.setup(dtype="tf32")
    assert allowed() == (True, True) and rt.dtype == torch.float32 and rt.dtype_name() == "tf32"
    rt = runtime.setup(dtype="float32")
    assert allowed() == (False, False) and rt.dtype_name() == "float32"
    assert runtime.setup(dtype="auto").dtype_name() == "bfloat16"
    assert runtime.setup(dtype="float16").dtype == torch.float16


def test_features_are_in_float32_whatever_the_dtype(cuda):
    runtime.setup(dtype="tf32")
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x):
            seen.append(allowed())
            return x.flatten(1), x.flatten(1)
    extractor = features.Extractor.__new__(features.Extractor)
    extractor.rt = runtime.Runtime(torch.device("cpu"), torch.float32)
    extractor.channels, extractor.resizes, extractor.net = 3, True, Net()
    extractor.batch(torch.zeros(1, 2, 2, 3, dtype=torch.uint8).numpy())
    assert seen == [(False, False)] and allowed() == (True, True)


def test_dtypes_that_a_device_has_not(monkeypatch):
    with pytest.raises(UserError, match="--dtype"):
        runtime.setup("cpu", dtype="tf32")
    monkeypatch.setattr(runtime, "find_device", lambda name: torch.device("mps"))
    with pytest.raises(UserError, match="--dtype"):
        runtime.setup(dtype="float16")
