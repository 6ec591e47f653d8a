"""Shards mapped into memory: rows without a copy of the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_ae.errors import UserError

__all__ = ["MappedShard"]

# NumPy has no bfloat16: its bits are read as integers and seen as what they are by torch.
_TYPES = {
    "F16": (np.int16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),
    "F32": (np.float32, torch.float32),
    "U8": (np.uint8, torch.uint8),
    "U16": (np.uint16, torch.uint16),
    "I32": (np.int32, torch.int32),
    "I64": (np.int64, torch.int64),
}


_UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)


class MappedShard:
    """The tensors of a safetensors file, by name, read where they lie.

    Written here because the library's own slices take four times as long for a row (its format is
    a length, a JSON header and the bytes: https://github.com/huggingface/safetensors).

    Raises:
        UserError: the file is missing or damaged.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if 8 + length > file.stat().st_size:
                    raise ValueError("its header is cut off")
                header = json.loads(stream.read(length))
            # Mapped by torch, which keeps no descriptor: a folder may have more shards than a
            # process may have open files, and Python's mmap keeps one each.
            size = file.stat().st_size
            mapped = torch.UntypedStorage.from_file(str(file), False, size)
            self._bytes = torch.empty(0, dtype=torch.uint8).set_(mapped).numpy()  # pyright: ignore
            header.pop("__metadata__", None)
            self._arrays = {name: self._array(8 + length, **h) for name, h in header.items()}
        except FileNotFoundError as error:
            raise UserError(f"{file.parent} is damaged: {file.name} is missing") from error
        except _UNREADABLE as error:
            raise UserError(f"{file.parent} is damaged: {file.name}: {error}") from error

    def _array(self, start: int, **header: Any) -> tuple[np.ndarray, torch.dtype]:
        stored, dtype = _TYPES[header["dtype"]]
        shape, (begin, end) = header["shape"], header["data_offsets"]
        count = int(np.prod(shape))
        if count * np.dtype(stored).itemsize != end - begin or start + end > len(self._bytes):
            raise ValueError(f"its header does not fit its {len(self._bytes)} bytes")
        return self._bytes[start + begin : start + end].view(stored).reshape(shape), dtype

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def names(self) -> list[str]:
        """Of its tensors."""
        return list(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._arrays[name][0].shape

    def rows(self, name: str, rows: np.ndarray | int | slice) -> Tensor:
        """A copy of some rows of a tensor, in the stored type."""
        array, dtype = self._arrays[name]
        return torch.from_numpy(np.array(array[rows])).view(dtype)
