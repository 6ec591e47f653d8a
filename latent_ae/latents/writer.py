"""Shards and indices of a latents folder, written whole."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch
from safetensors.torch import save
from torch import Tensor

from latent_ae.data import Sample
from latent_ae.errors import UserError
from latent_ae.latents.format import (
    INDEX_SCHEMA,
    ShardRecord,
    SkippedRecord,
    index_name,
    shard_name,
)

__all__ = ["ShardWriter", "write_whole"]


class ShardWriter:
    """Gathers rows and writes a shard, then its index, when there are enough."""

    def __init__(self, folder: Path, dtype: torch.dtype, shard_rows: int) -> None:
        self.folder, self.dtype, self.shard_rows = folder, dtype, shard_rows
        self.count, self.highest_label = 0, -1
        self.shards: list[ShardRecord] = []
        self.skipped: list[SkippedRecord] = []
        self._samples: list[Sample] = []
        self._means: list[Tensor] = []
        self._logvars: list[Tensor] = []

    def add(self, samples: list[Sample], mean: Tensor, logvar: Tensor) -> None:
        """Adds posteriors, each of shape (B, c, h, w); writes a shard when there are enough.

        Raises:
            UserError: moments that the stored dtype cannot hold.
        """
        for name, values in (("mean", mean), ("logvar", logvar)):
            if not torch.isfinite(values.to(self.dtype)).all():
                reason = "is not finite" if not torch.isfinite(values).all() else "overflows"
                raise UserError(
                    f"the {name} of one of {', '.join(s.key for s in samples)} {reason} in "
                    f"{self.dtype}; store float32, or check the autoencoder"
                )
        self._samples += samples
        self._means += list(mean.to(self.dtype))
        self._logvars += list(logvar.to(self.dtype))
        while len(self._samples) >= self.shard_rows:
            self._write(self.shard_rows)

    def flush(self) -> None:
        """Writes what is left as the last, smaller shard."""
        if self._samples:
            self._write(len(self._samples))

    def _write(self, rows: int) -> None:
        number = len(self.shards)
        samples, self._samples = self._samples[:rows], self._samples[rows:]
        tensors = {
            "mean": torch.stack(self._means[:rows]).contiguous(),
            "logvar": torch.stack(self._logvars[:rows]).contiguous(),
        }
        self._means, self._logvars = self._means[rows:], self._logvars[rows:]
        file = self.folder / shard_name(number)
        content = save(tensors)
        digest = hashlib.sha256(content).hexdigest()
        write_whole(file, content)
        index = pa.Table.from_pylist(
            [
                {
                    **{name: getattr(s, name) for name in ("key", "label", "caption")},
                    **{"width": s.width, "height": s.height, "shard": number, "row": row},
                }
                for row, s in enumerate(samples)
            ],
            schema=INDEX_SCHEMA,
        )
        buffer = pa.BufferOutputStream()
        pyarrow.parquet.write_table(index, buffer)
        write_whole(self.folder / index_name(number), buffer.getvalue().to_pybytes())
        record = ShardRecord(file=file.name, index=index_name(number), rows=rows, sha256=digest)
        self.shards.append(record)
        self.count += rows
        labels = [s.label for s in samples if s.label is not None]
        self.highest_label = max([self.highest_label, *labels])


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file aside, waits for the disk, renames: it appears whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
