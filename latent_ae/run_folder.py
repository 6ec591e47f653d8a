"""The folder of a training run: what lies where, so that other parts need not ask the trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from safetensors.torch import load_file

from latent_ae.autoencoder import load_network
from latent_ae.config import Config
from latent_ae.config_file import load_config
from latent_ae.errors import UserError

__all__ = ["RunFolder"]


class RunFolder:
    """Paths of a run.

    `config.yaml`, `log.jsonl`, `tensorboard/`, `samples/step-*.png` and `checkpoints/step-*/`, each
    of these with `network/` (diffusers' format, the raw weights), `ema.safetensors`,
    `objective.safetensors`, `optimizer.pt`, `process-*.pt` and `progress.json`.
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
        """Whole checkpoints, oldest first (one being written still has another name)."""
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

    def config(self) -> Config:
        """The run's resolved config."""
        return load_config(self.config_file)

    def last_validation(self, step: int) -> dict[str, float] | None:
        """The newest validation up to a step: `step`, `psnr`, `ssim`, `lpips`."""
        found = None
        for row in self.log_rows():
            if row["group"] == "validation" and row["step"] <= step:
                found = {name: row[name] for name in ("step", "psnr", "ssim", "lpips")}
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

    def trained_network(self) -> tuple[AutoencoderKL, dict[str, Any]]:
        """The newest checkpoint's network with averaged weights if there are any; its progress."""
        checkpoint = self.latest()
        network = load_network(checkpoint / "network")
        averaged = checkpoint / "ema.safetensors"
        if averaged.is_file():
            network.load_state_dict(load_file(averaged))
        return network, json.loads((checkpoint / "progress.json").read_text())
