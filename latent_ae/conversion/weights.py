"""Tensors in files: read one by one, never unpickled, compared bit by bit."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from latent_ae.autoencoder import weight_files
from latent_ae.errors import UserError

__all__ = ["PICKLED", "WeightFile", "folder_weights", "same_bits", "serialized"]

PICKLED = (".ckpt", ".pt", ".pth", ".bin")


class WeightFile:
    """The tensors of a safetensors file or of a checkpoint that `torch.load` may read safely.

    Names and shapes are known at once; a tensor is read when it is asked for, so the seven
    gigabytes beside a first stage stay on the disk.

    Args:
        path: `.safetensors`, or `.ckpt`, `.pt`, `.pth`, `.bin`.

    Attributes:
        shapes: of each tensor, by name.
        metadata: the strings that a safetensors file may carry.

    Raises:
        UserError: no such file, another kind of file, or one that holds more than tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]]
        self.metadata: dict[str, str] = {}
        self.tensor: Callable[[str], Tensor]
        if not self.path.is_file():
            raise UserError(f"there is no file {self.path}")
        if self.path.suffix == ".safetensors":
            self._open_safetensors()
        elif self.path.suffix in PICKLED:
            tensors = _unpickled(self.path)
            self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            self.tensor = tensors.__getitem__
        else:
            raise UserError(
                f"{self.path} is of no known kind; valid: .safetensors, {', '.join(PICKLED)}"
            )

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU and in their own dtype."""
        return {name: self.tensor(name) for name in names}

    def _open_safetensors(self) -> None:
        try:
            file: Any = safe_open(self.path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path} is no whole safetensors file: {error}") from error
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        self.metadata = file.metadata() or {}
        self.tensor = file.get_tensor


def _unpickled(path: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors: those under `state_dict`, where there is one, or at its top."""
    try:
        # Mapped where the format allows it: what is not asked for is not read.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is damaged, or holds more than tensors, which only an unsafe load would read; "
            f"save its state_dict alone, best as safetensors ({_first_line(error)})"
        ) from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    tensors = content if isinstance(content, dict) else {}
    tensors = {
        name: value
        for name, value in tensors.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        found = f"; it has {', '.join(map(str, content))}" if isinstance(content, dict) else ""
        raise UserError(f"{path} holds no tensors, at its top or under `state_dict`{found}")
    return tensors


def _first_line(error: Exception) -> str:
    # torch's first sentence speaks of an unsafe option; the reason follows.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    line = (reasons or lines or [type(error).__name__])[0]
    return line.removeprefix("WeightsUnpickler error: ").split(". ")[0]


def folder_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a diffusers folder, in the dtypes that they are stored in.

    Raises:
        UserError: there are none, or a file of theirs is missing or damaged.
    """
    pickled = folder / "diffusion_pytorch_model.bin"
    try:
        files = weight_files(folder)
    except UserError:
        if not pickled.is_file():
            raise
        files = [pickled]
    tensors: dict[str, Tensor] = {}
    for path in files:
        file = WeightFile(path)
        tensors |= file.read(file.shapes)
    return tensors


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit, NaN included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    views = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*views)


def serialized(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file of these tensors, the same bytes each time.

    safetensors writes its metadata in a random order; here the header is put in order again.
    """
    content = save(tensors, metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text + content[start:]
