"""What a denoiser's training tells while it runs: a moving bar or lines, and rows of JSON."""

from __future__ import annotations

import json
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from denoiser_trainer import Trainer

__all__ = ["Log"]


class Log:
    """A moving bar on a terminal, lines elsewhere; a row of log.jsonl every `log_every` steps."""

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self.trainer, self.console = trainer, console
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
        if self.main and trainer.log_file.is_file():  # a killed run's last rows come again
            rows = trainer.log_file.read_text().splitlines()
            rows = [
                row for row in rows if row.endswith("}") and json.loads(row)["step"] <= trainer.step
            ]
            aside = trainer.log_file.with_suffix(".tmp")
            aside.write_text("".join(f"{row}\n" for row in rows))
            aside.replace(trainer.log_file)

    def __enter__(self) -> Log:
        self.bar.start()
        self.task = self.bar.add_task("denoiser", total=1.0, row="")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

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
        now, count = time.monotonic(), len(self.terms)
        speed = count * config.batch_size * trainer.accelerator.num_processes / (now - self.since)
        row = {"step": trainer.step, "seconds": round(now - trainer.started, 3)}
        row |= {name: float(value) for name, value in means.items()}  # pyright: ignore
        row |= {
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
            "images_per_second": speed,
        }
        self.terms, self.since = [], now
        if not self.main:
            return
        with trainer.log_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        text = f"step {trainer.step} · loss {row['loss']:.4f} · {speed:.0f} images/s"
        self.bar.update(self.task, row=text)
        if not self.console.is_terminal:
            self.console.print(text, style="dim")
