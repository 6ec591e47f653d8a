"""Latents as a stream: shuffled through a buffer, divided, resumed from a few integers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from latent_ae.errors import UserError
from latent_ae.latents.dataset import LatentDataset

__all__ = ["LatentStream"]


class LatentStream(IterableDataset):
    """One epoch of a latents folder at a time, nearly in the order of the disk.

    The shards are put into a random order; of the rows in that order each of all workers of all
    processes takes an equal stretch, the same number of whole items (what does not divide is left
    out, other rows in every epoch), and shuffles it through a buffer. Only row numbers are
    buffered. Every epoch has another order, and so have the draws.

    Args:
        folder: what `encode` wrote.
        buffer: rows in the shuffling buffer; 1 for the order of the disk.
        seed: of the order and all draws.
        rank: which of `world` processes this is.
        world: how many read the folder together.
        options: `sample`, `scale`, `variants`, `columns` and `entries_of` of `LatentDataset`.

    Raises:
        UserError: as `LatentDataset`; or fewer items than workers.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        buffer: int = 10_000,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        **options: Any,
    ) -> None:
        if buffer < 1 or not 0 <= rank < world:
            raise UserError(f"buffer {buffer}, rank {rank} of {world} is no way to read")
        self.dataset = LatentDataset(folder, seed=seed, **options)
        self.buffer, self.seed, self.rank, self.world = buffer, seed, rank, world
        self._given = 0  # of this epoch, by this worker
        self._resume = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration gives, in every worker; say it before each one."""
        self.dataset.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """Where this worker is; `torchdata`'s StatefulDataLoader gathers and returns it."""
        return {"epoch": self.dataset.epoch, "given": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration goes on behind what had been given."""
        self.dataset.set_epoch(state["epoch"])
        self._resume = state["given"]

    def __len__(self) -> int:
        """Items of this process an epoch, with one worker or none."""
        return len(self.dataset) // self.world

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._given, self._resume = self._resume, 0
        order = self.order(self.dataset.epoch)
        for place, position in enumerate(order):
            if place < self._given:
                continue  # row numbers alone: to go on costs no reading
            self._given += 1
            yield self.dataset[position]
        self._given = 0

    def order(self, epoch: int) -> Iterator[int]:
        """The positions that this worker gives in an epoch."""
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        consumers, own = self.world * workers, self.rank * workers + worker
        share = len(self.dataset) // consumers
        if not share:
            raise UserError(f"{len(self.dataset)} items cannot be divided among {consumers}")
        rows = self._stretch(epoch, own * share, share)
        rng = np.random.default_rng((self.seed, epoch, own))
        held = list(itertools.islice(rows, self.buffer))
        while some := list(itertools.islice(rows, 4096)):  # one by one, drawing would take longest
            places = rng.integers(self.buffer, size=len(some)).tolist()
            for row, place in zip(some, places, strict=True):
                yield held[place]
                held[place] = row
        rng.shuffle(held)
        yield from held

    def _stretch(self, epoch: int, first: int, count: int) -> Iterator[int]:
        """`count` items from the `first` on, shards in the epoch's order, begun anywhere."""
        dataset, index = self.dataset, self.dataset.index
        shards = index.shard if dataset.variants == "all" else index.shard[index.picture[:-1]]
        numbers = np.arange(len(dataset.manifest.shards) + 1, dtype=shards.dtype)
        bounds = np.searchsorted(shards, numbers)
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(bounds) - 1)
        turn = int(rng.integers(max(1, len(dataset))))  # so that other rows are left out each time
        lengths = np.diff(bounds)[order]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        begin = (first + turn) % len(dataset)
        place = int(np.searchsorted(starts, begin, side="right")) - 1
        offset = begin - int(starts[place])
        while count:
            shard, length = int(order[place]), int(lengths[place])
            taken = min(count, length - offset)
            yield from range(int(bounds[shard]) + offset, int(bounds[shard]) + offset + taken)
            count, offset, place = count - taken, 0, (place + 1) % len(order)
