"""Stable Diffusion fine-tuned by LoRA on long-tailed images, with and without CM: Tables 6 and G.3.

    pip install diffusers transformers
    torchrun latent.py train --dataset artbench10 --data-dir DIR --ir 100            # CM on OC; --no-cm, --base ddpm | cbdm | oc
    python latent.py sample --ckpt out/NAME/ckpt.pt --num 50000                       # samples.npz, grid.png; torchrun -- latent.py ...
    python evaluate.py --samples out/NAME/samples/samples.npz --data-dir DIR

As in Sec. 4.1: W = W_0 + B_1 A_1 + B A on the attention projections, W_0 the frozen model, B_1 A_1 a LoRA of rank 128 that
belongs to theta^g, and BA the reserved part, theta^e, of rank 8, in the up-sampling half. An image's text is "a {class}
painting", Null is the empty text. The paper leaves open which layers carry the LoRA (here those that LoRA is usually put
on), what has a "dropout rate of 0.1" (here the text) and whether weights are averaged (here as in train.py).

The losses are those of losses.py, on latents; images are not mirrored. A checkpoint holds the low-rank parts only. A run resumes by repeating its command.
"""
import math
import shlex
import sys
import time
from argparse import BooleanOptionalAction
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

import runtime
from cm_layers import LowRank, general_only, matrices, reserve
from data import Batches, add_data_flags, load_long_tailed, splits, to_float
from losses import Objective, draw
from runtime import Parser, UserError, integer, number, run
from sample import add_sampling_flags, describe, dtype_of, generate, sampling_settings, write_samples
from train import Log, Window, loop

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
FREE = {"save_every", "log_every", "device", "out", "data_dir", "pack_dir", "accumulate", "epochs", "steps"}


# ----------------------------------------------------------------------------------------------------------------------
# The network: diffusers' U-Net, cut as model.py cuts its own

class Encoder(nn.Module):
    """The half that theta and theta^g share. prompts (K + 1, L, D): the text of each class, the empty one last."""

    def __init__(self, unet, prompts):
        super().__init__()
        self.time_proj, self.time_embedding, self.conv_in = unet.time_proj, unet.time_embedding, unet.conv_in
        self.down_blocks, self.mid_block = unet.down_blocks, unet.mid_block
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
        self.up_blocks, self.conv_norm_out = unet.up_blocks, unet.conv_norm_out
        self.conv_act, self.conv_out = unet.conv_act, unet.conv_out

    def forward(self, h, skips, emb, text):
        for block in self.up_blocks:
            n = len(block.resnets)
            own, skips = tuple(skips[-n:]), skips[:-n]
            h = block(h, own, emb, **text_of(block, text))
        return self.conv_out(self.conv_act(self.conv_norm_out(h)))


def text_of(block, text):
    """The text, as the keyword that a block with cross-attention takes, and nothing for the others."""
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}


class LatentUNet(nn.Module):
    """eps_theta(x_t, t, y) on latents x_t (N, 4, h, w), with the methods of model.UNet that losses.py calls."""

    def __init__(self, unet, prompts):
        super().__init__()
        self.encoder, self.decoder = Encoder(unet, prompts), Decoder(unet)

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


class Adapter(nn.Module):
    """W_0 -> W_0 + B_1 A_1, a LoRA that is a part of theta^g: unlike LowRank's, `general_only` does not switch it off."""

    def __init__(self, weight, rank):
        super().__init__()
        self.A, self.B = nn.Parameter(weight.new_empty(rank, weight.shape[1])), nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, W):
        return W + self.B @ self.A


def add_adapters(net, rank, cm_rank=None):
    """Freeze a LatentUNet, give its attention projections a LoRA and those of its decoder a reserved part; return it.

    cm_rank: None for no reserved part. Ranks are cut to what a matrix has. Raises ValueError where there is no attention.
    """
    net.requires_grad_(False)
    chosen = lambda name, layer: name.endswith(PROJECTIONS)
    layers = [(layer, p) for name, layer, p in matrices(net) if chosen(name, layer)]
    if not layers:
        raise ValueError("no attention projections")
    for layer, p in layers:
        weight = getattr(layer, p)
        parametrize.register_parametrization(layer, p, Adapter(weight, min(rank, *weight.shape)))
    if cm_rank:
        reserve(net.decoder, rank=cm_rank, where=chosen)
    return net


def adapters(net):
    """{name: parameter} of all low-rank parts of a network, in the order of the network: what is trained and kept."""
    return {f"{name}.{p}": getattr(m, p) for name, m in net.named_modules() if isinstance(m, (Adapter, LowRank)) for p in ("A", "B")}


