# ruff: noqa: ANN001, ANN201, ANN202
# Triton reads an argument's annotation as its type, and only `tl.constexpr` is one that it needs.
# pyright: reportMissingImports=false, reportOperatorIssue=false
# Some platforms have no Triton; where there is one, its sums have the type of a tuple too.
"""The kernels of `triton_norm`: importing this module imports Triton.

Pictures are rows of pixels, contiguous over their channels. A program works on tiles of BLOCK_P
pixels by BLOCK_C channels; a chunk is `tiles` of them, one below the other, in one picture.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["statistics", "combine", "apply", "gradient_sums", "input_gradient"]


@triton.jit
def _first_element(batch, pixel, pixels, channels):
    """Offset of a pixel's first channel."""
    # In 64 bits: all pictures together may have 2³¹ elements and more, a tile never has.
    return (batch.to(tl.int64) * pixels + pixel) * channels


@triton.jit
def _per_channel(weight, bias, mean, rstd, batch, c, channels, groups, group_size):
    """Weight, bias and their group's statistics for channels `c`, each of shape (1, BLOCK_C)."""
    inside = c < channels
    group = batch.to(tl.int64) * groups + c // group_size
    w = tl.load(weight + c, inside, other=0.0).to(tl.float32)
    b = tl.load(bias + c, inside, other=0.0).to(tl.float32)
    m = tl.load(mean + group, inside, other=0.0)
    r = tl.load(rstd + group, inside, other=0.0)
    return w[None, :], b[None, :], m[None, :], r[None, :]


@triton.jit
def _gradient_of_silu(gradient, value):
    sigmoid = tl.sigmoid(value)
    return gradient * sigmoid * (1.0 + value * (1.0 - sigmoid))


