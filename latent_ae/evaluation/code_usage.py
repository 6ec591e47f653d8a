"""How the codes of many pictures are used, and how many bits they take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray
from torch import Tensor

from latent_ae.evaluation.code_stream import read_codes, write_codes

__all__ = ["CodeUsage", "expected_usage"]

_POINTS = 128  # of a curve, twice: close together at its head, and evenly


class CodeUsage:
    """Gathers the numbers of codes picture by picture; processes can be added up.

    The numbers themselves are kept, in as few bytes as they need: they are what is coded at the
    end, and their histogram then takes memory for the entries that occur alone, of 2^31 too.

    Args:
        size: how many different numbers a code can have.
        heads: codes of one level; the level changes every so many slots.
    """

    def __init__(self, size: int, heads: int = 1) -> None:
        self.size, self.heads = size, heads
        self.pixels = 0
        self.numbers: dict[int, NDArray[Any]] = {}

    def update(self, indices: Tensor, pixels: int, positions: Sequence[int]) -> None:
        """Adds pictures.

        Args:
            indices: of shape (B, slots, h, w).
            pixels: of each picture.
            positions: the pictures' places in the data set, in which order they are coded.
        """
        numbers = indices.flatten(2).cpu().numpy().astype(np.min_scalar_type(self.size - 1))
        self.numbers |= dict(zip(positions, numbers, strict=True))
        self.pixels += pixels * len(numbers)

    def merge(self, other: CodeUsage) -> None:
        """Adds what another process has gathered."""
        self.numbers |= other.numbers
        self.pixels += other.pixels

    def together(self) -> NDArray[Any]:
        """All numbers in the data's order, of shape (slots, N)."""
        return np.concatenate([self.numbers[position] for position in sorted(self.numbers)], 1)

    def summary(self) -> dict[str, Any]:
        """Everything of it, plain values for a JSON file (docs/evaluation.md explains each).

        Raises:
            RuntimeError: the stream does not give the numbers back.
        """
        numbers = self.together()
        slots = [_slot(row, self.size) for row in numbers]
        for place, slot in enumerate(slots):
            slot |= {"level": place // self.heads, "head": place % self.heads}
        mean_bits = float(np.mean([slot["entropy_bits"] for slot in slots]))
        bits = {
            "fixed_length": math.log2(self.size) * numbers.size,
            "entropy": mean_bits * numbers.size,
            "coded": float(coded_bits(numbers, self.size)),
        }
        return {
            "size": self.size,
            "per_position": len(numbers),
            "positions": numbers.shape[1],
            "usage": float(np.mean([slot["usage"] for slot in slots])),
            "usage_uniform": expected_usage(self.size, numbers.shape[1]),
            "dead": sum(slot["dead"] for slot in slots),
            "perplexity": 2**mean_bits,
            "entropy_bits": mean_bits,
            "bits_per_pixel": {name: value / self.pixels for name, value in bits.items()},
            "bits_per_image": {name: value / len(self.numbers) for name, value in bits.items()},
            "slots": slots,
        }


def expected_usage(size: int, positions: int) -> float:
    """The share of entries that so many draws are expected to meet where all are equally likely.

    1 − (1 − 1/size)^positions: each entry is missed by all draws with the probability of the power.
    """
    if size == 1:
        return 1.0
    return -math.expm1(positions * math.log1p(-1 / size))


def coded_bits(numbers: NDArray[Any], size: int) -> int:
    """The bits of the stream of numbers of shape (slots, N), after it was read back.

    Raises:
        RuntimeError: it gives other numbers.
    """
    stream = write_codes(numbers, size)
    if not np.array_equal(read_codes(stream, numbers.shape, size), numbers):
        raise RuntimeError("the stream of codes does not give the codes back")
    return 8 * stream.nbytes


def _slot(numbers: NDArray[Any], size: int) -> dict[str, Any]:
    """The use of one codebook."""
    counts = np.sort(np.unique(numbers, return_counts=True)[1])[::-1]
    bits = float(scipy.stats.entropy(counts, base=2))
    ranks = _ranks(len(counts))
    relative = counts[ranks - 1] * (size / len(numbers))
    return {
        "usage": len(counts) / size,
        "dead": size - len(counts),
        "perplexity": 2**bits,
        "entropy_bits": bits,
        "largest_share": float(counts[0] / len(numbers)),
        "curve": np.stack([ranks / size, relative], 1).tolist(),
    }


def _ranks(number: int) -> NDArray[np.int64]:
    """Some of the ranks from 1 to `number`, both included."""
    head = np.geomspace(1, number, _POINTS)
    return np.unique(np.concatenate([head, np.linspace(1, number, _POINTS)]).round().astype(int))
