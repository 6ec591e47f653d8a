"""One picture of a data set, and a batch of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from latent_ae.data.decoding import UnreadableImage
from latent_ae.data.sources import Source

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

__all__ = ["Batch", "Sample", "Skipped", "collate", "read_sample"]


@dataclass
class Skipped:
    """A picture left out: its key and the reason."""

    key: str
    reason: str


@dataclass
class Sample:
    """One picture and what the data set says of it.

    Attributes:
        image: uint8 of shape (C, H, W).
        key: its name in the data set.
        label: its class, where there is one.
        caption: its text, where there is one.
        width: of the original, in pixels.
        height: likewise.
        position: its row in the source's order.
        skipped: what could not be read in its place.
    """

    image: Tensor
    key: str
    label: int | None
    caption: str | None
    width: int
    height: int
    position: int = 0
    skipped: list[Skipped] = field(default_factory=list)


@dataclass
class Batch:
    """Pictures of one shape; `images` is uint8 of shape (B, C, H, W), in [0, 255]."""

    images: Tensor
    samples: list[Sample]
    skipped: list[Skipped]

    def pin_memory(self) -> Batch:
        """Called by the loader's pinning thread."""
        return replace(self, images=self.images.pin_memory())


def collate(items: list[Sample | Skipped]) -> Batch:
    """Stacks what could be read and lists what could not."""
    samples = [item for item in items if isinstance(item, Sample)]
    skipped = [item for item in items if isinstance(item, Skipped)]
    skipped += [skip for sample in samples for skip in sample.skipped]
    images = torch.stack([s.image for s in samples]) if samples else torch.empty(0, 3, 0, 0)
    # The pixels travel once, in `images`; the samples keep only the words.
    words = [replace(sample, image=torch.empty(0)) for sample in samples]
    return Batch(images, words, skipped)


def read_sample(
    source: Source,
    row: dict[str, Any],
    position: int,
    transform: Callable[[Image.Image], Tensor],
) -> Sample | Skipped:
    """Decodes and transforms one row of a source; `position` names it if nothing else does."""
    key = source.key(row, position)
    try:
        picture = source.picture(row)
        image = transform(picture)
    except UnreadableImage as error:
        return Skipped(key, str(error))
    size = (picture.width, picture.height)
    return Sample(image, key, source.label(row), source.caption(row), *size, position)
