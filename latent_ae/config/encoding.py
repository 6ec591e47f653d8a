"""What happens to a picture before the encoder sees it, and how its code is stored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from latent_ae.config.buckets import bucket_sizes
from latent_ae.config.data import SourceConfig
from latent_ae.config.section import Section

__all__ = ["EncodingSource", "Preprocessing", "Storage"]


class EncodingSource(SourceConfig):
    """A source whose labels, captions and other columns go along with the latents."""

    key_column: str | None = None
    """The column of each picture's name; left out: its path, webdataset's `__key__`, its row."""
    label_column: str | None = None
    """The column of its class, numbers or words; left out: `label` or webdataset's `cls`."""
    caption_column: str | None = None
    """The column of its text; left out: `caption`, `text` or webdataset's `txt`."""
    keep: tuple[str, ...] = ()
    """Other columns to carry into the index."""
    limit: PositiveInt | None = None
    """Only the first rows, after the filter."""


class Preprocessing(Section):
    """From a decoded picture to what the encoder sees; all of it is kept in the manifest."""

    resolution: PositiveInt = 256
    """Side of the square in pixels; with buckets, the side of a square of a bucket's area."""
    resize: PositiveInt | None = None
    """Shorter side after the resize, where it shall be more than the crop's: leaves room to crop
    in both directions. With buckets, the same ratio to `resolution`."""
    resample: Literal["lanczos", "bicubic", "adm"] = "lanczos"
    """`adm`: halved by averages while twice too large, then bicubic, as guided-diffusion's sets."""
    crops: PositiveInt = 1
    """One crop is the centre; several lie at random places, the same in every run."""
    flip: bool = False
    """Store each crop's mirror image too."""
    buckets: bool = False
    """Keep about the aspect of each picture: crop to the nearest of `bucket_sizes`."""
    bucket_step: PositiveInt | None = None
    """Sides of buckets are multiples of this; left out, a sixteenth of the resolution (64 at 1024,
    as SDXL) or the encoder's factor, whichever is larger."""
    max_aspect: float = Field(default=2.0, ge=1.0)
    """No bucket is longer than this in either direction."""
    min_side: NonNegativeInt = 0
    """Pictures with a shorter side than this, in pixels, are skipped; smaller ones are enlarged."""
    seed: NonNegativeInt = 0
    """Of the random crops."""

    @model_validator(mode="after")
    def _fits(self) -> Preprocessing:
        if self.resize is not None and self.resize < self.resolution:
            raise ValueError(f"resize {self.resize} is below resolution {self.resolution}")
        if not self.buckets and self.bucket_step is not None:
            raise ValueError("bucket_step needs buckets")
        if self.buckets and self.bucket_step and self.bucket_step > self.resolution:
            raise ValueError(f"bucket_step {self.bucket_step} is above {self.resolution}")
        return self

    @property
    def variants(self) -> int:
        """How many codes a picture yields."""
        return self.crops * (2 if self.flip else 1)

    def for_factor(self, factor: int) -> Preprocessing:
        """The same with every side fixed, for an autoencoder of this downsampling factor.

        Raises:
            ValueError: the factor does not divide a side.
        """
        if not self.buckets:
            if self.resolution % factor:
                raise ValueError(
                    f"resolution {self.resolution} is no multiple of the network's factor {factor}"
                )
            return self
        sixteenth = -(-self.resolution // 16)
        step = self.bucket_step or -(-sixteenth // factor) * factor
        if step % factor:
            raise ValueError(f"bucket_step {step} is no multiple of the network's factor {factor}")
        if step > self.resolution:
            raise ValueError(f"resolution {self.resolution} is below the bucket_step {step}")
        return self.model_copy(update={"bucket_step": step})

    def sizes(self) -> list[tuple[int, int]]:
        """The (height, width) that a crop can have, in pixels; needs `for_factor` with buckets."""
        if not self.buckets:
            return [(self.resolution, self.resolution)]
        return bucket_sizes(self.resolution, self.bucket_step or self.resolution, self.max_aspect)


class Storage(Section):
    """What of a code is stored, and how."""

    kind: Literal["moments", "mode", "indices"] = "moments"
    """`moments`: mean and log-variance of the posterior; `mode`: the mean, or the latents of an
    autoencoder without a posterior; `indices`: the numbers of its codes."""
    dtype: Literal["float16", "bfloat16", "float32", "uint8", "uint16", "int32"] = "float16"
    """Of the stored values; integers for indices."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the encoder's weights and activations."""
    shard_rows: PositiveInt = 4096
    """Rows of the source a shard: so it depends on nobody's speed who writes which."""
