"""The training loop: steps, log lines, checkpoints; the same for every script that trains by it.

    training = Training(args, rt, params, optimizer, meter, record, weights)
    training.start(old)
    loop(training, module, batch, start_log(training))
"""
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

import disk
import runtime
from data import class_groups
from runtime import UserError

MAX_BASE = 10.0     # a base loss above this has diverged: predicting zero costs 1
MAX_D = 100.0       # so has a distance between two predictions of noise of variance 1
FRECHET = ("FID", "FD")     # what a Frechet distance is called in Inception's features, in others


# --------------------------------------------------------------------------------------------------
# What is logged

class Meter:
    """Means of what is logged between two log lines. Sums stay on the device: no step waits."""

    def __init__(self, counts, class_names, device):
        self.groups = class_groups(counts) or {name: [c] for c, name in enumerate(class_names)}
        self.group_of = torch.zeros(len(counts), dtype=torch.int64, device=device)
        for g, classes in enumerate(self.groups.values()):
            self.group_of[classes] = g
        self.reset()

    def reset(self):
        """Start anew, after a log line."""
        self.steps = 0
        self.sums = {}
        # Per group: the sum of D, and the number of images, both weighted
        self.D = torch.zeros(2, len(self.groups), device=self.group_of.device)

    @torch.no_grad()
    def add(self, scalars, share=1.0):
        """Add {name: 0-d tensor} of a part of a step, which is this share of it on this rank."""
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, 0) + share * value

    def add_D(self, D, y, scale=None):
        """Add per-image distances D (B,) with their classes y (B,) and weights, None for 1."""
        scale = torch.ones_like(D) if scale is None else scale
        self.D.index_add_(1, self.group_of[y], torch.stack([scale * D, scale]))

    def means(self, rt):
        """{name: mean over steps and ranks}, D as "D_<group>" where a group had images."""
        sums = torch.stack([*self.sums.values()]) / self.steps / rt.world
        flat = torch.cat([sums, self.D.flatten()])
        if rt.world > 1:
            torch.distributed.all_reduce(flat)
        flat = flat.tolist()
        means = dict(zip(self.sums, flat))
        G = len(self.groups)
        for name, total, images in zip(self.groups, flat[-2 * G:-G], flat[-G:]):
            if images:
                means[f"D_{name}"] = total / images
        if means.get("skipped", 1) < 1:         # the norm's mean is of the steps that were taken
            means["grad_norm"] /= 1 - means["skipped"]
        return means

    def state(self):
        """What a checkpoint keeps, so that a resumed run logs the same numbers."""
        return {"steps": self.steps, "sums": self.sums, "D": self.D}

    def restore(self, state):
        """Take over what `state` returned."""
        self.steps = state["steps"]
        self.D = state["D"].to(self.D.device)
        self.sums = {name: value.to(self.D.device) for name, value in state["sums"].items()}


def check(means, step, args):
    """Raise UserError where a logged mean is not finite or too large, before anything is saved."""
    limits = {"base": MAX_BASE, **{k: MAX_D for k in means if k.startswith("D_")}}
    for name, value in means.items():
        if not abs(value) <= limits.get(name, float("inf")):        # also true of NaN
            raise diverged(name, value, step, args)


def diverged(name, value, step, args):
    """The UserError of a run that has diverged at a step, seen by one logged number."""
    fix = "lower --lr"
    if args.cm and not args.div_bound:
        fix = "bound the divergence with --div-bound 0.01"
    kept = ""
    if (Path(args.out) / "ckpt.pt").exists():
        kept = f"; the last good checkpoint is kept in {args.out}"
    return UserError(f"stopped at step {step}: {name} is {value:.4g}, the run has diverged; "
                     f"{fix}{kept}")


def format_line(step, args, means, groups, lr, speed, seconds_left):
    """One aligned log line, with D of each group, or "-" where it had no image."""
    width = len(str(args.steps))
    words = [f"step {step:>{width}}/{args.steps}  "]
    words += [f"{k} {v:<8.4f} " for k, v in means.items()
              if not k.startswith("D_") and k != "grad_norm"]
    if args.cm and args.lam:
        D = [f"{means[f'D_{name}']:.1e}" if f"D_{name}" in means else "-" for name in groups]
        words.append(f"D {'/'.join(D)}  ")
    words.append(f"|g| {means['grad_norm']:<7.3f} lr {lr:.1e}  {speed:>6.0f} img/s  "
                 f"ETA {timedelta(seconds=round(seconds_left))}")
    return "".join(words)


