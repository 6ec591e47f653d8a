"""Encoding and decoding layer by layer in strips: pictures of any size within a given memory.

Each layer goes over the rows of its input, with the rows that its kernel sees beyond the strip, and
writes those of its output to a store. GroupNorm's statistics are those of the whole picture,
gathered while its input was written; attention sees all keys. So the result is that of the whole
picture but for rounding, without seams. Computed twice are a border of rows around each strip, and
what an upsampling gives where the next block has fewer channels: it would be the largest store.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ae.acceleration.attention import attend, heads_of
from latent_ae.acceleration.convolution import convolve, convolve_halved, convolve_upsampled
from latent_ae.acceleration.moments import ChannelMoments
from latent_ae.acceleration.stores import Budget, Rows, Store, strips

__all__ = ["blocks_of", "downsampler_of", "in_strips", "upsampler_of", "whole_bytes"]

_COPIES = 5  # of the largest activations that a pass over the whole picture holds at one time


def whole_bytes(coder: Any, x: Tensor) -> int:
    """About what a pass over whole pictures holds at its peak, in bytes, without weights.

    Args:
        coder: diffusers' `Encoder` or `Decoder`.
        x: its input, of shape (B, C, H, W).
    """
    pixels, largest = x.shape[0] * x.shape[2] * x.shape[3], 0
    for block in blocks_of(coder):
        for resnet in block.resnets:
            channels = max(resnet.conv1.in_channels, resnet.conv1.out_channels)
            largest = max(largest, pixels * channels)
        if downsampler_of(block) is not None:
            pixels //= 4
        elif upsampler_of(block) is not None:
            pixels *= 4
            largest = max(largest, pixels * block.resnets[-1].conv1.out_channels)
    device = x.device.type
    mixed = torch.is_autocast_enabled(device)
    size = torch.get_autocast_dtype(device).itemsize if mixed else x.element_size()
    return _COPIES * largest * size


@torch.compiler.disable
def in_strips(coder: Any, x: Tensor, memory: float, spill: str | Path | None = None) -> Tensor:
    """What an encoder or a decoder makes of pictures, one after the other, without a graph.

    Args:
        coder: diffusers' `Encoder` or `Decoder`, of accelerated layers.
        x: of shape (B, C, H, W).
        memory: bytes for activations on the device; keys and values of attention, of all pixels of
            the latents, and the result come on top of it.
        spill: the folder for those that a CPU has no memory for.

    Raises:
        OSError: the folder has no room.
    """
    with torch.no_grad():
        made = [_Picture(coder, memory, spill).run(one[None]) for one in x]
    return made[0] if len(made) == 1 else torch.cat(made)  # which copies even one


class _Picture:
    """One picture on its way through a coder."""

    def __init__(self, coder: Any, memory: float, spill: str | Path | None) -> None:
        self.coder, self.budget = coder, Budget(memory, spill)

    def run(self, x: Tensor) -> Tensor:
        source = _Given(x.contiguous(memory_format=torch.channels_last))
        self.like = self.coder.conv_in(x[..., :2, :2]).new_empty(0)  # autocast may change the type
        current: Rows = self._convolve(source, self.coder.conv_in)
        for block in blocks_of(self.coder):
            attentions = getattr(block, "attentions", None) or []
            for i, resnet in enumerate(block.resnets):
                current = self._resnet(current, resnet)
                if i < len(attentions) and attentions[i] is not None:
                    self._attend(current, attentions[i])
            if (layer := downsampler_of(block)) is not None:
                current = self._halve(current, layer.conv)
            elif (layer := upsampler_of(block)) is not None:
                current = _Upsampled(current, layer.conv, self.budget)
        return self._last(current)

    def _store(self, channels: int, height: int, width: int) -> Store:
        return self.budget.store((channels, height, width), self.like)

    def _sweep(self, source: Rows, channels: int, work: Callable[[int, int], None]) -> None:
        """Calls `work` for each strip of the source's rows; of so many channels are its results."""
        _, height, width = source.shape
        bytes_a_row = _row_bytes(source, channels, width)
        for first, last in strips(height, self.budget.rows_of(bytes_a_row, height)):
            work(first, last)

    def _convolve(self, source: Rows, conv: nn.Conv2d) -> Store:
        _, height, width = source.shape
        result = self._store(conv.out_channels, height, width)

        def work(first: int, last: int) -> None:
            window, edges = source.window(first - 1, last + 1)
            result.write(first, convolve(window, conv, edges))

        self._sweep(source, conv.out_channels, work)
        return result

    def _resnet(self, source: Rows, block: Any) -> Store:
        """Writes the sum over the shortcut, or over the input where there is none."""
        _, height, width = source.shape
        channels = block.conv1.out_channels
        shortcut = block.conv_shortcut
        base = self._settled(source) if shortcut is None else self._store(channels, height, width)
        source = base if shortcut is None else source
        norm = _Activation(source.moments(), block.norm1)
        hidden = self._store(channels, height, width)

        def first_half(first: int, last: int) -> None:
            window, edges = source.window(first - 1, last + 1)
            if shortcut is not None:
                inner = window[:, :, 1 - edges[0] : window.shape[2] - (1 - edges[1])]
                base.write(first, shortcut(inner), measure=False)
            hidden.write(first, convolve(norm(window), block.conv1, edges))

        def second_half(first: int, last: int) -> None:
            window, edges = hidden.window(first - 1, last + 1)
            rows = convolve(norm(window), block.conv2, edges)
            rows += base.rows(first, last)
            if block.output_scale_factor != 1:
                rows /= block.output_scale_factor
            base.write(first, rows)

        self._sweep(source, channels, first_half)
        if shortcut is not None:
            source.free()
        norm = _Activation(hidden.moments(), block.norm2)
        self._sweep(hidden, channels, second_half)
        hidden.free()
        return base

    def _settled(self, source: Rows) -> Store:
        """A store of rows that are computed when they are read."""
        if isinstance(source, Store):
            return source
        result = self._store(*source.shape)
        self._sweep(source, source.shape[0], lambda a, b: result.write(a, source.rows(a, b)))
        source.free()
        return result

    def _halve(self, source: Rows, conv: nn.Conv2d) -> Store:
        channels, height, width = conv.out_channels, source.shape[1] // 2, source.shape[2] // 2
        result = self._store(channels, height, width)
        count = self.budget.rows_of(2 * _row_bytes(source, channels, 2 * width), height)
        for first, last in strips(height, count):
            window, (_, bottom) = source.window(2 * first, 2 * last + 1)
            result.write(first, convolve_halved(window, conv, bottom))
        source.free()
        return result

    def _attend(self, current: Rows, layer: Any) -> None:
        """Adds attention's result in place: keys and values of all pixels, queries by strips."""
        store = current
        assert isinstance(store, Store)
        channels, height, width = store.shape
        norm = None
        if layer.group_norm is not None:
            norm = _Activation(store.moments(), layer.group_norm, silu=False)
        inner = layer.to_k.out_features
        keys, values = (self.like.new_empty(1, height * width, inner) for _ in range(2))
        heads = [one.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for one in (keys, values)]

        def tokens(rows: Tensor) -> Tensor:
            rows = rows if norm is None else norm(rows)
            return rows.permute(0, 2, 3, 1).flatten(1, 2)

        def gather(first: int, last: int) -> None:
            part, place = tokens(store.rows(first, last)), slice(first * width, last * width)
            keys[:, place], values[:, place] = layer.to_k(part), layer.to_v(part)

        def answer(first: int, last: int) -> None:
            rows = store.rows(first, last)
            (query,) = heads_of(layer, tokens(rows), "q")
            found = attend(layer, query, *heads).unflatten(1, (last - first, width))
            found = found.permute(0, 3, 1, 2)
            found = found + rows if layer.residual_connection else found
            store.write(first, found / layer.rescale_output_factor)

        self._sweep(store, channels, gather)
        self._sweep(store, channels, answer)

    def _last(self, source: Rows) -> Tensor:
        norm = _Activation(source.moments(), self.coder.conv_norm_out)
        conv, (_, height, width) = self.coder.conv_out, source.shape
        result = self.like.new_empty(1, height, width, conv.out_channels).permute(0, 3, 1, 2)

        def work(first: int, last: int) -> None:
            window, edges = source.window(first - 1, last + 1)
            result[:, :, first:last] = convolve(norm(window), conv, edges)

        self._sweep(source, source.shape[0], work)
        source.free()
        return result


