"""Between raw latents, as the encoder gives them, and final latents, as a denoiser wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, field_validator
from torch import Tensor

from latent_ae.bottlenecks import gaussian_kl

__all__ = ["LatentScaling", "LatentStatistics"]


class LatentScaling(BaseModel):
    """The four numbers of a diffusers config that scale latents.

    final = (raw − mean) · scaling_factor / std, with the channels' `latents_mean` and
    `latents_std`, as in diffusers' `StableDiffusionXLPipeline`; without them
    final = (raw − shift_factor) · scaling_factor, as in its `StableDiffusion3Pipeline`.
    """

    scaling_factor: float = 1.0
    shift_factor: float | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None

    @field_validator("shift_factor")
    @classmethod
    def _none_is_one_way_to_say_it(cls, value: float | None) -> float | None:
        return value or None

    @classmethod
    def of(cls, network: Any) -> LatentScaling:
        """Reads them from a network's config."""
        known = {name: network.config.get(name) for name in cls.model_fields}
        return cls(**{name: value for name, value in known.items() if value is not None})  # pyright: ignore

    def to_config(self) -> dict[str, float | list[float] | None]:
        """The keys of a diffusers config.

        No shift is 0 there: `StableDiffusion3Pipeline` and `FluxPipeline` add it unseen, and fail
        with None.
        """
        return {**self.model_dump(), "shift_factor": self.shift_factor or 0.0}

    def to_final(self, raw: Tensor) -> Tensor:
        """Raw to final latents, of shape (c, h, w) or (B, c, h, w)."""
        mean, factor = self.shift_and_factor(raw)
        return (raw - mean) * factor

    def to_raw(self, final: Tensor) -> Tensor:
        """The inverse of `to_final`."""
        mean, factor = self.shift_and_factor(final)
        return final / factor + mean

    def shift_and_factor(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What is taken away and what is multiplied by, as tensors of the latents' kind."""

        def channels(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=latents.dtype, device=latents.device).view(-1, 1, 1)

        if self.latents_mean is not None and self.latents_std is not None:
            return channels(self.latents_mean), self.scaling_factor / channels(self.latents_std)
        return channels([self.shift_factor or 0.0]), channels([self.scaling_factor])


class LatentStatistics:
    """Moments of the aggregate posterior, exact over any number of batches, in float64.

    The law of total variance gives them without sampling noise: the variance of z ~ q(z|x) over
    pictures is Var[μ(x)] + E[σ²(x)]. Latents without a posterior have no σ² and no KL.
    """

    def __init__(self) -> None:
        self.count = 0  # latent elements a channel
        self.images = 0
        self._sum = self._square = self._variance = torch.zeros(())
        self._kl: Tensor | None = None

    def update(self, mean: Tensor, logvar: Tensor | None = None) -> None:
        """Adds posteriors, or latents alone; both of shape (B, c, h, w)."""
        mean = mean.double().cpu()
        over = (0, 2, 3)
        self._sum = self._sum + mean.sum(over)
        self._square = self._square + mean.square().sum(over)
        if logvar is not None:
            logvar = logvar.double().cpu()
            self._variance = self._variance + logvar.exp().sum(over)
            kl = gaussian_kl(mean, logvar).sum(over)
            self._kl = kl if self._kl is None else self._kl + kl
        self.count += mean[:, 0].numel()
        self.images += len(mean)

    @property
    def channel_mean(self) -> list[float]:
        """Mean of each channel."""
        return (self._sum / self.count).tolist()

    @property
    def channel_std(self) -> list[float]:
        """Standard deviation of each channel about its own mean, posterior noise included."""
        mean = self._sum / self.count
        variance = (self._square + self._variance) / self.count - mean.square()
        return variance.sqrt().tolist()

    @property
    def mean(self) -> float:
        """Mean over all channels."""
        return (self._sum / self.count).mean().item()

    @property
    def std(self) -> float:
        """Standard deviation over all channels about the common mean."""
        variance = ((self._square + self._variance) / self.count).mean() - self.mean**2
        return variance.sqrt().item()

    @property
    def kl_per_image(self) -> float | None:
        """KL(q(z|x) ‖ N(0, I)) of an image, in nats; None without a posterior."""
        return None if self._kl is None else self._kl.sum().item() / self.images

    def summary(self) -> dict[str, float | int | list[float] | None]:
        """All of it, for a JSON file."""
        return {
            "images": self.images,
            "mean": self.mean,
            "std": self.std,
            "channel_mean": self.channel_mean,
            "channel_std": self.channel_std,
            "kl_nats_per_image": self.kl_per_image,
        }
