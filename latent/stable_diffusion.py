"""Stable Diffusion fine-tuned by LoRA on long-tailed images, with and without CM: Tables 6, G.3.

    pip install diffusers transformers
    torchrun -m latent.stable_diffusion train --dataset artbench10 --data-dir DIR   # CM on OC
    torchrun -m latent.stable_diffusion train ... --no-cm --base ddpm  # or cbdm, or oc
    python -m latent.stable_diffusion sample --ckpt out/NAME/ckpt.pt --num 50000   # samples.npz
    torchrun --nproc_per_node=8 -m -- latent.stable_diffusion sample ...     # -- for --num
    python evaluate.py --samples out/NAME/samples/samples.npz --data-dir DIR
    python -m latent.stable_diffusion export --ckpt out/NAME/ckpt.pt --lora FOLDER   # for diffusers
    python -m latent.stable_diffusion export --ckpt out/NAME/ckpt.pt --pipeline FOLDER # merged

As in Sec. 4.1: W = W_0 + B_1 A_1 + B A on the attention projections. W_0 is the frozen model.
B_1 A_1 is a LoRA of rank 128, which belongs to theta^g. BA is the reserved part, theta^e, of rank
8, in the up-sampling half. An image's text is "a {class} painting", Null is the empty text.

The paper leaves open which layers carry the LoRA (here those that LoRA is usually put on), what has
a "dropout rate of 0.1" (here the text) and whether weights are averaged (here as in train.py).

The losses are those of losses.py, on latents; images are not mirrored. Each image is encoded once
for all runs, into --pack-dir. A checkpoint holds the low-rank parts only. A run resumes by
repeating its command.

--lora writes general.safetensors (theta^g's LoRA) and minority.safetensors (theta^e). In diffusers,
pipe.load_lora_weights(FOLDER, weight_name="general.safetensors", adapter_name="general") loads one,
and pipe.set_adapters(["general", "minority"], [1.0, 0.5]) takes theta^e at half of its strength.
--pipeline writes the merged model with a DDIM scheduler. diffusers starts it one timestep later
than `stable_diffusion.py sample` does; from the same noise it gives the same images after

    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, steps_offset=0, set_alpha_to_one=True)
"""
import hashlib
import json
import math
from argparse import BooleanOptionalAction
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

import disk
import runtime
from cm_layers import LowRank, checkpoint, general_only, merge, reserve, weight_matrices
from data import (Batches, add_data_flags, device_limit, load_long_tailed, pack_path,
                  refuse_other_data, send, to_float, unused_data_flags)
from latent import latent_cache, latent_export
from loop import Training, add_write_flags, config_of, is_finished, loop, resume
from losses import CMConfig, Objective, add_cm_flags, bind
from runtime import Parser, UserError, integer, number, refuse_unused, run
from sample import (Sampling, add_image_flags, add_output_flags, add_sampling_flags,
                    add_weights_flags, chosen_classes, describe, dtype_of, generate,
                    labels_in_turn, make_samples, sampling_of)
