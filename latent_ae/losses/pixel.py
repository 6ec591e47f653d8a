"""Distances of pixels, per element: the objective takes the mean."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["PIXEL_LOSSES", "charbonnier", "l1", "l2"]

# A thousandth of the half-range: below one 8-bit level (2/255), so Charbonnier is L1 to the eye.
CHARBONNIER_EPSILON = 1e-3


def l1(target: Tensor, reconstruction: Tensor) -> Tensor:
    """|x − x̂|, shape as given."""
    return (target - reconstruction).abs()


def l2(target: Tensor, reconstruction: Tensor) -> Tensor:
    """(x − x̂)², shape as given."""
    return (target - reconstruction).square()


def charbonnier(target: Tensor, reconstruction: Tensor) -> Tensor:
    """√((x − x̂)² + ε²) − ε, a smooth L1 that is zero at zero (Charbonnier et al. 1994)."""
    difference = target - reconstruction
    return (difference.square() + CHARBONNIER_EPSILON**2).sqrt() - CHARBONNIER_EPSILON


PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": l1,
    "l2": l2,
    "charbonnier": charbonnier,
}
