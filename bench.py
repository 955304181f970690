"""Measure the speed of training steps and of sampling at the paper's network size, on this machine.

    python bench.py                             # CPU: batch 16, float32 and bfloat16, a few minutes on two cores
    python bench.py --compile                   # also compiled; on a GPU this is the default, with batch 64 and 512
    python bench.py --metrics                   # metrics.py beside torch-fidelity's, on the same features

Every method's step is the one that train.py takes: the draw, forward, backward, clip, Adam and the averaged weights.
All cells take turns, step by step, and the median counts, so that a machine whose speed drifts still gives fair ratios:
of a method to the first one, and (speed-up) of a dtype or a compilation to float32 as it is. "Hours a run" is what the
paper's 300,000 steps of 64 images take at a row's images a second.
"""
import math
import multiprocessing
import resource
import statistics
import time
from argparse import BooleanOptionalAction
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import metrics
import runtime
import train
from data import Batches, ImageSet, long_tail_counts
from losses import Objective, draw
from model import UNetConfig, make_alphas_bar
from runtime import Parser, UserError, integer, run
from sample import build_network, guided

RUN = 300_000 * 64       # images of one of the paper's runs
METHODS = {"DDPM": ("ddpm", False), "OC": ("oc", False), "CBDM": ("cbdm", False), "CM on DDPM": ("ddpm", True), "CM on OC": ("oc", True)}


def synchronize(rt):
    """Wait until the device has done all its work."""
    if rt.device.type == "cuda":
        torch.cuda.synchronize(rt.device)


def seconds(f, rt):
    """Wall time of one call, the device's work included."""
    synchronize(rt)
    start = time.perf_counter()
    f()
    synchronize(rt)
    return time.perf_counter() - start


def matmul_peak(rt, n):
    """Floating-point operations a second of an n x n matrix product in rt.dtype: the best of ten."""
    a, b = (torch.randn(n, n, device=rt.device, dtype=rt.dtype) for _ in range(2))
    return 2 * n ** 3 / min(seconds(lambda: a @ b, rt) for _ in range(10))


def make_step(method, images, batch_size, rt, compiled, args):
    """(step(), its network, its floating-point operations, whether it is compiled): one step of a method on CIFAR-100's shapes."""
    base, cm = METHODS[method]
    torch.manual_seed(0)
    net = build_network(UNetConfig(num_classes=100).to_dict(), 0.1 if cm else None)
    net.to(rt.device, memory_format=torch.channels_last)
    params = list(net.parameters())
    ema = [p.detach().clone(memory_format=torch.preserve_format) for p in params]
    optimizer = torch.optim.Adam(params, lr=2e-4, fused=True)
    objective = Objective(net, base, images.counts, make_alphas_bar()).to(rt.device)
    batches, at = Batches(images, batch_size, 0, rt.device), iter(range(10 ** 9))

    def batch():
        step = next(at)
        return draw(*batches.at(step), objective, 0, step, flip=True, dtype=rt.dtype)
    module = runtime.compile_or_not(objective, lambda m: m(batch())[0], rt) if compiled else objective

    def step():
        b = batch()
        with rt.autocast():
            total, _, _ = module(b)
        total.backward()
        train.update(params, ema, optimizer, 0, args)
    with FlopCounterMode(display=False) as counter, rt.autocast():
        objective(batch())[0].backward()
    optimizer.zero_grad(set_to_none=True)
    return step, net, counter.get_total_flops(), module is not objective


