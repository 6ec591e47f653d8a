"""Which of diffusers' layers are as plain as ours take them; asked at every call.

Somebody may put an adapter, a hook, another processor or other padding into a layer at any time. It
then runs its own forward pass, in which all of that has its effect.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

__all__ = [
    "attention_fits",
    "coder_fits",
    "downsample_fits",
    "is_convolution",
    "is_untouched",
    "only_pictures",
    "resnet_fits",
    "traced",
    "upsample_fits",
]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EXTRAS = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj", "fused_projections")


def traced() -> bool:
    """Whether the call is recorded by a compiler or an exporter, which wants torch's operators."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def only_pictures(*more: Any) -> bool:
    """Whether a layer was given nothing but pictures."""
    return all(one is None for one in more)


def is_untouched(module: nn.Module) -> bool:
    """Whether nobody has hung a hook on a module or put another `forward` into it."""
    return "forward" not in vars(module) and not any(getattr(module, name) for name in _HOOKS)


def is_convolution(conv: Any, size: int, stride: int = 1, padding: int | None = None) -> bool:
    """Whether a layer is a plain convolution with such a kernel; `padding` keeps the size."""
    padding = size // 2 if padding is None else padding
    return (
        type(conv) is nn.Conv2d
        and is_untouched(conv)
        and conv.kernel_size == (size, size)
        and conv.stride == (stride, stride)
        and conv.padding == (padding, padding)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def resnet_fits(layer: Any) -> bool:
    """Of `ResnetBlock2D`."""
    return (
        layer.time_emb_proj is layer.upsample is layer.downsample is None
        # Without a time these are all the same.
        and layer.time_embedding_norm in ("default", "group")
        and layer.dropout.p == 0
        and _is_silu(layer.nonlinearity)
        and _is_norm(layer.norm1)
        and _is_norm(layer.norm2)
        and is_convolution(layer.conv1, 3)
        and is_convolution(layer.conv2, 3)
        and (layer.conv_shortcut is None or is_convolution(layer.conv_shortcut, 1))
    )


def upsample_fits(layer: Any) -> bool:
    """Of `Upsample2D`."""
    plain = layer.norm is None and layer.interpolate and layer.use_conv and layer.name == "conv"
    return plain and not layer.use_conv_transpose and is_convolution(layer.conv, 3)


def downsample_fits(layer: Any) -> bool:
    """Of `Downsample2D`."""
    plain = layer.norm is None and layer.use_conv and layer.padding == 0
    return plain and is_convolution(layer.conv, 3, stride=2, padding=0)


def attention_fits(layer: Any) -> bool:
    """Of `Attention`."""
    linear = (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0])
    return (
        type(layer.processor) is AttnProcessor2_0
        and not layer.is_cross_attention
        and (layer.group_norm is None or _is_norm(layer.group_norm))
        and all(type(one) is nn.Linear and is_untouched(one) for one in linear)
        and not any(getattr(layer, name, None) for name in _EXTRAS)
        and layer.to_out[1].p == 0
    )


def coder_fits(layer: Any) -> bool:
    """Of `Encoder` and `Decoder`; their outer convolutions are called as they are."""
    return _is_norm(layer.conv_norm_out) and _is_silu(layer.conv_act)


def _is_norm(norm: Any) -> bool:
    return type(norm) is nn.GroupNorm and norm.affine and is_untouched(norm)


def _is_silu(layer: Any) -> bool:
    return type(layer) is nn.SiLU and is_untouched(layer)
