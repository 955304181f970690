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
from torch.nn.functional import pad
from torch.nn.utils import parametrize

import disk
import runtime
from cm_layers import LowRank, checkpoint, general_only, merge, reserve, weight_matrices
from data import add_data_flags, load_long_tailed, refuse_other_data, unused_data_flags
from latent.autoencoder import (Autoencoder, LatentBatches, content_hash, encode_once, load_part,
                                packages)
from latent.captions import FORM, read_prompt, texts_of
from loop import (Training, add_step_flags, add_write_flags, config_of, is_finished, loop,
                  resume)
from losses import CMConfig, Objective, add_cm_flags, bind
from runtime import Parser, UserError, integer, number, refuse_unused, run
from sample import (add_image_flags, add_output_flags, add_sampling_flags, add_weights_flags,
                    classes_and_sampling, describe, dtype_of, generate, labels_in_turn,
                    make_samples, samples_folder)
from samplers import Sampling
from sets.readers import READERS
from train import IR, LATENT_RESOLUTION, preset_words

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")      # the layers of attention, in diffusers
PAINTING = "a {} painting"      # the text of ArtBench-10's images, Sec. 4.2
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

    Unlike LowRank's part, `general_only` does not switch it off.
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
    """Freeze a LatentUNet, and give it its low-rank parts, in place; return it.

    Every attention projection gets a LoRA, and those of the decoder a reserved part of rank
    cm_rank (None: no reserved part). Ranks are cut to what a matrix has.
    """
    net.requires_grad_(False)
    layers = [(layer, p) for name, layer, p in weight_matrices(net) if is_projection(name, layer)]
    for layer, p in layers:
        weight = getattr(layer, p)
        adapter = Adapter(weight, min(rank, *weight.shape))
        parametrize.register_parametrization(layer, p, adapter)
    if cm_rank:
        reserve(net.decoder, rank=cm_rank, where=is_projection)
    return net


def adapters(net):
    """{name: parameter} of all low-rank parts, in the network's order: what is trained and kept."""
    found = {}
    for name, module in net.named_modules():
        if isinstance(module, (Adapter, LowRank)):
            found[f"{name}.A"] = module.A
            found[f"{name}.B"] = module.B
    return found


@torch.no_grad()
def merge_adapters(net, branch="full"):
    """Write W_0 + B_1 A_1 + B A as plain weights, in place; return the network.

    branch "general" leaves BA out. The blocks, shared with the U-Net that `net` was cut from, are
    plain diffusers modules afterwards.
    """
    merge(net, branch)
    for _, layer, p in weight_matrices(net):
        if parametrize.is_parametrized(layer, p):
            parametrize.remove_parametrizations(layer, p)
    return net


# --------------------------------------------------------------------------------------------------
# The pre-trained model

