"""Measure the speed of training steps and of sampling at the paper's network size.

    python -m probes.bench             # CPU: batch 16, float32 and bfloat16, minutes on two cores
    python -m probes.bench --compile   # also compiled: a GPU's default, with batch 64 and 512

A step is the one that train.py takes: making the batch, forward, backward, clipping, Adam and the
averaged weights. All methods, with each dtype and compilation, take turns, step by step, and the
median counts. So the ratios are fair where a machine's speed changes over time: that of a method to
the first one, and (speed-up) that of a dtype or compilation to float32 without compilation. "Hours
per run" is the time of the paper's 300,000 steps of 64 images at a row's images per second. "0.5"
is --cm-fraction. Images are sampled from DDPM's network and from CM's, merged, in turns as well.
"""
import math
import statistics
import time
from argparse import BooleanOptionalAction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import disk
import runtime
import train
from cm_layers import merge
from data import Batches, ImageSet, long_tail_counts
from loop import Training, train_step
from losses import CMConfig, Objective, bind
from model import UNetConfig, make_alphas_bar
from networks import build
from runtime import Parser, UserError, integer, run
from sample import guided, make_fast

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
NETWORK = vars(UNetConfig(num_classes=100))     # the paper's


class Cell(NamedTuple):
    """What one row of the table measures."""
    method: str
    dtype: str              # float32 or bfloat16
    compiled: bool

    def __str__(self):
        return f"{self.method}, {self.dtype}" + (", compiled" if self.compiled else "")


# --------------------------------------------------------------------------------------------------
# How it is measured

def measured(f, device):
    """(seconds of one call, the device's work included; GiB that it needed of CUDA, else None)."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    f()
    if on_cuda:
        torch.cuda.synchronize(device)
    t = time.perf_counter() - start
    return t, (torch.cuda.max_memory_allocated(device) - before) / 2 ** 30 if on_cuda else None


def take_turns(calls, rounds, device, title):
    """Call all in turns: {name: (median time, GiB of a call)}, of what fits into the memory.

    calls: {name: function without arguments}.
    """
    found = {name: [] for name in calls}
    for r in runtime.progress(range(rounds + 1), desc=title, unit="round"):
        for name in list(found):
            pair = unless_out_of_memory(name, measured, calls[name], device)
            if pair is None:
                del found[name]
            elif r > 0:                     # the first round warms up
                found[name].append(pair)
    return {name: (statistics.median(t for t, _ in pairs), pairs[-1][1])
            for name, pairs in found.items()}


def unless_out_of_memory(words, function, *args):
    """function(*args); None, with a line, where the device's memory is too small for it."""
    try:
        return function(*args)
    except torch.OutOfMemoryError:
        print(f"{words}: out of memory, left out; take a smaller --batch-size or fewer --methods",
              flush=True)
    torch.cuda.empty_cache()        # after the exception, which holds what it could not use


# --------------------------------------------------------------------------------------------------
# What is measured

def make_step(cell, images, batch_size, rt, settings):
    """A function that takes a training step; None where the cell is compiled, but cannot be.

    images: of CIFAR-100's shapes. settings: what train.resolve returns.
    """
    base, fraction = METHODS[cell.method]
    torch.manual_seed(0)
    net = build(NETWORK, fraction and 0.1)
    net.to(rt.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4, fused=True)
    objective = Objective(net=net, base=bind(base), counts=images.counts,
                          alphas_bar=make_alphas_bar(), flip=True,
                          cm=CMConfig(cm_fraction=fraction or 1.0)).to(rt.device)
    record = {"data": {"class_counts": images.counts, "class_names": images.class_names}}
    settings.batch_size = batch_size
    training = Training(settings, rt, net, objective,
                        Batches(images, batch_size, 0, rt.device), optimizer, record)
    if not cell.compiled:
        return partial(train_step, training, objective)
    module, warning = runtime.compile_or_not(objective, lambda m: m(training.batch())[0], rt)
    return None if warning else partial(train_step, training, module)


def bench_training(batch_size, cells, rounds, runtimes, settings):
    """One row per cell that fits into the memory. runtimes: {name of a dtype: Runtime}."""
    # Random images in the shapes and class sizes of long-tailed CIFAR-100
    labels = np.repeat(np.arange(100), long_tail_counts([500] * 100, 100))
    pixels = np.random.RandomState(0).randint(0, 256, (len(labels), 32, 32, 3), np.uint8)
    images = ImageSet("noise", pixels, labels, [str(c) for c in range(100)])
    steps = {}
    for cell in cells:
        print(f"batch {batch_size}: preparing {cell}", flush=True)
        rt = runtimes[cell.dtype]
        if step := unless_out_of_memory(cell, make_step, cell, images, batch_size, rt, settings):
            steps[cell] = step
    found = take_turns(steps, rounds, rt.device, f"batch {batch_size}: measuring")

    def time_of(cell):
        return found.get(cell, (math.nan, None))[0]
    first = cells[0]        # of the first method, in float32 if it is measured, not compiled
    return [{"method": cell.method, "dtype": cell.dtype, "compiled": cell.compiled,
             "batch": batch_size, "step_ms": 1e3 * t, "images_per_s": batch_size / t,
             "run_hours": RUN / batch_size * t / 3600,
             "ratio": t / time_of(cell._replace(method=first.method)),
             "faster": time_of(first._replace(method=cell.method)) / t,
             "memory_gib": memory} for cell, (t, memory) in found.items()]


