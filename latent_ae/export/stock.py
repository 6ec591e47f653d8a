"""What stock pipelines do with the statistics of a config."""

from __future__ import annotations

__all__ = ["IGNORED_BY"]

# Read from diffusers 0.42's sources (a test reads them again): stock pipelines that scale by
# `scaling_factor` alone, by which statistic they leave out.
IGNORED_BY = {
    "shift_factor": (
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "DiTPipeline",
        "PixArtAlphaPipeline",
    ),
    "latents_mean": (
        "StableDiffusionPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "DiTPipeline",
        "PixArtAlphaPipeline",
    ),
}
