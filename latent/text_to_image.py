"""Latent diffusion from scratch, text to image, on imbalanced CUB-200 or Oxford-102: Table G.11.

    pip install diffusers transformers
    torchrun -m latent.text_to_image train --dataset cub200 --data-dir DIR      # CM; or --no-cm
    python -m latent.text_to_image sample --ckpt out/NAME/ckpt.pt --num 10000   # samples.npz
    python evaluate.py --samples out/NAME/samples/samples.npz --data-dir DIR

Without Stable Diffusion's autoencoder and text encoder, on images of your own (--dataset folder:
the texts are NAME.txt beside NAME.jpg, or "a photo of a {class}"):

    python -m latent.text_to_image autoencoder --dataset folder --data-dir DIR --factor 4
    python -m latent.text_to_image train ... --autoencoder out/NAME/ckpt.pt --text-encoder words

The network and its training are VQ-Diffusion-S's (Gu et al., 2022, Sec. 5.1 and configuration): 18
transformer blocks of width 192 on 32 x 32 tokens, 256 x 256 pixels through an autoencoder of f = 8,
CLIP's text encoder, AdamW with betas 0.9 and 0.96, weight decay 0.045, learning rate 4.5e-4 after
5,000 steps of warm-up. Latents are continuous and the process is Gaussian, as in the paper's other
experiments (theirs are discrete). Capacity is reserved in the second half of the blocks. A text is
one of an image's captions, drawn anew in each step; Null is the empty text. Eq. (3), OC and the
groups look at class labels.

Samples have the captions of the reference images, class after class. A run resumes by repeating its
command.
"""
import hashlib
import json
from argparse import Namespace
from functools import partial

import numpy as np
import torch

import disk
import runtime
from cm_layers import merge, reserve
from data import Batches, folders_of, reference_images, to_float, to_uint8
from latent.autoencoder import (KLAutoencoder, Reconstruction, latent_scale, load_autoencoder,
                                refuse_other)
from latent.captions import FrozenCLIP, Table, Texts, Words, captions_of, vocabulary_of
from latent.stable_diffusion import (MODEL, LatentTraining, add_image_set_flags, add_method_flags,
                                     add_optimisation_flags, decoded, refuse_general, resolve,
                                     resolve_data, run_name)
from loop import (Training, add_step_flags, add_write_flags, config_of, is_finished,
                  load_images, loop, resume)
from runtime import Parser, UserError, add_with_defaults, integer, number, run
from sample import (add_output_flags, add_sampling_flags, describe, dtype_of, labels_in_turn,
                    make_samples, samples_folder, sampling_of)
from samplers import Sampling
from variants.dit import DiT

WORDS = "words"                                 # --text-encoder: one that is trained here
WRITE_EVERY = {"save_every": 1000, "sample_every": 10_000, "log_every": 100}
BETAS = (0.9, 0.96)         # of AdamW
SCALE_IMAGES = 256          # on which the variance of latents is measured


# --------------------------------------------------------------------------------------------------
# The network

def load_text_encoder(name, vocabulary, ckpt=None):
    """The Words of a vocabulary, or the FrozenCLIP of a folder or hub name.

    ckpt: a checkpoint that was trained with it, or None. Raises UserError where it is another one.
    """
    text = Words(vocabulary) if name == WORDS else FrozenCLIP("--text-encoder", name)
    refuse_other(ckpt, "text_encoder", text.sha256, f"--text-encoder {name}")
    return text


def build(network, rank_ratio, text, texts, values=None):
    """The DiT of a checkpoint's "network", with capacity reserved unless rank_ratio is None.

    y numbers texts, as it numbers classes elsewhere, so that losses.py and sample.py need to know
    nothing of them. text: a Words or FrozenCLIP. texts: those that y numbers. values: the weights
    of a checkpoint, {name: tensor} of all that is trained; None for initial ones. Raises UserError.
    """
    encoder, text_ch = text.encoder(network["ch"])
    sizes = {key: network[key] for key in ("channels", "size", "ch", "depth", "patch")}
    try:
        net = DiT(num_classes=0, dropout=0.0, texts=Texts(encoder, text.ids(texts)),
                  text_ch=text_ch, **sizes)
    except ValueError as e:
        raise UserError(str(e)) from e
    if rank_ratio is not None:
        reserve(net.decoder, rank_ratio)
    if values:
        net.load_state_dict(values, strict=False)       # CLIP's are no part of a checkpoint
    return net


