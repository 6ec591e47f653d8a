"""What the codes of many pictures look like together, and how far that is from the prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latent_ae.bottlenecks import LOGVAR_RANGE, gaussian_kl
from latent_ae.evaluation.gallery import chosen
from latent_ae.evaluation.prior import negentropy, sliced_wasserstein
from latent_ae.evaluation.spectrum import Spectrum
from latent_ae.scaling import LatentScaling

__all__ = ["LatentSpace"]

ACTIVE = 0.01  # variance of the posterior means from which a unit counts as active (Burda 2016)
SATURATED = 0.5  # nats of log-variance from the ends of its range
DEAD = 0.01  # share of the variance that tells pictures apart
KEPT = 2048  # pictures whose patches and pooled codes are kept
PATCHES, SIDE = 16, 4  # kept of each picture, in latent pixels
_BINS = 500  # of a log-variance, a tenth of a nat each


class LatentSpace:
    """Gathers posteriors batch by batch; sums are float64, and processes can be added up.

    Args:
        channels: of the latents.
        seed: of the patches and draws that are kept.
        image_channels: of the pictures.
    """

    def __init__(self, channels: int, seed: int = 0, image_channels: int = 3) -> None:
        self.channels, self.seed = channels, seed
        self.images, self.has_posterior = 0, True
        self.sums: dict[str, Tensor] = {}
        self.largest = torch.zeros(channels)
        self.unit_sums: tuple[Tensor, Tensor] | None = None
        self.one_shape = True
        self.spectrum = Spectrum(channels, image_channels)
        # Pooled code and patches of chosen pictures, by position.
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, mean: Tensor, logvar: Tensor | None, images: Tensor, positions: Sequence[int]
    ) -> None:
        """Adds posteriors.

        Args:
            mean: of shape (B, c, h, w).
            logvar: likewise, or None where the autoencoder has no posterior.
            images: their pictures, uint8 of shape (B, C, H, W).
            positions: their places in the data set, which seed what is drawn.
        """
        mean = mean.float().cpu()
        self.has_posterior = logvar is not None
        logvar = torch.full_like(mean, LOGVAR_RANGE[0]) if logvar is None else logvar.cpu()
        self._add(_channel_sums(mean, logvar))
        self.images += len(mean)
        self.largest = torch.maximum(self.largest, mean.abs().amax((0, 2, 3)))
        self._add_units(mean)
        self.spectrum.update(mean, images.cpu())
        pooled = torch.nn.functional.adaptive_avg_pool2d(mean, SIDE).flatten(1)
        for i, position in enumerate(positions):
            drawn = self._draw_patches(mean[i], logvar[i], position)
            self.kept[position] = (pooled[i].clone(), drawn)
        self.kept = chosen(self.kept, KEPT)

    def merge(self, other: LatentSpace) -> None:
        """Adds what another process has gathered."""
        if not other.images:
            return
        self.has_posterior = other.has_posterior
        self._add(other.sums)
        self.images += other.images
        self.largest = torch.maximum(self.largest, other.largest)
        self.one_shape = self.one_shape and other.one_shape
        if other.unit_sums is not None:
            self._add_unit_sums(*other.unit_sums)
        self.spectrum.merge(other.spectrum)
        self.kept = chosen(self.kept | other.kept, KEPT)

    def codes(self) -> tuple[list[int], Tensor]:
        """Positions of at most 2,048 pictures, and their codes averaged to 4 × 4, a row each."""
        return list(self.kept), torch.stack([code for code, _ in self.kept.values()])

    def _patches(self) -> Tensor:
        return torch.cat([patches for _, patches in self.kept.values()])

    def channel_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, posterior noise included, float64."""
        sums, count = self.sums, self.sums["count"]
        mean = sums["mean"] / count
        variance = (sums["square"] + sums["variance"]) / count - mean.square()
        return mean, variance.clamp(min=0).sqrt()

    def summary(self, scaling: LatentScaling) -> dict[str, Any]:
        """Everything of it, plain values for a JSON file (docs/evaluation.md explains each)."""
        mean, std = self.channel_moments()
        count = self.sums["count"]
        kl = self.sums["kl"] / count
        variance = ((self.sums["square"] + self.sums["variance"]) / count).mean() - mean.mean() ** 2
        posterior = self.has_posterior
        channels = self._channels(mean, std, kl)
        return {
            "images": self.images,
            "mean": mean.mean().item(),
            "std": variance.clamp(min=0).sqrt().item(),
            "kl_nats_per_image": self.sums["kl"].sum().item() / self.images if posterior else None,
            "kl_bits_per_value": kl.mean().item() / 0.6931471805599453 if posterior else None,
            "active_units": self._active_units(),
            "channels": channels,
            "aggregate": self._aggregate(scaling, channels),
            "spectrum": self.spectrum.summary(),
        }

    def _aggregate(self, scaling: LatentScaling, channels: list[dict[str, Any]]) -> dict[str, Any]:
        patches = self._patches()
        result: dict[str, Any] = {"prior_kl": sum(c["prior_kl"] for c in channels) / len(channels)}
        if not len(patches):
            return result
        scaled = scaling.to_final(patches)
        generator = torch.Generator().manual_seed(self.seed)
        floor = torch.randn(patches.shape, generator=generator)
        prefixes = (("", patches), ("scaled_", scaled), ("floor_", floor))
        for prefix, values in prefixes:
            vectors = values.permute(0, 2, 3, 1).reshape(-1, self.channels)
            result[f"{prefix}sliced_wasserstein"] = sliced_wasserstein(vectors, self.seed)
            whole = values.flatten(1)
            result[f"{prefix}sliced_wasserstein_patch"] = sliced_wasserstein(whole, self.seed)
        result["floor"] = result.pop("floor_sliced_wasserstein")
        result["floor_patch"] = result.pop("floor_sliced_wasserstein_patch")
        return result

    def _channels(self, mean: Tensor, std: Tensor, kl: Tensor) -> list[dict[str, Any]]:
        sums, count = self.sums, self.sums["count"]
        signal = (sums["square"] / count - mean.square()).clamp(min=0)
        share = signal / std.square().clamp(min=1e-30)
        gaussian = 0.5 * (mean.square() + std.square() - 1 - std.square().clamp(min=1e-30).log())
        drawn = self._patches().transpose(0, 1).flatten(1)
        active = self._active_by_channel()
        rows = []
        for c in range(self.channels):
            row = {
                "mean": mean[c].item(),
                "std": std[c].item(),
                "kl_nats": kl[c].item() if self.has_posterior else None,
                "posterior_std": self._posterior_std(c) if self.has_posterior else None,
                "signal_share": share[c].item(),
                "active_units": None if active is None else active[c].item(),
                "saturated": (sums["saturated"][c] / count).item() if self.has_posterior else None,
                "largest": self.largest[c].item() / max(std[c].item(), 1e-30),
                "prior_kl": gaussian[c].item() + negentropy(drawn[c]),
                "dead": share[c].item() < DEAD or signal[c].item() < 1e-12,
            }
            rows.append(row)
        return rows

    def _posterior_std(self, channel: int) -> list[float]:
        histogram = self.sums["histogram"][channel]
        cumulative = histogram.cumsum(0) / histogram.sum()
        low, high = LOGVAR_RANGE
        ends = [
            low + (high - low) * (torch.searchsorted(cumulative, q).item() + 0.5) / _BINS
            for q in torch.tensor([0.05, 0.95], dtype=torch.float64)
        ]
        average = self.sums["std"][channel].item() / self.sums["count"]
        first, last = (float(torch.tensor(end / 2).exp()) for end in ends)
        return [first, float(average), last]

    def _active_by_channel(self) -> Tensor | None:
        if not self.one_shape or self.unit_sums is None or self.images < 2:
            return None
        total, square = self.unit_sums
        variance = square / self.images - (total / self.images).square()
        return (variance > ACTIVE).double().mean((1, 2))

    def _active_units(self) -> float | None:
        active = self._active_by_channel()
        return None if active is None else active.mean().item()

    def _add(self, sums: dict[str, Tensor]) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _add_units(self, mean: Tensor) -> None:
        self._add_unit_sums(mean.double().sum(0), mean.double().square().sum(0))

    def _add_unit_sums(self, total: Tensor, square: Tensor) -> None:
        if self.unit_sums is None:
            self.unit_sums = (total, square)
        elif self.unit_sums[0].shape != total.shape:
            self.one_shape = False
        else:
            self.unit_sums = (self.unit_sums[0] + total, self.unit_sums[1] + square)

    def _draw_patches(self, mean: Tensor, logvar: Tensor, position: int) -> Tensor:
        height, width = mean.shape[-2:]
        if min(height, width) < SIDE:
            return torch.empty(0, self.channels, SIDE, SIDE)
        generator = torch.Generator().manual_seed((self.seed << 32) + position)
        noise = torch.randn(mean.shape, generator=generator)
        drawn = mean + (0.5 * logvar).exp() * noise if self.has_posterior else mean
        count = max(1, min(PATCHES, PATCHES * 16 // self.channels))  # many channels take memory
        top = torch.randint(height - SIDE + 1, (count,), generator=generator).tolist()
        left = torch.randint(width - SIDE + 1, (count,), generator=generator).tolist()
        places = zip(top, left, strict=True)
        return torch.stack([drawn[:, t : t + SIDE, u : u + SIDE] for t, u in places])


def _channel_sums(mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
    """Sums over pictures and positions, by channel."""
    over, low, high = (0, 2, 3), *LOGVAR_RANGE
    mean, logvar = mean.double(), logvar.double()
    near_end = (logvar < low + SATURATED) | (logvar > high - SATURATED)
    bins = ((logvar - low) / (high - low) * _BINS).long().clamp(0, _BINS - 1)
    by_channel = bins.transpose(0, 1).flatten(1)
    return {
        "count": torch.tensor(float(mean[:, 0].numel()), dtype=torch.float64),
        "mean": mean.sum(over),
        "square": mean.square().sum(over),
        "variance": logvar.exp().sum(over),
        "std": (0.5 * logvar).exp().sum(over),
        "kl": gaussian_kl(mean, logvar).sum(over),
        "saturated": near_end.sum(over).double(),
        "histogram": torch.stack([row.bincount(minlength=_BINS) for row in by_channel]).double(),
    }
