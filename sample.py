"""Draw class-balanced images from a checkpoint, or export its merged weights.

    python sample.py --ckpt out/NAME/ckpt.pt --classes 6-9 --num 64       # samples.npz, samples.json, grid.png
    python sample.py --ckpt out/NAME/ckpt.pt --branch general             # what theta^g draws without its BA
    python sample.py --ckpt out/NAME/ckpt.pt --export merged.pt           # theta = theta^g + theta^e, a plain U-Net

Image i is a pure function of (checkpoint, --seed, --dtype, i): its label is the i-th of the classes in turn, its noise is
drawn from (seed, i), so the batch size and the number of processes change nothing. samples.npz is the layout of the
ADM evaluator: arr_0 N x H x W x 3 uint8 (grey images repeated), arr_1 N labels.
"""
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import consistency
import runtime
from baselines import add_group_experts
from cm_layers import merge, reserve
from data import resolve_classes, to_uint8
from model import UNet, UNetConfig, make_alphas_bar
from runtime import Parser, UserError, integer, number, run


# ----------------------------------------------------------------------------------------------------------------------
# Samplers: sampler(predict, x_T, alphas_bar, timesteps, noise) -> x_0, with predict(x_t, t) -> eps, t an int

def make_timesteps(T, steps, grid="uniform"):
    """A descending list of `steps` timesteps in [0, T): uniform floor(i T / steps), or quad, (i / (steps - 1))^2 0.8 T.

    uniform with T = 1000, steps = 50 is 980, 960 ... 0; quad is the CIFAR-10 grid of Song et al. (2021a).
    """
    if grid == "uniform":
        grid_t = [i * T // steps for i in range(steps)]
    else:
        grid_t = []
        for t in np.linspace(0, np.sqrt(0.8 * T), steps) ** 2:
            grid_t.append(max(int(t), grid_t[-1] + 1 if grid_t else 0))      # the first squares fall on one timestep
    if len(set(grid_t)) < steps or grid_t[-1] >= T:
        raise UserError(f"--steps {steps}: the {grid} grid of {T} timesteps has no {steps} different ones; take fewer")
    return grid_t[::-1]


def pairs(alphas_bar, timesteps):
    """Yield (t, alphas_bar_t, alphas_bar of the next timestep) as floats; after the last comes alphas_bar = 1, t = -1."""
    nexts = [float(alphas_bar[t]) for t in timesteps[1:]] + [1.0]
    for t, ab_next in zip(timesteps, nexts):
        yield t, float(alphas_bar[t]), ab_next


def ddim(predict, x, alphas_bar, timesteps, noise, eta=0.0):
    """DDIM (Song et al., 2021a, Eq. 12); eta = 0 is deterministic, eta = 1 ancestral with the posterior variance.

    x (N, C, H, W) standard normal; noise() gives fresh standard normal noise of x's shape. x_0 is not clipped.
    """
    for t, ab, ab_next in pairs(alphas_bar, timesteps):
        eps = predict(x, t)
        x_0 = (x - (1 - ab) ** 0.5 * eps) / ab ** 0.5
        sigma = eta * ((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)) ** 0.5
        x = ab_next ** 0.5 * x_0 + (1 - ab_next - sigma ** 2) ** 0.5 * eps
        if sigma:
            x = x + sigma * noise()
    return x


def ddpm(predict, x, alphas_bar, timesteps, noise):
    """Ancestral sampling, Algorithm C.1, with sigma_t^2 = beta_t; no noise is added at the last step.

    On a grid with gaps, alpha_t is the ratio of neighbouring alphas_bar, so that every number of steps is consistent.
    """
    for t, ab, ab_next in pairs(alphas_bar, timesteps):
        alpha = ab / ab_next
        beta = 1 - alpha
        x = (x - beta / (1 - ab) ** 0.5 * predict(x, t)) / alpha ** 0.5
        if ab_next < 1:
            x = x + beta ** 0.5 * noise()
    return x


def dpmpp(predict, x, alphas_bar, timesteps, noise):
    """DPM-Solver++ (2M) (Lu et al., 2022b): second-order multistep in log(alpha / sigma), deterministic.

    The first step, the last, to alphas_bar = 1, and one to t = 0 are of first order (which is DDIM): on a grid of 15
    the step to t = 0 is more than four times as wide as the one before it, too wide to extrapolate over.
    """
    previous = None                                         # x_0 and the width of the step before
    for t, ab, ab_next in pairs(alphas_bar, timesteps):
        x_0 = (x - (1 - ab) ** 0.5 * predict(x, t)) / ab ** 0.5
        if ab_next == 1:
            return x_0
        h = 0.5 * (math.log(ab_next / (1 - ab_next)) - math.log(ab / (1 - ab)))
        first = previous is None or ab_next == float(alphas_bar[0])
        D = x_0 if first else x_0 + h / (2 * previous[1]) * (x_0 - previous[0])
        x = ((1 - ab_next) / (1 - ab)) ** 0.5 * x - ab_next ** 0.5 * math.expm1(-h) * D
        previous = x_0, h


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpm++": dpmpp, "consistency": consistency.sample}
STEPS = {"ddim": 50, "ddpm": 1000, "dpm++": 15, "consistency": 2}           # the paper's; it gives none for the last
DEFAULTS = {"diffusion": {"sampler": "ddim", "guidance": 1.5}, "consistency": {"sampler": "consistency", "guidance": 0.0}}


def guided(net, y, omega, rt):
    """predict(x_t, t) with classifier-free guidance, eps + omega (eps - eps_null); omega 0 skips the second pass."""
    null = torch.full_like(y, -1)

    def predict(x, t):
        t = torch.full_like(y, t)
        with rt.autocast():
            eps = net(x, t, y).float()
            if omega:
                eps = eps + omega * (eps - net(x, t, null).float())
        return eps
    return predict


# ----------------------------------------------------------------------------------------------------------------------
# Networks from checkpoints

def build_network(network, rank_ratio, experts=None):
    """A UNet from the plain dict of a UNetConfig; its decoder reserved with rank_ratio, unless that is None.

    experts: the training set's class counts where the decoder has one low-rank expert a group instead; else None.
    """
    return add_low_rank(UNet(UNetConfig(**network)), rank_ratio, experts)


def add_low_rank(net, rank_ratio, experts=None):
    """Reserve capacity in the decoder of a plain UNet, or give it group experts (see build_network); return it."""
    if experts is not None:
        return add_group_experts(net, experts, rank_ratio)
    if rank_ratio is not None:
        reserve(net.decoder, rank_ratio)
    return net


def load_network(ckpt, weights="ema", branch="full", device="cpu"):
    """The network of a checkpoint (the dict that runtime.load returns), merged into a plain UNet, on `device`.

    weights: "ema" or "raw". branch: "full" (theta) or "general" (theta^g). Raises UserError.
    """
    net = build_network(ckpt["network"], ckpt["rank_ratio"], ckpt["experts"])
    if branch == "general" and (ckpt["rank_ratio"] is None or ckpt["experts"]):
        raise UserError("--branch general: this checkpoint has no reserved capacity (it was trained with --no-cm, or merged)")
    try:
        net.load_state_dict(ckpt["ema" if weights == "ema" else "model"])
    except RuntimeError as e:
        raise UserError(f"--ckpt: its weights do not fit the network that it describes ({str(e).splitlines()[-1].strip()})")
    merge(net, branch)
    return net.to(device, memory_format=torch.channels_last).requires_grad_(False)


def export(ckpt, net, path):
    """Write a merged network as a checkpoint of its own: every script takes it, and "model" fits a plain UNet."""
    if ckpt["experts"]:
        raise UserError("--export: group experts depend on the label and do not merge into one plain network")
    state = {name: p.detach().cpu().contiguous() for name, p in net.state_dict().items()}
    kept = {k: ckpt[k] for k in ("kind", "step", "command", "config", "data", "network")}
    runtime.save(path, {**kept, "rank_ratio": None, "experts": None, "model": state, "ema": state})


# ----------------------------------------------------------------------------------------------------------------------
# Images

@torch.no_grad()
def draw(net, y, indices, shape, rt, seed=0, sampler="ddim", steps=50, grid="uniform", guidance=1.5, eta=0.0,
         alphas_bar=None):
    """One batch of images: float (N, C, H, W), about [-1, 1]. y (N,) int64 on rt.device; indices: N image numbers.

    shape (C, H, W). Image i's noise comes from (seed, i), drawn on the CPU, so that every device draws the same image.
    alphas_bar: the schedule that the network was trained with, None for make_alphas_bar's.
    """
    generators = [runtime.generator("cpu", seed, "image", int(i)) for i in indices]

    def noise():
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(rt.device)
    alphas_bar = make_alphas_bar() if alphas_bar is None else alphas_bar
    timesteps = (consistency.make_timesteps(len(alphas_bar), steps) if sampler == "consistency"
                 else make_timesteps(len(alphas_bar), steps, grid))
    extra = {"eta": eta} if sampler == "ddim" else {}
    x_T = noise().contiguous(memory_format=torch.channels_last)
    return SAMPLERS[sampler](guided(net, y, guidance, rt), x_T, alphas_bar, timesteps, noise, **extra)


def generate(net, labels, indices, shape, rt, batch_size, title="sampling", gather=True, to_image=None, **settings):
    """Images number `indices` with these labels (lists of N ints): uint8 (N, H, W, C), on rank 0; None elsewhere.

    Each process draws a contiguous share in batches, and returns that share if gather is False; settings are `draw`'s.
    to_image: what makes images of the network's x_0, where that is a latent.
    """
    share = np.array_split(np.arange(len(labels)), rt.world)[rt.rank]
    parts = []
    with runtime.progress(total=len(share), desc=title, unit="img", disable=rt.rank > 0 or not title) as bar:
        for rows in np.array_split(share, max(1, -(-len(share) // batch_size))):
            if not len(rows):
                continue                # more processes than images
            y = torch.tensor([labels[r] for r in rows], device=rt.device, dtype=torch.int64)
            x = draw(net, y, [indices[r] for r in rows], shape, rt, **settings)
            parts.append(to_uint8(x if to_image is None else to_image(x)).cpu().numpy())
            bar.update(len(rows))
    return rt.gather(parts) if gather else np.concatenate(parts or [np.empty((0, *shape[1:], shape[0]), np.uint8)])


def to_rgb(images):
    """uint8 (N, H, W, 1 or 3) -> (N, H, W, 3), grey repeated."""
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images


def grid_image(images, labels, class_names, classes=None, columns=10, tile=56, gap=4):
    """A picture with one row a class, its name at the left, its first images: images uint8 (N, H, W, C), labels (N,).

    classes: the rows, at most ten evenly spread ones of all labels by default. Images are enlarged by a whole factor.
    """
    labels = np.asarray(labels)
    present = np.unique(labels)
    if classes is None:
        classes = present[np.unique(np.linspace(0, len(present) - 1, 10).astype(int))]
    size, font = images.shape[1] * max(1, round(tile / images.shape[1])), ImageFont.load_default(16)
    left = 20 + max(round(font.getlength(str(class_names[c]))) for c in classes)
    picture = Image.new("RGB", (left + columns * (size + gap), len(classes) * (size + gap)), "white")
    pen = ImageDraw.Draw(picture)
    for r, c in enumerate(classes):
        pen.text((8, r * (size + gap) + size // 2), str(class_names[c]), fill="black", anchor="lm", font=font)
        for k, image in enumerate(to_rgb(images[np.flatnonzero(labels == c)[:columns]])):
            picture.paste(Image.fromarray(image).resize((size, size), Image.NEAREST),
                          (left + k * (size + gap), r * (size + gap)))
    return picture


def write_pngs(images, labels, class_names, folder):
    """One PNG an image, FOLDER/<class number>-<class name>/<image number>.png."""
    for i, (image, c) in enumerate(zip(images, labels)):
        path = Path(folder) / f"{c:04d}-{class_names[c]}" / f"{i:06d}.png"
        runtime.write_atomic(path, lambda p: Image.fromarray(image.squeeze()).save(p, format="png"))


def write_samples(out, images, labels, names, record, data, seconds, png=False):
    """What sample.py leaves in the folder `out`: samples.npz, samples.json, grid.png and perhaps png/; say so.

    images (N, H, W, C) uint8, labels a list of N, names the class names; record, data: what made them, and of which data.
    """
    def write_npz(path):
        with open(path, "wb") as f:
            np.savez(f, to_rgb(images), np.array(labels))
    runtime.write_atomic(out / "samples.npz", write_npz)
    classes = list(dict.fromkeys(labels))
    picture = grid_image(images, labels, names, None if len(classes) > 10 else classes)
    runtime.write_atomic(out / "grid.png", lambda p: picture.save(p, format="png"))
    if (out / "samples.json").exists():         # an earlier call's files go: a metric must not find two calls' images
        for path in (out / "png").glob("[0-9][0-9][0-9][0-9]-*/[0-9][0-9][0-9][0-9][0-9][0-9].png"):
            path.unlink()
    if png:
        write_pngs(images, labels, names, out / "png")
    runtime.write_json(out / "samples.json", {"settings": record, "data": data, "seconds": round(seconds, 2)})
    print(f"wrote {len(labels)} images, drawn in {record['dtype'].removeprefix('torch.')}, to {out}: samples.npz, grid.png" + ", png/" * png)


# ----------------------------------------------------------------------------------------------------------------------

def add_sampling_flags(parser):
    """The flags that choose how images are drawn, the same for evaluate.py."""
    g = parser.add_argument_group("sampling")
    g.add_argument("--sampler", choices=SAMPLERS, help="default: ddim; for a consistency model: consistency")
    g.add_argument("--steps", type=integer(1, 1000), help="network calls an image (default: " + ", ".join(
        f"{name} {n}" for name, n in STEPS.items()) + ")")
    g.add_argument("--grid", choices=("uniform", "quad"), default="uniform", help="timesteps (default: uniform)")
    g.add_argument("--eta", type=number(0, 1), default=0.0, help="noise of DDIM (default: 0, deterministic)")
    g.add_argument("--guidance", type=number(0), metavar="OMEGA", help="eps + omega (eps - eps_null); 0: none, and half the time "
                   "(default: 1.5, the authors' release; a consistency model has none)")
    g.add_argument("--branch", choices=("full", "general"), default="full", help="theta, or theta^g alone (default: full)")
    g.add_argument("--weights", choices=("ema", "raw"), default="ema", help="default: ema")
    g.add_argument("--batch-size", type=integer(1), default=250, help="images at a time a process (default: 250)")
    return g


def sampling_settings(args, kind):
    """The settings of `draw` that these flags mean for a checkpoint of this kind: a plain dict. Raises UserError."""
    default = DEFAULTS[kind]
    sampler, guidance = args.sampler or default["sampler"], default["guidance"] if args.guidance is None else args.guidance
    settings = {"seed": args.seed, "sampler": sampler, "grid": args.grid, "eta": args.eta, "guidance": guidance,
                "steps": args.steps or STEPS[sampler]}
    if (sampler == "consistency") != (kind == "consistency"):
        raise UserError(f"--sampler {sampler}: this checkpoint is a {kind} model; leave it out for {default['sampler']}")
    if sampler == "consistency" and (guidance or args.grid != "uniform"):
        raise UserError(f"--{'guidance' if guidance else 'grid'}: a consistency model has none; leave it out")
    if sampler == "consistency":            # either fails here, before any work
        consistency.make_timesteps(1000, settings["steps"])
    else:
        make_timesteps(1000, settings["steps"], settings["grid"])
    if args.eta and sampler != "ddim":
        raise UserError(f"--eta {args.eta:g}: belongs to --sampler ddim, and {sampler} has none; leave it out")
    return settings


def dtype_of(args, ckpt):
    """--dtype, where it is auto the one that the checkpoint was trained in: it moves the last digits of every image."""
    return ckpt["config"]["dtype"] if args.dtype == "auto" else args.dtype


def describe(args, ckpt, settings):
    """What made these images, for the JSON beside them: everything that moves a number measured on them."""
    return {"ckpt": str(args.ckpt), "ckpt_sha256": runtime.sha256(args.ckpt), "step": ckpt["step"], "command": ckpt["command"],
            "dataset": ckpt["config"]["dataset"], "weights": args.weights, "branch": args.branch, **settings}


def main():
    """Draw the images that the flags ask for, or export the network."""
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", required=True, help="a checkpoint of train.py, or a file that --export wrote")
    parser.add_argument("--classes", help="numbers, ranges or names: 6-9 or 0,3,cat (default: all)")
    parser.add_argument("--num", type=integer(1), default=100, help="images, over all classes (default: 100)")
    add_sampling_flags(parser)
    parser.add_argument("--png", action="store_true", help="also one PNG an image, one folder a class")
    parser.add_argument("--export", metavar="FILE", help="write the merged plain network to FILE instead of sampling")
    parser.add_argument("--if-needed", action="store_true", help="do nothing where --out was made with these settings already")
    parser.add_common("folder of the results (default: samples beside the checkpoint)")
    args = parser.parse_args()
    ckpt = runtime.load(args.ckpt, DEFAULTS)
    rt = runtime.setup(args.device, dtype_of(args, ckpt))
    net = load_network(ckpt, args.weights, args.branch, rt.device)
    if args.export:
        if rt.rank == 0:
            export(ckpt, net, args.export)
        return rt.print(f"wrote {args.export}: {args.weights} weights, {args.branch} branch, a plain U-Net")

    names = ckpt["data"]["class_names"]
    classes = resolve_classes(args.classes, names) if args.classes else list(range(len(names)))
    settings = sampling_settings(args, ckpt["kind"])
    out = Path(args.out or Path(args.ckpt).parent / ("samples" if args.branch == "full" else "samples-general"))
    record = {**describe(args, ckpt, settings), "classes": classes, "num": args.num, "dtype": str(rt.dtype)}
    if args.if_needed and runtime.up_to_date(out / "samples.json", record) and (out / "samples.npz").exists():
        return rt.print(f"{out}: up to date")

    start = time.time()
    labels = [classes[i % len(classes)] for i in range(args.num)]
    shape = (ckpt["network"]["channels"],) + (ckpt["data"]["resolution"],) * 2
    images = generate(net, labels, range(args.num), shape, rt, args.batch_size, **settings)
    if rt.rank == 0:
        write_samples(out, images, labels, names, record, ckpt["data"], time.time() - start, args.png)


if __name__ == "__main__":
    run(main)