from sets.readers import READERS
from train import IR, preset_words

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")      # the layers of attention, in diffusers
RESOLUTION = 256        # of image files, where no flag says it: that of the paper's model
WRITE_EVERY = {"save_every": 500, "sample_every": 2000, "log_every": 50}
GRID_BATCH = 25     # images of a grid that are generated at a time, beside what training holds
CM_ONLY = ("cm_rank", "lam", "w_con", "w_div", "div_bound")
OTHER_INPUTS = ("add_embedding", "class_embedding", "encoder_hid_proj")     # not Stable Diffusion 1


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
    cm_rank (None: no reserved part). Ranks are cut to what a matrix has. Raises ValueError where
    there is no attention.
    """
    net.requires_grad_(False)
    layers = [(layer, p) for name, layer, p in weight_matrices(net) if is_projection(name, layer)]
    if not layers:
        raise ValueError("no attention projections")
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


@torch.no_grad()
def load_adapters(net, values):
    """Copy {name: tensor} of a checkpoint into a network's low-rank parts.

    Raises UserError where the network has others.
    """
    found = adapters(net)
    ours = {name: list(p.shape) for name, p in found.items()}
    theirs = {name: list(value.shape) for name, value in values.items()}
    if ours != theirs:
        name = next(n for n in [*ours, *theirs] if ours.get(n) != theirs.get(n))
        raise UserError(f"--model: not the one that the checkpoint was trained on: {name} is "
                        f"{ours.get(name)} here and {theirs.get(name)} in the checkpoint")
    for name, p in found.items():
        p.copy_(values[name])


# --------------------------------------------------------------------------------------------------
# The pre-trained model

def packages():
    """diffusers and transformers, optional packages. Raises UserError without them."""
    try:
        import diffusers
        import transformers
    except ImportError as e:
        raise UserError("Stable Diffusion's parts need two more packages: pip install diffusers "
                        "transformers") from e
    return diffusers, transformers


def load_part(kind, name, part, **options):
    """A network of a class of diffusers or transformers, from a sub-folder of a model.

    Raises ValueError where weights are missing, which would be random numbers, and what the
    packages raise.
    """
    net, info = kind.from_pretrained(name, subfolder=part, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise ValueError(f"{part} lacks {sorted(info['missing_keys'])[0]}")
    return net


class Autoencoder:
    """Images to latents and back, by diffusers' AutoencoderKL or a network with its methods.

    vae: that network, which becomes frozen, in float32, on `device`. flag: which names it.
    """

    def __init__(self, vae, device, flag):
        self.vae = vae.float().to(device).eval().requires_grad_(False)
        self.device = device
        self.flag = flag

    @torch.no_grad()
    def encode(self, images):
        """uint8 (N, H, W, 3) -> the latents' distributions, NumPy, float32 (N, 2, C, h, w).

        They are normal: [:, 0] are the means, [:, 1] the standard deviations, both scaled.
        """
        pixels = torch.from_numpy(np.array(images)).to(self.device)
        latent = self.vae.encode(to_float(pixels)).latent_dist
        moments = torch.stack([latent.mean, latent.std], 1)
        scaled = self.vae.config.scaling_factor * moments.float().cpu()
        return finite(scaled, "encode", self.flag).numpy()

    def encoder_sha256(self):
        """A hash of all that `encode` computes with."""
        config = {k: v for k, v in self.vae.config.items() if not k.startswith("_")}
        return content_hash([self.vae], torch.empty(0), json.dumps(config, sort_keys=True))

    @torch.no_grad()
    def decode(self, z, batch_size=16):
        """Scaled latents (N, C, h, w) -> images (N, 3, H, W), about [-1, 1].

        In parts of batch_size, since pixels take more memory than latents.
        """
        scale = self.vae.config.scaling_factor
        parts = [self.vae.decode(part / scale).sample for part in z.split(batch_size)]
        return finite(torch.cat(parts), "decode", self.flag)

    def latent_shape(self, resolution, more=0, what="the autoencoder halves"):
        """(C, h, w) of the latents of images of `resolution` pixels per side. Raises UserError.

        more: how often the network that is trained halves them besides. what: halves images.
        """
        halvings = len(self.vae.config.block_out_channels) - 1
        multiple = 2 ** (halvings + more)
        if resolution % multiple:
            raise UserError(f"--resolution {resolution}: must be a multiple of {multiple}, since "
                            f"{what} images")
        size = resolution // 2 ** halvings
        return self.vae.config.latent_channels, size, size


class Model(Autoencoder):
    """The parts of a Stable Diffusion in diffusers' layout, in float32. Raises UserError.

    name: a folder, or a name on the Hugging Face hub. revision: a branch, tag or commit there.
    device: of the autoencoder; the U-Net and the text encoder stay on the CPU.
    """

    def __init__(self, name, device, revision=None):
        self.name = name
        try:
            unet, vae, text = self.load(revision)
        except (OSError, ValueError, RuntimeError, TypeError) as e:
            why = " ".join(str(e).split())[:200]
            raise UserError(f"--model {name}: cannot be loaded ({why}); name a folder or a hub "
                            "name of a Stable Diffusion in diffusers' layout") from e
        self.refuse_other_kinds(unet, vae)
        self.unet = unet.float()                # its file may hold float16
        super().__init__(vae, device, "--model")
        self.text = text.float().eval()
        self.alphas_bar = self.schedule.alphas_cumprod.double()
        self.sha256 = content_hash([self.unet, self.vae, self.text], self.alphas_bar,
                                   vae.config.scaling_factor)

    def load(self, revision):
        """The U-Net, the autoencoder and the text encoder; sets the tokenizer and the schedule."""
        diffusers, transformers = packages()
        if revision and Path(self.name).is_dir():
            raise UserError("--revision: a folder has none; leave it out")
        options = {"revision": revision} if revision else {}

        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(
            self.name, subfolder="tokenizer", **options)
        self.schedule = diffusers.DDIMScheduler.from_pretrained(
            self.name, subfolder="scheduler", **options)
        kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL,
                 "text_encoder": transformers.CLIPTextModel}
        return [load_part(kind, self.name, part, **options) for part, kind in kinds.items()]

    def refuse_other_kinds(self, unet, vae):
        """Raise UserError for a model that takes or predicts something else than LatentUNet."""
        predicts = self.schedule.config.prediction_type
        if predicts != "epsilon":
            raise UserError(f"--model {self.name}: predicts {predicts}, and the losses here are "
                            "for epsilon")
        others = [part for part in OTHER_INPUTS if getattr(unet, part, None) is not None]
        if others or unet.config.in_channels != vae.config.latent_channels:
            what = others[0] if others else f"{unet.config.in_channels} input channels"
            raise UserError(f"--model {self.name}: its U-Net has {what}; take a plain Stable "
                            "Diffusion, such as 1.x or miniSD")

    def refuse_other(self, ckpt):
        """Raise UserError where a checkpoint names another model (older ones name none)."""
        if ckpt.get("model_sha256") not in (None, self.sha256):
            raise UserError(f"--model {self.name}: its weights or its schedule are not those that "
                            "the checkpoint was trained on; take that model or another --revision")

    @torch.no_grad()
    def prompts(self, class_names, form):
        """The encoded texts of all classes and the empty text: (K + 1, L, D) on the CPU.

        form: the text with {} for the class.
        """
        texts = [form.format(name.replace("_", " ")) for name in class_names] + [""]
        longest = self.tokenizer.model_max_length
        ids = self.tokenizer(texts, padding="max_length", max_length=longest, truncation=True,
                             return_tensors="pt")
        if len(ids.input_ids.unique(dim=0)) < len(texts):
            raise UserError(f"--prompt {form}: two classes have the same text, which is cut after "
                            f"{longest} tokens; shorten it, or rename the classes")
        return self.text(ids.input_ids)[0]

    def latent_shape(self, resolution):
        """Autoencoder's, of images that the U-Net can halve as well. Raises UserError."""
        return super().latent_shape(resolution, len(self.unet.config.block_out_channels) - 1,
                                    "the autoencoder and the U-Net halve")

    def network(self, class_names, config):
        """The LatentUNet of a run's settings, on the CPU, its low-rank parts at their start."""
        net = LatentUNet(self.unet, self.prompts(class_names, config["prompt"]))
        cm_rank = config["cm_rank"] if config["cm"] else None
        try:
            return add_adapters(net, config["rank"], cm_rank)
        except ValueError as e:
            raise UserError(f"--model {config['model']}: {e}") from e


