"""GroupNorm and SiLU as one operation, and with the convolution behind them as one of autograd's.

What stock layers keep for the backward pass are three pictures of activations: the input of
GroupNorm, that of SiLU and that of the convolution. Here it is the first alone; the other two are
computed from it again, which costs a pass over memory and no product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from latent_ae.acceleration import triton_norm
from latent_ae.acceleration.conditions import traced
from latent_ae.acceleration.convolution import convolve, keeps_no_graph
from latent_ae.acceleration.moments import ChannelMoments

__all__ = ["norm_silu", "norm_silu_convolve", "normalize_groups"]

_Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Norm:
    """GroupNorm's numbers as tensors and plain values."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float

    @classmethod
    def of(cls, norm: nn.GroupNorm) -> _Norm:
        return cls(norm.weight, norm.bias, norm.num_groups, norm.eps)


def normalize_groups(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """GroupNorm of shape (B, C, H, W), under autocast too in the precision of x."""
    if traced():
        return norm(x)
    if keeps_no_graph(x, norm.weight, norm.bias) and _is_rough(x):
        return _exactly(x, norm)
    return _native(x, _Norm.of(norm))[0]


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`silu(norm(x))` of x of shape (B, C, H, W); for the backward pass it keeps x alone."""
    if traced():
        return F.silu(norm(x))
    if keeps_no_graph(x, norm.weight, norm.bias):
        return _infer(x, norm)
    return _NormSilu.apply(x, norm.weight, norm.bias, norm)


def norm_silu_convolve(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
    """`conv(silu(norm(x)))`, of stride 1; for the backward pass it keeps x alone.

    Args:
        x: of shape (B, C, H, W).
        norm: with weights.
        conv: of 3 × 3 with padding 1.
    """
    if traced():
        return conv(F.silu(norm(x)))
    if keeps_no_graph(x, norm.weight, norm.bias, conv.weight, conv.bias):
        return convolve(_infer(x, norm), conv)
    return _NormSiluConvolve.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, norm, conv)


def _native(x: Tensor, norm: _Norm) -> _Three:
    weight, bias = _in_type_of(x, norm.weight), _in_type_of(x, norm.bias)
    size = x.shape[2] * x.shape[3]
    shape = (len(x), x.shape[1], size)
    return torch.native_group_norm(x, weight, bias, *shape, norm.groups, norm.eps)


def _exactly(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """GroupNorm of channels_last pictures in fp32 on a CPU, with statistics that keep their digits.

    torch's kernel takes mean² from the mean of squares there: with a mean of ten deviations, two
    digits are gone. In training that does no harm, and more passes would.
    """
    moments = ChannelMoments(len(x), x.shape[1])
    moments.add(x)
    scale, shift = moments.affine(norm)
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x))


def _is_rough(x: Tensor) -> bool:
    fp32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return fp32_on_cpu and not x.is_contiguous()


def _in_type_of(x: Tensor, weight: Tensor) -> Tensor:
    """CUDA's kernels want weights of the activations' type; a CPU's take fp32 beside 16 bits."""
    return weight if x.device.type == "cpu" else weight.to(x.dtype)


def _infer(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`silu(norm(x))` without a graph."""
    if _is_rough(x) and not triton_norm.available(x):
        return F.silu(_exactly(x, norm), inplace=True)
    return _forward(x, _Norm.of(norm))[0]


def _forward(x: Tensor, norm: _Norm) -> _Three:
    if triton_norm.available(x):
        return triton_norm.group_norm_silu(x, norm.weight, norm.bias, norm.groups, norm.eps)
    result, mean, rstd = _native(x, norm)
    return F.silu(result, inplace=True), mean, rstd


def _recompute(x: Tensor, norm: _Norm, mean: Tensor, rstd: Tensor) -> Tensor:
    """What `_forward` has given."""
    if triton_norm.available(x):
        return triton_norm.apply_group_norm_silu(x, norm.weight, norm.bias, mean, rstd)
    return F.silu(_native(x, norm)[0], inplace=True)


def _backward(gradient: Tensor, x: Tensor, norm: _Norm, mean: Tensor, rstd: Tensor) -> _Three:
    """Gradients at x, at the norm's weight and at its bias."""
    if triton_norm.available(x):
        return triton_norm.group_norm_silu_backward(gradient, x, norm.weight, norm.bias, mean, rstd)
    gradient = torch.ops.aten.silu_backward(gradient, _native(x, norm)[0])
    shape = (len(x), x.shape[1], x.shape[2] * x.shape[3])
    weight = _in_type_of(x, norm.weight)
    at_x, at_weight, at_bias = torch.ops.aten.native_group_norm_backward(
        gradient, x, mean, rstd, weight, *shape, norm.groups, [True] * 3
    )
    return at_x, at_weight.to(norm.weight.dtype), at_bias.to(norm.bias.dtype)


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.GroupNorm) -> Tensor:
        result, mean, rstd = _forward(x, _Norm.of(norm))
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.norm = (norm.num_groups, norm.eps)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, bias, mean, rstd = ctx.saved_tensors
        return *_backward(gradient, x, _Norm(weight, bias, *ctx.norm), mean, rstd), None


class _NormSiluConvolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        kernel: Tensor,
        offset: Tensor | None,
        norm: nn.GroupNorm,
        conv: nn.Conv2d,
    ) -> Tensor:
        activated, mean, rstd = _forward(x, _Norm.of(norm))
        ctx.save_for_backward(x, weight, bias, mean, rstd, kernel)
        ctx.norm = (norm.num_groups, norm.eps)
        ctx.biased, ctx.padding = offset is not None, conv.padding
        result = F.conv2d(activated, kernel, offset, padding=ctx.padding)
        ctx.dtype = result.dtype  # autocast's, where it is on
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, bias, mean, rstd, kernel = ctx.saved_tensors
        norm = _Norm(weight, bias, *ctx.norm)
        learns = ctx.needs_input_grad
        at_activated, at_kernel, at_offset = torch.ops.aten.convolution_backward(
            gradient.to(ctx.dtype),
            _recompute(x, norm, mean, rstd).to(ctx.dtype),
            kernel.to(ctx.dtype),
            [kernel.shape[0]] if ctx.biased else None,
            (1, 1),
            ctx.padding,
            (1, 1),
            False,
            (0, 0),
            1,
            (any(learns[:3]), learns[3], ctx.biased and learns[4]),
        )
        below: tuple[Tensor | None, ...] = (None, None, None)
        if at_activated is not None and any(learns[:3]):
            below = _backward(at_activated.to(x.dtype), x, norm, mean, rstd)
        after = [None if g is None else g.to(kernel.dtype) for g in (at_kernel, at_offset)]
        return *below, *after, None, None