# ----------------------------------------------------------------------------------------------------------------------
# The pre-trained model

def packages():
    """diffusers and transformers, which this file alone needs. Raises UserError where they are not installed."""
    try:
        import diffusers
        import transformers
    except ImportError:
        raise UserError("latent.py needs two more packages: pip install diffusers transformers")
    return diffusers, transformers


class Model:
    """The parts of a Stable Diffusion in diffusers' layout: a folder, or a name on the Hugging Face hub. Raises UserError."""

    def __init__(self, name, device):
        diffusers, transformers = packages()
        load = lambda kind, part: kind.from_pretrained(name, subfolder=part)
        try:
            self.unet = load(diffusers.UNet2DConditionModel, "unet").float()            # which may lie there as float16
            self.vae = load(diffusers.AutoencoderKL, "vae").float().to(device).eval().requires_grad_(False)
            self.text, self.tokenizer = load(transformers.CLIPTextModel, "text_encoder").float().eval(), load(transformers.CLIPTokenizer, "tokenizer")
            schedule = load(diffusers.DDIMScheduler, "scheduler")
        except (OSError, ValueError, RuntimeError, TypeError) as e:
            raise UserError(f"--model {name}: cannot be loaded ({' '.join(str(e).split())[:200]}); name a folder or a hub name of a Stable "
                            f"Diffusion in diffusers' layout")
        if schedule.config.prediction_type != "epsilon":
            raise UserError(f"--model {name}: predicts {schedule.config.prediction_type}, and the losses here are for epsilon")
        self.alphas_bar, self.device = schedule.alphas_cumprod.double(), device

    @torch.no_grad()
    def prompts(self, class_names, form):
        """The text encoder's states of every class's text and of the empty text: (K + 1, L, D) on the CPU."""
        texts = [form.format(name.replace("_", " ")) for name in class_names] + [""]
        ids = self.tokenizer(texts, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True, return_tensors="pt")
        return self.text(ids.input_ids)[0]

    @torch.no_grad()
    def encode(self, images, rt, batch_size=16):
        """uint8 (N, H, W, 3) -> mean and standard deviation of the latents, scaled: float32 (N, 2, C, h, w) on the CPU."""
        parts, scale = [], self.vae.config.scaling_factor
        for first in runtime.progress(range(0, len(images), batch_size), desc="latents", unit="batch", disable=rt.rank > 0):
            x = to_float(torch.from_numpy(np.array(images[first:first + batch_size])).to(self.device))
            law = self.vae.encode(x).latent_dist
            parts.append(scale * torch.stack([law.mean, law.std], 1).float().cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, z, batch_size=16):
        """Scaled latents (N, C, h, w) -> images (N, 3, H, W), about [-1, 1]; in parts, since pixels take more memory than latents."""
        return torch.cat([self.vae.decode(part / self.vae.config.scaling_factor).sample for part in z.split(batch_size)])

    def network(self, class_names, config):
        """The LatentUNet of a run's settings, on the CPU."""
        net = LatentUNet(self.unet, self.prompts(class_names, config["prompt"]))
        try:
            return add_adapters(net, config["rank"], config["cm_rank"] if config["cm"] else None)
        except ValueError as e:
            raise UserError(f"--model {config['model']}: {e}")


# ----------------------------------------------------------------------------------------------------------------------
# Training

