"""Measure the speed of training steps and of sampling at the paper's network size.

    python -m probes.bench             # CPU: batch 16, float32 and bfloat16, minutes on two cores
    python -m probes.bench --compile   # also compiled: a GPU's default, with batch 64 and 512
    python -m probes.bench --metrics   # scores.py and torch-fidelity, on the same features
    python -m probes.bench --plan      # what a step needs of a GPU; an estimate of its time

A step is the one that train.py takes: making the batch, forward, backward, clipping, Adam and the
averaged weights. All methods, with each dtype and compilation, take turns, step by step, and the
median counts. So the ratios are fair where a machine's speed changes over time: that of a method to
the first one, and (speed-up) that of a dtype or compilation to float32 without compilation. "Hours
per run" is the time of the paper's 300,000 steps of 64 images at a row's images per second. "0.5"
is --cm-fraction. Images are sampled from DDPM's network and from CM's, merged, in turns as well.
Compiled steps are a little faster in train.py, which skips the checks of each call's guards.

--plan computes nothing and needs no weights: torch's fake tensors have shapes only. It counts the
operations that PyTorch hands to a device one by one, without torch.compile: each is a launch, reads
what it is given and writes what it returns. CUDA's kernels need more: they copy to other layouts,
and make several of a group norm. Attention is counted as plain matrix products, which move more
than CUDA's. Not counted are the drawing of random numbers and what convolutions need beside their
tensors. For one operation the estimate takes the bytes over the bandwidth or the arithmetic over
the peak, whichever is longer; for a step their sum, or its launches' time where that is longer.
"""
import math
import multiprocessing
import resource
import statistics
import time
import weakref
from argparse import BooleanOptionalAction
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import disk
import runtime
import train
from cm_layers import merge
from data import Batches, ImageSet, long_tail_counts
from loop import Training, train_step
from losses import CMConfig, Objective, bind
from metrics import scores
from model import UNetConfig, make_alphas_bar
from networks import build
from runtime import Parser, UserError, integer, number, refuse_unused, run
from sample import guided, prepare

RUN = 300_000 * 64      # images of one of the paper's runs
METHODS = {             # name: (base loss, --cm-fraction, or None without CM)
    "DDPM": ("ddpm", None),
    "OC": ("oc", None),
    "CBDM": ("cbdm", None),
    "CM on DDPM": ("ddpm", 1.0),
    "CM on OC": ("oc", 1.0),
    "CM on DDPM, 0.5": ("ddpm", 0.5),
    "CM on OC, 0.5": ("oc", 0.5),
}
NETWORK = UNetConfig(num_classes=100).to_dict()     # the paper's
H100 = {torch.bfloat16: 989.0, torch.float32: 67.0}     # TFLOP/s of an SXM; float32 without TF32
UPDATE = 13     # numbers read or written per weight: norm 1, clipping 2, Adam 7, average 3
STATE = 4       # numbers kept per weight: itself, Adam's two, its average
UNUSED_BY_PLAN = ("metrics", "compile", "rounds", "device", "seed")
SAMPLED = {"DDPM": None, "CM, merged": 0.1}     # networks that generate: the share reserved


class Cell(NamedTuple):
    """What one row of the table measures."""
    method: str
    dtype: torch.dtype
    compiled: bool


class Step(NamedTuple):
    """A training step of a method."""
    call: Callable          # takes the step
    net: torch.nn.Module
    flops: int              # floating-point operations of its forward and backward pass
    memory: int             # the most bytes that this pass has at once, beyond the weights
    compiled: bool          # False also where it should be compiled, but cannot be


def dtype_name(dtype):
    """The name of a torch.dtype, such as float32."""
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------
# Clocks

def seconds(f, device):
    """Wall time of one call, the device's work included."""
    runtime.synchronize(device)
    start = time.perf_counter()
    f()
    runtime.synchronize(device)
    return time.perf_counter() - start


def matmul_peak(rt, n):
    """Floating-point operations per second of an n x n matrix product in rt.dtype: best of ten."""
    a = torch.randn(n, n, device=rt.device, dtype=rt.dtype)
    b = torch.randn(n, n, device=rt.device, dtype=rt.dtype)
    return 2 * n ** 3 / min(seconds(lambda: a @ b, rt.device) for _ in range(10))


