"""The training loop: steps, log lines, checkpoints; the same for every script that trains by it.

    old, rt = resume(args, ["diffusion"])           # the run in --out that goes on, or None
    training = Training(args, rt, net, objective, batches, optimizer, record, old)
    loop(training, samples)

A step is the backward pass of objective(batch)[0], and an update:

    batches.at(step)      what is known of a step's global batch, such as its images and labels
    objective.draw_batch(*batches.at(step), seed=, step=, part=, parts=)
                          one part of it, with all that is random: a pure function of its arguments.
                          Its `y` are the true classes; `cm_weight` is that of losses.Batch
    objective(batch)      (total, a scalar; {name: scalar to log}; D per image, zeros without CM)
"""
import json
import math
import os
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import InitVar, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

import disk
import runtime
from data import class_groups, load_long_tailed
from runtime import UserError, flag_of, integer, number
from sample import grid_image, ten_classes

MAX_D = 100.0               # a distance of two predictions of noise of variance 1: it has diverged
FRECHET = ("FID", "FD")     # what a Frechet distance is called in Inception's features, in others
RESUMABLE = {               # settings that may change when a run goes on
    "steps", "save_every", "keep_every", "sample_every", "log_every", "compile", "data_dir",
    "pack_dir", "accumulate", "recompute", "eval_every", "eval_num", "features"}
NEXT = {                    # what most people run after a training, by its kind
    **dict.fromkeys(("diffusion", "consistency", "latent diffusion"), "sample.py --ckpt {ckpt}"),
    "latent": "-m latent.stable_diffusion sample --ckpt {ckpt}",
    "text": "-m latent.text_to_image sample --ckpt {ckpt}",
    "autoencoder": "train.py --dataset {dataset} --data-dir {data_dir} --latents {ckpt}"}


# --------------------------------------------------------------------------------------------------
# Flags, and runs that go on

def add_step_flags(group, **defaults):
    """--batch-size --accumulate --lr --warmup --grad-clip --ema --label-drop --compile.

    defaults: of --lr, --warmup and --ema, by their names; one that is left out has none.
    """
    defaults = {"batch_size": 64, "accumulate": 1, "grad_clip": 1.0, "label_drop": 0.1, **defaults}
    runtime.add_with_defaults(group, defaults, {
        "batch_size": (integer(1), "images per step, over all processes"),
        "accumulate": (integer(1), "passes per step over parts of the batch: less memory"),
        "lr": (number(above=0), "learning rate after the warm-up"),
        "warmup": (integer(0), "steps in which it rises linearly"),
        "grad_clip": (number(above=0), "largest gradient norm"),
        "ema": (number(0, 1), "decay of the averaged weights, less in the first steps"),
        "label_drop": (number(0, 1), "probability that a label, or text, is Null")})
    group.add_argument("--lr-decay", action="store_true",
                       help="the learning rate falls to 0 at --steps, by half a cosine")
    runtime.add_compile_flag(group)


def add_write_flags(parser, **defaults):
    """--save-every --keep-every --sample-every --log-every; defaults: as in add_step_flags."""
    group = parser.add_argument_group("output")
    runtime.add_with_defaults(group, defaults, {
        "save_every": (integer(1), "steps between writes of ckpt.pt"),
        "keep_every": (integer(1), "steps between ckpt-STEP.pt, which are kept"),
        "sample_every": (integer(0), "steps between grids of samples; 0: none"),
        "log_every": (integer(1), "steps between log lines")})
    return group


def config_of(args):
    """The settings that a checkpoint keeps: {name: value}."""
    config = {k: v for k, v in vars(args).items() if k not in ("device", "out")}
    return {**config, "plugin": list(runtime.Plugins.found)}


