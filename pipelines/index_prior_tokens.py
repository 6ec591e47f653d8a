"""How codes become a sequence of tokens for a transformer, and what a prediction of them costs.

A sequence begins with the class, then come the codes in raster order; where a position has several
(residual levels, heads), these follow one another. Each of them has numbers of its own in the
vocabulary: code k of slot s is token s · size + k; the classes follow, and last the null class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_ae.errors import UserError

__all__ = ["MOST_ENTRIES", "Vocabulary", "cross_entropy", "entropies", "require_known"]

MOST_ENTRIES = 2**17  # of the embedding table, and of the softmax


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens there are, and how many make a picture.

    Args:
        size: how many different numbers a code can have.
        codes: how many codes a position has.
        height: of the grid of positions.
        width: likewise.
        classes: how many classes there are; 0 for none.

    Raises:
        UserError: there would be more tokens than an embedding table should have.
    """

    size: int
    codes: int
    height: int
    width: int
    classes: int = 0

    def __post_init__(self) -> None:
        if self.codes * self.size > MOST_ENTRIES:
            several = f"{self.codes} × " if self.codes > 1 else ""
            raise UserError(
                f"a prior over {several}{self.size} codes would need an embedding of as many "
                f"entries; at most {MOST_ENTRIES} are taken: train an autoencoder of fewer codes"
            )

    @property
    def entries(self) -> int:
        """Of the embedding table: codes, classes and the null class."""
        return self.codes * self.size + self.classes + 1

    @property
    def null(self) -> int:
        """The token of no class."""
        return self.entries - 1

    @property
    def length(self) -> int:
        """How many codes make a picture."""
        return self.codes * self.height * self.width

    def tokens(self, indices: Tensor) -> Tensor:
        """Codes as tokens, int64 of shape (B, length).

        Args:
            indices: of shape (B, codes, h, w), or (B, h, w) of one code.

        Raises:
            UserError: a number is not in the codebook.
        """
        indices = indices.reshape(-1, self.codes, self.height * self.width).long()
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.size:
            raise UserError(
                f"indices from {int(indices.min())} to {int(indices.max())} do not fit a codebook "
                f"of {self.size}"
            )
        offsets = self.size * torch.arange(self.codes, device=indices.device)
        return (indices.transpose(1, 2) + offsets).flatten(1)

    def indices(self, tokens: Tensor) -> Tensor:
        """Tokens as codes of shape (B, codes, h, w): the inverse of `tokens`."""
        numbers = tokens.reshape(-1, self.height, self.width, self.codes)
        offsets = self.size * torch.arange(self.codes, device=tokens.device)
        return (numbers - offsets).permute(0, 3, 1, 2).contiguous()

    def class_tokens(self, labels: Tensor) -> Tensor:
        """The first token of each sequence, of shape (B, 1); the null class for other labels."""
        known = (labels >= 0) & (labels < self.classes)
        return torch.where(known, self.codes * self.size + labels, self.null)[:, None]

    def code_logits(self, logits: Tensor) -> Tensor:
        """Of a sequence's logits those that its code can have, of shape (B, length, size).

        Args:
            logits: of shape (B, length, entries), each predicting the code at its place.
        """
        slots = logits[..., : self.codes * self.size].unflatten(-1, (self.codes, self.size))
        slots = slots.unflatten(1, (-1, self.codes))  # (B, positions, slot asked, slot said, size)
        return slots.diagonal(dim1=2, dim2=3).movedim(-1, 2).flatten(1, 2)


def cross_entropy(vocabulary: Vocabulary, logits: Tensor, tokens: Tensor) -> Tensor:
    """−log p of each code given those before it, in nats, of shape (B, length).

    Args:
        vocabulary: of the tokens.
        logits: of shape (B, length, entries).
        tokens: of shape (B, length), what was to be predicted.
    """
    offsets = vocabulary.size * torch.arange(vocabulary.codes, device=tokens.device)
    targets = tokens - offsets.repeat(tokens.shape[1] // vocabulary.codes)
    # In rows: down a strided dimension the softmax takes more than twice as long.
    found = vocabulary.code_logits(logits.float()).flatten(0, 1)
    return F.cross_entropy(found, targets.flatten(), reduction="none").view(tokens.shape)


def entropies(vocabulary: Vocabulary, counts: Tensor) -> float:
    """The order-0 entropy in bits per code, mean over the slots.

    What codes cost at least where none is predicted from another.

    Args:
        vocabulary: of the codes.
        counts: how often each was seen, of shape (codes · size,).
    """
    p = counts.double().view(vocabulary.codes, vocabulary.size)
    p = p / p.sum(1, keepdim=True)
    return float(-torch.special.xlogy(p, p).sum(1).mean() / math.log(2))


def require_known(labels: list[int], vocabulary: Vocabulary) -> None:
    """Raises `UserError` unless each label is a class, or −1 for none."""
    for label in labels:
        if not -1 <= label < vocabulary.classes:
            what = f"0 to {vocabulary.classes - 1}" if vocabulary.classes else "none is known"
            raise UserError(f"class {label}: there is no such class ({what})")