def peak_memory():
    """The most memory that this process has had so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


class TensorMemory(TorchDispatchMode):
    """Within, `peak` becomes the most bytes that tensors made within have at once."""

    def __init__(self):
        super().__init__()
        self.sizes = {}         # of storages that live, 0 of those that were there before
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.see((args, kwargs), made=False)
        result = function(*args, **(kwargs or {}))
        self.see(result, made=True)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result

    def see(self, tensors, made):
        """Note the storages of nested tensors that are new, until they are freed."""
        for t in tree_leaves(tensors):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes() if made else 0
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)


# --------------------------------------------------------------------------------------------------
# Training steps and sampling

def noise_images():
    """Random images in the shapes and class sizes of long-tailed CIFAR-100."""
    rng = np.random.RandomState(0)
    labels = np.repeat(np.arange(100), long_tail_counts([500] * 100, 100))
    pixels = rng.randint(0, 256, (len(labels), 32, 32, 3), np.uint8)
    return ImageSet("noise", pixels, labels, [str(c) for c in range(100)])


def make_network(method, network=NETWORK):
    """An untrained network for a method, with capacity reserved where it is CM's."""
    torch.manual_seed(0)
    return build(network, METHODS[method][1] and 0.1)


def make_objective(method, net, images):
    """The Objective of a method."""
    base, fraction = METHODS[method]
    return Objective(net=net, base=bind(base), counts=images.counts, alphas_bar=make_alphas_bar(),
                     cm=CMConfig(cm_fraction=fraction or 1.0), flip=True)


def make_step(method, images, batch_size, rt, compiled, settings):
    """The Step of a method at the paper's network size, on images of CIFAR-100's shapes.

    settings: what train.resolve returns.
    """
    net = make_network(method)
    net.to(rt.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4, fused=True)
    objective = make_objective(method, net, images).to(rt.device)
    record = {"data": {"class_counts": images.counts, "class_names": images.class_names}}
    settings.batch_size = batch_size
    training = Training(settings, rt, net, objective,
                        Batches(images, batch_size, 0, rt.device), optimizer, record)
    module = objective
    if compiled:
        module, _ = runtime.compile_or_not(objective, lambda m: m(training.batch())[0], rt)
    call = partial(train_step, training, module)

    with FlopCounterMode(display=False) as counter, TensorMemory() as memory, rt.autocast():
        objective(training.batch())[0].backward()
    optimizer.zero_grad(set_to_none=True)
    return Step(call, net, counter.get_total_flops(), memory.peak, module is not objective)


def if_it_fits(words, function, *args):
    """function(*args); None, with a line, where the device's memory is too small for it."""
    try:
        return function(*args)
    except torch.OutOfMemoryError:
        print(f"{words}: out of memory, left out; take a smaller --batch-size or fewer --methods",
              flush=True)
    torch.cuda.empty_cache()        # after the exception, which holds what it could not use


def measure(steps, rounds, device, title):
    """Take turns, step by step: ({cell: its median time}, {cell: its memory in bytes}).

    steps: {cell: Step}. A cell that runs out of memory is left out. The memory is that of the step
    alone, without the weights of all cells, which stay on the device: as CUDA measures it, else
    that of an eager pass.
    """
    times = {cell: [] for cell in steps}
    memory = {cell: step.memory for cell, step in steps.items()}
    for r in runtime.progress(range(rounds + 1), desc=title, unit="round"):
        for cell in list(times):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            t = if_it_fits(words_of(cell), seconds, steps[cell].call, device)
            if t is None:
                del times[cell]
                continue
            if r > 0:                       # the first round warms up
                times[cell].append(t)
            if device.type == "cuda":
                memory[cell] = torch.cuda.max_memory_allocated(device) - before
    return {cell: statistics.median(ts) for cell, ts in times.items()}, memory


