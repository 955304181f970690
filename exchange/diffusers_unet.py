"""The U-Net as diffusers' UNet2DModel with its DDIMScheduler, and back.

    python sample.py --ckpt out/NAME/ckpt.pt --export DIR --format diffusers
    python -m exchange.peers --from-diffusers DIR --to ours.pt

In diffusers it generates what sample.py does, here with guidance 1.5, for noise x (N, C, H, W),
labels y (N,) and Null's label, null (N,), which is the last, the number of classes:

    pipe = DDIMPipeline.from_pretrained("DIR")
    pipe.scheduler.set_timesteps(50)
    for t in pipe.scheduler.timesteps:
        eps = 2.5 * pipe.unet(x, t, y).sample - 1.5 * pipe.unet(x, t, null).sample
        x = pipe.scheduler.step(eps, t, x, use_clipped_model_output=True).prev_sample

Both networks compute one function, which an export checks by one call of both; names differ, and
Null is a row of zeros in theirs, since our y = -1 adds no vector. export.json, in DIR, has what a
checkpoint knows beside its weights, so that an export is read back whole, also where diffusers has
trained it further. To write one, diffusers is needed.
"""
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import GroupNorm

import disk
from model import ResBlock, UNet, UNetConfig
from runtime import UserError
from samplers import Sampling

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
KEPT = ("kind", "step", "command", "config", "data", "weights", "branch")   # in export.json
OUTSIDE = {     # our layers and theirs, outside of the blocks
    "encoder.embedding.linear1": "time_embedding.linear_1",
    "encoder.embedding.linear2": "time_embedding.linear_2",
    "encoder.embedding.label": "class_embedding",
    "encoder.head": "conv_in",
    "decoder.norm": "conv_norm_out",
    "decoder.conv": "conv_out",
}
IN_BLOCK = {    # theirs: of block B, residual block or attention number i of it
    "norm1": "{B}.resnets.{i}.norm1", "conv1": "{B}.resnets.{i}.conv1",
    "emb_proj": "{B}.resnets.{i}.time_emb_proj", "norm2": "{B}.resnets.{i}.norm2",
    "conv2": "{B}.resnets.{i}.conv2", "shortcut": "{B}.resnets.{i}.conv_shortcut",
    "attention.norm": "{B}.attentions.{i}.group_norm", "attention.q": "{B}.attentions.{i}.to_q",
    "attention.k": "{B}.attentions.{i}.to_k", "attention.v": "{B}.attentions.{i}.to_v",
    "attention.proj": "{B}.attentions.{i}.to_out.0",
}
LABEL = "encoder.embedding.label.weight"


def package():
    """diffusers, which only this file and stable_diffusion.py need. Raises UserError without it."""
    try:
        import diffusers
    except ImportError as e:
        raise UserError("the exchange with diffusers needs one more package: pip install "
                        "diffusers") from e
    return diffusers


# --------------------------------------------------------------------------------------------------
# Weights

def pairs_of(net):
    """[(a layer of ours, its name in theirs)], also for layers that a block may lack."""
    blocks = [(f"encoder.middle.{i}", "mid_block", i) for i in range(2)]
    pairs = list(OUTSIDE.items())
    for half, theirs, sampler in (("encoder.down", "down_blocks", "downsamplers"),
                                  ("decoder.up", "up_blocks", "upsamplers")):
        level, i = 0, 0
        for number, layer in enumerate(net.get_submodule(half)):
            if isinstance(layer, ResBlock):
                blocks.append((f"{half}.{number}", f"{theirs}.{level}", i))
                i += 1
            else:
                pairs.append((f"{half}.{number}.conv", f"{theirs}.{level}.{sampler}.0.conv"))
                level, i = level + 1, 0
    return pairs + [(f"{ours}.{layer}", name.format(B=B, i=i))
                    for ours, B, i in blocks for layer, name in IN_BLOCK.items()]


def is_projection(name, value):
    """Whether this is a matrix of attention: a 1 x 1 convolution here, a Linear in theirs."""
    return ".attention." in name and value.dim() > 1


def to_theirs(net):
    """Their state dict of a plain UNet: Null's row is added, and augmentation's weights left out.

    Samples are never augmented: what those weights multiply is zero.
    """
    names = dict(pairs_of(net))
    state = {}
    for name, value in net.state_dict().items():
        layer, kind = name.rsplit(".", 1)
        if layer in names:
            state[f"{names[layer]}.{kind}"] = (
                value.flatten(1) if is_projection(name, value) else value)
    label = state["class_embedding.weight"]
    state["class_embedding.weight"] = torch.cat([label, torch.zeros_like(label[:1])])
    return state