def make_parser():
    """The flags of `latent.py train`."""
    parser = Parser(__doc__)
    add_data_flags(parser, "artbench10", 100.0)
    g = parser.add_argument_group("method")
    g.add_argument("--model", default="lambdalabs/miniSD-diffusers", help="a folder or hub name in diffusers' layout (default: "
                   "lambdalabs/miniSD-diffusers, the paper's)")
    g.add_argument("--prompt", default="a {} painting", help='an image\'s text, {} its class (default: "a {} painting")')
    g.add_argument("--base", choices=("ddpm", "cbdm", "oc"), default="oc", help="L_base of Eq. (4) (default: oc)")
    g.add_argument("--cm", action=BooleanOptionalAction, default=True, help="reserve capacity and add L_CM (default: on)")
    g.add_argument("--rank", type=integer(1), default=128, help="of the LoRA (default: 128)")
    g.add_argument("--cm-rank", type=integer(1), default=8, help="of the reserved part (default: 8)")
    g.add_argument("--lam", type=number(0), default=1.0, help="lambda of Eq. (4) (default: 1)")
    g.add_argument("--w-con", type=number(0), default=1.0, help="weight of L_Con (default: 1)")
    g.add_argument("--w-div", type=number(0), default=1.0, help="weight of L_Div (default: 1)")
    g.add_argument("--div-bound", type=number(0), default=0.01, metavar="M", help="as in train.py (default: 0.01)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=integer(1), default=100, help="may be raised to train longer (default: 100)")
    g.add_argument("--batch-size", type=integer(1), default=64, help="images a step, over all processes (default: 64)")
    g.add_argument("--accumulate", type=integer(1), default=1, metavar="K", help="passes a step, each over a K-th of the batch (default: 1)")
    g.add_argument("--lr", type=number(above=0), default=3e-4, help="AdamW's learning rate (default: 3e-4)")
    g.add_argument("--weight-decay", type=number(0), default=1e-6, help="default: 1e-6")
    g.add_argument("--warmup", type=integer(0), default=0, help="steps in which the learning rate rises linearly (default: 0)")
    g.add_argument("--grad-clip", type=number(above=0), default=1.0, help="largest gradient norm (default: 1)")
    g.add_argument("--ema", type=number(0, 1), default=0.999, help="decay of the averaged low-rank parts (default: 0.999)")
    g.add_argument("--label-drop", type=number(0, 1), default=0.1, help="chance of the empty text (default: 0.1)")
    g.add_argument("--save-every", type=integer(1), default=500, help="steps between writes of ckpt.pt (default: 500)")
    g.add_argument("--log-every", type=integer(1), default=50, help="steps between log lines (default: 50)")
    parser.add_common("folder of the run (default: out/latent- and the settings)")
    return parser


def main_train(argv):
    """Resume or start, encode the images, build the network, and run the loop: train.py's main, on latents."""
    args = make_parser().parse_args(argv)
    packages()              # fails here, before any work
    args.out = args.out or f"out/latent-{args.dataset}-ir{args.ir:g}-{args.base}{'-cm' * args.cm}-seed{args.seed}"
    out, path = Path(args.out), Path(args.out) / "ckpt.pt"
    old = runtime.load(path, ["latent"], "--out") if path.exists() else None
    rt = runtime.setup(args.device, old["config"]["dtype"] if old and args.dtype == "auto" else args.dtype)
    args.dtype = str(rt.dtype).removeprefix("torch.")
    if args.batch_size % (rt.world * args.accumulate):
        raise UserError(f"--batch-size {args.batch_size}: not divisible by {rt.world} processes x --accumulate {args.accumulate}")
    config, command = {k: v for k, v in vars(args).items() if k not in ("device", "out")}, shlex.join(["python", "latent.py", *sys.argv[1:]])
    if old:
        defaults = vars(make_parser().parse_args([]))
        runtime.refuse_changes(old["config"], {k: v for k, v in config.items() if k not in FREE}, out, defaults)
    rt.agree(old["step"] if old else 0, out)
    with rt.rank_0_first():
        images = load_long_tailed(args)
    data_record = {"dataset": args.dataset, "class_names": images.class_names, "class_counts": images.counts.tolist(),
                   "resolution": images.images.shape[1], "provenance": images.provenance}
    if old and old["data"] != data_record:
        raise UserError(f"--data-dir {args.data_dir}: not the images that the run in {out} was started with; choose another folder with --out")
    args.steps = math.ceil(args.epochs * len(images.labels) / args.batch_size)
    if old and old["step"] >= args.steps:
        return rt.print(f"{out}: finished, step {old['step']} of {args.steps}")
    if images.images.shape[3] != 3:
        raise UserError(f"--dataset {args.dataset}: grey images, and Stable Diffusion is for colour")
    rt.print(images.summary())

    model = Model(args.model, rt.device)
    moments = model.encode(images.images, rt)
    torch.manual_seed(runtime.seed_of(args.seed, "init"))
    net = model.network(images.class_names, config).to(rt.device)
    trained = adapters(net)
    if old:
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(old["adapters"][name])
    params = list(trained.values())
    ema = [(old["ema"][n].to(rt.device) if old else p.detach()).clone() for n, p in trained.items()]
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    objective = Objective(net, args.base, images.counts, model.alphas_bar, args.lam, args.w_con, args.w_div, args.div_bound,
                          args.label_drop).to(rt.device)
    batches, step, window = Batches(images, args.batch_size, args.seed, "cpu", limit=0), 0, Window(images.counts, images.class_names, rt.device)
    if old:
        step = old["step"]
        optimizer.load_state_dict(old["optimizer"])
        window.restore(old["window"])

    def batch(s, k):
        rows = torch.from_numpy(batches.rows(s))
        mean, std = moments[rows].to(rt.device).unbind(1)
        x_0 = mean + std * torch.randn(mean.shape, generator=runtime.generator(rt.device, args.seed, "latent", s), device=rt.device)
        return draw(x_0, batches.labels[rows].to(rt.device), objective, args.seed, s, rt.rank * args.accumulate + k, rt.world * args.accumulate)

    numbers = [sum(p.numel() for m in net.modules() if isinstance(m, kind) for p in m.parameters()) for kind in (Adapter, LowRank)]
    rt.print(f"network: {sum(p.numel() for p in net.parameters()) - sum(numbers):,} parameters, frozen + {numbers[0]:,} of the LoRA"
             + f" + {numbers[1]:,} reserved" * args.cm + f"; {rt.device}, {args.dtype}, {rt.world} process{'es' * (rt.world > 1)}")
    rt.print(f"{'resuming' if old else 'starting'} {out} at step {step} of {args.steps}")
    if rt.rank == 0:
        runtime.write_json(out / "config.json", {"command": command, "config": config, "data": data_record, "torch": torch.__version__})

    def state(step):
        return {"kind": "latent", "step": step, "command": command, "config": config, "data": data_record, "adapters": trained,
                "ema": dict(zip(trained, ema)), "optimizer": optimizer.state_dict(), "window": window.state()}
    loop(args, rt, step, rt.parallel(objective), batch, params, ema, optimizer, window, Log(out, step) if rt.rank == 0 else None, state)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling

def main_sample(argv):
    """Draw images from a checkpoint of `latent.py train`: sample.py's main, through the autoencoder."""
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", required=True, help="a checkpoint of latent.py train")
    parser.add_argument("--model", help="where the pre-trained model is (default: the checkpoint's)")
    parser.add_argument("--num", type=integer(1), default=100, help="images, over all classes (default: 100)")
    add_sampling_flags(parser)
    parser.add_argument("--png", action="store_true", help="also one PNG an image, one folder a class")
    parser.add_argument("--if-needed", action="store_true", help="do nothing where --out was made with these settings already")
    parser.add_common("folder of the results (default: samples beside the checkpoint)")
    args = parser.parse_args(argv)
    ckpt = runtime.load(args.ckpt, ["latent"])
    rt, config, data, settings = runtime.setup(args.device, dtype_of(args, ckpt)), ckpt["config"], ckpt["data"], sampling_settings(args, "diffusion")
    out = Path(args.out or Path(args.ckpt).parent / ("samples" if args.branch == "full" else "samples-general"))
    record = {**describe(args, ckpt, settings), "model": args.model or config["model"], "num": args.num, "dtype": str(rt.dtype)}
    if args.if_needed and runtime.up_to_date(out / "samples.json", record) and (out / "samples.npz").exists():
        return rt.print(f"{out}: up to date")
    if args.branch == "general" and not config["cm"]:
        raise UserError("--branch general: this checkpoint has no reserved capacity (it was trained with --no-cm)")
    start, model, names = time.time(), Model(record["model"], rt.device), data["class_names"]
    net = model.network(names, config).to(rt.device).requires_grad_(False)
    for name, p in adapters(net).items():
        p.copy_(ckpt["ema" if args.weights == "ema" else "adapters"][name])
    labels = [i % len(names) for i in range(args.num)]
    size = data["resolution"] // 2 ** (len(model.vae.config.block_out_channels) - 1)
    shape = (model.unet.config.in_channels, size, size)
    with general_only(net) if args.branch == "general" else nullcontext(), parametrize.cached():
        images = generate(net, labels, range(args.num), shape, rt, args.batch_size, to_image=model.decode, alphas_bar=model.alphas_bar, **settings)
    if rt.rank == 0:
        write_samples(out, images, labels, names, record, data, time.time() - start, args.png)


def main():
    """Train or sample, by the first word."""
    what = sys.argv[1] if len(sys.argv) > 1 else "--help"
    mains = {"train": main_train, "sample": main_sample}
    if what in ("-h", "--help"):
        return print(__doc__ + "\nlatent.py train --help and latent.py sample --help list the flags.")
    if what not in mains:
        raise UserError(f"latent.py {what}: say train or sample first")
    mains[what](sys.argv[2:])


if __name__ == "__main__":
    run(main)
