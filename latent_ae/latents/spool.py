"""What a unit that is not whole yet has encoded, so that a kill costs no more than a batch."""

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
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self._identity = json.dumps(identity, sort_keys=True).encode()
        self.batches = self._read() if path.exists() else []
        if not self.batches:
            path.unlink(missing_ok=True)

    def append(self, batch: EncodedBatch) -> None:
        """Adds a batch that is on the host."""
        words = {"finite": batch.finite, "size": torch.tensor(batch.size)}
        records = [] if self.path.exists() else [self._identity]
        with self.path.open("ab") as file:
            for record in (*records, save(batch.tensors | words)):
                head = len(record).to_bytes(8, "little") + zlib.crc32(record).to_bytes(8, "little")
                file.write(head + record)

    def remove(self) -> None:
        """Its unit is whole."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> list[EncodedBatch]:
        found, whole = [], 0
        with self.path.open("rb") as file:
            while record := self._record(file):
                whole += _HEAD + len(record)
                found.append(record)
        if not found or found[0] != self._identity:
            return []
        with self.path.open("rb+") as file:
            file.truncate(whole)
        batches = []
        for record in found[1:]:
            tensors = load(record)
            finite, size = tensors.pop("finite"), tensors.pop("size").tolist()
            batches.append(EncodedBatch((size[0], size[1]), tensors, finite, replayed=True))
        return batches

    @staticmethod
    def _record(file: IO[bytes]) -> bytes | None:
        head = file.read(_HEAD)
        record = file.read(int.from_bytes(head[:8], "little")) if len(head) == _HEAD else b""
        good = record and zlib.crc32(record) == int.from_bytes(head[8:], "little")
        return record if good else None
