"""Self-attention over the pixels of latents."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "heads_of"]


def heads_of(attention: Any, tokens: Tensor, which: str) -> list[Tensor]:
    """Queries, keys or values of shape (B, heads, N, C / heads) of tokens of shape (B, N, C)."""
    made = [getattr(attention, f"to_{name}")(tokens) for name in which]
    return [one.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for one in made]


def attend(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What attention adds, of shape (B, N, C)."""
    found = F.scaled_dot_product_attention(query, key, value)
    return attention.to_out[0](found.transpose(1, 2).flatten(2))
