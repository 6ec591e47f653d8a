"""How far draws are from N(0, I)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["negentropy", "sliced_wasserstein"]

_MOST = 65_536  # draws that are sorted
_DIRECTIONS = 64


def sliced_wasserstein(vectors: Tensor, seed: int = 0) -> float:
    """The sliced 2-Wasserstein distance of draws from N(0, I) (Rabin et al. 2011; Bonneel 2015).

    A projection of N(0, I) is N(0, 1), whose quantiles are known, so only the draws are sampled:
    the root of the mean, over 64 directions, of the mean squared difference of sorted projections
    and normal quantiles. Draws from N(0, I) itself give not 0 but a floor that falls with their
    number.

    Args:
        vectors: of shape (n, d); at most 65,536 of them, evenly chosen, are used.
        seed: of the directions.
    """
    if len(vectors) > _MOST:
        chosen = torch.linspace(0, len(vectors) - 1, _MOST, dtype=torch.float64).long()
        vectors = vectors[chosen]
    vectors = vectors.double()
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(vectors.shape[1], _DIRECTIONS, generator=generator).double()
    projected = (vectors @ (directions / directions.norm(dim=0))).sort(dim=0).values
    places = (torch.arange(len(vectors), dtype=torch.float64) + 0.5) / len(vectors)
    quantiles = torch.special.ndtri(places)[:, None]
    return (projected - quantiles).square().mean().sqrt().item()


def negentropy(values: Tensor, bins: int = 200) -> float:
    """How far, in nats, a distribution is from the normal one of its own mean and variance.

    KL(q ‖ N(m, v)) of a histogram over ± 5 standard deviations, less the bias of its sampling
    (Miller 1955). Added to KL(N(m, v) ‖ N(0, 1)) it gives KL(q ‖ N(0, 1)) exactly, because the
    cross-entropy with a Gaussian knows only mean and variance.

    Args:
        values: draws, of shape (n,); fewer than 1,000, or all equal, give 0.
        bins: of the histogram.
    """
    values = values.double()
    deviation = values.std() if len(values) > 1 else torch.tensor(0.0)
    if len(values) < 1000 or deviation <= 0:
        return 0.0
    standard = ((values - values.mean()) / deviation).clamp(-4.999, 4.999)
    counts = torch.histc(standard, bins, -5, 5)
    edges = torch.linspace(-5, 5, bins + 1, dtype=torch.float64)
    edges[0], edges[-1] = -math.inf, math.inf
    below = torch.special.ndtr(edges)
    normal = below[1:] - below[:-1]
    share = counts / counts.sum()
    found = share > 0
    divergence = (share[found] * (share[found] / normal[found]).log()).sum().item()
    return max(0.0, divergence - (int(found.sum()) - 1) / (2 * len(values)))
