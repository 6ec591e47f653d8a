"""Networks beside `AutoencoderKL`, in the keys of diffusers' own configs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from latent_ae.config.section import Section

__all__ = ["DCNetworkConfig", "NewNetwork", "TinyNetworkConfig"]

DCBlock = Literal["ResBlock", "EfficientViTBlock"]
_DC_WIDTHS = (128, 256, 512, 512, 1024, 1024)
_DC_BLOCKS: tuple[DCBlock, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_DC_SCALES = ((), (), (), (5,), (5,), (5,))


class NewNetwork(Section):
    """A network without a posterior that is built anew; a folder's comes by `path` alone."""

    path: ClassVar[None] = None
    freeze: ClassVar[str] = "nothing"

    @model_validator(mode="before")
    @classmethod
    def _no_path(cls, value: Any) -> Any:
        if (
            isinstance(value, dict)
            and (others := sorted(value.keys() - {"path"}))
            and (value.get("path") is not None)
        ):
            raise ValueError(
                f"with `path` the network is that of the folder; remove {', '.join(others)} (on "
                "the command line: network='{path: FOLDER}')"
            )
        return value


class DCNetworkConfig(NewNetwork):
    """diffusers' `AutoencoderDC` (Chen et al. 2024, arXiv:2410.10733), built anew."""

    init: ClassVar[str] = "default"
    kind: Literal["dc"]
    """`dc`: deep compression, latents without a posterior."""
    in_channels: PositiveInt = 3
    """Of a picture and its reconstruction (docs/channels.md)."""
    latent_channels: PositiveInt = 32
    """Channels c of the latents; divides the last `block_out_channels` of both sides."""
    attention_head_dim: PositiveInt = 32
    """Channels a head; divides the channels of every level of EfficientViTBlocks."""
    encoder_block_out_channels: tuple[PositiveInt, ...] = Field(default=_DC_WIDTHS, min_length=2)
    """Channels of each level; each level after the first halves the side."""
    decoder_block_out_channels: tuple[PositiveInt, ...] = Field(default=_DC_WIDTHS, min_length=2)
    """The same of the decoder, from the picture inwards."""
    encoder_block_types: tuple[DCBlock, ...] = _DC_BLOCKS
    """`EfficientViTBlock` has linear attention; one for each level."""
    decoder_block_types: tuple[DCBlock, ...] = _DC_BLOCKS
    """The same of the decoder."""
    encoder_layers_per_block: tuple[NonNegativeInt, ...] = (2, 2, 2, 3, 3, 3)
    """Blocks of each level; 0 is for the first level only: nothing is computed at full size."""
    decoder_layers_per_block: tuple[NonNegativeInt, ...] = (3, 3, 3, 3, 3, 3)
    """The same of the decoder."""
    encoder_qkv_multiscales: tuple[tuple[PositiveInt, ...], ...] = _DC_SCALES
    """Kernels over which each level's attention gathers its keys and values, beside single
    latents."""
    decoder_qkv_multiscales: tuple[tuple[PositiveInt, ...], ...] = _DC_SCALES
    """The same of the decoder."""
    downsample_block_type: Literal["pixel_unshuffle", "Conv"] = "pixel_unshuffle"
    """How a level halves the side; `Conv` has a stride of 2."""
    upsample_block_type: Literal["pixel_shuffle", "interpolate"] = "pixel_shuffle"
    """How a level doubles it."""

    @model_validator(mode="after")
    def _consistent(self) -> DCNetworkConfig:
        levels = len(self.encoder_block_out_channels)
        for side in ("encoder", "decoder"):
            for key in ("block_out_channels", "block_types", "layers_per_block", "qkv_multiscales"):
                _require_levels(f"{side}_{key}", getattr(self, f"{side}_{key}"), levels)
            self._require_shapes(side)
        return self

    def _require_shapes(self, side: str) -> None:
        widths: tuple[int, ...] = getattr(self, f"{side}_block_out_channels")
        layers: tuple[int, ...] = getattr(self, f"{side}_layers_per_block")
        types: tuple[str, ...] = getattr(self, f"{side}_block_types")
        if 0 in layers[1:]:
            raise ValueError(f"{side}_layers_per_block: only the first level may have 0 blocks")
        if widths[-1] % self.latent_channels:
            raise ValueError(
                f"latent_channels {self.latent_channels} does not divide {widths[-1]}, the last of "
                f"{side}_block_out_channels"
            )
        used = widths if layers[0] else widths[1:]
        for finer, coarser in pairwise(used):
            if 4 * finer % coarser or coarser % 4:
                raise ValueError(
                    f"{side}_block_out_channels: {coarser} after {finer}: it must be a multiple of "
                    f"4 that divides 4 × {finer}, as levels are joined by shortcuts"
                )
        for width, kind in zip(widths, types, strict=True):
            if kind == "EfficientViTBlock" and width % self.attention_head_dim:
                raise ValueError(
                    f"attention_head_dim {self.attention_head_dim} does not divide {width} of "
                    f"{side}_block_out_channels"
                )

    @property
    def downsampling(self) -> int:
        """The factor f between the side of an image and that of its latents."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)


class TinyNetworkConfig(NewNetwork):
    """diffusers' `AutoencoderTiny` (TAESD's architecture), built anew."""

    init: ClassVar[str] = "default"
    kind: Literal["tiny"]
    """`tiny`: plain convolutions, latents without a posterior; for previews."""
    in_channels: PositiveInt = 3
    """Of a picture and its reconstruction (docs/channels.md)."""
    latent_channels: PositiveInt = 4
    """Channels c of the latents."""
    encoder_block_out_channels: tuple[PositiveInt, ...] = Field(default=(64,) * 4, min_length=1)
    """Channels of each level, all the same; each level after the first halves the side."""
    decoder_block_out_channels: tuple[PositiveInt, ...] = Field(default=(64,) * 4, min_length=1)
    """The same of the decoder, from the latents outwards."""
    num_encoder_blocks: tuple[NonNegativeInt, ...] = (1, 3, 3, 3)
    """Residual blocks of each level of the encoder."""
    num_decoder_blocks: tuple[NonNegativeInt, ...] = (3, 3, 3, 1)
    """Residual blocks of each level of the decoder, from the latents outwards."""
    latent_magnitude: PositiveFloat = 3.0
    """Half the range of latents that 8 bits shall hold (`AutoencoderTiny.scale_latents`)."""
    latent_shift: float = 0.5
    """What latent 0 becomes there, as a share of the range."""

    @model_validator(mode="after")
    def _consistent(self) -> TinyNetworkConfig:
        levels = len(self.encoder_block_out_channels)
        for key in ("decoder_block_out_channels", "num_encoder_blocks", "num_decoder_blocks"):
            _require_levels(key, getattr(self, key), levels)
        for key in ("encoder_block_out_channels", "decoder_block_out_channels"):
            widths: tuple[int, ...] = getattr(self, key)
            if len(set(widths)) > 1:
                raise ValueError(
                    f"{key} {list(widths)}: diffusers' AutoencoderTiny has one width throughout"
                )
        return self

    @property
    def downsampling(self) -> int:
        """The factor f between the side of an image and that of its latents."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)


def _require_levels(key: str, values: Sequence[Any], levels: int) -> None:
    if len(values) != levels:
        raise ValueError(
            f"{key} has {len(values)} entries, encoder_block_out_channels {levels}: give one for "
            "each level"
        )
