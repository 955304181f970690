"""Train a class-conditional diffusion model on long-tailed data, with or without capacity manipulation (CM).

    torchrun train.py --dataset cifar100 --ir 100               # the paper's CM run (CM on OC), one GPU
    torchrun --nproc_per_node=8 train.py --dataset cifar100     # the same run on eight: --batch-size is global
    python train.py --dataset digits                            # minutes on a laptop
    python train.py --dataset digits --base ddpm --no-cm        # the plain baseline

Defaults are the paper's (Sec. 4.1, G.1); a data set's own are in PRESETS. The folder of a run holds ckpt.pt,
config.json, log.jsonl, TensorBoard events and grids of samples. The same command resumes a stopped run, bit for bit.
"""
import json
import os
import shlex
import sys
import time
from argparse import BooleanOptionalAction
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

import augment
import baselines
import runtime
from data import Batches, add_data_flags, load_long_tailed, splits
from losses import BASES, Objective, draw
from model import make_alphas_bar
from runtime import Parser, UserError, integer, number, run
from sample import DEFAULTS, STEPS, add_low_rank, build_network, generate, grid_image, load_network

# ----------------------------------------------------------------------------------------------------------------------
# Settings

PRESETS = {     # the defaults of flags that depend on the data set; "paper" holds for every set that has no row
    "paper": dict(ir=100.0, ch=128, ch_mult=[1, 2, 2, 2], attn=[1], num_res_blocks=2, dropout=0.1, steps=300_000, lr=2e-4,
                  warmup=5000, ema=0.9999, save_every=5000, sample_every=20_000, log_every=100, dtype="auto"),
    "digits": dict(ir=20.0, ch=32, ch_mult=[1, 2], num_res_blocks=1, steps=2000, lr=1e-3, warmup=100, ema=0.999,
                   save_every=500, sample_every=500, log_every=50, dtype="float32"),
    "cub200": dict(ir=10.0), "flowers102": dict(ir=10.0),                                # too small for 100
    "folder": dict(ir=1.0), "imagenet-lt": dict(ir=1.0), "inat2018": dict(ir=1.0),      # long-tailed as they are
}
FREE = {"steps", "save_every", "keep_every", "sample_every", "log_every", "compile", "device", "out", "data_dir", "pack_dir",
        "accumulate"}
MAX_BASE = 10.0     # a base loss above this has diverged: predicting zero costs 1
MAX_D = 100.0       # so has a distance between the two predictions: both estimate noise of variance 1


