"""EQ-VAE's regulariser: transformed latents decode to the transformed picture."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from latent_ae.config import EquivarianceConfig
from latent_ae.errors import UserError

__all__ = ["Draw", "Equivariance"]


@dataclass(frozen=True)
class Draw:
    """What happens to a batch between encoder and decoder, or before the encoder.

    Attributes:
        kind: `plain`: nothing; `transformed`: the latents are scaled and turned before they are
            decoded; `small`: the pictures are scaled before they are encoded.
        sides: height and width of the latents after the scaling, before the turn.
        turns: by 90 degrees, counter-clockwise, of latents and pictures alike.
    """

    kind: str
    sides: tuple[int, int]
    turns: int = 0

    def latents(self, latents: Tensor) -> Tensor:
        """The transformed latents, from shape (B, c, h, w).

        Interpolated bilinearly without a low-pass, as EQ-VAE does it: a low-pass would teach the
        encoder nothing about the frequencies that it takes away.
        """
        if latents.shape[-2:] != self.sides:
            latents = F.interpolate(latents, self.sides, mode="bilinear", align_corners=False)
        return latents.rot90(self.turns, (-2, -1))

    def pictures(self, images: Tensor, factor: int) -> Tensor:
        """The pictures to which the transformed latents are to decode, from shape (B, C, H, W).

        Made smaller with a low-pass (EQ-VAE: without one), as pictures of that size would be.

        Args:
            images: in [-1, 1].
            factor: between the side of a picture and that of its latents.
        """
        sides = (self.sides[0] * factor, self.sides[1] * factor)
        if images.shape[-2:] != sides:
            images = F.interpolate(
                images, sides, mode="bilinear", align_corners=False, antialias=True
            )
        return images.rot90(self.turns, (-2, -1))


class Equivariance:
    """Draws each micro-step's transform (Kouzelis et al. 2025; `train_eqvae` of zelaki/eqvae).

    A draw is a function of seed, step and micro-step alone: the same on every process, and after a
    resume. A whole batch has the same one, as its pictures must keep one size.

    Args:
        config: which transforms, how often.
        seed: of the run.
        factor: between the side of a picture and that of its latents.
        smallest: side in pixels that no picture may fall below.
    """

    def __init__(self, config: EquivarianceConfig, seed: int, factor: int, smallest: int) -> None:
        self.config, self.seed, self.factor = config, seed, factor
        self.smallest = max(1, math.ceil(smallest / factor))

    def draw(self, step: int, micro_step: int, pictures: tuple[int, int]) -> Draw:
        """The transform of a batch.

        Args:
            step: optimizer updates done.
            micro_step: of this update.
            pictures: height and width, in pixels.
        """
        config = self.config
        height, width = (side // self.factor for side in pictures)
        # Seeded by a text: Python hashes it the same way on every machine.
        rng = random.Random(f"equivariance {self.seed} {step} {micro_step}")
        chosen, small, turns = rng.random(), rng.random(), rng.randint(1, 3)
        vertical, horizontal = rng.random(), rng.random()
        if config.anisotropic:
            sides = (self._side(height, vertical), self._side(width, horizontal))
        else:
            sides = self._alike(height, width, vertical)
        if chosen < config.probability:
            return Draw("transformed", sides, turns if config.rotate else 0)
        if config.scales is not None and small < config.low_resolution:
            return Draw("small", sides)
        return Draw("plain", (height, width))

    def require_room(self, resolution: int, remedy: str = "raise data.resolution") -> None:
        """Raises `UserError` where no scale leaves pictures of this side large enough."""
        low, high = self._range(resolution // self.factor)
        if self.config.scales is not None and low > high:
            raise UserError(
                f"pictures with a side of {resolution} are too small for "
                f"losses.equivariance.scales: no scale in {list(self.config.scales)} leaves a "
                f"whole number of latents and the {self.smallest * self.factor} pixels that the "
                f"losses need; {remedy}, or set losses.equivariance.scales to null"
            )

    def _range(self, side: int) -> tuple[int, int]:
        """The fewest and the most latents that a scaled side may have."""
        if self.config.scales is None:
            return side, side
        low, high = self.config.scales
        return max(math.ceil(low * side), self.smallest), math.floor(high * side)

    def _alike(self, height: int, width: int, uniform: float) -> tuple[int, int]:
        """Both sides by the scale drawn for the shorter one, to the nearest whole latent."""
        short, long = sorted((height, width))
        drawn = self._side(short, uniform)
        other = min(long, round(long * drawn / short))
        return (drawn, other) if height <= width else (other, drawn)

    def _side(self, side: int, uniform: float) -> int:
        low, high = self._range(side)
        return low + int(uniform * (high - low + 1))
