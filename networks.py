"""The table of networks that train.py can train; building one from settings or a checkpoint.

A network is a torch module with these, of which losses.py and sample.py know nothing else:

    encode(x_t, t, y, masks=(), a=None) -> tuple    what decode takes; theta and theta^g share it
    decode(*encoded, masks=()) -> eps               like x_t, (N, channels, size, size)
    forward(x_t, t, y) -> eps                       = decode(*encode(x_t, t, y))
    decoder                                         the submodule in which capacity is reserved
    draw_masks(n, size, generator)                  (dropout masks for encode, for decode), or
                                                    ([], [])

Its settings are the arguments of what stands in NETWORKS: channels, num_classes and size (pixels),
which the data give, augment_dim (what --ada adds), and flags of train.py by their names.
"""
import inspect
from functools import partial

import torch
from torch import nn

from cm_layers import checkpoint, merge, reserve
from data import class_groups
from model import ResBlock, UNet, UNetConfig
from runtime import Plugins, UserError, integer
from variants.dit import Block, DiT
from variants.experts import add_group_experts

KINDS = ("diffusion", "consistency", "latent diffusion")    # of checkpoints with these networks


def unet(**settings):
    """A UNet from the settings of a UNetConfig."""
    return UNet(UNetConfig(**settings))


unet.__signature__ = inspect.signature(UNetConfig)

NETWORKS = {"unet": unet, "dit": DiT}
FLAGS = {       # flags of train.py, {setting: (type, help)}; the defaults are the networks' own
    "depth": (integer(1), "blocks of --network dit"),
    "patch": (integer(1), "pixels of the side of a patch of --network dit"),
}
RESERVE = {     # which matrices of a decoder are split by Eq. (1), by their name and layer
    "all": lambda name, layer: True,
    # The authors' release: of the residual blocks and the up-samplings, and not of the output
    "conv3x3": lambda name, layer: (name.startswith("up.") and isinstance(layer, nn.Conv2d)
                                    and layer.kernel_size == (3, 3)),
}


def options_of(name):
    """{setting: default} of a network of the table; one without a default has None."""
    parameters = inspect.signature(NETWORKS[name]).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


def settings_of(name, values):
    """What `build` takes, plain types for a checkpoint: a network's settings, out of `values`."""
    settings = {key: values[key] for key in options_of(name) if key in values}
    return settings if name == "unet" else {"network": name, **settings}


def build(network, rank_ratio=None, experts=None, form="flat", where="all"):
    """An untrained network from a dict of `settings_of`, with add_low_rank's parts if any.

    Without a name it is a U-Net. Raises UserError for a network that is not in the table, and what
    the network itself raises.
    """
    settings = dict(network)
    name = settings.pop("network", "unet")
    if name not in NETWORKS:
        raise UserError(f"--ckpt: its network is {name!r}, and known are {', '.join(NETWORKS)}; "
                        "name the file that has it with --plugin")
    return add_low_rank(NETWORKS[name](**settings), rank_ratio, experts, form, where)


def add_low_rank(net, rank_ratio=None, experts=None, form="flat", where="all"):
    """Reserve capacity in a plain network's decoder, or give a UNet group experts; return it.

    rank_ratio: None for neither. experts: the training set's class counts where the decoder has one
    low-rank expert for each of Many, Medium and Few in place of CM's one; else None. form: of
    LowRank. where: a key of RESERVE. Raises ValueError where no matrix is one of these.
    """
    if experts is not None:
        add_group_experts(net, list(class_groups(experts).values()), rank_ratio)
    elif rank_ratio is not None:
        reserve(net.decoder, rank_ratio, form, RESERVE[where])
    return net


def recompute(net):
    """Let each block of a U-Net or DiT keep its input alone and compute the rest anew in backward.

    In place; returns net. Gradients stay the same to the last bit, since dropout masks are
    arguments.
    """
    for block in net.modules():
        if isinstance(block, (ResBlock, Block)):
            block.forward = partial(checkpoint, block, block.forward)
    return net


# --------------------------------------------------------------------------------------------------
# From a checkpoint, the dict that disk.load returns

def load_unmerged(ckpt, weights="ema", device="cpu", flag="--ckpt"):
    """The network of a checkpoint as it was trained, W^g and BA apart, on `device`.

    weights: "ema" or "raw". Raises UserError, which names `flag`, where the weights do not fit.
    """
    if weights == "raw" and is_one_network(ckpt):
        raise UserError("--weights raw: this file is an export and holds one network only; leave "
                        "it out, or name the run's checkpoint")
    before = dict(line.rsplit(" ", 1) for line in ckpt["config"].get("plugin") or [])
    for name, digest in (line.rsplit(" ", 1) for line in Plugins.found):
        if before.get(name, digest) != digest:
            print(f"warning: --plugin {name}: it has changed since the checkpoint was trained; its "
                  "network may be another one")
    try:
        net = build(ckpt["network"], ckpt["rank_ratio"], ckpt["experts"],
                    ckpt.get("form", "flat"), ckpt.get("where", "all"))
        net.load_state_dict(ckpt["ema" if weights == "ema" else "model"])
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[-1].strip()
        raise UserError(f"{flag}: its weights do not fit the network that it describes "
                        f"({why})") from e
    return net.to(device, memory_format=torch.channels_last)


def load_merged(ckpt, weights="ema", branch="full", device="cpu", flag="--ckpt"):
    """The network of a checkpoint merged into a plain one, without gradients, on `device`.

    branch: "full" (theta) or "general" (theta^g). The rest as load_unmerged. Raises UserError.
    """
    if branch == "general" and (ckpt["rank_ratio"] is None or ckpt["experts"]):
        raise UserError("--branch general: this checkpoint has no reserved capacity (it was "
                        "trained with --no-cm, or merged)")
    net = merge(load_unmerged(ckpt, weights, flag=flag), branch)
    return net.to(device, memory_format=torch.channels_last).requires_grad_(False)


def is_one_network(ckpt):
    """Whether a checkpoint is what `sample.py --export` writes, and not that of a training run."""
    return "optimizer" not in ckpt