def bench(batch_size, cells, rounds, device, args):
    """One row a cell (method, dtype, compiled): speed of training, ratios, share of the matmul peak, memory; sampling."""
    rng = np.random.RandomState(0)
    labels = np.repeat(np.arange(100), long_tail_counts([500] * 100, 100))
    images = ImageSet("noise", rng.randint(0, 256, (len(labels), 32, 32, 3), np.uint8), labels, [str(c) for c in range(100)])
    runtimes = {dtype: runtime.Runtime(device, dtype) for _, dtype, _ in cells}
    peaks = {dtype: matmul_peak(rt, 8192 if device.type == "cuda" else 2048) for dtype, rt in runtimes.items()}
    steps = {}
    for cell in runtime.progress(cells, desc=f"batch {batch_size}: preparing", unit="cell"):
        method, dtype, compiled = cell
        steps[cell] = make_step(method, images, batch_size, runtimes[dtype], compiled, args)
    cells = [cell for cell in cells if steps[cell][3] == cell[2]]          # none where it could not be compiled
    times, memory = {cell: [] for cell in cells}, {}
    for r in runtime.progress(range(rounds + 1), desc=f"batch {batch_size}: measuring", unit="round"):
        for cell in cells:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            t = seconds(steps[cell][0], runtimes[cell[1]])
            if r:                                           # the first round warms up
                times[cell].append(t)
            if device.type == "cuda":                       # of the step alone: the other cells' weights wait beside it
                memory[cell] = torch.cuda.max_memory_allocated(device) - before
    median = {cell: statistics.median(ts) for cell, ts in times.items()}
    rows, sampling = [], []
    for cell in cells:
        method, dtype, compiled = cell
        t = median[cell]
        rows.append({"method": method, "dtype": str(dtype).removeprefix("torch."), "compiled": compiled, "batch": batch_size,
                     "step_ms": 1e3 * t, "images_per_s": batch_size / t, "run_hours": RUN / batch_size * t / 3600,
                     "ratio": t / median.get((cells[0][0], dtype, compiled), math.nan),
                     "faster": median[(method, *cells[0][1:])] / t, "peak_share": steps[cell][2] / t / peaks[dtype],
                     "memory_gib": memory[cell] / 2 ** 30 if memory else None})
    for dtype, rt in runtimes.items():
        net = next(steps[cell][1] for cell in cells if cell[1] == dtype)
        x = torch.randn(batch_size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        predict = guided(net, torch.zeros(batch_size, dtype=torch.int64, device=device), 1.5, rt)
        with torch.no_grad():
            t = statistics.median(seconds(lambda: predict(x, 500), rt) for _ in range(max(3, rounds // 2)))
        sampling.append({"dtype": str(dtype).removeprefix("torch."), "batch": batch_size, "images_per_s": batch_size / (50 * t)})
    return rows, sampling


# ----------------------------------------------------------------------------------------------------------------------
# Metrics, ours and torch-fidelity's

def compute_metric(metric, whose, n, D):
    """One metric of n generated against n real features of D dimensions: the numbers that it gives."""
    rng = np.random.RandomState(0)
    mixing = (rng.standard_normal((64, D)) / 8).astype(np.float32)         # 64 directions matter, as with real features
    fake, real = (np.maximum(rng.standard_normal((n, 64)).astype(np.float32) @ mixing + shift, 0) for shift in (0.55, 0.5))
    yield                                                       # the clock starts when the arrays are there
    if whose == "ours":
        result = {"fid": lambda: [metrics.distance_of(fake, real)], "kid": lambda: metrics.kernel_distance(fake, real)[:2],
                  "is": lambda: metrics.inception_score(fake), "prc": lambda: metrics.precision_recall(fake, real)}[metric]()
    else:
        from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
        a, b = torch.from_numpy(fake), torch.from_numpy(real)
        result = {
            "fid": lambda: metric_fid.fid_statistics_to_metric(*map(metric_fid.fid_features_to_statistics, (a, b)), False),
            "kid": lambda: metric_kid.kid_features_to_metric(a, b, verbose=False),
            "is": lambda: metric_isc.isc_features_to_metric(a),
            "prc": lambda: metric_prc.prc_features_to_metric(a, b, save_cpu_ram=True, verbose=False)}[metric]()
        result = list(result.values())[:2]
    yield list(result)


def measure_in_child(metric, whose, n, D, pipe):
    """Send {"seconds", "gib": peak memory over that of the arrays, "values"} of compute_metric."""
    work = compute_metric(metric, whose, n, D)
    next(work)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    start, before = time.perf_counter(), peak()
    values = next(work)
    pipe.send({"seconds": time.perf_counter() - start, "gib": peak() - before, "values": values})


def bench_metrics(n, D):
    """Print a table: each metric, ours and torch-fidelity's, each in a process of its own."""
    try:
        import torch_fidelity       # noqa: F401, only whether it is there
    except ImportError:
        raise UserError("--metrics: torch-fidelity is not installed; pip install -r requirements-dev.txt")
    print(f"features {n:,} x {D:,} against as many, {torch.get_num_threads()} threads; peak memory beyond the features\n\n"
          "| metric | ours | torch-fidelity | speed-up | GiB ours | GiB theirs | values ours | theirs |\n"
          "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |")
    for metric in ("fid", "kid", "is", "prc"):
        both = {}
        for whose in ("ours", "theirs"):
            mine, theirs = multiprocessing.Pipe()
            child = multiprocessing.get_context("spawn").Process(target=measure_in_child, args=(metric, whose, n, D, theirs))
            child.start()
            theirs.close()              # so that a child that dies ends the wait
            both[whose] = mine.recv()
            child.join()
        a, b = both["ours"], both["theirs"]
        show = lambda r: ", ".join(f"{v:.6g}" for v in r["values"])
        print(f"| {metric} | {a['seconds']:.1f} s | {b['seconds']:.1f} s | {b['seconds'] / a['seconds']:.1f} | {a['gib']:.2f} | "
              f"{b['gib']:.2f} | {show(a)} | {show(b)} |", flush=True)


# ----------------------------------------------------------------------------------------------------------------------

def main():
    """Measure what the flags ask for, print the tables and write bench.json."""
    parser = Parser(__doc__)
    parser.add_argument("--metrics", type=integer(1000), nargs="?", const=10_000, metavar="N", help="time the metrics on N features "
                        "of 2,048 dimensions instead (default N: 10,000)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help="of " + ", ".join(METHODS)
                        + "; ratios are to the first (default: all)")
    parser.add_argument("--batch-size", type=integer(1), nargs="+", metavar="B", help="default: 16; on CUDA 64 and 512")
    parser.add_argument("--compile", action=BooleanOptionalAction, default=None, help="also measure compiled (default: on CUDA only)")
    parser.add_argument("--rounds", type=integer(1), default=5, help="timed steps of each method; the median counts (default: 5)")
    parser.add_common("folder of bench.json (default: out/bench)")
    args = parser.parse_args()
    if args.metrics:
        return bench_metrics(args.metrics, 2048)
    first = runtime.setup(args.device, args.dtype)
    torch._dynamo.config.recompile_limit = 64       # all cells share the code of Objective.forward
    cuda, out = first.device.type == "cuda", Path(args.out or "out/bench")
    dtypes = [torch.float32, torch.bfloat16] if args.dtype == "auto" else [first.dtype]
    knobs = train.resolve(train.make_parser().parse_args([]))
    compiles = (False, True) if (cuda if args.compile is None else args.compile) else (False,)
    rows, sampling = [], []
    for batch_size in args.batch_size or ([64, 512] if cuda else [16]):
        cells = [(method, dtype, compiled) for dtype in dtypes for compiled in compiles for method in args.methods]
        try:
            new = bench(batch_size, cells, args.rounds, first.device, knobs)
        except torch.OutOfMemoryError:
            raise UserError(f"--batch-size {batch_size}: out of memory; take fewer --methods or a smaller batch")
        rows, sampling = rows + new[0], sampling + new[1]
        torch._dynamo.reset()
    name = torch.cuda.get_device_name(first.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    print(f"{name}, torch {torch.__version__}" + ("" if cuda else f"; peak memory of the process {memory:.1f} GiB") + "\n\n"
          f"| method | batch | dtype | compiled | ms a step | images/s | hours a run | time / {args.methods[0]} | speed-up | of matmul peak | GiB |\n"
          "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in rows:
        gib = f"{r['memory_gib']:.1f}" if r["memory_gib"] else ""
        print(f"| {r['method']} | {r['batch']} | {r['dtype']} | {'yes' if r['compiled'] else 'no'} | {r['step_ms']:.1f} | "
              f"{r['images_per_s']:.1f} | {r['run_hours']:.1f} | {r['ratio']:.2f} | {r['faster']:.2f} | {r['peak_share']:.0%} | {gib} |")
    for s in sampling:
        print(f"\nsampling, DDIM-50 with guidance, {s['dtype']}, batch {s['batch']}: {s['images_per_s']:.2f} images/s")
    runtime.write_json(out / "bench.json", {"device": name, "torch": torch.__version__, "rows": rows, "sampling": sampling})


if __name__ == "__main__":
    run(main)
