"""Batches of random crops: an endless resumable stream for training.

A picture's crop depends on (seed, epoch, index) alone, and the order on (seed, epoch) alone. So the
stream is the same for any number of workers, N processes of batch B see what one of batch N·B sees,
and a run resumes from one integer: how many pictures it has had. With aspect buckets the order of
batches is that of `BucketPlan`, and all of this holds still.
"""

from __future__ import annotations

import atexit
import signal
import warnings
import weakref
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from latent_ae.data.buckets import BucketPlan, Ticket
from latent_ae.data.decoding import UnreadableImage
from latent_ae.data.samples import Batch, Sample, Skipped, collate, read_sample
from latent_ae.data.sizes import picture_sizes
from latent_ae.data.sources import Source, open_source
from latent_ae.data.transforms import TrainingCrop
from latent_ae.errors import UserError

if TYPE_CHECKING:
    from latent_ae.config import DataConfig, SourceConfig

__all__ = ["TrainingStream", "require_one_readable"]


class _Indexed(Dataset):
    """Random access for training: a ticket (epoch, index) always gives the same crop."""

    def __init__(self, source: Source, crop: TrainingCrop, seed: int) -> None:
        self.source, self.crop, self.seed = source, crop, seed

    def __getitem__(self, ticket: tuple[int, int]) -> Sample:
        epoch, index = ticket
        rng = np.random.default_rng([self.seed, epoch, index])
        skipped = []
        for step in range(len(self.source.rows)):  # an unreadable picture's neighbour stands in
            position = (index + step) % len(self.source.rows)
            row = self.source.rows[position]
            item = read_sample(self.source, row, position, lambda picture: self.crop(picture, rng))
            if isinstance(item, Sample):
                item.skipped = skipped
                return item
            skipped.append(item)
        raise UserError("no picture of the data set can be read any more")


class _Tickets(Sampler[list[tuple[int, int]]]):
    """This process's share of the endless global order, from picture number `start` on."""

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int, world: int, start: int
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world, self.start = rank, world, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        @lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng([self.seed, epoch]).permutation(self.count)

        position = self.start + self.rank * self.batch_size
        while True:
            places = (divmod(position + i, self.count) for i in range(self.batch_size))
            yield [(epoch, int(order(epoch)[offset])) for epoch, offset in places]
            position += self.world * self.batch_size


class _Bucketed(Dataset):
    """The same with buckets: a ticket says the bucket too, and a stand-in is cut to its shape."""

    def __init__(self, source: Source, crop: TrainingCrop, plan: BucketPlan) -> None:
        self.source, self.crop, self.plan = source, crop, plan

    def __getitem__(self, ticket: Ticket) -> Sample:
        rng = np.random.default_rng([self.plan.seed, ticket.epoch, ticket.index])
        bucket = self.plan.buckets[ticket.bucket]
        size, skipped = (bucket.height, bucket.width), []
        for position in chain([ticket.index], self.plan.stand_ins(ticket)):
            row = self.source.rows[position]
            item = read_sample(self.source, row, position, lambda p: self.crop(p, rng, size))
            if isinstance(item, Sample):
                item.skipped = skipped
                return item
            skipped.append(item)
        raise UserError("no picture of the data set can be read any more")


class _Shares(Sampler[list[Ticket]]):
    """This process's share of each batch of a plan, from picture number `start` on."""

    def __init__(self, plan: BucketPlan, rank: int, start: int) -> None:
        self.plan, self.rank, self.start = plan, rank, start

    def __iter__(self) -> Iterator[list[Ticket]]:
        for batch in self.plan.batches(self.start):
            share = len(batch) // self.plan.world
            yield batch[self.rank * share : (self.rank + 1) * share]