@torch.no_grad()
def sampling_costs(batch_size, rounds, rt, compiled):
    """{name: (images per second, bytes)} of DDIM in 50 steps with guidance: DDPM's network, CM's.

    CM's is merged, a plain network: the paper's claim of no cost at inference. The two take turns.
    The bytes are the weights and the most that an eager pass has at once beyond them.
    """
    x = torch.randn(batch_size, 3, 32, 32, device=rt.device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.zeros(batch_size, dtype=torch.int64, device=rt.device)
    calls = {}
    memory = {}
    for name, rank_ratio in SAMPLED.items():
        net = merge(build(NETWORK, rank_ratio))
        net.to(rt.device, memory_format=torch.channels_last).requires_grad_(False)
        fast = prepare(net, rt, x.shape[1:], RUN if compiled else 0, batch_size)
        with TensorMemory() as tensors:
            guided(net, y, 1.5, rt)(x, 500)
        memory[name] = sum(p.nbytes for p in net.parameters()) + tensors.peak
        calls[name] = partial(guided(fast, y, 1.5, rt), x, 500)
    times = {name: [] for name in calls}
    for r in range(rounds + 1):
        for name, call in calls.items():
            t = seconds(call, rt.device)
            if r > 0:                       # the first round warms up
                times[name].append(t)
    return {name: (batch_size / (50 * statistics.median(ts)), memory[name])
            for name, ts in times.items()}


def row_of(cell, first, batch_size, median, step, peak, memory):
    """A row of the table. first: the cell of the first method, in float32, not compiled."""
    t = median[cell]
    of_first_method = median.get(cell._replace(method=first.method), math.nan)
    as_it_is = median.get(first._replace(method=cell.method), math.nan)
    return {"method": cell.method, "dtype": dtype_name(cell.dtype), "compiled": cell.compiled,
            "batch": batch_size, "step_ms": 1e3 * t, "images_per_s": batch_size / t,
            "run_hours": RUN / batch_size * t / 3600, "ratio": t / of_first_method,
            "faster": as_it_is / t, "peak_share": step.flops / t / peak,
            "memory_gib": memory / 2 ** 30}


def bench_training(batch_size, cells, rounds, runtimes, settings):
    """One row per cell that fits: the speed of training. runtimes: {dtype: Runtime}."""
    images = noise_images()
    device = next(iter(runtimes.values())).device
    n = 8192 if device.type == "cuda" else 2048
    peaks = {dtype: matmul_peak(rt, n) for dtype, rt in runtimes.items()}
    steps = {}
    for cell in cells:
        print(f"batch {batch_size}: preparing {words_of(cell)}", flush=True)
        step = if_it_fits(words_of(cell), make_step, cell.method, images, batch_size,
                          runtimes[cell.dtype], cell.compiled, settings)
        # What could not be compiled is not measured twice
        if step and step.compiled == cell.compiled:
            steps[cell] = step
    median, memory = measure(steps, rounds, device, f"batch {batch_size}: measuring")
    return [row_of(cell, cells[0], batch_size, median, steps[cell], peaks[cell.dtype],
                   memory[cell]) for cell in median]


def bench_sampling(batch_size, rounds, runtimes, compiled):
    """One row per dtype and network: what sampling costs. runtimes: {dtype: Runtime}."""
    rows = []
    for dtype, rt in runtimes.items():
        words = f"batch {batch_size}: sampling in {dtype_name(dtype)}"
        print(words, flush=True)
        costs = if_it_fits(words, sampling_costs, batch_size, rounds, rt, compiled) or {}
        for name, (speed, memory) in costs.items():
            rows.append({"network": name, "dtype": dtype_name(dtype), "batch": batch_size,
                         "images_per_s": speed, "ratio": speed / costs["DDPM"][0],
                         "memory_gib": memory / 2 ** 30})
    return rows


def words_of(cell):
    """ "OC, float32, compiled"."""
    return f"{cell.method}, {dtype_name(cell.dtype)}" + (", compiled" if cell.compiled else "")


def print_tables(rows, sampling, first_method):
    """The rows as two Markdown tables: training, and sampling by DDIM-50 with guidance."""
    print("| method | batch | dtype | compiled | ms per step | images/s | hours per run | "
          f"time / {first_method} | speed-up | of matmul peak | GiB |\n"
          "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in rows:
        compiled = "yes" if r["compiled"] else "no"
        print(f"| {r['method']} | {r['batch']} | {r['dtype']} | {compiled} | {r['step_ms']:.1f} | "
              f"{r['images_per_s']:.1f} | {r['run_hours']:.1f} | {r['ratio']:.2f} | "
              f"{r['faster']:.2f} | {r['peak_share']:.0%} | {r['memory_gib']:.2f} |")
    if not sampling:
        return
    print("\n| sampling, DDIM-50 with guidance | batch | dtype | images/s | speed / DDPM's | "
          "GiB, not compiled |\n"
          "| --- | ---: | --- | ---: | ---: | ---: |")
    for s in sampling:
        print(f"| {s['network']} | {s['batch']} | {s['dtype']} | {s['images_per_s']:.2f} | "
              f"{s['ratio']:.2f} | {s['memory_gib']:.2f} |")


# --------------------------------------------------------------------------------------------------
# The plan: counts without a device, and what follows from them

class Operation(NamedTuple):
    """What a device is given to do at once."""
    bytes: int          # read and written
    flops: int


class Device(NamedTuple):
    """What an estimate supposes."""
    bandwidth: float    # bytes per second
    peak: float         # floating-point operations per second
    launch: float       # seconds until the next operation can be handed over


class Plan(NamedTuple):
    """What was counted of a step."""
    operations: list    # of the forward and backward pass
    memory: int         # the most bytes at once, those of the weights and averages included
    update: int         # bytes that clipping, Adam and the averaging move

    def counts(self, batch_size):
        """The numbers of a row that no speed enters."""
        flops = sum(o.flops for o in self.operations)
        moved = sum(o.bytes for o in self.operations) + self.update
        return {"launches": len(self.operations), "gb_moved": moved / 1e9,
                "gflop_per_image": flops / batch_size / 1e9, "memory_gib": self.memory / 2 ** 30}

    def seconds(self, device):
        """The estimate of a step's time on a Device."""
        busy = sum(max(o.bytes / device.bandwidth, o.flops / device.peak) for o in self.operations)
        passes = max(busy, len(self.operations) * device.launch)
        return passes + self.update / device.bandwidth


class Operations(TensorMemory):
    """TensorMemory that also has, in `found`, the Operation of every call that computes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        inputs = tensors_of((args, kwargs))
        if computes(function, inputs, tensors_of(result)):
            moved = sum(map(stored_bytes, inputs + tensors_of(result)))
            count = flop_registry.get(function.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
            self.found.append(Operation(moved, flops))
        return result


class CudaAutocast(TorchFunctionMode):
    """Within, the CPU's autocast also takes to float32 what CUDA's does in the U-Net."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.group_norm, F.interpolate):
            with torch.autocast("cpu", enabled=False):
                return function(args[0].float(), *args[1:], **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def tensors_of(values):
    """The tensors in nested values, a list."""
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def computes(function, inputs, outputs):
    """Whether an aten function writes anything: it is no view, and not only memory."""
    if function.namespace != "aten" or "empty" in function.name():
        return False
    known = {t.untyped_storage()._cdata for t in inputs}
    new = any(t.untyped_storage()._cdata not in known for t in outputs)
    return new or (function._schema.is_mutable and bool(outputs))


def stored_bytes(t):
    """Bytes of a tensor's different elements: what was expanded is there once."""
    return t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride()) if stride)


def plan_step(method, images, batch_size, dtype, network=NETWORK):
    """The Plan of a training step of a method on a batch of these images. Computes nothing."""
    rt = runtime.Runtime(torch.device("cpu"), dtype)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        net = make_network(method, network)
    draw_masks = net.draw_masks

    def draw_fake_masks(*args):
        with fake:
            return draw_masks(*args)
    net.draw_masks = draw_fake_masks        # large; all else is drawn as it is
    objective = make_objective(method, net, images)
    x_0, y = Batches(images, batch_size, 0, rt.device).at(0)
    batch = objective.draw_batch(x_0, y, seed=0, step=0)
    with fake, Operations() as counted, rt.autocast(), CudaAutocast():
        objective(batch)[0].backward()
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    drawn = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_of(batch)}
    return Plan(counted.found, counted.peak + sum(drawn.values()) + STATE * weights,
                UPDATE * weights)