def finite(x, verb, flag):
    """x itself. Raises UserError where the autoencoder gave numbers that are not finite."""
    if not x.isfinite().all():
        raise UserError(f"{flag}: its autoencoder cannot {verb} these images (numbers that are "
                        "not finite); take another model")
    return x


def content_hash(modules, alphas_bar, scale):
    """A SHA-256 of all that a model computes with: its weights, its schedule, its scale."""
    digest = hashlib.sha256(repr(scale).encode())
    tensors = [value for module in modules for value in module.state_dict().values()]
    for value in [*tensors, alphas_bar]:
        digest.update(repr(list(value.shape)).encode())
        digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Training

def make_parser(command):
    """The Parser of a command, as yet without its flags."""
    parser = Parser(__doc__)
    parser.prog = f"stable_diffusion.py {command}"
    return parser


def make_train_parser():
    """All flags of `stable_diffusion.py train`."""
    parser = make_parser("train")
    add_data_flags(parser, "artbench10")
    add_method_flags(parser)
    add_optimisation_flags(parser)
    add_write_flags(parser)
    parser.add_common("folder of the run (default: out/latent- and the settings)")
    for action in parser._actions:
        if action.dest == "ir":
            action.help += preset_words("100", IR)
        elif action.dest == "resolution":
            action.help = (f"pixels per side, of sets of image files (default: {RESOLUTION}, "
                           "miniSD's; Stable Diffusion 1 and 2 were trained on 512)")
        elif action.dest in WRITE_EVERY:
            action.default = WRITE_EVERY[action.dest]
            action.help += f" (default: {action.default})"
    return parser


