"""Statistics of GroupNorm, gathered from parts of a picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ChannelMoments"]

_PART = 2**21  # values


class ChannelMoments:
    """Mean and variance of each channel, gathered strip by strip in float64.

    Chan, Golub & LeVeque (1979): no difference of large sums, so a large mean does no harm.

    Args:
        pictures: how many there are, B.
        channels: of each, C.
        device: where the rows are.
    """

    def __init__(self, pictures: int, channels: int, device: torch.device | str = "cpu") -> None:
        self.pixels = 0
        self.mean = torch.zeros(pictures, channels, dtype=torch.float64, device=device)
        self.square = torch.zeros_like(self.mean)  # Σ (x − mean)²

    def add(self, rows: Tensor) -> None:
        """Takes rows of shape (B, C, h, W) in."""
        pixels = rows.permute(0, 2, 3, 1).flatten(1, 2)
        # In parts: large temporaries cost a CPU more in new pages than in arithmetic.
        size = _PART if rows.device.type == "cpu" else 32 * _PART
        for part in pixels.split(max(1, size // self.mean.numel()), dim=1):
            self._add(part.float())

    def _add(self, pixels: Tensor) -> None:
        centre = pixels.mean(1)
        square = (pixels - centre[:, None]).square_().sum(1).double()
        count, apart = pixels.shape[1], centre.double() - self.mean
        total = self.pixels + count
        self.mean += apart * count / total
        self.square += square + apart.square() * self.pixels * count / total
        self.pixels = total

    def affine(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """GroupNorm with these statistics as scale and shift, fp32, each of shape (B, C, 1, 1)."""
        means = self.mean.unflatten(1, (norm.num_groups, -1))
        mean = means.mean(2, keepdim=True)
        inner = self.square.unflatten(1, (norm.num_groups, -1)) / self.pixels
        variance = (inner + (means - mean).square()).mean(2, keepdim=True)
        rstd = (variance + norm.eps).rsqrt()
        scale = norm.weight.double() * rstd.expand_as(means).flatten(1)
        shift = norm.bias.double() - mean.expand_as(means).flatten(1) * scale
        return scale.float()[..., None, None], shift.float()[..., None, None]
