"""Pictures that are worth a look: the first, the worst, small ones of many."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latent_ae.channels import shown

__all__ = ["Gallery", "Shown", "chosen", "save_webp"]

T = TypeVar("T")

THUMBNAIL = 48  # pixels
THUMBNAILS = 128


@dataclass
class Shown:
    """A picture with its reconstruction, both uint8 of shape (C, H, W)."""

    position: int
    key: str
    image: Tensor
    reconstruction: Tensor
    metrics: dict[str, float]


class Gallery:
    """Keeps the first pictures, the worst so far, and thumbnails; processes can be added up.

    Args:
        first: how many from the beginning of the data.
        worst: how many of the worst, by LPIPS where it is taken, else by PSNR.
    """

    def __init__(self, first: int, worst: int) -> None:
        self.count, self.worst_count = first, worst
        self.first: list[Shown] = []
        self.worst: list[Shown] = []
        self.thumbnails: dict[int, Tensor] = {}

    def add(self, shown: Shown) -> None:
        """Looks at a picture and keeps what is worth it."""
        self.thumbnails[shown.position] = _thumbnail(shown.image)
        self.thumbnails = chosen(self.thumbnails, THUMBNAILS)
        self.first = sorted([*self.first, shown], key=lambda s: s.position)[: self.count]
        self.worst = sorted([*self.worst, shown], key=_badness)[: self.worst_count]

    def merge(self, other: Gallery) -> None:
        """Adds what another process has kept."""
        self.thumbnails = chosen(self.thumbnails | other.thumbnails, THUMBNAILS)
        first = {s.position: s for s in [*self.first, *other.first]}
        self.first = [first[p] for p in sorted(first)][: self.count]
        worst = {s.position: s for s in [*self.worst, *other.worst]}
        self.worst = sorted(worst.values(), key=_badness)[: self.worst_count]

    def save(self, folder: Path, first: int) -> dict[str, list[dict[str, Any]]]:
        """Writes the first and the worst as lossless WebP below `folder`; returns their entries."""
        shown = self.first[:first]
        return {
            "shown": [_save(folder, f"shown-{i:03d}", s) for i, s in enumerate(shown)],
            "worst": [_save(folder, f"worst-{i:03d}", s) for i, s in enumerate(self.worst)],
        }


def chosen(found: dict[int, T], most: int) -> dict[int, T]:
    """At most so many of what was found, by position, in its order.

    Which ones hangs on the positions alone, not on their order or share, and is spread over the
    data: sorted by class, its beginning would be one class. A smaller choice lies in a larger one.
    """
    if len(found) > most:
        kept = sorted(found, key=lambda position: blake2b(b"%d" % position).digest())[:most]
        found = {position: found[position] for position in kept}
    return dict(sorted(found.items()))


def _badness(shown: Shown) -> tuple[float, int]:
    metrics = shown.metrics
    value = -metrics["lpips"] if "lpips" in metrics else metrics["psnr"]
    return value, shown.position


def _thumbnail(image: Tensor) -> Tensor:
    side = min(image.shape[-2:])
    top, left = ((edge - side) // 2 for edge in image.shape[-2:])
    square = image[None, :, top : top + side, left : left + side].float()
    small = F.interpolate(square, (THUMBNAIL, THUMBNAIL), mode="bicubic", antialias=True)
    return small[0].round().clamp(0, 255).to(torch.uint8)


def _save(folder: Path, name: str, shown: Shown) -> dict[str, Any]:
    return {
        "key": shown.key,
        "input": save_webp(folder, f"{name}-input", shown.image),
        "reconstruction": save_webp(folder, f"{name}-reconstruction", shown.reconstruction),
        "metrics": shown.metrics,
    }


def save_webp(folder: Path, name: str, image: Tensor) -> str:
    """Writes uint8 of shape (C, H, W) as `shown`; returns its path below the result folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.ascontiguousarray(shown(image).permute(1, 2, 0).cpu().numpy())
    Image.fromarray(pixels).save(folder / f"{name}.webp", lossless=True, quality=60, method=4)
    return f"{folder.name}/{name}.webp"