def add_method_flags(parser):
    """The model, the losses and the low-rank parts."""
    g = parser.add_argument_group("method")
    g.add_argument("--model", default="lambdalabs/miniSD-diffusers",
                   help="a folder or hub name in diffusers' layout (default: "
                   "lambdalabs/miniSD-diffusers, the paper's)")
    g.add_argument("--revision", help="of a model on the hub: a commit or a tag, kept with the run "
                   "(default: the newest)")
    g.add_argument("--prompt", default="a {} painting",
                   help='the text of an image, {} its class (default: "a {} painting")')
    g.add_argument("--base", choices=("ddpm", "cbdm", "oc"), default="oc",
                   help="L_base of Eq. (4) (default: oc)")
    g.add_argument("--cm", action=BooleanOptionalAction, default=True,
                   help="reserve capacity and add L_CM (default: on)")
    g.add_argument("--rank", type=integer(1), default=128, help="of the LoRA (default: 128)")
    g.add_argument("--cm-rank", type=integer(1), default=8,
                   help="of the reserved part (default: 8)")
    add_cm_flags(g)


def add_optimisation_flags(parser):
    """Epochs, batches, AdamW, averaged weights, and how often something is written."""
    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=integer(1), default=100,
                   help="may be raised to train longer (default: 100)")
    g.add_argument("--batch-size", type=integer(1), default=64,
                   help="images per step, over all processes (default: 64)")
    g.add_argument("--accumulate", type=integer(1), default=1, metavar="K",
                   help="passes per step, each over a K-th of the batch (default: 1)")
    g.add_argument("--lr", type=number(above=0), default=3e-4,
                   help="AdamW's learning rate (default: 3e-4)")
    g.add_argument("--weight-decay", type=number(0), default=1e-6, help="default: 1e-6")
    g.add_argument("--warmup", type=integer(0), default=0,
                   help="steps in which the learning rate rises linearly (default: 0)")
    g.add_argument("--grad-clip", type=number(above=0), default=1.0,
                   help="largest gradient norm (default: 1)")
    g.add_argument("--ema", type=number(0, 1), default=0.999,
                   help="decay of the averaged low-rank parts (default: 0.999)")
    g.add_argument("--label-drop", type=number(0, 1), default=0.1,
                   help="probability of the empty text (default: 0.1)")
    g.add_argument("--checkpointing", action="store_true",
                   help="gradient checkpointing: the same gradients with less memory; a step takes "
                   "longer")
    runtime.add_compile_flag(g)


def resolve(args, given):
    """Fill in what depends on other flags. given: Parser.given. Raises UserError."""
    if args.ir is None:
        args.ir = IR.get(args.dataset, 100.0)
    files = args.dataset in READERS and READERS[args.dataset].files
    if args.resolution is None and files:
        args.resolution = RESOLUTION
    if not args.cm:
        refuse_unused(given, {name: "means something with --cm only" for name in CM_ONLY})
    refuse_unused(given, unused_data_flags(args))
    rest = args.prompt.replace("{}", "")
    if rest == args.prompt or "{" in rest or "}" in rest:
        raise UserError(f"--prompt {args.prompt!r}: must hold {{}}, which stands for the class, "
                        "and no other braces")
    args.out = args.out or "out/" + run_name(args)
    return args


