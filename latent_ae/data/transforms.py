"""Crops and resizes of pictures, and the way from bytes on disk to a tensor in [-1, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from latent_ae.config import SMALLEST_MEASURED
from latent_ae.data.bands import Bands
from latent_ae.data.decoding import UnreadableImage

if TYPE_CHECKING:
    from torch import Tensor

    from latent_ae.config import DataConfig

__all__ = [
    "RESIZES",
    "CenterCrop",
    "TrainingCrop",
    "cover",
    "halve_while_twice",
    "normalize",
    "resize_shorter_side",
    "to_tensor",
    "to_uint8",
]


def resize_shorter_side(
    picture: Image.Image, side: int, filter: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Resizes so that the shorter side is `side` pixels; the aspect stays."""
    if min(picture.size) == side:
        return picture
    scale = side / min(picture.size)
    width, height = (max(side, round(edge * scale)) for edge in picture.size)
    return picture.resize((width, height), filter)


def _bicubic(picture: Image.Image, side: int) -> Image.Image:
    return resize_shorter_side(picture, side, Image.Resampling.BICUBIC)


def _adm(picture: Image.Image, side: int) -> Image.Image:
    """Halves by averages while twice too large, then bicubic (guided-diffusion's data sets)."""
    return _bicubic(halve_while_twice(picture, (side, side)), side)


def halve_while_twice(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Halves by averages as long as both edges are at least twice those of `size`."""
    while picture.width >= 2 * size[0] and picture.height >= 2 * size[1]:
        half = (picture.width // 2, picture.height // 2)
        picture = picture.resize(half, Image.Resampling.BOX)
    return picture


def cover(
    picture: Image.Image, size: tuple[int, int], room: float = 1.0, resample: str = "lanczos"
) -> Image.Image:
    """Resizes by one scale, so that a crop fits in and one of its sides fits tight.

    Args:
        picture: RGB.
        size: (height, width) of the crop.
        room: how much larger than tight, in both directions.
        resample: `lanczos`, `bicubic` or `adm`, which halves by averages while twice too large.
    """
    height, width = size

    def covering(edges: tuple[int, int]) -> tuple[int, int]:
        scale = max(width * room / edges[0], height * room / edges[1])
        return max(width, round(edges[0] * scale)), max(height, round(edges[1] * scale))

    if resample == "adm":
        picture = halve_while_twice(picture, covering(picture.size))
    whole = covering(picture.size)
    if whole == picture.size:
        return picture
    lanczos = resample == "lanczos"
    return picture.resize(whole, Image.Resampling.LANCZOS if lanczos else Image.Resampling.BICUBIC)


def _enlarge_only(picture: Image.Image, side: int) -> Image.Image:
    """A picture that the crop fits into stays as it is."""
    return picture if min(picture.size) >= side else resize_shorter_side(picture, side)


RESIZES: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "lanczos": resize_shorter_side,
    "bicubic": _bicubic,
    "adm": _adm,
    "none": _enlarge_only,
}


def to_tensor(picture: Image.Image | Bands) -> Tensor:
    """A picture, or `Bands`, as uint8 of shape (C, H, W)."""
    pixels = np.array(picture)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def normalize(images: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1], any shape."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] to uint8 in [0, 255], clamped and rounded: what a PNG would keep."""
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class CenterCrop:
    """Shorter side to `resolution`, then the centre square: the way to measure.

    Attributes:
        resolution: side of the square, in pixels; None leaves the picture at its own size.
        resize: by which of `RESIZES`.
        multiple: cut further, about the centre, to sides that this divides.
    """

    resolution: int | None
    resize: str = "lanczos"
    multiple: int = 1

    def __call__(self, picture: Image.Image) -> Tensor:
        """Returns uint8 of shape (C, H, W); raises `UnreadableImage` if too small to measure."""
        if self.resolution is None and min(picture.size) < SMALLEST_MEASURED:
            width, height = picture.size
            raise UnreadableImage(f"{width} × {height} is below {SMALLEST_MEASURED} pixels")
        if self.resolution is not None:
            picture = RESIZES[self.resize](picture, self.resolution)
            picture = _crop_at(picture, (self.resolution, self.resolution))
        whole = [edge - edge % self.multiple for edge in picture.size]
        if min(whole) and whole != list(picture.size):
            picture = _crop_at(picture, (whole[0], whole[1]))
        return to_tensor(picture)


@dataclass(frozen=True)
class TrainingCrop:
    """The crop that `DataConfig` describes; everything random comes from the given generator."""

    config: DataConfig

    def __call__(
        self, picture: Image.Image, rng: np.random.Generator, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Cuts a picture.

        Args:
            picture: Pillow's, or `Bands`, which answer to the same calls.
            rng: of the place and the mirroring.
            size: (height, width) of the bucket; left out, a square of `resolution`.

        Returns:
            uint8 of shape (C, height, width).
        """
        config = self.config
        random = rng if config.crop == "random" else None
        if size is None and config.resize is not None:
            picture = resize_shorter_side(picture, config.resize)
        if size is not None:
            picture = _crop_at(cover(picture, size, config.room), (size[1], size[0]), random)
        elif config.crop == "random_resized":
            picture = self._random_resized(picture, rng)
        else:
            if config.crop == "center" and config.resize is None:
                picture = resize_shorter_side(picture, config.resolution)
            if min(picture.size) < config.resolution:  # too small to cut: enlarge, never pad
                picture = resize_shorter_side(picture, config.resolution)
            picture = _crop_at(picture, (config.resolution, config.resolution), random)
        if config.flip and rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(picture)

    def _random_resized(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        side = min(picture.size) * math.sqrt(rng.uniform(*self.config.crop_area))
        side = min(max(1, round(side)), *picture.size)
        left, top = (int(rng.integers(0, edge - side + 1)) for edge in picture.size)
        box = (left, top, left + side, top + side)
        size = (self.config.resolution, self.config.resolution)
        return picture.resize(size, Image.Resampling.LANCZOS, box=box)


def _crop_at(
    picture: Image.Image, size: tuple[int, int], rng: np.random.Generator | None = None
) -> Image.Image:
    """A crop of `size` (width, height), from a random place or, without `rng`, the middle."""
    slack = [edge - side for edge, side in zip(picture.size, size, strict=True)]
    left, top = (int(rng.integers(0, s + 1)) if rng else s // 2 for s in slack)
    return picture.crop((left, top, left + size[0], top + size[1]))
