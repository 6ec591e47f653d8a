"""Activations that are read and written by rows: in memory, beside the device, or in a file."""

from __future__ import annotations

import errno
import os
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latent_ae.acceleration.moments import ChannelMoments

__all__ = ["Budget", "Rows", "Store", "strips"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Rows(ABC):
    """A picture of activations of which rows can be had.

    Attributes:
        shape: (C, H, W).
    """

    shape: tuple[int, int, int]

    @abstractmethod
    def rows(self, first: int, last: int) -> Tensor:
        """Of shape (1, C, last − first, W), in channels_last memory."""

    @abstractmethod
    def moments(self) -> ChannelMoments:
        """Of all rows."""

    @abstractmethod
    def free(self) -> None:
        """Gives back what it holds."""

    def window(self, first: int, last: int) -> tuple[Tensor, tuple[int, int]]:
        """Rows, and how many of those asked for are missing above and below the picture."""
        low, high = max(first, 0), min(last, self.shape[1])
        return self.rows(low, high), (low - first, last - high)


class Budget:
    """Bytes for activations on the device, and where what is beyond them goes.

    A CPU's go into unnamed files in `spill`, a GPU's into the memory of its host.

    Args:
        memory: bytes on the device, for stores and for the strip that is computed.
        spill: a folder on a disk; the system's for temporary files when left out.
    """

    def __init__(self, memory: float, spill: str | Path | None = None) -> None:
        self.strip = memory / 5
        self.free = memory - self.strip
        self.spill = spill
        self.held = self.most = 0  # bytes of all stores, now and at their peak

    def store(self, shape: tuple[int, int, int], like: Tensor) -> Store:
        """A place for activations of shape (C, H, W), of the type and on the device of `like`."""
        size = shape[0] * shape[1] * shape[2] * like.element_size()
        self.held += size
        self.most = max(self.most, self.held)
        if size <= self.free:
            self.free -= size
            return _InMemory(shape, size, self, like)
        if like.device.type != "cpu":
            return _OnHost(shape, size, self, like)
        return _InFile(shape, size, self, like)

    def rows_of(self, bytes_a_row: float, height: int) -> int:
        """How many rows of a picture of `height` to compute at a time; even, but for the last."""
        return min(height, max(2, int(self.strip / bytes_a_row) // 2 * 2))


class Store(Rows):
    """Rows that are written from the first to the last, and can then be written again."""

    def __init__(self, shape: tuple[int, int, int], size: int, budget: Budget) -> None:
        self.shape, self.size, self.budget = shape, size, budget
        self._moments = ChannelMoments(1, shape[0])

    def write(self, first: int, rows: Tensor, *, measure: bool = True) -> None:
        """Puts rows of shape (1, C, h, W) in; a first one at 0 begins their statistics anew."""
        if first == 0:
            self._moments = ChannelMoments(1, self.shape[0], rows.device)
        if measure:
            self._moments.add(rows)
        self._put(first, rows.permute(0, 2, 3, 1)[0])

    def moments(self) -> ChannelMoments:
        """Of what was written last."""
        return self._moments

    def free(self) -> None:
        """Gives back what it holds."""
        self.budget.held -= self.size
        self._drop()

    @abstractmethod
    def _drop(self) -> None:
        """Gives back memory or file."""

    @abstractmethod
    def _put(self, first: int, rows: Tensor) -> None:
        """Rows of shape (h, W, C)."""


class _InMemory(Store):
    def __init__(
        self, shape: tuple[int, int, int], size: int, budget: Budget, like: Tensor
    ) -> None:
        super().__init__(shape, size, budget)
        self._device = like.device
        self._held: Tensor | None = self._place(like)

    def _place(self, like: Tensor) -> Tensor:
        channels, height, width = self.shape
        return like.new_empty(height, width, channels)

    def rows(self, first: int, last: int) -> Tensor:
        assert self._held is not None
        return self._held[first:last].to(self._device).permute(2, 0, 1)[None]

    def _put(self, first: int, rows: Tensor) -> None:
        assert self._held is not None
        self._held[first : first + len(rows)] = rows

    def _drop(self) -> None:
        self._held = None
        self.budget.free += self.size


class _OnHost(_InMemory):
    def _place(self, like: Tensor) -> Tensor:
        channels, height, width = self.shape
        return like.new_empty(height, width, channels, device="cpu")

    def _drop(self) -> None:
        self._held = None


class _InFile(Store):
    def __init__(
        self, shape: tuple[int, int, int], size: int, budget: Budget, like: Tensor
    ) -> None:
        super().__init__(shape, size, budget)
        folder = budget.spill
        self._dtype, self._row = like.dtype, size // shape[1]
        self._file: Any = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115
        try:
            reserve = getattr(os, "posix_fallocate", None)  # Linux alone has it
            if reserve is not None:
                reserve(self._file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in _NO_ROOM:  # a file system that cannot reserve
                return
            self._file.close()
            raise OSError(
                error.errno,
                f"{folder or tempfile.gettempdir()} has no room for {size / 1e9:.1f} GB of "
                f"activations ({error.strerror}); allow more memory, or name another folder by "
                "`spill`",
            ) from error

    def rows(self, first: int, last: int) -> Tensor:
        channels, _, width = self.shape
        rows = torch.empty(last - first, width, channels, dtype=self._dtype)
        self._each(rows, first, self._file.readinto)
        return rows.permute(2, 0, 1)[None]

    def _put(self, first: int, rows: Tensor) -> None:
        self._each(rows.contiguous(), first, self._file.write)

    def _each(self, rows: Tensor, first: int, move: Any) -> None:
        """Moves all bytes of a contiguous tensor; a call of the system's moves 2 GB at most."""
        view = memoryview(rows.view(torch.uint8).numpy()).cast("B")  # pyright: ignore
        self._file.seek(first * self._row)
        done = 0
        while done < len(view):
            moved = move(view[done:])
            if not moved:
                raise OSError("a file of activations ends too early")
            done += moved

    def _drop(self) -> None:
        self._file.close()


def strips(height: int, count: int) -> list[tuple[int, int]]:
    """First and last row of each strip of `count` rows."""
    return [(first, min(first + count, height)) for first in range(0, height, count)]
