"""Shards and their indices, written by a thread while the next ones are encoded."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import save
from torch import Tensor

from latent_ae.errors import UserError
from latent_ae.latents.chunks import Row
from latent_ae.latents.encoder import DTYPES, EncodedBatch
from latent_ae.latents.files import disk_full_is_told, write_whole
from latent_ae.latents.format import (
    INDEX_COLUMNS,
    TENSORS,
    ShardRecord,
    index_bytes,
    picture_starts,
    tensor_name,
)
from latent_ae.latents.plan import Plan, Unit
from latent_ae.latents.spool import Spool
from latent_ae.latents.statistics import Moments

__all__ = ["OpenShard", "ShardWriter", "index_table", "write_index", "write_shard"]


_SURELY_BROKEN = 32  # codes, when none of them is finite


class OpenShard:
    """A unit on its way: what is known of its rows, and its codes so far, by size."""

    def __init__(self, unit: Unit, spool: Spool) -> None:
        self.unit, self.spool = unit, spool
        self.rows: list[Row] = []
        self.codes: dict[tuple[int, int], list[EncodedBatch]] = {}
        self.last = False

    def add(self, batch: EncodedBatch) -> None:
        """Takes in a batch of one size."""
        self.codes.setdefault(batch.size, []).append(batch)

    def tensors(self, plan: Plan) -> dict[str, dict[tuple[int, int], Tensor]]:
        """The tensors by name and size of picture, without the codes that are not finite.

        Marks these, and numbers the others.

        Raises:
            UserError: not one of the first, or of many, is finite: the fault is not the pictures'.
        """
        kept: dict[tuple[int, int], Tensor] = {}
        for size, batches in self.codes.items():
            kept[size] = torch.cat([batch.finite for batch in batches])
        codes = sum(map(len, kept.values()))
        enough = codes >= _SURELY_BROKEN or self.unit in (Unit(0), Unit(0, 0))
        if codes and enough and not any(finite.any() for finite in kept.values()):
            first = next(row.key for row in self.rows if row.skipped is None)
            raise UserError(
                f"no code of {codes} is finite, {first}'s the first; take "
                f"another --precision than {plan.storage.precision} or another --dtype than "
                f"{plan.storage.dtype}, or check the autoencoder"
            )
        places = {size: iter(finite.tolist()) for size, finite in kept.items()}
        for row in self.rows:
            if row.size is not None and not next(places[row.size]):
                row.skipped = f"its code is not finite in {plan.storage.dtype}"
        found: dict[str, dict[tuple[int, int], Tensor]] = {}
        for size in sorted(self.codes):
            for name in self.codes[size][0].tensors:
                whole = torch.cat([batch.tensors[name] for batch in self.codes[size]])
                every = kept[size].all()
                found.setdefault(name, {})[size] = whole if every else whole[kept[size]]
        return found


class ShardWriter(threading.Thread):
    """Receives batches and finished units in order; what goes wrong is raised where it is fed.

    Args:
        folder: the latents folder.
        plan: what it holds.
        kept: the columns carried into the index, with their Arrow types.
        encoded: called with each batch that the host has, from this thread.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        kept: dict[str, pa.DataType],
        encoded: Callable[[EncodedBatch], None] = lambda batch: None,
    ) -> None:
        super().__init__(name="latents writer", daemon=True)
        self.folder, self.plan, self.kept = folder, plan, kept
        self.encoded = encoded
        # Bounded: an encoder that is faster than the disk has to wait.
        self._queue: queue.Queue[tuple[OpenShard, EncodedBatch | None] | None] = queue.Queue(8)
        self._error: BaseException | None = None
        self.start()

    def batch(self, shard: OpenShard, batch: EncodedBatch) -> None:
        """Hands over a batch that is perhaps still on its way from the device."""
        self._put((shard, batch))

    def finish(self, shard: OpenShard) -> None:
        """Hands over a unit whose last batch has been handed over."""
        self._put((shard, None))

    def close(self) -> None:
        """Waits until everything is written; raises what went wrong."""
        self._queue.put(None)  # also after an error, when the thread only empties the queue
        self.join()
        self._raise()

    def _put(self, item: Any) -> None:
        self._raise()
        self._queue.put(item)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        """The thread's work; after an error it only empties the queue, so that nobody waits."""
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue
            shard, batch = item
            try:
                if batch is None:
                    write_shard(self.folder, self.plan, shard, self.kept)
                    shard.spool.remove()
                else:
                    batch.wait()
                    self.encoded(batch)
                    if not batch.replayed:
                        with disk_full_is_told(shard.spool.path):
                            shard.spool.append(batch)
                    shard.add(batch)
            except BaseException as error:
                self._error = error


