"""Which picture is in which batch when batches have one shape each: a function of the seed alone.

Every bucket has an order of its own without end: its pictures of epoch 0, shuffled, then those of
epoch 1, and so on. Cut into global batches, the last one of an epoch reaches into the next, so that
no picture is left over and none comes more often than another. An epoch's batches, those that are
full by its end, are shuffled. All of it follows from (seed, epoch) and the global batch sizes, and
how many pictures have been before an epoch is a sum: a run resumes from one integer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from latent_ae.config import DataConfig

__all__ = ["BucketPlan", "Ticket", "nearest_size"]

_Order = Callable[[int], tuple[np.ndarray, np.ndarray]]


class Ticket(NamedTuple):
    """A picture of an epoch, and the number of its bucket."""

    epoch: int
    index: int
    bucket: int


def nearest_size(sizes: list[tuple[int, int]], widths: ArrayLike, heights: ArrayLike) -> np.ndarray:
    """The place in `sizes`, (height, width) each, of the nearest aspect, by ratio; any shape."""
    aspects = np.log(np.asarray(widths) / np.asarray(heights))
    places, nearest = np.zeros(np.shape(aspects), np.int16), np.full(np.shape(aspects), np.inf)
    for place, (height, width) in enumerate(sizes):
        distance = abs(np.log(width / height) - aspects)
        places = np.where(distance < nearest, np.int16(place), places)
        nearest = np.minimum(distance, nearest)
    return places


class BucketPlan:
    """The batches of pictures of known sizes, of all processes, without end.

    Args:
        config: shapes and batch sizes.
        sizes: (width, height) of each picture, of shape (N, 2); 0 for one to leave out.
        seed: of the order.
        world: how many processes share a batch.
    """

    def __init__(
        self, config: DataConfig, sizes: np.ndarray, seed: int = 0, world: int = 1
    ) -> None:
        self.buckets = config.shapes()
        self.seed, self.world = seed, world
        self._readable = sizes.min(axis=1) > 0
        self._assigned = _assign(config, np.maximum(sizes, 1))
        distinct = sorted(set(config.resolutions))
        self._cycle = np.array([distinct.index(side) for side in config.resolutions])
        # Pictures begin at different places of the cycle, so that every epoch has all resolutions.
        rng = np.random.default_rng([seed])
        self._phase = rng.permutation(len(sizes)) % len(self._cycle)
        self.counts = np.stack([self._count(epoch) for epoch in range(len(self._cycle))])
        self._before = np.concatenate([np.zeros_like(self.counts[:1]), self.counts.cumsum(0)])
        self._global = np.array([world * bucket.batch_size for bucket in self.buckets])

    def bucket_of(self, epoch: int) -> np.ndarray:
        """The bucket of each picture in an epoch, -1 for one that is left out; of shape (N,)."""
        resolution = self._cycle[(self._phase + epoch) % len(self._cycle)]
        found = self._assigned[resolution, np.arange(len(resolution))]
        return np.where(self._readable, found, -1)

    @property
    def batches_per_epoch(self) -> float:
        """Global batches of an epoch, on average."""
        return float((self.counts.mean(0) / self._global).sum())

    def batches(self, start: int = 0) -> Iterator[list[Ticket]]:
        """Global batches of one shape each; the share of a process is a contiguous part.

        Args:
            start: pictures that have been before. Where no batch begins, as after a change of the
                number of processes, the next one that does is the first.
        """

        @lru_cache(maxsize=8)  # a batch may need several epochs' pictures of a rare bucket
        def order(epoch: int) -> tuple[np.ndarray, np.ndarray]:
            return self._order(epoch)

        for _, epoch, bucket, number in self._from(start):
            yield self._batch(epoch, bucket, number, order)

    def begins(self, start: int) -> int:
        """The number of the first picture that `batches(start)` gives: `start`, or after it."""
        return next(self._from(start))[0]

    def _from(self, start: int) -> Iterator[tuple[int, int, int, int]]:
        """Each batch's first picture's number, epoch, bucket and how manieth of the bucket."""
        epoch = self._epoch_at(start)
        seen = self._seen_before(epoch)
        while True:
            for bucket, number in self._schedule(epoch):
                if seen >= start:
                    yield seen, epoch, bucket, number
                seen += int(self._global[bucket])
            epoch += 1

    @property
    def fingerprint(self) -> int:
        """Of the pictures' buckets: what all processes must agree on; 63 bits."""
        digest = hashlib.sha256(self._assigned.tobytes() + self._readable.tobytes()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def stand_ins(self, ticket: Ticket) -> Iterator[int]:
        """Pictures for the place of one that cannot be read: of its bucket first, then any."""
        own = self.bucket_of(ticket.epoch) == ticket.bucket
        for group in (np.flatnonzero(own), np.flatnonzero(~own & self._readable)):
            after = np.searchsorted(group, ticket.index, side="right")
            yield from (int(i) for i in np.roll(group, -after) if i != ticket.index)

    def _count(self, epoch: int) -> np.ndarray:
        return np.bincount(self.bucket_of(epoch)[self._readable], minlength=len(self.buckets))

    def _pictures_before(self, epoch: int) -> np.ndarray:
        """How many pictures each bucket has had before an epoch."""
        cycles, rest = divmod(epoch, len(self._cycle))
        return cycles * self._before[-1] + self._before[rest]

    def _batches_before(self, epoch: int) -> np.ndarray:
        return self._pictures_before(epoch) // self._global

    def _seen_before(self, epoch: int) -> int:
        """How many pictures are in the batches before an epoch's first."""
        return int((self._batches_before(epoch) * self._global).sum())

    def _epoch_at(self, start: int) -> int:
        """The epoch in whose batches picture number `start` is."""
        low, high = 0, 1
        while self._seen_before(high) <= start:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._seen_before(middle) <= start else (low, middle)
        return low

    def _schedule(self, epoch: int) -> list[tuple[int, int]]:
        """The epoch's batches in their order: the bucket, and its how manieth."""
        first, end = self._batches_before(epoch), self._batches_before(epoch + 1)
        found = [(b, k) for b in range(len(first)) for k in range(int(first[b]), int(end[b]))]
        places = np.random.default_rng([self.seed, epoch, 1]).permutation(len(found)).tolist()
        if self._seen_before(epoch) == 0 and found:
            # What does not fit in memory shall fail in the first steps, not after an hour. What
            # grows faster than the pixels is largest at the largest resolution.
            first_of: dict[int, int] = {}
            for place in sorted(places, key=lambda p: -self.buckets[found[p][0]].pixels):
                first_of.setdefault(self.buckets[found[place][0]].resolution, place)
            ahead = list(first_of.values())
            places = ahead + [place for place in places if place not in ahead]
        return [found[place] for place in places]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's pictures shuffled, bucket after bucket, and where each bucket begins."""
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self._readable))
        shuffled = shuffled[self._readable[shuffled]]
        pictures = shuffled[np.argsort(self.bucket_of(epoch)[shuffled], kind="stable")]
        counts = self.counts[epoch % len(self._cycle)]
        return pictures, np.concatenate([[0], counts.cumsum()])

    def _batch(self, epoch: int, bucket: int, number: int, order: _Order) -> list[Ticket]:
        wanted = int(self._global[bucket])
        first = number * wanted
        while self._pictures_before(epoch)[bucket] > first:
            epoch -= 1
        batch: list[Ticket] = []
        while len(batch) < wanted:
            pictures, begins = order(epoch)
            own = pictures[begins[bucket] : begins[bucket + 1]]
            offset = max(0, first - int(self._pictures_before(epoch)[bucket]))
            taken = own[offset : offset + wanted - len(batch)]
            batch += [Ticket(epoch, int(index), bucket) for index in taken]
            epoch += 1
        return batch


def _assign(config: DataConfig, sizes: np.ndarray) -> np.ndarray:
    """The bucket of each picture at each resolution, of shape (resolutions, N).

    The one of nearest aspect; at a resolution that the picture does not fill, that of the largest
    below which it does, or of the smallest of all, for which it is enlarged.
    """
    buckets, assigned = config.shapes(), []
    width, height = sizes[:, 0], sizes[:, 1]
    for resolution in sorted(set(config.resolutions)):
        numbers = [n for n, bucket in enumerate(buckets) if bucket.resolution == resolution]
        shapes = np.array([buckets[n][1:3] for n in numbers])
        places = nearest_size([tuple(shape) for shape in shapes.tolist()], width, height)
        needed = shapes[places] * config.room
        fills = (needed[:, 0] <= height) & (needed[:, 1] <= width)
        found = (numbers[0] + places).astype(np.int16)
        assigned.append(np.where(fills, found, assigned[-1]) if assigned else found)
    return np.stack(assigned)
