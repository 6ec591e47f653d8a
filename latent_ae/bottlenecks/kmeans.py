"""Where codebooks begin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["kmeans"]

_ROUNDS = 10
_DISTANCES = 2**25  # computed at once


@torch.no_grad()
def kmeans(
    vectors: Tensor, count: int, generator: torch.Generator, *, normalized: bool = False
) -> Tensor:
    """Centres of clusters, of shape (count, d), by Lloyd's algorithm (Lloyd 1982).

    It begins at vectors drawn without return, and puts a centre that nothing is near to onto
    another vector in each round; so all centres lie among the vectors. Where there are fewer
    vectors than centres, those are the vectors, drawn again with a little noise between copies.

    Args:
        vectors: of shape (N, d).
        count: how many centres.
        generator: on the CPU: the same draws on every device and process.
        normalized: centres of length 1, of vectors of length 1.
    """

    def drawn(number: int) -> Tensor:
        order = torch.randperm(max(number, len(vectors)), generator=generator)[:number]
        return vectors[(order % len(vectors)).to(vectors.device)]

    centres = drawn(count)
    if len(vectors) < count:
        noise = torch.randn(count, vectors.shape[1], generator=generator).to(vectors)
        centres = centres + 1e-2 * vectors.std(0) * noise
        return F.normalize(centres, dim=-1) if normalized else centres
    for _ in range(_ROUNDS):
        if normalized:
            centres = F.normalize(centres, dim=-1)
        rows = max(1, _DISTANCES // count)
        nearest = torch.cat([torch.cdist(v, centres).argmin(1) for v in vectors.split(rows)])
        sizes = vectors.new_zeros(count).index_add_(0, nearest, vectors.new_ones(len(vectors)))
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        centres = torch.where(
            (sizes > 0)[:, None], sums / sizes.clamp(min=1)[:, None], drawn(count)
        )
    return F.normalize(centres, dim=-1) if normalized else centres
