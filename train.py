"""Train a class-conditional diffusion model on long-tailed data, with or without CM.

    torchrun train.py --dataset cifar100 --ir 100               # the paper's CM (on OC), one GPU
    torchrun --nproc_per_node=8 train.py --dataset cifar100     # the same run on eight GPUs
    python train.py --dataset digits                            # minutes on a laptop
    python train.py --dataset digits --base ddpm --no-cm        # the plain baseline
    python train.py --dataset cifar100 --recipe release         # CM as its authors released it
    python train.py --dataset folder --data-dir DIR --latents NAME      # images of 256 pixels

--batch-size counts the images of all processes. The defaults are the paper's (Sec. 4.1, G.1);
digits, and folders of images where there is no GPU, have others (see PRESETS and RECIPES). A run
leaves ckpt.pt, config.json, log.jsonl, TensorBoard events and grids of samples in its folder. The
same command resumes a stopped run, bit for bit on a CPU.
"""
from argparse import BooleanOptionalAction
from functools import partial
from pathlib import Path

import numpy as np
import torch

import cm_layers
import disk
import losses
import networks
import runtime
from data import (Batches, add_data_flags, class_groups, is_balanced, load_reference, note_on_num,
                  to_classes, to_rgb, unused_data_flags)
from loop import (FRECHET, RESUMABLE, Training, add_step_flags, add_write_flags, config_of,
                  is_finished, load_images, loop, resume)
from losses import BASES, CMConfig, Objective, add_cm_flags, bind
from model import Attention, init_layer, make_alphas_bar
from networks import KINDS, NETWORKS, add_low_rank, load_merged
from runtime import Parser, UserError, integer, number, refuse_unused, run
from sample import generate, make_fast
from samplers import Sampling
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
             "log_every": 50, "dtype": "float32"},      # bfloat16 is no faster at this size
    "digits": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "steps": 2000, "lr": 1e-3,
               "warmup": 100, "ema": 0.999, "save_every": 500, "sample_every": 500,
               "log_every": 50, "dtype": "float32"},
}
RECIPES = {     # defaults by what is followed; what one does not have is as in "ours"
    "ours": {"w_div": 1.0, "div_bound": 0.01, "independent_dropout": "none", "reserve": "all",
             "form": "flat",
             # Without a flag: whether the labels of a batch are dropped together, the warm-up's
             # numerator at step 0, whether --ema rises to its value, and the gain of the initial
             # weights of the attention's output
             "drop_batch": False, "warmup_from": 1, "ema_ramp": True, "attention_gain": 1e-5},
    "paper": {"div_bound": 0.0},        # Eq. (2) as printed
    # The authors' release; --preset paper on CIFAR-10: 200,000 steps. sample.py has its sampler
    "release": {"w_div": 0.2, "div_bound": 0.0, "independent_dropout": "all", "reserve": "conv3x3",
                "form": "kernel", "drop_batch": True, "warmup_from": 0, "ema_ramp": False,
                "attention_gain": 1.0},
}
IR = {          # --ir by data set; 100 for the others
    "digits": 20.0, "cub200": 10.0, "flowers102": 10.0,         # small ones
    "folder": 1.0, "imagenet-lt": 1.0, "inat2018": 1.0}         # as they are
LATENT_RESOLUTION = 256         # of image files with --latents, and that of miniSD
NETWORK_FLAGS = ("ch", "ch_mult", "attn", "num_res_blocks", "dropout")      # and networks.FLAGS
CM_ONLY = ("lam", "w_con", "w_div", "div_bound", "equal_weights", "independent_dropout",
           "cm_fraction")


