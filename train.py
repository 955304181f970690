"""Train a class-conditional diffusion model on long-tailed data, with or without CM.

    torchrun train.py --dataset cifar100 --ir 100               # the paper's CM (on OC), one GPU
    torchrun --nproc_per_node=8 train.py --dataset cifar100     # the same run on eight GPUs
    python train.py --dataset digits                            # minutes on a laptop
    python train.py --dataset digits --base ddpm --no-cm        # the plain baseline

--batch-size counts the images of all processes. The defaults are the paper's (Sec. 4.1, G.1);
digits, and folders of images where there is no GPU, have others (see PRESETS). The folder of a run
holds ckpt.pt, config.json, log.jsonl, TensorBoard events and grids of samples. The same command
resumes a stopped run, bit for bit on a CPU.
"""
import os
from argparse import BooleanOptionalAction
from pathlib import Path

import numpy as np
import torch

import budget
import disk
import losses
import networks
import runtime
from data import (Batches, add_data_flags, class_groups, load_long_tailed, load_reference,
                  refuse_other_data, to_classes, to_rgb, unused_data_flags)
from loop import FRECHET, Meter, Training, has_record, loop, start_log
from losses import BASES, CMConfig, Objective, add_cm_flags, bind, draw_batch
from metrics.features import DIGITS_CLASSIFIER, Extractor
from metrics.scores import distance_of, placed
from model import make_alphas_bar
from networks import NETWORKS
from runtime import Parser, UserError, integer, number, refuse_unused, run
from networks import KINDS, add_low_rank, is_one_network, load_network
from sample import (Sampling, generate, grid_image, image_shape, prepare, sampling_in_words,
                    ten_classes)
from sets.readers import READERS
from variants import augment
from variants.experts import freeze_all_but_low_rank

# --------------------------------------------------------------------------------------------------
# Settings

PRESETS = {     # defaults by size; what one does not have is the paper's
    "paper": {"resolution": None, "ch": 128, "ch_mult": [1, 2, 2, 2], "attn": [1],
              "num_res_blocks": 2, "dropout": 0.1, "steps": 300_000, "lr": 2e-4, "warmup": 5000,
              "ema": 0.9999, "save_every": 5000, "sample_every": 20_000, "log_every": 100,
              "dtype": "auto"},
    "small": {"resolution": 32, "ch": 64, "steps": 20_000, "warmup": 500, "ema": 0.999,
              "save_every": 500, "sample_every": 2000},
    "tiny": {"resolution": 16, "ch": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "steps": 4000,
             "lr": 5e-4, "warmup": 200, "ema": 0.999, "save_every": 500, "sample_every": 1000,
             "log_every": 50},
    "digits": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "steps": 2000, "lr": 1e-3,
               "warmup": 100, "ema": 0.999, "save_every": 500, "sample_every": 500,
               "log_every": 50, "dtype": "float32"},
}
IR = {          # --ir by data set; 100 for the others
    "digits": 20.0, "cub200": 10.0, "flowers102": 10.0,         # small ones
    "folder": 1.0, "imagenet-lt": 1.0, "inat2018": 1.0}         # as they are
RESUMABLE = {       # settings that may change when a run goes on
    "steps", "save_every", "keep_every", "sample_every", "log_every", "compile", "cuda_graphs",
    "device", "out", "data_dir", "pack_dir", "accumulate", "eval_every", "eval_num", "features"}
NETWORK_FLAGS = ("ch", "ch_mult", "attn", "num_res_blocks", "dropout")      # and networks.FLAGS
CM_ONLY = ("lam", "w_con", "w_div", "div_bound", "independent_dropout", "cm_fraction")


def make_parser():
    """All flags; those in PRESETS have their default filled in by `resolve`."""
    parser = Parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS,
                        help="sizes and lengths: paper; small, 32 pixels, hours on a CPU; tiny, 16 "
                        "pixels, minutes; flags of your own go before it (default: paper; "
                        "folder without a GPU: tiny; digits: digits)")
    add_training_data_flags(parser)
    add_method_flags(parser)
    add_network_flags(parser)
    add_optimisation_flags(parser)
    add_log_flags(parser)
    parser.add_common("folder of the run (default: out/ and a name made of the settings)")
    for action in parser._actions:
        if action.dest in PRESETS["paper"]:
            action.default = None
            if action.dest != "resolution":
                action.help += preset_words(str(PRESETS["paper"][action.dest]), {
                    name: preset.get(action.dest) for name, preset in PRESETS.items()})
        if action.dest == "ir":
            action.help += preset_words("100", IR)
    return parser


