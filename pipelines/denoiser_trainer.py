"""One update of a latent denoiser, its average, and the checkpoint from which both go on."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from torch import Tensor

from denoisers import DenoiserConfig, build_denoiser
from latent_ae.errors import UserError
from latent_ae.latents import LatentDataset

__all__ = ["Trainer", "learning_rate"]

# These decide what a checkpoint's tensors mean; everything else may change between two starts.
FIXED = "denoiser channels layers attention width depth heads patch objective prediction labels"


class Trainer:
    """The denoiser, its optimizer and its average, restored from the checkpoint in `folder`."""

    def __init__(self, config: DenoiserConfig, data: LatentDataset, folder: Path) -> None:
        self.config, self.file = config, folder / "checkpoint.pt"
        self.log_file = folder / "log.jsonl"
        self.classes = data.manifest.num_classes if config.labels else 0
        self.step, self.seconds = 0, 0.0
        self.identity = {name: getattr(config, name) for name in FIXED.split()}
        self.identity["classes"], self.identity["latents"] = (
            self.classes,
            data.manifest.latent_shape,
        )
        self.identity["autoencoder"] = data.manifest.autoencoder.weights_sha256
        torch.manual_seed(config.seed)
        self.denoiser = build_denoiser(config, data.manifest.latent_shape, self.classes)
        self.accelerator = _accelerator(config.precision)
        optimizer = torch.optim.AdamW(
            self.denoiser.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        # From here on only the wrapped forward may be called, or gradients are not shared.
        self.wrapped, self.optimizer = self.accelerator.prepare(self.denoiser, optimizer)
        self.ema = EMAModel(self.denoiser.parameters(), decay=config.ema, foreach=True)
        if self.file.is_file():
            self._restore()
        self.started = time.monotonic() - self.seconds
        folder.mkdir(parents=True, exist_ok=True)

    def progress(self) -> float:
        """The share of the training that is done, by steps or by the clock, the same everywhere."""
        steps = self.step / self.config.steps
        if self.config.seconds is None:
            return steps
        self.seconds = time.monotonic() - self.started
        done = torch.tensor(self.seconds / self.config.seconds, device=self.accelerator.device)
        broadcast(done)  # in place: all processes must stop together
        return max(steps, done.item())

    def update(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """One step; returns `loss` and `gradient_norm` on the device."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step, progress)
        device = self.accelerator.device
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        takes_labels = config.denoiser == "dit" or self.classes > 0
        prediction = self.wrapped(
            batch["noisy"],
            timestep=batch["timestep"],
            class_labels=batch["label"] if takes_labels else None,
            return_dict=False,
        )[0]
        loss = (prediction.float() - batch["target"]).square().mean()
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(
            self.denoiser.parameters(), config.clip_norm or math.inf
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.denoiser.parameters())
        self.step += 1
        return {"loss": loss.detach(), "gradient_norm": torch.as_tensor(norm).detach()}

    def save(self) -> None:
        """Writes the checkpoint beside the last one, then takes its place."""
        self.seconds = time.monotonic() - self.started
        if self.accelerator.is_main_process:
            scaler, aside = self.accelerator.scaler, self.file.with_suffix(".tmp")
            state = {
                "identity": self.identity,
                "step": self.step,
                "seconds": self.seconds,
                "denoiser": self.denoiser.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
            }
            with aside.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(self.file)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"the checkpoint {self.file} cannot be read: {error}") from error
        for name, value in self.identity.items():
            if state["identity"].get(name) != value:
                raise UserError(
                    f"{self.file.parent} holds a run with another {name}: choose another --run, or "
                    f"{name} {state['identity'].get(name)}"
                )
        self.denoiser.load_state_dict(state["denoiser"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.accelerator.device)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]


def learning_rate(config: DenoiserConfig, step: int, progress: float) -> float:
    """The rate of the update after `step` finished ones, at `progress` in [0, 1]."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.learning_rate * warm * (1 + math.cos(math.pi * progress)) / 2


def _accelerator(precision: str) -> Accelerator:
    mixed = {"fp32": "no"}.get(precision, precision)
    state = AcceleratorState._shared_state
    # A process that has trained something else before (as the quickstart has) would be bound to its
    # precision for good; Accelerate has no public way to say that this training is over.
    if state and state.get("_mixed_precision") != mixed:
        AcceleratorState._reset_state()
    try:
        return Accelerator(mixed_precision=mixed)
    except ValueError as error:  # such as fp16 without a GPU
        raise UserError(f"precision {precision}: {error}") from error