def write_shard(folder: Path, plan: Plan, shard: OpenShard, kept: dict[str, pa.DataType]) -> None:
    """Writes a unit's tensors, then its index."""
    found = shard.tensors(plan)
    buckets, unit = plan.preprocessing.buckets, shard.unit
    factor = plan.autoencoder.downsampling
    by_name = {
        tensor_name(name, (size[0] // factor, size[1] // factor), buckets): tensor
        for name, sizes in found.items()
        for size, tensor in sizes.items()
    }
    if not by_name and not buckets:
        by_name = _empty(plan)
    file = folder / unit.shard
    content = save(by_name)  # its `save_file` would leave a stray file in the folder when killed
    write_whole(file, content)
    means, logvars = (list(found.get(name, {}).values()) for name in ("mean", "logvar"))
    sha256 = hashlib.sha256(content).hexdigest()
    table = index_table(shard.rows, factor, kept)
    write_index(folder, unit, table, sha256, Moments.of(means, logvars), shard.last)


def write_index(
    folder: Path,
    unit: Unit,
    table: pa.Table,
    sha256: str,
    moments: Moments | None,
    last: bool = False,
) -> None:
    """Writes the index of a shard that is there, with its record in it.

    Args:
        folder: the folder to be finished.
        unit: the shard.
        table: a row for each code and each picture without one.
        sha256: of the shard.
        moments: of its codes.
        last: whether it ends a file of a stream.
    """
    encoded = table.filter(table["row"].is_valid())
    labels = encoded["label"].drop_null().to_numpy()
    pictures = len(picture_starts(encoded))
    record = ShardRecord(
        file=unit.shard,
        index=unit.index,
        rows=len(encoded),
        sha256=sha256,
        pictures=pictures,
        skipped=len(picture_starts(table)) - pictures,
        highest_label=int(labels.max()) if len(labels) else -1,
        last=last,
        moments=moments,
    )
    write_whole(folder / unit.index, index_bytes(table, record))


def index_table(rows: list[Row], factor: int, kept: dict[str, pa.DataType]) -> pa.Table:
    """The index of a shard; `row` counts the codes of each size, in their order."""
    counts: dict[tuple[int, int], int] = {}
    columns: dict[str, list[Any]] = {name: [] for name in (*INDEX_COLUMNS, *map(_free_name, kept))}
    for row in rows:
        place, latent = None, (None, None)
        if row.skipped is None and row.size is not None:
            place = counts.get(row.size, 0)
            counts[row.size] = place + 1
            latent = (row.size[0] // factor, row.size[1] // factor)
        own = vars(row) | {"latent_height": latent[0], "latent_width": latent[1], "row": place}
        for name in INDEX_COLUMNS:
            columns[name].append(own[name])
        for name in kept:
            columns[_free_name(name)].append(row.kept[name])
    types = INDEX_COLUMNS | {_free_name(name): kind for name, kind in kept.items()}
    return pa.table({name: pa.array(columns[name], types[name]) for name in columns})


def _free_name(name: str) -> str:
    """A kept column's in the index, whose own `width` is not the data set's."""
    return f"data.{name}" if name in INDEX_COLUMNS else name


def _empty(plan: Plan) -> dict[str, Tensor]:
    """The tensors of a shard none of whose pictures could be read."""
    shape, dtype = plan.latent_shapes[0], DTYPES[plan.storage.dtype]
    return {name: torch.empty((0, *shape), dtype=dtype) for name in TENSORS[plan.storage.kind]}
