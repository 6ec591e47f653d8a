"""Pictures of any number of bands, for which Pillow has no mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["Bands"]


class Bands:
    """Bands of one size, cut, resized and mirrored together.

    It answers to those calls of Pillow's `Image` that crops make, so that they need not tell the
    two apart.

    Args:
        bands: one or more 8-bit grey pictures (mode `L`), all of one size.
    """

    def __init__(self, bands: Sequence[Image.Image]) -> None:
        self.bands = list(bands)

    @classmethod
    def of(cls, pixels: np.ndarray) -> Bands:
        """The bands of a uint8 array of shape (H, W, N)."""
        return cls(
            [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(pixels, -1, 0)]
        )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels."""
        return self.bands[0].size

    @property
    def width(self) -> int:
        """In pixels."""
        return self.size[0]

    @property
    def height(self) -> int:
        """In pixels."""
        return self.size[1]

    def resize(
        self,
        size: tuple[int, int],
        resample: Image.Resampling = Image.Resampling.LANCZOS,
        box: tuple[float, float, float, float] | None = None,
    ) -> Bands:
        """Each band resized by itself; arguments as Pillow's."""
        return self._each(lambda band: band.resize(size, resample, box))

    def crop(self, box: tuple[int, int, int, int]) -> Bands:
        """The part between left, top, right and bottom."""
        return self._each(lambda band: band.crop(box))

    def transpose(self, method: Image.Transpose) -> Bands:
        """Turned or mirrored."""
        return self._each(lambda band: band.transpose(method))

    def save(self, path: Path) -> None:
        """Writes a TIFF of a page a band, deflated, which `decode_image` reads back."""
        first, *others = self.bands
        first.save(
            path, "TIFF", save_all=True, append_images=others, compression="tiff_adobe_deflate"
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The pixels, uint8 of shape (H, W, N)."""
        return np.stack([np.asarray(band) for band in self.bands], axis=-1).astype(
            dtype or np.uint8
        )

    def _each(self, change: Callable[[Image.Image], Image.Image]) -> Bands:
        return Bands([change(band) for band in self.bands])
