"""One pass over pictures in their order: for measuring and for encoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from latent_ae.data.samples import Batch, Sample, Skipped, collate, read_sample
from latent_ae.data.sources import Source, open_source
from latent_ae.data.transforms import CenterCrop
from latent_ae.errors import UserError

if TYPE_CHECKING:
    from latent_ae.config import SourceConfig

__all__ = ["evaluation_batches"]


class _InOrder(Dataset):
    def __init__(self, source: Source, crop: CenterCrop) -> None:
        self.source, self.crop = source, crop

    def __len__(self) -> int:
        return len(self.source.rows)

    def __getitem__(self, index: int) -> Sample | Skipped:
        return read_sample(self.source, self.source.rows[index], index, self.crop)


class _InOrderStream(IterableDataset):
    """The rows of this process's batches, of a source without random access."""

    def __init__(
        self, source: Source, crop: CenterCrop, batch_size: int, rank: int, world: int
    ) -> None:
        self.source, self.crop, self.batch_size = source, crop, batch_size
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[Sample | Skipped]:
        for position, row in enumerate(self.source.rows):
            if position // self.batch_size % self.world == self.rank:
                yield read_sample(self.source, row, position, self.crop)


def evaluation_batches(
    config: SourceConfig | Source,
    crop: CenterCrop | int,
    *,
    batch_size: int = 8,
    workers: int = 0,
    limit: int | None = None,
    channels: int = 3,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """One pass over a source in its order, cut as `crop` says.

    Several processes take whole batches in turn, so that a picture meets the same others, and gets
    the same numbers, however many processes there are.

    Args:
        config: the source, opened or not.
        crop: how a picture is cut; a number is the side of a centre crop after a Lanczos resize.
        batch_size: pictures a batch; fewer where some are unreadable (they are in `skipped`).
        workers: loader processes.
        limit: stop after this many rows.
        channels: of the pictures wanted, where the source is not opened yet.
        rank: which of `world` processes this is.
        world: how many share the source.

    Raises:
        UserError: the source cannot be opened or, with one process, none of its pictures read.
    """
    source = config if isinstance(config, Source) else open_source(config, channels)
    source = source.first(limit)
    crop = CenterCrop(crop) if isinstance(crop, int) else crop
    options: dict[str, Any] = {
        "collate_fn": collate,
        "generator": torch.Generator(),
        "pin_memory": torch.cuda.is_available(),
    }
    if hasattr(source.rows, "__len__"):
        starts = range(rank * batch_size, len(source.rows), world * batch_size)
        batches = [range(start, min(start + batch_size, len(source.rows))) for start in starts]
        dataset: Any = _InOrder(source, crop)
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, **options)  # pyright: ignore
    else:
        dataset = _InOrderStream(source, crop, batch_size, rank, world)
        loader = DataLoader(dataset, batch_size, **options)
    found, last = 0, None
    for batch in loader:
        found += len(batch.samples)
        last = batch.skipped[-1] if batch.skipped else last
        yield batch
    if not found and world == 1:
        reason = f"; the last, {last.key}: {last.reason}" if last else ""
        raise UserError(f"no picture of the data set can be read{reason}")
