"""What every bottleneck can be asked."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Bottleneck"]


class Bottleneck(nn.Module):
    """Maps what `network.encode` yields to a `Code`.

    Its buffers are the same on every process; a checkpoint keeps them.
    """

    def start(self, latents: Tensor, seed: int) -> None:
        """Looks at latents of the untrained encoder before the first step.

        Args:
            latents: of shape (B, c, h, w), the same on every process.
            seed: of what is drawn.
        """

    def starts_on(self) -> int:
        """How many positions of latents `start` wants to see; 0: it does nothing."""
        return 0

    def after_update(self, skipped: Tensor, step: int) -> dict[str, Tensor]:
        """Moves what the optimizer does not move, once an update; a collective.

        Nothing is read back from the device.

        Args:
            skipped: a scalar of bool: the gradients were not finite, and the update was left out.
            step: the update's number, from 0.

        Returns:
            Scalars for the log.
        """
        return {}

    def correct_averages(self, averaged: dict[str, Tensor]) -> None:
        """Corrects averages of the network's weights where `after_update` has made them worthless.

        Args:
            averaged: by the network's names; changed in place.
        """