def run_name(args):
    """The folder name of a run: data, IR, base, cm, seed."""
    dataset = disk.path_id(args.data_dir) if args.dataset == "folder" else args.dataset
    words = ["latent", dataset, f"ir{args.ir:g}", args.base]
    if args.cm:
        words.append("cm")
    words.append(f"seed{args.seed}")
    return "-".join(words)


def make_network(model, class_names, config, old):
    """The LatentUNet to train: its initial low-rank parts, or those of the checkpoint `old`."""
    torch.manual_seed(runtime.seed_of(config["seed"], "init"))
    net = model.network(class_names, config)
    if old:
        load_adapters(net, old["adapters"])
    return net.to(model.device)


class LatentTraining(Training):
    """A run whose checkpoints keep the low-rank parts only."""

    def weights(self):
        return {"adapters": self.params, "ema": self.ema}


def draw_latents(moments, seed, step):
    """Latents (B, C, h, w) of a step, from their distributions (B, 2, C, h, w) of Model.encode."""
    mean, std = moments.unbind(1)
    g = runtime.generator(moments.device, seed, "latent", step)
    return mean + std * torch.randn(mean.shape, generator=g, device=moments.device)


def load_images(args, rt, old):
    """The images of a run, which must be those of its checkpoint `old`; sets args.steps."""
    with rt.rank_0_first():
        images = load_long_tailed(args, old)
    if images.images.shape[3] != 3:
        raise UserError(f"--dataset {args.dataset}: grey images, and Stable Diffusion is for "
                        "colour")
    args.steps = math.ceil(args.epochs * len(images.labels) / args.batch_size)
    if old:
        refuse_other_data(old["data"], images.record(), args)
    return images


def main_train(argv):
    """Resume or start; images and their latents; network; loop: train.py's main, on latents."""
    parser = make_train_parser()
    args = resolve(parser.parse_args(argv), parser.given)
    packages()              # fails here, before any work
    old, rt = resume(args, ["latent"], {"epochs", "checkpointing"})
    config = config_of(args)        # without args.steps, which the number of images gives
    images = load_images(args, rt, old)
    if is_finished(old, args, rt):
        return
    rt.print(images.summary())

    model, net = load_model(args, rt, images, config, old)
    objective = Objective(
        net=net, base=bind(args.base), counts=images.counts, alphas_bar=model.alphas_bar,
        cm=CMConfig.of(args), label_drop=args.label_drop).to(rt.device)
    optimizer = torch.optim.AdamW(adapters(net).values(), lr=args.lr,
                                  weight_decay=args.weight_decay, fused=True)
    record = {"kind": "latent", "config": config,
              "command": runtime.command_line("-m latent.stable_diffusion"),
              "data": images.record(), "model_sha256": model.sha256}
    batches = LatentBatches(args, rt, images, encoded(model, images, args, rt))
    training = LatentTraining(args, rt, net, objective, batches, optimizer, record, old)
    loop(training, partial(grid_samples, model, net))


def load_model(args, rt, images, config, old):
    """(the Model, the LatentUNet to train) of a run's settings. Raises UserError."""
    model = Model(args.model, rt.device, args.revision)
    model.latent_shape(images.images.shape[1])      # where it has none, this says so
    if old:
        model.refuse_other(old)
    net = make_network(model, images.class_names, config, old)
    if args.checkpointing:
        model.unet.enable_gradient_checkpointing(partial(checkpoint, net))
    return model, net


