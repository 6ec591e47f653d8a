"""Statistics of GroupNorm, gathered from parts of a picture."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ChannelMoments", "affine"]

_PART = 2**21  # values


class ChannelMoments:
    """Mean and variance of each channel, gathered strip by strip in float64.

    Chan, Golub & LeVeque (1979): no difference of large sums, so a large mean does no harm.

    Args:
        channels: how many there are.
        device: where the rows are.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.pixels = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.square = torch.zeros_like(self.mean)  # Σ (x − mean)²

    def add(self, rows: Tensor) -> None:
        """Takes rows of shape (1, C, h, W) in."""
        pixels = rows.permute(0, 2, 3, 1).flatten(0, 2)
        # In parts: large temporaries cost a CPU more in new pages than in arithmetic.
        size = _PART if rows.device.type == "cpu" else 32 * _PART
        for part in pixels.split(max(1, size // pixels.shape[1])):
            self._add(part.float())

    def _add(self, pixels: Tensor) -> None:
        centre = pixels.mean(0)
        square = (pixels - centre).square_().sum(0).double()
        count, apart = len(pixels), centre.double() - self.mean
        total = self.pixels + count
        self.mean += apart * count / total
        self.square += square + apart.square() * self.pixels * count / total
        self.pixels = total

    def of_groups(self, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and 1 / √(variance + eps) of groups of channels, in float64, each of shape (G,)."""
        means = self.mean.unflatten(0, (groups, -1))
        mean = means.mean(1)
        inner = self.square.unflatten(0, (groups, -1)) / self.pixels
        variance = (inner + (means - mean[:, None]).square()).mean(1)
        return mean, (variance + eps).rsqrt()


def affine(mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """GroupNorm with given statistics as scale and shift, fp32, each of shape (C,).

    Args:
        mean: of each group, of shape (G,).
        rstd: one over their standard deviation, of shape (G,).
        weight: of shape (C,).
        bias: of shape (C,).
    """
    size = len(weight) // len(mean)
    scale = weight.double() * rstd.double().repeat_interleave(size)
    shift = bias.double() - mean.double().repeat_interleave(size) * scale
    return scale.float(), shift.float()
