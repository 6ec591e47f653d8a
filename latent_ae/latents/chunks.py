"""Pictures from a source to the encoder: read, decoded and cut by worker processes."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latent_ae.data import Source, UnreadableFile, UnreadableImage, Variants
from latent_ae.errors import UserError
from latent_ae.latents.plan import Plan, Unit, stream_files

__all__ = ["Chunk", "Row", "load_chunks"]


_PREFETCH = 4  # chunks that each worker has ready


@dataclass
class Row:
    """What the index says of one code, or of a picture that is not there."""

    key: str
    position: int
    label: int | None
    caption: str | None
    kept: dict[str, Any]
    width: int | None = None
    height: int | None = None
    crop_left: int | None = None
    crop_top: int | None = None
    flipped: bool | None = None
    size: tuple[int, int] | None = None  # of the crop, in pixels
    skipped: str | None = None


@dataclass
class Chunk:
    """Some neighbouring rows of a unit; `images` maps (H, W) to uint8 of shape (N, C, H, W)."""

    unit: Unit
    rows: list[Row]
    images: dict[tuple[int, int], Tensor]
    checks: dict[tuple[int, int], list[int]]  # a checksum of each image
    pictures: int
    ends_unit: bool
    ends_file: bool
    failure: str = ""  # why the run cannot go on

    def pin_memory(self) -> Chunk:
        """Called by the loader's pinning thread."""
        pinned = {size: images.pin_memory() for size, images in self.images.items()}
        return replace(self, images=pinned)


@dataclass
class _Order:
    """What a worker shall do: positions to look up or, from a stream, rows already read."""

    unit: Unit
    positions: list[int]
    rows: list[dict[str, Any]] | None = field(default=None)
    ends_unit: bool = False
    ends_file: bool = False


class _Cutter(Dataset[Chunk]):
    """Carries out orders; a loader's index may be any object that can be pickled."""

    def __init__(self, source: Source, variants: Variants) -> None:
        self.source, self.variants = source, variants

    def __getitem__(self, order: _Order) -> Chunk:
        rows: list[Row] = []
        images: dict[tuple[int, int], list[Tensor]] = {}
        failure = ""
        try:
            for place, position in enumerate(order.positions):
                content = order.rows[place] if order.rows else self.source.rows[position]
                for row, image in self._codes(order.unit, content, position):
                    rows.append(row)
                    if row.size is not None and image is not None:
                        images.setdefault(row.size, []).append(image)
        except UnreadableFile as error:  # told in words: an exception would bring a traceback along
            failure = f"{error}; the same command goes on when it can be read"
        stacked = {size: torch.stack(found) for size, found in images.items()}
        checks = {
            size: [zlib.crc32(i.numpy().data) for i in found] for size, found in images.items()
        }
        ends = (order.ends_unit, order.ends_file, failure)
        return Chunk(order.unit, rows, stacked, checks, len(order.positions), *ends)

    def _codes(
        self, unit: Unit, content: dict[str, Any], position: int
    ) -> Iterator[tuple[Row, Tensor | None]]:
        source = self.source
        key, seed = source.key(content, position), position
        if unit.part is not None:  # a stream counts anew in each file
            seed |= unit.number << 40
            key = f"{unit.number:06d}-{key}" if key == f"{position:09d}" else key
        row = Row(
            key,
            position,
            source.label(content),
            source.caption(content),
            {name: content[name] for name in source.keep},
        )
        try:
            picture = source.picture(content)
            row = replace(row, width=picture.width, height=picture.height)
            variants = self.variants(picture, seed)
        except UnreadableFile:
            raise
        except UnreadableImage as error:
            gone = isinstance(error.__cause__, FileNotFoundError) and source.root is not None
            if gone and not source.root.exists():  # pyright: ignore[reportOptionalMemberAccess]
                raise UnreadableFile(f"{source.root} is not there any more") from error
            yield replace(row, skipped=str(error)), None
            return
        for image, left, top, flipped in variants:
            size = (image.shape[1], image.shape[2])
            place = {"crop_left": left, "crop_top": top, "flipped": flipped, "size": size}
            yield replace(row, **place), image