def plan_rows(methods, batch_sizes, dtype, device):
    """One row per batch size and method: counts of a step, and its estimated time on a Device."""
    images = noise_images()
    rows = []
    for batch_size in batch_sizes:
        times = []
        for method in methods:
            print(f"batch {batch_size}: counting {method}", flush=True)
            step = plan_step(method, images, batch_size, dtype)
            times.append(step.seconds(device))
            rows.append({"method": method, "batch": batch_size, **step.counts(batch_size),
                         "step_ms": 1e3 * times[-1], "ratio": times[-1] / times[0],
                         "run_hours": RUN / batch_size * times[-1] / 3600})
    return rows


def print_plan(rows, first_method):
    """The rows of a plan as a Markdown table."""
    columns = ("method", "batch", "launches", "GB moved", "GFLOP per image", "GiB", "ms per step",
               "hours per run", f"time / {first_method}")
    names = [*columns[:2], *(f"{name} (estimate)" for name in columns[2:])]
    print(f"| {' | '.join(names)} |\n| --- |{' ---: |' * (len(names) - 1)}")
    for r in rows:
        print(f"| {r['method']} | {r['batch']} | {r['launches']:,} | {r['gb_moved']:.1f} | "
              f"{r['gflop_per_image']:.1f} | {r['memory_gib']:.1f} | {r['step_ms']:.1f} | "
              f"{r['run_hours']:.1f} | {r['ratio']:.2f} |")


