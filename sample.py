"""Generate class-balanced images from a checkpoint, or export its merged weights.

    python sample.py --ckpt out/NAME/ckpt.pt --classes 6-9 --num 64   # samples.npz, .json, grid.png
    python sample.py --ckpt out/NAME/ckpt.pt --branch general         # theta^g alone, without BA
    python sample.py --ckpt out/NAME/ckpt.pt --classes null           # p(x | Null), Sec. 2.1
    python sample.py --ckpt out/NAME/ckpt.pt --export merged.pt       # theta as a plain U-Net
    python sample.py --ckpt out/NAME/ckpt.pt --export merged.safetensors  # its weights, for others
    python sample.py --ckpt out/NAME/ckpt.pt --export DIR --format diffusers        # for diffusers

Image i is a pure function of (checkpoint, --seed, --dtype, i): its label is the i-th of the classes
in turn, its noise is drawn from (seed, i), so the batch size and the number of processes change
nothing. samples.npz has the layout of the ADM evaluator: arr_0 N x H x W x 3 uint8 (grey images
repeated), arr_1 N labels; without arr_1 where no class was asked for.
"""
import json
import re
import shutil
import textwrap
import time
from argparse import BooleanOptionalAction
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

import disk
import runtime
from data import by_size, class_groups, data_flags, resolve_classes, to_rgb, to_uint8
from model import make_alphas_bar
from networks import KINDS, is_one_network, load_merged
from runtime import Parser, UserError, integer, number, refuse_unused, run
from samplers import LAST_STEPS, SAMPLERS, STEPS, Sampling, to_range

COMPILED_FROM = 2000        # images per process: fewer take less time than compiling does


# --------------------------------------------------------------------------------------------------
# Images of a network

def guided(net, y, omega, rt):
    """predict(x_t, t) with classifier-free guidance, eps + omega (eps - eps_null).

    y: (N,) labels. omega 0 skips the second pass.
    """
    null = torch.full_like(y, -1)

    def predict(x, t):
        t = torch.full_like(y, t)
        with rt.autocast():
            eps = net(x, t, y).float()
            if omega:
                eps = eps + omega * (eps - net(x, t, null).float())
        return eps
    return predict


@torch.no_grad()
def sample_batch(net, y, indices, shape, rt, sampling, alphas_bar=None):
    """One batch of images: float (N, C, H, W), about [-1, 1].

    y: (N,) int64 labels on rt.device. indices: N image numbers. shape: (C, H, W). Image i's noise
    comes from (seed, i), drawn on the CPU, so that every device generates the same image.
    alphas_bar: the schedule that the network was trained with, None for make_alphas_bar's.
    """
    generators = [runtime.generator("cpu", sampling.seed, "image", int(i)) for i in indices]

    def noise():
        parts = [torch.randn(shape, generator=g) for g in generators]
        return torch.stack(parts).to(rt.device)
    if alphas_bar is None:
        alphas_bar = make_alphas_bar()
    x_T = noise().contiguous(memory_format=torch.channels_last)
    predict = guided(net, y, sampling.guidance, rt)
    limit = to_range if sampling.clip else None
    own = {"ddim": {"eta": sampling.eta, "last_step": sampling.last_step},
           "dpm": {"order": sampling.order}}.get(sampling.sampler, {})
    return SAMPLERS[sampling.sampler](predict, x_T, alphas_bar, sampling.timesteps(alphas_bar),
                                      noise, limit, **own)


