"""Crops and resizes of pictures, and the way from bytes on disk to a tensor in [-1, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

    from latent_ae.config import DataConfig

__all__ = [
    "CenterCrop",
    "TrainingCrop",
    "normalize",
    "resize_shorter_side",
    "to_tensor",
    "to_uint8",
]


def resize_shorter_side(picture: Image.Image, side: int) -> Image.Image:
    """Resizes by Lanczos so that the shorter side is `side` pixels; the aspect stays."""
    if min(picture.size) == side:
        return picture
    scale = side / min(picture.size)
    width, height = (max(side, round(edge * scale)) for edge in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as uint8 of shape (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def normalize(images: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1], any shape."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] to uint8 in [0, 255], clamped and rounded: what a PNG would keep."""
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class CenterCrop:
    """Shorter side to `resolution` by Lanczos, then the centre square: the way to measure."""

    resolution: int

    def __call__(self, picture: Image.Image) -> Tensor:
        """Returns uint8 of shape (3, resolution, resolution)."""
        return to_tensor(_crop_at(resize_shorter_side(picture, self.resolution), self.resolution))


@dataclass(frozen=True)
class TrainingCrop:
    """The crop that `DataConfig` describes; everything random comes from the given generator."""

    config: DataConfig

    def __call__(self, picture: Image.Image, rng: np.random.Generator) -> Tensor:
        """Returns uint8 of shape (3, resolution, resolution)."""
        config = self.config
        if config.resize is not None:
            picture = resize_shorter_side(picture, config.resize)
        if config.crop == "random_resized":
            picture = self._random_resized(picture, rng)
        else:
            if config.crop == "center" and config.resize is None:
                picture = resize_shorter_side(picture, config.resolution)
            if min(picture.size) < config.resolution:  # too small to cut: enlarge, never pad
                picture = resize_shorter_side(picture, config.resolution)
            random = rng if config.crop == "random" else None
            picture = _crop_at(picture, config.resolution, random)
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
    picture: Image.Image, side: int, rng: np.random.Generator | None = None
) -> Image.Image:
    """A square of `side` pixels, from a random place or, without `rng`, the middle."""
    slack = [edge - side for edge in picture.size]
    left, top = (int(rng.integers(0, s + 1)) if rng else s // 2 for s in slack)
    return picture.crop((left, top, left + side, top + side))
