"""Some pictures of a latents folder on their way into a folder of their own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save
from torch import Tensor

from latent_ae.errors import UserError
from latent_ae.latents.files import write_whole
from latent_ae.latents.format import TENSORS, LatentsManifest, picture_starts, tensor_name
from latent_ae.latents.keys import make_keys_unique
from latent_ae.latents.plan import Unit
from latent_ae.latents.rewrite import (
    finish_folder,
    renumbered,
)
from latent_ae.latents.shards import MappedShard
from latent_ae.latents.statistics import Moments
from latent_ae.latents.writer import write_index

__all__ = ["Part"]


class Part:
    """A folder on its way that gets some of another's pictures, a shard of them in memory.

    Args:
        folder: to be filled.
        source: the other's folder.
        manifest: the other's.
    """

    def __init__(self, folder: Path, source: Path, manifest: LatentsManifest) -> None:
        self.folder, self.source, self.manifest = folder, source, manifest
        self.units: list[Unit] = []
        self.pictures = 0  # of all shards
        self._empty()

    def _empty(self) -> None:
        self._held = 0  # pictures of the open shard
        self._tables: list[pa.Table] = []
        self._codes: dict[str, dict[tuple[int, int], list[Tensor]]] = {}
        self._counts: dict[tuple[int, int], int] = {}

    def add(self, table: pa.Table, shard: MappedShard) -> None:
        """Takes in pictures of a shard; writes one of its own whenever that is full."""
        starts = [*picture_starts(table), len(table)]
        first, pictures = 0, len(starts) - 1
        while first < pictures:
            end = min(pictures, first + self.manifest.storage.shard_rows - self._held)
            self._take(table.slice(starts[first], starts[end] - starts[first]), shard)
            self._held += end - first
            self.pictures += end - first
            first = end
            if self._held == self.manifest.storage.shard_rows:
                self._write()

    def finish(self, name: str) -> LatentsManifest:
        """Writes the last shard and the manifest; raises `UserError` where there is no code."""
        if self._held:
            self._write()
        renamed = make_keys_unique(self.folder, self.units)  # version 1 did not see to it
        data = {"source": "split", "path": str(self.source.resolve()), "split": name}
        data |= {"rows": self.pictures, "files": None, "limit": None, "fingerprint": ""}
        manifest = finish_folder(
            self.folder,
            self.units,
            self.manifest,
            data=self.manifest.data.model_copy(update=data),
            renamed=renamed,
        )
        if not manifest.count:
            raise UserError(
                f"{name} would get no latents of {self.source}; give it a larger share, or take "
                "another seed"
            )
        return manifest

    def _take(self, table: pa.Table, shard: MappedShard) -> None:
        """Copies the codes of some pictures and numbers them anew."""
        buckets = self.manifest.preprocessing.buckets
        row, height, width = (
            table[name].fill_null(-1).to_numpy().astype(np.int64)
            for name in ("row", "latent_height", "latent_width")
        )
        new = np.full(len(table), -1, np.int32)
        for size in sorted({shape[-2:] for shape in self.manifest.latent_shapes}):
            own = (row >= 0) & (height == size[0]) & (width == size[1])
            if buckets and not own.any():
                continue
            count = self._counts.get(size, 0)
            self._counts[size] = count + int(own.sum())
            new[own] = np.arange(count, self._counts[size])
            for name in TENSORS[self.manifest.storage.kind]:
                codes = _codes(shard, tensor_name(name, size, buckets), row[own])
                self._codes.setdefault(name, {}).setdefault(size, []).append(codes)
        place = table.schema.get_field_index("row")
        numbers = pa.array(new, pa.int32(), mask=new < 0)
        first = self.pictures
        self._tables.append(renumbered(table.set_column(place, "row", numbers), first))

    def _write(self) -> None:
        unit = Unit(len(self.units))
        self.units.append(unit)
        buckets = self.manifest.preprocessing.buckets
        tensors = {
            name: {size: torch.cat(parts) for size, parts in sorted(sizes.items())}
            for name, sizes in self._codes.items()
        }
        by_name = {
            tensor_name(name, size, buckets): tensor
            for name, sizes in tensors.items()
            for size, tensor in sizes.items()
        }
        content = save(by_name)
        write_whole(self.folder / unit.shard, content)
        means, logvars = (list(tensors.get(name, {}).values()) for name in ("mean", "logvar"))
        table, sha256 = pa.concat_tables(self._tables), hashlib.sha256(content).hexdigest()
        write_index(self.folder, unit, table, sha256, Moments.of(means, logvars))
        self._empty()


def _codes(shard: MappedShard, name: str, rows: np.ndarray) -> Tensor:
    try:
        return shard.rows(name, rows)
    except (KeyError, IndexError) as error:
        raise UserError(
            f"{shard.file.parent} is damaged: {shard.file.name} and its index disagree about {name}"
        ) from error
