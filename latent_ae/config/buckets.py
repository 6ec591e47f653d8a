"""Sizes of pictures that keep about the aspect of the originals, by a budget of pixels."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

from pydantic import Field, PositiveInt

from latent_ae.config.section import Section

__all__ = ["Bucket", "BucketsConfig", "bucket_sizes", "largest_cut"]


class Bucket(NamedTuple):
    """Pictures of one shape: `batch_size` of them a batch, of `height` × `width` pixels.

    `resolution` is the side of the square whose area is the shape's budget.
    """

    resolution: int
    height: int
    width: int
    batch_size: int

    @property
    def pixels(self) -> int:
        """Of a batch."""
        return self.batch_size * self.height * self.width


class BucketsConfig(Section):
    """Batches of one shape each, near the aspect of their pictures."""

    multiple: PositiveInt = 32
    """Both sides of every shape are multiples of this, and this of the network's factor."""
    max_aspect: float = Field(default=2.0, ge=1.0)
    """No shape is longer than this in either direction; longer pictures lose their ends."""
    resolutions: tuple[PositiveInt, ...] = ()
    """A picture is taken at these in turn, one an epoch; one that stands twice counts twice. Each
    is the side of the square that has as many pixels as its shapes may have. Left out: the data's
    `resolution` alone."""


def bucket_sizes(resolution: int, step: int, max_aspect: float) -> list[tuple[int, int]]:
    """The (height, width) with sides that `step` divides and at most `resolution`² pixels.

    For every width the largest height that keeps within, and the same turned (NovelAI 2022,
    "Aspect ratio bucketing").

    Args:
        resolution: side of a square with the largest area, in pixels; at least `step`.
        step: divides every side.
        max_aspect: of the longer to the shorter side, at most.
    """
    area = resolution**2
    found = set()
    for short in range(step, resolution + 1, step):
        long = area // short // step * step
        if short <= long <= max_aspect * short:
            found |= {(short, long), (long, short)}
    side = math.isqrt(area) // step * step
    return sorted(found | {(side, side)})


def largest_cut(sizes: list[tuple[int, int]], max_aspect: float) -> float:
    """The largest share of a picture that the nearest of `sizes` cuts away.

    Of pictures no longer than `max_aspect`: the worst lies half-way between two neighbours, in
    ratio, or at the end.

    Args:
        sizes: (height, width) each.
        max_aspect: of the pictures.
    """
    aspects = sorted(width / height for height, width in sizes)
    between = [math.sqrt(a / b) for a, b in pairwise(aspects)]
    kept = min([*between, aspects[-1] / max_aspect, 1 / (aspects[0] * max_aspect)])
    return 1 - min(kept, 1.0)
