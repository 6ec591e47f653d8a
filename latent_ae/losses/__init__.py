"""Distances between a picture and its reconstruction, and what regularises the latents."""

from latent_ae.losses.adversarial import ADVERSARIAL_LOSSES, lecam, r1_penalty
from latent_ae.losses.alignment import Alignment, GradientShare
from latent_ae.losses.discriminator import (
    NLayerDiscriminator,
    load_discriminator,
    save_discriminator,
)
from latent_ae.losses.equivariance import Draw, Equivariance
from latent_ae.losses.perceptual import PerceptualLoss, load_backbone
from latent_ae.losses.pixel import PIXEL_LOSSES, charbonnier, l1, l2

__all__ = [
    "ADVERSARIAL_LOSSES",
    "Alignment",
    "Draw",
    "Equivariance",
    "GradientShare",
    "NLayerDiscriminator",
    "PIXEL_LOSSES",
    "PerceptualLoss",
    "charbonnier",
    "l1",
    "l2",
    "lecam",
    "load_backbone",
    "load_discriminator",
    "r1_penalty",
    "save_discriminator",
]
