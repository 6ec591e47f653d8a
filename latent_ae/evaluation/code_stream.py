"""Numbers of codes as a range coder writes them, and back: their true size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

__all__ = ["read_codes", "write_codes"]

_CODER: Any = constriction  # compiled; no stubs tell what it holds
_FIRST, _GROWTH = 32, 8  # codes of the first block; each further is an eighth of all before it
_STRIDE = (5**0.5 - 1) / 2  # of all codes: the golden section leaves the smallest gaps
_DIGIT = 2**16  # of numbers that are too large for one uniform distribution of the coder
_MOST_KNOWN = 2**22  # entries with a probability of their own: 2^-24 is the coder's least


def write_codes(numbers: NDArray[Any], size: int) -> NDArray[np.uint32]:
    """The stream of all numbers, which holds no table: the coder learns from what it has sent.

    Each slot has a model of its own, without memory of neighbours (order 0). Before a block it is
    the histogram of the slot's blocks before. The share of entries that were not seen yet is
    estimated by Good and Turing (Good 1953, Biometrika 40): that of the entries seen once. A new
    entry is sent by its place among the unseen, all equally likely. The codes are sent in strides
    over all pictures, so that what was sent resembles what follows, however pictures differ.

    Args:
        numbers: of shape (slots, N), from 0 to size - 1.
        size: how many different numbers a code can have.

    Returns:
        Words of 32 bits. What the decoder must know beside them is the shape and the size.
    """
    encoder = _CODER.stream.queue.RangeEncoder()
    models = [_Histogram(size) for _ in numbers]
    for block in _blocks(numbers.shape[1]):
        for model, row in zip(models, numbers, strict=True):
            part = row[block].astype(np.int64, copy=False)
            symbols = model.symbols(part)
            if len(model.entries):
                encoder.encode(symbols, model.distribution())
            for digits, values in _digits(model.rank(part[symbols == model.new]), model.unseen):
                encoder.encode(digits, _CODER.stream.model.Uniform(values))
            model.learn(part)
    return encoder.get_compressed()


def read_codes(stream: NDArray[np.uint32], shape: tuple[int, int], size: int) -> NDArray[np.int64]:
    """The numbers of shape (slots, N) that `write_codes` wrote.

    Args:
        stream: what it returned.
        shape: of its numbers.
        size: as it was given.
    """
    decoder = _CODER.stream.queue.RangeDecoder(stream)
    models = [_Histogram(size) for _ in range(shape[0])]
    numbers = np.empty(shape, np.int64)
    for block in _blocks(shape[1]):
        length = len(block)
        for model, row in zip(models, numbers, strict=True):
            symbols = np.full(length, model.new, np.int32)
            if len(model.entries):
                symbols = decoder.decode(model.distribution(), length)
            fresh = symbols == model.new
            ranks = np.zeros(int(fresh.sum()), np.int64)
            for place, values in _places(model.unseen):
                digits = decoder.decode(_CODER.stream.model.Uniform(values), len(ranks))
                ranks += digits.astype(np.int64) * place
            part = np.empty(length, np.int64)
            part[fresh] = model.unranked(ranks)
            part[~fresh] = model.entries[symbols[~fresh]]
            row[block] = part
            model.learn(part)
    return numbers


class _Histogram:
    """How often each entry was seen; the encoder and the decoder hold the same.

    Attributes:
        entries: that have a probability of their own, in order.
        counts: of each.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries, self.counts = np.empty(0, np.int64), np.empty(0, np.int64)

    @property
    def new(self) -> int:
        """The symbol that says that an entry without a probability follows."""
        return len(self.entries)

    @property
    def unseen(self) -> int:
        """How many entries have no probability."""
        return self.size - len(self.entries)

    def symbols(self, numbers: NDArray[np.int64]) -> NDArray[np.int32]:
        """The place of each number among the entries, or `new`."""
        if not len(self.entries):
            return np.zeros(len(numbers), np.int32)
        places = np.searchsorted(self.entries, numbers).clip(max=self.new - 1)
        return np.where(self.entries[places] == numbers, places, self.new).astype(np.int32)

    def distribution(self) -> Any:
        """Probabilities of the entries, and of `new`."""
        total, once = self.counts.sum(), (self.counts == 1).sum()
        fresh = (once + 0.5) / (total + 1) if self.unseen else 0.0
        shares = np.append(self.counts / total * (1 - fresh), fresh)
        return _CODER.stream.model.Categorical(shares, perfect=False)

    def rank(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of numbers among those without a probability."""
        return numbers - np.searchsorted(self.entries, numbers)

    def unranked(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """What `rank` was given."""
        free = self.entries - np.arange(len(self.entries))  # unseen ones below each entry
        return ranks + np.searchsorted(free, ranks, side="right")

    def learn(self, numbers: NDArray[np.int64]) -> None:
        """Counts a block."""
        found, times = np.unique(numbers, return_counts=True)
        together = np.concatenate([self.entries, found])
        self.entries, places = np.unique(together, return_inverse=True)
        weights = np.concatenate([self.counts, times])
        self.counts = np.bincount(places, weights).astype(np.int64)
        if len(self.entries) > _MOST_KNOWN:
            kept = np.sort(np.argsort(-self.counts, kind="stable")[:_MOST_KNOWN])
            self.entries, self.counts = self.entries[kept], self.counts[kept]


def _blocks(length: int) -> Iterator[NDArray[np.int64]]:
    """The places of each block's codes, which lie evenly among all."""
    stride = next(n for n in count(round(_STRIDE * length) or 1) if math.gcd(n, length) == 1)
    begin = 0
    while begin < length:
        end = min(length, begin + max(_FIRST, begin // _GROWTH))
        yield np.arange(begin, end) * stride % length
        begin = end


def _places(size: int) -> Sequence[tuple[int, int]]:
    """Of each digit of numbers below `size`: what it counts for, and how many values it has."""
    places, place = [], 1
    while (rest := -(-size // place)) > 1:
        places.append((place, min(rest, _DIGIT)))
        place *= _DIGIT
    return places


def _digits(numbers: NDArray[np.int64], size: int) -> Iterator[tuple[NDArray[np.int32], int]]:
    for place, values in _places(size):
        yield (numbers // place % _DIGIT).astype(np.int32), values