def encoded(model, images, args, rt):
    """The latents' distributions (N, 2, C, h, w), of Model.encode, kept beside the packed images.

    NumPy, memory-mapped.
    """
    resolution = images.images.shape[1]
    shape = (len(images.labels), 2, *model.latent_shape(resolution))
    rows = None if images.rows is None else hashlib.sha256(images.rows).hexdigest()
    made_from = {"images": images.sha256, "rows": rows, "resolution": resolution,
                 "scale": model.vae.config.scaling_factor, "encoder": model.encoder_sha256()}
    base = pack_path(args.dataset, args.data_dir, "train", resolution, args.pack_dir)
    return latent_cache.kept(base, made_from, shape,
                             lambda part: model.encode(images.images[part]), rt)


class LatentBatches:
    """`at(step)`: the latents of a step's images, drawn from `encoded`'s distributions, and labels.

    table: of captions.py, where each image has texts of its own; then also what chooses them.
    """

    def __init__(self, args, rt, images, moments, table=None):
        self.rt = rt
        self.seed = args.seed
        self.batches = Batches(images, args.batch_size, args.seed, rt.device, limit=0)
        self.table = table
        self.on_device = moments.nbytes <= device_limit(rt.device)
        self.moments = moments
        if self.on_device:
            self.moments = torch.from_numpy(np.array(moments)).to(rt.device)

    def at(self, step):
        """(x_0 (G, C, h, w), y (G,)[, condition]): what Objective.draw_batch takes."""
        rows = self.batches.rows(step)
        index = send(torch.from_numpy(rows), self.rt.device)
        own = self.moments[index] if self.on_device else send(
            torch.from_numpy(self.moments[rows]), self.rt.device)
        x_0 = draw_latents(own, self.seed, step)
        condition = self.table and self.table.condition(rows, self.seed, step)
        return x_0, self.batches.labels[index], condition


def grid_samples(model, net, state, labels, rt):
    """Decoded images of a checkpoint's EMA weights, as the command `sample` makes them by default.

    uint8 (N, H, W, 3). The network's own low-rank parts are put back.
    """
    before = {name: p.detach().clone() for name, p in adapters(net).items()}
    load_adapters(net, state["ema"])
    try:
        return decoded(model, net, labels, state["data"]["resolution"], rt,
                       Sampling.of(state["kind"], seed=state["config"]["seed"]), GRID_BATCH,
                       title="grid")
    finally:
        load_adapters(net, before)


# --------------------------------------------------------------------------------------------------
# Sampling

def make_sample_parser():
    """All flags of `stable_diffusion.py sample`."""
    parser = make_parser("sample")
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


def load_network(model, ckpt, weights):
    """The LatentUNet of a checkpoint, without gradients. weights: "ema" or "raw"."""
    net = model.network(ckpt["data"]["class_names"], ckpt["config"])
    load_adapters(net, ckpt["ema" if weights == "ema" else "adapters"])
    return net.to(model.device).requires_grad_(False)


def model_of(args, ckpt):
    """(name, revision) of a checkpoint's model, or of --model in its place."""
    config = ckpt["config"]
    name = args.model or config["model"]
    return name, config.get("revision") if name == config["model"] else None


def refuse_general(args, ckpt):
    """Raise UserError where --branch general names what a checkpoint does not have."""
    if args.branch == "general" and not ckpt["config"]["cm"]:
        raise UserError("--branch general: this checkpoint has no reserved capacity (it was "
                        "trained with --no-cm)")


def decoded(model, net, labels, resolution, rt, sampling, batch_size, title="sampling"):
    """Images of a LatentUNet's latents, number 0 to N - 1, with these labels: see generate."""
    with parametrize.cached():
        return generate(net, labels, range(len(labels)), model.latent_shape(resolution), rt,
                        sampling, batch_size, title, to_image=model.decode,
                        alphas_bar=model.alphas_bar)