class Model(Autoencoder):
    """The parts of a Stable Diffusion in diffusers' layout, in float32. Raises UserError.

    name: a folder, or a name on the Hugging Face hub. device: of the autoencoder; the U-Net and
    the text encoder stay on the CPU.
    """

    def __init__(self, name, device):
        diffusers, transformers = packages()

        def part(folder, kind):
            return load_part("--model", name, kind, folder)
        self.name = name
        self.unet = part("unet", diffusers.UNet2DConditionModel).float()    # perhaps float16
        super().__init__(part("vae", diffusers.AutoencoderKL), device)
        self.text = part("text_encoder", transformers.CLIPTextModel).float().eval()
        self.tokenizer = part("tokenizer", transformers.CLIPTokenizer)
        self.schedule = part("scheduler", diffusers.DDIMScheduler)
        self.multiple = self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        self.alphas_bar = self.schedule.alphas_cumprod.double()
        self.sha256 = content_hash([self.unet, self.vae, self.text], self.alphas_bar,
                                   self.vae.config.scaling_factor)
        predicts = self.schedule.config.prediction_type
        if predicts != "epsilon":
            raise UserError(f"--model {name}: predicts {predicts}, and the losses here are for "
                            "epsilon")

    def refuse_other(self, ckpt):
        """Raise UserError where a checkpoint was trained on another model."""
        if ckpt["model_sha256"] != self.sha256:
            raise UserError(f"--model {self.name}: its weights or its schedule are not those that "
                            "the checkpoint was trained on; take that model")

    @torch.no_grad()
    def prompts(self, class_names, prompt):
        """The encoded texts of all classes and the empty text: (K + 1, L, D) on the CPU.

        prompt: of captions.read_prompt.
        """
        texts = [*texts_of(prompt, class_names), ""]
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt",
                             max_length=self.tokenizer.model_max_length).input_ids
        return self.text(ids)[0]

    def network(self, class_names, config, values=None):
        """The LatentUNet of a run's settings, on the CPU; it is cut out of the model's U-Net.

        values: the low-rank parts of a checkpoint, {name: tensor}; None for their start.
        """
        net = LatentUNet(self.unet, self.prompts(class_names, config["prompt"]))
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
    g.add_argument("--model", default="lambdalabs/miniSD-diffusers",
                   help="a folder or hub name in diffusers' layout (default: "
                   "lambdalabs/miniSD-diffusers, the paper's)")
    g.add_argument("--prompt", help="the text of an image, {} its class; or the name of a .csv "
                   f'with lines class,text (default: "{FORM}"; artbench10: "{PAINTING}")')
    add_method_flags(g, base="oc")
    g.add_argument("--rank", type=integer(1), default=128, help="of the LoRA (default: 128)")
    g.add_argument("--cm-rank", type=integer(1), default=8,
                   help="of the reserved part (default: 8)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=integer(1), default=100,
                   help="may be raised to train longer (default: 100)")
    g.add_argument("--steps", type=integer(1),
                   help="training steps, in place of --epochs; may be raised")
    add_step_flags(g, lr=3e-4, warmup=0, ema=0.999)
    g.add_argument("--weight-decay", type=number(0), default=1e-6,
                   help="AdamW's (default: 1e-6)")
    g.add_argument("--checkpointing", action="store_true",
                   help="gradient checkpointing: the same gradients with less memory; a step takes "
                   "longer")
    add_write_flags(parser, save_every=500, sample_every=2000, log_every=50)
    parser.add_common("folder of the run (default: out/latent- and the settings)")
    return parser


def add_image_set_flags(parser, dataset):
    """data.py's flags, with the defaults of --ir and --resolution that resolve_data fills in."""
    group = add_data_flags(parser, dataset)
    for action in group._group_actions:
        if action.dest == "ir":
            action.help += preset_words("100", IR)
        elif action.dest == "resolution":
            action.help = ("pixels per side, of sets of image files (default: "
                           f"{LATENT_RESOLUTION}, miniSD's; Stable Diffusion 1 and 2 were trained "
                           "on 512)")


def add_method_flags(group, base):
    """--base, --cm and the constants of L_CM."""
    group.add_argument("--base", choices=("ddpm", "cbdm", "oc"), default=base,
                       help=f"L_base of Eq. (4) (default: {base})")
    group.add_argument("--cm", action=BooleanOptionalAction, default=True,
                       help="reserve capacity and add L_CM (default: on)")
    add_cm_flags(group)


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


def resolve(args, given, kind="latent", rank="cm_rank"):
    """Fill in what depends on other flags. given: Parser.given. Raises UserError.

    kind: the run's, in the name of its folder. rank: the flag of the reserved part's.
    """
    resolve_data(args, given)
    if not args.cm:
        refuse_unused(given, dict.fromkeys((rank, "lam", "w_con", "w_div", "div_bound"),
                                           "means something with --cm only"))
    if args.prompt is not None:
        args.prompt = read_prompt(args.prompt)
    elif kind == "latent":
        args.prompt = PAINTING if args.dataset == "artbench10" else FORM
    args.out = args.out or run_name(args, kind, args.base, *["cm"] * args.cm)
    return args


def load_images(args, rt, old):
    """The training images, which must be those of the run's checkpoint `old`. Raises UserError."""
    with rt.rank_0_first():
        images = load_long_tailed(args, old)
    if old:
        refuse_other_data(old["data"], images.record(), args)
    return images


