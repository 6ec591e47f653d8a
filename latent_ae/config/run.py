"""One training run: all sections together."""

from __future__ import annotations

from pydantic import model_validator

from latent_ae.channels import has_colours
from latent_ae.config.adversary import AdversaryConfig
from latent_ae.config.data import SMALLEST_MEASURED, DataConfig, ValidationConfig
from latent_ae.config.distillation import DistillationConfig
from latent_ae.config.losses import LossesConfig
from latent_ae.config.model import AutoencoderConfig
from latent_ae.config.quantizers import QUANTIZERS
from latent_ae.config.training import TrainingConfig

__all__ = ["Config", "colourless"]


def colourless(losses: LossesConfig, channels: int) -> str | None:
    """Why losses that look at colours do not fit a number of channels, in one sentence, or None."""
    looking = [name for name in ("perceptual", "alignment") if getattr(losses, name)]
    if not looking or has_colours(channels):
        return None
    return (
        f"losses.{looking[0]} looks at pictures of 1, 3 or 4 channels and the network's have "
        f"{channels}; leave it out"
    )


class Config(AutoencoderConfig):
    """One training run."""

    data: DataConfig
    losses: LossesConfig = LossesConfig()
    adversary: AdversaryConfig | None = None
    """Left out: none."""
    distillation: DistillationConfig | None = None
    """Left out: the network makes latents of its own."""
    training: TrainingConfig = TrainingConfig()
    validation: ValidationConfig | None = None
    output: str
    """The run's folder: checkpoints, logs, pictures."""

    @model_validator(mode="after")
    def _movable(self) -> Config:
        if self.network.freeze == "encoder" and self.losses.alignment:
            raise ValueError(
                "losses.alignment moves latents, which network.freeze: encoder leaves where they "
                "are: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _quantizable(self) -> Config:
        if self.bottleneck.kind not in QUANTIZERS:
            return self
        if self.losses.equivariance and self.losses.equivariance.scales is not None:
            raise ValueError(
                "losses.equivariance.scales mixes neighbouring latents, and between codes there is "
                "nothing: set scales: null, which leaves turns"
            )
        if self.training.shard:
            raise ValueError(
                "training.shard and a bottleneck that quantises exclude each other: codebooks are "
                "whole on every process"
            )
        return self

    @model_validator(mode="after")
    def _divisible(self) -> Config:
        sizes = {"data.resolution": self.data.resolution}
        if self.validation and self.validation.resolution:
            sizes["validation.resolution"] = self.validation.resolution
        if self.data.buckets:
            sizes["data.buckets.multiple"] = self.data.buckets.multiple
        for key, size in sizes.items():
            if self.network.path is None and size % self.network.downsampling:
                raise ValueError(
                    f"{key} {size} is no multiple of the network's factor "
                    f"{self.network.downsampling}"
                )
        return self

    @model_validator(mode="after")
    def _teachable(self) -> Config:
        regularised = self.losses.equivariance or self.losses.alignment
        if self.distillation and regularised:
            raise ValueError(
                "distillation takes the teacher's latents as they are: leave losses.equivariance "
                "and losses.alignment out"
            )
        if self.distillation and self.network.freeze == "encoder":
            raise ValueError(
                "distillation teaches the encoder, which network.freeze: encoder leaves as it is: "
                "leave one of them out"
            )
        if self.distillation and self.bottleneck.kind != "none":
            raise ValueError(
                "distillation is for networks without a posterior, whose bottleneck.kind is none, "
                "such as network.kind tiny"
            )
        return self

    @model_validator(mode="after")
    def _measurable(self) -> Config:
        channels = self.network.in_channels
        if self.network.path is None and (reason := colourless(self.losses, channels)):
            raise ValueError(reason)
        measured = self.losses.perceptual or (self.validation and not self.validation.resolution)
        if measured and self.data.resolution < SMALLEST_MEASURED:
            raise ValueError(
                f"data.resolution {self.data.resolution} is too small for LPIPS and SSIM; they "
                f"need {SMALLEST_MEASURED}"
            )
        smallest = self.data.smallest_side()
        if self.losses.perceptual and smallest < SMALLEST_MEASURED:
            raise ValueError(
                f"data.buckets have a side of {smallest}, which is too small for LPIPS: it needs "
                f"{SMALLEST_MEASURED}; lower max_aspect, or raise multiple or the resolutions"
            )
        return self
