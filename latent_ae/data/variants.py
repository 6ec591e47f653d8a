"""The crops and mirror images of one picture that are encoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from latent_ae.config import Preprocessing
from latent_ae.data.buckets import nearest_size
from latent_ae.data.decoding import UnreadableImage
from latent_ae.data.transforms import cover, to_tensor

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

__all__ = ["Variant", "Variants"]


class Variant(NamedTuple):
    """A crop: uint8 of shape (C, H, W), and where it lay in the resized picture, in pixels."""

    image: Tensor
    left: int
    top: int
    flipped: bool


class Variants:
    """Cuts a picture as `Preprocessing` says, with sizes that `for_factor` has fixed."""

    def __init__(self, config: Preprocessing) -> None:
        self.config = config
        self._sizes = config.sizes()

    def __call__(self, picture: Image.Image, position: int) -> list[Variant]:
        """The variants in their order: each crop, then its mirror image.

        Args:
            picture: of any mode, or `Bands`.
            position: its row in the source, which seeds the random crops.

        Raises:
            UnreadableImage: it is smaller than `min_side`.
        """
        config = self.config
        if min(picture.size) < config.min_side:
            width, height = picture.size
            raise UnreadableImage(f"{width} × {height} is below {config.min_side} pixels")
        height, width = self.nearest(picture.width, picture.height)
        room = (config.resize or config.resolution) / config.resolution
        picture = cover(picture, (height, width), room, config.resample)
        found = []
        for left, top in self._places(picture, width, height, position):
            image = to_tensor(picture.crop((left, top, left + width, top + height)))
            found.append(Variant(image, left, top, False))
            if config.flip:
                found.append(Variant(image.flip(-1), left, top, True))
        return found

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """The (height, width) of the bucket whose aspect is nearest, by ratio."""
        return self._sizes[int(nearest_size(self._sizes, width, height))]

    def _places(
        self, picture: Image.Image, width: int, height: int, position: int
    ) -> list[tuple[int, int]]:
        slack = (picture.width - width, picture.height - height)
        if self.config.crops == 1:
            return [(slack[0] // 2, slack[1] // 2)]
        rng = np.random.default_rng((self.config.seed, position))
        return [
            (int(rng.integers(slack[0] + 1)), int(rng.integers(slack[1] + 1)))
            for _ in range(self.config.crops)
        ]
