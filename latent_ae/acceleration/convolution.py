"""An autoencoder's convolutions, of whole pictures or of rows of one; upsampling is folded in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ae.acceleration.conditions import traced
from latent_ae.acceleration.winograd import pays_off, winograd

__all__ = ["keeps_no_graph", "convolve", "convolve_halved", "convolve_upsampled"]

WHOLE = (1, 1)  # rows of zeros above and below: at both edges of a picture


def convolve(x: Tensor, conv: nn.Conv2d, rows: tuple[int, int] = WHOLE) -> Tensor:
    """A convolution of 3 × 3 with padding 1, of stride 1.

    Args:
        x: of shape (B, C, H, W).
        conv: its weights.
        rows: how many rows of zeros are above and below (0 where x holds rows of the neighbours).
    """
    direct = traced() or not pays_off(x, conv.weight)
    if not direct and keeps_no_graph(x, conv.weight, conv.bias):
        return winograd(x, conv.weight, conv.bias, rows)
    if rows[0] != rows[1]:
        x, rows = F.pad(x, (0, 0, *rows)), (0, 0)
    return F.conv2d(x, conv.weight, conv.bias, padding=(rows[0], 1))


def convolve_halved(x: Tensor, conv: nn.Conv2d, bottom: int = 1) -> Tensor:
    """The downsampling of diffusers: 3 × 3 of stride 2, with zeros at the right and below.

    Args:
        x: of shape (B, C, H, W).
        conv: its weights.
        bottom: how many rows of zeros are below, 0 or 1.
    """
    return F.conv2d(F.pad(x, (0, 1, 0, bottom)), conv.weight, conv.bias, stride=2)


def convolve_upsampled(x: Tensor, conv: nn.Conv2d, rows: tuple[int, int] = WHOLE) -> Tensor:
    """A convolution of 3 × 3 of a picture that is enlarged twice by its nearest pixels.

    Each output sees 2 × 2 pixels of x, some of them through two or three weights: so four kernels
    of 2 × 2, one for each parity, do with 4/9 of the products and without the enlarged picture.

    Args:
        x: of shape (B, C, H, W).
        conv: its weights.
        rows: how many rows of zeros are above and below, 0 or 1 each.

    Returns:
        Of shape (B, K, 2 (H + sum(rows) − 2), 2 W).
    """
    # Each kernel over all of x, padded as it is: to cut x first would copy it four times.
    first, last = 1 - rows[0], x.shape[2] - (1 - rows[1])
    tall, wide = last - first, x.shape[3]
    parts = [
        F.conv2d(x, kernel, conv.bias, padding=1)[:, :, first + i : last + i, j : j + wide]
        for i, row in enumerate(_folded(conv.weight))
        for j, kernel in enumerate(row)
    ]
    if keeps_no_graph(x, conv.weight, conv.bias):
        shape, dtype = (len(x), conv.out_channels, 2 * tall, 2 * wide), parts[0].dtype
        result = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
        for k, part in enumerate(parts):
            result[:, :, k // 2 :: 2, k % 2 :: 2] = part
        return result
    # (B, 2, 2, K, H, W) to (B, H, 2, W, 2, K), which is channels_last already.
    stacked = torch.stack(parts, 1).unflatten(1, (2, 2))
    return stacked.permute(0, 4, 1, 5, 2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _folded(weight: Tensor) -> list[list[Tensor]]:
    """Kernels of shape (K, C, 2, 2) for even and odd rows and columns."""
    rows = (
        torch.stack([weight[:, :, 0], weight[:, :, 1] + weight[:, :, 2]], 2),
        torch.stack([weight[:, :, 0] + weight[:, :, 1], weight[:, :, 2]], 2),
    )
    layout = torch.channels_last
    return [
        [
            torch.stack([r[..., 0], r[..., 1] + r[..., 2]], 3).contiguous(memory_format=layout),
            torch.stack([r[..., 0] + r[..., 1], r[..., 2]], 3).contiguous(memory_format=layout),
        ]
        for r in rows
    ]


def keeps_no_graph(*tensors: Tensor | None) -> bool:
    """Whether autograd has nothing to keep of an operation on these tensors."""
    if not torch.is_grad_enabled():
        return True
    return not any(one.requires_grad for one in tensors if one is not None)
