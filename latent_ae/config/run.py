"""One training run: all sections together."""

from __future__ import annotations

from pydantic import model_validator

from latent_ae.config.adversary import AdversaryConfig
from latent_ae.config.data import SMALLEST_MEASURED, DataConfig, ValidationConfig
from latent_ae.config.distillation import DistillationConfig
from latent_ae.config.losses import LossesConfig
from latent_ae.config.model import AutoencoderConfig
from latent_ae.config.training import TrainingConfig

__all__ = ["Config"]


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
    def _divisible(self) -> Config:
        sizes = {"data.resolution": self.data.resolution}
        if self.validation and self.validation.resolution:
            sizes["validation.resolution"] = self.validation.resolution
        for key, size in sizes.items():
            if self.network.path is None and size % self.network.downsampling:
                raise ValueError(
                    f"{key} {size} is no multiple of the network's factor "
                    f"{self.network.downsampling}"
                )
        if self.distillation and self.bottleneck.kind != "none":
            raise ValueError(
                "distillation is for networks without a posterior, whose bottleneck.kind is none, "
                "such as network.kind tiny"
            )
        measured = self.losses.perceptual or (self.validation and not self.validation.resolution)
        if measured and self.data.resolution < SMALLEST_MEASURED:
            raise ValueError(
                f"data.resolution {self.data.resolution} is too small for LPIPS and SSIM; they "
                f"need {SMALLEST_MEASURED}"
            )
        return self
