"""Stable Diffusion fine-tuned by LoRA on long-tailed images, with and without CM: Tables 6, G.3.

    pip install diffusers transformers
    torchrun -m latent.stable_diffusion train --dataset artbench10 --data-dir DIR   # CM on OC
    torchrun -m latent.stable_diffusion train ... --no-cm --base ddpm  # or cbdm, or oc
    python -m latent.stable_diffusion sample --ckpt out/NAME/ckpt.pt --num 50000   # samples.npz
    torchrun --nproc_per_node=8 -m -- latent.stable_diffusion sample ...     # -- for --num
    python evaluate.py --samples out/NAME/samples/samples.npz --data-dir DIR
    python -m latent.stable_diffusion export --ckpt out/NAME/ckpt.pt --lora FOLDER   # for diffusers
    python -m latent.stable_diffusion export --ckpt out/NAME/ckpt.pt --pipeline FOLDER # merged

As in Sec. 3.3 and 4.2: W = W_0 + B_1 A_1 + B A on the attention projections. W_0 is the frozen
model. B_1 A_1 is a LoRA of rank 128, which belongs to theta^g. BA is the reserved part, theta^e, of
rank 8, in the up-sampling half. An image's text is "a {class} painting", of other sets than
ArtBench-10 "a photo of a {class}", or what --prompt says; Null is the empty text.

The paper leaves open which layers carry the LoRA (here those that LoRA is usually put on), what has
a "dropout rate of 0.1" (here the text) and whether weights are averaged (here as in train.py).

The losses are those of losses.py, on latents; images are not mirrored. Each image is encoded once
for all runs, into --pack-dir. A checkpoint holds the low-rank parts only. A run resumes by
repeating its command. docs/USING.md shows how diffusers takes an export.
"""
import math
import re
from argparse import BooleanOptionalAction
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize

import disk
import runtime
from cm_layers import checkpoint, general_only, merge, reserve
from data import add_data_flags, unused_data_flags
from latent.autoencoder import (Autoencoder, LatentBatches, content_hash, encode_once, load_part,
                                packages, refuse_other)
from latent.captions import FORM, FrozenCLIP, read_prompt, texts_of
from loop import (Training, add_step_flags, add_write_flags, config_of, is_finished,
                  load_images, loop, resume)
from losses import CMConfig, Objective, add_cm_flags, bind
from runtime import Parser, UserError, add_with_defaults, integer, number, refuse_unused, run
from sample import (add_image_flags, add_output_flags, add_sampling_flags, add_weights_flags,
                    classes_and_sampling, describe, dtype_of, generate, labels_in_turn,
                    make_samples, samples_folder)
from samplers import Sampling
from sets.readers import READERS
from train import IR, LATENT_RESOLUTION, preset_words

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")      # the layers of attention, in diffusers
PAINTING = "a {} painting"      # the text of ArtBench-10's images, Sec. 4.2
MODEL = "lambdalabs/miniSD-diffusers"
GRID_BATCH = 25     # images of a grid that are generated at a time, beside what training holds


# --------------------------------------------------------------------------------------------------
# The network: diffusers' U-Net, cut as model.py cuts its own

class Encoder(nn.Module):
    """The half that theta and theta^g share.

    prompts: (K + 1, L, D), the encoded text of each of K classes, and of the empty text at the end.
    """

    def __init__(self, unet, prompts):
        super().__init__()
        self.time_proj = unet.time_proj
        self.time_embedding = unet.time_embedding
        self.conv_in = unet.conv_in
        self.down_blocks = unet.down_blocks
        self.mid_block = unet.mid_block
        self.register_buffer("prompts", prompts, persistent=False)

    def forward(self, x_t, t, y):
        text = self.prompts[y]                                  # y = -1, Null, is the last row
        emb = self.time_embedding(self.time_proj(t).to(x_t.dtype))
        h = self.conv_in(x_t)
        skips = [h]
        for block in self.down_blocks:
            h, more = block(h, emb, **text_of(block, text))
            skips += more
        return self.mid_block(h, emb, encoder_hidden_states=text), skips, emb, text


class Decoder(nn.Module):
    """The up-sampling half, in which capacity is reserved."""

    def __init__(self, unet):
        super().__init__()
        self.up_blocks = unet.up_blocks
        self.conv_norm_out = unet.conv_norm_out
        self.conv_act = unet.conv_act
        self.conv_out = unet.conv_out

    def forward(self, h, skips, emb, text):
        for block in self.up_blocks:
            n = len(block.resnets)
            own = tuple(skips[-n:])
            skips = skips[:-n]
            h = block(h, own, emb, **text_of(block, text))
        return self.conv_out(self.conv_act(self.conv_norm_out(h)))


