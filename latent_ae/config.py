"""The keys of a run's YAML file, their defaults and what they mean."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

__all__ = [
    "AutoencoderConfig",
    "BottleneckConfig",
    "Config",
    "DataConfig",
    "LossesConfig",
    "NetworkConfig",
    "PerceptualConfig",
    "SourceConfig",
    "TrainingConfig",
    "Section",
    "ValidationConfig",
]


Beta = Annotated[float, Field(ge=0, lt=1)]
# Below this LPIPS' pooling and the window of SSIM no longer fit.
SMALLEST_MEASURED = 32


class Section(BaseModel):
    """A block of keys: unknown ones are refused, values are frozen once read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class SourceConfig(Section):
    """Where pictures come from; everything is read through the `datasets` library."""

    source: Literal["imagefolder", "saved", "parquet", "webdataset", "hub"] = "imagefolder"
    """`imagefolder`: pictures below a folder; `saved`: a folder written by `save_to_disk`;
    `parquet`: a file, a folder or a glob; `webdataset`: tars, a folder or a glob; `hub`: a name on
    the hub."""
    path: str
    """The folder, file, glob or hub name."""
    split: str = "train"
    """Which split of a `saved` or `hub` data set."""
    image_column: str | None = None
    """The column that holds the picture; found by its type when left out."""
    streaming: bool = False
    """Read in order as it comes, without random access: for data that is too large to index."""


class DataConfig(SourceConfig):
    """The training pictures and how a batch is cut from them."""

    resolution: PositiveInt = 256
    """Side of the training crop, in pixels."""
    resize: PositiveInt | None = None
    """Resize the shorter side to this before the crop (Lanczos); left out, `random` crops the
    picture at its own size and `center` resizes to `resolution`."""
    crop: Literal["random", "center", "random_resized"] = "random"
    """`random_resized` takes a square of `crop_area` of the picture and resizes it."""
    crop_area: tuple[PositiveFloat, PositiveFloat] = (0.25, 1.0)
    """Smallest and largest area of a `random_resized` crop, as a share of the largest square."""
    flip: bool = True
    """Mirror every second picture, left to right."""
    batch_size: PositiveInt = 16
    """Pictures a process and micro-step."""
    workers: NonNegativeInt = 4
    """Loader processes beside each training process."""
    shuffle_buffer: PositiveInt = 1000
    """Pictures held for shuffling when streaming."""

    @model_validator(mode="after")
    def _large_enough(self) -> DataConfig:
        if self.resize is not None and self.resize < self.resolution:
            raise ValueError(f"resize {self.resize} is below resolution {self.resolution}")
        return self

    @field_validator("crop_area")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] <= value[1] <= 1:
            raise ValueError("the two shares must satisfy smallest <= largest <= 1")
        return value


class NetworkConfig(Section):
    """diffusers' `AutoencoderKL`, built anew or loaded from a folder."""

    path: str | None = None
    """A folder that diffusers can load (yours or anybody's): fine-tune it. No other key then."""
    in_channels: Literal[3] = 3
    """RGB."""
    block_out_channels: tuple[PositiveInt, ...] = Field(default=(128, 256, 512, 512), min_length=1)
    """Channels of each level; each level after the first halves the side."""
    layers_per_block: PositiveInt = 2
    """Residual blocks a level in the encoder (the decoder has one more)."""
    latent_channels: PositiveInt = 4
    """Channels c of the latents."""
    norm_num_groups: PositiveInt = 32
    """Groups of every GroupNorm; divides each of `block_out_channels`."""
    mid_block_add_attention: bool = True
    """Self-attention at the smallest size."""
    use_quant_conv: bool = True
    """The 1 × 1 convolutions on either side of the latents, as in SD 1.x and SDXL."""
    init: Literal["default", "zero_residual", "linear"] = "default"
    """`zero_residual`: every residual block starts as the identity; `linear`: the whole network
    starts as the best linear code of the training crops (needs `mid_block_add_attention: false`
    and few `norm_num_groups`)."""

    @model_validator(mode="after")
    def _consistent(self) -> NetworkConfig:
        others = self.model_fields_set - {"path"}
        if self.path is not None and others:
            raise ValueError(
                f"with `path` the network is that of the folder; remove {', '.join(sorted(others))}"
            )
        for channels in self.block_out_channels:
            if self.path is None and channels % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} does not divide "
                    f"{channels} of block_out_channels"
                )
        return self

    @property
    def downsampling(self) -> int:
        """The factor f between the side of an image and that of its latents (new networks)."""
        return 2 ** (len(self.block_out_channels) - 1)


