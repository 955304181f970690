"""Devices and dtypes that this machine does not have: MPS, float16 with a scaled loss, TF32."""
import copy
import os

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, call
from threadpoolctl import threadpool_info, threadpool_limits
from torch.utils._python_dispatch import TorchDispatchMode

import loop
import runtime
import sample
import train
from cm_layers import reserve
from losses import BASES, CMConfig, Objective, bind
from metrics import features
from model import UNet, UNetConfig, extract, make_alphas_bar
from recognition import classify
from runtime import UserError

COUNTS = [40, 9, 3]


def make_objective(base="oc", **cm):
    torch.manual_seed(0)
    net = UNet(UNetConfig(channels=1, num_classes=3, ch=8, ch_mult=(1, 2), num_res_blocks=1))
    reserve(net.decoder)
    return Objective(net=net, base=bind(base), counts=COUNTS, alphas_bar=make_alphas_bar(),
                     cm=CMConfig(**cm))


def a_batch(n=8):
    return torch.randn(n, 1, 8, 8), torch.arange(n) % 3


# --------------------------------------------------------------------------------------------------
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
def meta(monkeypatch):
    monkeypatch.setattr(runtime, "NO_FLOAT64", ("meta",))
    with NoFloat64():
        yield torch.device("meta")


@pytest.mark.parametrize("fraction", (1.0, 0.5))
@pytest.mark.parametrize("base", BASES)
def test_a_step_needs_no_float64_of_the_device(meta, base, fraction):
    objective = make_objective(base, cm_fraction=fraction, independent_dropout=True)
    objective.to(meta)
    assert objective.alphas_bar.device.type == "cpu" and objective.w_con_y.is_meta
    x_0, y = a_batch()
    batch = objective.draw_batch(x_0.to(meta), y.to(meta), seed=0, step=0)
    assert batch.x_0.is_meta and batch.masks.encode[0].is_meta
    total, _, D = objective(batch)
    total.backward()
    assert D.is_meta and total.dtype == torch.float32


def test_sampling_needs_no_float64_of_the_device(meta):
    net = make_objective().net.to(meta)
    rt = runtime.Runtime(meta, torch.float32)
    y = torch.zeros(2, dtype=torch.int64, device=meta)
    for name in sample.SAMPLERS:
        sampling = sample.Sampling(name, steps=2, guidance=1.0)
        x = sample.sample_batch(net, y, [0, 1], (1, 8, 8), rt, sampling)
        assert x.is_meta and x.dtype == torch.float32


def test_such_a_device_gets_the_cpus_numbers(monkeypatch):
    """draw_batch draws on the CPU for it, so that a step is the CPU's."""
    moved = []
    monkeypatch.setattr("losses.place_of_float64", lambda device: moved.append(device) or device)
    x_0, y = a_batch()
    batch = make_objective().draw_batch(x_0, y, seed=0, step=3)
    assert moved == [torch.device("cpu")] and batch.x_0.device.type == "cpu"
    assert runtime.place_of_float64("mps") == torch.device("cpu")
    assert runtime.place_of_float64("cuda:1") == torch.device("cuda:1")


def test_the_schedule_is_rounded_after_the_float64_root():
    alphas_bar = make_alphas_bar()
    t = torch.tensor([0, 999])
    x = torch.zeros(2, 1, 2, 2)
    sigma = extract((1 - alphas_bar).sqrt(), t, x).flatten()
    assert torch.equal(sigma, (1 - alphas_bar).sqrt()[t].float())
    # A schedule in float32 would be off by more than this in sigma_0
    assert ((1 - alphas_bar.float()).sqrt()[0] - sigma[0]).abs() > 5e-7


def test_double():
    x = torch.rand(3)
    assert torch.equal(runtime.double(x), x.double())


# --------------------------------------------------------------------------------------------------
# float16: the loss is multiplied by a scale, and its gradients divided

def a_training(dtype):
    args = train.resolve(train.make_parser().parse_args([*TINY_FLAGS, "--accumulate", "1"]))
    rt = runtime.Runtime(torch.device("cpu"), dtype)
    objective = make_objective()
    params = dict(objective.net.named_parameters())
    optimizer = torch.optim.Adam(params.values(), lr=args.lr, fused=True)
    meter = loop.Meter(COUNTS, ["a", "b", "c"], rt.device)
    training = loop.Training(args, rt, params, optimizer, meter, {}, lambda: {})
    training.start(None)
    return training, objective


def test_the_scale_changes_no_update():
    """Gradients of the scaled loss, divided, clipped and given to Adam: those without a scale."""
    plain, _ = a_training(torch.float32)
    scaled, _ = a_training(torch.float16)
    assert plain.scaler is None and scaled.scaler.get_scale() == 65536
    for training, factor in ((plain, 1), (scaled, 65536)):
        scaler = training.scaler
        if scaler:
            scaler.scale(torch.zeros(()))           # makes its tensors
        for k, p in enumerate(training.params.values()):
            p.grad = torch.full_like(p, factor * 0.01 * (k + 1))
        norm = loop.update(list(training.params.values()), list(training.ema.values()),
                            training.optimizer, 5, training.args, scaler)
        training.norm = norm
    assert scaled.norm == pytest.approx(plain.norm)
    for a, b in zip(plain.params.values(), scaled.params.values()):
        assert torch.allclose(a, b, atol=1e-7)


