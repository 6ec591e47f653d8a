"""What a reconstruction is measured by while it is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from latent_ae.config.section import Section

__all__ = ["LossesConfig", "PerceptualConfig"]


class PerceptualConfig(Section):
    """LPIPS (Zhang et al. 2018)."""

    net: Literal["alex", "vgg"] = "vgg"
    """The backbone; `alex` ships with the package."""
    weight: PositiveFloat = 1.0
    """w before the LPIPS term."""
    path: str | None = None
    """A safetensors file of torchvision's backbone weights; left out, torchvision fetches them."""


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
