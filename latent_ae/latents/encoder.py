"""The encoder on its device: pictures of one size wait there until they fill a batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latent_ae.config import Storage
from latent_ae.data import normalize
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.latents.chunks import Chunk

__all__ = ["DTYPES", "BatchEncoder", "Batches", "EncodedBatch"]

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "int32": torch.int32,
}


@dataclass
class EncodedBatch:
    """Codes on their way to the host.

    Attributes:
        size: of the pictures, (H, W).
        tensors: `mean` and `logvar`, or `indices`, each of shape (B, …), in the stored type.
        finite: of shape (B,), whether all of a code's values are.
        checks: of the pictures, so that no other's codes are taken for theirs.
        ready: CUDA events around the work; None on a CPU.
        seconds: that the encoder took, known at once on a CPU.
        replayed: it comes from an earlier run's spool.
    """

    size: tuple[int, int]
    tensors: dict[str, Tensor]
    finite: Tensor
    checks: list[int] = field(default_factory=list)
    ready: tuple[Any, Any] | None = None
    seconds: float = 0.0
    replayed: bool = False

    def wait(self) -> EncodedBatch:
        """Blocks until the host has it."""
        if self.ready is not None:
            began, ended = self.ready
            ended.synchronize()
            # Out of the pinned pool, which stays small so.
            self.tensors = {name: t.clone() for name, t in self.tensors.items()}
            self.seconds, self.ready = began.elapsed_time(ended) / 1000, None
        return self


class Batches:
    """Fills batches of one size within a unit.

    A batch never spans two units: so which pictures meet in one, and with it every bit of the
    result, is the same in every run, for any number of processes.

    Args:
        device: where the pictures wait.
        batch_size: pictures a batch.
    """

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self.device, self.batch_size = device, batch_size
        self._waiting: dict[tuple[int, int], list[Tensor]] = {}
        self._checks: dict[tuple[int, int], list[int]] = {}

    def add(self, chunk: Chunk, full: Callable[[Tensor, list[int]], None]) -> None:
        """Takes a chunk in; `full` is given the pictures and checksums of each complete batch.

        The pictures are uint8, a quarter of what floats would be on their way to the device.
        """
        for size, images in chunk.images.items():
            waiting = self._waiting.setdefault(size, [])
            waiting.append(images.to(self.device, non_blocking=True))
            self._checks.setdefault(size, []).extend(chunk.checks[size])
            while sum(map(len, waiting)) >= self.batch_size:
                full(*self._take(size, self.batch_size))
        if chunk.ends_unit:
            for size, waiting in sorted(self._waiting.items()):
                if rest := sum(map(len, waiting)):
                    full(*self._take(size, rest))

    def _take(self, size: tuple[int, int], count: int) -> tuple[Tensor, list[int]]:
        waiting, checks = self._waiting[size], self._checks[size]
        taken, checks[:] = checks[:count], checks[count:]
        if len(waiting) == 1 and len(waiting[0]) == count:  # no copy where chunks are batches
            return waiting.pop(), taken
        images = torch.cat(waiting)
        waiting[:] = [images[count:]] if len(images) > count else []
        return images[:count], taken


class BatchEncoder:
    """An autoencoder and what to keep of its codes.

    Args:
        frozen: the autoencoder.
        storage: what to keep.
    """

    def __init__(self, frozen: FrozenAutoencoder, storage: Storage) -> None:
        self.frozen, self.storage = frozen, storage
        self.dtype = DTYPES[storage.dtype]

    def __call__(self, images: Tensor, checks: list[int]) -> EncodedBatch:
        """Encodes uint8 pictures of shape (B, C, H, W); on a GPU it returns before that is done."""
        size = (images.shape[2], images.shape[3])
        if self.frozen.device.type != "cuda":
            began = time.perf_counter()
            tensors, finite = self._codes(images)
            seconds = time.perf_counter() - began
            return EncodedBatch(size, tensors, finite, checks, seconds=seconds)
        with torch.cuda.device(self.frozen.device):  # whose stream the events shall be in
            events: Any = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            tensors, finite = self._codes(images)
            host = {name: _to_pinned(tensor) for name, tensor in tensors.items()}
            finite = _to_pinned(finite)
            events[1].record()
        return EncodedBatch(size, host, finite, checks, ready=(events[0], events[1]))

    @torch.no_grad()
    def _codes(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        mean, logvar = self.frozen.encode(normalize(images))
        finite = mean.flatten(1).isfinite().all(1)
        if self.storage.kind == "indices":
            found = self.frozen.indices(mean).to(self.dtype)
            return {"indices": found if self.frozen.codes > 1 else found[:, 0]}, finite
        tensors = {"mean": mean.to(self.dtype)}
        if self.storage.kind == "moments" and logvar is not None:
            tensors["logvar"] = logvar.to(self.dtype)
        for tensor in tensors.values():
            finite = finite & tensor.flatten(1).isfinite().all(1)
        return {name: t.contiguous() for name, t in tensors.items()}, finite


def _to_pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