def preset_words(default, others):
    """The defaults of a flag, for --help; others: {preset or data set: its own one, or None}."""
    own = [f"{name}: {value}" for name, value in others.items()
           if value is not None and name != "paper"]
    return f" (default: {'; '.join([default, *own])})"


def add_training_data_flags(parser):
    """Which images, and what is done to them."""
    g = add_data_flags(parser)
    g.add_argument("--flip", action=BooleanOptionalAction, default=None,
                   help="mirror images at random (default: on, but never for digits)")
    g.add_argument("--resample", type=number(0, 10), default=1.0, metavar="Q",
                   help="+RS: draw class c with probability proportional to N_c^Q; 0 balanced, 0.5 "
                   "square root, 1 as it is (default: 1)")
    g.add_argument("--ada", type=number(0, 1), default=0.0, metavar="P",
                   help="+ADA: probability of each augmentation of augment.py, which also mirrors "
                   "half of the images; EDM has 0.12 (default: 0, none)")


def add_method_flags(parser):
    """The losses and their constants, CM, experts, LoRA."""
    g = parser.add_argument_group("method")
    g.add_argument("--base", choices=BASES, default="oc",
                   help="L_base of Eq. (4) (default: oc, the paper's choice)")
    g.add_argument("--cm", action=BooleanOptionalAction, default=True,
                   help="reserve capacity and add L_CM (default: on)")
    add_cm_flags(g)
    g.add_argument("--independent-dropout", action="store_true",
                   help="theta and theta^g see different dropout masks")
    g.add_argument("--cm-fraction", type=number(above=0, high=1), default=1.0,
                   help="share of a batch on which L_CM is evaluated, chosen at random so that "
                   "its expectation is the same; with 0.5 a step takes 1.37 in place of 1.73 "
                   "times the operations of one without CM (default: 1)")
    g.add_argument("--rank-ratio", type=number(above=0, high=1), default=0.1,
                   help="r / min(d, k) of Eq. (1) (default: 0.1)")
    g.add_argument("--cbdm-y", choices=("uniform", "train"), default="uniform",
                   help="how y' is drawn: uniformly, as in Eq. (D.1), or by class frequency, as in "
                   "CBDM's code (default: uniform)")
    # That of ct_double is a quarter of --steps
    add_own_flags(g, losses.FLAGS, [*map(losses.options_of, BASES.values()), {"ct_double": None}])
    g.add_argument("--experts", choices=("group",),
                   help="one low-rank expert for each of Many, Medium and Few, in place of CM's "
                   "one (default: none)")
    g.add_argument("--init-from", metavar="CKPT",
                   help="start from the EMA weights of a trained checkpoint")
    g.add_argument("--lora", action="store_true",
                   help="with --init-from: freeze its weights and train low-rank parts only, "
                   "without L_CM")


def add_own_flags(group, flags, options):
    """The flags of a table, losses.FLAGS or networks.FLAGS.

    options: {name: default} of each entry of BASES or NETWORKS.
    """
    defaults = {name: value for own in options for name, value in own.items()}
    for name, (kind, words) in flags.items():
        default = defaults[name]
        shown = "a quarter of --steps" if default is None else default
        group.add_argument(runtime.flag_of(name), type=kind, default=default,
                           help=f"{words} (default: {shown})")


def add_network_flags(parser):
    """Which network, and its size."""
    g = parser.add_argument_group("network")
    g.add_argument("--network", choices=NETWORKS, default="unet",
                   help="default: unet, the paper's")
    g.add_argument("--ch", type=integer(1, 65_536), help="base width")
    g.add_argument("--ch-mult", type=integer(1), nargs="+", metavar="M",
                   help="width of each level, as a multiple of --ch")
    g.add_argument("--attn", type=integer(0), nargs="*", metavar="L",
                   help="levels with attention, 0 the finest")
    g.add_argument("--num-res-blocks", type=integer(1, 1000), help="residual blocks per level")
    g.add_argument("--dropout", type=number(0, 0.99), help="dropout probability")
    add_own_flags(g, networks.FLAGS, map(networks.options_of, NETWORKS))


