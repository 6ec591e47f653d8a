"""Latents for a denoiser: read memory-mapped, sampled and scaled when read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latent_ae.errors import UserError
from latent_ae.latents.entries import quantizer_for
from latent_ae.latents.format import read_manifest, tensor_name
from latent_ae.latents.index import LatentIndex
from latent_ae.latents.shards import MappedShard

if TYPE_CHECKING:
    import datasets

__all__ = ["LatentDataset"]


class LatentDataset(Dataset):
    """A latents folder as a map-style data set.

    An item is a dict: `latents`, float32 of shape (c, h, w), or `indices`, int64 of shape (h, w)
    (where a position has several codes, (codes, h, w)); and the columns asked for; `label` is −1
    where there is none.

    Args:
        folder: what `encode` wrote.
        sample: draw z = μ + σ·ε anew at each reading; else, or without a posterior, the mode μ.
        scale: give final latents, scaled as the autoencoder's config says; else raw ones.
        variants: `all`: each stored crop and mirror image is an item; `draw`: each picture is one,
            of which every reading draws a variant.
        columns: of the index, to go with each item.
        seed: makes all draws a function of seed, epoch (`set_epoch`) and position; left out, they
            come from torch's global generator, anew at each reading.
        entries_of: the folder of the autoencoder that gave the indices: then an item has, in their
            place, `latents`: the entries that its decoder receives, with `scale` as all latents.

    Raises:
        UserError: the folder is unfinished, damaged, of another format, or has no such column; or
            it holds no indices of the codebook in `entries_of`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        sample: bool = True,
        scale: bool = True,
        variants: Literal["all", "draw"] = "all",
        columns: Sequence[str] = ("label", "key"),
        seed: int | None = None,
        entries_of: str | Path | None = None,
    ) -> None:
        if variants not in ("all", "draw"):
            raise UserError(f"variants {variants!r} is unknown; valid: all, draw")
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.sample, self.scale, self.variants, self.seed = sample, scale, variants, seed
        self.columns = tuple(columns)
        self._quantizer = None
        if entries_of is not None:
            self._quantizer = quantizer_for(entries_of, self.folder, self.manifest)
        self.index = LatentIndex(self.folder, self.manifest, self.columns)
        self._columns = self._arrays()
        self._shift, self._factor = self.manifest.autoencoder.shift_and_factor(torch.empty(0))
        # In shared memory, so that workers which outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._shards: dict[int, MappedShard] = {}
        for number, shard in enumerate(self.manifest.shards):
            if shard.rows:
                self._shard(number)  # what is missing or torn shall be known now

    def __len__(self) -> int:
        return len(self.index.picture) - 1 if self.variants == "draw" else len(self.index)

    def set_epoch(self, epoch: int) -> None:
        """Other draws from now on, in every worker too; only matters with a `seed`."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """What `set_epoch` has said last."""
        return int(self._epoch)

    def size_of(self, position: int) -> tuple[int, int]:
        """Height and width of an item's latents; with `draw` its variants have the same."""
        code = self.index.picture[position] if self.variants == "draw" else position
        return self.index.sizes[int(self.index.size[code])]

    def __getitem__(self, position: int) -> dict[str, Any]:
        """An item; negative positions count from the end."""
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        position %= len(self)
        generator = self._generator(position)
        code = self._code(position, generator)
        item: dict[str, Any] = {}
        if self.manifest.storage.kind == "indices" and self._quantizer is None:
            item["indices"] = self._stored("indices", code).to(torch.int64)
        else:
            item["latents"] = self._latents(code, generator)
        for name, column in self._columns.items():
            value = column[code].as_py()
            item[name] = -1 if name == "label" and value is None else value
        return item

    def moments(self, position: int) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of a code, raw, float32, each of shape (c, h, w).

        Raises:
            UserError: the folder holds no moments.
        """
        if self.manifest.storage.kind != "moments":
            raise UserError(f"{self.folder} holds {self.manifest.storage.kind}, no moments")
        mean, logvar = (self._stored(name, position) for name in ("mean", "logvar"))
        return mean.float(), logvar.float()

    def to_datasets(self) -> datasets.Dataset:
        """The same as a `datasets.Dataset`, whose rows are read from the shards when asked for."""
        import datasets
        import pyarrow as pa

        table = self.index.table
        if self.variants == "draw":
            table = table.take(pa.array(self.index.picture[:-1]))
        place = "__position__"
        table = table.append_column(place, pa.array(np.arange(len(self), dtype=np.int64)))

        def read(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            if place not in batch:  # only some columns are asked for, such as by a filter
                return batch
            items = [self[position] for position in batch[place]]
            return {name: [item[name] for item in items] for name in items[0]}

        return datasets.Dataset(table).with_transform(read)

    def _arrays(self) -> dict[str, Any]:
        """The columns as whole Arrow arrays, whose values are quicker to get than a table's."""
        names = self.columns if len(self.index) else ()
        return {name: self.index.table[name].chunk(0) for name in names}

    def _code(self, position: int, generator: torch.Generator | None) -> int:
        if self.variants == "all":
            return position
        first, end = (int(i) for i in self.index.picture[position : position + 2])
        return first + int(torch.randint(end - first, (), generator=generator))

    def _latents(self, code: int, generator: torch.Generator | None) -> Tensor:
        latents = self._mode(code)
        if self.sample and self.manifest.storage.kind == "moments":
            std = self._stored("logvar", code).float().mul_(0.5).exp_()
            latents += torch.randn(latents.shape, generator=generator).mul_(std)
        # As `LatentScaling.to_final`, whose tensors would be made anew for each item.
        return latents.sub_(self._shift).mul_(self._factor) if self.scale else latents

    def _mode(self, code: int) -> Tensor:
        """The raw mean or, of indices, the entries; float32 of shape (c, h, w)."""
        if self._quantizer is None:
            return self._stored("mean", code).float()
        indices = self._stored("indices", code).to(torch.int64)
        return self._quantizer.entries(indices.view(1, -1, *indices.shape[-2:]))[0].float()

    def _stored(self, name: str, code: int) -> Tensor:
        size = self.index.sizes[int(self.index.size[code])]
        name = tensor_name(name, size, self.manifest.preprocessing.buckets)
        return self._shard(int(self.index.shard[code])).rows(name, int(self.index.row[code]))

    def _shard(self, number: int) -> MappedShard:
        if (shard := self._shards.get(number)) is None:
            shard = MappedShard(self.folder / self.manifest.shards[number].file)
            self._shards[number] = shard
        return shard

    def _generator(self, position: int) -> torch.Generator | None:
        if self.seed is None:
            return None
        parts = f"{self.seed} {self.epoch} {position}".encode()
        mixed = hashlib.blake2b(parts, digest_size=8).digest()  # NumPy's SeedSequence takes 18 µs
        return torch.Generator().manual_seed(int.from_bytes(mixed, "little"))

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker maps the files itself; the columns are the table's, and travel with it.
        return {k: v for k, v in self.__dict__.items() if k != "_columns"} | {"_shards": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._columns = self._arrays()