def tag_of(name):
    """Where TensorBoard shows a logged number: "D/Few" of D_Few, "FD/all" of FD, "loss/base"."""
    kind, _, group = name.partition("_")
    if kind in ("D", *FRECHET):
        return f"{kind}/{group or 'all'}"
    kinds = {"lr": "optimisation", "grad_norm": "optimisation", "images_per_s": "speed"}
    return f"{kinds.get(name, 'loss')}/{name}"


def has_record(path, step, name):
    """Whether a log.jsonl has a record of a step with an entry `name`; broken lines have none."""
    lines = path.read_text(errors="replace").splitlines(True) if path.is_file() else []
    records = [json.loads(line) for line in lines if Log.is_whole(line, step)]
    return any(r["step"] == step and name in r for r in records)


class Log:
    """log.jsonl and TensorBoard; on resuming, what was logged after the checkpoint is dropped."""

    def __init__(self, out, step):
        self.path = Path(out) / "log.jsonl"
        disk.check_writable(self.path)
        with disk.writing(self.path):
            if self.path.exists():
                lines = self.path.read_text(errors="replace").splitlines(True)
                kept = [line for line in lines if self.is_whole(line, step)]
                disk.write_text(self.path, "".join(kept))
            self.board = SummaryWriter(out, purge_step=step + 1)

    @staticmethod
    def is_whole(line, step):
        """Whether a line is a complete record of a step up to `step`."""
        try:
            return line.endswith("\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False

    def write(self, step, record):
        """Append one record to both."""
        with disk.writing(self.path):
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **record}) + "\n")
            for name, value in record.items():
                # Without a second pass D is 0, and no curve
                if name != "eval_num" and (value or not name.startswith("D_")):
                    self.board.add_scalar(tag_of(name), value, step)
            self.board.flush()

    def has(self, step, name):
        """Whether a record of a step has an entry `name`."""
        return has_record(self.path, step, name)

    def settings(self, config, step):
        """Show the settings of the run in TensorBoard, as a table."""
        rows = [f"| {key} | {value} |" for key, value in config.items()]
        self.board.add_text("settings", "\n".join(["| setting | value |", "| --- | --- |", *rows]),
                            step)

    def warn(self, step, words):
        """Append a warning to both."""
        with disk.writing(self.path):
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, "warning": words}) + "\n")
            self.board.add_text("warning", words, step)

    def picture(self, picture, step):
        """Show a PIL image in TensorBoard."""
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(picture.height, picture.width, 3)
        self.board.add_image("samples", pixels, step, dataformats="HWC")


# --------------------------------------------------------------------------------------------------
# The loop

@dataclass
class Training:
    """A run in progress: what its loop changes, and what its checkpoints keep.

    params, ema: the trained parameters and their averages, {name: tensor}. record: what a
    checkpoint holds besides, the same at every step. weights(): the tensors of the network, as the
    script that trains it stores them.
    """
    args: object
    rt: runtime.Runtime
    params: dict
    optimizer: torch.optim.Optimizer
    meter: Meter
    record: dict
    weights: callable
    step: int = 0
    ema: dict = field(default_factory=dict)
    scaler: torch.amp.GradScaler | None = None      # for float16

    def __post_init__(self):
        if self.rt.dtype == torch.float16:
            self.scaler = torch.amp.GradScaler(self.rt.device.type)

    def start(self, old):
        """Go on from a checkpoint, or from the initial weights where `old` is None."""
        for name, p in self.params.items():
            source = old["ema"][name].to(self.rt.device) if old else p.detach()
            self.ema[name] = source.clone(memory_format=torch.preserve_format)
        if old:
            self.step = old["step"]
            self.optimizer.load_state_dict(old["optimizer"])
            if self.scaler:
                self.scaler.load_state_dict(old["scaler"])
            self.meter.restore(old["window"])

    def refuse_overflow(self, means):
        """Raise UserError where every step's gradients overflowed, also those of a loss below 1."""
        if means.get("skipped") == 1 and self.scaler.get_scale() < 1:
            raise diverged("the share of steps without finite gradients", 1, self.step, self.args)

    def state(self):
        """What ckpt.pt keeps, plain types and tensors."""
        scaler = {"scaler": self.scaler.state_dict()} if self.scaler else {}
        return {**self.record, "step": self.step, **self.weights(), **scaler,
                "optimizer": self.optimizer.state_dict(), "window": self.meter.state()}


