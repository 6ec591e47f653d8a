"""What a reconstruction is measured by while it is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from latent_ae.config.section import Section

__all__ = ["AlignmentConfig", "EquivarianceConfig", "LossesConfig", "PerceptualConfig"]

Probability = Annotated[float, Field(ge=0, le=1)]
Margin = Annotated[float, Field(ge=0, le=2)]


class PerceptualConfig(Section):
    """LPIPS (Zhang et al. 2018)."""

    net: Literal["alex", "vgg"] = "vgg"
    """The backbone; `alex` ships with the package."""
    weight: PositiveFloat = 1.0
    """w before the LPIPS term."""
    path: str | None = None
    """A safetensors file of torchvision's backbone weights; left out, torchvision fetches them."""


class EquivarianceConfig(Section):
    """EQ-VAE (Kouzelis et al. 2025): transformed latents are to decode to the transformed picture.

    In a share of the steps the latents are scaled and turned before they are decoded, and all
    losses compare with the picture scaled and turned the same way.
    """

    probability: Probability = 0.5
    """Share of the steps whose latents are transformed."""
    low_resolution: Probability = 0.25
    """Share of the other steps whose pictures are made smaller before they are encoded, by a scale
    of the same range; none without `scales`."""
    scales: tuple[PositiveFloat, PositiveFloat] | None = (0.25, 0.96875)
    """Smallest and largest scale of a side, uniform over the whole latents between; null: turns
    alone. Pictures stay as large as LPIPS and the discriminator need them."""
    anisotropic: bool = False
    """Height and width have a scale each."""
    rotate: bool = True
    """Turn by 90, 180 or 270 degrees, each as often."""

    @model_validator(mode="after")
    def _does_something(self) -> EquivarianceConfig:
        if self.scales is None and not self.rotate:
            raise ValueError("with `scales` null and `rotate` false there is no transform")
        if self.scales == (1, 1) and not self.rotate:
            raise ValueError("with `scales` of 1 and `rotate` false there is no transform")
        if not self.probability and not self.low_resolution:
            raise ValueError("with both shares 0 there is no transform: leave equivariance out")
        if self.scales is not None and not self.scales[0] <= self.scales[1] <= 1:
            raise ValueError("the two scales must satisfy smallest <= largest <= 1")
        return self


class AlignmentConfig(Section):
    """VA-VAE (Yao et al. 2025): latents are to be like the features of a frozen vision model."""

    model: str
    """A folder or a hub name of a vision model of `transformers`, with its image processor."""
    weight: PositiveFloat = 0.1
    """Of both terms; with `adaptive` a share of the reconstruction's gradient."""
    cosine_margin: Margin = 0.5
    """m₁: a cosine between projected latent and feature above 1 − m₁ costs nothing."""
    distance_margin: Margin = 0.25
    """m₂: cosines between two places may differ by this from the features' cosines."""
    adaptive: bool = True
    """Make the terms' gradient at the latents as long as the reconstruction's, times `weight`."""
    resolution: PositiveInt | None = None
    """Side in pixels of the square that the model sees; its image processor's when left out."""


class LossesConfig(Section):
    """The reconstruction side of the objective."""

    pixel: Literal["l1", "l2", "charbonnier"] = "l1"
    """Distance of pixels, the mean over image elements."""
    perceptual: PerceptualConfig | None = None
    """Left out: no perceptual term."""
    variance: Literal["fixed", "learned", "per_channel", "optimal"] = "fixed"
    """The decoder's: `learned` divides the distance by exp(s) and adds a trained scalar s (LDM's
    `logvar`); `per_channel` trains an s for each image channel; `optimal` takes the best s of each
    batch, the logarithm of its distance (Rybkin et al. 2021). With these a `bottleneck.weight` of 2
    (L2) or 1 (L1) is the exact bound, and the 1e-6 of a fixed variance next to nothing."""
    logvar_init: float = 0.0
    """Where a trained s starts; it moves by about the learning rate a step."""
    equivariance: EquivarianceConfig | None = None
    """Left out: latents are decoded as they are."""
    alignment: AlignmentConfig | None = None
    """Left out: no vision model."""