def add_optimisation_flags(parser):
    """Steps, batches, Adam, averaged weights."""
    g = parser.add_argument_group("optimisation")
    g.add_argument("--steps", type=integer(1), help="training steps; may be raised to train longer")
    g.add_argument("--batch-size", type=integer(1), default=64,
                   help="images per step, over all processes (default: 64)")
    g.add_argument("--accumulate", type=passes, default="auto", metavar="K",
                   help="passes per step, each over a K-th of the batch and of its memory; the "
                   "same step but for dropout masks (default: auto, the fewest whose memory is "
                   "there)")
    g.add_argument("--lr", type=number(above=0), help="Adam's learning rate after the warm-up")
    g.add_argument("--warmup", type=integer(0),
                   help="steps in which the learning rate rises linearly")
    g.add_argument("--grad-clip", type=number(above=0), default=1.0,
                   help="largest gradient norm (default: 1)")
    g.add_argument("--ema", type=number(0, 1),
                   help="decay of the averaged weights; (1 + s) / (10 + s) while smaller")
    g.add_argument("--label-drop", type=number(0, 1), default=0.1,
                   help="probability that an image's label is Null (default: 0.1)")
    runtime.add_compile_flag(g)
    g.add_argument("--cuda-graphs", action="store_true",
                   help="replay compiled steps as CUDA graphs, which a small batch should gain "
                   "from: its forward and backward pass, not the update; one GPU, one pass a step. "
                   "No GPU has seen it yet: compare the losses")


def passes(text):
    """An argparse type: a whole number of passes, or "auto"."""
    return text if text == "auto" else integer(1)(text)


def add_log_flags(parser):
    """How often something is written."""
    g = add_write_flags(parser)
    g.add_argument("--eval-every", type=integer(1), metavar="N",
                   help="steps between Frechet distances of samples, overall and per group, the "
                   "last step included (default: never)")
    g.add_argument("--eval-num", type=integer(2), default=2000, metavar="M",
                   help="class-balanced samples of --eval-every (default: 2000)")
    g.add_argument("--features", help="of --eval-every, as evaluate.py's: a network's name or a "
                   f"classifier's checkpoint (default: inception; digits: {DIGITS_CLASSIFIER})")


def add_write_flags(parser):
    """Steps between writes, the same for latent/; their defaults are each script's own."""
    g = parser.add_argument_group("output")
    g.add_argument("--save-every", type=integer(1), help="steps between writes of ckpt.pt")
    g.add_argument("--keep-every", type=integer(1),
                   help="steps between snapshots ckpt-STEP.pt, which are kept (default: none)")
    g.add_argument("--sample-every", type=integer(0),
                   help="steps between grids of samples, the last step included; 0: none")
    g.add_argument("--log-every", type=integer(1), help="steps between log lines")
    return g


def resolve(args, given=()):
    """Fill in the data set's defaults and the run's folder; check what depends on several flags.

    given: Parser.given. Raises UserError.
    """
    if args.preset is None:
        args.preset = default_preset(args)
    defaults = defaults_of(args)
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    check_batch_size(args)
    check_network(args, given)
    check_method(args, given)
    refuse_unused(given, unused_data_flags(args))
    if not args.eval_every:
        refuse_unused(given, dict.fromkeys(("eval_num", "features"), "belongs to --eval-every"))
    check_keep_every(args)
    if args.out is None:
        args.out = "out/" + run_name(args, defaults)
    return args


def check_keep_every(args):
    """Raise UserError where the run ends before its first snapshot."""
    if args.keep_every and args.keep_every > args.steps:
        raise UserError(f"--keep-every {args.keep_every}: the run has {args.steps} steps, and no "
                        "snapshot would be kept; take fewer")


def default_preset(args):
    """The preset where no flag names one. Raises UserError for a device that is not there."""
    if args.dataset == "digits":
        return "digits"
    on_cpu = runtime.find_device(args.device).type == "cpu"
    return "tiny" if on_cpu and args.dataset == "folder" else "paper"


def defaults_of(args):
    """{flag: its default} of the flags that depend on args.preset and args.dataset."""
    defaults = {**PRESETS["paper"], **PRESETS[args.preset], "ir": IR.get(args.dataset, 100.0)}
    if args.dataset not in READERS or not READERS[args.dataset].files:
        defaults["resolution"] = None           # the set has one of its own
    return defaults


