"""Checkpoints of CBDM-pytorch and OC_LT as checkpoints of this project, to sample and measure here.

    python -m exchange.peers --ckpt logs/ckpt_300000.pt --dataset cifar100 --ir 100 --to cbdm.pt
    python -m exchange.peers --from-diffusers DIR --to ours.pt      # of sample.py's export
    python evaluate.py --ckpt cbdm.pt

Both peers have one U-Net, that of pytorch-ddpm with labels, and one layout of their files; names
below are those of qym7/CBDM-pytorch 4530ee4 and MediaBrain-SJTU/OC_LT 3d95b13. Their averaged
weights ("ema_model") become a plain network, as sample.py --export writes it. What such a file does
not say comes from flags: the data set, whose classes the labels are, and how it was made
long-tailed. Their schedule must be their default, which is the paper's. --from-diffusers takes a
folder that sample.py exported, perhaps trained further there, back (diffusers_unet.py).
"""
import torch

import disk
import runtime
from data import add_data_flags, load_long_tailed, unused_data_flags
from exchange import diffusers_unet
from model import UNet, UNetConfig, make_alphas_bar, sinusoid
from runtime import Parser, UserError, refuse_unused, run
from sample import is_export

TABLE = "time_embedding.timembedding.0.weight"      # their sinusoids of all t, sin and cos in turn
OUTSIDE = {     # their layers and ours, outside of the blocks
    "time_embedding.timembedding.1": "encoder.embedding.linear1",
    "time_embedding.timembedding.3": "encoder.embedding.linear2",
    "label_embedding": "encoder.embedding.label",
    "head": "encoder.head",
    "tail.0": "decoder.norm",
    "tail.2": "decoder.conv",
}
HALVES = {"downblocks": "encoder.down", "middleblocks": "encoder.middle", "upblocks": "decoder.up"}
IN_BLOCK = {
    "block1.0": "norm1", "block1.2": "conv1", "temb_proj.1": "emb_proj", "block2.0": "norm2",
    "block2.3": "conv2", "shortcut": "shortcut", "attn.group_norm": "attention.norm",
    "attn.proj_q": "attention.q", "attn.proj_k": "attention.k", "attn.proj_v": "attention.v",
    "attn.proj": "attention.proj", "main": "conv",
}
UNUSED = ("augm_embedding.weight", TABLE)           # samples are never augmented; t's sinusoids


def our_name(name):
    """Our name of one of their parameters. Raises KeyError or ValueError for an unknown one."""
    layer, kind = name.rsplit(".", 1)
    if layer in OUTSIDE:
        return f"{OUTSIDE[layer]}.{kind}"
    half, number, inner = layer.split(".", 2)
    return f"{HALVES[half]}.{number}.{IN_BLOCK[inner]}.{kind}"


def network_of(state):
    """The plain dict of a UNetConfig, read from the shapes of their weights.

    Raises KeyError where a weight is missing.
    """
    ch, channels = state["head.weight"].shape[:2]
    levels = [[]]                                   # of the numbers of their residual blocks
    for i in range(1 + max(int(n.split(".")[1]) for n in state if n.startswith("downblocks."))):
        if f"downblocks.{i}.main.weight" in state:
            levels.append([])
        else:
            levels[-1].append(i)
    widths = [len(state[f"downblocks.{level[0]}.block1.2.weight"]) for level in levels]
    attn = [k for k, level in enumerate(levels)
            if f"downblocks.{level[0]}.attn.proj.weight" in state]
    return {"channels": channels, "num_classes": len(state["label_embedding.weight"]), "ch": ch,
            "ch_mult": [width // ch for width in widths], "attn": attn,
            "num_res_blocks": len(levels[0]), "dropout": 0.1, "augment_dim": 0}


def translate(state):
    """(the dict of a UNetConfig, our state dict) of theirs. Raises UserError."""
    try:
        network = network_of(state)
        ours = {our_name(name): value for name, value in state.items() if name not in UNUSED}
        # Ours has all sines first
        name = "encoder.embedding.linear1.weight"
        ours[name] = torch.cat([ours[name][:, 0::2], ours[name][:, 1::2]], 1)
        UNet(UNetConfig(**network)).load_state_dict(ours)
        table = state[TABLE]
    except (KeyError, ValueError, IndexError, RuntimeError) as e:
        raise UserError(f"--ckpt: not the U-Net with labels of CBDM-pytorch or OC_LT ({e})") from e
    if network["ch"] < 128:
        raise UserError(f"--ckpt: {network['ch']} channels; its group norms have 32 groups, and "
                        "ours have fewer below 128 channels")
    T = len(make_alphas_bar())
    waves = sinusoid(torch.arange(T), network["ch"])
    expected = torch.stack(waves.chunk(2, 1), 2).flatten(1)
    if table.shape != expected.shape or (table - expected).abs().max() > 0.01:
        raise UserError(f"--ckpt: its timesteps are not 0 to {T - 1}; here there is no other "
                        "schedule")
    return network, ours


def read(path):
    """(their averaged weights, the step) of one of their files. Raises UserError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:          # of many kinds
        raise UserError(f"--ckpt {path}: cannot be read as a checkpoint of tensors and plain "
                        "types") from e
    if not isinstance(content, dict) or "ema_model" not in content:
        raise UserError(f"--ckpt {path}: has no \"ema_model\"; name a ckpt_STEP.pt of CBDM-pytorch "
                        "or OC_LT")
    return content["ema_model"], content.get("step", 0)


def describe(args, network, step):
    """What a checkpoint holds beside its weights, for one that does not say it: from the flags.

    network: the dict of a UNetConfig. Raises UserError.
    """
    record = load_long_tailed(args).record()
    if len(record["class_names"]) != network["num_classes"]:
        raise UserError(f"--dataset {args.dataset}: {len(record['class_names'])} classes, and the "
                        f"network has {network['num_classes']}")
    settings = {k: v for k, v in vars(args).items() if k not in ("ckpt", "from_diffusers", "to")}
    config = {**settings, "dtype": "float32", "seed": 0, "imported_from": disk.sha256(args.ckpt)}
    return {"kind": "diffusion", "step": step, "command": runtime.command_line("-m exchange.peers"),
            "config": config, "data": record, "weights": "ema", "branch": "full",
            "network": network}


def main():
    """Translate one file or folder."""
    parser = Parser(__doc__)
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--ckpt", help="a ckpt_STEP.pt of CBDM-pytorch or OC_LT")
    one.add_argument("--from-diffusers", metavar="DIR",
                     help="a folder that sample.py exported; it needs no data flags")
    parser.add_argument("--to", required=True, metavar="FILE", help="the file to write")
    data_flags = [action.dest for action in add_data_flags(parser, ir=100.0)._group_actions]
    args = parser.parse_args()
    refuse_unused(parser.given, unused_data_flags(args))
    disk.refuse_overwriting(args.to, is_export, "--to", "an export")
    if args.ckpt:
        state, step = read(args.ckpt)
        network, ours = translate(state)
        known = describe(args, network, step)
    else:
        why = f"the export in {args.from_diffusers} says it itself"
        refuse_unused(parser.given, dict.fromkeys(data_flags, why))
        known, ours = diffusers_unet.read(args.from_diffusers)
    disk.save(args.to, {
        **known, "rank_ratio": None, "experts": None, "model": ours, "ema": ours}, "--to")
    print(f"wrote {args.to}: {sum(v.numel() for v in ours.values()):,} parameters of step "
          f"{known['step']}")


if __name__ == "__main__":
    run(main)
