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
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_ae.adversary import Adversary
from latent_ae.autoencoder import WEIGHTS_FILE, trained_parameters
from latent_ae.bottlenecks import Bottleneck
from latent_ae.errors import UserError
from latent_ae.losses import save_discriminator
from latent_ae.network_kinds import Network
from latent_ae.networks import tidy_config
from latent_ae.processes import from_main
from latent_ae.run_folder import RunFolder
from latent_ae.training.sharding import fill_, like_parameters, whole

__all__ = ["Checkpoint"]

_PREFIX = "discriminator."


@dataclass
class Checkpoint:
    """The parts of a run that are saved and restored."""

    accelerator: Accelerator
    network: Network
    bottleneck: Bottleneck
    objective: nn.Module
    optimizer: AcceleratedOptimizer
    adversary: Adversary | None
    discriminator_optimizer: torch.optim.Optimizer | None
    ema: EMAModel | None

    def save(
        self, folder: RunFolder, progress: dict[str, Any], *, loader: Any, keep: int, best_by: str
    ) -> None:
        """Writes beside the checkpoint's place, then renames; then removes what need not stay.

        A checkpoint that lies there already is left as it is.

        Args:
            folder: the run's.
            progress: `step`, `images` and whatever else is to come back.
            loader: the position of this process's streaming loader, or None.
            keep: how many checkpoints stay; the best one stays beside them.
            best_by: the metric that tells which this is.

        Raises:
            UserError: it cannot be written, on whichever process; the earlier ones are untouched.
        """
        path = folder.checkpoint(progress["step"])
        if from_main(path.exists):
            return
        aside, error = path.with_name(path.name + ".tmp"), None
        state = self._whole_state()
        if self.accelerator.is_main_process:
            error = _attempt(lambda: _renew(aside))
        self._agree(error, aside)
        error = _attempt(lambda: self._write(aside, state, progress, loader))
        self._agree(error, aside)
        if self.accelerator.is_main_process:
            error = _attempt(lambda: _publish(aside, path))
        self._agree(error, aside)
        if self.accelerator.is_main_process:
            folder.prune(keep, best_by)

    def _agree(self, error: Exception | None, aside: Path) -> None:
        """Waits for every process; if one of them has failed, all of them say so."""
        device = self.accelerator.device
        failed = torch.tensor(float(error is not None), device=device)
        if self.accelerator.reduce(failed, reduction="sum").item():  # pyright: ignore
            if self.accelerator.is_main_process:
                shutil.rmtree(aside, ignore_errors=True)
            reason = error or "another process could not write its part"
            free = shutil.disk_usage(aside.parents[1]).free / 2**20
            raise UserError(
                f"the checkpoint {aside.with_suffix('')} could not be written: {reason}; its disk "
                f"has {free:,.0f} MiB left; the last whole checkpoint is untouched, and the same "
                "command goes on from it"
            ) from error

    def _whole_state(self) -> dict[str, Any]:
        """All that is the same on every process; a collective where the run is sharded."""
        trained = trained_parameters(self.objective)
        state = {
            "network": self.network.state_dict(),
            "ema": averaged_state(self.network, self.ema) if self.ema else None,
            "bottleneck": dict(self.bottleneck.named_buffers()),
            "objective": {name: parameter.detach() for name, parameter in trained.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        return whole(state, keep=self.accelerator.is_main_process)

    def _write(
        self, aside: Path, state: dict[str, Any], progress: dict[str, Any], loader: Any
    ) -> None:
        rank = self.accelerator.process_index
        torch.save({"rng": _rng_state(), "loader": loader}, aside / f"process-{rank}.pt")
        if not self.accelerator.is_main_process:
            _sync(aside / f"process-{rank}.pt")
            return
        self.network.save_config(aside / "network")
        tidy_config(self.network, aside / "network")
        _save_tensors(state["network"], aside / "network" / WEIGHTS_FILE)
        if state["ema"] is not None:
            _save_tensors(state["ema"], aside / "ema.safetensors")
        _save_tensors(state["objective"], aside / "objective.safetensors")
        if state["bottleneck"]:
            _save_tensors(state["bottleneck"], aside / "bottleneck.safetensors")
        scaler, judge = self.accelerator.scaler, self.discriminator_optimizer
        if self.adversary is not None:
            save_discriminator(self.adversary.discriminator, aside / "discriminator.safetensors")
        torch.save(
            {
                "optimizer": state["optimizer"],
                "discriminator_optimizer": judge.state_dict() if judge else None,
                "adversary": _averages(self.adversary),
                "scaler": scaler.state_dict() if scaler else None,
                "ema_step": self.ema.optimization_step if self.ema else 0,
            },
            aside / "optimizer.pt",
        )
        processes = self.accelerator.num_processes
        (aside / "progress.json").write_text(json.dumps({**progress, "processes": processes}))

    def restore(self, path: Path) -> dict[str, Any]:
        """Reads a checkpoint into the run's parts.

        Returns:
            The progress that was saved, and this process's `loader` position.

        Raises:
            UserError: the checkpoint is not of this network or cannot be read.
        """
        try:
            return self._restore(path)
        except Exception as error:  # the file system's, safetensors', pickle's and torch's kinds
            raise UserError(
                f"the checkpoint {path} cannot be restored: {error}; if it is damaged, remove the "
                "folder and the run goes on from the one before"
            ) from error

    def _restore(self, path: Path) -> dict[str, Any]:
        progress = json.loads((path / "progress.json").read_text())
        _fill_all(self.network.state_dict(), load_file(path / "network" / WEIGHTS_FILE))
        state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        _load_moments(self.optimizer, like_parameters(state["optimizer"], self.optimizer))
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            averaged = averaged_state(self.network, self.ema)
            _fill_all(averaged, load_file(path / "ema.safetensors"))
            self.ema.optimization_step = state["ema_step"]
        if buffers := dict(self.bottleneck.named_buffers()):
            _fill_all(buffers, load_file(path / "bottleneck.safetensors"))
        self.objective.load_state_dict(load_file(path / "objective.safetensors"), strict=False)
        self._restore_adversary(path, state)
        own = path / f"process-{self.accelerator.process_index}.pt"
        progress["loader"] = None
        # Another number of processes: the picture count still holds, noise starts from the seed.
        if progress["processes"] == self.accelerator.num_processes:
            local = torch.load(own, map_location="cpu", weights_only=True)
            _restore_rng(local["rng"])
            progress["loader"] = local["loader"]
        return progress

    def _restore_adversary(self, path: Path, state: dict[str, Any]) -> None:
        """A run that had no adversary before begins with a new one."""
        file, judge = path / "discriminator.safetensors", self.discriminator_optimizer
        if self.adversary is None or judge is None or not file.is_file():
            return
        _fill_all(self.adversary.discriminator.state_dict(), load_file(file))
        self.adversary.load_state_dict(state["adversary"], strict=False)
        _load_moments(judge, state["discriminator_optimizer"])


def _load_moments(optimizer: Any, state: dict[str, Any]) -> None:
    """An optimizer's state without its options: those are the config's of today."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def averaged_state(network: nn.Module, ema: EMAModel) -> dict[str, Tensor]:
    """The averaged weights under the network's parameter names; frozen ones have no average."""
    return dict(zip(trained_parameters(network), ema.shadow_params, strict=True))


def _averages(adversary: Adversary | None) -> dict[str, Tensor]:
    """What the adversary remembers beside the discriminator."""
    state = adversary.state_dict() if adversary else {}
    return {name: value for name, value in state.items() if not name.startswith(_PREFIX)}


def _fill_all(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    if targets.keys() != sources.keys():
        different = sorted(targets.keys() ^ sources.keys())
        raise ValueError(f"it is of another network: {', '.join(different[:3])} differ")
    for name, target in targets.items():
        if target.shape != sources[name].shape:
            raise ValueError(f"it is of another network: {name} has another shape")
        fill_(target, sources[name])


def _save_tensors(state: dict[str, Tensor], path: Path) -> None:
    save_file({k: v.contiguous() for k, v in state.items()}, path, {"format": "pt"})


def _attempt(write: Any) -> Exception | None:
    try:
        write()
    except Exception as error:  # the file system's, safetensors' and torch's own kinds
        return error
    return None


def _renew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(aside: Path, path: Path) -> None:
    """Makes sure that the disk holds every file, then lets the folder appear."""
    for file in [*aside.rglob("*"), aside]:
        _sync(file)
    aside.rename(path)
    _sync(path.parent)


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
