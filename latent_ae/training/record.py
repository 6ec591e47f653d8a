"""What is due after a step: the log, a checkpoint, a validation, or the way back."""

from __future__ import annotations

import torch
from rich.console import Console

from latent_ae.errors import UserError
from latent_ae.processes import from_main
from latent_ae.run_folder import judging_metric
from latent_ae.training.log import RunLog
from latent_ae.training.run import Run
from latent_ae.training.sharding import whole
from latent_ae.training.validation import validate

__all__ = ["Recorder"]

_DOUBTFUL = 3  # updates skipped in a row, after which the weights are not trusted


class Recorder:
    """Keeps a run's record, and brings it back where its numbers are lost.

    Every decision is the same on all processes: what lies on the disk is looked at by the main
    process alone, because a shared file system may show the others an older state.
    """

    def __init__(self, run: Run, log: RunLog, console: Console) -> None:
        self.run, self.log, self.console = run, log, console
        self._owes_checkpoint = False

    def after_step(self) -> None:
        """Does what is due at the run's step."""
        run, training = self.run, self.run.config.training
        if self._due(training.patience) and run.guard.look()[0] >= training.patience:
            self._go_back()
            return
        if self._due(training.log_every):
            self.log.write()
        self._owes_checkpoint |= self._due(training.checkpoint_every)
        if self._owes_checkpoint and not self._save():
            return
        if run.config.validation and self._due(training.validate_every):
            self._validate()

    def make_up_validation(self) -> None:
        """Validates where the run was killed between a checkpoint and its validation."""
        run = self.run
        checkpoint = run.folder.checkpoint(run.step)
        if run.config.validation is None or not self._due(run.config.training.validate_every):
            return
        if from_main(
            lambda: checkpoint.exists() and "validation" not in run.folder.progress(checkpoint)
        ):
            self._validate()

    def stop(self, reason: str) -> None:
        """Saves at the end of a run that was asked to stop, and says where it will go on."""
        run = self.run
        if run.guard.look()[0] < _DOUBTFUL and self._finite():
            with self.log.paused():
                run.save()
        where = from_main(lambda: [path.name for path in run.folder.all_checkpoints()])
        self.say(
            f"stopped by {reason} at step {run.step} of {run.config.training.steps}; the same "
            f"command goes on from {where[-1] if where else 'the beginning'}"
        )

    def say(self, text: str) -> None:
        """Prints, on the main process."""
        if self.run.accelerator.is_main_process:
            self.console.print(text, markup=False)

    def _due(self, every: int) -> bool:
        return self.run.step == self.run.config.training.steps or self.run.step % every == 0

    def _save(self) -> bool:
        """Saves, unless the weights are in doubt: they must not take a good checkpoint's place.

        Weights that are no numbers send the run back. Those with which the last update had to be
        skipped may be the reason for it, so the checkpoint waits for an update that succeeds.

        Returns:
            Whether the run still stands where it stood.
        """
        end = self.run.step == self.run.config.training.steps
        skipped = self.run.guard.look()[0]
        if skipped and not end:
            return True
        if skipped >= _DOUBTFUL or not self._finite():
            self._go_back()
            return False
        with self.log.paused():
            self.run.save()
        self._owes_checkpoint = False
        return True

    def _finite(self) -> bool:
        """Whether all that is trained is numbers; waits for the device once."""
        parts = [
            part for part in (self.run.network, self.run.objective, self.run.adversary) if part
        ]
        states = [value for part in parts for value in part.state_dict().values()]
        finite = [value.isfinite().all() for value in states if value.is_floating_point()]
        return bool(torch.stack(whole(finite)).all().item())

    def _go_back(self) -> None:
        """Goes on from the last checkpoint with lower rates.

        Raises:
            UserError: there is none, or it was done as often as `training.rollbacks` allows.
        """
        run, training = self.run, self.run.config.training
        what = f"the losses or gradients are not finite near step {run.step}"
        kept = from_main(lambda: [path.name for path in run.folder.all_checkpoints()])
        if not kept or run.rollbacks >= training.rollbacks:
            again = f", after {run.rollbacks} returns with lower rates" if run.rollbacks else ""
            where = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            raise UserError(f"{what}{again}; {where}: lower training.learning_rate and start again")
        rollbacks = run.rollbacks + 1
        run.restore()
        run.rollbacks, self._owes_checkpoint = rollbacks, False
        run.guard.forgive()
        self.log.go_back()
        factor = f"learning rates × {run.rate_factor:g} from here"
        self.say(f"{what}: back to step {run.step}, {factor}")

    def _validate(self) -> None:
        """Measures, and keeps the weights if none before were better."""
        run = self.run
        with self.log.paused():
            metrics = validate(run)
        by = judging_metric(metrics, run.config.training.best_by)
        sign = -1 if by == "lpips" else 1
        best = from_main(lambda: run.folder.best_score(by))
        improved = best is None or sign * metrics[by] > sign * best
        saved = run.folder.checkpoint(run.step)
        if improved and not from_main(saved.exists) and not self._save():
            return
        if run.accelerator.is_main_process:
            if saved.exists():
                run.folder.note_validation(run.step, metrics)
            self.log.record("validation", metrics, run.folder.sheet(run.step))
            text = " · ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self.say(f"step {run.step} · validation · {text}{' · the best' if improved else ''}")
        run.accelerator.wait_for_everyone()
