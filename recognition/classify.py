"""Classification with ResNet-18: long-tailed recognition with and without CM (Sec. G.11), generated
images as training data (Sec. G.5), and feature networks to use in place of Inception.

    python -m recognition.classify --dataset cifar100 --ir 100 --loss ldam [--cm]   # Table G.13
    python -m recognition.classify --dataset cifar100 --extra SAMPLES.npz           # Table G.8
    python -m recognition.classify --dataset digits     # the demo's feature network, half a minute

It trains on the long-tailed training set (--ir; 1: every image) and reports top-1 accuracy, macro
precision and macro recall on the balanced test set. The folder of a run holds ckpt.pt (a plain
ResNet-18, CM merged: what `evaluate.py --features` takes), result.json and TensorBoard events. The
same command resumes a stopped run.
"""
import math
from argparse import BooleanOptionalAction
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import disk
import runtime
from cm_layers import FORMS, merge
from data import (Batches, ImageSet, add_data_flags, data_flags, load, to_classes, to_float,
                  unused_data_flags)
from loop import RESUMABLE, Training, config_of, is_finished, load_images, loop, resume
from losses import CMConfig, add_cm_flags
from recognition.resnet import (DISTANCES, LOSSES, NORMS, STAGES, ClassifierLoss,
                                load_classifier, make_reserved, refuse_narrow)
from runtime import Parser, UserError, integer, number, run
from sets.readers import READERS, NoSuchSplit
from sets.samples import images_of_npz, open_npz, read_record

CM_ONLY = ("w_con", "w_div", "div_bound", "distance")
RESERVED = ("reserve", "rank_ratio", "scale", "form", "norms", "lam")   # what --cm needs as well
SHORT = {"weight_decay": 5e-4, "schedule": "onecycle", "nesterov": True}
PRESETS = {     # defaults by size: the field's recipe; for images as those of train.py's presets
    "paper": {"resolution": None, "epochs": 200, "steps": None, "weight_decay": 2e-4,
              "schedule": "steps", "nesterov": False, "width": 64},
    "small": {**SHORT, "resolution": 32, "epochs": None, "steps": 3000, "width": 32},
    "tiny": {**SHORT, "resolution": 16, "epochs": None, "steps": 1000, "width": 16},
    "digits": {**SHORT, "resolution": None, "epochs": 30, "steps": None, "width": 16},
}
RECIPES = {     # defaults by what is followed
    # The authors' release where the paper is silent about CM; with and without it all else is equal
    "ours": {"distance": "kl", "rank_ratio": 0.15, "scale": 0.8, "norms": "apart", "form": "flat",
             "reserve": [*STAGES]},
    # The release, whose last layer is normalised and reserved, too; its form is not known
    "release": {"distance": "kl", "rank_ratio": 0.15, "scale": 0.8, "norms": "apart",
                "form": "kernel", "reserve": [*STAGES, "fc"], "weight_decay": 5e-4,
                "schedule": "tenths"},
}


# --------------------------------------------------------------------------------------------------
# Settings