def make_parser():
    """All flags; those in PRESETS and RECIPES have their default filled in by `resolve`."""
    parser = Parser(__doc__)
    parser.add_argument("--recipe", choices=RECIPES, default="ours",
                        help="whose choices, where they differ (default: ours)")
    parser.add_argument("--preset", choices=PRESETS,
                        help="the defaults that have several values below; small: hours on a CPU; "
                        "tiny: minutes (default: paper; folder without a GPU: tiny; digits: "
                        "digits)")

    g = add_data_flags(parser)
    g.add_argument("--flip", action=BooleanOptionalAction, default=None,
                   help="mirror images at random (default: on, but never for digits)")
    g.add_argument("--resample", type=number(0, 10), default=1.0, metavar="Q",
                   help="+RS: draw class c in proportion to N_c^Q; 0: balanced (default: 1)")
    g.add_argument("--ada", type=number(0, 1), default=0.0, metavar="P",
                   help="+ADA: probability of each augmentation; EDM has 0.12 (default: 0)")
    g.add_argument("--latents", metavar="NAME",
                   help="train on latents of an autoencoder: a checkpoint of latent.text_to_image "
                   "autoencoder, or a folder or hub name of diffusers (stabilityai/sd-vae-ft-mse); "
                   f"images have {LATENT_RESOLUTION} pixels by default and are not mirrored")

    g = parser.add_argument_group("method")
    g.add_argument("--base", choices=BASES, default="oc",
                   help="L_base of Eq. (4) (default: oc, the paper's choice, which is made for "
                   "guidance: without it its FD on digits is ten times that of ddpm)")
    g.add_argument("--cm", action=BooleanOptionalAction, default=True,
                   help="reserve capacity and add L_CM (default: on)")
    add_cm_flags(g)
    g.add_argument("--equal-weights", action="store_true",
                   help="all classes weigh the same in L_CM, not as in Eq. (3)")
    g.add_argument("--independent-dropout", choices=losses.DROPOUT, nargs="?", const="decoder",
                   help="where theta and theta^g have masks of their own (default: none; "
                   "release: all)")
    g.add_argument("--cm-fraction", type=number(above=0, high=1), default=1.0,
                   help="share of the batch, chosen at random, that L_CM is evaluated on "
                   "(default: 1)")
    g.add_argument("--rank-ratio", type=number(0, 1), default=0.1,
                   help="r / min(d, k) of Eq. (1); 0: nothing is reserved, and theta^g differs "
                   "by its dropout masks alone (default: 0.1)")
    g.add_argument("--reserve", choices=networks.RESERVE,
                   help="which of the decoder's matrices Eq. (1) splits (default: all; release: "
                   "conv3x3)")
    g.add_argument("--form", choices=cm_layers.FORMS,
                   help="how a convolution is a matrix, out x (in kh kw) or (out kh) x (in kw) "
                   "(default: flat; release: kernel)")
    g.add_argument("--cbdm-y", choices=("uniform", "train"), default="uniform",
                   help="how y' is drawn; Eq. (D.1): uniform; CBDM's code: by the class sizes of "
                   "train (default: uniform)")
    defaults = {name: default for base in BASES.values()
                for name, default in losses.options_of(base).items()}
    # loop.resume fills in ct_double
    runtime.add_with_defaults(g, {**defaults, "ct_double": None}, losses.FLAGS)
    g.add_argument("--experts", choices=("group",),
                   help="a low-rank expert for each of Many, Medium and Few, not CM's one")
    g.add_argument("--init-from", metavar="CKPT",
                   help="start from the EMA weights of a trained checkpoint")
    g.add_argument("--lora", action="store_true",
                   help="with --init-from: train low-rank parts only, without L_CM")

    g = parser.add_argument_group("network")
    g.add_argument("--network", choices=NETWORKS, default="unet",
                   help="the paper's is the first (default: unet)")
    g.add_argument("--ch", type=integer(1, 65_536), help="base width")
    g.add_argument("--ch-mult", type=integer(1), nargs="+", metavar="M",
                   help="widths of the levels, in --ch")
    g.add_argument("--attn", type=integer(0), nargs="*", metavar="L",
                   help="levels with attention, 0 the finest")
    g.add_argument("--num-res-blocks", type=integer(1, 1000), help="residual blocks per level")
    g.add_argument("--dropout", type=number(0, 0.99), help="dropout probability")
    defaults = {name: default for network in NETWORKS
                for name, default in networks.options_of(network).items()}
    runtime.add_with_defaults(g, defaults, networks.FLAGS)
    g.add_argument("--recompute", action="store_true",
                   help="blocks compute anew in the backward pass: half of the memory, slower")

    g = parser.add_argument_group("optimisation")
    g.add_argument("--steps", type=integer(1), help="training steps; may be raised to train longer")
    add_step_flags(g)
    g = add_write_flags(parser)
    g.add_argument("--eval-every", type=integer(1), metavar="N",
                   help="steps between Frechet distances of samples (default: never)")
    g.add_argument("--eval-num", type=integer(2), default=2000, metavar="M",
                   help="class-balanced samples of --eval-every (default: 2000)")
    g.add_argument("--features", help="of --eval-every, as evaluate.py's: a network's name or a "
                   "classifier's checkpoint (default: inception; digits: the demo's classifier)")

    parser.add_common("folder of the run (default: out/ and a name made of the settings)")
    for action in parser._actions:
        if action.dest in PRESETS["paper"]:
            action.default = None
            if action.dest != "resolution":
                action.help += preset_words(str(PRESETS["paper"][action.dest]), {
                    name: preset.get(action.dest) for name, preset in PRESETS.items()})
        if action.dest in RECIPES["ours"]:
            action.default = None
        if action.dest == "ir":
            action.help += preset_words("100", IR)
    return parser


