"""How codes are used."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed
from torch import Tensor, nn

__all__ = ["UsageMeter", "averaged", "entropy", "perplexity", "place", "summed", "tallied"]

_LEAST = 1e-30  # a share whose logarithm is taken


def tallied(numbers: Tensor, size: int) -> Tensor:
    """How often each number occurs, of shape (n, size), for numbers of shape (n, N) below `size`.

    Without `bincount`, for which a GPU's host would have to wait.
    """
    counts = torch.zeros(len(numbers), size, device=numbers.device)
    return counts.scatter_add_(1, numbers, torch.ones_like(numbers, dtype=counts.dtype))


def entropy(shares: Tensor) -> Tensor:
    """−Σ p log p over the last dimension, in nats; 0 log 0 is 0."""
    # Not `entr`, whose gradient at 0 is infinite and times 0 no number.
    return -(shares * shares.clamp(min=_LEAST).log()).sum(-1)


def perplexity(counts: Tensor) -> Tensor:
    """Exp of the entropy of each row of counts: as many entries, equally used, would have it."""
    return entropy(counts / counts.sum(-1, keepdim=True)).exp()


class UsageMeter(nn.Module):
    """Which codes were taken in an update and the last ones; its buffer is that of all processes.

    Args:
        codes: of a position.
        size: values of a code.
    """

    WINDOW: ClassVar[int] = 100  # updates

    unseen: Tensor

    def __init__(self, codes: int, size: int) -> None:
        super().__init__()
        # Updates since a code was last taken; at first none has been.
        self.register_buffer("unseen", torch.full((codes, size), self.WINDOW, dtype=torch.int32))
        # What this process has counted since the last update: no buffer, DDP would overwrite it.
        self._counts: Tensor | None = None

    def count(self, numbers: Tensor) -> Tensor:
        """How often each code was taken, of shape (codes, size); in training it is added up.

        Args:
            numbers: of shape (codes, N).
        """
        counts = tallied(numbers, self.unseen.shape[1])
        if self.training:
            self._counts = counts if self._counts is None else self._counts + counts
        return counts

    def after_update(self, skipped: Tensor, step: int) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Takes note of an update; a collective.

        Args:
            skipped: a scalar of bool: the update does not count.
            step: its number, from 0.

        Returns:
            The counts of all processes since the last update, None where nothing was counted; and
            `code_usage`, the share of the codes that were taken in the window, once it is full.
        """
        if self._counts is None:
            return None, {}
        counts, self._counts = summed(self._counts), None
        unseen = torch.where(counts > 0, 0, self.unseen + 1)
        self.unseen.copy_(torch.where(skipped, self.unseen, unseen))
        if step + 1 < self.WINDOW:
            return counts, {}
        return counts, {"code_usage": (self.unseen < self.WINDOW).float().mean()}


def place() -> tuple[int, int]:
    """This process's number, and how many train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, the same on each; a collective."""
    if place()[1] > 1:
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def averaged(values: Tensor) -> Tensor:
    """The mean over all processes, with the gradient of one's own values alone; a collective.

    DDP's mean of the processes' gradients makes that of the mean of it.
    """
    if (world := place()[1]) == 1:
        return values
    return values + (summed(values.detach()) / world - values.detach())