def make_parser():
    """All flags; those in PRESETS and RECIPES have their default filled in by `resolve`."""
    parser = Parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS,
                        help="the defaults that have several values below, and the resolution of "
                        "train.py's preset; tiny: minutes on a CPU (default: paper; folder without "
                        "a GPU: tiny; digits: digits)")
    g = add_data_flags(parser, dataset="digits", ir=1)
    g.add_argument("--extra", metavar="FILE",
                   help="an .npz of generated images, added to the training set")
    g = parser.add_argument_group("method")
    g.add_argument("--recipe", choices=RECIPES, default="ours",
                   help="what is followed: with release the optimisation is also the authors' "
                        "release's (default: ours)")
    g.add_argument("--loss", choices=LOSSES, default="ce",
                   help="cross-entropy, LDAM or logit adjustment (default: ce)")
    g.add_argument("--tau", type=number(0), default=1.0, help="of --loss la (default: 1)")
    g.add_argument("--drw", action="store_true",
                   help="weigh classes by effective number over the last fifth of the training")
    g.add_argument("--cm", action="store_true", help="reserve capacity and add L_CM")
    g.add_argument("--reserve", nargs="+", choices=(*STAGES, "fc"),
                   help="where; conv1 is the stem, fc the last layer, which is then normalised "
                        '(default: all but fc, "the convolutional layers" of Sec. G.11; '
                        "release: all)")
    g.add_argument("--rank-ratio", type=number(above=0, high=1),
                   help="r / min(d, k) of Eq. (1) (default: 0.15)")
    g.add_argument("--scale", type=number(above=0), help="factor of BA (default: 0.8)")
    g.add_argument("--form", choices=FORMS,
                   help="how a convolution is a matrix, as train.py's (default: flat; release: "
                        "kernel)")
    g.add_argument("--norms", choices=NORMS,
                   help="batch norm of theta and theta^g (default: apart)")
    add_cm_flags(g, div_bound=0.0)
    g.add_argument("--distance", choices=DISTANCES,
                   help="D between theta and theta^g (default: kl)")
    g = parser.add_argument_group("training")
    runtime.add_with_defaults(g.add_mutually_exclusive_group(), {}, {
        "epochs": (integer(1), "passes over the training set (paper: 200; digits: 30)"),
        "steps": (integer(1), "in place of --epochs: as many steps for any number of images "
                  "(small: 3000; tiny: 1000)")})
    runtime.add_with_defaults(g, {"batch_size": 128, "lr": 0.1, "save_every": 10}, {
        "batch_size": (integer(1), "images per step, over all processes"),
        "lr": (number(above=0), "largest learning rate"),
        "weight_decay": (number(0), "SGD's (default: 0.0005; paper: 0.0002)"),
        "width": (integer(1, 4096), "channels of the first stage; 64 is ResNet-18 (default: 64; "
                  "small: 32; digits, tiny: 16)"),
        "save_every": (integer(1), "epochs between checkpoints")})
    g.add_argument("--schedule", choices=("steps", "tenths", "onecycle"),
                   help="of the learning rate (default: onecycle; paper: steps; release: tenths)")
    g.add_argument("--nesterov", action=BooleanOptionalAction, default=None,
                   help="Nesterov momentum (default: on; paper: off)")
    runtime.add_compile_flag(g)
    parser.add_common("folder of the run (default: out/classifier-DATASET, and the settings that "
                      "are not the defaults)")
    parser.set_defaults(accumulate=1, lr_decay=True)    # every schedule depends on the last step
    return parser


def resolve(args, given=()):
    """Fill in the data set's defaults and the run's folder. Raises UserError for an unused flag.

    given: Parser.given.
    """
    usual = "digits" if args.dataset == "digits" else "paper"
    if args.preset is None:
        on_cpu = runtime.find_device(args.device).type == "cpu"
        args.preset = "tiny" if args.dataset == "folder" and on_cpu else usual
    defaults = {**PRESETS[args.preset], **RECIPES[args.recipe]}
    if args.epochs or args.steps:
        defaults.update(epochs=None, steps=None)
    if args.dataset not in READERS or not READERS[args.dataset].files:
        defaults["resolution"] = None           # the set has one of its own
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.out is None:
        args.out = default_folder(args, {**defaults, "preset": usual})
    if not args.cm:
        args.reserve = []
    unused = unused_data_flags(args)
    if args.loss != "la":
        unused["tau"] = "belongs to --loss la, which adds the prior"
    if not args.cm:
        unused.update(dict.fromkeys((*RESERVED, *CM_ONLY), "belongs to --cm"))
    elif not args.lam:
        unused.update(dict.fromkeys(CM_ONLY, "--lam 0 has no L_CM"))
    runtime.refuse_unused(given, unused)
    if args.extra and Path(args.extra).is_file():
        args.extra_sha256 = disk.sha256(args.extra)
    return args


def default_folder(args, defaults):
    """out/classifier-DATASET, and each setting that is not the default.

    defaults: {flag: value} of those that depend on the data set and the recipe.
    """
    defaults = {**vars(make_parser().parse_args([])), **defaults}
    words = [disk.path_id(args.data_dir) if args.dataset == "folder" else args.dataset]
    for key, value in sorted(vars(args).items()):
        if key not in {"dataset", "plugin", "device", *RESUMABLE} and value != defaults[key]:
            words.append(key + ("_".join(value) if isinstance(value, list) else str(value)))
    return "out/" + "-".join(["classifier", *words]).replace("/", "_")