def make_parser():
    """All flags; those in PRESETS have their default filled in by `resolve`."""
    parser = Parser(__doc__)
    g = add_data_flags(parser)
    g.add_argument("--flip", action=BooleanOptionalAction, default=None, help="mirror images at random (default: on, but never "
                   "for digits)")
    g.add_argument("--resample", type=number(0), default=1.0, metavar="Q", help="+RS: draw class c with probability proportional "
                   "to N_c^Q; 0 balanced, 0.5 square root, 1 as is (default: 1)")
    g.add_argument("--ada", type=number(0, 1), default=0.0, metavar="P", help="+ADA: probability of each augmentation of augment.py; "
                   "0.12 is usual (default: 0, none)")
    g = parser.add_argument_group("method")
    g.add_argument("--base", choices=BASES, default="oc", help="L_base of Eq. (4) (default: oc, the paper's choice)")
    g.add_argument("--cm", action=BooleanOptionalAction, default=True, help="reserve capacity and add L_CM (default: on)")
    g.add_argument("--lam", type=number(0), default=1.0, help="lambda of Eq. (4); 0 reserves without L_CM (default: 1)")
    g.add_argument("--w-con", type=number(0), default=1.0, help="weight of L_Con (default: 1)")
    g.add_argument("--w-div", type=number(0), default=1.0, help="weight of L_Div (default: 1; the authors' release: 0.2)")
    g.add_argument("--div-bound", type=number(0), default=0.01, metavar="M", help="L_Div saturates per image at distance M; "
                   "0: unbounded, as printed, which diverges (default: 0.01)")
    g.add_argument("--independent-dropout", action="store_true", help="theta and theta^g see different dropout masks")
    g.add_argument("--rank-ratio", type=number(above=0, high=1), default=0.1, help="r / min(d, k) of Eq. (1) (default: 0.1)")
    g.add_argument("--cbdm-tau", type=number(0), default=1e-3, help="tau of Eq. (D.1), t in 0 ... 999 (default: 0.001)")
    g.add_argument("--cbdm-gamma", type=number(0), default=0.25, help="gamma of Eq. (D.1) (default: 0.25)")
    g.add_argument("--cbdm-y", choices=("uniform", "train"), default="uniform", help="law of y': Eq. (D.1)'s uniform, or "
                   "class frequency as in CBDM's code (default: uniform)")
    g.add_argument("--focal-gamma", type=number(0), default=2.0, help="gamma of --base focal (default: 2)")
    g.add_argument("--rop-weight", type=number(0), default=0.1, help="weight of --base rop's overlap term (default: 0.1)")
    g.add_argument("--rop-margin", type=number(above=0), default=0.1, help="margin of --base rop (default: 0.1)")
    g.add_argument("--ct-double", type=integer(1), metavar="K", help="--base consistency: its 10 intervals double every K steps, up to 640 "
                   "(default: a quarter of --steps)")
    g.add_argument("--experts", choices=("group",), help="one low-rank expert for each of Many, Medium and Few, in place of CM's "
                   "one (default: none)")
    g.add_argument("--init-from", metavar="CKPT", help="start from the EMA weights of a trained checkpoint")
    g.add_argument("--lora", action="store_true", help="with --init-from: freeze its weights and train low-rank parts only, without L_CM")
    g = parser.add_argument_group("network")
    g.add_argument("--ch", type=integer(1), help="base width")
    g.add_argument("--ch-mult", type=integer(1), nargs="+", metavar="M", help="width of each level, as a multiple of --ch")
    g.add_argument("--attn", type=integer(0), nargs="*", metavar="L", help="levels with attention, 0 the finest")
    g.add_argument("--num-res-blocks", type=integer(1), help="residual blocks a level")
    g.add_argument("--dropout", type=number(0, 0.99), help="dropout probability")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--steps", type=integer(1), help="training steps; may be raised to train longer")
    g.add_argument("--batch-size", type=integer(1), default=64, help="images a step, over all processes (default: 64)")
    g.add_argument("--accumulate", type=integer(1), default=1, metavar="K", help="passes a step, each over a K-th of the batch "
                   "and of its memory; the same step but for dropout masks (default: 1)")
    g.add_argument("--lr", type=number(above=0), help="Adam's learning rate after the warm-up")
    g.add_argument("--warmup", type=integer(0), help="steps in which the learning rate rises linearly")
    g.add_argument("--grad-clip", type=number(above=0), default=1.0, help="largest gradient norm (default: 1)")
    g.add_argument("--ema", type=number(0, 1), help="decay of the averaged weights; (1 + s) / (10 + s) while smaller")
    g.add_argument("--label-drop", type=number(0, 1), default=0.1, help="chance that an image's label is Null (default: 0.1)")
    g.add_argument("--compile", action=BooleanOptionalAction, default=None, help="torch.compile (default: on CUDA only)")
    g = parser.add_argument_group("output")
    g.add_argument("--save-every", type=integer(1), help="steps between writes of ckpt.pt")
    g.add_argument("--keep-every", type=integer(1), help="also keep a snapshot ckpt-STEP.pt every so many steps (default: none)")
    g.add_argument("--sample-every", type=integer(0), help="steps between grids of samples, the last step included; 0: none")
    g.add_argument("--log-every", type=integer(1), help="steps between log lines")
    parser.add_common("folder of the run (default: out/ and a name made of the settings)")
    for action in parser._actions:
        if action.dest in PRESETS["paper"]:
            own = "; ".join(f"{name}: {p[action.dest]}" for name, p in PRESETS.items() if action.dest in p and name != "paper")
            action.help += f" (default: {PRESETS['paper'][action.dest]}{'; ' + own if own else ''})"
            action.default = None
    return parser