def main_sample(argv):
    """Generate the images that the flags ask for: sample.py's main, through the autoencoder."""
    args = make_sample_parser().parse_args(argv)
    ckpt = disk.load(args.ckpt, ["latent"])
    sampling = sampling_of(args, "latent")
    classes = chosen_classes(args, ckpt["data"])
    labels = labels_in_turn(classes, args.num)
    refuse_general(args, ckpt)
    rt = runtime.setup(args.device, dtype_of(args, ckpt))
    name, revision = model_of(args, ckpt)

    def make_images():
        model = Model(name, rt.device, revision)
        model.refuse_other(ckpt)
        net = load_network(model, ckpt, args.weights)
        with general_only(net) if args.branch == "general" else nullcontext():
            return decoded(model, net, labels, ckpt["data"]["resolution"], rt, sampling,
                           args.batch_size)
    record = {**describe(args, ckpt, sampling, rt), "model": name, "revision": revision,
              "model_sha256": ckpt.get("model_sha256"), "classes": classes, "num": args.num}
    make_samples(args, ckpt, rt, record, labels, make_images)


# --------------------------------------------------------------------------------------------------
# Export

def make_export_parser():
    """All flags of `stable_diffusion.py export`."""
    parser = make_parser("export")
    add_checkpoint_flags(parser)
    g = parser.add_argument_group("what is written")
    what = g.add_mutually_exclusive_group(required=True)
    what.add_argument("--lora", metavar="DIR",
                      help="general.safetensors and minority.safetensors, for load_lora_weights")
    what.add_argument("--pipeline", metavar="DIR",
                      help="a StableDiffusionPipeline with the merged U-Net, for from_pretrained")
    add_weights_flags(g)
    return parser


def main_export(argv):
    """Write the low-rank parts, or the merged pipeline, to a folder."""
    parser = make_export_parser()
    args = parser.parse_args(argv)
    kind = "lora" if args.lora else "pipeline"
    folder = Path(args.lora or args.pipeline)
    if kind == "lora":
        refuse_unused(parser.given, {"branch": "--lora writes both parts, a file each",
                                     "model": "--lora writes what the checkpoint holds"})
    ckpt = disk.load(args.ckpt, ["latent"])
    refuse_general(args, ckpt)
    disk.refuse_other_folder(folder, kind, f"--{kind}")
    packages()
    if kind == "lora":
        parts = latent_export.to_peft(ckpt["ema" if args.weights == "ema" else "adapters"])
        write = partial(latent_export.write_lora, parts)
    else:
        write = merged_pipeline(args, ckpt).save_pretrained
    disk.write_folder(folder, write, kind, f"--{kind}", settings=export_record(args, ckpt))
    print(f"wrote {folder}: {args.weights} weights; "
          + (", ".join(f"{part}.safetensors" for part in parts) if kind == "lora" else
             f"{args.branch} branch, a StableDiffusionPipeline"))


def export_record(args, ckpt):
    """What an export was made from, for its JSON."""
    config = ckpt["config"]
    own = {"branch": args.branch} if args.pipeline else {}
    return {"ckpt": str(args.ckpt), "ckpt_sha256": ckpt.sha256, "step": ckpt["step"],
            "weights": args.weights, **own, "model": config["model"],
            "revision": config.get("revision"), "model_sha256": ckpt.get("model_sha256"),
            "prompt": config["prompt"], "class_names": ckpt["data"]["class_names"]}


def merged_pipeline(args, ckpt):
    """diffusers' StableDiffusionPipeline with the U-Net of a checkpoint merged into it."""
    diffusers, _ = packages()
    name, revision = model_of(args, ckpt)
    model = Model(name, torch.device("cpu"), revision)
    model.refuse_other(ckpt)
    merge_adapters(load_network(model, ckpt, args.weights), args.branch)
    return diffusers.StableDiffusionPipeline(
        vae=model.vae, text_encoder=model.text, tokenizer=model.tokenizer, unet=model.unet,
        scheduler=model.schedule, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


# --------------------------------------------------------------------------------------------------

COMMANDS = {
    "train": (main_train, make_train_parser), "sample": (main_sample, make_sample_parser),
    "export": (main_export, make_export_parser)}


def main():
    """Train, sample or export, by the first word."""
    runtime.main_of("-m latent.stable_diffusion", __doc__, COMMANDS)


if __name__ == "__main__":
    run(main)
