"""The training loop, top to bottom."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from rich.console import Console

from latent_ae.config import Config
from latent_ae.errors import UserError
from latent_ae.training.log import RunLog
from latent_ae.training.run import Run, prepare
from latent_ae.training.sharding import whole
from latent_ae.training.startup import show_startup
from latent_ae.training.step import update
from latent_ae.training.stop import StopRequest
from latent_ae.training.validation import validate

__all__ = ["train"]

_DOUBTFUL = 3  # updates skipped at the very end, after which the weights are not trusted


def train(config: Config, console: Console | None = None, *, announce: bool = True) -> Path:
    """Trains an autoencoder, or goes on where the run in `config.output` stopped.

    SIGTERM and SIGUSR1 end it after the step that is running, with a checkpoint.

    Args:
        config: the run; the same config resumes it.
        console: where progress is shown; standard error when left out.
        announce: whether to begin with the table of what the run is.

    Returns:
        The run's folder, ready for `export_run`.

    Raises:
        UserError: the config cannot be met, the data cannot be read, the folder holds another run,
            a checkpoint cannot be written, or losses keep not being finite.
    """
    console = console or Console(stderr=True)
    with StopRequest() as stop:
        run = prepare(config)
        stop.connect()
        first, steps = run.step, config.training.steps
        if announce:
            show_startup(run, console)
        if run.step:
            _say(run, console, f"going on from step {run.step} of {steps} in {run.folder.path}")
        with closing(run), RunLog(run, console) as log:
            if _validation_is_missing(run):
                _validate(run, log, console)
            while run.step < steps and not stop.agreed():
                log.add(update(run))
                run.step, run.images = run.step + 1, run.images + run.effective_batch
                _keep_record(run, log, console)
            if first < run.step < steps:
                _save(run, log, console)
                how = f"stopped by {stop.name} at step {run.step} of {steps}"
                _say(run, console, f"{how}; the same command goes on from there")
    if run.skipped:
        _say(run, console, f"{len(run.skipped)} unreadable pictures were skipped")
    return run.folder.path


def _keep_record(run: Run, log: RunLog, console: Console) -> None:
    """What is due after a step: the log, a checkpoint, a validation, or the way back."""
    config, training = run.config, run.config.training
    if _due(run, training.patience) and run.guard.look()[0] >= training.patience:
        _roll_back(run, log, console)
        return
    if _due(run, training.log_every):
        log.write()
    run.owes_checkpoint |= _due(run, training.checkpoint_every)
    if run.owes_checkpoint:
        _save(run, log, console)
    if config.validation and _due(run, training.validate_every):
        _validate(run, log, console)


def _due(run: Run, every: int) -> bool:
    return run.step == run.config.training.steps or run.step % every == 0


def _validation_is_missing(run: Run) -> bool:
    """Whether the run was killed between the checkpoint it stands at and its validation."""
    checkpoint = run.folder.checkpoint(run.step)
    due = run.config.validation is not None and _due(run, run.config.training.validate_every)
    return due and checkpoint.exists() and "validation" not in run.folder.progress(checkpoint)


def _save(run: Run, log: RunLog, console: Console) -> None:
    """Saves, unless the weights are in doubt: they must not take a good checkpoint's place.

    Weights that are no numbers send the run back. Those with which the last update had to be
    skipped may be the reason for it, so the checkpoint waits for an update that succeeds.
    """
    parts = [run.network, run.objective, run.adversary]
    finite = [p.isfinite().all() for part in parts if part for p in part.parameters()]
    skipped = run.guard.look()[0]
    end = run.step == run.config.training.steps
    if not all(whole(finite)) or (end and skipped >= _DOUBTFUL):
        _roll_back(run, log, console)
    elif skipped == 0 or end:
        with log.paused():
            run.save()
        run.owes_checkpoint = False


def _roll_back(run: Run, log: RunLog, console: Console) -> None:
    """Goes on from the last checkpoint with lower rates.

    Raises:
        UserError: there is none, or it has been done as often as `training.rollbacks` allows.
    """
    training, broken = run.config.training, run.step
    what = f"the losses or gradients are not finite near step {broken}"
    kept = [path.name for path in run.folder.all_checkpoints()]
    if not kept or run.rollbacks >= training.rollbacks:
        again = f", after {run.rollbacks} returns with lower rates" if run.rollbacks else ""
        where = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise UserError(f"{what}{again}; {where}: lower training.learning_rate and start again")
    rollbacks = run.rollbacks + 1
    run.restore()
    run.rollbacks, run.owes_checkpoint = rollbacks, False
    run.guard.forgive()
    log.go_back()
    _say(
        run,
        console,
        f"{what}: back to step {run.step}, learning rates × {run.rate_factor:g} from here",
    )


def _validate(run: Run, log: RunLog, console: Console) -> None:
    """Measures, and keeps the weights if none before were better."""
    with log.paused():
        metrics = validate(run)
    by, saved = run.config.training.best_by, run.folder.checkpoint(run.step)
    best = run.folder.best(by)
    before = run.folder.progress(best)["validation"][by] if best else None
    sign = -1 if by == "lpips" else 1
    improved = before is None or sign * metrics[by] > sign * before
    if improved and not saved.exists():
        _save(run, log, console)
    if run.accelerator.is_main_process:
        if saved.exists():
            run.folder.note_validation(run.step, metrics)
        log.record("validation", metrics, run.folder.sheet(run.step))
        text = " · ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        console.print(f"step {run.step} · validation · {text}{' · the best' if improved else ''}")
    run.accelerator.wait_for_everyone()


def _say(run: Run, console: Console, text: str) -> None:
    if run.accelerator.is_main_process:
        console.print(text, markup=False)
