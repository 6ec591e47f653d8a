"""What a run tells: a progress bar or lines, rows of JSON, TensorBoard and other trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from latent_ae.data import Skipped
from latent_ae.run_folder import RunFolder, json_line, write_whole
from latent_ae.training.display import Display
from latent_ae.training.guard import Alarms
from latent_ae.training.schedule import learning_rate
from latent_ae.training.trackers import Trackers

if TYPE_CHECKING:
    from latent_ae.training.run import Run
    from latent_ae.training.step import Update

__all__ = ["RunLog"]

# What a person follows; log.jsonl has the rest.
_SHOWN = ("total", "l1", "l2", "charbonnier", "lpips", "kl", "logvar", "implied_weight")
_SHOWN += ("adversarial", "d_accuracy", "perplexity", "code_usage")


class RunLog:
    """Averages the terms of the steps between two rows; one synchronisation with the device a row.

    Only the main process writes.
    """

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console = run, console
        self.main = run.accelerator.is_main_process
        self.sums: dict[str, tuple[Tensor, int]] = {}  # with how many steps had the term
        self.steps, self.images, self.first = 0, 0, run.step
        self.waited = 0.0
        self._waited_in_all = self._elapsed_in_all = 0.0
        self.since = time.perf_counter()
        self.started = self.since
        self.alarms = Alarms(run.config.adversary, run.config.bottleneck)
        if not self.main:
            return
        _drop_rows_after(run.folder, run.step)
        self.file = run.folder.log_file.open("a", buffering=1)
        self.trackers = Trackers(run, console)
        self.display = Display(console, run.step, run.config.training.steps)

    def __enter__(self) -> RunLog:
        if self.main:
            self.display.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.main:
            self.display.stop()
            self.file.close()
            self.trackers.close()

    def add(self, update: Update) -> None:
        """Adds the terms of one step; nothing is read back from the device."""
        for name, value in update.terms.items():
            total, count = self.sums.get(name, (torch.zeros_like(value), 0))
            self.sums[name] = (total + value, count + 1)
        self.steps += 1
        self.images += update.images
        self.waited += update.waited
        for batch in update.batches:
            self.skipped(batch.skipped)
        if self.main:
            self.display.advance(self.run.step + 1)

    def write(self) -> None:
        """Writes the row of the steps since the last one; none where there was none."""
        if not self.steps:
            return
        run, training = self.run, self.run.config.training
        means = torch.stack([total.float() / count for total, count in self.sums.values()])
        # Here the host waits for the device, and not between rows (but for the guard's looks).
        means = run.accelerator.reduce(means, reduction="mean").tolist()  # pyright: ignore
        row = dict(zip(self.sums, means, strict=True))
        # Of the process that waits most: the others wait for it.
        waited = torch.tensor([self.waited], device=run.accelerator.device)
        waited = run.accelerator.gather(waited).max().item()  # pyright: ignore
        now = time.perf_counter()
        elapsed = now - self.since
        self._waited_in_all += waited
        self._elapsed_in_all += elapsed
        row |= {
            "learning_rate": learning_rate(training, run.step - 1) * run.rate_factor,
            "skipped_steps": run.guard.look()[1],
            "images": run.images,
            "images_per_second": self.images * run.accelerator.num_processes / elapsed,
            "data_wait_share": waited / elapsed,
        }
        self.sums, self.steps, self.images, self.waited, self.since = {}, 0, 0, 0.0, now
        if not self.main:
            return
        self.record("train", row)
        text = " ".join(f"{name} {value:.4g}" for name, value in row.items() if name in _SHOWN)
        speed, wait = row["images_per_second"], row["data_wait_share"]
        text += f" · {speed:.1f} images/s · waits for data {wait:.0%}"
        if row["skipped_steps"]:
            text += f" · {row['skipped_steps']} updates skipped"
        self.display.show(run.step, text, self._remaining(now))
        for sentence in self.alarms.check(row, run.step):
            self.console.print(f"step {run.step} · alarm: {sentence}", style="yellow", markup=False)
            self.file.write(json.dumps(self._head("alarm") | {"text": sentence}) + "\n")

    def go_back(self) -> None:
        """Forgets what came after the run's step, to which it has returned."""
        self.sums, self.steps, self.images, self.waited = {}, 0, 0, 0.0
        self.first = min(self.first, self.run.step)
        if self.main:
            self.file.close()
            _drop_rows_after(self.run.folder, self.run.step)
            self.file = self.run.folder.log_file.open("a", buffering=1)
            self.file.write(json.dumps(self._head("rollback")) + "\n")
            self.trackers.go_back()

    def record(self, group: str, row: dict[str, float], sheet: Path | None = None) -> None:
        """Appends a row to log.jsonl and the trackers; call on the main process."""
        # fp16's gradient norm is infinite while its scaler settles.
        self.file.write(json_line(self._head(group) | row))
        self.trackers.log(group, row, sheet)

    def _head(self, group: str) -> dict[str, Any]:
        seconds = round(time.perf_counter() - self.started, 3)
        return {"step": self.run.step, "group": group, "seconds": seconds}

    def skipped(self, pictures: list[Skipped]) -> None:
        """Names each unreadable picture once, and counts it each time."""
        for skip in pictures:
            if skip.key not in self.run.skipped:
                rank = self.run.accelerator.process_index
                text = f"skipped {skip.key} (process {rank}): {skip.reason}"
                self.console.print(text, style="yellow", markup=False)
            self.run.skipped[skip.key] += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of a validation or a checkpoint out of images/s.

        A row is written first, or its steps would count from the end of the pause.
        """
        self.write()
        yield
        self.since = time.perf_counter()

    def data_wait_share(self) -> float:
        """The share of its time that training has waited for data, up to the last row."""
        return self._waited_in_all / self._elapsed_in_all if self._elapsed_in_all else 0.0

    def _remaining(self, now: float) -> str:
        left = self.run.config.training.steps - self.run.step
        share = left / max(1, self.run.step - self.first)
        seconds = int((now - self.started) * share)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _drop_rows_after(folder: RunFolder, step: int) -> None:
    """Forgets the rows that a killed run wrote after its last checkpoint: they come again."""
    rows = [json.dumps(row) for row in folder.log_rows() if row["step"] <= step]
    write_whole(folder.log_file, "".join(row + "\n" for row in rows))
