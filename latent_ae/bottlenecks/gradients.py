"""How a gradient passes a quantiser, whose own is zero nearly everywhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GRADIENTS", "rotated", "straight_through"]

_TINY = 1e-6  # lengths of vectors are taken for no less


def straight_through(latents: Tensor, entries: Tensor) -> Tensor:
    """The entries, with the gradient of the identity (Bengio et al. 2013, arXiv:1308.3432).

    Args:
        latents: of any shape.
        entries: of the same shape; no gradient reaches them.
    """
    return latents + (entries - latents).detach()


def rotated(latents: Tensor, entries: Tensor) -> Tensor:
    """The entries as the latents turned and scaled (Fifty et al. 2024, arXiv:2410.06424, eq. 4).

    With ẑ and ê the directions of latent z and entry e, the reflections I − 2 r rᵀ, r the direction
    of ẑ + ê, and 2 ê ẑᵀ make R ẑ = ê; then e = (|e| / |z|) R z, where factor and R count as
    constants. The backward pass is this map transposed: no matrix is built.

    Args:
        latents: of shape (B, n, c, h, w): vectors of c values.
        entries: of the same shape; no gradient reaches them.
    """
    return _Rotated.apply(latents, entries.detach())  # pyright: ignore[reportReturnType]


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latents: Tensor, entries: Tensor) -> Tensor:
        ctx.save_for_backward(latents, entries)
        return entries.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (latents, entries) = gradients, ctx.saved_tensors
        source, target = (F.normalize(v, dim=2, eps=_TINY) for v in (latents, entries))
        between = F.normalize(source + target, dim=2, eps=_TINY)
        turned = (
            gradient
            - 2 * between * (between * gradient).sum(2, keepdim=True)
            + 2 * source * (target * gradient).sum(2, keepdim=True)
        )
        lengths = [v.norm(dim=2, keepdim=True).clamp(min=_TINY) for v in (entries, latents)]
        return turned * (lengths[0] / lengths[1]), None


GRADIENTS = {"straight_through": straight_through, "rotation": rotated}