def load_merged(ckpt, text, texts, weights="ema", branch="full", device="cpu"):
    """The network of a checkpoint for these texts, merged, without gradients: see build."""
    values = ckpt["ema" if weights == "ema" else "model"]
    net = build(ckpt["network"], ckpt["rank_ratio"], text, texts, values)
    return merge(net, branch).to(device).requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Training the autoencoder

class AutoencoderTraining(Training):
    """A run whose checkpoints also keep what scales latents to variance 1."""

    def weights(self):
        first = np.arange(len(self.batches.labels))[:SCALE_IMAGES]
        images = to_float(self.batches.take(first)[0])
        return {**super().weights(), "scale": latent_scale(self.net, self.ema, images)}


def main_autoencoder(argv):
    """Train a KL autoencoder on the training images of a data set."""
    parser = Parser("torchrun -m latent.text_to_image autoencoder --dataset cub200 --data-dir DIR")
    add_image_set_flags(parser, "cub200")
    g = parser.add_argument_group("network")
    g.add_argument("--factor", type=int, choices=(2, 4, 8, 16), default=8,
                   help="pixels per latent, along each side (default: 8)")
    g.add_argument("--ch", type=integer(4, 4096), default=64, help="width (default: 64)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--steps", type=integer(1), default=20_000,
                   help="training steps; may be raised to train longer (default: 20,000)")
    add_step_flags(g, lr=1e-3, warmup=500, ema=0.999, label_drop=None)
    add_write_flags(parser, **WRITE_EVERY)
    parser.add_common("folder of the run (default: out/ and the settings)")
    args = parser.parse_args(argv)
    resolve_data(args, parser.given)
    args.out = args.out or run_name(args, "autoencoder", f"f{args.factor}")
    old, rt = resume(args, ["autoencoder"])
    images = load_images(args, rt, old)
    if is_finished(old, args, rt):
        return
    rt.print(images.table())
    size = images.images.shape[1]
    if size % args.factor:
        raise UserError(f"--factor {args.factor}: does not divide {size} pixels; take a smaller "
                        "one or another --resolution")
    network = {"ch": args.ch, "factor": args.factor}
    torch.manual_seed(runtime.seed_of(args.seed, "init"))
    net = KLAutoencoder(**network)
    if old:
        net.load_state_dict(old["model"])
    net.to(rt.device)
    record = {"kind": "autoencoder", "command": runtime.command_line("-m latent.text_to_image"),
              "config": config_of(args), "data": images.record(), "network": network}
    batches = Batches(images, args.batch_size, args.seed, rt.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    training = AutoencoderTraining(args, rt, net, Reconstruction(net), batches, optimizer, record,
                                   old)
    loop(training, partial(reconstructions, images))


@torch.no_grad()
def reconstructions(images, state, labels, rt):
    """The first training images of these classes, encoded and decoded: uint8 (N, H, W, 3)."""
    net = KLAutoencoder(**state["network"]).to(rt.device)
    net.load_state_dict(state["ema"])
    rows = []
    for k, c in enumerate(labels):
        own = np.flatnonzero(images.labels == c)
        rows.append(own[labels[:k].count(c) % len(own)])
    x = to_float(torch.from_numpy(np.array(images.images[rows]))).to(rt.device)
    return to_uint8(net.decode(net.encode(x).latent_dist.mean).sample).cpu().numpy()


# --------------------------------------------------------------------------------------------------
# Training the diffusion model

def make_train_parser():
    """All flags of the command train."""
    parser = Parser("torchrun -m latent.text_to_image train --dataset cub200 --data-dir DIR")
    add_image_set_flags(parser, "cub200")
    g = parser.add_argument_group("autoencoder and texts")
    add_part_flags(g, MODEL)
    g.add_argument("--prompt", help="make texts of class names in place of the captions, {} is the "
                   "class; or the name of a .csv with lines class,text (default: the captions; for "
                   'a set without: "a photo of a {}")')
    g = parser.add_argument_group("method")
    add_method_flags(g, base="ddpm")
    g.add_argument("--rank-ratio", type=number(above=0, high=1), default=0.1,
                   help="r / min(d, k) of Eq. (1) (default: 0.1)")
    g = parser.add_argument_group("network")
    add_with_defaults(g, {"ch": 192, "depth": 18, "patch": 1}, {
        "ch": (integer(4, 65_536), "width"), "depth": (integer(1), "blocks"),
        "patch": (integer(1), "latents of the side of a token")})
    add_optimisation_flags(parser, steps=100_000, lr=4.5e-4, warmup=5000, ema=0.9996,
                           weight_decay=0.045)
    add_write_flags(parser, **WRITE_EVERY)
    parser.add_common("folder of the run (default: out/ and the settings)")
    return parser


def add_part_flags(group, default):
    """--autoencoder and --text-encoder, CLIP's; default: None for those of a checkpoint."""
    shown = "the checkpoint's" if default is None else f"{default}'s"
    group.add_argument("--autoencoder", default=default,
                       help="a folder or hub name of a Stable Diffusion in diffusers' layout, or a "
                       f"checkpoint of text_to_image.py autoencoder (default: {shown})")
    group.add_argument("--text-encoder", default=default,
                       help="a folder or hub name, likewise, or words: one that is trained with "
                       f"the network (default: {shown})")


def main_train(argv):
    """Resume or start; images, captions, latents; network; loop: train.py's main, on latents."""
    parser = make_train_parser()
    args = resolve(parser.parse_args(argv), parser.given, "text")
    # The content of both parts is compared below
    old, rt = resume(args, ["text"], {"autoencoder", "text_encoder", "epochs"})
    config = config_of(args)        # before args.steps follows from --epochs
    autoencoder = load_autoencoder(args.autoencoder, rt.device, "--autoencoder", old)
    images = load_images(args, rt, old)
    with rt.rank_0_first():
        table = Table(captions_of(images, args, "train"), images.labels)
    if old and old["captions_sha256"] != hash_of(table.texts):
        raise UserError(f"--data-dir {args.data_dir}: the captions are not those that the run in "
                        f"{args.out} was started with; choose another folder with --out")
    text = load_text_encoder(args.text_encoder, vocabulary_of(table.texts), old)
    if is_finished(old, args, rt):
        return
    rt.print(images.table())
    rt.print(f"texts: {len(table.texts):,}, such as \"{table.texts[0]}\"")

    channels, size, _ = autoencoder.latent_shape(images.images.shape[1])
    network = {"channels": channels, "size": size, "ch": args.ch, "depth": args.depth,
               "patch": args.patch, "vocabulary": text.vocabulary}
    rank_ratio = args.rank_ratio if args.cm else None
    record = {"kind": "text", "command": runtime.command_line("-m latent.text_to_image"),
              "config": config, "data": images.record(), "network": network,
              "rank_ratio": rank_ratio, "autoencoder_sha256": autoencoder.encoder_sha256,
              "text_encoder_sha256": text.sha256, "captions_sha256": hash_of(table.texts)}
    torch.manual_seed(runtime.seed_of(args.seed, "init"))
    net = build(network, rank_ratio, text, table.texts, old and old["model"]).to(rt.device)
    training = LatentTraining(args, rt, net, images, autoencoder, record, old, table, BETAS)
    loop(training, partial(grid_samples, autoencoder, text, table))


def hash_of(texts):
    """The SHA-256 of a list of texts."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# Sampling

def reference_captions(ckpt, args):
    """(texts, labels) of args.num images to generate, lists: captions of the reference images.

    The classes come in turn, as in sample.py, and within a class its images, each with one of its
    captions, chosen by --seed. The reference is that of evaluate.py.
    """
    config = dict(ckpt["config"])
    config["data_dir"], config["pack_dir"] = folders_of(config, args.data_dir)
    images, y, _ = reference_images(ckpt, args.data_dir)
    split = images.provenance["split"]
    table = Table(captions_of(images, Namespace(**config), split), images.labels)
    rows_of = {c: np.flatnonzero(y == c) for c in np.unique(y)}
    labels = labels_in_turn(sorted(rows_of), args.num)
    turns = np.arange(args.num) // len(rows_of)
    rows = [rows_of[c][turn % len(rows_of[c])] for c, turn in zip(labels, turns)]
    g = runtime.generator("cpu", args.seed, "captions")
    u = torch.rand(args.num, generator=g, dtype=torch.float64)
    numbers = table.of_images(torch.tensor(rows), u)
    return [table.texts[k] for k in numbers], [int(c) for c in labels]


def grid_samples(autoencoder, text, table, state, labels, rt):
    """Images of a checkpoint's EMA weights for training captions of these classes.

    As `text_to_image.py sample` makes them by default: uint8 (N, H, W, 3).
    """
    u = torch.rand(len(labels), generator=runtime.generator("cpu", state["config"]["seed"], "grid"),
                   dtype=torch.float64)
    numbers = table.of_classes(torch.tensor(labels), u)
    net = load_merged(state, text, [table.texts[k] for k in numbers], device=rt.device)
    sampling = Sampling.of("text", seed=state["config"]["seed"])
    return decoded(autoencoder, net, list(range(len(labels))), state["data"]["resolution"], rt,
                   sampling, title="grid")


def main_sample(argv):
    """Generate images for the captions of the reference: sample.py's main, with texts."""
    parser = Parser("python -m latent.text_to_image sample --ckpt out/NAME/ckpt.pt --num 10000")
    parser.add_argument("--ckpt", required=True, help="a checkpoint of text_to_image.py train")
    add_part_flags(parser, None)
    parser.add_argument("--data-dir", help="where the data set is (default: as in training)")
    parser.add_argument("--num", type=integer(1, 10_000_000), default=100,
                        help="images, over all classes (default: 100)")
    add_sampling_flags(parser)
    add_output_flags(parser)
    args = parser.parse_args(argv)
    ckpt = disk.load(args.ckpt, ["text"])
    sampling = sampling_of(args, ckpt)
    refuse_general(args, ckpt["rank_ratio"])
    rt = runtime.setup(args.device, dtype_of(args, ckpt))
    with rt.rank_0_first():
        texts, labels = reference_captions(ckpt, args)

    def make_images(keep_in):
        config = ckpt["config"]
        autoencoder = load_autoencoder(args.autoencoder or config["autoencoder"], rt.device,
                                       "--autoencoder", ckpt)
        text = load_text_encoder(args.text_encoder or config["text_encoder"],
                                 ckpt["network"]["vocabulary"], ckpt)
        net = load_merged(ckpt, text, texts, args.weights, args.branch, rt.device)
        return decoded(autoencoder, net, list(range(args.num)), ckpt["data"]["resolution"], rt,
                       sampling, args.batch_size, keep_in=keep_in)
    record = {**describe(args, ckpt, sampling, rt), "num": args.num,
              "captions_sha256": hash_of(texts)}
    out = samples_folder(args)
    make_samples(out, ckpt["data"], rt, record, labels, make_images, args.if_needed, args.png)
    runtime.print_next("evaluate.py", "--samples", out / "samples.npz")


# --------------------------------------------------------------------------------------------------

def main():
    """Train an autoencoder, train, or sample, by the first word."""
    runtime.main_of("-m latent.text_to_image", __doc__, {
        "autoencoder": main_autoencoder, "train": main_train, "sample": main_sample})


if __name__ == "__main__":
    run(main)
