"""What one part of the autoencoder hands to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Code", "Reconstruction"]


@dataclass
class Code:
    """A bottleneck's answer to a batch of encodings.

    Attributes:
        latents: what the decoder receives, of shape (B, c, h, w).
        loss_terms: the bottleneck's own losses by name, each of shape (B,), summed over the latent
            elements of an image (for `kl`: nats per image). The objective turns them into units per
            image element.
        statistics: scalars worth logging, without gradient.
        penalties: losses by name, each of shape (B,), that are means over latent values or
            positions and weighed against each other: the objective adds them as they are, times
            the bottleneck's weight.
    """

    latents: Tensor
    loss_terms: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    penalties: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Reconstruction:
    """A batch of images after the autoencoder.

    Attributes:
        images: of shape (B, C, H, W), nominally in [-1, 1], not clamped.
        code: the latents they were decoded from, before any transform of them.
        target: the pictures that they are to equal; the encoded ones when None.
    """

    images: Tensor
    code: Code
    target: Tensor | None = None
