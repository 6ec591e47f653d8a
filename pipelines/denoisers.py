"""The recipe of a latent denoiser: its options, its network, its scheduler.

`train_denoiser.py` trains by it. What is built here fits `LatentDiffusionPipeline`: the null class
of classifier-free guidance is the last row of the label embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    model_validator,
)
from torch import nn

from latent_ae.errors import UserError

__all__ = [
    "PANELS",
    "TRAIN_TIMESTEPS",
    "DenoiserConfig",
    "build_denoiser",
    "build_scheduler",
    "require_fit",
]

TRAIN_TIMESTEPS = 1000


def _integers(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


# The first key of each group, under which the script's help shows it and those after it.
PANELS = {
    "denoiser": "Network",
    "objective": "Objective",
    "steps": "Training",
    "workers": "Machine and log",
    "sample_every": "Sheets and distance",
}


class DenoiserConfig(BaseModel):
    """What to train, on what objective, for how long; each key is also an option of the script."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

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
    logit_mean: float = 0.0
    """logit_normal: mean of the noise level's logit; above 0 there is more noise."""
    logit_std: PositiveFloat = 1.0
    """logit_normal: its standard deviation."""
    shift: PositiveFloat = 1.0
    """flow: σ becomes s·σ / (1 + (s − 1)·σ), in training and in the saved scheduler (SD3: 3)."""
    weighting: Literal["none", "min_snr", "cosmap", "sigma_sqrt"] = "none"
    """Loss weights; ddpm: `min_snr` (Hang et al. 2023); flow: `cosmap`, `sigma_sqrt` (SD3)."""
    snr_gamma: PositiveFloat = 5.0
    """min_snr: the signal-to-noise ratio above which weights rise no more."""
    labels: bool = True
    """Condition on the latents' labels, where there are any."""
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    """How often a label gives way to the null class, for classifier-free guidance."""
    steps: PositiveInt = 100_000
    """Optimizer updates in all."""
    seconds: PositiveFloat | None = None
    """Train at most this long (start and saving not counted), the learning rate falling in time."""
    batch_size: PositiveInt = 64
    """Latents that a process takes at once."""
    accumulation: PositiveInt = 1
    """Such batches a process and step: the gradient is their mean."""
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
    seed: NonNegativeInt = 0
    """Of initialisation, order and noise."""
    log_every: PositiveInt = 50
    """Steps between rows of log.jsonl."""
    checkpoint_every: PositiveInt = 2000
    """Steps between checkpoints; the last step always leaves one."""
    sample_every: NonNegativeInt = 5000
    """Steps between sheets of pictures that the averaged weights draw, and one last; 0 for none."""
    sampling_steps: PositiveInt = 50
    """Steps of the sampler for a sheet and for the distance."""
    guidance_scale: float = Field(default=1.0, ge=1)
    """Classifier-free guidance of both; 1 is none."""
    sample_batch_size: PositiveInt = 16
    """Pictures drawn at once; changes nothing but memory and time."""
    distance_every: NonNegativeInt = 0
    """Steps between Fréchet distances to the pictures of the latents, and one last; 0 for none."""
    distance_samples: int = Field(default=10_000, ge=2)
    """Pictures drawn for a distance, and at most as many to compare with."""
    distance_features: Literal["alexnet", "vgg16", "inception"] = "alexnet"
    """Whose features: `alexnet` comes with latent_ae, the others are fetched once."""
    distance_weights: str | None = None
    """A file of that network's weights, where it cannot be fetched."""

    @model_validator(mode="after")
    def _only_what_is_used(self) -> DenoiserConfig:
        """Refuses what another option leaves without effect, and what cannot work together."""
        valid = {"flow": ("none", "cosmap", "sigma_sqrt"), "ddpm": ("none", "min_snr")}
        if self.weighting not in valid[self.objective]:
            raise ValueError(
                f"weighting {self.weighting} is not for objective {self.objective}, which takes "
                f"{', '.join(valid[self.objective])}"
            )
        fields = type(self).model_fields
        for names, choice, is_made in _ONLY_FOR:
            for name in names.split():
                if getattr(self, name) != fields[name].default and not is_made(self):
                    raise ValueError(f"{name} is for {choice}; elsewhere it would change nothing")
        levels = len(self.channels)
        if self.attention > max(levels, fields["attention"].default):
            raise ValueError(f"attention {self.attention} is more than the {levels} channels")
        if self.guidance_scale > 1 and self.labels and not self.label_dropout:
            raise ValueError(
                "guidance_scale above 1 takes a label_dropout above 0, which trains the null class"
            )
        return self


# Options that only some choices use: their names, the choice in words, and whether it is made.
_ONLY_FOR: list[tuple[str, str, Callable[[DenoiserConfig], bool]]] = [
    ("channels layers attention", "denoiser unet", lambda config: config.denoiser == "unet"),
    ("width depth heads patch", "denoiser dit", lambda config: config.denoiser == "dit"),
    ("prediction", "objective ddpm", lambda config: config.objective == "ddpm"),
    ("sigmas shift", "objective flow", lambda config: config.objective == "flow"),
    (
        "logit_mean logit_std",
        "objective flow with sigmas logit_normal",
        lambda config: (config.objective, config.sigmas) == ("flow", "logit_normal"),
    ),
    ("snr_gamma", "weighting min_snr", lambda config: config.weighting == "min_snr"),
    ("label_dropout", "training with labels", lambda config: config.labels),
    (
        "sampling_steps guidance_scale sample_batch_size",
        "sheets (sample_every) and distances (distance_every)",
        lambda config: bool(config.sample_every or config.distance_every),
    ),
    (
        "distance_samples distance_features distance_weights",
        "distances (distance_every)",
        lambda config: config.distance_every > 0,
    ),
]


def require_fit(config: DenoiserConfig, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises `UserError` unless the denoiser can take latents of all these shapes (c, h, w)."""
    if config.denoiser == "dit" and len(shapes) > 1:
        raise UserError(f"a DiT wants latents of one size, not of {len(shapes)}: try unet")
    halvings = len(config.channels) - 1
    for *_, h, w in shapes:
        if config.denoiser == "dit" and (h != w or h % config.patch):
            raise UserError(
                f"a DiT wants square latents that `patch` divides, not {h} × {w}: try unet"
            )
        if config.denoiser == "unet" and (h % 2**halvings or w % 2**halvings):
            most = (math.gcd(h, w) & -math.gcd(h, w)).bit_length()  # its factors of 2, and one
            raise UserError(
                f"latents of {h} × {w} cannot be halved {halvings} times: give at most {most} "
                "--channels"
            )


def build_denoiser(
    config: DenoiserConfig, shape: tuple[int, int, int], classes: int
) -> UNet2DModel | DiTTransformer2DModel:
    """A fresh denoiser for latents of `shape` (c, h, w), with a null class after its `classes`.

    A U-Net takes other sizes too, if `require_fit` lets them pass.

    Raises:
        UserError: the network does not fit the latents.
    """
    require_fit(config, [shape])
    (c, h, w), channels = shape, config.channels
    if config.denoiser == "dit":
        return _build_dit(config, shape, classes)
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
    if config.width % config.heads:
        raise UserError(f"heads {config.heads} does not divide width {config.width}")
    dit = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=shape[0],
        num_layers=config.depth,
        patch_size=config.patch,
        sample_size=shape[1],
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
        return FlowMatchEulerDiscreteScheduler(TRAIN_TIMESTEPS, shift=config.shift)
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
