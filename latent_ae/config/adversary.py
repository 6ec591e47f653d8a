"""The discriminator and how it speaks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from latent_ae.config.section import Section
from latent_ae.config.training import Beta

__all__ = ["AdversaryConfig", "DiscriminatorConfig"]


class DiscriminatorConfig(Section):
    """A PatchGAN: a convolutional network with one verdict a patch."""

    layers: PositiveInt = 3
    """Strided convolutions: with 1, 2, 3, 4 a verdict sees 16, 34, 70, 142 pixels a side."""
    channels: PositiveInt = 64
    """Of the first convolution; each layer doubles them, up to 8 times as many."""
    norm: Literal["group", "batch", "none"] = "group"
    """`group`: per picture, so the same on any number of processes; `batch`: LDM's, with the
    statistics of all processes; `none`: usual with `spectral_norm`."""
    spectral_norm: bool = False
    """Divide each convolution by its largest singular value (Miyato et al. 2018)."""


class AdversaryConfig(DiscriminatorConfig):
    """A discriminator that learns to tell reconstructions from pictures, and is to be fooled."""

    weight: PositiveFloat = 0.5
    """Of the adversarial term; with `adaptive` a share of the reconstruction's gradient."""
    start: NonNegativeInt = 50_000
    """The step at which the autoencoder first hears it; before its own warm-up nothing of it
    runs."""
    warmup_steps: NonNegativeInt = 1000
    """Steps before `start` in which the discriminator learns alone."""
    ramp_steps: NonNegativeInt = 0
    """Steps after `start` over which `weight` rises linearly from 0."""
    loss: Literal["hinge", "vanilla", "non_saturating"] = "hinge"
    """`hinge` and `vanilla` as in LDM (the autoencoder raises the verdict itself);
    `non_saturating`: vanilla, with -log D for the autoencoder."""
    adaptive: bool = True
    """LDM's: scale the term so that both gradients are equally long at the last layer."""
    adaptive_max: PositiveFloat = 1e4
    """The largest such scale, in LDM's units: for losses summed over an image."""
    lecam: NonNegativeFloat = 0.0
    """Weight of LeCam's regulariser (Tseng et al. 2021); .001 is usual."""
    lecam_decay: Beta = 0.999
    """Of its moving averages of the verdicts."""
    r1: NonNegativeFloat = 0.0
    """γ of the gradient penalty on pictures (Mescheder et al. 2018)."""
    r1_every: PositiveInt = 16
    """Steps from one penalty to the next, which then weighs as much more (StyleGAN2)."""
    learning_rate: PositiveFloat | None = None
    """The discriminator's peak rate; the autoencoder's when left out; the same schedule."""
    betas: tuple[Beta, Beta] = (0.5, 0.9)
    """Adam's."""
    path: str | None = Field(default=None)
    """A `discriminator.safetensors` to begin with, from a checkpoint or an exported folder."""