def test_the_loss_is_scaled_and_an_overflow_skips_the_update():
    training, objective = a_training(torch.float16)
    x_0, y = a_batch()

    def batch(step, k):
        return objective.draw_batch(x_0, y, seed=0, step=step)
    seen = []
    last = training.params["decoder.conv.bias"]         # the others' gradients begin near 0
    last.register_hook(lambda g: seen.append(g.abs().max().item()))
    before = copy.deepcopy(training.params)
    loop.train_step(training, objective, batch)
    assert any(not torch.equal(before[n], p) for n, p in training.params.items())
    scaled = seen[-1]
    training.scaler.update(1024.0)
    with torch.no_grad():
        for n, p in training.params.items():
            p.copy_(before[n])
    training.step = 0
    loop.train_step(training, objective, batch)
    assert scaled == pytest.approx(64 * seen[-1], rel=0.02)

    before = copy.deepcopy(training.params)
    last.register_hook(lambda g: g * float("inf"))
    loop.train_step(training, objective, batch)
    assert all(torch.equal(before[n], p) for n, p in training.params.items())
    assert training.scaler.get_scale() == 512
    means = training.meter.means(training.rt)
    assert means["skipped"] == pytest.approx(1 / 3)
    assert 0 < means["grad_norm"] < 100             # of the two steps that were taken
    training.refuse_overflow(means)


def test_gradients_that_always_overflow_end_the_run():
    training, _ = a_training(torch.float16)
    training.scaler.scale(torch.zeros(()))
    training.refuse_overflow({"skipped": 1.0})      # the scale still falls
    training.scaler.update(0.5)
    with pytest.raises(UserError, match="finite gradients.*lower --lr"):
        training.refuse_overflow({"skipped": 1.0})
    training.refuse_overflow({"skipped": 0.9})


def test_a_float16_run_goes_on_to_the_bit(tmp_path, data_dir):
    """Killed and resumed: the weights, and the scale, are those of an uninterrupted run."""
    flags = (*TINY_FLAGS, "--dtype", "float16", "--data-dir", data_dir, "--save-every", 1)
    call(train.main, *flags, "--steps", 4, "--out", tmp_path / "whole")
    call(train.main, *flags, "--steps", 2, "--out", tmp_path / "parts")
    call(train.main, *flags, "--steps", 4, "--out", tmp_path / "parts")
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)
            for name in ("whole", "parts"))
    assert all(torch.equal(a["model"][n], b["model"][n]) for n in a["model"])
    assert a["scaler"] == b["scaler"] and a["scaler"]["_growth_tracker"] == 4
    assert a["config"]["dtype"] == "float16"


# --------------------------------------------------------------------------------------------------
# TF32

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
    assert allowed() == (True, True) and rt.dtype == torch.float32
    assert (rt.dtype_name(), rt.precision()) == ("tf32", "tf32")
    rt = runtime.setup(dtype="float32")
    assert allowed() == (False, False)
    assert (rt.dtype_name(), rt.precision()) == ("float32", "torch.float32")
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


def test_dtypes_that_a_device_has_not(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--dtype tf32: for CUDA .* take float32"):
        call(train.main, *TINY_FLAGS, "--dtype", "tf32", "--out", tmp_path)
    monkeypatch.setattr(runtime, "find_device", lambda name: torch.device("mps"))
    with pytest.raises(UserError, match="--dtype float16: not for mps; take float32"):
        runtime.setup(dtype="float16")


def test_float16_is_for_what_scales_its_loss(tmp_path, data_dir):
    with pytest.raises(UserError, match="--dtype float16: .* take float32"):
        call(classify.main, "--dataset", "digits", "--data-dir", data_dir, "--dtype", "float16",
             "--out", tmp_path / "c")


# --------------------------------------------------------------------------------------------------
# CUDA graphs

@pytest.mark.parametrize("flags", [[], ["--no-compile"], ["--accumulate", "2"]])
def test_cuda_graphs_are_refused_where_there_are_none(tmp_path, monkeypatch, flags):
    if flags:
        rt = runtime.Runtime(torch.device("cuda"), torch.float32)
        monkeypatch.setattr(train, "resume", lambda args: (None, rt))
    with pytest.raises(UserError, match="--cuda-graphs: .* leave it out"):
        call(train.main, *TINY_FLAGS, "--cuda-graphs", *flags, "--out", tmp_path)


def test_cuda_graphs_are_the_compilers_mode(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda module, mode=None: modes.append(mode) or module)
    training, objective = a_training(torch.float32)
    training.args.compile = True
    x_0, y = a_batch()

    def batch(step, k):
        return objective.draw_batch(x_0, y, seed=0, step=step)
    for graphs in (False, True):
        module, warning = train.compiled(objective, batch, training, graphs)
        assert module is objective and warning is None
    assert modes == [None, "reduce-overhead"]
    train.check_cuda_graphs(training.args, training.rt)     # not asked for: not refused


def test_all_cores_are_for_processes_of_several():
    """Torch's threads and NumPy's: every core within, as before afterwards; alone: unchanged."""
    cores = len(os.sched_getaffinity(0))

    def threads():
        libraries = threadpool_info()
        return {torch.get_num_threads(), *(lib["num_threads"] for lib in libraries)}
    np.ones((2, 2)) @ np.ones((2, 2))           # its library is loaded
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            for world, within in ((1, 1), (2, cores)):
                rt = runtime.Runtime(torch.device("cpu"), torch.float32, world=world)
                with runtime.all_cores(rt):
                    assert threads() == {within}
                assert threads() == {1}
    finally:
        torch.set_num_threads(before)