def plan(args, given):
    """What --plan asks for: print the table and write plan.json."""
    refuse_unused(given, {name: "--plan measures nothing" for name in UNUSED_BY_PLAN})
    out = Path(args.out or "out/bench")
    disk.check_writable(out / "plan.json")
    dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
    peak = args.peak or H100[dtype]
    device = Device(args.bandwidth * 1e9, peak * 1e12, args.launch_us * 1e-6)
    rows = plan_rows(args.methods, args.batch_size or [64, 512], dtype, device)
    print(f"\nestimates, nothing measured: {dtype_name(dtype)}, without torch.compile, on a device "
          f"of {args.bandwidth:,g} GB/s and {peak:,g} TFLOP/s, {args.launch_us:g} us per launch; "
          f"torch {torch.__version__}\n")
    print_plan(rows, args.methods[0])
    disk.write_json(out / "plan.json", {
        "estimate": True, "torch": torch.__version__, "dtype": dtype_name(dtype),
        "bandwidth_gb_s": args.bandwidth, "peak_tflop_s": peak, "launch_us": args.launch_us,
        "rows": rows})


# --------------------------------------------------------------------------------------------------
# Metrics, ours and torch-fidelity's

def make_features(n, D):
    """(generated, real) features, float32 (n, D) each; 64 directions matter, as in real ones."""
    rng = np.random.RandomState(0)
    mixing = (rng.standard_normal((64, D)) / 8).astype(np.float32)

    def features(shift):
        return np.maximum(rng.standard_normal((n, 64)).astype(np.float32) @ mixing + shift, 0)
    return features(0.55), features(0.5)


def ours():
    """{metric: a function of generated and real features that returns its numbers}."""
    return {
        "fid": lambda fake, real: [scores.distance_of(fake, real)],
        "kid": lambda fake, real: scores.kernel_distance(fake, real)[:2],
        "is": lambda fake, real: scores.inception_score(fake),
        "prc": scores.precision_recall,
    }


def theirs():
    """The same of torch-fidelity."""
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    def fid(fake, real):
        statistics_of = metric_fid.fid_features_to_statistics
        return metric_fid.fid_statistics_to_metric(statistics_of(fake), statistics_of(real), False)

    def kid(fake, real):
        return metric_kid.kid_features_to_metric(fake, real, verbose=False)

    def inception_score(fake, real):
        return metric_isc.isc_features_to_metric(fake)

    def precision_recall(fake, real):
        return metric_prc.prc_features_to_metric(fake, real, save_cpu_ram=True, verbose=False)

    def numbers(metric):
        def first_two(fake, real):
            return list(metric(torch.from_numpy(fake), torch.from_numpy(real)).values())[:2]
        return first_two
    return {"fid": numbers(fid), "kid": numbers(kid), "is": numbers(inception_score),
            "prc": numbers(precision_recall)}


LIBRARIES = {"ours": ours, "torch-fidelity": theirs}


def measure_in_child(metric, library, n, D, pipe):
    """Send {"seconds", "gib": peak memory beyond that of the features, "values"} of a metric."""
    compute = LIBRARIES[library]()[metric]          # imports the library before the clock starts
    fake, real = make_features(n, D)
    before = peak_memory()
    start = time.perf_counter()
    values = [float(v) for v in compute(fake, real)]
    pipe.send({"seconds": time.perf_counter() - start, "gib": peak_memory() - before,
               "values": values})


def measure_metric(metric, library, n, D):
    """What measure_in_child sends: in a process of its own, whose peak memory is the metric's."""
    receiver, sender = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(
        target=measure_in_child, args=(metric, library, n, D, sender))
    child.start()
    sender.close()              # so that the wait ends where the child fails
    result = receiver.recv()
    child.join()
    return result


def digits_of(values):
    """Numbers with six digits, for the table."""
    return ", ".join(f"{v:.6g}" for v in values)