class BottleneckConfig(Section):
    """What stands between encoder and decoder."""

    kind: Literal["kl"] = "kl"
    """`kl`: a diagonal Gaussian posterior."""
    weight: NonNegativeFloat = 1e-6
    """λ before the KL term, per image element; 0 makes a plain autoencoder (code = mean)."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which λ rises linearly from 0."""


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


class TrainingConfig(Section):
    """How long, how fast, how precise."""

    steps: PositiveInt = 100_000
    """Optimizer updates in all."""
    learning_rate: PositiveFloat = 1e-4
    """The peak; never scaled behind your back."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Adam's."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's, decoupled."""
    warmup_steps: NonNegativeInt = 0
    """Linear warm-up of the learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """From the peak: stay, or fall to zero at the last step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of autocast; weights, optimizer and EMA stay fp32."""
    accumulation: PositiveInt = 1
    """Micro-steps an update."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest gradient norm (after unscaling); 0 for none."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the averaged weights that are validated and exported; 0 for none."""
    channels_last: bool = True
    """Memory layout of the network: faster convolutions, same numbers within rounding."""
    seed: int = 0
    """Of initialisation, order, crops and posterior noise."""
    log_every: PositiveInt = 20
    """Steps between rows of log.jsonl and TensorBoard."""
    validate_every: PositiveInt = 2000
    """Steps between validations; the last step is always validated."""
    checkpoint_every: PositiveInt = 1000
    """Steps between checkpoints; the last step always leaves one."""
    keep_checkpoints: PositiveInt = 2
    """How many of them stay."""


class ValidationConfig(SourceConfig):
    """Held-out pictures: shorter side resized by Lanczos, centre crop, posterior mode."""

    split: str = "validation"
    """Which split of a `saved` or `hub` data set."""
    resolution: PositiveInt | None = Field(default=None, ge=SMALLEST_MEASURED)
    """Left out: the training resolution."""
    images: PositiveInt = 64
    """At most this many."""
    batch_size: PositiveInt = 8
    """Pictures a pass."""


class AutoencoderConfig(Section):
    """What it takes to build the autoencoder."""

    network: NetworkConfig = NetworkConfig()
    bottleneck: BottleneckConfig = BottleneckConfig()


class Config(AutoencoderConfig):
    """One training run."""

    data: DataConfig
    losses: LossesConfig = LossesConfig()
    training: TrainingConfig = TrainingConfig()
    validation: ValidationConfig | None = None
    output: str
    """The run's folder: checkpoints, logs, pictures."""

    @model_validator(mode="after")
    def _divisible(self) -> Config:
        sizes = {"data.resolution": self.data.resolution}
        if self.validation and self.validation.resolution:
            sizes["validation.resolution"] = self.validation.resolution
        for key, size in sizes.items():
            if self.network.path is None and size % self.network.downsampling:
                raise ValueError(
                    f"{key} {size} is no multiple of the network's factor "
                    f"{self.network.downsampling}"
                )
        measured = self.losses.perceptual or (self.validation and not self.validation.resolution)
        if measured and self.data.resolution < SMALLEST_MEASURED:
            raise ValueError(
                f"data.resolution {self.data.resolution} is too small for LPIPS and SSIM; they "
                f"need {SMALLEST_MEASURED}"
            )
        return self
