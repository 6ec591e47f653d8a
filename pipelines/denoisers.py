"""The recipe of a latent denoiser: its options, its network, its scheduler.

`train_denoiser.py` trains by it. What is built here fits `LatentDiffusionPipeline`: the null class
of classifier-free guidance is the last row of the label embedding.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.models.embeddings import LabelEmbedding
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from torch import nn

from latent_ae.errors import UserError

__all__ = ["TRAIN_TIMESTEPS", "DenoiserConfig", "build_denoiser", "build_scheduler"]

TRAIN_TIMESTEPS = 1000


def _integers(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


class DenoiserConfig(BaseModel):
    """What to train, on what objective, for how long; each key is also an option of the script."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    denoiser: Literal["unet", "dit"] = "unet"
    """diffusers' `UNet2DModel` or `DiTTransformer2DModel`."""
    channels: Annotated[tuple[PositiveInt, ...], BeforeValidator(_integers)] = (128, 256, 256)
    """U-Net: channels of each level; each level after the first halves the side."""
    layers: PositiveInt = 2
    """U-Net: residual blocks a level."""
    attention: NonNegativeInt = 2
    """U-Net: how many levels attend, counted from the smallest."""
    width: PositiveInt = 384
    """DiT: channels of a token."""
    depth: PositiveInt = 12
    """DiT: blocks."""
    heads: PositiveInt = 6
    """DiT: attention heads; divides `width`."""
    patch: PositiveInt = 2
    """DiT: side of the square of latents that makes a token."""
    objective: Literal["flow", "ddpm"] = "flow"
    """`flow`: rectified flow (Liu et al. 2022) as in SD3; `ddpm`: Ho et al. 2020."""
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    """ddpm: the noise, or v (Salimans and Ho 2022) with betas of zero terminal SNR."""
    sigmas: Literal["logit_normal", "uniform"] = "logit_normal"
    """flow: the noise levels trained at; `logit_normal` as in SD3 (Esser et al. 2024)."""
    labels: bool = True
    """Condition on the latents' labels, where there are any."""
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    """How often a label gives way to the null class, for classifier-free guidance."""
    steps: PositiveInt = 100_000
    """Optimizer updates in all."""
    seconds: PositiveFloat | None = None
    """Train at most this long (start and saving not counted), the learning rate falling in time."""
    batch_size: PositiveInt = 64
    """Latents a process and step."""
    learning_rate: PositiveFloat = 1e-4
    """The peak."""
    warmup_steps: NonNegativeInt = 500
    """Linear warm-up of the learning rate, on top of half a cosine down to zero."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 for none."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of autocast; weights, optimizer and average stay fp32."""
    ema: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the averaged weights, which are saved; after t steps at most (1 + t) / (10 + t)."""
    workers: NonNegativeInt = 0
    """Loader processes beside each training process."""
    seed: int = 0
    """Of initialisation, order and noise."""
    log_every: PositiveInt = 50
    """Steps between rows of log.jsonl."""
    checkpoint_every: PositiveInt = 2000
    """Steps between checkpoints; the last step always leaves one."""


def build_denoiser(
    config: DenoiserConfig, shape: tuple[int, int, int], classes: int
) -> UNet2DModel | DiTTransformer2DModel:
    """A fresh denoiser for latents of `shape` (c, h, w), with a null class after its `classes`.

    Raises:
        UserError: the network does not fit the latents.
    """
    (c, h, w), channels = shape, config.channels
    if config.denoiser == "dit":
        return _build_dit(config, shape, classes)
    if h % 2 ** (len(channels) - 1) or w % 2 ** (len(channels) - 1):
        raise UserError(
            f"latents of {h} × {w} cannot be halved {len(channels) - 1} times: channels"
        )
    plain = len(channels) - config.attention
    attends = [level >= plain for level in range(len(channels))]
    groups = math.gcd(32, *channels)
    unet = UNet2DModel(
        sample_size=h if h == w else (h, w),
        in_channels=c,
        out_channels=c,
        block_out_channels=channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        layers_per_block=config.layers,
        attention_head_dim=groups,
        norm_num_groups=groups,
        num_class_embeds=classes + 1 if classes else None,
    )
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def _build_dit(
    config: DenoiserConfig, shape: tuple[int, int, int], classes: int
) -> DiTTransformer2DModel:
    c, h, w = shape
    if h != w or h % config.patch:
        raise UserError(f"a DiT wants square latents that `patch` divides, not {h} × {w}: try unet")
    if config.width % config.heads:
        raise UserError(f"heads {config.heads} does not divide width {config.width}")
    dit = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=c,
        num_layers=config.depth,
        patch_size=config.patch,
        sample_size=h,
        num_embeds_ada_norm=classes,
    )
    # adaLN-Zero (Peebles and Xie 2023): each block starts as the identity. diffusers, made for
    # trained weights, leaves these layers at their default.
    zero = [block.get_submodule("norm1.linear") for block in dit.transformer_blocks]
    for layer in (*zero, dit.proj_out_1, dit.proj_out_2):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    # diffusers would drop labels in each block on its own; they are dropped once, in `Examples`.
    for module in dit.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return dit


def build_scheduler(config: DenoiserConfig) -> FlowMatchEulerDiscreteScheduler | DDIMScheduler:
    """The scheduler of the objective, by which the denoiser is trained and then samples.

    For `ddpm` the betas are Stable Diffusion's. Sampling begins at the noisiest timestep
    ("trailing") and, with v-prediction, at pure noise (Lin et al. 2024).
    """
    if config.objective == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS)
    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=config.prediction,
        rescale_betas_zero_snr=config.prediction == "v_prediction",
    )