def text_of(block, text):
    """The keyword argument of a block with cross-attention, the text; none for other blocks."""
    if getattr(block, "has_cross_attention", False):
        return {"encoder_hidden_states": text}
    return {}


class LatentUNet(nn.Module):
    """eps_theta(x_t, t, y) on latents x_t (N, 4, h, w), with the methods that losses.py calls."""

    def __init__(self, unet, prompts):
        super().__init__()
        self.encoder = Encoder(unet, prompts)
        self.decoder = Decoder(unet)

    def encode(self, x_t, t, y, masks=(), a=None):
        """x_t, t, y -> what decode takes; there are no dropout masks and no augmentation."""
        return self.encoder(x_t, t, y)

    def decode(self, h, skips, emb, text, masks=()):
        """encode's result -> eps (N, 4, h, w)."""
        return self.decoder(h, skips, emb, text)

    def forward(self, x_t, t, y):
        return self.decode(*self.encode(x_t, t, y))

    def draw_masks(self, *_):
        """Stable Diffusion has no dropout."""
        return [], []


# --------------------------------------------------------------------------------------------------
# The low-rank parts

class Adapter(nn.Module):
    """W_0 -> W_0 + B_1 A_1, a LoRA that is a part of theta^g.

    Unlike LowRank's part, `general_only` does not switch it off. All have one rank, also where a
    matrix has less: older versions of diffusers scale every layer of a file by the rank of one.
    """

    def __init__(self, weight, rank):
        super().__init__()
        self.A = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, W):
        return W + self.B @ self.A


def is_projection(name, layer):
    """Whether a layer is an attention projection, by its dotted name."""
    return name.endswith(PROJECTIONS)


def add_adapters(net, rank, cm_rank=None):
    """Freeze a LatentUNet, and give it its low-rank parts, in place.

    Every attention projection gets a LoRA, and those of the decoder a reserved part of rank
    cm_rank (None: no reserved part).
    """
    net.requires_grad_(False)
    for name, layer in list(net.named_modules()):
        if is_projection(name, layer):
            adapter = Adapter(layer.weight, rank)
            parametrize.register_parametrization(layer, "weight", adapter)
    if cm_rank:
        reserve(net.decoder, rank=cm_rank, where=is_projection)


# --------------------------------------------------------------------------------------------------
# The pre-trained model

class Model(Autoencoder):
    """The parts of a Stable Diffusion in diffusers' layout, in float32. Raises UserError.

    name: a folder, or a name on the Hugging Face hub. device: of the autoencoder; the U-Net and
    the text encoder stay on the CPU. ckpt: a checkpoint that was trained on it, or None.
    """

    def __init__(self, name, device, ckpt=None):
        diffusers, _ = packages()

        def part(folder, kind):
            return load_part("--model", name, kind, folder)
        self.unet = part("unet", diffusers.UNet2DConditionModel).float()    # perhaps float16
        super().__init__(part("vae", diffusers.AutoencoderKL), device)
        self.text = FrozenCLIP("--model", name)
        self.schedule = part("scheduler", diffusers.DDIMScheduler)
        self.multiple = self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        self.alphas_bar = self.schedule.alphas_cumprod.double()
        self.sha256 = content_hash([self.unet, self.vae, self.text], self.alphas_bar,
                                   self.vae.config.scaling_factor)
        refuse_other(ckpt, "model", self.sha256, f"--model {name}")
        predicts = self.schedule.config.prediction_type
        if predicts != "epsilon":
            raise UserError(f"--model {name}: predicts {predicts}, and the losses here are for "
                            "epsilon")

    def network(self, class_names, config, values=None):
        """The LatentUNet of a run's settings, on the CPU; it is cut out of the model's U-Net.

        values: the low-rank parts of a checkpoint, {name: tensor}; None for their start.
        """
        prompts = self.text(self.text.ids(texts_of(config["prompt"], class_names)))
        net = LatentUNet(self.unet, prompts)
        add_adapters(net, config["rank"], config["cm_rank"] if config["cm"] else None)
        if values:
            net.load_state_dict(values, strict=False)
        return net


# --------------------------------------------------------------------------------------------------
# Training

