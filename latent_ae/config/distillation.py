"""Learning another autoencoder's latents instead of one's own."""

from __future__ import annotations

from typing import Literal

from latent_ae.config.section import Section

__all__ = ["DistillationConfig"]


class DistillationConfig(Section):
    """A teacher whose final latents the network shall write and read."""

    teacher: str
    """The teacher's folder: an `AutoencoderKL`, `AutoencoderDC` or `AutoencoderTiny`."""
    target: Literal["teacher", "picture"] = "teacher"
    """What the decoder shall make of the teacher's latents: the `teacher`'s reconstruction, or the
    `picture` itself, which saves the teacher's decoder."""