def preset_words(default, others):
    """The defaults of a flag, for --help; others: {preset or data set: its own one, or None}."""
    names = {}          # {value: who has it}
    for name, value in others.items():
        if value is not None and name != "paper":
            names.setdefault(str(value).removesuffix(".0"), []).append(name)
    own = [f"{', '.join(who)}: {value}" for value, who in names.items()]
    return f" (default: {'; '.join([default, *own])})"


def resolve(args, given=()):
    """Fill in the data set's defaults and the run's folder; check what depends on several flags.

    given: Parser.given. Raises UserError.
    """
    if args.preset is None:
        on_cpu = runtime.find_device(args.device).type == "cpu"
        tiny = args.dataset == "folder" and on_cpu
        args.preset = "digits" if args.dataset == "digits" else "tiny" if tiny else "paper"
    defaults = {**PRESETS["paper"], **PRESETS[args.preset], "ir": IR.get(args.dataset, 100.0),
                **RECIPES["ours"], **RECIPES[args.recipe]}
    if (args.recipe, args.preset, args.dataset) == ("release", "paper", "cifar10"):
        defaults["steps"] = 200_000
    if args.latents:
        defaults["resolution"] = LATENT_RESOLUTION
    if args.dataset not in READERS or not READERS[args.dataset].files:
        defaults["resolution"] = None           # the set has one of its own
    for key, value in defaults.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    check_flags(args, given)
    if args.out is None:
        args.out = "out/" + run_name(args, defaults)
    if args.init_from and Path(args.init_from).is_file():   # a run that goes on needs it no more
        args.init_from_sha256 = disk.sha256(args.init_from)
    return args


def check_flags(args, given):
    """Raise UserError for flags that do nothing, or mean nothing together.

    --lora is CM's network without L_CM; --experts takes the place of CM.
    """
    if args.lora and not args.init_from:
        raise UserError("--lora: name the network that it starts from with --init-from CKPT")
    if args.lora and args.experts:
        raise UserError("--experts: --lora trains CM's low-rank parts; leave one of the two out")
    if args.experts and args.cm and "cm" in given:
        raise UserError("--cm: --experts takes its place; leave one of the two out")
    if args.lora:
        args.cm, args.lam = True, 0.0
    if args.experts:
        args.cm = False
    refuse_unused(given, unused_flags(args))
    if args.network == "unet" and any(level >= len(args.ch_mult) for level in args.attn):
        raise UserError(f"--attn {max(args.attn)}: --ch-mult has levels 0 to "
                        f"{len(args.ch_mult) - 1} only")
    if args.network != "unet" and args.cm and args.reserve != "all":
        raise UserError(f"--reserve {args.reserve}: made for the U-Net, not for --network "
                        f"{args.network}; take --reserve all")
    shares_masks = not args.dropout or args.independent_dropout == "none"
    if args.lam and not args.rank_ratio and shares_masks:
        raise UserError("--rank-ratio 0: theta and theta^g are then the same; give them "
                        "different masks with --independent-dropout and --dropout")
    if args.latents and args.base == "consistency":
        raise UserError("--base consistency: made for pixels, not for --latents")