def resolve(args):
    """Fill in the data set's defaults and the run's folder; check what depends on several flags. Raises UserError."""
    preset = {**PRESETS["paper"], **PRESETS.get(args.dataset, {})}
    changed = [k for k, v in vars(args).items() if k in preset and v not in (None, preset[k]) and k not in FREE]
    for key, value in preset.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % (world * args.accumulate):
        parts = [f"{world} processes"] * (world > 1) + [f"--accumulate {args.accumulate}"] * (args.accumulate > 1)
        raise UserError(f"--batch-size {args.batch_size}: not divisible by {' x '.join(parts)}; it counts the images of all of them")
    if args.ch % 2:
        raise UserError(f"--ch {args.ch}: must be even; take a multiple of 32")
    if bad := [level for level in args.attn if level >= len(args.ch_mult)]:
        raise UserError(f"--attn {bad[0]}: --ch-mult has levels 0 to {len(args.ch_mult) - 1} only")
    if args.lora and not args.init_from:
        raise UserError("--lora: name the trained network that it starts from with --init-from CKPT")
    if args.lora:
        args.cm, args.lam = True, 0.0
    if args.experts:
        args.cm = False
    plain = make_parser().parse_args([])
    if not args.cm:
        unused = ["lam", "w_con", "w_div", "div_bound", "independent_dropout"] + ["rank_ratio"] * (not args.experts)
        for key in [k for k in unused if getattr(args, k) != getattr(plain, k)]:
            raise UserError(f"--{key.replace('_', '-')}: means something with --cm only; leave it out, or leave out --no-cm")
    if args.out is None:
        changed += [k for k, v in vars(args).items() if k not in preset and v != getattr(plain, k) and k not in FREE]
        extra = [f"{k}{'_'.join(map(str, v)) if isinstance(v, list) else v}" for k in sorted(set(changed))
                 if k not in ("dataset", "ir", "base", "cm", "seed") for v in [getattr(args, k)]]
        dataset = Path(args.data_dir).resolve().name if args.dataset == "folder" else args.dataset
        words = [dataset, f"ir{args.ir:g}", args.base] + ["cm"] * args.cm + [f"seed{args.seed}"] + extra
        args.out = "out/" + "-".join(words).replace("/", "_")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# What is logged

class Window:
    """Means of what is logged between two log lines. Sums stay on the device: no step waits for it."""

    def __init__(self, counts, class_names, device):
        self.groups = splits(counts) or {name: [c] for c, name in enumerate(class_names)}
        self.group_of = torch.zeros(len(counts), dtype=torch.int64, device=device)
        for g, classes in enumerate(self.groups.values()):
            self.group_of[classes] = g
        self.reset()

    def reset(self):
        """Start a new window."""
        self.steps, self.sums = 0, {}
        self.D = torch.zeros(2, len(self.groups), device=self.group_of.device)      # sums of D, numbers of images

    @torch.no_grad()
    def add(self, scalars, share=1.0):
        """Add {name: 0-d tensor} of one part of a step, which is this share of it on this rank."""
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, 0) + share * value

    def add_D(self, D, y):
        """Add per-image distances D (B,) with their classes y (B,)."""
        self.D.index_add_(1, self.group_of[y], torch.stack([D, torch.ones_like(D)]))

    def means(self, rt):
        """{name: mean over the window and all ranks}, D as "D_<split>"; a split without images is left out."""
        flat = torch.cat([torch.stack([*self.sums.values()]) / self.steps / rt.world, self.D.flatten()])
        if rt.world > 1:
            torch.distributed.all_reduce(flat)
        flat, G = flat.tolist(), len(self.groups)
        means = dict(zip(self.sums, flat))
        sums, numbers = flat[-2 * G:-G], flat[-G:]
        return {**means, **{f"D_{name}": s / n for name, s, n in zip(self.groups, sums, numbers) if n}}

    def state(self):
        """What a checkpoint keeps, so that a resumed run logs the same numbers."""
        return {"steps": self.steps, "sums": self.sums, "D": self.D}

    def restore(self, state):
        """Take over what `state` returned."""
        self.steps, self.D = state["steps"], state["D"].to(self.D.device)
        self.sums = {name: value.to(self.D.device) for name, value in state["sums"].items()}


def check(means, step, args):
    """Raise UserError where a logged mean is not finite or has run away: before a checkpoint is overwritten."""
    limits = {"base": MAX_BASE, **{k: MAX_D for k in means if k.startswith("D_")}}
    for name, value in means.items():
        if not abs(value) <= limits.get(name, float("inf")):        # also true of NaN
            fix = "bound the divergence with --div-bound 0.01" if args.cm and not args.div_bound else "lower --lr"
            kept = ("; the last good checkpoint is kept in " + args.out) if (Path(args.out) / "ckpt.pt").exists() else ""
            raise UserError(f"stopped at step {step}: {name} is {value:.4g}, the run has diverged; {fix}{kept}")


