"""Signals that ask a run to stop: it finishes the step, saves, and exits with 0."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import distributed as dist

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Listens for SIGTERM and SIGUSR1, and makes all processes hear them at the same step.

    Processes are told at different times, or only one of them is. Each step they exchange a flag
    over a group of their own on the host, which no GPU waits for; it is read a step later, when it
    has long arrived.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._group: Any = None
        self._flag = torch.zeros(1)
        self._work: dist.Work | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._work is not None and error is None:
            self._work.wait()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def connect(self) -> None:
        """Opens the group; call on every process once the processes know each other."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    def agreed(self) -> bool:
        """Whether to stop after this step: the same answer on every process."""
        if self._group is None:
            return self.name is not None
        if self._work is not None:
            self._work.wait()
            if self._flag.item():
                self.name = self.name or "a signal to another process"
                self._work = None
                return True
        self._flag = torch.tensor([float(self.name is not None)])
        self._work = dist.all_reduce(self._flag, group=self._group, async_op=True)
        return False