def bench_metrics(n, D):
    """Print a table: each metric, ours and torch-fidelity's, of n features of D dimensions."""
    if find_spec("torch_fidelity") is None:
        raise UserError("--metrics: torch-fidelity is not installed; "
                        "pip install -r requirements-dev.txt")
    print(f"features {n:,} x {D:,} against as many, {torch.get_num_threads()} threads; peak memory "
          "beyond the features\n\n"
          "| metric | ours | torch-fidelity | speed-up | GiB ours | GiB theirs | values ours | "
          "theirs |\n| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |")
    for metric in ours():
        a, b = (measure_metric(metric, library, n, D) for library in LIBRARIES)
        speed_up = b["seconds"] / a["seconds"]
        print(f"| {metric} | {a['seconds']:.1f} s | {b['seconds']:.1f} s | {speed_up:.1f} | "
              f"{a['gib']:.2f} | {b['gib']:.2f} | {digits_of(a['values'])} | "
              f"{digits_of(b['values'])} |", flush=True)


# --------------------------------------------------------------------------------------------------

def make_parser():
    """All flags."""
    parser = Parser(__doc__)
    parser.add_argument("--metrics", type=integer(1000), nargs="?", const=10_000, metavar="N",
                        help="time the metrics on N features of 2,048 dimensions instead "
                        "(default N: 10,000)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS),
                        metavar="NAME",
                        help=f"of {', '.join(METHODS)}; ratios are to the first (default: all)")
    parser.add_argument("--batch-size", type=integer(1), nargs="+", metavar="B",
                        help="default: 16; on CUDA 64 and 512")
    parser.add_argument("--compile", action=BooleanOptionalAction, default=None,
                        help="also measure compiled (default: on CUDA only)")
    parser.add_argument("--rounds", type=integer(1), default=5,
                        help="timed steps of each method; the median counts (default: 5)")
    g = parser.add_argument_group("plan")
    g.add_argument("--plan", action="store_true",
                   help="without a GPU: count what a step needs of one, and estimate its time")
    g.add_argument("--bandwidth", type=number(above=0), default=3350.0, metavar="GB/S",
                   help="of the device's memory (default: 3350, an H100 SXM)")
    g.add_argument("--peak", type=number(above=0), metavar="TFLOP/S",
                   help="of the device, in --dtype, whose default is then bfloat16 (default: an "
                   "H100 SXM's: 989, in float32 67)")
    g.add_argument("--launch-us", type=number(0), default=5.0, metavar="MICROSECONDS",
                   help="for which the CPU is busy with each operation (default: 5)")
    parser.add_common("folder of bench.json, or plan.json (default: out/bench)")
    return parser


def main():
    """Measure what the flags ask for, print the tables and write bench.json."""
    parser = make_parser()
    args = parser.parse_args()
    if args.plan:
        return plan(args, parser.given)
    refuse_unused(parser.given, dict.fromkeys(("bandwidth", "peak", "launch_us"),
                                              "belongs to --plan"))
    if args.metrics:
        return bench_metrics(args.metrics, 2048)
    out = Path(args.out or "out/bench")
    disk.check_writable(out / "bench.json")

    # What is measured
    if args.dtype in ("tf32", "float16"):
        raise UserError(f"--dtype {args.dtype}: bench.py compares float32 and bfloat16")
    rt = runtime.setup(args.device, args.dtype)
    cuda = rt.device.type == "cuda"
    dtypes = [torch.float32, torch.bfloat16] if args.dtype == "auto" else [rt.dtype]
    compiled = [False, True] if runtime.wants_compile(args, rt) else [False]
    cells = [Cell(method, dtype, c)
             for dtype in dtypes for c in compiled for method in args.methods]
    settings = train.resolve(train.make_parser().parse_args(["--preset", "paper"]))

    # Measure
    torch._dynamo.config.recompile_limit = 64       # all cells share the code of Objective.forward
    runtimes = {dtype: runtime.Runtime(rt.device, dtype) for dtype in dtypes}
    rows = []
    sampling = []
    name = torch.cuda.get_device_name(rt.device) if cuda else (
        f"CPU, {torch.get_num_threads()} threads")
    for batch_size in args.batch_size or ([64, 512] if cuda else [16]):
        rows += bench_training(batch_size, cells, args.rounds, runtimes, settings)
        sampling += bench_sampling(batch_size, args.rounds, runtimes, cuda and compiled[-1])
        # Now, since a larger batch may end the process
        disk.write_json(out / "bench.json", {"device": name, "torch": torch.__version__,
                                             "rows": rows, "sampling": sampling})
        torch._dynamo.reset()
    if not rows:
        raise UserError("--batch-size: nothing fits into the memory; take a smaller one")
    memory = "" if cuda else f"; peak memory of the process {peak_memory():.1f} GiB"
    print(f"{name}, torch {torch.__version__}{memory}\n")
    print_tables(rows, sampling, args.methods[0])


if __name__ == "__main__":
    run(main)