def make_train_parser():
    """All flags of the command train."""
    parser = Parser("torchrun -m latent.stable_diffusion train --dataset artbench10 --data-dir DIR")
    add_image_set_flags(parser, "artbench10")
    g = parser.add_argument_group("method")
    g.add_argument("--model", default=MODEL, help="a folder or hub name in diffusers' layout "
                   f"(default: {MODEL}, the paper's)")
    g.add_argument("--prompt", help="the text of an image, {} its class; or the name of a .csv "
                   f'with lines class,text (default: "{FORM}"; artbench10: "{PAINTING}")')
    add_method_flags(g, base="oc")
    add_with_defaults(g, {"rank": 128, "cm_rank": 8}, {
        "rank": (integer(1), "of the LoRA"), "cm_rank": (integer(1), "of the reserved part")})
    g = add_optimisation_flags(parser, epochs=100, lr=3e-4, warmup=0, ema=0.999, weight_decay=1e-6)
    g.add_argument("--checkpointing", action="store_true",
                   help="gradient checkpointing: the same gradients with less memory; a step takes "
                   "longer")
    add_write_flags(parser, save_every=500, sample_every=2000, log_every=50)
    parser.add_common("folder of the run (default: out/latent- and the settings)")
    return parser


def add_image_set_flags(parser, dataset):
    """data.py's flags, with the defaults of --ir and --resolution that resolve_data fills in."""
    flags = {action.dest: action for action in add_data_flags(parser, dataset)._group_actions}
    flags["ir"].help += preset_words("100", IR)
    flags["resolution"].help = ("pixels per side, of sets of image files (default: "
                                f"{LATENT_RESOLUTION}, miniSD's; Stable Diffusion 1 and 2 were "
                                "trained on 512)")


def add_method_flags(group, base):
    """--base, --cm and the constants of L_CM."""
    group.add_argument("--base", choices=("ddpm", "cbdm", "oc"), default=base,
                       help=f"L_base of Eq. (4) (default: {base})")
    group.add_argument("--cm", action=BooleanOptionalAction, default=True,
                       help="reserve capacity and add L_CM (default: on)")
    add_cm_flags(group)


def add_optimisation_flags(parser, **defaults):
    """--steps --epochs --weight-decay and those of add_step_flags, in a group; defaults: as there.

    Either steps or epochs has a default: the length unless the other flag is given.
    """
    group = parser.add_argument_group("optimisation")
    add_with_defaults(group, defaults, {
        "steps": (integer(1), "training steps; may be raised to train longer"),
        "epochs": (integer(1), "passes over the training images, in place of --steps"),
        "weight_decay": (number(0), "AdamW's")})
    add_step_flags(group, **defaults)
    return group


def resolve_data(args, given):
    """Fill in what depends on the data set. given: Parser.given. Raises UserError."""
    if args.ir is None:
        args.ir = IR.get(args.dataset, 100.0)
    if args.resolution is None and args.dataset in READERS and READERS[args.dataset].files:
        args.resolution = LATENT_RESOLUTION
    refuse_unused(given, unused_data_flags(args))


def run_name(args, kind, *words):
    """The folder of a run where --out names none: its kind, data, IR, words and seed."""
    dataset = disk.path_id(args.data_dir) if args.dataset == "folder" else args.dataset
    return "-".join([f"out/{kind}", dataset, f"ir{args.ir:g}", *words, f"seed{args.seed}"])


def resolve(args, given, kind):
    """Fill in what depends on other flags; return args. given: Parser.given. Raises UserError.

    kind: of the checkpoint, "latent" or "text".
    """
    resolve_data(args, given)
    if not args.cm:
        cm_only = ("cm_rank", "rank_ratio", "lam", "w_con", "w_div", "div_bound")
        refuse_unused(given, dict.fromkeys(cm_only, "means something with --cm only"))
    if "steps" in given:
        refuse_unused(given, {"epochs": "--steps says how long"})
        args.epochs = None
    elif "epochs" in given:
        args.steps = None
    if args.prompt is not None:
        args.prompt = read_prompt(args.prompt)
    elif kind == "latent":
        args.prompt = PAINTING if args.dataset == "artbench10" else FORM
    args.out = args.out or run_name(args, kind, args.base, *["cm"] * args.cm)
    return args