def unused_flags(args):
    """{flag's name: why it does nothing}, of the flags beside each other."""
    network, base = networks.options_of(args.network), losses.options_of(BASES[args.base])
    unused = {name: f"--network {args.network} has none"
              for name in (*NETWORK_FLAGS, *networks.FLAGS) if name not in network}
    unused |= {name: f"belongs to another base than {args.base}"
               for name in losses.FLAGS if name not in base}
    unused |= unused_data_flags(args)
    if args.network != "unet":
        unused["experts"] = f"made for the U-Net, not for --network {args.network}"
    if "augment_dim" not in network:
        unused["ada"] = (f"--network {args.network} has no augment_dim, to be told what was done "
                         "to an image")
    if args.ada:
        unused["flip"] = "--ada mirrors images itself, and tells the network"
    if args.latents:
        unused |= dict.fromkeys(("flip", "ada"), "--latents encodes each image once, as it is")
    if args.base not in ("cbdm", "rop"):
        unused["cbdm_y"] = f"--base {args.base} compares no other class"
    if args.lora:
        unused |= dict.fromkeys(("cm", *CM_ONLY), "--lora is CM's network without L_CM")
    if not args.rank_ratio:
        unused |= dict.fromkeys(("reserve", "form"), "--rank-ratio 0 reserves nothing")
    if not args.cm:
        unused |= dict.fromkeys((*CM_ONLY, "reserve", "form"), "means something with --cm only")
        if not args.experts:
            unused["rank_ratio"] = "means something with --cm or --experts only"
    if not args.eval_every:
        unused |= dict.fromkeys(("eval_num", "features"), "belongs to --eval-every")
    return unused


def run_name(args, defaults):
    """A folder name made of the settings: data, IR, base, cm, seed, and what is not a default.

    defaults: {flag: value} of those that depend on the preset and the data set.
    """
    dataset = args.dataset
    if dataset == "folder":
        folder = Path(args.data_dir).resolve()
        dataset = disk.path_id(folder.parent if folder.name == "train" else folder)
    words = [dataset]
    if args.ir != 1:                    # else the ratio is that of the data themselves
        words.append(f"ir{args.ir:g}")
    words.append(args.base)
    if args.cm:
        words.append("cm")
    words.append(f"seed{args.seed}")
    if args.preset not in ("paper", args.dataset):
        words.append(args.preset)
    if args.recipe != "ours":
        words.append(args.recipe)
    named = {"dataset", "ir", "base", "cm", "seed", "preset", "recipe", "plugin", "device", "out",
             *RESUMABLE}
    defaults = {**vars(make_parser().parse_args([])), **defaults}
    for key, value in sorted(vars(args).items()):
        if key not in named and value != defaults[key]:
            shown = "_".join(map(str, value)) if isinstance(value, list) else value
            words.append(f"{key}{shown}")
    return "-".join(words).replace("/", "_")


# --------------------------------------------------------------------------------------------------
# The space of x_0, the network

def make_space(args, images, rt, ckpt):
    """What x_0 is, pixels or latents: (its shape (C, H, W), to_image, Batches, {key: value}).

    to_image: what makes images of it, None for pixels. The last one is what a checkpoint says of
    latents. ckpt: the checkpoint that the run goes on or starts from, or None. Raises UserError,
    also where ckpt was trained on the latents of another autoencoder.
    """
    _, H, W, C = images.images.shape
    given = (args.batch_size, args.seed, rt.device)
    if not args.latents:
        return (C, H, W), None, Batches(images, *given, resample=args.resample), {}
    from latent.autoencoder import LatentBatches, encode_once, load_autoencoder
    autoencoder = load_autoencoder(args.latents, rt.device, ckpt=ckpt)
    moments = encode_once(autoencoder, images, args, rt)
    batches = LatentBatches(images, moments, *given, resample=args.resample)
    return autoencoder.latent_shape(H), autoencoder.decode, batches, {
        "kind": "latent diffusion", "autoencoder_sha256": autoencoder.encoder_sha256}