def resume(args, kinds, resumable=()):
    """(the checkpoint in args.out or None, the Runtime); its settings must be this command's.

    kinds: see disk.load. resumable: settings that may change, beside RESUMABLE. args.dtype becomes
    what "auto" came to, so that the run keeps it on any device. Raises UserError.
    """
    path = Path(args.out) / "ckpt.pt"
    # A link that leads nowhere is a run on a disk that is not there, not a new one
    old = disk.load(path, kinds, "--out") if os.path.lexists(path) else None
    keeps_dtype = old is not None and args.dtype == "auto"
    rt = runtime.setup(args.device, old["config"]["dtype"] if keeps_dtype else args.dtype)
    args.dtype = rt.dtype_name()
    step = old["step"] if old else 0
    if rt.maximum(step) != -rt.maximum(-step):
        raise UserError(f"--out {args.out}: the processes find different checkpoints there; all "
                        "nodes must share this folder")
    if args.batch_size % (rt.world * args.accumulate):
        raise UserError(f"--batch-size {args.batch_size}: must be a multiple of {rt.world} "
                        f"processes times --accumulate {args.accumulate}")
    if getattr(args, "base", None) == "consistency" and args.ct_double is None:
        args.ct_double = old["config"]["ct_double"] if old else max(1, args.steps // 4)
    may_change = RESUMABLE | {*resumable}
    if args.lr_decay:           # what each step was depends on their number
        may_change -= {"steps", "epochs"}
    for key, value in config_of(args).items() if old else ():
        was = old["config"].get(key)
        was_off = key not in old["config"] and not value        # of a flag that is newer
        if key in may_change or was_off or was == value:
            continue
        if key.endswith("_sha256"):             # of the file that another setting names
            key = key.removesuffix("_sha256")
            was, value = "another file of this name", getattr(args, key)
        raise UserError(f"{flag_of(key)} {value}: the run in {args.out} was started with {was}; "
                        "repeat that, or choose another folder (--out; run_all.sh: ROOT)")
    return old, rt


def load_images(args, rt, old, source=None):
    """The training images of a run; with --epochs args.steps becomes their number of steps.

    source: a checkpoint that a new run starts from. Raises UserError where `old` had other images.
    """
    with rt.rank_0_first():
        images = load_long_tailed(args, old or source)
    if old and images.record() != old["data"]:
        raise UserError(f"--data-dir {args.data_dir}: not the images that the run in {args.out} "
                        "was started with; choose another folder (--out; run_all.sh: ROOT)")
    if getattr(args, "epochs", None):
        args.steps = math.ceil(args.epochs * len(images.labels) / args.batch_size)
    return images


def is_finished(old, args, rt):
    """Whether the run of a checkpoint has nothing left to do; says so. Raises UserError."""
    if not old or old["step"] < args.steps:
        return False
    if old["step"] > args.steps:
        flag = "--epochs" if getattr(args, "epochs", None) else "--steps"
        raise UserError(f"{flag}: the run in {args.out} is at step {old['step']} already, beyond "
                        f"{args.steps}; raise it, or choose another folder with --out")
    rt.print(f"{args.out}: finished, step {old['step']} of {args.steps}")
    print_next_of(old["kind"], args)
    return True


def print_next_of(kind, args):
    """Print what follows this kind of training; nothing for a classifier, which is measured now."""
    values = {**vars(args), "ckpt": Path(args.out) / "ckpt.pt"}
    if kind in NEXT:
        runtime.print_next(*(word.format(**values) for word in NEXT[kind].split()))


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

    def add_D(self, D, y, weight=None):
        """Add per-image distances D (B,) with their classes y (B,) and weights, None for 1."""
        weight = torch.ones_like(D) if weight is None else weight
        self.D.index_add_(1, self.group_of[y], torch.stack([weight * D, weight]))

    def means(self, rt):
        """{name: mean over steps and ranks}, D as "D_<group>" where a group had images.

        On every rank the sums become their means over ranks, so that rank 0 saves those of all.
        """
        flat = torch.cat([torch.stack([*self.sums.values()]), self.D.flatten()])
        if rt.world > 1:
            torch.distributed.all_reduce(flat)
            flat /= rt.world
            self.sums = dict(zip(self.sums, flat))
            self.D = flat[len(self.sums):].view_as(self.D)
        means = dict(zip(self.sums, (flat / self.steps).tolist()))
        for name, total, images in zip(self.groups, *self.D.tolist()):
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


def format_line(step, args, means, groups, lr, speed):
    """One aligned log line, D of each group, "-" where it had no image; speed: images a second."""
    words = [f"step {step:>{len(str(args.steps))}}/{args.steps}  "]
    words += [f"{k} {v:<8.4f} " for k, v in means.items()
              if not k.startswith("D_") and k != "grad_norm"]
    if any(value for name, value in means.items() if name.startswith("D_")):
        D = [f"{means[f'D_{name}']:.1e}" if f"D_{name}" in means else "-" for name in groups]
        words.append(f"D {'/'.join(D)}  ")
    seconds_left = round((args.steps - step) * args.batch_size / speed)
    words.append(f"|g| {means['grad_norm']:<7.3f} lr {lr:.1e}  {speed:>6.0f} img/s  "
                 f"ETA {timedelta(seconds=seconds_left)}")
    if any(value > 1 for name, value in means.items() if name.startswith("D_")):
        words.append("  warning: the two predictions differ by more than the noise itself (D > 1), "
                     "the divergence term grows without bound")
    return "".join(words)


def tag_of(name):
    """Where TensorBoard shows a logged number: "D/Few" of D_Few, "FD/all" of FD, "loss/base"."""
    kind, _, group = name.partition("_")
    if kind in ("D", *FRECHET):
        return f"{kind}/{group or 'all'}"
    kinds = {"lr": "optimisation", "grad_norm": "optimisation", "images_per_s": "speed"}
    return f"{kinds.get(name, 'loss')}/{name}"


class Log:
    """config.json, log.jsonl and TensorBoard's events in a run's folder, on rank 0.

    When a run goes on, what was logged after its checkpoint is dropped.
    """

    def __init__(self, training):
        out = Path(training.args.out)
        disk.write_json(out / "config.json", {**training.record, "torch": torch.__version__})
        self.path = out / "log.jsonl"
        lines = self.path.read_text().splitlines(True) if self.path.exists() else []
        kept = [line for line in lines      # a kill may have cut the last one
                if line.endswith("\n") and json.loads(line)["step"] <= training.step]
        disk.write_text(self.path, "".join(kept))
        self.board = SummaryWriter(out, purge_step=training.step + 1)
        rows = [f"| {key} | {value} |" for key, value in training.record["config"].items()]
        table = "\n".join(["| setting | value |", "| --- | --- |", *rows])
        self.board.add_text("settings", table, training.step)

    def write(self, step, record):
        """Append one record to both: {name: number}, or {"warning": text}."""
        with open(self.path, "a") as f:
            f.write(json.dumps({"step": step, **record}) + "\n")
        for name, value in record.items():
            if name == "warning":
                self.board.add_text(name, value, step)
            elif name != "eval_num" and (value or not name.startswith("D_")):
                self.board.add_scalar(tag_of(name), value, step)    # without CM D is 0, no curve
        self.board.flush()


# --------------------------------------------------------------------------------------------------
# A run in progress

@dataclass
class Training:
    """What the loop changes, and what a checkpoint keeps."""
    args: Namespace         # settings: --out, --seed, --steps, and the flags that are added above
    rt: runtime.Runtime
    net: torch.nn.Module    # its parameters that require gradients are trained, by `optimizer`
    objective: torch.nn.Module      # makes a batch and its loss, see the head of this file;
    batches: object                 # so do these
    optimizer: torch.optim.Optimizer
    record: dict            # what a checkpoint holds besides; in it "config" and "data"
    old: InitVar[dict | None] = None    # the checkpoint to go on from, whose weights `net` has

    averages = True             # whether weights are averaged, by --ema
    broadcast_buffers = False   # whether all ranks go on from rank 0's buffers in every step
    max_base = 10.0             # a base loss above this has diverged: predicting zero costs 1

    def __post_init__(self, old):
        self.params = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        self.ema = {}
        for name, p in self.params.items() if self.averages else ():
            source = old["ema"][name].to(self.rt.device) if old else p.detach()
            self.ema[name] = source.clone(memory_format=torch.preserve_format)
        data = self.record["data"]
        self.meter = Meter(data["class_counts"], data["class_names"], self.rt.device)
        self.scaler = None
        if self.rt.dtype == torch.float16:
            self.scaler = torch.amp.GradScaler(self.rt.device.type)
        self.step = old["step"] if old else 0
        if old:
            self.optimizer.load_state_dict(old["optimizer"])
            self.meter.restore(old["window"])
            if self.scaler:
                self.scaler.load_state_dict(old["scaler"])

    def weights(self):
        """What a checkpoint keeps of the network: all of its parameters, and their averages."""
        return {"model": self.net.state_dict(),
                "ema": {**dict(self.net.named_parameters()), **self.ema}}

    def state(self):
        """A checkpoint: plain types and tensors."""
        scaler = {"scaler": self.scaler.state_dict()} if self.scaler else {}
        return {**self.record, "step": self.step, **self.weights(), **scaler,
                "optimizer": self.optimizer.state_dict(), "window": self.meter.state()}

    def batch(self, k=0):
        """What pass k of the next step sees on this rank."""
        args, rt = self.args, self.rt
        return self.objective.draw_batch(
            *self.batches.at(self.step), seed=args.seed, step=self.step,
            part=rt.rank * args.accumulate + k, parts=rt.world * args.accumulate)

    def learning_rate(self, step):
        """That of a step: linear warm-up from lr / warmup at step 0, then constant.

        With --lr-decay times (1 + cos(pi step / steps)) / 2; with the setting warmup_from 0 in
        place of 1 it is 0 at step 0.
        """
        args = self.args
        first = getattr(args, "warmup_from", 1)
        rate = args.lr * (min(1.0, (step + first) / args.warmup) if args.warmup else 1.0)
        if args.lr_decay:
            rate *= (1 + math.cos(math.pi * step / args.steps)) / 2
        return rate

    def update(self):
        """All that follows backward: clip, optimizer, averaged weights.

        In float16 the optimizer is skipped where gradients are not finite. Returns the gradient
        norm before clipping, 0-d.
        """
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.params.values(), self.args.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averages:
            decay = self.args.ema
            if getattr(self.args, "ema_ramp", True):
                decay = min(decay, (1 + self.step) / (10 + self.step))
            get_ema_multi_avg_fn(decay)(list(self.ema.values()), list(self.params.values()), None)
        return norm

    def refuse_divergence(self, means):
        """Raise UserError where a logged mean is not finite or too large, before it is saved."""
        limits = {"base": self.max_base, **{k: MAX_D for k in means if k.startswith("D_")}}
        for name, value in means.items():
            if not abs(value) <= limits.get(name, float("inf")):        # also true of NaN
                raise self.diverged(name, value)
        # Every step's gradients overflowed, also those of a loss that is scaled down
        if means.get("skipped") == 1 and self.scaler.get_scale() < 1:
            raise self.diverged("the share of steps without finite gradients", 1)

    def check_weights(self):
        """Raise UserError where the weights of this step no longer predict, before they are saved.

        The logged losses are those before the update: the next batch says what the update did.
        """
        with torch.no_grad(), self.rt.autocast():
            base = self.objective(self.batch())[1]["base"].item()
        if self.rt.maximum(int(not abs(base) <= self.max_base)):
            raise self.diverged("base", base)

    def diverged(self, name, value):
        """The UserError of a run that has diverged, seen by one logged number."""
        args = self.args
        fix = "lower --lr"
        if getattr(args, "cm", False) and not args.div_bound:
            fix = "bound the divergence with --div-bound 0.01"
        kept = ""
        if (Path(args.out) / "ckpt.pt").exists():
            kept = f"; the last good checkpoint is kept in {args.out}"
        return UserError(f"stopped at step {self.step}: {name} is {value:.4g}, the run has "
                         f"diverged; {fix}{kept}")


# --------------------------------------------------------------------------------------------------
# The loop

def train_step(training, module, stops=lambda: False, bar=None):
    """One step: forward and backward in args.accumulate passes, then the update.

    module: the objective, perhaps compiled and distributed. stops(): asked before every pass but
    the first; where it is true, the step is given up as if it had not begun. bar: a progress bar,
    in images. Returns whether the step was taken.
    """
    args, meter, scaler = training.args, training.meter, training.scaler
    logged = []
    for k in range(args.accumulate):
        if k and stops():
            training.optimizer.zero_grad(set_to_none=True)
            return False
        batch = training.batch(k)
        # Processes exchange gradients in the last pass only
        waits = training.rt.world > 1 and k < args.accumulate - 1
        with module.no_sync() if waits else nullcontext():
            with training.rt.autocast():
                total, terms, D = module(batch)
            total = total / args.accumulate
            (scaler.scale(total) if scaler else total).backward()
        terms = {name: value.detach() for name, value in terms.items()}
        logged.append((terms, D, batch.y[:len(D)], batch.cm_weight))
        if bar is not None:
            bar.update(args.batch_size / args.accumulate)
    for terms, D, y, weight in logged:
        meter.add(terms, 1 / args.accumulate)
        meter.add_D(D, y, weight)
    norm = training.update()
    if scaler:
        skipped = ~norm.isfinite()
        meter.add({"skipped": skipped.float()})
        norm = norm.masked_fill(skipped, 0)
    meter.add({"grad_norm": norm})
    meter.steps += 1
    training.step += 1
    return True


def loop(training, samples=None, evaluation=None):
    """Train to args.steps, logging and saving; where a signal comes, save and leave the process.

    samples(state, labels, rt): images of a checkpoint, uint8 (N, H, W, C), for its grids.
    evaluation(training, log): measures EMA samples where that is due, on every rank after every
    step; or None. Leaves with exit code 128 + the signal, after the pass in which it came.
    """
    args, rt = training.args, training.rt
    out = Path(args.out)
    with disk.lock(out, rt=rt):
        module, warning = training.objective, None
        if runtime.wants_compile(args, rt):
            module, warning = runtime.compile_or_not(
                module, lambda compiled: compiled(training.batch())[0], rt)
        announce(training, module is not training.objective)
        module = rt.parallel(module, training.broadcast_buffers)
        log = Log(training) if rt.rank == 0 else None
        if log and warning:
            log.write(training.step, {"warning": warning})
        with runtime.StopSignal() as stop:
            signal = run_steps(training, module, log, samples, evaluation, stop)
    if signal:
        rt.print(f"stopped by signal {signal} at step {training.step}; saved {out / 'ckpt.pt'}; "
                 "the same command goes on from there")
        sys.exit(128 + signal)
    rt.print(f"finished: {out / 'ckpt.pt'}")
    print_next_of(training.record["kind"], args)


def run_steps(training, module, log, samples, evaluation, stop):
    """The steps themselves, see `loop`. Returns the signal that ended them, or 0."""
    args, rt = training.args, training.rt
    signal = 0
    bar = runtime.progress(
        total=args.steps * args.batch_size, initial=training.step * args.batch_size, unit="img",
        leave=False, disable=rt.rank > 0 or not sys.stderr.isatty())
    # The ranks exchange which signals came; a GPU may wait for that. A stopped run has 30 seconds
    long_steps = rt.device.type != "cuda" or args.accumulate > 1
    exchange_every = 1 if long_steps or rt.world == 1 else 10
    logged = training.step
    clock = time.time()             # the speed counts from here, and from step `logged`
    while training.step < args.steps and not signal:
        taken = train_step(training, module, lambda: rt.maximum(stop.number), bar)
        step = training.step
        if step % exchange_every == 0 or not taken:
            signal = rt.maximum(stop.number)
        logs = taken and (step % args.log_every == 0 or step == args.steps)
        saves = step % args.save_every == 0 or step == args.steps or signal
        if (logs or saves) and training.meter.steps:
            means = training.meter.means(rt)
            training.refuse_divergence(means)
        if logs:
            speed = (step - logged) * args.batch_size / max(time.time() - clock, 1e-9)
            lr = training.learning_rate(step - 1)
            rt.print(format_line(step, args, means, training.meter.groups, lr, speed))
            if log:
                log.write(step, {**means, "lr": lr, "images_per_s": round(speed, 1)})
            training.meter.reset()
            clock, logged = time.time(), step
        if saves:
            training.check_weights()
            if rt.rank == 0:
                disk.save(Path(args.out) / "ckpt.pt", training.state())
        if taken:
            start = time.time()
            if log:
                write_due(training, log, samples)
            if evaluation:
                evaluation(training, log)
            clock += time.time() - start        # grids and distances are no training
    bar.close()
    if log:
        log.board.close()
    return signal


def write_due(training, log, samples):
    """Write what is due at this step beside ckpt.pt: a snapshot that is kept, a grid of samples.

    The grid shows up to ten classes, each image from its own fixed noise.
    """
    args, step = training.args, training.step
    out = Path(args.out)
    if args.keep_every and step % args.keep_every == 0:
        disk.save(out / f"ckpt-{step:07d}.pt", training.state())
    if args.sample_every and (step % args.sample_every == 0 or step == args.steps):
        names, counts = (training.record["data"][key] for key in ("class_names", "class_counts"))
        classes = ten_classes(len(names))
        alone = runtime.Runtime(training.rt.device, training.rt.dtype)  # rank 0 generates them all
        images = samples(training.state(), classes * 10, alone)
        picture = grid_image({"": (images, classes * 10)}, names, counts, classes)
        disk.write_png(out / f"grid-{step:07d}.png", picture)
        log.board.add_image("samples", np.asarray(picture), step, dataformats="HWC")


def announce(training, compiled):
    """Print what is about to be trained, how and where."""
    args, rt, net = training.args, training.rt, training.net
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    low_rank = sum(n for name, n in sizes.items() if name.rsplit(".", 1)[-1] in ("A", "B"))
    total = sum(sizes.values())
    frozen = total - sum(p.numel() for p in training.params.values())
    rt.print(f"network: {total - low_rank:,} parameters"
             + (f" and {low_rank:,} low-rank ones (A, B)" if low_rank else "")
             + (f", of all {frozen:,} frozen" if frozen else "")
             + f"; {rt.device}, {args.dtype}, processes: {rt.world}, compiled: {compiled}")
    rt.print("config: " + " ".join(f"{k}={v}" for k, v in training.record["config"].items()))
    verb = "resuming" if training.step else "starting"
    rt.print(f"{verb} {args.out} at step {training.step} of {args.steps}")