class LatentTraining(Training):
    """A run on latents, by AdamW; its checkpoints keep what is trained, and no frozen model.

    images, autoencoder: what the latents are made of. table: of captions.py, where each image has
    texts of its own. betas: AdamW's. The rest as Training.
    """

    def __init__(self, args, rt, net, images, autoencoder, record, old, table=None,
                 betas=(0.9, 0.999)):
        objective = Objective(
            net=net, base=bind(args.base), counts=images.counts,
            alphas_bar=autoencoder.alphas_bar, cm=CMConfig.of(args), label_drop=args.label_drop)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=args.lr,
                                      betas=betas, weight_decay=args.weight_decay, fused=True)
        moments = encode_once(autoencoder, images, args, rt)
        batches = LatentBatches(images, moments, args.batch_size, args.seed, rt.device, table)
        super().__init__(args, rt, net, objective.to(rt.device), batches, optimizer, record, old)

    def weights(self):
        return {"model": self.params, "ema": self.ema}


def main_train(argv):
    """Resume or start; images and their latents; network; loop: train.py's main, on latents."""
    parser = make_train_parser()
    args = resolve(parser.parse_args(argv), parser.given, "latent")
    packages()              # fails here, before any work
    old, rt = resume(args, ["latent"], {"epochs", "checkpointing"})
    config = config_of(args)        # before args.steps follows from --epochs
    images = load_images(args, rt, old)
    if is_finished(old, args, rt):
        return
    rt.print(images.table())
    rt.print(f'texts, such as "{texts_of(args.prompt, images.class_names)[0]}"')
    model = Model(args.model, rt.device, old)
    torch.manual_seed(runtime.seed_of(args.seed, "init"))
    net = model.network(images.class_names, config, old and old["model"]).to(rt.device)
    if args.checkpointing:
        model.unet.enable_gradient_checkpointing(partial(checkpoint, net))
    record = {"kind": "latent", "config": config,
              "command": runtime.command_line("-m latent.stable_diffusion"),
              "data": images.record(), "model_sha256": model.sha256}
    training = LatentTraining(args, rt, net, images, model, record, old)
    loop(training, partial(grid_samples, model, net))


def grid_samples(model, net, state, labels, rt):
    """Decoded images of a checkpoint's EMA weights, as the command `sample` makes them by default.

    uint8 (N, H, W, 3). The network's own low-rank parts, those of the checkpoint, are put back.
    """
    before = {name: p.detach().clone() for name, p in state["model"].items()}
    net.load_state_dict(state["ema"], strict=False)
    images = decoded(model, net, labels, state["data"]["resolution"], rt,
                     Sampling.of("latent", seed=state["config"]["seed"]), title="grid")
    net.load_state_dict(before, strict=False)
    return images


# --------------------------------------------------------------------------------------------------
# Sampling

def add_checkpoint_flags(parser):
    """--ckpt and --model, the same for sampling and exporting."""
    parser.add_argument("--ckpt", required=True, help="a checkpoint of stable_diffusion.py train")
    parser.add_argument("--model",
                        help="where the pre-trained model is (default: the checkpoint's)")


def load_network(args, ckpt, device):
    """(the Model, the LatentUNet) of a checkpoint, by --model and --weights, without gradients."""
    model = Model(args.model or ckpt["config"]["model"], device, ckpt)
    values = ckpt["ema" if args.weights == "ema" else "model"]
    net = model.network(ckpt["data"]["class_names"], ckpt["config"], values)
    return model, net.to(device).requires_grad_(False)


def refuse_general(args, reserved):
    """Raise UserError where --branch general names what a checkpoint does not have."""
    if args.branch == "general" and not reserved:
        raise UserError("--branch general: this checkpoint has no reserved capacity (it was "
                        "trained with --no-cm)")


def decoded(autoencoder, net, labels, resolution, rt, sampling, batch_size=GRID_BATCH,
            title="sampling", keep_in=None):
    """Images number 0 to N - 1, of a network's latents with these labels: see generate."""
    with parametrize.cached():
        return generate(net, labels, range(len(labels)), autoencoder.latent_shape(resolution), rt,
                        sampling, batch_size, title, to_image=autoencoder.decode,
                        alphas_bar=autoencoder.alphas_bar, keep_in=keep_in)


def main_sample(argv):
    """Generate the images that the flags ask for: sample.py's main, through the autoencoder."""
    parser = Parser("python -m latent.stable_diffusion sample --ckpt out/NAME/ckpt.pt --num 50000")
    add_checkpoint_flags(parser)
    add_image_flags(parser)
    add_sampling_flags(parser)
    add_output_flags(parser)
    args = parser.parse_args(argv)
    ckpt = disk.load(args.ckpt, ["latent"])
    classes, sampling = classes_and_sampling(args, ckpt)
    labels = labels_in_turn(classes, args.num)
    refuse_general(args, ckpt["config"]["cm"])
    rt = runtime.setup(args.device, dtype_of(args, ckpt))

    def make_images(keep_in):
        model, net = load_network(args, ckpt, rt.device)
        with general_only(net) if args.branch == "general" else nullcontext():
            return decoded(model, net, labels, ckpt["data"]["resolution"], rt, sampling,
                           args.batch_size, keep_in=keep_in)
    record = {**describe(args, ckpt, sampling, rt), "model": args.model or ckpt["config"]["model"],
              "model_sha256": ckpt["model_sha256"], "classes": classes, "num": args.num}
    out = samples_folder(args)
    make_samples(out, ckpt["data"], rt, record, labels, make_images, args.if_needed, args.png)
    runtime.print_next("evaluate.py", "--samples", out / "samples.npz")


