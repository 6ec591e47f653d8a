"""What a person sees of a running training in a terminal."""

from __future__ import annotations

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["Display"]


class Display:
    """A bar of steps with the time left, and below it the newest row of the log.

    Where the output is no terminal, each row is a line instead.

    Args:
        console: where to.
        step: at which the run stands.
        steps: in all.
    """

    def __init__(self, console: Console, step: int, steps: int) -> None:
        self.console, self.steps = console, steps
        self._bar = Progress(
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("train", total=steps, completed=step)
        self._row = Text(no_wrap=True, overflow="ellipsis")
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(Group(self._bar, self._row), console=console)

    def start(self) -> None:
        """Shows the bar."""
        if self._live:
            self._live.start()

    def advance(self, step: int) -> None:
        """Moves the bar to a step."""
        self._bar.update(self._task, completed=step)

    def show(self, step: int, row: str, left: str) -> None:
        """Shows a row of the log, of the steps up to `step`; `left` is the time to the end."""
        self._row.plain = row
        if self._live is None:
            line = f"step {step}/{self.steps} · {row} · ETA {left}"
            self.console.print(line, style="dim", soft_wrap=True, highlight=False)

    def stop(self) -> None:
        """Leaves the bar as it stands."""
        if self._live:
            self._live.stop()