class LatentTraining(Training):
    """A run whose checkpoints keep the low-rank parts only."""

    def weights(self):
        return {"adapters": self.params, "ema": self.ema}


def main_train(argv):
    """Resume or start; images and their latents; network; loop: train.py's main, on latents."""
    parser = make_train_parser()
    args = resolve(parser.parse_args(argv), parser.given)
    if args.steps:
        refuse_unused(parser.given, {"epochs": "--steps says how long"})
        args.epochs = None
    packages()              # fails here, before any work
    old, rt = resume(args, ["latent"], {"epochs", "checkpointing"})
    config = config_of(args)        # before args.steps follows from the number of images
    images = load_images(args, rt, old)
    if args.epochs:
        args.steps = math.ceil(args.epochs * len(images.labels) / args.batch_size)
    if is_finished(old, args, rt):
        return
    rt.print(images.table())
    rt.print(f'texts, such as "{texts_of(args.prompt, images.class_names)[0]}"')
    model, net = load_model(args, rt, images, old)
    objective = Objective(
        net=net, base=bind(args.base), counts=images.counts, alphas_bar=model.alphas_bar,
        cm=CMConfig.of(args), label_drop=args.label_drop).to(rt.device)
    optimizer = torch.optim.AdamW(adapters(net).values(), lr=args.lr,
                                  weight_decay=args.weight_decay, fused=True)
    record = {"kind": "latent", "config": config,
              "command": runtime.command_line("-m latent.stable_diffusion"),
              "data": images.record(), "model_sha256": model.sha256}
    moments = encode_once(model, images, args, rt)
    batches = LatentBatches(images, moments, args.batch_size, args.seed, rt.device)
    training = LatentTraining(args, rt, net, objective, batches, optimizer, record, old)
    loop(training, partial(grid_samples, model, net))


def load_model(args, rt, images, old):
    """(the Model, the LatentUNet to train) of a run's settings. Raises UserError."""
    model = Model(args.model, rt.device)
    model.latent_shape(images.images.shape[1])      # where it has none, this says so
    if old:
        model.refuse_other(old)
    torch.manual_seed(runtime.seed_of(args.seed, "init"))
    net = model.network(images.class_names, vars(args), old and old["adapters"]).to(rt.device)
    if args.checkpointing:
        model.unet.enable_gradient_checkpointing(partial(checkpoint, net))
    return model, net


def grid_samples(model, net, state, labels, rt):
    """Decoded images of a checkpoint's EMA weights, as the command `sample` makes them by default.

    uint8 (N, H, W, 3). The network's own low-rank parts are put back.
    """
    before = {name: p.detach().clone() for name, p in adapters(net).items()}
    net.load_state_dict(state["ema"], strict=False)
    images = decoded(model, net, labels, state["data"]["resolution"], rt,
                     Sampling.of("latent", seed=state["config"]["seed"]), GRID_BATCH, "grid")
    net.load_state_dict(before, strict=False)
    return images


# --------------------------------------------------------------------------------------------------
# Sampling

def make_sample_parser():
    """All flags of the command sample."""
    parser = Parser("python -m latent.stable_diffusion sample --ckpt out/NAME/ckpt.pt --num 50000")
    add_checkpoint_flags(parser)
    add_image_flags(parser)
    add_sampling_flags(parser)
    add_output_flags(parser)
    return parser


def add_checkpoint_flags(parser):
    """--ckpt and --model, the same for sampling and exporting."""
    parser.add_argument("--ckpt", required=True, help="a checkpoint of stable_diffusion.py train")
    parser.add_argument("--model",
                        help="where the pre-trained model is (default: the checkpoint's)")


def model_of(args, ckpt, device):
    """The Model of a checkpoint, from where --model says. Raises UserError for another one."""
    model = Model(args.model or ckpt["config"]["model"], device)
    model.refuse_other(ckpt)
    return model


def load_network(model, ckpt, weights):
    """The LatentUNet of a checkpoint, without gradients. weights: "ema" or "raw"."""
    values = ckpt["ema" if weights == "ema" else "adapters"]
    net = model.network(ckpt["data"]["class_names"], ckpt["config"], values)
    return net.to(model.device).requires_grad_(False)