class _Given(Rows):
    """A picture in memory."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.shape = x, (x.shape[1], x.shape[2], x.shape[3])

    def rows(self, first: int, last: int) -> Tensor:
        return self.x[:, :, first:last]

    def moments(self) -> ChannelMoments:
        raise NotImplementedError("nothing normalizes the input")

    def free(self) -> None:
        """It belongs to the caller."""


class _Upsampled(Rows):
    """A picture that is enlarged and convolved when its rows are read: it would be the largest."""

    def __init__(self, source: Rows, conv: nn.Conv2d, budget: Budget) -> None:
        _, height, width = source.shape
        self.source, self.conv, self.budget = source, conv, budget
        self.shape = (conv.out_channels, 2 * height, 2 * width)

    def rows(self, first: int, last: int) -> Tensor:
        low, high = first // 2, -(-last // 2)
        window, edges = self.source.window(low - 1, high + 1)
        made = convolve_upsampled(window, self.conv, edges)
        return made[:, :, first - 2 * low : last - 2 * low]

    def moments(self) -> ChannelMoments:
        """Reads, and so computes, all rows."""
        channels, height, width = self.shape
        found = ChannelMoments(1, channels, self.conv.weight.device)
        count = self.budget.rows_of(_row_bytes(self, channels, width), height)
        for first, last in strips(height, count):
            found.add(self.rows(first, last))
        return found

    def free(self) -> None:
        self.source.free()


class _Activation:
    """GroupNorm with the statistics of the whole picture, and SiLU, of rows."""

    def __init__(self, moments: ChannelMoments, norm: nn.GroupNorm, silu: bool = True) -> None:
        self.scale, self.shift = moments.affine(norm)
        self.silu = silu
        self.scratch = self.scale.new_empty(0)

    def __call__(self, rows: Tensor) -> Tensor:
        """Of and to shape (1, C, h, W); valid until the next call."""
        _, channels, height, width = rows.shape
        if self.scratch.numel() < rows.numel():
            self.scratch = self.scratch.new_empty(rows.numel())
        result = self.scratch[: rows.numel()].view(1, height, width, channels).permute(0, 3, 1, 2)
        torch.addcmul(self.shift, rows.float(), self.scale, out=result)
        return (F.silu(result, inplace=True) if self.silu else result).to(rows.dtype)


def _row_bytes(source: Rows, channels: int, width: int) -> float:
    """What a row of a strip takes on its way, in fp32: its input, twice, and its output, thrice."""
    return 4 * width * (2 * source.shape[0] + 3 * channels)


def blocks_of(coder: Any) -> list[Any]:
    """A coder's blocks in the order in which they run."""
    if hasattr(coder, "down_blocks"):
        return [*coder.down_blocks, coder.mid_block]
    return [coder.mid_block, *coder.up_blocks]


def downsampler_of(block: Any) -> Any:
    """A block's downsampling layer, or None."""
    return (getattr(block, "downsamplers", None) or [None])[0]


def upsampler_of(block: Any) -> Any:
    """A block's upsampling layer, or None."""
    return (getattr(block, "upsamplers", None) or [None])[0]
