"""3 × 3 convolutions with half of the multiplications, for fp32 on CPUs.

Winograd's minimal filtering F(4, 3) along the rows of a picture (Lavin & Gray 2016 nest it along
the columns too): four outputs side by side take 6 products a row of the kernel instead of 12. Left
in one direction, it saves less and rounds as direct convolution does. The points at which the
polynomials are evaluated are 0, ±√2, ±√½ and ∞ instead of the usual 0, ±1, ±2 and ∞: their powers
are smaller, and so is the error.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial import polynomial
from torch import Tensor

__all__ = ["pays_off", "winograd"]

_OUT, _IN = 4, 6  # outputs of a tile, and the inputs that it is computed from
_POINTS = (0.0, 2**0.5, -(2**0.5), 0.5**0.5, -(0.5**0.5))
_LEAST_CHANNELS = 64  # below, the transforms cost as much as what they save
_LEAST_PIXELS = 1024  # below, transforming the weights does
_LEAST_ROWS = 8  # of a block
_BUFFER = 2**20  # values of one of two buffers: they stay in the processor's cache
# With AVX-512, oneDNN's direct convolution does two and a half times the operations a second that
# the matrix product does which the transformed tiles need: 1.5 times as fast as this.
_CAPABILITIES = ("DEFAULT", "NO AVX", "AVX2")


def pays_off(x: Tensor, weight: Tensor) -> bool:
    """Whether a 3 × 3 convolution of stride 1 is faster this way, by its type, device and shape.

    Args:
        x: of shape (B, C, H, W).
        weight: of shape (K, C, 3, 3).
    """
    return (
        type(x) is Tensor  # none of a mode that records or counts
        and x.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() in _CAPABILITIES
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and min(weight.shape[:2]) >= _LEAST_CHANNELS
        and x.shape[2] * x.shape[3] >= _LEAST_PIXELS
    )


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, rows: tuple[int, int]) -> Tensor:
    """`conv2d` of stride 1 with a column of zeros on either side, without a graph.

    Args:
        x: of shape (B, C, H, W), best in channels_last memory.
        weight: of shape (K, C, 3, 3).
        bias: of shape (K,).
        rows: how many rows of zeros are above and below, 0 or 1 each.

    Returns:
        Of shape (B, K, H + sum(rows) − 2, W), in channels_last memory.
    """
    x = x.contiguous(memory_format=torch.channels_last)  # `_tiles` steps over channels
    batch, channels, height, width = x.shape
    filters, tall, across = len(weight), height + sum(rows) - 2, -(-width // _OUT)
    kernels = (_matrices(x)[0] @ weight.permute(3, 2, 1, 0).reshape(3, -1)).view(
        _IN, 3, channels, filters
    )
    high, wide = _block(tall, across, max(channels, filters))
    one, two = x.new_empty(2, _IN * wide * max(channels, filters) * (high + 2))
    result = x.new_empty(batch, tall, across, _OUT, filters)
    for picture, target in zip(x.permute(0, 2, 3, 1), result, strict=True):
        for top, left in product(range(0, tall, high), range(0, across, wide)):
            size = min(high, tall - top), min(wide, across - left)
            window = _window(picture, top - rows[0], _OUT * left - 1, size)
            tiles = _tiles(window, kernels, one, two).permute(1, 2, 0, 3)
            place = target[top : top + size[0], left : left + size[1]]
            if bias is None:
                place.copy_(tiles)
            else:
                torch.add(tiles, bias, out=place)
    result = result.flatten(2, 3).permute(0, 3, 1, 2)[..., :width]
    return result.contiguous(memory_format=torch.channels_last)


def _block(tall: int, across: int, channels: int) -> tuple[int, int]:
    """Rows and tiles of a row to compute at a time: the two rows beyond them are done twice."""
    values = _BUFFER // (_IN * channels)
    wide = min(across, max(1, values // (_LEAST_ROWS + 2)))
    return min(tall, max(1, values // wide - 2)), wide


def _window(picture: Tensor, top: int, left: int, size: tuple[int, int]) -> Tensor:
    """What so many rows and tiles see of a picture of shape (H, W, C), with zeros beyond it."""
    bottom, right = top + size[0] + 2, left + size[1] * _OUT + 2
    first, last = max(top, 0), min(bottom, picture.shape[0])
    begin, end = max(left, 0), min(right, picture.shape[1])
    around = (0, 0, begin - left, right - end, first - top, bottom - last)
    return F.pad(picture[first:last, begin:end], around)


def _tiles(window: Tensor, kernels: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """Outputs of shape (4, rows, tiles, K) of a window; `one` and `two` are to compute in."""
    _, inputs, outputs = _matrices(window)
    channels, filters = kernels.shape[2:]
    count, across = window.shape[0] - 2, (window.shape[1] - 2) // _OUT
    line, column, _ = window.stride()
    shape = (_IN, count + 2, across, channels)
    overlapping = window.as_strided(shape, (column, line, _OUT * column, 1))
    moved = _buffer(two, _IN, (count + 2) * across, channels)
    gathered = _buffer(one, *shape).copy_(overlapping)
    torch.mm(inputs, gathered.view(_IN, -1), out=moved.view(_IN, -1))
    products = _buffer(one, _IN, count * across, filters)
    above, middle, below = (moved[:, i * across : (i + count) * across] for i in range(3))
    torch.bmm(above, kernels[:, 0], out=products)
    products.baddbmm_(middle, kernels[:, 1]).baddbmm_(below, kernels[:, 2])
    result = _buffer(two, _OUT, count * across * filters)
    torch.mm(outputs, products.view(_IN, -1), out=result)
    return result.view(_OUT, count, across, filters)


def _buffer(whole: Tensor, *shape: int) -> Tensor:
    size = torch.Size(shape)
    return whole[: size.numel()].view(size)


def _matrices(like: Tensor) -> list[Tensor]:
    """What transforms kernels (6 × 3), inputs (6 × 6) and products (4 × 6)."""
    return [like.new_tensor(one) for one in _NUMBERS]


def _numbers() -> list[list[list[float]]]:
    """The same as lists: a tensor that is kept could be one of another mode or device."""
    points = np.array(_POINTS)
    kernel, inputs, outputs = np.zeros((_IN, 3)), np.zeros((_IN, _IN)), np.zeros((_OUT, _IN))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        kernel[i] = point ** np.arange(3) / np.prod(point - others)
        inputs[i, : len(points)] = polynomial.polyfromroots(others)
        outputs[:, i] = point ** np.arange(_OUT)
    kernel[-1, -1] = outputs[-1, -1] = 1  # the point at infinity
    inputs[-1] = polynomial.polyfromroots(points)
    # Rows of equal length: then no product is so large that it drowns the others.
    length = np.linalg.norm(kernel, axis=1, keepdims=True)
    return [(kernel / length).tolist(), (inputs * length).tolist(), outputs.tolist()]


_NUMBERS = _numbers()
