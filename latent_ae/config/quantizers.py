"""Latents that are codes: the network, and what stands between its encoder and decoder."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from latent_ae.config.families import NewNetwork
from latent_ae.config.section import Section

__all__ = [
    "QUANTIZERS",
    "FSQConfig",
    "LFQConfig",
    "VQConfig",
    "VQNetworkConfig",
]

_MOST_BITS = 31  # of a code's number, stored as int32
Levels = Annotated[int, Field(ge=3)]
Decay = Annotated[float, Field(gt=0, lt=1)]


class VQNetworkConfig(NewNetwork):
    """diffusers' `VQModel`, built anew; its quantiser is the bottleneck's."""

    kind: Literal["vq"]
    """`vq`: latents that become codes. Taken by itself where the bottleneck quantises."""
    in_channels: PositiveInt = 3
    """Of a picture and its reconstruction (docs/channels.md)."""
    block_out_channels: tuple[PositiveInt, ...] = Field(default=(128, 256, 512, 512), min_length=1)
    """Channels of each level; each level after the first halves the side."""
    layers_per_block: PositiveInt = 2
    """Residual blocks a level in the encoder (the decoder has one more)."""
    latent_channels: PositiveInt | None = None
    """Channels on the network's side of the 1 × 1 convolutions beside the quantiser; left out: as
    many as are quantised."""
    vq_embed_dim: PositiveInt | None = None
    """Channels c that are quantised; left out: the number of an fsq's levels or of an lfq's bits,
    or `latent_channels`, or 4."""
    norm_num_groups: PositiveInt = 32
    """Groups of every GroupNorm; divides each of `block_out_channels`."""
    mid_block_add_attention: bool = True
    """Self-attention at the smallest size."""
    init: Literal["default", "zero_residual", "linear"] = "default"
    """`zero_residual`: every residual block starts as the identity; `linear`: the whole network
    starts as the best linear code of the training crops, before it is quantised (needs
    `mid_block_add_attention: false`, few `norm_num_groups` and as many `latent_channels` as are
    quantised)."""

    @model_validator(mode="after")
    def _consistent(self) -> VQNetworkConfig:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} does not divide "
                    f"{channels} of block_out_channels"
                )
        return self

    def channels_for(self, bottleneck: VQConfig | FSQConfig | LFQConfig) -> int:
        """Channels c that a bottleneck quantises here."""
        return self.vq_embed_dim or bottleneck.dimensions or self.latent_channels or 4

    @property
    def downsampling(self) -> int:
        """The factor f between the side of an image and that of its codes."""
        return 2 ** (len(self.block_out_channels) - 1)


class VQConfig(Section):
    """Vector quantisation: the nearest entries of learned codebooks."""

    dimensions: ClassVar[None] = None  # any number of channels

    kind: Literal["vq"]
    """`vq`: codebooks."""
    codebook_size: PositiveInt = Field(default=1024, ge=2, le=2**_MOST_BITS)
    """Entries K of each codebook."""
    heads: PositiveInt = 1
    """Parts of the channels, each with a codebook of its own."""
    depth: PositiveInt = 1
    """Levels of residual quantisation: each further codebook quantises what is left."""
    normalized: bool = False
    """Latents and entries of length 1, in each head: the nearest by direction."""
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    """What the encoder gets through the quantiser: the decoder's gradient as it is, or turned and
    scaled as the entry is to the latent (the rotation trick)."""
    update: Literal["gradient", "ema"] = "gradient"
    """How entries follow their latents: by the optimizer, or as their moving average."""
    decay: Decay = 0.99
    """Of that average, per update."""
    commitment: NonNegativeFloat = 0.25
    """β before ‖z − sg[e]‖², which holds latents near their entries (means over latent values)."""
    kmeans: bool = True
    """Entries start where k-means finds the latents of the untrained encoder."""
    revive_after: NonNegativeInt = 100
    """An entry unused for as many updates is moved onto a latent; 0: never."""
    weight: PositiveFloat = 1.0
    """Before all terms of the bottleneck."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which it rises linearly from 0."""

    @model_validator(mode="after")
    def _consistent(self) -> VQConfig:
        if self.normalized and self.depth > 1:
            raise ValueError(
                "normalized and depth exclude each other: what is left of a latent has no length 1"
            )
        if self.update == "gradient" and "decay" in self.model_fields_set and self.decay != 0.99:
            raise ValueError("decay is that of `update: ema`")
        return self

    @property
    def codes(self) -> int:
        """How many codes a position has."""
        return self.heads * self.depth

    def misfit_of(self, channels: int) -> str | None:
        """Why these channels cannot be quantised so, or None."""
        if channels % self.heads:
            return f"heads {self.heads} do not divide the {channels} channels of the latents"
        return None

    def said(self) -> dict[str, Any]:
        """The keys of `QuantizedAutoencoder`'s config."""
        return {
            "quantizer": "vq",
            "num_vq_embeddings": self.codebook_size,
            "heads": self.heads,
            "depth": self.depth,
            "normalized": self.normalized,
        }


