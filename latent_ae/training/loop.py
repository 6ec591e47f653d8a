"""The training loop, top to bottom."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from latent_ae.config import Config
from latent_ae.data import normalize
from latent_ae.training.log import RunLog
from latent_ae.training.run import Run, prepare
from latent_ae.training.schedule import learning_rate
from latent_ae.training.validation import validate

__all__ = ["train"]


def train(config: Config, console: Console | None = None) -> Path:
    """Trains an autoencoder, or goes on where the run in `config.output` stopped.

    Args:
        config: the run; the same config resumes it.
        console: where progress is shown; standard error when left out.

    Returns:
        The run's folder, ready for `export_run`.

    Raises:
        UserError: the config cannot be met, the data cannot be read, or the folder holds another
            run.
    """
    console = console or Console(stderr=True)
    run = prepare(config)
    steps, training = config.training.steps, config.training
    with RunLog(run, console) as log:
        if run.step:
            _say(run, console, f"going on from step {run.step} of {steps} in {run.folder.path}")
        while run.step < steps:
            log.add(_update(run, log))
            run.step, run.images = run.step + 1, run.images + run.effective_batch
            last = run.step == steps
            if last or run.step % training.log_every == 0:
                log.write(learning_rate(training, run.step - 1))
            if last or run.step % training.checkpoint_every == 0:
                log.require_finite()
                _save(run)
                log.restart_clock()
            if config.validation and (last or run.step % training.validate_every == 0):
                _validate(run, log, console)
                log.restart_clock()
    if run.skipped:
        _say(run, console, f"{len(run.skipped)} unreadable pictures were skipped")
    run.accelerator.end_training()
    return run.folder.path


def _update(run: Run, log: RunLog) -> dict[str, Tensor]:
    """One optimizer update over `accumulation` micro-batches; returns the last one's terms."""
    accelerator, training = run.accelerator, run.config.training
    rate = learning_rate(training, run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.autoencoder.train()
    terms: dict[str, Tensor] = {}
    for _ in range(training.accumulation):
        batch = next(run.stream)
        log.skipped(batch.skipped)
        images = normalize(batch.images.to(accelerator.device, non_blocking=True))
        if training.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.accumulate(run.autoencoder, run.objective):
            losses = run.objective(images, run.autoencoder(images), run.step)
            accelerator.backward(losses.total)
            terms = losses.terms
            if accelerator.sync_gradients and training.clip_norm:
                # Unscales fp16's gradients first.
                norm = accelerator.clip_grad_norm_(run.parameters, training.clip_norm)
                terms["gradient_norm"] = torch.as_tensor(norm).detach()
            run.optimizer.step()
            run.optimizer.zero_grad()
    if run.ema is not None:
        run.ema.step(run.network.parameters())
    return terms


def _validate(run: Run, log: RunLog, console: Console) -> None:
    config = run.config.validation
    if config is not None and run.accelerator.is_main_process:
        row = validate(run, config)
        log.record("validation", row)
        text = " · ".join(f"{name} {value:.4g}" for name, value in row.items())
        console.print(f"step {run.step} · validation · {text}")
    run.accelerator.wait_for_everyone()


def _save(run: Run) -> None:
    path = run.folder.checkpoint(run.step)
    run.checkpoint().save(
        path,
        step=run.step,
        images=run.images,
        loader=run.stream.state_dict(),
        keep=run.config.training.keep_checkpoints,
    )


def _say(run: Run, console: Console, text: str) -> None:
    if run.accelerator.is_main_process:
        console.print(text)
