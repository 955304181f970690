"""The table of networks that train.py can train, and how one is built from plain settings.

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

from model import UNet, UNetConfig
from runtime import UserError, integer
from variants.dit import DiT


def unet(**settings):
    """A UNet from the settings of a UNetConfig."""
    return UNet(UNetConfig(**settings))


unet.__signature__ = inspect.signature(UNetConfig)

NETWORKS = {"unet": unet, "dit": DiT}
FLAGS = {       # flags of train.py, {setting: (type, help)}; the defaults are the networks' own
    "depth": (integer(1), "blocks of --network dit"),
    "patch": (integer(1), "pixels of the side of a patch of --network dit"),
}


def options_of(name):
    """{setting: default} of a network of the table; one without a default has None."""
    parameters = inspect.signature(NETWORKS[name]).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


def settings_of(name, values):
    """What `build` takes, plain types for a checkpoint: a network's settings, out of `values`."""
    settings = {key: values[key] for key in options_of(name) if key in values}
    return settings if name == "unet" else {"network": name, **settings}


def build(network):
    """An untrained network from a dict of `settings_of`; without a name it is a U-Net.

    Raises UserError for a network that is not in the table, and what the network itself raises.
    """
    settings = dict(network)
    name = settings.pop("network", "unet")
    if name not in NETWORKS:
        raise UserError(f"--ckpt: its network is {name!r}, and known are {', '.join(NETWORKS)}; "
                        "name the file that has it with --plugin")
    return NETWORKS[name](**settings)
