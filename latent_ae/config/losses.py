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
    variance: Literal["fixed", "learned"] = "fixed"
    """`learned`: (pixel + w·LPIPS) / exp(s) + s with one trained scalar s (LDM's `logvar`)."""
    logvar_init: float = 0.0
    """Where s starts."""
