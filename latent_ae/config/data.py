"""Where pictures come from and how they are cut."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from latent_ae.config.buckets import Bucket, BucketsConfig, bucket_sizes
from latent_ae.config.section import Section

__all__ = ["SMALLEST_MEASURED", "DataConfig", "SourceConfig", "ValidationConfig"]

# Below this LPIPS' pooling and the window of SSIM no longer fit.
SMALLEST_MEASURED = 32


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
    filter: str | None = None
    """Only the rows for which this expression over their columns holds, such as
    `score > 5 and label != 3`."""
    streaming: bool = False
    """Read in order as it comes, without random access: for data that is too large to index."""


class DataConfig(SourceConfig):
    """The training pictures and how a batch is cut from them."""

    resolution: PositiveInt = 256
    """Side of the training crop, in pixels; with buckets, of a square of a crop's area."""
    resize: PositiveInt | None = None
    """Resize the shorter side to this before the crop (Lanczos); left out, `random` crops the
    picture at its own size and `center` resizes to `resolution`. With buckets, the same ratio to
    the size that covers the crop, which is taken when left out."""
    crop: Literal["random", "center", "random_resized"] = "random"
    """`random_resized` takes a square of `crop_area` of the picture and resizes it."""
    crop_area: tuple[PositiveFloat, PositiveFloat] = (0.25, 1.0)
    """Smallest and largest area of a `random_resized` crop, as a share of the largest square."""
    flip: bool = True
    """Mirror every second picture, left to right."""
    batch_size: PositiveInt = 16
    """Pictures a process and micro-step; with buckets, of those at `resolution`: batches at other
    resolutions have as many pixels."""
    buckets: BucketsConfig | None = None
    """Keep about the aspect of each picture, at one resolution or several; left out: squares."""
    workers: NonNegativeInt = 4
    """Loader processes beside each training process."""
    shuffle_buffer: PositiveInt = 1000
    """Pictures held for shuffling when streaming."""

    @model_validator(mode="after")
    def _large_enough(self) -> DataConfig:
        if self.resize is not None and self.resize < self.resolution:
            raise ValueError(f"resize {self.resize} is below resolution {self.resolution}")
        return self

    @model_validator(mode="after")
    def _fits_buckets(self) -> DataConfig:
        if self.buckets is None:
            return self
        if self.streaming:
            raise ValueError(
                "buckets need random access: only then have all processes batches of one shape at "
                "a time; set streaming: false or leave buckets out"
            )
        if self.crop == "random_resized":
            raise ValueError("crop random_resized cuts squares; with buckets take random or center")
        smallest = min(self.resolutions)
        if smallest < self.buckets.multiple:
            raise ValueError(
                f"resolution {smallest} is below buckets.multiple {self.buckets.multiple}"
            )
        return self

    @field_validator("crop_area")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] <= value[1] <= 1:
            raise ValueError("the two shares must satisfy smallest <= largest <= 1")
        return value

    @property
    def resolutions(self) -> tuple[int, ...]:
        """At which a picture is taken in turn, one an epoch."""
        return (self.buckets and self.buckets.resolutions) or (self.resolution,)

    @property
    def room(self) -> float:
        """How much larger than its crop a picture is made in each direction, with buckets."""
        return (self.resize or self.resolution) / self.resolution

    def shapes(self) -> list[Bucket]:
        """What a batch of one process can be; those of a resolution follow one another.

        Batches have about as many pixels as `batch_size` squares of `resolution`.
        """
        if self.buckets is None:
            return [Bucket(self.resolution, self.resolution, self.resolution, self.batch_size)]
        found = []
        for resolution in sorted(set(self.resolutions)):
            count = max(1, round(self.batch_size * (self.resolution / resolution) ** 2))
            sizes = bucket_sizes(resolution, self.buckets.multiple, self.buckets.max_aspect)
            found += [Bucket(resolution, *size, count) for size in sizes]
        return found

    def smallest_side(self) -> int:
        """Of all shapes, in pixels."""
        return min(min(bucket.height, bucket.width) for bucket in self.shapes())

    def largest_shapes(self) -> list[Bucket]:
        """Of each resolution the one whose batch has the most pixels."""
        largest: dict[int, Bucket] = {}
        for bucket in sorted(self.shapes(), key=lambda bucket: -bucket.pixels):
            largest.setdefault(bucket.resolution, bucket)
        return list(largest.values())

    def squares(self, count: int) -> DataConfig:
        """The same pictures as batches of `count` squares, as large as in the buckets."""
        update: dict[str, Any] = {"batch_size": count, "buckets": None}
        if self.buckets is not None:
            update["resize"] = self.resize or self.resolution
        return self.model_copy(update=update)


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