def make_fast(net, rt, shape, num, batch_size):
    """A network without gradients made fast for `generate`, in place; the one to be called.

    The weights that autocast would cast in every call are cast once, to the same numbers. On CUDA
    it is compiled where num images are worth it. shape: (C, H, W). batch_size: generate's.
    """
    if rt.dtype != torch.float32:
        for layer in net.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and not is_parametrized(layer):
                layer.to(rt.dtype)
    if rt.device.type != "cuda" or num < COMPILED_FROM * rt.world:
        return net
    size = min(batch_size, -(-num // rt.world))
    x = torch.zeros(size, *shape, device=rt.device).contiguous(memory_format=torch.channels_last)
    zeros = torch.zeros(size, dtype=torch.int64, device=rt.device)
    with torch.no_grad():
        return runtime.compile_or_not(net, lambda m: m(x, zeros, zeros).sum(), rt)[0]


def batches_of(rows, batch_size, fixed):
    """Cut the rows (n,) into batches: a list of (rows of a batch, how many of them count).

    fixed: every batch has the same size, that of the first, which compiled code and cuDNN's choice
    of algorithms need; the last one is filled up with rows that do not count.
    """
    if not fixed:
        parts = np.array_split(rows, max(1, -(-len(rows) // batch_size)))
        return [(part, len(part)) for part in parts if len(part)]
    size = min(batch_size, len(rows))
    parts = [rows[i:i + size] for i in range(0, len(rows), max(1, size))]
    return [(np.resize(part, size), len(part)) for part in parts]


def generate(net, labels, indices, shape, rt, sampling, batch_size=250, title="sampling",
             gather=True, to_image=None, alphas_bar=None, keep_in=None):
    """Images number `indices` with these labels (lists of N ints): uint8 (N, H, W, C).

    On rank 0; None elsewhere. Each process generates a contiguous share in batches, and returns
    that share if gather is False. sampling: a Sampling. title: of the progress bar, None for no
    bar. to_image: what makes images of the network's x_0, where that is a latent. alphas_bar: see
    sample_batch. keep_in: a folder for the finished batches, and those of an earlier call, perhaps
    with another batch size or number of processes, are taken from there; None: nothing is kept.
    Raises UserError, in every process, where an image of one of them is not finite.
    """
    found = {}              # row: its image
    for path in keep_in.glob("*.npz") if keep_in else []:
        with np.load(path) as f:
            found.update(enumerate(f["images"], int(f["first"])))
    if found:
        rt.print(f"going on from image {len(found):,} of {len(labels):,}")
    share = np.array_split(np.arange(len(labels)), rt.world)[rt.rank]
    batches = batches_of(share, batch_size, fixed=rt.device.type == "cuda")
    hidden = rt.rank > 0 or not title
    parts = []
    finite = True
    with runtime.progress(total=len(share), desc=title, unit="img", disable=hidden) as bar:
        for rows, n in batches:
            if all(r in found for r in rows):
                images = np.stack([found[r] for r in rows[:n]])
            else:
                y = torch.tensor([labels[r] for r in rows], device=rt.device, dtype=torch.int64)
                x = sample_batch(net, y, [indices[r] for r in rows], shape, rt, sampling,
                                 alphas_bar)[:n]
                x = x if to_image is None else to_image(x)
                finite = bool(x.isfinite().all())
                if not finite:
                    break
                images = to_uint8(x).cpu().numpy()
                if keep_in:
                    disk.write_npz(keep_in / f"{rows[0]}-{rows[n - 1]}.npz", first=rows[0],
                                   images=images)
            parts.append(images)
            bar.update(n)
    if rt.maximum(int(not finite), rt.patient):
        raise UserError("--ckpt: its network generates images with numbers that are not finite; it "
                        "was not trained, or the run has diverged")
    if gather:
        return rt.gather(parts)
    empty = np.empty((0, *shape[1:], shape[0]), np.uint8)
    return np.concatenate(parts or [empty])


def space_of(ckpt, device, latents=None):
    """((C, H, W) of a network's x_0, what makes images of it: None where it is one).

    Latents are decoded by the autoencoder that they were made with. latents: where that is; None:
    where it was in training. Raises UserError where it is gone, or another one is there.
    """
    size = ckpt["data"]["resolution"]
    if ckpt["kind"] != "latent diffusion":
        if latents:
            raise UserError(f"--latents {latents}: this checkpoint's network generates pixels; "
                            "leave it out")
        return (ckpt["network"]["channels"], size, size), None
    from latent.autoencoder import load_autoencoder
    autoencoder = load_autoencoder(latents or ckpt["config"]["latents"], device, ckpt=ckpt)
    return autoencoder.latent_shape(size), autoencoder.decode


# --------------------------------------------------------------------------------------------------
# Pictures and files

def ten_classes(C):
    """At most ten of C class numbers, evenly spread."""
    return sorted({round(i * (C - 1) / 9) for i in range(10)})


def grid_image(columns, class_names, counts, classes=None, across=10, down=1, caption=""):
    """A picture with one row per class, the most frequent one first: its name, its first images.

    columns: {title: (images, labels)}, side by side: uint8 (N, H, W, C) of one size, and (N,).
    counts: training images per class, shown beside the name, with a bracket for each of Many,
    Medium and Few; None where they are not known. classes: the rows; by default at most ten evenly
    spread ones of which every column has images. across, down: at most so many images of a class
    beside and below each other. Images are enlarged by a whole factor, to about 56 pixels.
    caption: a line below.
    """
    columns = {title: (images, np.asarray(labels)) for title, (images, labels) in columns.items()}
    if classes is None:
        common = sorted(set.intersection(*(set(labels.tolist()) for _, labels in columns.values())))
        classes = [common[i] for i in ten_classes(len(common))]
    if counts is not None:
        classes = sorted(classes, key=lambda c: (-counts[c], c))     # as class_groups
    most = max(int((labels == c).sum()) for _, labels in columns.values() for c in classes)
    across = min(across, most)
    down = min(down, -(-most // across))

    # Where everything is, in pixels
    file = Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf"       # has more scripts than Pillow's
    font, small = (ImageFont.truetype(file, height) for height in (16, 13))
    letters = FT2Font(file).get_charmap()

    def name_of(c):
        name = printable(class_names[c])[:60]
        name = name if letters.keys() >= set(map(ord, name)) else f"class {c}"
        return name if counts is None else f"{name} ({counts[c]})"
    names = [name_of(c) for c in classes]
    groups = class_groups(counts) if counts is not None else {}
    margin = 100 if groups else 8
    left = 12 + margin + max(round(font.getlength(name)) for name in names)
    pixels = next(iter(columns.values()))[0].shape[1]
    size = pixels * max(1, round(56 / pixels))
    cell = size + 4
    height = down * cell                                    # of a class
    top = 30 if any(columns) else 0                         # titles
    bottom = top + len(classes) * height
    widths = [max(across * cell, round(font.getlength(title))) for title in columns]
    right = left + sum(widths) + 24 * (len(widths) - 1)
    lines = textwrap.wrap(caption, max(60, (right - left) // 7))
    right = max([right, *(left + round(small.getlength(line)) + 8 for line in lines)])

    picture = Image.new("RGB", (right, bottom + (18 * len(lines) + 6 if lines else 0)), "white")
    pen = ImageDraw.Draw(picture)
    for name, members in groups.items():
        rows = [r for r, c in enumerate(classes) if c in members]
        if rows:                                            # a bracket, and what it stands for
            y_0, y_1 = top + rows[0] * height + 3, top + (rows[-1] + 1) * height - 7
            pen.text((8, (y_0 + y_1) // 2), name, fill="black", anchor="lm", font=font)
            pen.line([(88, y_0), (82, y_0), (82, y_1), (88, y_1)], "black", 2)
    for r, name in enumerate(names):
        where = (margin, top + r * height + (height - 4) // 2)
        pen.text(where, name, fill="black", anchor="lm", font=font)
    x = left
    for width, (title, (images, labels)) in zip(widths, columns.items()):
        if title:
            pen.text((x, top // 2), title, fill="black", anchor="lm", font=font)
        for r, c in enumerate(classes):
            chosen = np.flatnonzero(labels == c)[:across * down]
            for k, image in enumerate(to_rgb(images[chosen])):
                enlarged = Image.fromarray(image).resize((size, size), Image.NEAREST)
                y = top + r * height + k // across * cell
                picture.paste(enlarged, (x + k % across * cell, y))
        x += width + 24
    for k, line in enumerate(lines):
        pen.text((left, bottom + 18 * k + 4), line, fill="black", font=small)
    return picture


def printable(text):
    """A text with "_" for what cannot be printed: control characters, names that are not UTF-8."""
    return "".join(c if c.isprintable() else "_" for c in str(text))


def write_pngs(images, labels, class_names, folder):
    """One PNG per image, FOLDER/<class number>-<class name>/<image number>.png.

    A name's separators become "_", and it ends after 100 bytes: no name leads out of the folder.
    """
    for i, (image, c) in enumerate(zip(images, labels)):
        name = re.sub(r"[/\\]", "_", printable(class_names[c]))
        name = name.encode()[:100].decode(errors="ignore")
        path = folder / (name if c < 0 else f"{c:04d}-{name}") / f"{i:06d}.png"
        disk.write_png(path, Image.fromarray(image.squeeze()))


def write_samples(out, images, labels, record, data, seconds, png=False):
    """Write samples.npz, grid.png, with png one file per image in png/, and samples.json.

    images: (N, H, W, C) uint8. labels: a list of N. record, data: what made them, and the record of
    the training data. samples.json goes first and comes last: it names the content of samples.npz.
    """
    names, counts = data["class_names"], data.get("class_counts")
    arrays = {"arr_0": to_rgb(images), "arr_1": np.array(labels)}
    if labels[0] == -1:             # --classes null
        names, counts = ["null"], None
        del arrays["arr_1"]
    (out / "samples.json").unlink(missing_ok=True)
    disk.write_npz(out / "samples.npz", **arrays)
    classes = list(dict.fromkeys(labels))
    disk.write_png(out / "grid.png", grid_image({"": (images, labels)}, names, counts,
                                                None if len(classes) > 10 else classes))
    if png:
        disk.write_folder(out / "png", lambda folder: write_pngs(images, labels, names, folder),
                          "samples", "--png", class_names=names if "arr_1" in arrays else None)
    disk.write_json(out / "samples.json", {
        "settings": record, "data": data, "npz_sha256": disk.sha256(out / "samples.npz"),
        "seconds": round(seconds, 2), "git_commit": disk.git_commit()})
    shutil.rmtree(out / "unfinished", ignore_errors=True)      # make_samples's
    print(f"wrote {len(labels)} images, generated in {record['dtype']}, to {out}: samples.npz, "
          f"grid.png{', png/' if png else ''}")


def make_samples(out, data, rt, record, labels, make_images, if_needed, png=False):
    """The samples of a checkpoint in the folder `out`; with if_needed nothing where they are there.

    record: the settings that made them. labels: a list of N. make_images(keep_in) -> (N, H, W, C)
    uint8 on rank 0; keep_in: `generate`'s, so that the same call goes on after a stop. What
    sample.py, evaluate.py, stable_diffusion.py and text_to_image.py do with their images.
    """
    label_drop = record["config"].get("label_drop")
    if label_drop == 0 and record["guidance"]:
        rt.print(f"note: --guidance {record['guidance']:g} leads away from Null, which a network "
                 "trained with --label-drop 0 does not know; take --guidance 0")
    if label_drop == 1 and record.get("classes") != [-1]:
        rt.print("note: the network was trained with --label-drop 1 and has seen no label; the "
                 "labels of its images mean nothing")
    if record["steps"] == 1 and record["sampler"] in ("ddim", "ddpm", "dpm++"):
        rt.print("note: --steps 1 starts at t = 0, where the network expects an image almost "
                 "without noise; take more steps")
    unfinished = out / "unfinished"
    keep_in = unfinished / disk.settings_id(record)
    files = ["samples.npz", "grid.png", *(["png"] if png else [])]
    with disk.lock(out, rt=rt, wait=if_needed):         # the other process may make just these
        done = if_needed and rt.rank == 0 and all((out / name).exists() for name in files)
        if rt.maximum(int(done and disk.up_to_date(out / "samples.json", record))):
            return rt.print(f"{out}: up to date")
        png = png or (out / "png/export.json").exists()     # those of an earlier call are replaced

        def begin():
            if png:
                disk.refuse_other_folder(out / "png", "samples", "--png")
            if differ := disk.settings_replaced(out / "samples.json", record):
                print(f"{out}: replaces the samples of other settings: {', '.join(differ)}")
            if unfinished.exists() and not keep_in.exists():
                print(f"{unfinished}: removed, since it has images of other settings")
                shutil.rmtree(unfinished)

        rt.on_rank_0(begin)
        start = time.time()
        images = make_images(keep_in)
        seconds = time.time() - start
        rt.on_rank_0(lambda: write_samples(out, images, labels, record, data, seconds, png))


def samples_folder(args):
    """The folder of the results: --out, or run/samples, of a snapshot run/samples-ckpt-0000010."""
    name = "samples" if args.branch == "full" else "samples-general"
    ckpt = Path(args.ckpt)
    if ckpt.name != "ckpt.pt":
        name += f"-{ckpt.stem}"
    return Path(args.out or ckpt.with_name(name))


def which_weights(args, ckpt):
    """{"weights": ..., "branch": ...} of the flags; of an export those that it was made of."""
    return {name: ckpt.get(name, getattr(args, name)) for name in ("weights", "branch")}


def describe(args, ckpt, sampling, rt):
    """What made these images: everything that moves a number measured on them, for the JSON."""
    plugins = runtime.Plugins.found
    return {"ckpt": str(args.ckpt), "ckpt_sha256": ckpt.sha256, "step": ckpt["step"],
            "command": ckpt["command"], "config": ckpt["config"],
            "dataset": ckpt["config"]["dataset"],
            **which_weights(args, ckpt), **sampling.record(), "dtype": rt.dtype_name(),
            **({"plugin": list(plugins)} if plugins else {})}


def sampling_in_words(settings):
    """Settings of a result in words: "step 300,000, ddim, 50 steps, guidance 1.5, x_0 clipped"."""
    words = {"step": "step {:,}", "sampler": "{}", "steps": "{} steps", "guidance": "guidance {:g}"}
    found = [text.format(settings[key]) for key, text in words.items() if key in settings]
    if settings.get("sampler", "consistency") != "consistency":
        found.append("x_0 clipped" if settings.get("clip") else "x_0 not clipped")
    usual = {"eta": 0, "grid": "uniform", "order": 3, "last_step": "x_0", "weights": "ema",
             "branch": "full"}
    found += [f"{key} {settings[key]}" for key, value in usual.items()
              if settings.get(key, value) != value]
    return ", ".join(found)


# --------------------------------------------------------------------------------------------------
# The script

def add_sampling_flags(parser):
    """The flags that choose how images are generated, the same for evaluate.py."""
    steps = ", ".join(f"{name} {n}" for name, n in STEPS.items())
    g = parser.add_argument_group("sampling")
    g.add_argument("--sampler", choices=SAMPLERS,
                   help="default: ddim; for a consistency model: consistency")
    g.add_argument("--steps", type=integer(1, 1000),
                   help=f"network calls per image (default: {steps})")
    g.add_argument("--grid", choices=("uniform", "quad", "logsnr"),
                   help="timesteps: equal parts of t, of its root (ddim only), or of the log of "
                   "the signal-to-noise ratio (default: uniform)")
    g.add_argument("--order", type=int, choices=(1, 2, 3), help="of --sampler dpm (default: 3)")
    g.add_argument("--eta", type=number(0, 1),
                   help="noise of DDIM (default: 0, deterministic)")
    g.add_argument("--last-step", choices=LAST_STEPS,
                   help="of ddim: to alphas_bar = 1, or none, as in the authors' release "
                   "(default: x_0; of train.py's --recipe release: identity)")
    g.add_argument("--guidance", type=number(0), metavar="OMEGA",
                   help="eps + omega (eps - eps_null); 0: none, and half the time (default: 1.5, "
                   "the authors' release; a consistency model has none)")
    g.add_argument("--clip", action=BooleanOptionalAction, default=None,
                   help="clip the predicted x_0 of every step to [-1, 1] (default: yes; of "
                   "consistency and latent models, and of train.py's --recipe release: no)")
    add_weights_flags(g)
    g.add_argument("--batch-size", type=integer(1), default=250,
                   help="images at a time per process (default: 250)")
    return g


def add_latents_flag(group):
    """--latents, the same for evaluate.py."""
    group.add_argument("--latents", metavar="NAME", help="where the autoencoder of train.py's "
                       "--latents is (default: where it was in training)")


def add_weights_flags(group):
    """--branch and --weights, the same for evaluate.py and stable_diffusion.py."""
    group.add_argument("--branch", choices=("full", "general"), default="full",
                       help="theta, or theta^g alone (default: full)")
    group.add_argument("--weights", choices=("ema", "raw"), default="ema", help="default: ema")


def sampling_of(args, ckpt):
    """The Sampling of add_sampling_flags's flags and --seed, for a checkpoint's kind of model."""
    given = {f.name: getattr(args, f.name) for f in fields(Sampling)}
    return Sampling.of(ckpt["kind"], ckpt["config"].get("recipe"), **given)


def add_image_flags(parser):
    """--classes and --num, the same for stable_diffusion.py."""
    parser.add_argument("--classes",
                        help="numbers, ranges or names: 6-9 or 0,3,cat; names with a comma in "
                        "double quotes: 'cat,\"ducks, geese\"'; rarest, the smallest one "
                        "of the training set; or null, none: p(x | Null) (default: all)")
    parser.add_argument("--num", type=integer(1, 10_000_000), default=100,
                        help="images, over all classes (default: 100)")


def add_output_flags(parser):
    """--png, --if-needed and the common flags, the same for stable_diffusion.py."""
    parser.add_argument("--png", action="store_true",
                        help="also one PNG per image, one folder per class")
    parser.add_argument("--if-needed", action="store_true",
                        help="do nothing where --out was made with these settings already")
    parser.add_common("folder of the results (default: samples beside the checkpoint). After a "
                      "stop the same command goes on from its folder unfinished (50,000 images of "
                      "32 pixels: 150 MB)")


def chosen_classes(args, data):
    """The class numbers that --classes asks for, of a checkpoint's data. Raises UserError."""
    names = data["class_names"]
    if args.classes is None:
        return list(range(len(names)))
    if args.classes == "rarest" and "rarest" not in names:
        return [names.index(by_size(data)[-1])]
    return resolve_classes(args.classes, names, counts=data.get("class_counts"))


def classes_and_sampling(args, ckpt):
    """(class numbers, Sampling) of the flags: chosen_classes's, or [-1] for null, Null itself.

    Guidance from Null towards Null moves nothing, so it is left out. Raises UserError.
    """
    sampling = sampling_of(args, ckpt)
    if args.classes != "null" or "null" in ckpt["data"]["class_names"]:
        return chosen_classes(args, ckpt["data"]), sampling
    if ckpt["config"].get("label_drop") == 0:
        raise UserError("--classes null: this network was trained with --label-drop 0, so it does "
                        "not know Null; name classes")
    return [-1], replace(sampling, guidance=0.0)


def labels_in_turn(classes, num):
    """The labels of `num` images, a list: the classes in turn."""
    return [classes[i % len(classes)] for i in range(num)]


def labels_to_fill(classes, data, size):
    """The labels, a list, of what each of these classes lacks to have `size` images.

    data: the training set's record. size: 0 for that of its largest class. Raises UserError.
    """
    counts = data.get("class_counts")
    if counts is None or classes == [-1]:
        raise UserError("--fill-to: not known how many training images there were; take --num")
    lacking = [max(0, (size or max(counts)) - counts[c]) for c in classes]
    if not any(lacking):
        raise UserError(f"--fill-to {size}: each class has as many training images already")
    return np.repeat(classes, lacking).tolist()


def dtype_of(args, ckpt):
    """--dtype; where it is auto the checkpoint's: it moves the last digits of every image."""
    return ckpt["config"]["dtype"] if args.dtype == "auto" else args.dtype


def make_parser():
    """All flags."""
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", required=True,
                        help="a checkpoint of train.py, or a file that --export wrote")
    add_image_flags(parser)
    add_latents_flag(add_sampling_flags(parser))
    add_output_flags(parser)
    parser.add_argument("--fill-to", type=integer(0), nargs="?", const=0, metavar="N",
                        help="in place of --num: what each class lacks to have N images with its "
                        "training images; without N as many as the largest class has")
    parser.add_argument("--export", metavar="FILE",
                        help="write the merged plain network to FILE instead of sampling; "
                        "its weights alone to FILE.safetensors; a folder with --format diffusers")
    parser.add_argument("--format", choices=("checkpoint", "diffusers"), default="checkpoint",
                        help="of --export: a checkpoint, or a folder with a UNet2DModel and its "
                        "DDIMScheduler, which diffusers reads (default: checkpoint)")
    return parser


def is_export(path):
    """Whether a file is what --export writes: it may be replaced."""
    try:
        return is_one_network(disk.load(path, KINDS, "--export"))
    except UserError:
        return False


def export(args, given):
    """What --export asks for: the merged network as a checkpoint of its own, or for others.

    Every script takes the checkpoint, and its "model" fits a plain network. FILE.safetensors has
    just this "model", with the settings as JSON in its metadata.
    """
    used = {"ckpt", "weights", "branch", "export", "format", "device", "plugin"}
    refuse_unused(given, dict.fromkeys(sorted(given - used), "--export generates no images"))
    safe = args.format == "checkpoint" and args.export.endswith(".safetensors")
    if safe:
        try:
            from safetensors.torch import save as safetensors_of
        except ImportError as e:
            raise UserError("--export FILE.safetensors: needs pip install safetensors") from e
    elif args.format == "checkpoint":
        disk.refuse_overwriting(args.export, is_export, "--export", "an export of sample.py")
    ckpt = disk.load(args.ckpt, KINDS)
    if ckpt["experts"]:
        raise UserError("--export: group experts depend on the label and do not merge into one "
                        "plain network")
    rt = runtime.setup(args.device, dtype_of(args, ckpt))
    net = load_merged(ckpt, args.weights, args.branch)
    made = which_weights(args, ckpt)
    kept = {k: ckpt[k] for k in ("kind", "step", "command", "config", "data", "network",
                                 "autoencoder_sha256") if k in ckpt}
    kept.update(made)
    state = {name: p.detach().cpu().contiguous() for name, p in net.state_dict().items()}
    if args.format == "diffusers":
        from exchange import diffusers_unet     # needs diffusers
        write = partial(diffusers_unet.write, {**ckpt, **made}, net, args.export)
    elif safe:
        metadata = {"format": "pt", **{name: json.dumps(value) for name, value in kept.items()}}
        content = safetensors_of(state, metadata)
        write = partial(disk.write_atomic, args.export, lambda f: f.write(content), "--export")
    else:
        plain = {"rank_ratio": None, "experts": None, "model": state, "ema": state}
        write = partial(disk.save, args.export, {**kept, **plain}, "--export")
    rt.on_rank_0(write)
    rt.print(f"wrote {args.export}: {made['weights']} weights, {made['branch']} branch")


def main():
    """Generate the images that the flags ask for, or export the network."""
    parser = make_parser()
    args = parser.parse_args()
    if args.export is not None:
        return export(args, parser.given)
    refuse_unused(parser.given, {"format": "belongs to --export"})
    ckpt = disk.load(args.ckpt, KINDS)
    classes, sampling = classes_and_sampling(args, ckpt)
    if args.fill_to is None:
        labels = labels_in_turn(classes, args.num)
    else:
        refuse_unused(parser.given, {"num": "--fill-to says how many"})
        labels = labels_to_fill(classes, ckpt["data"], args.fill_to)
    rt = runtime.setup(args.device, dtype_of(args, ckpt))
    net = load_merged(ckpt, args.weights, args.branch, rt.device)
    shape, to_image = space_of(ckpt, rt.device, args.latents)

    def make_images(keep_in):
        fast = make_fast(net, rt, shape, len(labels), args.batch_size)
        return generate(fast, labels, range(len(labels)), shape, rt, sampling, args.batch_size,
                        to_image=to_image, keep_in=keep_in)
    record = {**describe(args, ckpt, sampling, rt), "classes": classes, "num": len(labels),
              **({} if args.fill_to is None else {"fill_to": args.fill_to})}
    out = samples_folder(args)
    make_samples(out, ckpt["data"], rt, record, labels, make_images, args.if_needed, args.png)
    if args.fill_to is None:
        runtime.print_next("evaluate.py", "--ckpt", args.ckpt)
    else:
        runtime.print_next("-m", "recognition.classify", *data_flags(ckpt["config"]),
                           "--extra", out / "samples.npz")


if __name__ == "__main__":
    run(main)