def to_ours(state, net):
    """Our state dict, for a UNet like `net`, of their weights. Raises KeyError for an unknown one.

    A row of Null that is not zero becomes a part of the time's bias: that is the same sum.
    """
    names = {theirs: ours for ours, theirs in pairs_of(net)}
    ours = {}
    for theirs, value in state.items():
        layer, kind = theirs.rsplit(".", 1)
        name = f"{names[layer]}.{kind}"
        ours[name] = value[:, :, None, None] if is_projection(name, value) else value
    null = ours[LABEL][-1]
    ours[LABEL] = ours[LABEL][:-1]
    if null.any():
        ours[LABEL] = ours[LABEL] - null
        ours["encoder.embedding.linear2.bias"] = ours["encoder.embedding.linear2.bias"] + null
    return ours


@torch.no_grad()
def refuse_difference(net, theirs):
    """Raise UserError where the two networks do not predict the same, with and without a label."""
    size = 2 ** len(net.cfg.ch_mult)
    x = torch.randn(2, net.cfg.channels, size, size, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([999, 500])
    null = net.cfg.num_classes
    expected = theirs.eval()(x, t, torch.tensor([0, null])).sample
    got = net(x, t, torch.tensor([0, -1]))
    if not (got - expected).abs().max() <= 1e-4 * expected.abs().max():    # nor if it is NaN
        raise UserError("--format diffusers: our U-Net and that of diffusers "
                        f"{package().__version__} do not predict the same; take another version")


# --------------------------------------------------------------------------------------------------
# A folder of theirs from a network of ours

def refuse_network(ckpt, net):
    """Raise UserError where a UNet2DModel cannot compute what `net` does."""
    if (ckpt["kind"] != "diffusion" or not isinstance(net, UNet) or net.cfg.ch_mult[0] != 1
            or len({m.num_groups for m in net.modules() if isinstance(m, GroupNorm)}) > 1):
        raise UserError("--format diffusers: a UNet2DModel is a U-Net for diffusion whose first "
                        "level is as wide as --ch and whose group norms all have 32 groups (--ch "
                        "128 and more); this network is another")


def their_network(net, size):
    """The UNet2DModel of a plain UNet for images of `size` pixels per side."""
    cfg = net.cfg
    levels = range(len(cfg.ch_mult))
    down = ["AttnDownBlock2D" if level in cfg.attn else "DownBlock2D" for level in levels]
    theirs = package().UNet2DModel(
        sample_size=size, in_channels=cfg.channels, out_channels=cfg.channels,
        freq_shift=0, flip_sin_to_cos=False, down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        block_out_channels=[cfg.ch * mult for mult in cfg.ch_mult],
        layers_per_block=cfg.num_res_blocks, dropout=cfg.dropout,
        attention_head_dim=None,            # one head, as wide as its block
        norm_num_groups=net.decoder.norm.num_groups, num_class_embeds=cfg.num_classes + 1)
    theirs.load_state_dict(to_theirs(net))
    return theirs


def write(ckpt, net, path):
    """Write a merged network, on the CPU, as a folder in diffusers' layout, whole or not at all.

    ckpt: the dict that disk.load returned. Its DDIMScheduler, in N steps, where N divides 1,000, is
    our sampling step for step, with use_clipped_model_output=True, an argument of its `step`.
    Raises UserError where they have no such network.
    """
    refuse_network(ckpt, net)
    theirs = their_network(net, ckpt["data"]["resolution"])
    refuse_difference(net, theirs)
    ours = Sampling.of("diffusion", ckpt["config"].get("recipe"))     # how it clips and ends
    schedule = package().DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
        prediction_type="epsilon", timestep_spacing="leading", steps_offset=0,
        set_alpha_to_one=ours.last_step == "x_0", clip_sample=ours.clip, clip_sample_range=1.0)
    pipeline = package().DDIMPipeline(theirs, schedule)
    known = {**{key: ckpt[key] for key in KEPT}, "network": {**vars(net.cfg), "augment_dim": 0}}
    disk.write_folder(path, pipeline.save_pretrained, "diffusers", "--export", checkpoint=known)


# --------------------------------------------------------------------------------------------------
# And back

def read(folder):
    """(what a checkpoint holds beside its weights, our state dict) of a folder that `write` made.

    Raises UserError for another folder.
    """
    made = disk.read_json(Path(folder) / "export.json")
    if not isinstance(made, dict) or made.get("kind") != "diffusers":
        raise UserError(f"--from-diffusers {folder}: not made by sample.py --format diffusers")
    known = made["checkpoint"]
    net = UNet(UNetConfig(**known["network"]))
    net.load_state_dict(to_ours(load_file(Path(folder) / WEIGHTS), net))
    return known, net.state_dict()
