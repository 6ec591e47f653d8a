"""What a run tells: a progress bar or lines, rows of JSON, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from latent_ae.data import Skipped
from latent_ae.errors import UserError
from latent_ae.run_folder import RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from latent_ae.training.run import Run

__all__ = ["RunLog"]


class RunLog:
    """Averages the terms of the steps between two rows; one synchronisation with the device a row.

    Only the main process writes. Where the output is no terminal, each row is a line instead of a
    moving bar.
    """

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console = run, console
        self.main = run.accelerator.is_main_process
        self.sums: dict[str, Tensor] = {}
        self.steps, self.first = 0, run.step
        self.since = time.perf_counter()
        self.started = self.since
        if not self.main:
            return
        _drop_rows_after(run.folder, run.step)
        self.file = run.folder.log_file.open("a", buffering=1)
        self.board = _tensorboard(run.folder.path / "tensorboard", run.step)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> RunLog:
        if self.main:
            self.bar.start()
            total = self.run.config.training.steps
            self.task = self.bar.add_task("train", total=total, completed=self.run.step, losses="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.main:
            self.bar.stop()
            self.file.close()
            self.board.close()

    def add(self, terms: dict[str, Tensor]) -> None:
        """Adds the terms of one step; nothing is read back from the device."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
        self.steps += 1
        if self.main:
            self.bar.update(self.task, completed=self.run.step)

    def write(self, rate: float) -> None:
        """Writes the row of the steps since the last one; `rate` is the learning rate."""
        self.require_finite()
        values = torch.stack([value.float() for value in self.sums.values()]) / self.steps
        # The only point where the host waits for the device.
        means = self.run.accelerator.reduce(values, reduction="mean").tolist()  # pyright: ignore
        now = time.perf_counter()
        speed = self.steps * self.run.effective_batch / (now - self.since)
        row = dict(zip(self.sums, means, strict=True))
        row |= {"learning_rate": rate, "images_per_second": speed}
        self.sums, self.steps, self.since = {}, 0, now
        if not self.main:
            return
        self.record("train", row)
        text = " ".join(f"{name} {value:.4g}" for name, value in row.items() if "_" not in name)
        text += f" · {speed:.1f} images/s"
        self.bar.update(self.task, losses=text)
        if not self.console.is_terminal:
            left = self._remaining(now)
            steps = self.run.config.training.steps
            line = f"step {self.run.step}/{steps} · {text} · ETA {left}"
            self.console.print(line, style="dim", soft_wrap=True, highlight=False)

    def require_finite(self) -> None:
        """Stops a run whose loss is no number, before its weights replace a good checkpoint.

        Raises:
            UserError: it is; the sentence says where the run can go on.
        """
        total = self.sums.get("total")
        if total is None or torch.isfinite(total):
            return
        kept = [path.name for path in self.run.folder.all_checkpoints()]
        raise UserError(
            f"the loss is not finite near step {self.run.step}; the last checkpoint is "
            f"{kept[-1] if kept else 'none'}: lower training.learning_rate and start again"
        )

    def record(self, group: str, row: dict[str, float]) -> None:
        """Appends a row to log.jsonl and TensorBoard; call on the main process."""
        seconds = round(time.perf_counter() - self.started, 3)
        # JSON has no infinity; fp16's gradient norm is infinite while its scaler settles.
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        line = {"step": self.run.step, "group": group, "seconds": seconds, **finite}
        self.file.write(json.dumps(line) + "\n")
        for name, value in row.items():
            self.board.add_scalar(f"{group}/{name}", value, self.run.step)

    def skipped(self, pictures: list[Skipped]) -> None:
        """Names each unreadable picture once, and counts it each time."""
        for skip in pictures:
            if skip.key not in self.run.skipped:
                rank = self.run.accelerator.process_index
                text = f"skipped {skip.key} (process {rank}): {skip.reason}"
                self.console.print(text, style="yellow", markup=False)
            self.run.skipped[skip.key] += 1

    def restart_clock(self) -> None:
        """Leaves the time of a validation or a checkpoint out of images/s."""
        self.since = time.perf_counter()

    def _remaining(self, now: float) -> str:
        left = self.run.config.training.steps - self.run.step
        share = left / max(1, self.run.step - self.first)
        seconds = int((now - self.started) * share)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _drop_rows_after(folder: RunFolder, step: int) -> None:
    """Forgets the rows that a killed run wrote after its last checkpoint: they come again."""
    rows = [json.dumps(row) for row in folder.log_rows() if row["step"] <= step]
    aside = folder.log_file.with_suffix(".tmp")
    aside.write_text("".join(row + "\n" for row in rows))
    aside.replace(folder.log_file)


def _tensorboard(folder: Path, step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)
