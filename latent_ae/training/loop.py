"""The training loop, top to bottom."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from rich.console import Console

from latent_ae.config import Config
from latent_ae.training.log import RunLog
from latent_ae.training.prepare import prepare
from latent_ae.training.record import Recorder
from latent_ae.training.startup import show_startup
from latent_ae.training.step import update
from latent_ae.training.stop import StopRequest

__all__ = ["train"]


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
        with closing(run), RunLog(run, console) as log:
            recorder = Recorder(run, log, console)
            if run.step:
                recorder.say(f"going on from step {run.step} of {steps} in {run.folder.path}")
            recorder.make_up_validation()
            while run.step < steps and not stop.agreed():
                done = update(run)
                log.add(done)
                run.step += 1
                run.images += done.images * run.accelerator.num_processes
                recorder.after_step()
            if first < run.step < steps:
                recorder.stop(stop.name or "a signal")
            if run.step > first:
                recorder.say(f"waited for data {log.data_wait_share():.1%} of the time")
            if run.skipped:
                recorder.say(f"{len(run.skipped)} unreadable pictures were skipped")
    return run.folder.path