class _Streamed(IterableDataset):
    """Endless passes over a stream; resumes at its row (the shuffle buffer is filled anew)."""

    def __init__(
        self, source: Source, crop: TrainingCrop, seed: int, rank: int, world: int
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        rows: Any = source.rows
        rows = rows.shuffle(seed=seed, buffer_size=crop.config.shuffle_buffer)
        self.rows: Any = split_dataset_by_node(rows, rank, world)
        self.source, self.crop, self.seed, self.rank = source, crop, seed, rank
        self.epoch, self.position, self.resumed = 0, 0, False

    def __iter__(self) -> Iterator[Sample]:
        worker = torch.utils.data.get_worker_info()
        stream = worker.id if worker else 0
        skipped: list[Skipped] = []
        while True:
            self.rows.set_epoch(self.epoch)
            # A resumed pass may be at its end; a whole one without a picture means none will come.
            found, self.resumed = self.resumed, False
            for row in self.rows:
                rng = np.random.default_rng([self.seed, self.rank, stream, self.position])
                self.position += 1
                item = read_sample(self.source, row, self.position, lambda p: self.crop(p, rng))  # noqa: B023
                if isinstance(item, Skipped):
                    skipped.append(item)
                    continue
                found = True
                item.skipped, skipped = skipped, []
                yield item
            if not found:  # this worker's shards hold nothing; spinning would hang the run
                return
            self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "rows": self.rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position, self.resumed = state["epoch"], state["position"], True
        self.rows.set_epoch(self.epoch)
        self.rows.load_state_dict(state["rows"])


def _ignore_stop_signals(worker: int) -> None:
    """The run answers SIGTERM and SIGUSR1, which schedulers send to all its processes alike.

    A worker that died of them would take the step down that the run means to finish. Workers end
    when their queue tells them to (`_end_workers`), or when their parent is gone.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _end_workers(batches: Any) -> None:
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()


def _stream_loader(
    rows: _Streamed, config: DataConfig, options: dict[str, Any], state: dict[str, Any] | None
) -> StatefulDataLoader:
    options = {**options, "num_workers": min(config.workers, rows.rows.num_shards)}
    with warnings.catch_warnings():  # torchdata 0.11 calls what torch 2.14 deprecated
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        loader = StatefulDataLoader(rows, config.batch_size, **options)
    if state is not None:
        loader.load_state_dict(state)
    return loader


class TrainingStream:
    """An endless iterator of training batches that knows where it is.

    Args:
        config: the source, the crop and the batch size.
        seed: of order and crops.
        rank: which of `world` processes this is.
        world: how many processes share the data.
        start: pictures that all processes together have had before (sources with random access).
        state: what `state_dict` returned on this process (streaming sources).
        channels: of the pictures wanted.

    Raises:
        UserError: the source cannot be opened or holds no readable picture.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        state: dict[str, Any] | None = None,
        channels: int = 3,
    ) -> None:
        source = require_one_readable(config, channels)
        crop = TrainingCrop(config)
        options: dict[str, Any] = {
            "collate_fn": collate,
            "pin_memory": torch.cuda.is_available(),
            "num_workers": config.workers,
            "worker_init_fn": _ignore_stop_signals,
            # Left to itself a loader draws from torch's global generator: the posterior noise of a
            # resumed run would differ from that of one never stopped.
            "generator": torch.Generator(),
        }
        self.plan: BucketPlan | None = None
        self._unreadable: list[Skipped] = []
        if config.streaming:
            self._loader: DataLoader | StatefulDataLoader = _stream_loader(
                _Streamed(source, crop, seed, rank, world), config, options, state
            )
        elif config.buckets is not None:
            sizes, unreadable = picture_sizes(source)
            self._unreadable = unreadable if rank == 0 else []  # each is told once
            self.plan = BucketPlan(config, sizes, seed, world)
            shares = _Shares(self.plan, rank, start)
            self._loader = DataLoader(
                _Bucketed(source, crop, self.plan), batch_sampler=shares, **options
            )
        else:
            tickets = _Tickets(len(source.rows), config.batch_size, seed, rank, world, start)
            self._loader = DataLoader(
                _Indexed(source, crop, seed), batch_sampler=tickets, **options
            )
        self.source, self._rank = source, rank
        # Pictures of one pass; None where nobody knows before the stream ends.
        self.epoch: int | None = None if config.streaming else len(source.rows)
        # Batches of one pass, of all processes together, on average.
        self.batches: float | None = None
        if self.plan is not None:
            self.batches = self.plan.batches_per_epoch
        elif self.epoch is not None:
            self.batches = self.epoch / (world * config.batch_size)
        self._batches = iter(self._loader)
        self._finalizer = weakref.finalize(self, _end_workers, self._batches)
        # Before multiprocessing's own end, which would wait for workers that ignore its signal.
        atexit.register(self._finalizer)

    def close(self) -> None:
        """Ends the loader's workers; there are no batches afterwards."""
        self._finalizer()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
            batch.skipped.extend(self._unreadable)
            self._unreadable = []
            return batch
        except StopIteration:
            raise UserError(
                f"process {self._rank} finds no picture in its share of the stream; take fewer "
                "processes, more shards, or data.streaming: false"
            ) from None

    def state_dict(self) -> dict[str, Any] | None:
        """The position of a streaming source; None where the picture count says it all."""
        if isinstance(self._loader, StatefulDataLoader):
            return self._loader.state_dict()
        return None


def require_one_readable(config: SourceConfig, channels: int = 3) -> Source:
    """Opens a source and reads up to the first picture that can be read.

    Raises:
        UserError: the source cannot be opened, or there is none.
    """
    source = open_source(config, channels)
    count, reason = 0, ""
    for row in source.rows:
        try:
            source.picture(row)
            return source
        except UnreadableImage as error:
            count, reason = count + 1, str(error)
    if count:
        raise UserError(
            f"none of the {count} pictures at {config.path} can be read; the last: {reason}"
        )
    raise UserError(f"there is no picture at {config.path}")
