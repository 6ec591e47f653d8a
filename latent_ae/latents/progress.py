"""How far an encoding is, how fast, and what it waits for."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["EncodeProgress"]

_QUIET_SECONDS = 30  # between two lines where there is no terminal


class EncodeProgress:
    """A bar of this process's pictures: speed, the encoder's share of the time, the data's.

    Args:
        console: where it is shown; nothing is, when left out.
        total: pictures of this process's share; None for a stream.
        title: what stands before the bar.

    Attributes:
        pictures: taken from the source so far, readable or not.
        codes: encoded so far, without those of an earlier run.
        encoder_seconds: that the encoder's device was busy.
        waiting_seconds: that the encoder waited for data.
    """

    def __init__(self, console: Console | None, total: int | None, title: str = "encode") -> None:
        self.console = console
        self.pictures = self.codes = 0
        self.encoder_seconds = self.waiting_seconds = 0.0
        self.began = self._told = time.perf_counter()
        self._lock = threading.Lock()  # the writer's thread reports what has left the device
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=console is None or not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, words="")

    def __enter__(self) -> EncodeProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, pictures: int) -> None:
        """Counts pictures that have come from the source."""
        self.pictures += pictures
        self._bar.update(self._task, completed=self.pictures, words=self.words())
        now = time.perf_counter()
        quiet = self.console is not None and not self.console.is_terminal
        if quiet and now - self._told > _QUIET_SECONDS:
            self._told = now
            self.console.print(f"{self.pictures} pictures · {self.words()}", style="dim")  # pyright: ignore

    def encoded(self, codes: int, seconds: float) -> None:
        """Counts codes that have left the encoder, and its time."""
        with self._lock:
            self.codes += codes
            self.encoder_seconds += seconds

    def words(self) -> str:
        """Speed and shares since the start."""
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        encoder, data = (s / elapsed for s in (self.encoder_seconds, self.waiting_seconds))
        return f"{self.codes / elapsed:.1f} images/s · encoder {encoder:.0%} · data wait {data:.0%}"