def learning_rate(step, args):
    """Linear warm-up from lr / warmup at step 0, then constant."""
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup))


def update(params, ema, optimizer, step, args, scaler=None):
    """All that follows backward at step `step`: clip, Adam, averaged weights.

    params, ema: lists of tensors. scaler: the GradScaler by which the loss was multiplied, or None;
    Adam is skipped where its gradients are not finite. Returns the gradient norm before clipping,
    0-d.
    """
    if scaler:
        scaler.unscale_(optimizer)
    norm = clip_grad_norm_(params, args.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    decay = min(args.ema, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)(ema, params, None)
    return norm


def train_step(training, module, batch, stops=lambda: False, bar=None):
    """One step: forward and backward in args.accumulate passes, then the update.

    module: the Objective, perhaps compiled and distributed. batch(step, k): pass k's Batch.
    stops(): asked before every pass but the first; where it is true, the step is given up as if it
    had not begun. bar: a progress bar, in images. Returns whether the step was taken.
    """
    args = training.args
    meter = training.meter
    scaler = training.scaler
    logged = []
    for k in range(args.accumulate):
        if k and stops():
            training.optimizer.zero_grad(set_to_none=True)
            return False
        b = batch(training.step, k)
        last = k == args.accumulate - 1
        # Processes exchange gradients in the last pass only
        waits = training.rt.world > 1 and not last
        with module.no_sync() if waits else nullcontext():
            with training.rt.autocast():
                total, terms, D = module(b)
            total = total / args.accumulate
            (scaler.scale(total) if scaler else total).backward()
        logged.append(({name: value.detach() for name, value in terms.items()}, D,
                       b.y[:len(D)], b.scale))
        if bar is not None:
            bar.update(args.batch_size / args.accumulate)
    for terms, D, y, scale in logged:
        meter.add(terms, 1 / args.accumulate)
        meter.add_D(D, y, scale)
    params, ema = list(training.params.values()), list(training.ema.values())
    norm = update(params, ema, training.optimizer, training.step, args, scaler)
    if scaler:
        skipped = ~norm.isfinite()
        meter.add({"skipped": skipped.float()})
        norm = norm.masked_fill(skipped, 0)
    meter.add({"grad_norm": norm})
    meter.steps += 1
    training.step += 1
    return True


def check_weights(training, module, batch):
    """Raise UserError where the weights of this step no longer predict, before they are saved.

    The logged losses are those before the update: the next batch says what the update did.
    """
    args = training.args
    module = getattr(module, "module", module)              # of DistributedDataParallel
    objective = getattr(module, "_orig_mod", module)        # of torch.compile
    with torch.no_grad(), training.rt.autocast():
        _, terms, _ = objective(batch(training.step, 0))
    base = terms["base"].item()
    if training.rt.maximum(int(not abs(base) <= MAX_BASE)):
        raise diverged("base", base, training.step, args)


def loop(training, module, batch, log, after_step=None):
    """Train to args.steps, logging and saving; where a signal comes, save and leave the process.

    module, batch: see train_step. log: a Log, on rank 0, else None. after_step(): called on every
    rank after every step. Leaves with exit code 128 + the signal, after the pass in which it came.
    """
    args, rt = training.args, training.rt
    path = Path(args.out) / "ckpt.pt"
    stop = runtime.StopSignal()
    reporter = Reporter(training, log)
    signal = 0
    bar = runtime.progress(
        total=args.steps * args.batch_size, initial=training.step * args.batch_size, unit="img",
        leave=False, disable=rt.rank > 0 or not sys.stderr.isatty())
    first = training.step
    while training.step < args.steps and not signal:
        with runtime.without_guards(module, training.step > first):
            whole = train_step(training, module, batch, lambda: rt.maximum(stop.number), bar)
        step = training.step
        if agrees(step, args, rt) or not whole:
            signal = rt.maximum(stop.number)
        logs = whole and (step % args.log_every == 0 or step == args.steps)
        saves = step % args.save_every == 0 or step == args.steps or signal
        if (logs or saves) and training.meter.steps:
            means = training.meter.means(rt)
            check(means, step, args)
            training.refuse_overflow(means)
        if logs:
            reporter.report(means)
        reporter.estimate()
        if saves:
            check_weights(training, module, batch)
        if rt.rank == 0 and saves:
            disk.save(path, training.state())
        if after_step and whole:
            start = time.time()
            after_step()
            reporter.clock += time.time() - start       # grids and distances are no training
    bar.close()
    if log:
        log.board.close()
    if signal:
        rt.print(f"stopped by signal {signal} at step {training.step}; saved {path}; the same "
                 "command goes on from there")
        sys.exit(128 + signal)
    rt.print(f"finished: {path}")


def agrees(step, args, rt):
    """Whether the ranks exchange after this step which signals came: on GPUs every ten steps.

    In an exchange the device may have nothing to do. Steps of several passes, and those of CPUs,
    are long, and a stopped run has 30 seconds.
    """
    often = rt.device.type != "cuda" or rt.world == 1 or args.accumulate > 1
    return often or step % 10 == 0


class Reporter:
    """Writes log lines, with the speed since the last one, and a warning where D is too large."""

    def __init__(self, training, log):
        self.training = training
        self.log = log
        self.warned = False
        self.first = training.step
        self.start_clock()

    def start_clock(self):
        """The speed counts from here."""
        self.clock = time.time()
        self.clock_step = self.training.step

    def estimate(self):
        """Say once how long the run will take, after three steps, of which the first warms up."""
        rt = self.training.rt
        done = self.training.step - self.first
        if done not in (1, 3) or self.clock_step > self.first:      # a log line said it
            return
        runtime.synchronize(rt.device)
        if done == 1:
            self.warm = time.time()
            return
        seconds = (time.time() - self.warm) / 2
        left = self.training.args.steps - self.training.step
        rt.print(f"{seconds:.2g} s a step: about {runtime.duration(seconds * left)} for the other "
                 f"{left:,} steps; the log lines say it better later")

    def report(self, means):
        """One line on the terminal, in log.jsonl and in TensorBoard; the meter starts anew."""
        args = self.training.args
        rt = self.training.rt
        step = self.training.step
        too_large = any(v > 1 for k, v in means.items() if k.startswith("D_"))
        if too_large and not self.warned:
            rt.print("warning: the two predictions differ by more than the noise itself (D > 1): "
                     "the divergence term grows without bound")
            self.warned = True
        seconds = max(time.time() - self.clock, 1e-9)
        speed = (step - self.clock_step) * args.batch_size / seconds
        seconds_left = (args.steps - step) * args.batch_size / speed
        lr = learning_rate(step - 1, args)
        groups = self.training.meter.groups
        rt.print(format_line(step, args, means, groups, lr, speed, seconds_left))
        if self.log:
            self.log.write(step, {**means, "lr": lr, "images_per_s": round(speed, 1)})
        self.training.meter.reset()
        self.start_clock()


def refuse_others_files(out):
    """Raise UserError where config.json or log.jsonl in a run's folder are no run's."""
    config = disk.read_json(out / "config.json")
    if (out / "config.json").exists() and not (isinstance(config, dict) and "config" in config):
        raise UserError(f"--out {out}: its config.json is not a run's; choose another folder, or "
                        "move it")
    log = out / "log.jsonl"
    lines = log.read_text(errors="replace").splitlines(True) if log.is_file() else []
    if len(lines) > 1 and not any(Log.is_whole(line, math.inf) for line in lines):
        raise UserError(f"--out {out}: its log.jsonl is not a run's; choose another folder, or "
                        "move it")


def start_log(training):
    """Write config.json and open the log, on rank 0; None elsewhere."""
    if training.rt.rank > 0:
        return None
    out = Path(training.args.out)
    refuse_others_files(out)
    config = {**training.record, "torch": torch.__version__}
    disk.write_json(out / "config.json", config)
    log = Log(out, training.step)
    log.settings(training.record["config"], training.step)
    return log