# --------------------------------------------------------------------------------------------------
# Export

def to_peft(values):
    """{"general": B_1 A_1, "minority": BA}, each as PEFT names it; a part that is not there lacks.

    values: {name: tensor} of a checkpoint's low-rank parts. A part is {name: tensor} with
    "unet.LAYER.lora_A.weight" (r, k) and "...lora_B.weight" (d, r), to be added with scale 1.
    """
    parts = {}
    for name, value in values.items():
        # In the encoder or decoder; 0 is the LoRA and 1 the reserved part of a weight
        layer, which, matrix = re.fullmatch(
            r"[a-z]+\.(.+)\.parametrizations\.weight\.([01])\.([AB])", name).groups()
        part = parts.setdefault("general" if which == "0" else "minority", {})
        part[f"unet.{layer}.lora_{matrix}.weight"] = value.float()
    return parts


@torch.no_grad()
def merged_pipeline(args, ckpt):
    """diffusers' StableDiffusionPipeline with W_0 + B_1 A_1 + BA as plain weights of its U-Net.

    --branch general leaves BA out. The U-Net shares its blocks with the network cut from it.
    """
    diffusers, _ = packages()
    model, net = load_network(args, ckpt, torch.device("cpu"))
    merge(net, args.branch)         # where BA is; elsewhere the LoRA stays a parametrization
    for layer in list(net.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
    return diffusers.StableDiffusionPipeline(
        vae=model.vae, text_encoder=model.text.clip, tokenizer=model.text.tokenizer,
        unet=model.unet, scheduler=model.schedule, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


def main_export(argv):
    """Write the low-rank parts, or the merged pipeline, to a folder."""
    parser = Parser("python -m latent.stable_diffusion export --ckpt out/NAME/ckpt.pt --lora DIR")
    add_checkpoint_flags(parser)
    g = parser.add_argument_group("what is written")
    either = g.add_mutually_exclusive_group(required=True)
    either.add_argument("--lora", metavar="DIR",
                        help="general.safetensors and minority.safetensors, for "
                        "load_lora_weights")
    either.add_argument("--pipeline", metavar="DIR",
                        help="a StableDiffusionPipeline with the merged U-Net, for "
                        "from_pretrained")
    add_weights_flags(g)
    args = parser.parse_args(argv)
    if args.lora:
        refuse_unused(parser.given, {"branch": "--lora writes both parts, a file each",
                                     "model": "--lora writes what the checkpoint holds"})
    packages()
    ckpt = disk.load(args.ckpt, ["latent"])
    refuse_general(args, ckpt["config"]["cm"])
    if args.pipeline:
        write, kind = merged_pipeline(args, ckpt).save_pretrained, "pipeline"
        what = f"{args.branch} branch, a StableDiffusionPipeline"
    else:
        from safetensors.torch import save_file     # diffusers needs it, too
        parts, kind = to_peft(ckpt["ema" if args.weights == "ema" else "model"]), "lora"
        what = ", ".join(f"{name}.safetensors" for name in parts)

        def write(folder):
            for name, part in parts.items():
                save_file(part, folder / f"{name}.safetensors", metadata={"format": "pt"})
    folder = args.pipeline or args.lora
    disk.write_folder(folder, write, kind, f"--{kind}", settings={
        "ckpt": args.ckpt, "ckpt_sha256": ckpt.sha256, "step": ckpt["step"],
        "weights": args.weights, "branch": args.branch, "model_sha256": ckpt["model_sha256"],
        "config": ckpt["config"], "class_names": ckpt["data"]["class_names"]})
    print(f"wrote {folder}: {args.weights} weights; {what}")


# --------------------------------------------------------------------------------------------------

def main():
    """Train, sample or export, by the first word."""
    runtime.main_of("-m latent.stable_diffusion", __doc__, {
        "train": main_train, "sample": main_sample, "export": main_export})


if __name__ == "__main__":
    run(main)
