"""Checkpoints that appear whole or not at all, and restore every number of the run."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_ae.errors import UserError

__all__ = ["Checkpoint", "averaged_state"]


def averaged_state(network: nn.Module, ema: EMAModel) -> dict[str, Tensor]:
    """The averaged weights under the network's parameter names."""
    names = [name for name, _ in network.named_parameters()]
    return dict(zip(names, ema.shadow_params, strict=True))


@dataclass
class Checkpoint:
    """The parts of a run that are saved and restored."""

    accelerator: Accelerator
    network: AutoencoderKL
    objective: nn.Module
    optimizer: AcceleratedOptimizer
    ema: EMAModel | None

    def save(self, path: Path, step: int, images: int, loader: Any, keep: int) -> None:
        """Writes beside `path`, then renames; then removes all but the newest `keep`.

        Args:
            path: the checkpoint's folder.
            step: updates done.
            images: pictures seen by all processes.
            loader: the position of this process's streaming loader, or None.
            keep: how many checkpoints stay.
        """
        aside = path.with_name(path.name + ".tmp")
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        rank = self.accelerator.process_index
        torch.save({"rng": _rng_state(), "loader": loader}, aside / f"process-{rank}.pt")
        if self.accelerator.is_main_process:
            self._save_shared(aside, {"step": step, "images": images})
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for file in aside.rglob("*"):
                _sync(file)
            if path.exists():
                shutil.rmtree(path)
            aside.rename(path)
            _sync(path.parent)
            for old in sorted(path.parent.glob("step-*[0-9]"))[:-keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _save_shared(self, folder: Path, progress: dict[str, int]) -> None:
        self.network.save_pretrained(folder / "network")
        if self.ema is not None:
            averaged = averaged_state(self.network, self.ema)
            save_file({k: v.contiguous() for k, v in averaged.items()}, folder / "ema.safetensors")
        save_file(self._objective_state(), folder / "objective.safetensors")
        scaler = self.accelerator.scaler
        torch.save(
            {
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
                "ema_step": self.ema.optimization_step if self.ema else 0,
            },
            folder / "optimizer.pt",
        )
        processes = self.accelerator.num_processes
        text = json.dumps({**progress, "processes": processes})
        (folder / "progress.json").write_text(text)

    def restore(self, path: Path) -> dict[str, Any]:
        """Reads a checkpoint into the run's parts.

        Returns:
            `step`, `images` and this process's `loader` position.

        Raises:
            UserError: the checkpoint is not of this network or cannot be read.
        """
        try:
            return self._restore(path)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"the checkpoint {path} cannot be restored: {error}") from error

    def _restore(self, path: Path) -> dict[str, Any]:
        progress = json.loads((path / "progress.json").read_text())
        weights = load_file(path / "network" / "diffusion_pytorch_model.safetensors")
        self.network.load_state_dict(weights)
        state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            averaged = load_file(path / "ema.safetensors")
            for name, shadow in averaged_state(self.network, self.ema).items():
                shadow.copy_(averaged[name])
            self.ema.optimization_step = state["ema_step"]
        self.objective.load_state_dict(load_file(path / "objective.safetensors"), strict=False)
        own = path / f"process-{self.accelerator.process_index}.pt"
        progress["loader"] = None
        # Another number of processes: the picture count still holds, noise starts from the seed.
        if progress["processes"] == self.accelerator.num_processes:
            local = torch.load(own, map_location="cpu", weights_only=True)
            _restore_rng(local["rng"])
            progress["loader"] = local["loader"]
        return progress

    def _objective_state(self) -> dict[str, Tensor]:
        trained = {n: p for n, p in self.objective.named_parameters() if p.requires_grad}
        return {name: parameter.detach().cpu() for name, parameter in trained.items()}


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync(path: Path) -> None:
    """Waits until the disk holds a file, or a folder's entries: the rename must not be first."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
