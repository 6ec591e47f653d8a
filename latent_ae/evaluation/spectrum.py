"""The radial power spectrum of latents, beside that of the pictures at the latents' size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Spectrum", "radial_power"]

BINS = 16
_HIGH = 0.25  # cycles a latent pixel, half of what the grid can hold
_FIT = 0.05  # from here on the slope is fitted


def radial_power(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Power by radial frequency, in 16 rings from 0 to half a cycle a pixel.

    Each map less its mean is multiplied by a Hann window, so that its borders make no frequencies
    of their own.

    Args:
        maps: of shape (B, c, h, w).

    Returns:
        Sums of |FFT|² over the pictures and a ring's frequencies, of shape (c, 16), and how many
        frequencies a ring has over all pictures, of shape (16,), in float64.
    """
    maps = maps.double()
    height, width = maps.shape[-2:]
    window = torch.hann_window(height, periodic=False, dtype=torch.float64)[:, None]
    window = window * torch.hann_window(width, periodic=False, dtype=torch.float64)
    weight = window.sum().clamp(min=1e-30)
    centred = maps - (maps * window).sum((-2, -1), keepdim=True) / weight
    power = torch.fft.fft2(centred * window).abs().square().sum(0)
    vertical = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    radius = (vertical**2 + torch.fft.fftfreq(width, dtype=torch.float64) ** 2).sqrt()
    ring = (radius * 2 * BINS).ceil().long() - 1  # the mean's frequency falls into ring -1
    inside = (ring >= 0) & (ring < BINS)
    sums = torch.zeros(maps.shape[1], BINS, dtype=torch.float64)
    sums.index_add_(1, ring[inside], power[:, inside])
    return sums, ring[inside].bincount(minlength=BINS).double() * len(maps)


class Spectrum:
    """Gathers the spectra of latents and of their pictures; processes can be added up."""

    def __init__(self, channels: int, image_channels: int = 3) -> None:
        self.latents = torch.zeros(channels, BINS, dtype=torch.float64)
        self.pictures = torch.zeros(image_channels, BINS, dtype=torch.float64)
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def update(self, mean: Tensor, images: Tensor) -> None:
        """Adds posterior means of shape (B, c, h, w) and pictures, uint8 of shape (B, C, H, W)."""
        sums, counts = radial_power(mean)
        self.latents += sums
        self.counts += counts
        small = F.interpolate(images.float(), mean.shape[-2:], mode="bicubic", antialias=True)
        self.pictures += radial_power(small)[0]

    def merge(self, other: Spectrum) -> None:
        """Adds what another process has gathered."""
        self.latents += other.latents
        self.pictures += other.pictures
        self.counts += other.counts

    def summary(self) -> dict[str, Any]:
        """Densities of mean 1 by frequency (cycles a latent pixel), high shares and slopes."""
        frequency = ((torch.arange(BINS) + 0.5) / (2 * BINS)).double()
        result: dict[str, Any] = {"frequency": frequency.tolist()}
        for name, sums in (("latents", self.latents), ("pictures", self.pictures)):
            # Each channel counts alike, whatever its variance.
            power = (sums / sums.sum(1, keepdim=True).clamp(min=1e-30)).mean(0)
            density = power / self.counts.clamp(min=1)
            filled = self.counts > 0
            scale = density[filled].mean().clamp(min=1e-30) if filled.any() else 1.0
            density = density / scale
            prefix = "" if name == "latents" else "pictures_"
            result[name] = [
                value if there else None
                for value, there in zip(density.tolist(), filled.tolist(), strict=True)
            ]
            result[f"{prefix}high_share"] = power[frequency > _HIGH].sum().item()
            result[f"{prefix}slope"] = _slope(frequency, density, filled)
        return result


def _slope(frequency: Tensor, density: Tensor, filled: Tensor) -> float | None:
    """Of log density against log frequency: natural pictures have about −2."""
    chosen = filled & (frequency >= _FIT) & (density > 0)
    if int(chosen.sum()) < 3:
        return None
    x, y = frequency[chosen].log(), density[chosen].log()
    x = x - x.mean()
    return ((x * (y - y.mean())).sum() / x.square().sum()).item()
