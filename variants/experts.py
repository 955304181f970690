"""What the paper compares CM with that changes the network: LoRA fine-tuning and group experts.

    python train.py --base cbdm --init-from CKPT --lora         # CBDM (LoRA) of Table 1
    python train.py --base ddpm --no-cm --experts group         # Group-Expert LoRA of Table E.2

The paper gives no details of either; each docstring says what was chosen.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from cm_layers import weight_matrices


def freeze_all_but_low_rank(net):
    """CBDM (LoRA) of Table 1: of a network whose decoder is reserved, train only the A and B."""
    for name, p in net.named_parameters():
        low_rank = name.rsplit(".", 1)[-1] in ("A", "B") and "parametrizations" in name
        p.requires_grad_(low_rank)


class Router(nn.Module):
    """Which group each image of the batch belongs to, by its label; -1 (Null) belongs to none.

    group_of: (C,) the group of each class.
    """

    def __init__(self, group_of):
        super().__init__()
        self.register_buffer("group_of", torch.as_tensor(group_of), persistent=False)
        self.groups = int(self.group_of.max()) + 1
        self.one_hot = None

    def set(self, y):
        """Remember the groups of labels y (N,) for the decoder's next pass."""
        group = self.group_of[y.clamp(min=0)]
        self.one_hot = F.one_hot(group, self.groups) * (y >= 0)[:, None]


class GroupExperts(nn.Module):
    """A Linear or Conv2d whose weight is W^g + B_k A_k for an image of group k.

    This is E.4's mixture with a fixed router. Each image's low-rank part acts on its activations,
    as a layer of rank r and one of kernel 1, so that a batch may mix groups. Images without a group
    (the label Null) get W^g alone. rank: of each expert.
    """

    def __init__(self, layer, groups, rank, router):
        super().__init__()
        out, inner, *kernel = layer.weight.shape
        self.layer = layer
        self.router = [router]          # in a list: the router is not a part of this module
        self.A = nn.Parameter(layer.weight.new_empty(groups * rank, inner, *kernel))
        self.B = nn.Parameter(layer.weight.new_zeros(groups, out, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        y = self.layer(x)
        rank = self.B.shape[2]
        up = self.B.permute(1, 0, 2).flatten(1)                         # (out, groups rank)
        one_hot = self.router[0].one_hot
        own = one_hot.repeat_interleave(rank, 1).to(y.dtype)            # (N, groups rank)
        if isinstance(self.layer, nn.Linear):
            return y + F.linear(F.linear(x, self.A) * own, up)
        c = self.layer
        h = F.conv2d(x, self.A, None, c.stride, c.padding, c.dilation, c.groups)
        return y + F.conv2d(h * own[:, :, None, None], up[:, :, None, None])


def add_group_experts(net, groups, rank_ratio):
    """Give every convolution and Linear of a UNet's decoder one expert per group.

    groups: lists of classes, which together are all classes. The experts share the rank that CM
    would reserve, max(1, floor(rank_ratio min(d, k))): an equal part each, at least 1.
    """
    group_of = {c: k for k, classes in enumerate(groups) for c in classes}
    # encode sees the labels first. The router is a part of the encoder, so that a deep copy's hook
    # finds the copy's own
    net.encoder.router = Router([group_of[c] for c in range(len(group_of))])
    net.encoder.register_forward_pre_hook(lambda encoder, args: encoder.router.set(args[2]))
    for name, layer, _ in weight_matrices(net.decoder):
        full = min(layer.weight.shape[0], layer.weight[0].numel())
        rank = max(1, int(rank_ratio * full) // len(groups))
        parent, _, child = name.rpartition(".")
        expert = GroupExperts(layer, len(groups), rank, net.encoder.router)
        setattr(net.decoder.get_submodule(parent), child, expert)
