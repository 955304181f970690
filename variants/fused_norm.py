"""What the U-Net computes in fewer passes over memory in code that is compiled for CUDA.

Elsewhere norm_silu is SiLU(norm(x)) and conv_plus_emb is conv(h) + emb_proj(emb), to the last bit.
"""
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F


def compiled_for_cuda(x: Tensor) -> bool:
    """Whether this call is traced by torch.compile for a CUDA device."""
    return x.is_cuda and torch.compiler.is_compiling()


def norm_silu(norm: nn.GroupNorm, x: Tensor, silu: bool = True) -> Tensor:
    """SiLU(norm(x)), or norm(x), for x (N, C, H, W); by GroupNormSiLU where compiled for CUDA."""
    if compiled_for_cuda(x):
        return GroupNormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    return F.silu(norm(x)) if silu else norm(x)


def conv_plus_emb(conv: nn.Module, h: Tensor, emb_proj: nn.Module, emb: Tensor) -> Tensor:
    """conv(h) + emb_proj(emb) at every pixel: (N, C, H, W), (N, D) -> (N, out, H, W).

    Compiled for CUDA with one bias of both: in the backward pass the gradient is then summed over
    the pixels once, not twice. Layers that are not plain ones (experts) are called as they are.
    """
    plain = isinstance(conv, nn.Conv2d) and isinstance(emb_proj, nn.Linear)
    if not (plain and compiled_for_cuda(h)):
        return conv(h) + emb_proj(emb)[:, :, None, None]
    shift = F.linear(emb, emb_proj.weight, conv.bias + emb_proj.bias)
    return F.conv2d(h, conv.weight, padding=conv.padding) + shift[:, :, None, None]


class GroupNormSiLU(torch.autograd.Function):
    """SiLU(group norm(x)), or the group norm alone, in x's memory layout: (N, C, H, W) -> same.

    What torch has for CUDA knows one layout, and channels-last activations would be copied into it
    and back. Plain operations with a backward pass of their own, for torch.compile to fuse: x is
    read twice and the result written once; backwards x and the gradient are read twice.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, groups: int,
                eps: float, silu: bool) -> Tensor:
        """x, result: (N, C, H, W). weight, bias: (C,). Sums are made in float32 or more."""
        N, C = x.shape[:2]
        x_32 = GroupNormSiLU.accurate(x)
        var, mean = torch.var_mean(x_32, dim=(2, 3), correction=0)
        var, mean = var.view(N, groups, -1), mean.view(N, groups, -1)       # (N, G, C / G)
        mean_g = mean.mean(2, keepdim=True)                                 # (N, G, 1)
        rstd = torch.rsqrt((var + (mean - mean_g).square()).mean(2, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, bias, mean_g, rstd)
        ctx.silu = silu
        scale, shift = GroupNormSiLU.affine(weight, bias, mean_g, rstd)
        y = x_32 * scale + shift
        return (F.silu(y) if silu else y).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        """grad (N, C, H, W) -> the gradients of x, weight and bias; None for the others."""
        x, weight, bias, mean_g, rstd = ctx.saved_tensors
        N, C, H, W = x.shape
        G = mean_g.shape[1]
        scale, shift = GroupNormSiLU.affine(weight, bias, mean_g, rstd)
        x_32 = GroupNormSiLU.accurate(x)
        dy = GroupNormSiLU.accurate(grad)
        if ctx.silu:
            y = x_32 * scale + shift
            s = torch.sigmoid(y)
            dy = dy * s * (1 + y * (1 - s))
        d_bias = dy.sum((2, 3)).view(N, G, -1)                              # of each image
        d_weight = ((dy * x_32).sum((2, 3)).view(N, G, -1) - mean_g * d_bias) * rstd
        # dx = scale dy - rstd (mean of w dy over the group + (x - mean) rstd mean of w dy x_hat)
        w = weight.view(G, -1) * (G / (C * H * W))
        slope = -rstd.square() * (w * d_weight).sum(2, keepdim=True)
        offset = -rstd * (w * d_bias).sum(2, keepdim=True) - slope * mean_g

        def per_channel(v):
            return v.expand(N, G, C // G).reshape(N, C, 1, 1)
        dx = x_32 * per_channel(slope) + per_channel(offset) + dy * scale      # in x's layout
        return (dx.to(x.dtype), d_weight.reshape(N, C).sum(0), d_bias.reshape(N, C).sum(0),
                None, None, None)

    @staticmethod
    def affine(weight: Tensor, bias: Tensor, mean_g: Tensor,
               rstd: Tensor) -> tuple[Tensor, Tensor]:
        """The norm as x * scale + shift, (N, C, 1, 1) each."""
        N, G, _ = mean_g.shape
        scale = rstd * weight.view(G, -1)                                   # (N, G, C / G)
        shift = bias.view(G, -1) - mean_g * scale
        return scale.reshape(N, -1, 1, 1), shift.reshape(N, -1, 1, 1)

    @staticmethod
    def accurate(x: Tensor) -> Tensor:
        """x in float32, or in float64 if it is."""
        return x.to(torch.promote_types(x.dtype, torch.float32))
