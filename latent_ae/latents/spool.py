"""What a unit that is not whole yet has encoded, so that a kill costs a few batches."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load, save

from latent_ae.latents.encoder import EncodedBatch

__all__ = ["Spool"]

_HEAD = 16  # length and checksum of a record, 8 bytes each


class Spool:
    """A file of batches in their order; a torn end is cut off.

    A kill leaves what the process has written; only after a power cut may the file end early or in
    rubbish, which the checksums tell. So nothing here waits for the disk.

    Args:
        path: the file; what it holds is read back, as far as it is whole.
        identity: what must be the same for its batches to be those of this run.

    Attributes:
        batches: that it holds from before.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self._identity = json.dumps(identity, sort_keys=True).encode()
        self._ends: list[int] = []  # of the records, in bytes
        self.batches = self._read() if path.exists() else []
        if not self.batches:
            path.unlink(missing_ok=True)

    def append(self, batch: EncodedBatch) -> None:
        """Adds a batch that is on the host."""
        words = {"finite": batch.finite, "size": torch.tensor(batch.size)}
        words["checks"] = torch.tensor(batch.checks, dtype=torch.int64)
        records = [] if self.path.exists() else [self._identity]
        with self.path.open("ab") as file:
            for record in (*records, save(batch.tensors | words)):
                head = len(record).to_bytes(8, "little") + zlib.crc32(record).to_bytes(8, "little")
                file.write(head + record)

    def keep(self, count: int) -> None:
        """Forgets all but the first batches: the pictures behind them are others now."""
        if count < len(self.batches):
            del self.batches[count:]
            with self.path.open("rb+") as file:
                file.truncate(self._ends[count])

    def remove(self) -> None:
        """Its unit is whole."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> list[EncodedBatch]:
        found, size = [], self.path.stat().st_size
        with self.path.open("rb") as file:
            while record := self._record(file, size):
                found.append(record)
                self._ends.append(file.tell())
        if not found or found[0] != self._identity:
            return []
        with self.path.open("rb+") as file:
            file.truncate(self._ends[-1])
        batches = []
        for record in found[1:]:
            tensors = load(record)
            finite, checks = tensors.pop("finite"), tensors.pop("checks").tolist()
            high, wide = tensors.pop("size").tolist()
            batches.append(EncodedBatch((high, wide), tensors, finite, checks, replayed=True))
        return batches

    @staticmethod
    def _record(file: IO[bytes], size: int) -> bytes | None:
        head = file.read(_HEAD)
        length = int.from_bytes(head[:8], "little")
        if len(head) < _HEAD or file.tell() + length > size:
            return None
        record = file.read(length)
        return record if zlib.crc32(record) == int.from_bytes(head[8:], "little") else None