# --------------------------------------------------------------------------------------------------
# Data

class Sets(NamedTuple):
    """The images of a run."""
    real: ImageSet              # for training, without generated images
    train: ImageSet             # for training, all of them
    test: ImageSet | None       # None where the data set has no test images


def load_sets(args, rt, old=None):
    """The Sets that these flags describe. Raises UserError for a class without test images.

    old: the checkpoint that the run goes on from, or None.
    """
    real = load_images(args, rt, old)
    with rt.rank_0_first():
        try:
            test = load(args.dataset, args.data_dir, "test", args.resolution, real.class_names,
                        args.pack_dir)
        except NoSuchSplit:
            test = None
    train = real
    if args.extra:
        train = with_extra(real, args.extra)
        if not read_record(args.extra, "--extra"):
            names = real.class_names
            rt.print(f"note: --extra {args.extra}: without the .json of sample.py beside it; its "
                     f"labels are numbers: 0 is {names[0]}, ... {len(names) - 1} is {names[-1]}")
    if test is not None and not test.counts.all():
        name = test.class_names[int(np.argmin(test.counts))]
        raise UserError(f"--dataset {args.dataset}: class {name} has no test image")
    return Sets(real, train, test)


def lacking_in_words(counts, names):
    """Which classes have fewer images, of counts (C,), than the largest one; "" where none has."""
    lacking = counts.max() - counts
    order = [c for c in np.argsort(-lacking, kind="stable") if lacking[c]]
    if not order:
        return ""
    words = [f"{names[c]} {lacking[c]:,}" for c in order[:10]] + ["..."] * (len(order) > 10)
    return (f"note: still fewer images than the largest class, by: {', '.join(words)}; "
            f"to fill them: python sample.py --ckpt CKPT --fill-to {counts.max()}")


def with_extra(images, path):
    """The ImageSet `images` and, after them, the generated ones of an .npz (arr_0, arr_1).

    Those have the shape and the classes of `images`. Where sample.py left its .json beside the
    file, the classes are matched by their names. Raises UserError.
    """
    extra, labels = images_of_npz(open_npz(path, "--extra"), path, "--extra")
    H, W, channels = images.images.shape[1:]
    fits = extra.shape[1:3] == (H, W) and extra.shape[3] in (channels, 3)
    if not len(extra) or not fits:
        raise UserError(f"--extra {path}: arr_0 is of shape {list(extra.shape)}; it must be "
                        f"N x {H} x {W} x 3")
    if labels is None:
        raise UserError(f"--extra {path}: it has no arr_1, the labels of its images")
    names = read_record(path, "--extra").get("data", {}).get("class_names")
    labels = to_classes(labels, names, images.class_names, f"--extra {path}")
    if channels == 1 and (extra != extra[..., :1]).any():
        raise UserError(f"--extra {path}: images in colour, and {images.name} is grey")
    return replace(images, images=np.concatenate([images.images, extra[..., :channels]]),
                   labels=np.concatenate([images.labels, labels.astype(np.int64)]))


# --------------------------------------------------------------------------------------------------
# Training