def make_network(args, images, shape, old, source):
    """(the network to train, what a checkpoint says of it): for the plain settings see networks.py.

    shape: (C, H, W) of its x_0. Its weights are initial ones, or the averaged ones of the
    checkpoint `source`, of --init-from, or those of the checkpoint `old`. Raises UserError.
    """
    channels, resolution, _ = shape
    halvings = len(args.ch_mult) - 1
    if args.network == "unet" and resolution % 2 ** halvings:
        raise UserError(f"--ch-mult: {halvings + 1} levels halve the image {halvings} times, and "
                        f"{resolution} pixels cannot be; take fewer levels or another --resolution")
    if args.experts and not class_groups(images.counts):
        raise UserError("--experts group: fewer than three classes have no Many, Medium and Few")
    settings = networks.settings_of(args.network, {
        **vars(args), "channels": channels, "num_classes": len(images.class_names),
        "size": resolution, "augment_dim": augment.DIM if args.ada else 0})
    reserves = args.rank_ratio and (args.cm or args.experts)
    low_rank = {"rank_ratio": args.rank_ratio if reserves else None,
                "experts": images.counts.tolist() if args.experts else None,
                "form": args.form, "where": args.reserve}
    torch.manual_seed(runtime.seed_of(args.seed, "init"))
    try:
        net = networks.build(settings)
    except ValueError as e:
        raise UserError(f"--network {args.network}: {e}; see --ch, and --ch-mult or --patch") from e
    for layer in net.modules():
        if isinstance(layer, Attention) and args.attention_gain != 1e-5:
            init_layer(layer.proj, args.attention_gain)
    if source:
        if source["data"]["class_names"] != images.class_names:
            raise UserError(f"--init-from {args.init_from}: trained on other classes, or in "
                            "another order; repeat its data set and its --class-order")
        try:
            net.load_state_dict(load_merged(source, flag="--init-from").state_dict())
        except RuntimeError as e:
            raise UserError(f"--init-from {args.init_from}: its network is another one ("
                            f"{str(e).splitlines()[-1].strip()}); repeat its --ch, --ch-mult, "
                            "--attn, --num-res-blocks and data set") from e
    add_low_rank(net, **low_rank)       # after the weights of --init-from, which are a plain net's
    if args.lora:
        freeze_all_but_low_rank(net)
    if old:
        net.load_state_dict(old["model"])
    return net, {"network": settings, **low_rank}


def ema_samples(shape, to_image, state, labels, rt, gather=True):
    """Images of a checkpoint's EMA weights with these labels, as sample.py makes them by default.

    Each from its own fixed noise; what generate returns. shape, to_image: see sample.space_of.
    """
    net = make_fast(load_merged(state, device=rt.device), rt, shape, len(labels), batch_size=250)
    config = state["config"]
    sampling = Sampling.of(state["kind"], config["recipe"], seed=config["seed"])
    return generate(net, labels, range(len(labels)), shape, rt, sampling, title=None, gather=gather,
                    to_image=to_image)


