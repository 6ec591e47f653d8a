"""How exact the decoder claims to be: its variance, given, learned, or in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch import distributed as dist

__all__ = [
    "EXACT_WEIGHTS",
    "ROUNDING_ERRORS",
    "VARIANCES",
    "learned_logvar",
    "optimal_logvar",
    "scaled_distance",
    "unit_of",
]

# λ with which distance / exp(s) + s + λ·KL/N is the ELBO: exp(s) is the variance of a normal
# decoder, or the scale of a Laplace one (docs/theory.md). Charbonnier's density has no such s.
EXACT_WEIGHTS = {"l2": 2.0, "l1": 1.0}

# What a pixel loss makes of rounding to 8 bits (Charbonnier's is a little less). Added to a
# distance, it is the expected L2 distance to the picture before it was rounded (uniform
# dequantisation; Theis et al. 2016), and no less than it for L1. A likelihood is a density, without
# bound where a picture comes back exactly: with this floor s stays finite and its gradient alive.
# Rybkin et al. soften the lower end of log σ for that.
_LEVEL = 2 / 255
ROUNDING_ERRORS = {"l1": _LEVEL / 4, "l2": _LEVEL**2 / 12, "charbonnier": _LEVEL / 4}

# The shape of the trained s, given the number of image channels; None where nothing is trained.
VARIANCES: dict[str, Callable[[int], tuple[int, ...] | None]] = {
    "fixed": lambda channels: None,
    "learned": lambda channels: (),
    "per_channel": lambda channels: (channels,),
    "optimal": lambda channels: None,
}


def learned_logvar(variance: str, channels: int, start: float) -> nn.Parameter | None:
    """The trained s of a variance, of shape () or (C,), or None where there is none.

    Args:
        variance: one of `VARIANCES`.
        channels: of the pictures, C.
        start: its first value.
    """
    shape = VARIANCES[variance](channels)
    return None if shape is None else nn.Parameter(torch.full(shape, float(start)))


def scaled_distance(distance: Tensor, logvar: Tensor) -> Tensor:
    """The distance over exp(s), plus s; the mean over channels where they have an s each.

    Up to a factor and a constant the negative log-likelihood of a normal (Laplace) decoder of
    variance (scale) exp(s). LDM's `logvar` is the scalar one.

    Args:
        distance: scalar or of shape (C,).
        logvar: s, likewise.
    """
    return (distance / logvar.exp() + logvar).mean()


def optimal_logvar(distance: Tensor) -> Tensor:
    """The s that minimises distance / exp(s) + s: its logarithm (Rybkin et al. 2021).

    Over all processes and without graph, so the loss is 1 + log D and its gradient ∇D / D, D being
    the distance of the whole batch.

    Args:
        distance: of this process's batch, a positive scalar.
    """
    distance = distance.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(distance)
        distance = distance / dist.get_world_size()
    return distance.log()


def unit_of(logvar: Tensor) -> Tensor:
    """What the distance is divided by: exp(s), without graph.

    With an s a channel, one over the mean of exp(−s). λ times it is the fixed weight under which
    reconstruction and KL would be balanced as now.

    Args:
        logvar: s, scalar or of shape (C,).
    """
    return 1 / (-logvar.detach()).exp().mean()