class ClassifierTraining(Training):
    """A run with SGD's schedule, without clipping and averaged weights.

    A checkpoint's "model" is merged, what its readers want; "reserved" is what was trained.
    """
    averages = False
    broadcast_buffers = True        # batch norm's running statistics
    max_base = math.inf

    def weights(self):
        merged = make_reserved(self.record["network"], **low_rank_of(self.args))
        merged.load_state_dict(self.net.state_dict())
        reserved = {"reserved": self.net.state_dict()} if self.args.cm else {}
        plain = {name: value for name, value in merge(merged).state_dict().items()
                 if ".general." not in name}        # theta's batch norm alone
        return {"model": plain, **reserved}

    def learning_rate(self, step):
        """That of a step, by --schedule.

        "steps": five epochs of linear warm-up, then x 0.01 from 80 % and x 0.0001 from 90 % of the
        training on (epochs 160 and 180 of 200, as in LDAM's code). "tenths": the same with x 0.1
        and x 0.01 from 60 % and 80 % on (epochs 120 and 160, as the authors' release). "onecycle":
        torch's OneCycleLR without its momentum.
        """
        args, total = self.args, self.args.steps
        if args.schedule == "onecycle":
            rise = 0.3 * (total + 1) - 1
            if step <= rise:
                start, end, share = args.lr / 25, args.lr, step / rise
            else:
                start, end, share = args.lr, args.lr / 25e4, (step - rise) / (total - rise)
            return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
        first, second, drop = (0.8, 0.9, 1e-2) if args.schedule == "steps" else (0.6, 0.8, 1e-1)
        drops = (step >= first * total) + (step >= second * total)
        warmup = min(5 * args.steps_per_epoch, total // 4)
        return args.lr * drop ** drops * min(1.0, (step + 1) / max(1, warmup))

    def check_weights(self):
        """Raise UserError where weights or running statistics are not finite."""
        if not all(value.isfinite().all() for value in self.net.state_dict().values()):
            raise UserError(f"stopped at step {self.step}: the weights are not finite; lower --lr")


def low_rank_of(args):
    """What of the settings make_reserved takes."""
    return {"stages": args.reserve, "rank_ratio": args.rank_ratio, "scale": args.scale,
            "form": args.form, "norms": args.norms}


def make_training(sets, args, rt, config, old):
    """The ClassifierTraining of a run, at its start or where the checkpoint `old` is."""
    network = {"channels": sets.train.images.shape[3], "num_classes": len(sets.train.class_names),
               "width": args.width, "normed": args.loss == "ldam" or "fc" in args.reserve}
    torch.manual_seed(runtime.seed_of(args.seed, "init"))
    net = make_reserved(network, **low_rank_of(args))
    if old:
        net.load_state_dict(old["reserved" if args.cm else "model"])
    net.to(rt.device, memory_format=torch.channels_last).train()
    objective = ClassifierLoss(
        net=net, loss=args.loss, counts=sets.train.counts, reserved=args.reserve,
        cm=CMConfig.of(args), tau=args.tau, distance=args.distance, flip=sets.train.flip,
        drw_from=0.8 * args.steps if args.drw else math.inf).to(rt.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9,
                                weight_decay=args.weight_decay, nesterov=args.nesterov)
    record = {"kind": "classifier", "network": network, "config": config,
              "command": runtime.command_line("-m recognition.classify"),
              "data": sets.real.record()}
    batches = Batches(sets.train, args.batch_size, args.seed, rt.device)
    return ClassifierTraining(args, rt, net, objective, batches, optimizer, record, old)


# --------------------------------------------------------------------------------------------------
# The report

@torch.no_grad()
def predict(net, images, rt, batch_size=500):
    """The classes that the network (in eval mode) predicts for an ImageSet: (N,)."""
    N = len(images.labels)
    predicted = []
    for rows in np.array_split(np.arange(N), max(1, N // batch_size)):
        x = torch.from_numpy(np.array(images.images[rows])).to(rt.device)
        predicted.append(net(to_float(x)).argmax(1).cpu().numpy())
    return np.concatenate(predicted)


GROUP_RULE = "over 100 / 20 to 100 / under 20 training images"


def recognition_groups(counts):
    """{"Many", "Medium", "Few"}: the classes of over 100, 20 to 100, under 20 training images.

    counts (C,). Empty groups are left out. The paper does not name Table G.13's rule, but its
    numbers do: "Overall" is the mean of the groups, weighted 30 / 31 / 39 at IR 200 and 35 / 35 /
    30 at IR 100, which are this rule's numbers of classes.
    """
    counts = np.asarray(counts)
    masks = {"Many": counts > 100, "Medium": (counts >= 20) & (counts <= 100), "Few": counts < 20}
    return {name: np.flatnonzero(mask).tolist() for name, mask in masks.items() if mask.any()}


def scores(predicted, labels, groups, class_names):
    """Scores in per cent: {"accuracy", "precision", "recall" (both macro), "groups", "classes"}.

    groups: {name: classes}. Of each group and class there is the accuracy. A class that is never
    predicted has precision 0. On a balanced test set accuracy equals recall.
    """
    C = len(class_names)
    matrix = np.bincount(labels * C + predicted, minlength=C * C).reshape(C, C)     # rows: true
    correct, images = matrix.diagonal(), matrix.sum(1)

    def accuracy(classes):
        return {"accuracy": float(100 * correct[classes].sum() / images[classes].sum())}
    return {"accuracy": float(100 * correct.sum() / images.sum()),
            "precision": 100 * float(np.mean(correct / np.maximum(matrix.sum(0), 1))),
            "recall": 100 * float(np.mean(correct / images)),
            "groups": {name: accuracy(classes) for name, classes in groups.items()},
            "classes": {name: accuracy([c]) for c, name in enumerate(class_names)}}


def report(sets, args, rt, settings):
    """Measure the network of a finished run's checkpoint; writes result.json."""
    path = Path(args.out) / "ckpt.pt"
    net, ckpt = load_classifier(path, rt.device, "--out")
    num = len(sets.train.labels)
    train_accuracy = float((predict(net, sets.train, rt) == sets.train.labels).mean())
    result = {"command": ckpt["command"], "train_accuracy": 100 * train_accuracy,
              "settings": settings, "num": num, "num_real": 0, "classes": {}, "groups": {}}
    print(f"accuracy {train_accuracy:.1%} on {num:,} training images")
    if sets.test is not None:
        groups = recognition_groups(sets.real.counts)
        result.update(scores(predict(net, sets.test, rt), sets.test.labels, groups,
                             sets.real.class_names), num_real=len(sets.test.labels))
        words = [f"{name} {group['accuracy']:.2f}" for name, group in result["groups"].items()]
        words += [f"overall {result['accuracy']:.2f}",
                  f"macro precision {result['precision']:.2f}", f"recall {result['recall']:.2f}"]
        print(f"test accuracy {'  '.join(words)}  (% of {result['num_real']:,} images; classes of "
              f"{GROUP_RULE})")
    disk.write_json(path.with_name("result.json"), result)
    print(f"wrote {path.parent}: ckpt.pt, result.json")


def main():
    """Settings, data, training; then the merged network is measured on the test set."""
    parser = make_parser()
    args = resolve(parser.parse_args(), parser.given)
    old, rt = resume(args, ["classifier"], () if args.cm else (*RESERVED, *CM_ONLY))
    refuse_narrow(args.width, rt.device)
    config = config_of(args)
    sets = load_sets(args, rt, old)

    N = len(sets.train.labels)
    args.steps_per_epoch = max(1, N // args.batch_size)
    if args.epochs:             # over all images, the generated ones as well
        args.steps = max(1, args.epochs * N // args.batch_size)
    args.save_every *= args.steps_per_epoch
    args.log_every = args.steps_per_epoch
    args.keep_every = args.sample_every = None
    args.grad_clip = math.inf
    if not is_finished(old, args, rt):
        method = args.loss + (f" + CM on {' '.join(args.reserve)}" if args.cm else "")
        rt.print(sets.real.table(recognition_groups(sets.real.counts), GROUP_RULE))
        more = f" and {N - len(sets.real.labels):,} generated images" if args.extra else ""
        rt.print(f"training on these{more}: {method}{', DRW' if args.drw else ''}")
        if args.extra and (words := lacking_in_words(sets.train.counts, sets.train.class_names)):
            rt.print(words)
        if sets.test is None:
            rt.print("note: the set has no test images, so only the accuracy on the training "
                     "images is measured; of a folder, `python data.py split` makes test/")
        loop(make_training(sets, args, rt, config, old))

    # A result is of these settings and of this content of the data
    settings = {**{k: v for k, v in config.items() if k == "steps" or k not in RESUMABLE},
                "data_sha256": sets.real.sha256, "test_sha256": sets.test and sets.test.sha256}
    result = Path(args.out) / "result.json"
    if rt.rank == 0 and not disk.up_to_date(result, settings):
        report(sets, args, rt, settings)
    if args.extra:
        name = result.resolve().parent.name
        runtime.print_next("-m", "pages.report", "--row", f"{name}={result}")
    else:
        preset = ["--preset", args.preset] if "preset" in parser.given else []
        runtime.print_next("train.py", *data_flags(config), *preset)


if __name__ == "__main__":
    run(main)