class Evaluation:
    """--eval-every: Frechet distances of EMA samples to the reference, overall and per group.

    Reference, features and distances are evaluate.py's. samples: as loop's, with `gather`. old: the
    checkpoint that the run goes on from, or None.
    """

    def __init__(self, training, samples, old):
        from metrics.features import DIGITS_CLASSIFIER, Extractor
        self.args = args = training.args
        self.rt = rt = training.rt
        self.samples = samples
        self.data = data = training.record["data"]
        names = data["class_names"]
        if note := note_on_num(args.eval_num, len(names), "--eval-num"):
            rt.print(note)
        self.labels = np.arange(args.eval_num) % len(names)
        own = DIGITS_CLASSIFIER if args.dataset == "digits" else "inception"
        self.extractor = Extractor(args.features or own, rt)
        self.extractor.refuse_other_size((data["resolution"],) * 2, "--dataset")
        if old and old.get("features_sha256", self.extractor.sha256) != self.extractor.sha256:
            raise UserError(f"--features: the distances in {args.out}/log.jsonl are in those of "
                            "another file; name that one, or choose another folder with --out")
        training.record["features_sha256"] = self.extractor.sha256
        self.name = FRECHET[0] if self.extractor.inception else FRECHET[1]
        with rt.rank_0_first():
            images, words = load_reference(args.dataset, args.data_dir, None, data["resolution"],
                                           args.pack_dir)
        self.real_labels = to_classes(images.labels, images.class_names, names, "--data-dir")
        self.real, _ = self.extractor.extract(lambda rows: to_rgb(images.images[rows]),
                                              len(images.labels), "features of the reference")
        rt.print(f"every {args.eval_every:,} steps {self.name} of {args.eval_num:,} samples "
                 f"against {args.dataset}, {words}, {len(images.labels):,} images, in features of "
                 f"{self.extractor.name}")

    def __call__(self, training, log):
        """Where it is due, generate on all ranks, measure and log. log: a loop.Log, or None."""
        if training.step % self.args.eval_every and training.step != self.args.steps:
            return
        from metrics.scores import LEAST_REAL, distance_of, placed, weights_of
        images = self.samples(training.state(), self.labels.tolist(), self.rt, gather=False)
        fake, _ = self.extractor.extract(lambda rows: to_rgb(images[rows]), len(images),
                                         "features of samples", shared=False)
        if not log:
            return
        counts = self.data["class_counts"]
        groups = {"": range(len(counts)),
                  **({} if is_balanced(counts) else class_groups(counts))}
        fake, real = (placed(features, self.rt.device) for features in (fake, self.real))
        found = {}
        for group, classes in groups.items():
            f, r = (np.isin(labels, classes) for labels in (self.labels, self.real_labels))
            if f.sum() > 1 and r.sum() >= LEAST_REAL:
                name = f"{self.name}_{group}" if group else self.name
                found[name] = distance_of(fake[f], real[r], weights_of(self.real_labels[r]))
        words = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
        self.rt.print(f"step {training.step}/{self.args.steps}  {words} ({len(self.labels):,} "
                      "samples)")
        log.write(training.step, {**found, "eval_num": len(self.labels)})


# --------------------------------------------------------------------------------------------------

def main():
    """Settings, data, network, objective, loop."""
    parser = make_parser()
    args = resolve(parser.parse_args(), parser.given)
    old, rt = resume(args, KINDS)
    if rt.device.type == "cpu" and "preset" not in parser.given and args.preset != "digits":
        rt.print(f"no GPU: --preset {args.preset}, {args.steps:,} steps of --ch {args.ch}; here "
                 "paper takes weeks, small hours, tiny minutes")

    starts = args.init_from and not old
    source = disk.load(args.init_from, KINDS, "--init-from") if starts else None
    images = load_images(args, rt, old, source)
    if is_finished(old, args, rt):
        return
    rt.print(images.table())
    if images.counts.min() == images.counts.max():
        rt.print("note: all classes are equally large, and so none is rare; --ir 100 makes the set "
                 "long-tailed")

    shape, to_image, batches, space = make_space(args, images, rt, old or source)
    net, described = make_network(args, images, shape, old, source)
    net.to(rt.device, memory_format=torch.channels_last)
    if args.recompute:
        networks.recompute(net)
    flip = images.flip if args.flip is None else args.flip
    objective = Objective(
        net=net, base=bind(args.base, vars(args)), counts=images.counts,
        alphas_bar=make_alphas_bar(), cm=CMConfig.of(args), label_drop=args.label_drop,
        drop_batch=args.drop_batch, flip=flip and not args.ada and not args.latents, ada=args.ada,
        y_other=args.cbdm_y).to(rt.device)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=args.lr,
                                 betas=(0.9, 0.999), fused=True)
    record = {"kind": "consistency" if args.base == "consistency" else "diffusion",
              "command": runtime.command_line("train.py"), "config": config_of(args),
              "data": images.record(), **described, **space}
    training = Training(args, rt, net, objective, batches, optimizer, record, old)
    samples = partial(ema_samples, shape, to_image)
    evaluation = Evaluation(training, samples, old) if args.eval_every else None
    loop(training, samples, evaluation)


if __name__ == "__main__":
    run(main)