def load_chunks(
    source: Source,
    plan: Plan,
    units: Collection[Unit],
    *,
    files: Collection[int] = (),
    share: tuple[int, int] = (0, 1),
    done: Collection[Unit] = (),
    batch_size: int,
    workers: int,
    pin: bool = False,
) -> Iterator[Chunk]:
    """The rows of this process's units, in order, cut and stacked.

    Args:
        source: what to read.
        plan: how it is divided and cut.
        units: with random access, this process's units.
        files: of a stream, this process's files.
        share: of a stream, which of how many parts of each file are this process's.
        done: units of a stream to pass over.
        batch_size: rows a chunk.
        workers: loader processes; decoding is spread over them, reading a stream is not.
        pin: put the pictures where a GPU can fetch them by itself.

    Raises:
        UserError: a file cannot be read now, which another time may be; a stream breaks off.
    """
    if plan.data.rows is not None:
        orders: Iterator[_Order] = _random_access(plan, units, batch_size)
    else:
        orders = _stream(source, plan, files, share, frozenset(done), batch_size)
    loader = DataLoader(
        _Cutter(source, Variants(plan.preprocessing)),
        batch_size=None,
        sampler=_Once(orders),
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        pin_memory=pin,
        generator=torch.Generator(),  # the global one stays as it is
    )
    for chunk in loader:
        if chunk.failure:
            raise UserError(chunk.failure)
        yield chunk


class _Once:
    """An iterator as a sampler: a loader wants something that can be iterated."""

    def __init__(self, orders: Iterator[_Order]) -> None:
        self.orders = orders

    def __iter__(self) -> Iterator[_Order]:
        return self.orders


def _random_access(plan: Plan, units: Collection[Unit], batch_size: int) -> Iterator[_Order]:
    for unit in units:
        rows = plan.rows_of(unit)
        for start in range(rows.start, rows.stop, batch_size):
            stop = min(start + batch_size, rows.stop)
            yield _Order(unit, list(range(start, stop)), ends_unit=stop == rows.stop)


def _stream(
    source: Source,
    plan: Plan,
    files: Collection[int],
    share: tuple[int, int],
    done: frozenset[Unit],
    batch_size: int,
) -> Iterator[_Order]:
    """Orders for the parts that are ours; the others are read past, undecoded."""
    own, of = share
    for number, rows in stream_files(source, plan.data.files or 1):
        if number not in files:
            continue
        for order in _file_orders(number, iter(rows), plan.storage.shard_rows, batch_size):
            part = order.unit.part or 0
            if part % of == own and order.unit not in done:
                yield order


def _file_orders(
    number: int, rows: Iterator[dict[str, Any]], shard_rows: int, batch_size: int
) -> Iterator[_Order]:
    """All of a file; one row ahead, because only its end tells which part is the last."""
    rows = _told(number, rows)
    position, ahead = 0, next(rows, None)
    order = _Order(Unit(number, 0), [], [])
    while ahead is not None:
        order.positions.append(position)
        assert order.rows is not None
        order.rows.append(ahead)
        position, ahead = position + 1, next(rows, None)
        order.ends_unit = position % shard_rows == 0 or ahead is None
        order.ends_file = ahead is None
        if order.ends_unit or len(order.positions) == batch_size:
            yield order
            order = _Order(Unit(number, position // shard_rows), [], [])
    if position == 0:
        yield replace(order, ends_unit=True, ends_file=True)


def _told(number: int, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same, what its reader raises told by place: a torn tar, a network that is gone."""
    position = -1
    try:
        for position, row in enumerate(rows):  # noqa: B007
            yield row
    except Exception as error:  # whatever a builder's reader raises
        raise UserError(
            f"file {number} of the stream breaks off after {position + 1} rows "
            f"({type(error).__name__}: {error}); repair or remove it, or run the same command again"
        ) from error
