"""The folder of a training run: what lies where, so that other parts need not ask the trainer."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from latent_ae.config import Config
from latent_ae.config_file import load_config
from latent_ae.errors import UserError
from latent_ae.network_kinds import Network
from latent_ae.networks import load_network

__all__ = ["RunFolder", "json_line", "judging_metric", "write_whole"]


def json_line(row: dict[str, Any]) -> str:
    """A row of a log as JSON, which has no NaN and no infinity: they become null."""
    kept = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(kept) + "\n"


def judging_metric(metrics: dict[str, float], wanted: str) -> str:
    """By which metric of a validation checkpoints are chosen: PSNR where the wanted is not taken.

    LPIPS is not, of pictures that have no colours.
    """
    return wanted if wanted in metrics else "psnr"


def write_whole(path: Path, text: str, check: Callable[[Path], Any] | None = None) -> None:
    """Replaces a file by one that the disk holds whole, so that a power cut leaves either.

    Args:
        path: the file.
        text: its new content.
        check: reads the new file before it takes the place, and raises if it must not.
    """
    aside = path.with_suffix(".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if check is not None:
        check(aside)
    aside.replace(path)


_VALIDATION = ("step", "psnr", "ssim", "lpips")


class RunFolder:
    """Paths of a run.

    `config.yaml`, `log.jsonl`, `tensorboard/`, `samples/step-*.png` and `checkpoints/step-*/`, each
    of these with `network/` (diffusers' format, the raw weights), `ema.safetensors`,
    `objective.safetensors`, `discriminator.safetensors`, `optimizer.pt`, `process-*.pt` and
    `progress.json`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.log_file = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.checkpoints / f"step-{step:09d}"

    def sheet(self, step: int) -> Path:
        """Where the validation pictures of a step lie."""
        return self.path / "samples" / f"step-{step:09d}.png"

    def all_checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first (one being written or removed has another name)."""
        return sorted(self.checkpoints.glob("step-*[0-9]"))

    def latest(self) -> Path:
        """The newest checkpoint.

        Raises:
            UserError: the folder is no run, or the run has not saved one yet.
        """
        if not self.config_file.is_file():
            raise UserError(f"{self.path} is no training run: it has no config.yaml")
        found = self.all_checkpoints()
        if not found:
            raise UserError(f"the run {self.path} has no checkpoint yet")
        return found[-1]

    def best(self, metric: str) -> Path | None:
        """The checkpoint with the best validation (`lpips` low, others high), if any has one."""
        found = {
            path: metrics
            for path in self.all_checkpoints()
            if (metrics := self.progress(path).get("validation"))
        }
        if not found:
            return None
        metric = judging_metric(next(iter(found.values())), metric)
        choose = min if metric == "lpips" else max
        return choose(found, key=lambda path: found[path][metric])

    def best_score(self, metric: str) -> float | None:
        """That checkpoint's value of the metric."""
        best = self.best(metric)
        metrics = self.progress(best)["validation"] if best else {}
        return metrics[judging_metric(metrics, metric)] if best else None

    def chosen(self, which: str) -> Path:
        """The checkpoint that a person means by `last`, `best` or a step's number.

        Raises:
            UserError: there is none.
        """
        latest = self.latest()
        if which == "last":
            return latest
        if which == "best":
            found = self.best(self.config().training.best_by)
        else:
            found = self.checkpoint(int(which)) if which.isdecimal() else None
        if found is None or not found.is_dir():
            steps = ", ".join(str(int(path.name[5:])) for path in self.all_checkpoints())
            raise UserError(f"the run {self.path} has no checkpoint {which!r}; its steps: {steps}")
        return found

    def progress(self, checkpoint: Path) -> dict[str, Any]:
        """`step`, `images`, `processes` … of a checkpoint, and its `validation` if it had one."""
        return json.loads((checkpoint / "progress.json").read_text())

    def note_validation(self, step: int, metrics: dict[str, float]) -> None:
        """Writes metrics into a checkpoint, whole or not at all."""
        file = self.checkpoint(step) / "progress.json"
        write_whole(file, json.dumps({**self.progress(file.parent), "validation": metrics}))

    def prune(self, keep: int, best_by: str) -> None:
        """Removes all checkpoints but the newest `keep` and the best."""
        best = self.best(best_by)
        for path in self.all_checkpoints()[:-keep]:
            if path != best:
                # Killed half-way through, a folder of that name must not pass for a checkpoint.
                path = path.rename(path.with_name(path.name + ".removed.tmp"))
                shutil.rmtree(path, ignore_errors=True)  # `sweep` will try again

    def sweep(self) -> None:
        """Removes what a kill left half-written or half-removed."""
        for path in self.checkpoints.glob("*.tmp"):
            shutil.rmtree(path, ignore_errors=True)

    def config(self) -> Config:
        """The run's resolved config."""
        return load_config(self.config_file)

    def last_validation(self, step: int) -> dict[str, float] | None:
        """The newest validation up to a step: `step`, `psnr`, `ssim`, `lpips`."""
        found = None
        for row in self.log_rows():
            if row["group"] == "validation" and row["step"] <= step:
                found = {name: row[name] for name in _VALIDATION if name in row}
        return found

    def log_rows(self) -> list[dict[str, Any]]:
        """The rows of log.jsonl, without a last one that was cut short when the run was killed."""
        rows = []
        for line in self.log_file.read_text().splitlines() if self.log_file.is_file() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def trained_network(self, which: str = "last") -> tuple[Network, dict[str, Any]]:
        """A checkpoint's network, with averaged weights if there are any, and its progress.

        Args:
            which: `last`, `best` or a step's number.

        Raises:
            UserError: the run has no such checkpoint.
        """
        checkpoint = self.chosen(which)
        network = load_network(checkpoint / "network")
        averaged = checkpoint / "ema.safetensors"
        if averaged.is_file():
            # Neither frozen weights nor buffers, such as BatchNorm's, are averaged.
            network.load_state_dict(network.state_dict() | load_file(averaged))
        return network, self.progress(checkpoint)