def refuse_general(args, reserved):
    """Raise UserError where --branch general names what a checkpoint does not have."""
    if args.branch == "general" and not reserved:
        raise UserError("--branch general: this checkpoint has no reserved capacity (it was "
                        "trained with --no-cm)")


def decoded(model, net, labels, resolution, rt, sampling, batch_size, title="sampling",
            keep_in=None):
    """Images of a LatentUNet's latents, number 0 to N - 1, with these labels: see generate."""
    with parametrize.cached():
        return generate(net, labels, range(len(labels)), model.latent_shape(resolution), rt,
                        sampling, batch_size, title, to_image=model.decode,
                        alphas_bar=model.alphas_bar, keep_in=keep_in)


def main_sample(argv):
    """Generate the images that the flags ask for: sample.py's main, through the autoencoder."""
    args = make_sample_parser().parse_args(argv)
    ckpt = disk.load(args.ckpt, ["latent"])
    classes, sampling = classes_and_sampling(args, ckpt)
    labels = labels_in_turn(classes, args.num)
    refuse_general(args, ckpt["config"]["cm"])
    rt = runtime.setup(args.device, dtype_of(args, ckpt))

    def make_images(keep_in):
        model = model_of(args, ckpt, rt.device)
        net = load_network(model, ckpt, args.weights)
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

def make_export_parser():
    """All flags of the command export."""
    parser = Parser("python -m latent.stable_diffusion export --ckpt out/NAME/ckpt.pt --lora DIR")
    add_checkpoint_flags(parser)
    g = parser.add_argument_group("what is written")
    what = g.add_mutually_exclusive_group(required=True)
    what.add_argument("--lora", metavar="DIR",
                      help="general.safetensors and minority.safetensors, for load_lora_weights")
    what.add_argument("--pipeline", metavar="DIR",
                      help="a StableDiffusionPipeline with the merged U-Net, for from_pretrained")
    add_weights_flags(g)
    return parser


def to_peft(values):
    """{"general": B_1 A_1, "minority": BA}, each as PEFT names it; a part that is not there lacks.

    values: {name: tensor} of a checkpoint's low-rank parts. A part is {name: tensor} with
    "unet.LAYER.lora_A.weight" (r, k) and "...lora_B.weight" (d, r), to be added with scale 1. All
    layers have the largest of their ranks, filled up with zeros, where a narrow layer's is cut:
    older versions of diffusers scale every layer of a file by one of them.
    """
    parts = {"general": {}, "minority": {}}
    for name, value in values.items():
        # In the encoder or decoder; 0 is the LoRA and 1 the reserved part of a weight
        layer, which, matrix = re.fullmatch(
            r"[a-z]+\.(.+)\.parametrizations\.weight\.([01])\.([AB])", name).groups()
        part = parts["general" if which == "0" else "minority"]
        part[f"unet.{layer}.lora_{matrix}.weight"] = value.float()
    for part in parts.values():
        rank = max((min(value.shape) for value in part.values()), default=0)
        for name, value in part.items():
            missing = rank - min(value.shape)
            part[name] = pad(value, (0, 0, 0, missing) if ".lora_A." in name else (0, missing))
    return {name: part for name, part in parts.items() if part}


def merged_pipeline(args, ckpt):
    """diffusers' StableDiffusionPipeline with the U-Net of a checkpoint merged into it."""
    diffusers, _ = packages()
    model = model_of(args, ckpt, torch.device("cpu"))
    merge_adapters(load_network(model, ckpt, args.weights), args.branch)
    return diffusers.StableDiffusionPipeline(
        vae=model.vae, text_encoder=model.text, tokenizer=model.tokenizer, unet=model.unet,
        scheduler=model.schedule, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


def main_export(argv):
    """Write the low-rank parts, or the merged pipeline, to a folder."""
    parser = make_export_parser()
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
        parts, kind = to_peft(ckpt["ema" if args.weights == "ema" else "adapters"]), "lora"
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