class FSQConfig(Section):
    """Finite scalar quantisation: each channel rounded to one of a few levels; no loss terms."""

    weight: ClassVar[float] = 1.0
    warmup_steps: ClassVar[int] = 0
    codes: ClassVar[int] = 1

    kind: Literal["fsq"]
    """`fsq`: levels."""
    levels: tuple[Levels, ...] = Field(default=(8, 5, 5, 5), min_length=1)
    """Of each channel, 3 or more (the paper advises 5; 2 are lfq's); their product is the number of
    codes."""

    @model_validator(mode="after")
    def _countable(self) -> FSQConfig:
        if self.codebook_size > 2**_MOST_BITS:
            raise ValueError(f"levels: more than 2^{_MOST_BITS} codes")
        return self

    @property
    def codebook_size(self) -> int:
        """How many different numbers a code can have."""
        return math.prod(self.levels)

    @property
    def dimensions(self) -> int:
        """Channels that are quantised."""
        return len(self.levels)

    def misfit_of(self, channels: int) -> str | None:
        """Why these channels cannot be quantised so, or None."""
        if channels != self.dimensions:
            return f"{self.dimensions} levels for {channels} channels of the latents"
        return None

    def said(self) -> dict[str, Any]:
        """The keys of `QuantizedAutoencoder`'s config."""
        return {"quantizer": "fsq", "levels": self.levels}


class LFQConfig(Section):
    """Lookup-free quantisation: the signs of the channels."""

    codes: ClassVar[int] = 1

    kind: Literal["lfq"]
    """`lfq`: signs."""
    bits: PositiveInt = Field(default=10, le=_MOST_BITS)
    """Channels that are quantised; 2 to this power is the number of codes."""
    commitment: NonNegativeFloat = 0.25
    """Before ‖z − sign z‖², which holds latents near ±1 (mean over latent values)."""
    entropy: NonNegativeFloat = 0.1
    """Before E[H(q(z))] − γ · H(E[q(z)]), in nats a position: codes that are sure of themselves,
    and all in use."""
    diversity: NonNegativeFloat = 1.0
    """γ."""
    temperature: PositiveFloat = 0.01
    """τ of q(e|z) ∝ exp(−‖z − e‖² / τ)."""
    group: PositiveInt = Field(default=18, le=22)
    """Bits whose joint distribution is counted; groups are taken for independent."""
    weight: PositiveFloat = 1.0
    """Before all terms of the bottleneck."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which it rises linearly from 0."""

    @property
    def codebook_size(self) -> int:
        """How many different numbers a code can have."""
        return 2**self.bits

    @property
    def dimensions(self) -> int:
        """Channels that are quantised."""
        return self.bits

    def misfit_of(self, channels: int) -> str | None:
        """Why these channels cannot be quantised so, or None."""
        if channels != self.bits:
            return f"{self.bits} bits for {channels} channels of the latents"
        return None

    def said(self) -> dict[str, Any]:
        """The keys of `QuantizedAutoencoder`'s config."""
        return {"quantizer": "lfq"}


QUANTIZERS = ("vq", "fsq", "lfq")
