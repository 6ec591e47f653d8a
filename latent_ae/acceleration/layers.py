"""diffusers' layers with other forward passes: the same weights, names and results.

A layer is changed by its class alone: it holds nothing of its own, and gets its old class back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets import unet_2d_blocks
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from latent_ae.acceleration.attention import attend, heads_of
from latent_ae.acceleration.conditions import (
    attention_fits,
    coder_fits,
    downsample_fits,
    is_convolution,
    is_untouched,
    only_pictures,
    resnet_fits,
    traced,
    upsample_fits,
)
from latent_ae.acceleration.convolution import (
    convolve_halved,
    convolve_upsampled,
    keeps_no_graph,
)
from latent_ae.acceleration.normalization import norm_silu, norm_silu_convolve, normalize_groups
from latent_ae.acceleration.strips import blocks_of, in_strips, whole_bytes

__all__ = ["FAST", "fast_class", "goes_in_strips"]


class FastResnetBlock(ResnetBlock2D):
    """Two times GroupNorm, SiLU and convolution, each one node of autograd; added in place."""

    def forward(self, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # pyright: ignore
        """Of and to shape (B, C, H, W)."""
        x = input_tensor
        if not (only_pictures(*args, *kwargs.values()) and resnet_fits(self)):
            return super().forward(x, *args, **({"temb": None} | kwargs if not args else kwargs))
        hidden = norm_silu_convolve(x, self.norm1, cast(nn.Conv2d, self.conv1))
        hidden = norm_silu_convolve(hidden, self.norm2, cast(nn.Conv2d, self.conv2))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        if keeps_no_graph(hidden) and hidden.dtype == x.dtype:
            hidden += x
        else:
            hidden = hidden + x
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


class FastUpsample(Upsample2D):
    """Its convolution reads the small picture."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Of shape (B, C, H, W), to (B, C, 2 H, 2 W)."""
        plain = only_pictures(*args, *kwargs.values()) and not traced()
        if not (plain and upsample_fits(self)):
            return super().forward(hidden_states, *args, **kwargs)
        return convolve_upsampled(hidden_states, cast(nn.Conv2d, self.conv))


class FastDownsample(Downsample2D):
    """Without the checks that make a compiler look at channels."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Of shape (B, C, H, W), to (B, C, H / 2, W / 2)."""
        if not (only_pictures(*args, *kwargs.values()) and downsample_fits(self)):
            return super().forward(hidden_states, *args, **kwargs)
        return convolve_halved(hidden_states, cast(nn.Conv2d, self.conv))


class FastAttention(Attention):
    """Self-attention over pixels, which channels_last memory holds as SDPA wants them."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # pyright: ignore
        """Of and to shape (B, C, H, W)."""
        x = hidden_states
        plain = x.ndim == 4 and only_pictures(*args, *kwargs.values())
        if not (plain and attention_fits(self)):
            return super().forward(x, *args, **kwargs)
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
        if self._too_large(x):
            return in_strips(self, x, self.memory, self.spill)  # pyright: ignore[reportCallIssue]
        x = coder.conv_in(x)
        again = torch.is_grad_enabled() and coder.gradient_checkpointing
        for block in blocks:
            x = coder._gradient_checkpointing_func(block, x) if again else block(x)
        return coder.conv_out(norm_silu(x, coder.conv_norm_out))

    def _too_large(self, x: Tensor) -> bool:
        if self.memory == math.inf or torch.compiler.is_exporting() or torch.jit.is_tracing():
            return False
        too_large = whole_bytes(self, x) > self.memory
        return too_large and keeps_no_graph(x, *self.parameters()) and goes_in_strips(self)


class FastEncoder(_Coder, Encoder):
    """As diffusers' own, between fast blocks."""

    def forward(self, sample: Tensor) -> Tensor:
        """Of shape (B, C, H, W), to (B, 2 c, H / f, W / f)."""
        if not coder_fits(self):
            return Encoder.forward(self, sample)
        return self._through(sample, [*self.down_blocks, self.mid_block])


class FastDecoder(_Coder, Decoder):
    """As diffusers' own, between fast blocks."""

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """Of shape (B, c, H / f, W / f), to (B, C, H, W)."""
        if latent_embeds is not None or not coder_fits(self):
            return Decoder.forward(self, sample, latent_embeds)
        return self._through(sample, [self.mid_block, *self.up_blocks])


def fast_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class that computes the same faster; None where this layer does more than ours.

    Layers into which somebody has put others (adapters, quantized weights, processors of attention)
    stay as they are; so do those that get them later, as each call asks again.
    """
    kind = FAST.get(type(layer))
    return kind if kind is not None and _FITS[kind](layer) else None


def goes_in_strips(coder: Any) -> bool:
    """Whether all of a coder's layers are accelerated, and nothing hangs on them."""
    if type(coder) not in (FastEncoder, FastDecoder) or not coder_fits(coder):
        return False
    if not all(is_convolution(conv, 3) for conv in (coder.conv_in, coder.conv_out)):
        return False
    layers: list[Any] = []
    for block in blocks_of(coder):
        if type(block) not in _BLOCKS or not is_untouched(block):
            return False
        for name in ("resnets", "attentions", "downsamplers", "upsamplers"):
            layers += [one for one in getattr(block, name, None) or [] if one is not None]
    return all(type(m) in _FITS and _FITS[type(m)](m) and is_untouched(m) for m in layers)


_BLOCKS = (
    unet_2d_blocks.DownEncoderBlock2D,
    unet_2d_blocks.AttnDownEncoderBlock2D,
    unet_2d_blocks.UNetMidBlock2D,
    unet_2d_blocks.UpDecoderBlock2D,
    unet_2d_blocks.AttnUpDecoderBlock2D,
)
FAST: dict[type[nn.Module], type[nn.Module]] = {
    ResnetBlock2D: FastResnetBlock,
    Upsample2D: FastUpsample,
    Downsample2D: FastDownsample,
    Attention: FastAttention,
    Encoder: FastEncoder,
    Decoder: FastDecoder,
}
_FITS: dict[type[nn.Module], Callable[[Any], bool]] = {
    FastResnetBlock: resnet_fits,
    FastUpsample: upsample_fits,
    FastDownsample: downsample_fits,
    FastAttention: attention_fits,
    FastEncoder: coder_fits,
    FastDecoder: coder_fits,
}
