"""diffusers' layers with other forward passes: the same weights, names and results.

A layer is changed by its class alone: it holds nothing of its own, and gets its old class back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from latent_ae.acceleration.attention import attend, heads_of
from latent_ae.acceleration.convolution import convolve_halved, convolve_upsampled, without_graph
from latent_ae.acceleration.normalization import norm_silu, norm_silu_convolve, normalize_groups
from latent_ae.acceleration.strips import in_strips, whole_bytes

__all__ = ["FAST", "all_fast", "fast_class"]


class FastResnetBlock(ResnetBlock2D):
    """Two times GroupNorm, SiLU and convolution, each one node of autograd; added in place."""

    def forward(self, input_tensor: Tensor, temb: None = None) -> Tensor:
        """Of and to shape (B, C, H, W)."""
        x = input_tensor
        hidden = norm_silu_convolve(x, self.norm1, cast(nn.Conv2d, self.conv1))
        hidden = norm_silu_convolve(hidden, self.norm2, cast(nn.Conv2d, self.conv2))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        if without_graph(hidden) and hidden.dtype == x.dtype:
            hidden += x
        else:
            hidden = hidden + x
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


class FastUpsample(Upsample2D):
    """Its convolution reads the small picture."""

    def forward(self, hidden_states: Tensor, output_size: None = None) -> Tensor:
        """Of shape (B, C, H, W), to (B, C, 2 H, 2 W)."""
        if torch.compiler.is_compiling() or output_size is not None:
            return super().forward(hidden_states, output_size)
        return convolve_upsampled(hidden_states, cast(nn.Conv2d, self.conv))


class FastDownsample(Downsample2D):
    """Without the checks that make a compiler look at channels."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Of shape (B, C, H, W), to (B, C, H / 2, W / 2)."""
        return convolve_halved(hidden_states, cast(nn.Conv2d, self.conv))


class FastAttention(Attention):
    """Self-attention over pixels, which channels_last memory holds as SDPA wants them."""

    def forward(self, hidden_states: Tensor, temb: None = None) -> Tensor:  # pyright: ignore
        """Of and to shape (B, C, H, W)."""
        x = hidden_states
        normed = x if self.group_norm is None else normalize_groups(x, self.group_norm)
        tokens = normed.permute(0, 2, 3, 1).flatten(1, 2)
        query, key, value = heads_of(self, tokens, "qkv")
        result = attend(self, query, key, value)
        result = result.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        if self.residual_connection:
            result = result + x
        return result if self.rescale_output_factor == 1 else result / self.rescale_output_factor


class _Coder(nn.Module):
    """What an encoder and a decoder share: blocks between two convolutions.

    Attributes:
        memory: bytes of activations beyond which pictures go through in strips.
        spill: the folder for activations that a CPU has no memory for.
    """

    memory: float = math.inf
    spill: str | Path | None = None

    def _through(self, x: Tensor, blocks: Iterable[nn.Module]) -> Tensor:
        coder = cast(Any, self)
        small = self.memory == math.inf or whole_bytes(self, x) <= self.memory
        if not small and without_graph(x, self) and all_fast(self):
            return in_strips(self, x, self.memory, self.spill)
        x = coder.conv_in(x)
        again = torch.is_grad_enabled() and coder.gradient_checkpointing
        for block in blocks:
            x = coder._gradient_checkpointing_func(block, x) if again else block(x)
        return coder.conv_out(norm_silu(x, coder.conv_norm_out))


class FastEncoder(_Coder, Encoder):
    """As diffusers' own, between fast blocks."""

    def forward(self, sample: Tensor) -> Tensor:
        """Of shape (B, C, H, W), to (B, 2 c, H / f, W / f)."""
        return self._through(sample, [*self.down_blocks, self.mid_block])


class FastDecoder(_Coder, Decoder):
    """As diffusers' own, between fast blocks."""

    def forward(self, sample: Tensor, latent_embeds: None = None) -> Tensor:
        """Of shape (B, c, H / f, W / f), to (B, C, H, W)."""
        return self._through(sample, [self.mid_block, *self.up_blocks])


def fast_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class that computes the same faster; None where this layer does more than ours.

    Layers into which somebody has put others (adapters, quantized weights, processors of attention)
    stay as they are.
    """
    kind = FAST.get(type(layer))
    return kind if kind is not None and _MEETS[kind](layer) else None


def all_fast(part: nn.Module) -> bool:
    """Whether no layer between a coder's outer convolutions has kept its own forward pass."""
    kinds = tuple(kind for kind in FAST if kind not in (Encoder, Decoder))
    return all(type(m) in _MEETS for m in part.modules() if isinstance(m, kinds))


def _plain(conv: Any, size: int, stride: int = 1, padding: int | None = None) -> bool:
    padding = size // 2 if padding is None else padding
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (size, size)
        and conv.stride == (stride, stride)
        and conv.padding == (padding, padding)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def _group_norm(norm: Any) -> bool:
    return type(norm) is nn.GroupNorm and norm.affine


def _resnet(layer: Any) -> bool:
    return (
        layer.time_emb_proj is layer.upsample is layer.downsample is None
        and layer.time_embedding_norm in ("default", "group")  # without a time, all the same
        and layer.dropout.p == 0
        and type(layer.nonlinearity) is nn.SiLU
        and all(map(_group_norm, (layer.norm1, layer.norm2)))
        and all(_plain(conv, 3) for conv in (layer.conv1, layer.conv2))
        and (layer.conv_shortcut is None or _plain(layer.conv_shortcut, 1))
    )


def _upsample(layer: Any) -> bool:
    plain = layer.norm is None and layer.interpolate and layer.use_conv and layer.name == "conv"
    return plain and not layer.use_conv_transpose and _plain(layer.conv, 3)


def _downsample(layer: Any) -> bool:
    plain = layer.norm is None and layer.use_conv and layer.padding == 0
    return plain and _plain(layer.conv, 3, stride=2, padding=0)


def _attention(layer: Any) -> bool:
    linear = (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0])
    extra = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")
    return (
        type(layer.processor) is AttnProcessor2_0
        and not layer.is_cross_attention
        and (layer.group_norm is None or _group_norm(layer.group_norm))
        and all(type(one) is nn.Linear for one in linear)
        and not any(getattr(layer, name, None) for name in extra)
        and layer.to_out[1].p == 0
    )


def _coder(layer: Any) -> bool:
    whole = _group_norm(layer.conv_norm_out) and type(layer.conv_act) is nn.SiLU
    return whole and all(isinstance(c, nn.Conv2d) for c in (layer.conv_in, layer.conv_out))


FAST: dict[type[nn.Module], type[nn.Module]] = {
    ResnetBlock2D: FastResnetBlock,
    Upsample2D: FastUpsample,
    Downsample2D: FastDownsample,
    Attention: FastAttention,
    Encoder: FastEncoder,
    Decoder: FastDecoder,
}
_MEETS = {
    FastResnetBlock: _resnet,
    FastUpsample: _upsample,
    FastDownsample: _downsample,
    FastAttention: _attention,
    FastEncoder: _coder,
    FastDecoder: _coder,
}
