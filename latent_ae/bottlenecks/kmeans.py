"""Where codebooks begin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_ae.quantized import nearest

__all__ = ["kmeans"]

_ROUNDS = 10


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
        centres = centres + 1e-2 * vectors.std(0, correction=0) * noise
        return F.normalize(centres, dim=-1) if normalized else centres
    for _ in range(_ROUNDS):
        if normalized:
            centres = F.normalize(centres, dim=-1)
        found = nearest(vectors, centres)
        sizes = vectors.new_zeros(count).index_add_(0, found, vectors.new_ones(len(vectors)))
        sums = torch.zeros_like(centres).index_add_(0, found, vectors)
        centres = sums / sizes.clamp(min=1)[:, None]
        if empty := int((sizes == 0).sum()):
            centres[sizes == 0] = drawn(empty)
    return F.normalize(centres, dim=-1) if normalized else centres