def format_line(step, args, means, lr, speed, seconds_left):
    """One aligned log line."""
    D = "/".join(f"{v:.1e}" for k, v in means.items() if k.startswith("D_")) if args.cm and args.lam else ""
    shown = {k: v for k, v in means.items() if not k.startswith("D_") and k != "grad_norm"}
    return (f"step {step:>{len(str(args.steps))}}/{args.steps}  " + "".join(f"{k} {v:<8.4f} " for k, v in shown.items())
            + (f"D {D}  " if D else "") + f"|g| {means['grad_norm']:<7.3f} lr {lr:.1e}  {speed:>6.0f} img/s  "
            f"ETA {timedelta(seconds=round(seconds_left))}")


class Log:
    """log.jsonl and TensorBoard; on resume, what was logged after the checkpoint's step is dropped."""

    def __init__(self, out, step):
        self.path = Path(out) / "log.jsonl"
        with runtime.writing(self.path):
            if self.path.exists():
                kept = [line for line in self.path.read_text(errors="replace").splitlines(True) if self.is_whole(line, step)]
                runtime.write_atomic(self.path, lambda p: p.write_text("".join(kept)))
            self.board = SummaryWriter(out, purge_step=step + 1)

    @staticmethod
    def is_whole(line, step):
        """Whether a line is a complete record of a step up to `step`."""
        try:
            return line.endswith("\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False

    def write(self, step, record):
        """Append one record and mirror its numbers to TensorBoard."""
        with runtime.writing(self.path):
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **record}) + "\n")
            for name, value in record.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()


# ----------------------------------------------------------------------------------------------------------------------
# Parts of the loop

def learning_rate(step, args):
    """Linear warm-up from lr / warmup at step 0, then constant."""
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup))


