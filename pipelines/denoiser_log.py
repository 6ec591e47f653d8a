"""What a training of pipelines/ tells while it runs: a bar or lines, rows of JSON, TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from latent_ae.run_folder import json_line, write_whole

__all__ = ["Log"]


class _Config(Protocol):
    @property
    def batch_size(self) -> int: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def seconds(self) -> float | None: ...


class _Trainer(Protocol):
    """`seconds` have passed of the training that began at `started`."""

    accelerator: Accelerator
    optimizer: Any
    folder: Path
    step: int
    seconds: float
    started: float

    @property
    def config(self) -> _Config: ...


class Log:
    """A moving bar on a terminal, lines elsewhere; a row of log.jsonl every `log_every` steps.

    Rows have a `step`, a `group` (`train`, `samples`, `distance`, `held_out`) and `seconds` of
    training. Their numbers, and the sheets, also go to TensorBoard.
    """

    def __init__(self, trainer: _Trainer, console: Console, title: str = "denoiser") -> None:
        self.trainer, self.console, self.title = trainer, console, title
        self.terms: list[dict[str, Tensor]] = []
        self.since = time.monotonic()
        self.main = trainer.accelerator.is_main_process
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(24),
            TaskProgressColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[row]}"),
            console=console,
            disable=not (self.main and console.is_terminal),
        )
        self.file = trainer.folder / "log.jsonl"
        self.done: set[tuple[int, str]] = set()  # what was drawn or measured, at which step
        self.last: dict[str, dict[str, Any]] = {}  # the last row of each group
        if self.main:
            self._forget_what_comes_again()
            board = str(trainer.folder / "tensorboard")
            self.board = SummaryWriter(board, purge_step=trainer.step + 1)

    def _forget_what_comes_again(self) -> None:
        """Drops the rows that a killed run wrote after its last checkpoint."""
        rows = [row for row in _rows(self.file) if row["step"] <= self.trainer.step]
        self.done = {(row["step"], row.get("group", "train")) for row in rows}
        self.last = {row.get("group", "train"): row for row in rows}
        write_whole(self.file, "".join(json_line(row) for row in rows))

    def __enter__(self) -> Log:
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=1.0, row="")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.main:
            self.board.close()

    def add(self, terms: dict[str, Tensor]) -> None:
        """Notes the terms of a step; nothing is read back from the device."""
        self.terms.append(terms)
        trainer = self.trainer
        done = trainer.step / trainer.config.steps
        if trainer.config.seconds:
            done = max(done, trainer.seconds / trainer.config.seconds)
        self.bar.update(self.task, completed=done)

    def write(self) -> None:
        """Writes the row of the steps since the last one."""
        if not self.terms:
            return
        trainer, config = self.trainer, self.trainer.config
        terms = {k: torch.stack([row[k] for row in self.terms]).mean() for k in self.terms[0]}
        # The only point where the host waits for the device.
        means = trainer.accelerator.reduce(terms, reduction="mean")
        now = time.monotonic()
        a_step = config.batch_size * config.accumulation * trainer.accelerator.num_processes
        speed = len(self.terms) * a_step / (now - self.since)
        row = {name: float(value) for name, value in means.items()}  # pyright: ignore
        row |= {
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
            "images_per_second": speed,
        }
        self.terms, self.since = [], now
        self.record("train", row)
        text = f"step {trainer.step} · loss {row['loss']:.4f} · {speed:.0f} images/s"
        self.bar.update(self.task, row=text)
        if not self.console.is_terminal:
            self.tell(text)

    def record(self, group: str, row: dict[str, Any], sheet: Path | None = None) -> None:
        """Appends a row, and shows TensorBoard its numbers and a sheet; the main process only."""
        if not self.main:
            return
        trainer = self.trainer
        seconds = round(time.monotonic() - trainer.started, 3)
        with self.file.open("a") as file:
            head = {"step": trainer.step, "group": group, "seconds": seconds}
            file.write(json_line(head | row))
        self.done.add((trainer.step, group))
        self.last[group] = head | row
        for name, value in row.items():
            if isinstance(value, float):
                self.board.add_scalar(f"{group}/{name}", value, trainer.step)
        if sheet is not None:
            with Image.open(sheet) as picture:
                pixels = np.asarray(picture)
            self.board.add_image(f"{group}/sheet", pixels, trainer.step, dataformats="HWC")

    def tell(self, text: str) -> None:
        """Prints a line, on the main process."""
        if self.main:
            self.console.print(text, style="dim", markup=False, highlight=False)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of drawing out of images/s and of the seconds of training."""
        began = time.monotonic()
        yield
        passed = time.monotonic() - began
        self.since += passed
        self.trainer.started += passed


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a log, without lines that a kill or a full disk has damaged."""
    rows = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:  # of JSON or of UTF-8
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