def check_batch_size(args):
    """Raise UserError where processes and passes cannot share the batch equally."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    passes = 1 if args.accumulate == "auto" else args.accumulate
    if args.batch_size % (world * passes) == 0:
        return
    parts = []
    if world > 1:
        parts.append(f"{world} processes")
    if passes > 1:
        parts.append(f"--accumulate {passes}")
    raise UserError(f"--batch-size {args.batch_size}: not divisible by {' x '.join(parts)}; it "
                    "counts the images of all of them")


def check_cuda_graphs(args, rt):
    """Raise UserError where --cuda-graphs is asked for and cannot be had."""
    can = rt.device.type == "cuda" and rt.world == 1 and args.compile is not False
    if args.cuda_graphs and not (can and args.accumulate in ("auto", 1)):
        raise UserError("--cuda-graphs: for compiled steps of one pass (--accumulate 1) on one "
                        "CUDA device; leave it out")


def check_network(args, given):
    """Raise UserError where the network cannot be built as the flags say, or has no use for one."""
    if args.network == "unet":
        check_unet(args)
    own = networks.options_of(args.network)
    refuse_unused(given, {name: f"--network {args.network} has none"
                          for name in (*NETWORK_FLAGS, *networks.FLAGS) if name not in own})
    if args.ada and "augment_dim" not in own:
        raise UserError(f"--ada: --network {args.network} has no augment_dim, to be told what was "
                        "done to an image; leave it out")
    if args.experts and args.network != "unet":
        raise UserError(f"--experts: made for the U-Net, not for --network {args.network}")


def check_unet(args):
    """Raise UserError where the U-Net cannot be built as the flags say."""
    if args.ch % 2:
        raise UserError(f"--ch {args.ch}: must be even; take a multiple of 32")
    highest = len(args.ch_mult) - 1
    for level in args.attn:
        if level > highest:
            raise UserError(f"--attn {level}: --ch-mult has levels 0 to {highest} only")


def check_method(args, given):
    """Raise UserError for flags that mean nothing together.

    --lora is CM's network without L_CM; --experts takes the place of CM.
    """
    own = losses.options_of(BASES[args.base])
    refuse_unused(given, {name: f"belongs to another base than {args.base}"
                          for name in losses.FLAGS if name not in own})
    if args.ada:
        refuse_unused(given, {"flip": "--ada mirrors images itself, and tells the network"})
    if args.base not in ("cbdm", "rop"):
        refuse_unused(given, {"cbdm_y": f"--base {args.base} compares no other class"})
    if args.lora and not args.init_from:
        raise UserError("--lora: name the trained network that it starts from with --init-from "
                        "CKPT")
    if args.lora and args.experts:
        raise UserError("--experts: --lora trains CM's low-rank parts; leave one of the two out")
    if args.lora:
        refuse_unused(given, {"cm": "--lora is CM's network without L_CM",
                              **{name: "--lora has no L_CM" for name in CM_ONLY}})
        args.cm = True
        args.lam = 0.0
    if args.experts:
        if "cm" in given and args.cm:
            raise UserError("--cm: --experts takes its place; leave one of the two out")
        args.cm = False
    if not args.cm:
        unused = CM_ONLY if args.experts else (*CM_ONLY, "rank_ratio")
        refuse_unused(given, {name: "means something with --cm only" for name in unused})


def run_name(args, defaults):
    """A folder name made of the settings: data, IR, base, cm, seed, and what is not a default.

    defaults: of defaults_of. A run that an earlier version began keeps the name that it has.
    """
    dataset = args.dataset
    earlier = dataset
    if dataset == "folder":
        earlier = disk.path_id(args.data_dir)
        folder = Path(args.data_dir).resolve()
        dataset = disk.path_id(folder.parent if folder.name == "train" else folder)
    words = [args.base]
    if args.cm:
        words.append("cm")
    words.append(f"seed{args.seed}")
    if args.preset not in ("paper", args.dataset):
        words.append(args.preset)
    named = {"dataset", "ir", "base", "cm", "seed", "preset", "plugin"} | RESUMABLE
    defaults = {**vars(make_parser().parse_args([])), **defaults}
    for key, value in sorted(vars(args).items()):
        if key not in named and value != defaults[key]:
            shown = "_".join(map(str, value)) if isinstance(value, list) else value
            words.append(f"{key}{shown}")
    ratio = f"ir{args.ir:g}"
    earlier = "-".join([earlier, ratio, *words]).replace("/", "_")
    if Path("out", earlier, "ckpt.pt").exists():
        return earlier
    # With --ir 1 the ratio is that of the data themselves
    return "-".join([dataset, *([ratio] if args.ir != 1 else []), *words]).replace("/", "_")


# --------------------------------------------------------------------------------------------------
# Set-up

def resume(args):
    """(the run's checkpoint or None, the Runtime); its settings must be this command's."""
    old, rt = disk.resume(args, KINDS)
    fill_in_ct_double(args, old)
    rt.agree(old["step"] if old else 0, args.out)
    if old and is_one_network(old):
        raise UserError(f"--out {args.out}: its ckpt.pt is an export of sample.py, which has no "
                        "training to go on with; choose another folder")
    if old:
        plain = vars(make_parser().parse_args([]))
        config = config_of(args, old["config"])
        # What older runs, which have fewer settings, were
        size = "digits" if args.dataset == "digits" else "paper"
        defaults = {**plain, **PRESETS["paper"], **PRESETS[size], "preset": size,
                    "ir": IR.get(args.dataset, 100.0),
                    "init_from_sha256": config.get("init_from_sha256")}
        disk.refuse_changes(old["config"], config, args.out, defaults, RESUMABLE)
    if old and old["step"] > args.steps:
        raise UserError(f"--steps {args.steps}: the run in {args.out} is at step {old['step']} "
                        "already; raise it, or choose another folder with --out")
    return old, rt


def fill_in_ct_double(args, old):
    """The default of --ct-double, a quarter of the steps; a run that goes on keeps what it had."""
    if args.base == "consistency" and args.ct_double is None:
        args.ct_double = old["config"]["ct_double"] if old else max(1, args.steps // 4)


def is_finished(old, args, rt, samples=None):
    """Whether the run of a checkpoint has nothing left to do; says so. samples: see save_grid."""
    if not old or old["step"] < args.steps:
        return False
    if rt.rank == 0:
        save_due(old["step"], lambda: old, args, rt, samples=samples, missing_only=True)
    rt.print(f"{args.out}: finished, step {old['step']} of {args.steps}")
    return True


def lacks_distance(old, args, rt):
    """Whether a run with --eval-every was killed before the measurement at its last checkpoint."""
    if not old or not args.eval_every:
        return False
    log = Path(args.out) / "log.jsonl"
    has_it = rt.rank > 0 or any(has_record(log, old["step"], name) for name in FRECHET)
    return bool(rt.maximum(int(not has_it)))


def config_of(args, old=None):
    """The settings that a checkpoint keeps, with a hash of --init-from's file.

    old: the settings of the checkpoint that the run goes on from; it needs that file no more.
    """
    config = {k: v for k, v in vars(args).items() if k not in ("device", "out")}
    config["plugin"] = list(runtime.Plugins.found)
    if config.get("init_from"):         # stable_diffusion.py has no such flag
        there = Path(args.init_from).is_file()
        before = (old or {}).get("init_from_sha256")
        config["init_from_sha256"] = disk.sha256(args.init_from) if there else before
    return config


def network_settings(args, images):
    """The network of these flags for these images, what networks.build takes. Raises UserError."""
    resolution = images.images.shape[1]
    halvings = len(args.ch_mult) - 1
    if args.network == "unet" and resolution % 2 ** halvings:
        raise UserError(f"--ch-mult: {halvings + 1} levels halve the image {halvings} times, and "
                        f"{resolution} pixels cannot be; take fewer levels or another --resolution")
    return networks.settings_of(args.network, {
        **vars(args), "channels": images.images.shape[3], "num_classes": len(images.class_names),
        "size": resolution, "augment_dim": augment.DIM if args.ada else 0})


def make_network(args, network, low_rank, kind, old):
    """The network to train: initial weights, or those of --init-from or of the checkpoint `old`.

    low_rank: add_low_rank's arguments, a dict. kind: that of a checkpoint of this run.
    """
    torch.manual_seed(runtime.seed_of(args.seed, "init"))
    try:
        net = networks.build(network)
    except ValueError as e:
        if args.network != "unet":
            raise UserError(f"--network {args.network}: {e}") from e
        raise UserError(f"--ch {args.ch} with --ch-mult {args.ch_mult}: {e}; take a multiple of "
                        "32") from e
    if args.init_from and not old:
        start_from(net, args.init_from, kind)
    add_low_rank(net, **low_rank)
    if args.lora:
        freeze_all_but_low_rank(net)
    if old:
        if old["network"].get("augment_dim", 0) != network.get("augment_dim", 0):
            raise UserError(f"--ada: the run in {args.out} was started with the augmentations of "
                            "an older version; choose another folder with --out")
        net.load_state_dict(old["model"])
    return net


def start_from(net, path, kind):
    """Copy the merged EMA weights of a checkpoint of this kind into a plain network.

    Raises UserError where they do not fit.
    """
    source = load_network(disk.load(path, [kind], "--init-from"), flag=f"--init-from {path}")
    try:
        net.load_state_dict(source.state_dict())
    except RuntimeError as e:
        why = str(e).splitlines()[-1].strip()
        raise UserError(f"--init-from {path}: its network is another one ({why}); repeat its --ch, "
                        "--ch-mult, --attn, --num-res-blocks and data set") from e


def ema_samples(state, labels, rt, gather=True):
    """Images of a checkpoint's EMA weights with these labels, as sample.py makes them by default.

    Each from its own fixed noise; what generate returns.
    """
    net = load_network(state, device=rt.device)
    net = prepare(net, rt, image_shape(state), len(labels), batch_size=250)
    return generate(net, labels, range(len(labels)), image_shape(state), rt,
                    Sampling.of(state["kind"], seed=state["config"]["seed"]), title=None,
                    gather=gather)


def save_grid(state, path, rt, log=None, samples=None):
    """Generate EMA samples of up to ten classes on fixed noise: a PNG, and TensorBoard's copy.

    state: a checkpoint. log: a Log, or None for the PNG alone. samples(state, labels, rt): what
    generates them, None for ema_samples.
    """
    names = state["data"]["class_names"]
    classes = ten_classes(len(names))
    labels = classes * 10
    alone = runtime.Runtime(rt.device, rt.dtype)        # rank 0 generates all of it
    images = (samples or ema_samples)(state, labels, alone)
    picture = grid_image({"": (images, labels)}, names, state["data"]["class_counts"], classes)
    disk.write_png(path, picture)
    if log:
        log.picture(picture, state["step"])


def save_due(step, state, args, rt, log=None, samples=None, missing_only=False):
    """Write what is due at a step beside ckpt.pt: a snapshot that is kept, a grid of samples.

    state(): the checkpoint. samples: see save_grid. missing_only: what a run that was killed at
    this step did not get to.
    """
    snapshot = Path(args.out) / f"ckpt-{step:07d}.pt"
    grid = Path(args.out) / f"grid-{step:07d}.png"
    snapshot_due = args.keep_every and step % args.keep_every == 0
    grid_due = args.sample_every and (step % args.sample_every == 0 or step == args.steps)
    if snapshot_due and not (missing_only and snapshot.exists()):
        disk.save(snapshot, state())
    if grid_due and not (missing_only and grid.exists()):
        save_grid(state(), grid, rt, log, samples)


def make_objective(args, net, images):
    """The Objective that the flags ask for, of a network and its training images."""
    return Objective(
        net=net, base=bind(args.base, vars(args)), counts=images.counts,
        alphas_bar=make_alphas_bar(), cm=CMConfig.of(args), label_drop=args.label_drop,
        ada=args.ada, y_prime=args.cbdm_y)


def choose_passes(args, rt, objective, batches, old):
    """Say what memory a step needs; with --accumulate auto, set args.accumulate to what fits.

    old: the checkpoint that the run goes on from, or None: its passes are kept where they fit,
    since dropout masks depend on them. Raises UserError where not even one image fits.
    """
    x_0, y = batches.at(0)

    def loss_of(n):
        with rt.autocast():
            return objective(draw_batch(x_0, y, objective, seed=args.seed, step=0,
                                        parts=args.batch_size // n))[0]
    images = args.batch_size // rt.world
    need = budget.measure_memory(objective, loss_of, images)
    free = budget.free_memory(rt.device)
    asked = args.accumulate
    if asked == "auto":
        fewest = budget.passes_that_fit(need, images, free) if free is not None else 1
        # The same on every rank; more than `images` where one rank has no room
        fewest = rt.maximum(fewest or images + 1)
        before = old["config"].get("accumulate", 1) if old else 1
        args.accumulate = before if before > fewest and images % before == 0 else fewest
        if fewest > images:
            raise UserError(f"--accumulate auto: one image needs {budget.in_words(need.of(1))} and "
                            f"{budget.in_words(free)} are free; take a smaller --ch, --resolution "
                            f"or --preset, or --accumulate {images} to try it nevertheless")
    n = images // args.accumulate
    words = f"memory: about {budget.in_words(need.of(n))} for a pass of {n} images"
    if free is not None:
        words += f", {budget.in_words(free)} are free"
    if free is not None and asked != "auto" and need.of(n) > free:
        words += f"; warning: that may not fit; --accumulate {2 * asked} needs less"
    if asked == "auto" and args.accumulate > 1:
        words += (f"; each step takes {args.accumulate} passes (--accumulate {args.accumulate}), "
                  "the same step")
    rt.print(words)


def make_training(args, rt, net, images, record, old):
    """The Training of a network, at the step of the checkpoint `old` or at 0."""
    params = {n: p for n, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(params.values(), lr=args.lr, betas=(0.9, 0.999), fused=True)
    meter = Meter(images.counts, images.class_names, rt.device)

    def weights():
        return {"model": net.state_dict(), "ema": {**dict(net.named_parameters()), **training.ema}}
    training = Training(args, rt, params, optimizer, meter, record, weights)
    training.start(old)
    return training


def announce(training, net, compiled):
    """Print what is about to be trained, how and where."""
    args = training.args
    rt = training.rt
    names = {n: p.numel() for n, p in net.named_parameters()}
    low_rank = sum(n for name, n in names.items() if name.rsplit(".", 1)[-1] in ("A", "B"))
    words = [f"network: {sum(names.values()) - low_rank:,} parameters"]
    if args.lora:
        words.append(", frozen")
    if low_rank:
        what = "of experts" if args.experts else "reserved"
        words.append(f" + {low_rank:,} {what} (A, B)")
    words.append(f"; {rt.device}, {args.dtype}, {rt.processes()}")
    if compiled:
        words.append(", compiled")
    rt.print("".join(words))
    rt.print("config: " + " ".join(f"{k}={v}" for k, v in training.record["config"].items()))
    verb = "resuming" if training.step else "starting"
    rt.print(f"{verb} {args.out} at step {training.step} of {args.steps}")


def announce_data(images, groups, rt):
    """Print the sizes of the classes and of their groups, and whether there is no long tail."""
    sizes = [f"; {name} {images.counts[classes].sum():,}" for name, classes in groups.items()]
    rt.print(images.summary() + "".join(sizes))
    if images.counts.min() == images.counts.max():
        rt.print("note: all classes are equally large, and so none is rare; --ir 100 makes the set "
                 "long-tailed")


def main():
    """Resume or start; data; network; loop."""
    parser = make_parser()
    args = resolve(parser.parse_args(), parser.given)
    old, rt = resume(args)
    check_cuda_graphs(args, rt)
    if "preset" not in parser.given and rt.device.type == "cpu" and args.preset != "digits":
        rt.print(f"no GPU: --preset {args.preset}, {args.steps:,} steps of --ch {args.ch}; here "
                 "paper takes weeks, small hours, tiny minutes")

    # Data
    with rt.rank_0_first():
        images = load_long_tailed(args, old)
    if old:
        refuse_other_data(old["data"], images.record(), args)
    if not lacks_distance(old, args, rt) and is_finished(old, args, rt):
        return
    groups = class_groups(images.counts)
    announce_data(images, groups, rt)
    batches = Batches(images, args.batch_size, args.seed, rt.device, resample=args.resample)
    flip = images.flip if args.flip is None else args.flip
    flip = flip and not args.ada            # which mirrors them itself

    # Network and objective
    if args.experts and not groups:
        raise UserError("--experts group: fewer than three classes have no Many, Medium and Few")
    kind = "consistency" if args.base == "consistency" else "diffusion"
    network = network_settings(args, images)
    low_rank = {"rank_ratio": args.rank_ratio if args.cm or args.experts else None,
                "experts": images.counts.tolist() if args.experts else None}
    net = make_network(args, network, low_rank, kind, old)
    net.to(rt.device, memory_format=torch.channels_last)
    objective = make_objective(args, net, images).to(rt.device)
    choose_passes(args, rt, objective, batches, old)
    check_cuda_graphs(args, rt)     # again: --accumulate auto has become a number
    config = config_of(args, old and old["config"])
    record = {"kind": kind, "command": runtime.command_line("train.py"), "config": config,
              "data": images.record(), "network": network, **low_rank}
    training = make_training(args, rt, net, images, record, old)
    evaluation = Evaluation(args, rt, kind, record["data"]) if args.eval_every else None
    if evaluation:
        record["features_sha256"] = evaluation.extractor.sha256
        if old and old.get("features_sha256", record["features_sha256"]) != (
                record["features_sha256"]):
            raise UserError(f"--features: the distances in {args.out}/log.jsonl are in those of "
                            "another file; name that one, or choose another folder with --out")

    # Loop
    def batch(step, k):
        x_0, y = batches.at(step)
        part = rt.rank * args.accumulate + k
        return draw_batch(x_0, y, objective, seed=args.seed, step=step, part=part,
                          parts=rt.world * args.accumulate, flip=flip)
    module, warning = compiled(objective, batch, training, graphs=args.cuda_graphs)
    announce(training, net, compiled=module is not objective)
    with disk.lock(args.out, rt=rt):
        run_loop(training, rt.parallel(module), batch, old, evaluation, warning)


def compiled(objective, batch, training, graphs=False):
    """(the Objective as --compile says, a warning or None): see runtime.compile_or_not.

    batch(step, k): see train_step. graphs: --cuda-graphs.
    """
    if not runtime.wants_compile(training.args, training.rt):
        return objective, None
    return runtime.compile_or_not(
        objective, lambda m: m(batch(training.step, 0))[0], training.rt, graphs)


class Evaluation:
    """--eval-every: Frechet distances of EMA samples to the reference, overall and per group.

    The reference is evaluate.py's; its features are computed once. Raises UserError where they
    cannot be.
    """

    def __init__(self, args, rt, kind, data):
        self.args = args
        self.rt = rt
        self.data = data
        names = data["class_names"]
        self.labels = np.arange(args.eval_num) % len(names)
        features = DIGITS_CLASSIFIER if args.dataset == "digits" else "inception"
        self.extractor = Extractor(args.features or features, rt)
        self.extractor.refuse_other_size(data["resolution"])
        self.name = FRECHET[0] if self.extractor.inception else FRECHET[1]
        with rt.rank_0_first():
            images, words = load_reference(args.dataset, args.data_dir, None, data["resolution"],
                                           args.pack_dir)
        self.real_labels = to_classes(images.labels, images.class_names, names, "--data-dir")
        rt.print(f"every {args.eval_every:,} steps {self.name} of {args.eval_num:,} samples "
                 f"({sampling_in_words(Sampling.of(kind).record())}) against {args.dataset}, "
                 f"{words}, {len(images.labels):,} images, in features of {self.extractor.name}")
        self.real, _ = self.extractor.extract(lambda rows: to_rgb(images.images[rows]),
                                              len(images.labels), "features of the reference")

    def is_due(self, step):
        """Whether it is done after this step."""
        return step % self.args.eval_every == 0 or step == self.args.steps

    def measure(self, state, log):
        """Generate and measure, on all ranks, and log the numbers; state: a checkpoint."""
        images = ema_samples(state, self.labels.tolist(), self.rt, gather=False)
        fake, _ = self.extractor.extract(lambda rows: to_rgb(images[rows]), len(images),
                                         "features of samples", shared=False)
        if self.rt.rank > 0:
            return
        found = self.distances(fake)
        words = [f"{key.partition('_')[2] or 'all'} {value:.3g}" for key, value in found.items()]
        self.rt.print(f"step {state['step']}/{self.args.steps}  {self.name} "
                      f"({len(self.labels):,} samples): {', '.join(words)}")
        log.write(state["step"], {**found, "eval_num": len(self.labels)})

    def distances(self, fake):
        """{name: Frechet distance} of features (N, D) of samples, overall and per group."""
        device = self.rt.device if self.rt.device.type == "cuda" else "cpu"
        fake, real = (placed(features, device) for features in (fake, self.real))
        found = {self.name: distance_of(fake, real)}
        for group, classes in class_groups(self.data["class_counts"]).items():
            own = [np.isin(labels, classes) for labels in (self.labels, self.real_labels)]
            if min(rows.sum() for rows in own) > 1:
                found[f"{self.name}_{group}"] = distance_of(fake[own[0]], real[own[1]])
        return found

    def make_up(self, state, log):
        """Measure what a run that was killed after this checkpoint did not get to."""
        missing = self.rt.rank == 0 and not log.has(state["step"], self.name)
        if self.is_due(state["step"]) and self.rt.maximum(int(missing)):
            self.measure(state, log)


def run_loop(training, module, batch, old, evaluation, warning, samples=None):
    """The loop, with the snapshots, grids and distances that the flags ask for.

    evaluation: an Evaluation, or None. warning: for the log, or None. samples: see save_grid.
    """
    args, rt = training.args, training.rt
    log = start_log(training)
    if log and warning:
        log.warn(training.step, warning)
    if old and rt.rank == 0:
        save_due(old["step"], lambda: old, args, rt, log, samples, missing_only=True)
    if old and evaluation:
        evaluation.make_up(old, log)

    def after_step():
        if rt.rank == 0:
            save_due(training.step, training.state, args, rt, log, samples)
        if evaluation and evaluation.is_due(training.step):
            evaluation.measure(training.state(), log)
    loop(training, module, batch, log, after_step)


if __name__ == "__main__":
    run(main)
