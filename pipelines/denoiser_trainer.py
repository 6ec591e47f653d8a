"""One update of a latent denoiser, its average, and the checkpoint from which both go on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from denoisers import DenoiserConfig, build_denoiser, require_fit
from latent_ae.errors import UserError
from latent_ae.latents import LatentDataset
from latent_ae.scaling import LatentScaling
from latent_ae.training.guard import Guard, poison
from training_parts import (
    accelerator_of,
    learning_rate,
    move_weights,
    require_sound,
    share_done,
    write_checkpoint,
)

__all__ = ["Trainer", "usual_shape"]

# These decide what a checkpoint's tensors mean; everything else may change between two starts.
FIXED = "denoiser channels layers attention width depth heads patch objective prediction labels"


class Trainer:
    """The denoiser, its optimizer and its average, restored from the checkpoint in `folder`."""

    def __init__(self, config: DenoiserConfig, data: LatentDataset, folder: Path) -> None:
        self.config, self.folder, self.file = config, folder, folder / "checkpoint.pt"
        self.classes = data.manifest.num_classes if config.labels else 0
        self.step, self.seconds = 0, 0.0
        if config.guidance_scale > 1 and not self.classes:
            raise UserError("--guidance-scale takes labels, and there are none to learn")
        self.identity = self._identity(data)
        require_fit(config, data.manifest.latent_shapes)
        torch.manual_seed(config.seed)
        self.shape = usual_shape(data)
        self.denoiser = build_denoiser(config, self.shape, self.classes)
        self.accelerator = accelerator_of(config.precision, config.accumulation)
        optimizer = torch.optim.AdamW(
            self.denoiser.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        # From here on only the wrapped forward may be called, or gradients are not shared.
        self.wrapped, self.optimizer = self.accelerator.prepare(self.denoiser, optimizer)
        self.ema = EMAModel(self.denoiser.parameters(), decay=config.ema, foreach=True)
        if self.file.is_file():
            self._restore()
        self.started = time.monotonic() - self.seconds
        self.guard = Guard(self.accelerator.device)  # of losses; the optimizer skips by itself
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be made: {error.strerror}") from error

    def _identity(self, data: LatentDataset) -> dict[str, Any]:
        """What a checkpoint must agree on."""
        shapes, autoencoder = data.manifest.latent_shapes, data.manifest.autoencoder
        scale = {name: getattr(autoencoder, name) for name in LatentScaling.model_fields}
        return {name: getattr(self.config, name) for name in FIXED.split()} | {
            "classes": self.classes,
            "label_names": list(data.manifest.label_names) if self.classes else [],
            "latents": shapes[0] if len(shapes) == 1 else shapes,
            "autoencoder": autoencoder.weights_sha256,
            **scale,
        }

    def progress(self) -> float:
        """The share of the training that is done, by steps or by the clock, the same everywhere."""
        steps, by_clock = self.step / self.config.steps, None
        if self.config.seconds is not None:
            self.seconds = time.monotonic() - self.started
            by_clock = self.seconds / self.config.seconds
        return share_done(self.accelerator, steps, by_clock)

    def update(self, batches: Sequence[dict[str, Tensor]], progress: float) -> dict[str, Tensor]:
        """One step on `accumulation` batches; returns `loss` and `gradient_norm` on the device.

        Gradients that are not finite move no weight; the host does not wait to learn of it.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step, progress)
        losses = []
        for batch in batches[:-1]:
            with self.accelerator.no_sync(self.wrapped):  # gradients travel with the last batch
                losses.append(self._backward(batch))
        losses.append(self._backward(batches[-1]))
        loss, weights = torch.stack(losses).mean(), self.denoiser.parameters()
        norm = move_weights(self.accelerator, self.optimizer, weights, config.clip_norm)
        self.ema.step(self.denoiser.parameters())  # of weights that did not move: still finite
        self.guard.count(~loss.isfinite())
        self.step += 1
        return {"loss": loss, "gradient_norm": norm}

    def _backward(self, batch: dict[str, Tensor]) -> Tensor:
        """Adds the gradients of a batch's weighted mean squared error, which it returns."""
        device = self.accelerator.device
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        takes_labels = self.config.denoiser == "dit" or self.classes > 0
        prediction = self.wrapped(
            batch["noisy"],
            timestep=batch["timestep"],
            class_labels=batch["label"] if takes_labels else None,
            return_dict=False,
        )[0]
        errors = (prediction.float() - batch["target"]).square().mean((1, 2, 3))
        loss = (batch["weight"] * errors).mean()
        self.accelerator.backward(poison(loss))  # divides by the accumulation
        return loss.detach()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The denoiser with its averaged weights, for drawing; its own come back bit by bit."""
        parameters = list(self.denoiser.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        self.denoiser.eval()
        try:
            yield
        finally:
            self.ema.restore(parameters)
            self.denoiser.train()

    def require_sound(self) -> None:
        """Raises `UserError` if weights, or the losses of late, are not finite; a collective."""
        weights = [*self.denoiser.parameters(), *self.ema.shadow_params]
        where, kept = f"step {self.step}", f"{self.folder} and the pipeline"
        require_sound(self.accelerator, self.guard, weights, where, kept)

    def save(self) -> None:
        """Writes the checkpoint beside the last one, then takes its place.

        Raises:
            UserError: there is nothing worth keeping; see `require_sound`.
        """
        self.require_sound()
        self.seconds = time.monotonic() - self.started
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "identity": self.identity,
                "step": self.step,
                "seconds": self.seconds,
                "denoiser": self.denoiser.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
            }
            write_checkpoint(self.file, state)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            known = state["identity"]
            parts = [state[name] for name in ("denoiser", "optimizer", "ema", "scaler")]
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
        except Exception as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"the checkpoint {self.file} cannot be read: {why}") from error
        for name, value in self.identity.items():
            if known.get(name, value) != value:  # an older run's may say less
                option = name if name in FIXED.split() else None
                before = f", or {option} {known.get(option)}" if option else ""
                raise UserError(
                    f"{self.folder} holds a run with another {name}: choose another --run{before}"
                )
        denoiser, optimizer, ema, scaler = parts
        try:
            self.denoiser.load_state_dict(denoiser)
            self.optimizer.load_state_dict(optimizer)
            self.ema.load_state_dict(ema)
            self.ema.to(self.accelerator.device)
            if self.accelerator.scaler and scaler:
                self.accelerator.scaler.load_state_dict(scaler)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint {self.file} is of another network") from error


def usual_shape(data: LatentDataset) -> tuple[int, int, int]:
    """The shape (c, h, w) that most of the latents have."""
    size = data.index.sizes[int(np.bincount(data.index.size).argmax())]
    return (data.manifest.latent_shapes[0][0], *size)
