"""The network and its bottleneck."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Tag,
    model_validator,
)

from latent_ae.config.families import DCNetworkConfig, TinyNetworkConfig
from latent_ae.config.quantizers import (
    QUANTIZERS,
    FSQConfig,
    LFQConfig,
    VQConfig,
    VQNetworkConfig,
)
from latent_ae.config.section import Section

__all__ = [
    "AnyBottleneck",
    "AnyNetwork",
    "AutoencoderConfig",
    "BottleneckConfig",
    "FITTING",
    "NetworkConfig",
    "NoBottleneckConfig",
    "misfit",
]


class NetworkConfig(Section):
    """diffusers' `AutoencoderKL`, built anew; or any of its kinds, loaded from a folder."""

    kind: Literal["kl"] = "kl"
    """`kl`: latents with a Gaussian posterior. With `path` the folder says the kind."""
    path: str | None = None
    """A folder that diffusers can load, yours or anybody's: fine-tune it. Beside it only `freeze`.
    """
    freeze: Literal["nothing", "encoder"] = "nothing"
    """`encoder`: the decoder alone learns to read the latents of `path`, which do not move; the KL
    term is left out."""
    in_channels: PositiveInt = 3
    """Of a picture and its reconstruction: 1 grey, 3 RGB, 4 RGBA, any other number bands
    (docs/channels.md); the data is read accordingly."""
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
        others = self.model_fields_set - {"path", "freeze"}
        if self.path is not None and others:
            raise ValueError(
                "with `path` the network is that of the folder; remove "
                + ", ".join(sorted(others))
                + " (on the command line: network='{path: FOLDER}')"
            )
        if self.path is None and self.freeze != "nothing":
            raise ValueError(
                f"freeze: {self.freeze} needs `path`: a new network has learned nothing"
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
    """What stands between encoder and decoder: a Gaussian posterior."""

    kind: Literal["kl"] = "kl"
    """`kl`: a diagonal Gaussian posterior."""
    weight: NonNegativeFloat = 1e-6
    """λ before the KL term, per image element; 0 makes a plain autoencoder (code = mean)."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which λ rises linearly from 0."""


class NoBottleneckConfig(Section):
    """Nothing between encoder and decoder, for networks without a posterior."""

    kind: Literal["none"]
    """`none`: the latents go straight through."""
    # Of whatever loss terms the code has, which without a teacher are none.
    weight: ClassVar[float] = 1.0
    warmup_steps: ClassVar[int] = 0


def _kind(value: Any) -> str:
    """Which of several sections is meant; `kl` where nothing is said."""
    if isinstance(value, dict):
        return str(value.get("kind", "kl"))
    return getattr(value, "kind", "kl")


AnyNetwork = Annotated[
    Annotated[NetworkConfig, Tag("kl")]
    | Annotated[DCNetworkConfig, Tag("dc")]
    | Annotated[TinyNetworkConfig, Tag("tiny")]
    | Annotated[VQNetworkConfig, Tag("vq")],
    Discriminator(_kind),
]
AnyBottleneck = Annotated[
    Annotated[BottleneckConfig, Tag("kl")]
    | Annotated[NoBottleneckConfig, Tag("none")]
    | Annotated[VQConfig, Tag("vq")]
    | Annotated[FSQConfig, Tag("fsq")]
    | Annotated[LFQConfig, Tag("lfq")],
    Discriminator(_kind),
]


def misfit(bottleneck: str, network: str, fitting: tuple[str, ...]) -> str | None:
    """Why a kind of bottleneck cannot stand in a network, in one sentence; None where it can.

    Args:
        bottleneck: its kind.
        network: what the sentence calls the network.
        fitting: the kinds that can.
    """
    if bottleneck in fitting:
        return None
    has = {"kl": "has a posterior", "none": "has no posterior"}.get(fitting[0], "gives codes")
    return f"{network} {has}: bottleneck.kind is {' or '.join(fitting)} there, not {bottleneck!r}"


# Which bottlenecks the networks of a kind take.
FITTING = {"kl": ("kl",), "dc": ("none",), "tiny": ("none",), "vq": QUANTIZERS}


class AutoencoderConfig(Section):
    """What it takes to build the autoencoder."""

    network: AnyNetwork = NetworkConfig()
    """Which of diffusers' networks, and its shape; `kind: kl` where none is said."""
    bottleneck: AnyBottleneck = BottleneckConfig()
    """What the network's latents go through; `kind: kl` where none is said."""

    @model_validator(mode="before")
    @classmethod
    def _network_of_quantizer(cls, value: Any) -> Any:
        """A bottleneck that quantises is enough said about the kind of network."""
        if not isinstance(value, dict) or _kind(value.get("bottleneck")) not in QUANTIZERS:
            return value
        network = value.get("network", {})
        if not isinstance(network, dict) or {"kind", "path"} & network.keys():
            return value
        return value | {"network": {"kind": "vq", **network}}

    @model_validator(mode="after")
    def _fitting(self) -> AutoencoderConfig:
        kind = self.network.kind
        if self.network.path is None and (
            reason := misfit(self.bottleneck.kind, f"network.kind {kind}", FITTING[kind])
        ):
            raise ValueError(reason)
        if isinstance(self.network, VQNetworkConfig):
            assert isinstance(self.bottleneck, VQConfig | FSQConfig | LFQConfig)
            if reason := self.bottleneck.misfit_of(self.network.channels_for(self.bottleneck)):
                raise ValueError(f"bottleneck: {reason}")
            channels = self.network.channels_for(self.bottleneck)
            if self.network.init == "linear" and self.network.latent_channels not in (
                None,
                channels,
            ):
                raise ValueError(
                    f"network.init linear: {channels} channels are quantised, so latent_channels "
                    f"is {channels} too or left out"
                )
        return self
