"""Pipelines of tiny random networks, for the tests of `pipelines/latent_diffusion.py`."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    UNet2DModel,
)

from latent_diffusion import LatentDiffusionPipeline

NAMES = {0: "cat", 1: "dog, hound", 2: "bird"}
SHAPE = (4, 8, 8)  # latents of pictures of 16 x 16


def make_vae(**config):
    torch.manual_seed(0)
    levels = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return AutoencoderKL(
        down_block_types=levels[0],
        up_block_types=levels[1],
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        **{"scaling_factor": 0.5, **config},
    ).eval()


def make_unet(classes=None, **config):
    torch.manual_seed(1)
    return UNet2DModel(
        **{"sample_size": 8, "in_channels": 4, "out_channels": 4, **config},
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=None if classes is None else classes + 1,
    ).eval()


def make_dit(classes=3, **config):
    torch.manual_seed(1)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=classes,
        **config,
    ).eval()


def make_pipeline(denoiser=None, scheduler=None, vae=None, **options):
    pipe = LatentDiffusionPipeline(
        vae or make_vae(), denoiser or make_unet(), scheduler or DDIMScheduler(), **options
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, seed=0, **options):
    options = {"num_inference_steps": 3, "output_type": "pt", **options}
    return pipe(generator=torch.Generator().manual_seed(seed), **options).images