def update(params, ema, optimizer, step, args):
    """Everything after backward at step `step`: clip, Adam, the averaged weights; returns the gradient norm, 0-d."""
    norm = clip_grad_norm_(params, args.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    get_ema_multi_avg_fn(min(args.ema, (1 + step) / (10 + step)))(ema, params, None)
    return norm


def loop(args, rt, step, module, batch, params, ema, optimizer, window, log, state, after=lambda step: None):
    """Train from `step` to args.steps, and leave the process with 128 + the signal if one came.

    batch(step, k) gives pass k's Batch of a step, module the loss, and state(step) what ckpt.pt keeps. On rank 0 `log` is
    written, and after(step) called after every step.
    """
    stop, signal, warned, clock, clock_step, path = runtime.StopSignal(), 0, False, time.time(), step, Path(args.out) / "ckpt.pt"
    while step < args.steps and not signal:
        for k in range(args.accumulate):
            b = batch(step, k)
            with module.no_sync() if rt.world > 1 and k < args.accumulate - 1 else nullcontext():
                with rt.autocast():
                    total, terms, D = module(b)
                (total / args.accumulate).backward()
            window.add(terms, 1 / args.accumulate)
            window.add_D(D, b.y)
        window.add({"grad_norm": update(params, ema, optimizer, step, args)})
        window.steps += 1
        step += 1

        signal = rt.maximum(stop.number)
        logs, saves = step % args.log_every == 0 or step == args.steps, step % args.save_every == 0 or step == args.steps
        if logs or saves or signal:
            means = window.means(rt)
            check(means, step, args)
        if logs:
            if not warned and (warned := any(v > 1 for k, v in means.items() if k.startswith("D_"))):
                rt.print("warning: the two predictions differ by more than the noise itself (D > 1): the divergence runs away")
            now = time.time()
            speed = (step - clock_step) * args.batch_size / max(now - clock, 1e-9)
            lr = learning_rate(step - 1, args)
            rt.print(format_line(step, args, means, lr, speed, (args.steps - step) * args.batch_size / speed))
            if rt.rank == 0:
                log.write(step, {**means, "lr": lr, "images_per_s": round(speed, 1)})
            window.reset()
            clock, clock_step = time.time(), step
        if rt.rank == 0:
            if saves or signal:
                runtime.save(path, state(step))
            after(step)
    if rt.rank == 0:
        log.board.close()
    if signal:
        rt.print(f"stopped by signal {signal} at step {step}; saved {path}; the same command goes on from there")
        sys.exit(128 + signal)
    rt.print(f"finished: {path}")


def start_from(net, path, kind):
    """Copy the merged EMA weights of a checkpoint of this kind into a plain UNet. Raises UserError where they do not fit."""
    source = load_network(runtime.load(path, [kind], "--init-from"))
    try:
        net.load_state_dict(source.state_dict())
    except RuntimeError as e:
        raise UserError(f"--init-from {path}: its network is another one ({str(e).splitlines()[-1].strip()}); repeat its --ch, "
                        f"--ch-mult, --attn, --num-res-blocks and data set")


def save_grid(state, step, args, rt, board):
    """Draw EMA samples of up to ten classes on fixed noise, as grid-STEP.png and in TensorBoard."""
    net = load_network(state, device=rt.device)
    names, C = state["data"]["class_names"], len(state["data"]["class_names"])
    classes = sorted({round(i * (C - 1) / 9) for i in range(10)})
    labels = [c for _ in range(10) for c in classes]
    shape = (state["network"]["channels"],) + (state["data"]["resolution"],) * 2
    alone = runtime.Runtime(rt.device, rt.dtype)        # rank 0 draws all of it
    settings = {**DEFAULTS[state["kind"]], "steps": STEPS[DEFAULTS[state["kind"]]["sampler"]], "seed": args.seed}
    images = generate(net, labels, range(len(labels)), shape, alone, len(labels), title=None, **settings)
    picture = grid_image(images, labels, names, classes)
    runtime.write_atomic(Path(args.out) / f"grid-{step:07d}.png", lambda p: picture.save(p, format="png"))
    board.add_image("samples", torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(
        picture.height, picture.width, 3), step, dataformats="HWC")


def main():
    """Resume or start, build everything, announce it, and run the loop."""
    args = resolve(make_parser().parse_args())
    out, path = Path(args.out), Path(args.out) / "ckpt.pt"

    # Resume or start: the checkpoint's settings must be this command's
    kind = "consistency" if args.base == "consistency" else "diffusion"
    old = runtime.load(path, DEFAULTS, "--out") if path.exists() else None
    rt = runtime.setup(args.device, old["config"]["dtype"] if old and args.dtype == "auto" else args.dtype)
    args.dtype = str(rt.dtype).removeprefix("torch.")       # what auto came to: a run keeps it on any device
    if args.base == "consistency" and args.ct_double is None:
        args.ct_double = old["config"]["ct_double"] if old else max(1, args.steps // 4)
    rt.agree(old["step"] if old else 0, out)
    config = {k: v for k, v in vars(args).items() if k not in ("device", "out")}
    command = shlex.join(["python", "train.py", *sys.argv[1:]])
    if old:
        defaults = {**vars(make_parser().parse_args([])), **PRESETS["paper"], **PRESETS.get(args.dataset, {})}
        runtime.refuse_changes(old["config"], {k: v for k, v in config.items() if k not in FREE}, out, defaults)
        if old["step"] >= args.steps:
            return rt.print(f"{out}: finished, step {old['step']} of {args.steps}")

    # Data
    with rt.rank_0_first():
        images = load_long_tailed(args)
    data_record = {"dataset": args.dataset, "class_names": images.class_names, "class_counts": images.counts.tolist(),
                   "resolution": images.images.shape[1], "provenance": images.provenance}
    if old and old["data"] != data_record:
        raise UserError(f"--data-dir {args.data_dir}: not the images that the run in {out} was started with; "
                        f"choose another folder with --out")
    groups = splits(images.counts)
    rt.print(images.summary() + "".join(f"; {k} {images.counts[v].sum():,}" for k, v in groups.items()))
    batches = Batches(images, args.batch_size, args.seed, rt.device, resample=args.resample)
    flip = images.flip if args.flip is None else args.flip

    # Network and objective
    resolution, channels = images.images.shape[1], images.images.shape[3]
    if resolution % 2 ** (len(args.ch_mult) - 1):
        raise UserError(f"--ch-mult: {len(args.ch_mult)} levels halve the image {len(args.ch_mult) - 1} times, and "
                        f"{resolution} pixels cannot be; take fewer levels or another --resolution")
    network = {"channels": channels, "num_classes": len(images.class_names), "ch": args.ch, "ch_mult": args.ch_mult,
               "attn": args.attn, "num_res_blocks": args.num_res_blocks, "dropout": args.dropout,
               "augment_dim": augment.DIM if args.ada else 0}
    rank_ratio = args.rank_ratio if args.cm or args.experts else None
    experts = images.counts.tolist() if args.experts else None
    if experts and not groups:
        raise UserError("--experts group: fewer than three classes have no Many, Medium and Few")
    torch.manual_seed(runtime.seed_of(args.seed, "init"))
    try:
        net = build_network(network, None)
    except ValueError as e:
        raise UserError(f"--ch {args.ch} with --ch-mult {args.ch_mult}: {e}; take a multiple of 32")
    if args.init_from and not old:
        start_from(net, args.init_from, kind)
    add_low_rank(net, rank_ratio, experts)
    if args.lora:
        baselines.freeze_all_but_low_rank(net)
    if old:
        net.load_state_dict(old["model"])
    net.to(rt.device, memory_format=torch.channels_last)
    names, params = zip(*[(n, p) for n, p in net.named_parameters() if p.requires_grad])
    ema = [(old["ema"][n].to(rt.device) if old else p.detach()).clone(memory_format=torch.preserve_format)
           for n, p in zip(names, params)]
    optimizer = torch.optim.Adam(params, lr=args.lr, betas=(0.9, 0.999), fused=True)
    objective = Objective(net, args.base, images.counts, make_alphas_bar(), args.lam, args.w_con, args.w_div, args.div_bound,
                          args.label_drop, args.independent_dropout, args.cbdm_tau, args.cbdm_gamma, args.cbdm_y, args.ada,
                          args.focal_gamma, args.rop_weight, args.rop_margin, args.ct_double)
    objective.to(rt.device)
    step, window = 0, Window(images.counts, images.class_names, rt.device)
    if old:
        step = old["step"]
        optimizer.load_state_dict(old["optimizer"])
        window.restore(old["window"])

    def batch(s, k):
        x_0, y = batches.at(s)
        part, parts = rt.rank * args.accumulate + k, rt.world * args.accumulate
        return draw(x_0, y, objective, args.seed, s, part, parts, flip, rt.dtype)

    use_compile = rt.device.type == "cuda" if args.compile is None else args.compile
    module = runtime.compile_or_not(objective, lambda m: m(batch(step, 0))[0], rt) if use_compile else objective
    compiled = module is not objective
    module = rt.parallel(module)

    # Announce
    low_rank = sum(p.numel() for n, p in net.named_parameters() if n.rsplit(".", 1)[-1] in ("A", "B"))
    plain = sum(p.numel() for p in net.parameters()) - low_rank
    rt.print(f"network: {plain:,} parameters{', frozen' * args.lora}"
             + (f" + {low_rank:,} {'of experts' if experts else 'reserved'} (A, B)" if low_rank else "")
             + f"; {rt.device}, {args.dtype}, {rt.world} process{'es' * (rt.world > 1)}{', compiled' * compiled}")
    rt.print("config: " + " ".join(f"{k}={v}" for k, v in config.items()))
    rt.print(f"{'resuming' if old else 'starting'} {out} at step {step} of {args.steps}")
    if rt.rank == 0:
        runtime.write_json(out / "config.json", {"command": command, "config": config, "network": network, "rank_ratio": rank_ratio,
                                                 "experts": experts, "data": data_record, "torch": torch.__version__})
    log = Log(out, step) if rt.rank == 0 else None

    def state(step):
        return {"kind": kind, "step": step, "command": command, "config": config, "data": data_record, "network": network,
                "rank_ratio": rank_ratio, "experts": experts, "model": net.state_dict(),
                "ema": {**dict(net.named_parameters()), **dict(zip(names, ema))},
                "optimizer": optimizer.state_dict(), "window": window.state()}

    # The loop
    def after(step):
        if args.keep_every and step % args.keep_every == 0:
            runtime.save(out / f"ckpt-{step:07d}.pt", state(step))
        if args.sample_every and (step % args.sample_every == 0 or step == args.steps):
            save_grid(state(step), step, args, rt, log.board)
    loop(args, rt, step, module, batch, params, ema, optimizer, window, log, state, after)


if __name__ == "__main__":
    run(main)