@torch.no_grad()
def bench_sampling(batch_size, rounds, rt, compiled):
    """One row per network: DDIM in 50 steps with guidance, by DDPM's network and CM's, in turns.

    CM's is merged, a plain network: the paper's claim of no cost at inference.
    """
    x = torch.randn(batch_size, 3, 32, 32, device=rt.device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.zeros(batch_size, dtype=torch.int64, device=rt.device)
    calls = {}
    for name, rank_ratio in (("DDPM", None), ("CM, merged", 0.1)):
        net = merge(build(NETWORK, rank_ratio))
        net.to(rt.device, memory_format=torch.channels_last).requires_grad_(False)
        net = make_fast(net, rt, x.shape[1:], RUN if compiled else 0, batch_size)
        calls[name] = partial(guided(net, y, 1.5, rt), x, 500)
    found = take_turns(calls, rounds, rt.device, f"batch {batch_size}: sampling")
    return [{"network": name, "dtype": rt.dtype_name(), "batch": batch_size,
             "images_per_s": batch_size / (50 * t), "ratio": found["DDPM"][0] / t,
             "memory_gib": memory} for name, (t, memory) in found.items()]


# --------------------------------------------------------------------------------------------------

def print_tables(rows, sampling, first_method):
    """The rows as two Markdown tables: training, and sampling by DDIM-50 with guidance."""
    def gib(row):
        return "-" if row["memory_gib"] is None else f"{row['memory_gib']:.2f}"
    print("| method | batch | dtype | compiled | ms per step | images/s | hours per run | "
          f"time / {first_method} | speed-up | GiB (CUDA) |\n"
          "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in rows:
        print(f"| {r['method']} | {r['batch']} | {r['dtype']} | {'yes' if r['compiled'] else 'no'} "
              f"| {r['step_ms']:.1f} | {r['images_per_s']:.1f} | {r['run_hours']:.1f} | "
              f"{r['ratio']:.2f} | {r['faster']:.2f} | {gib(r)} |")
    print("\n| sampling, DDIM-50 with guidance | batch | dtype | images/s | speed / DDPM's | "
          "GiB (CUDA) |\n"
          "| --- | ---: | --- | ---: | ---: | ---: |")
    for s in sampling:
        print(f"| {s['network']} | {s['batch']} | {s['dtype']} | {s['images_per_s']:.2f} | "
              f"{s['ratio']:.2f} | {gib(s)} |")


def make_parser():
    """All flags."""
    parser = Parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS),
                        metavar="NAME",
                        help=f"of {', '.join(METHODS)}; ratios are to the first (default: all)")
    parser.add_argument("--batch-size", type=integer(1), nargs="+", metavar="B",
                        help="default: 16; on CUDA 64 and 512")
    parser.add_argument("--compile", action=BooleanOptionalAction, default=None,
                        help="also measure compiled (default: on CUDA only)")
    parser.add_argument("--rounds", type=integer(1), default=5,
                        help="timed steps of each method; the median counts (default: 5)")
    parser.add_common("folder of bench.json (default: out/bench)")
    return parser


def main():
    """Measure what the flags ask for, print the tables and write bench.json."""
    args = make_parser().parse_args()
    dtypes = ["float32", "bfloat16"] if args.dtype == "auto" else [args.dtype]
    runtimes = {name: runtime.setup(args.device, name) for name in dtypes}
    rt = runtimes[dtypes[0]]
    on_cuda = rt.device.type == "cuda"
    compiled = [False, True] if runtime.wants_compile(args, rt) else [False]
    cells = [Cell(method, dtype, c)
             for dtype in dtypes for c in compiled for method in args.methods]
    settings = train.resolve(train.make_parser().parse_args(["--preset", "paper"]))
    torch._dynamo.config.recompile_limit = 64       # all cells share the code of Objective.forward
    name = torch.cuda.get_device_name(rt.device) if on_cuda else (
        f"CPU, {torch.get_num_threads()} threads")
    rows, sampling = [], []
    for batch_size in args.batch_size or ([64, 512] if on_cuda else [16]):
        rows += bench_training(batch_size, cells, args.rounds, runtimes, settings)
        for dtype in dtypes:
            sampling += unless_out_of_memory(
                f"sampling, {dtype}", bench_sampling, batch_size, args.rounds, runtimes[dtype],
                on_cuda and compiled[-1]) or []
        # Now, since a larger batch may end the process
        disk.write_json(Path(args.out or "out/bench") / "bench.json", {
            "device": name, "torch": torch.__version__, "rows": rows, "sampling": sampling})
        torch._dynamo.reset()
    if not rows:
        raise UserError("--batch-size: nothing fits into the memory; take a smaller one")
    print(f"{name}, torch {torch.__version__}\n")
    print_tables(rows, sampling, args.methods[0])


if __name__ == "__main__":
    run(main)
