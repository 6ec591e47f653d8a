"""How codes are used."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor

__all__ = ["averaged", "entropy", "perplexity", "summed", "tallied"]

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


def _world() -> int:
    here = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if here else 1


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, the same on each; a collective."""
    if _world() > 1:
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def averaged(values: Tensor) -> Tensor:
    """The mean over all processes, with the gradient of one's own values alone; a collective.

    DDP's mean of the processes' gradients makes that of the mean of it.
    """
    if (world := _world()) == 1:
        return values
    return values + (summed(values.detach()) / world - values.detach())