@triton.jit
def statistics(
    x, means, squares, pixels, channels, tiles, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Each channel's mean and sum of squared deviations over a chunk (Welford 1962)."""
    chunk, batch = tl.program_id(0), tl.program_id(2)
    p = tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = p[:, None] * channels + c[None, :]
    # A running mean for each place in the tile: reduced over threads once, after the loop.
    count = tl.zeros((BLOCK_P,), tl.float32)
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tile in range(tiles):
        pixel = (chunk * tiles + tile) * BLOCK_P
        inside = p < pixels - pixel
        mask = inside[:, None] & (c < channels)[None, :]
        first = _first_element(batch, pixel, pixels, channels)
        value = tl.load(x + first + offsets, mask, other=0.0).to(tl.float32)
        count += inside.to(tl.float32)
        difference = tl.where(mask, value - mean, 0.0)
        mean += difference * (1.0 / tl.maximum(count, 1.0))[:, None]
        square += difference * (value - mean)
    total = tl.sum(count, 0)
    chunk_mean = tl.sum(mean * count[:, None], 0) / total
    apart = mean - chunk_mean[None, :]
    chunk_square = tl.sum(square + apart * apart * count[:, None], 0)
    row = (batch * tl.num_programs(0) + chunk).to(tl.int64) * channels
    tl.store(means + row + c, chunk_mean, c < channels)
    tl.store(squares + row + c, chunk_square, c < channels)


@triton.jit
def combine(
    means,
    squares,
    mean,
    rstd,
    pixels,
    channels,
    chunks,
    chunk_pixels,
    group_size,
    elements,
    eps,
    BLOCK: tl.constexpr,
):
    """A group's mean and 1/√(variance + eps), of its channels' chunks (Chan et al. 1979)."""
    group, batch = tl.program_id(0), tl.program_id(1)
    first = (batch * chunks).to(tl.int64) * channels + group * group_size
    # Any mean near the group's will do: what is added up has few digits to lose then.
    near = tl.load(means + first)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, chunks * group_size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < chunks * group_size
        chunk = entry // group_size
        place = first + chunk * channels + entry % group_size
        count = tl.minimum(pixels - chunk * chunk_pixels, chunk_pixels).to(tl.float32)
        apart = tl.load(means + place, inside, other=0.0) - near
        total += tl.where(inside, count * apart, 0.0)
    group_mean = near + tl.sum(total, 0) / elements
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, chunks * group_size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < chunks * group_size
        chunk = entry // group_size
        place = first + chunk * channels + entry % group_size
        count = tl.minimum(pixels - chunk * chunk_pixels, chunk_pixels).to(tl.float32)
        apart = tl.load(means + place, inside, other=0.0) - group_mean
        square = tl.load(squares + place, inside, other=0.0)
        total += tl.where(inside, square + count * apart * apart, 0.0)
    variance = tl.sum(total, 0) / elements
    place = batch * tl.num_programs(0) + group
    tl.store(mean + place, group_mean)
    tl.store(rstd + place, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def apply(
    x,
    weight,
    bias,
    mean,
    rstd,
    y,
    pixels,
    channels,
    groups,
    group_size,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile normalised, scaled and through SiLU."""
    pixel, batch = tl.program_id(0) * BLOCK_P, tl.program_id(2)
    p = tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (p < pixels - pixel)[:, None] & (c < channels)[None, :]
    first = _first_element(batch, pixel, pixels, channels)
    offsets = p[:, None] * channels + c[None, :]
    w, b, m, r = _per_channel(weight, bias, mean, rstd, batch, c, channels, groups, group_size)
    value = tl.load(x + first + offsets, mask, other=0.0).to(tl.float32)
    value = (value - m) * r * w + b
    value = value * tl.sigmoid(value)
    tl.store(y + first + offsets, value.to(y.dtype.element_ty), mask)


@triton.jit
def gradient_sums(
    gy,
    x,
    weight,
    bias,
    mean,
    rstd,
    of_bias,
    of_weight,
    pixels,
    channels,
    groups,
    group_size,
    tiles,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Each channel's share of the gradients of bias and weight, over a chunk."""
    chunk, batch = tl.program_id(0), tl.program_id(2)
    p = tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = p[:, None] * channels + c[None, :]
    w, b, m, r = _per_channel(weight, bias, mean, rstd, batch, c, channels, groups, group_size)
    plain = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    scaled = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tile in range(tiles):
        pixel = (chunk * tiles + tile) * BLOCK_P
        mask = (p < pixels - pixel)[:, None] & (c < channels)[None, :]
        first = _first_element(batch, pixel, pixels, channels)
        value = tl.load(x + first + offsets, mask, other=0.0).to(tl.float32)
        # Zero outside of the picture, and so is what it adds to the sums.
        gradient = tl.load(gy + first + offsets, mask, other=0.0).to(tl.float32)
        value = (value - m) * r
        gradient = _gradient_of_silu(gradient, value * w + b)
        plain += gradient
        scaled += gradient * value
    row = (batch * tl.num_programs(0) + chunk).to(tl.int64) * channels
    tl.store(of_bias + row + c, tl.sum(plain, 0), c < channels)
    tl.store(of_weight + row + c, tl.sum(scaled, 0), c < channels)


@triton.jit
def input_gradient(
    gy,
    x,
    weight,
    bias,
    mean,
    rstd,
    plain,
    scaled,
    gx,
    pixels,
    channels,
    groups,
    group_size,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile's gradient; `plain` and `scaled` are the group's means that normalising takes off."""
    pixel, batch = tl.program_id(0) * BLOCK_P, tl.program_id(2)
    p = tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (p < pixels - pixel)[:, None] & (c < channels)[None, :]
    first = _first_element(batch, pixel, pixels, channels)
    offsets = p[:, None] * channels + c[None, :]
    w, b, m, r = _per_channel(weight, bias, mean, rstd, batch, c, channels, groups, group_size)
    group = batch.to(tl.int64) * groups + c // group_size
    off = tl.load(plain + group, c < channels, other=0.0)[None, :]
    slope = tl.load(scaled + group, c < channels, other=0.0)[None, :]
    value = tl.load(x + first + offsets, mask, other=0.0).to(tl.float32)
    gradient = tl.load(gy + first + offsets, mask, other=0.0).to(tl.float32)
    value = (value - m) * r
    gradient = _gradient_of_silu(gradient, value * w + b) * w
    gradient = (gradient - off - value * slope) * r
    tl.store(gx + first + offsets, gradient.to(gx.dtype.element_ty), mask)
