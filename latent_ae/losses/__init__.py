"""Distances between a picture and its reconstruction."""

from latent_ae.losses.perceptual import PerceptualLoss, load_backbone
from latent_ae.losses.pixel import PIXEL_LOSSES, charbonnier, l1, l2

__all__ = ["PIXEL_LOSSES", "PerceptualLoss", "charbonnier", "l1", "l2", "load_backbone"]
