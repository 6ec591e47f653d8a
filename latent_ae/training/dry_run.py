"""Two steps, a save and a resume: what would not work is told in a minute, not after a night."""

from __future__ import annotations

import gc
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from latent_ae.config import Config
from latent_ae.describe import describe
from latent_ae.errors import UserError
from latent_ae.processes import from_main
from latent_ae.run_folder import RunFolder
from latent_ae.training.loop import train
from latent_ae.training.processes import refuse_other_run, start_accelerator
from latent_ae.training.startup import show_facts

__all__ = ["DryRun", "dry_run"]


@dataclass(frozen=True)
class DryRun:
    """What a run will take.

    Attributes:
        images_per_second: of all processes, in the last step, when everything has settled.
        seconds: that the whole training would take at this speed, without validations.
        peak_memory: of this process, in bytes; on a GPU what torch allocated there.
        checkpoint: size of one, in bytes.
        free: on the disk of `output`, in bytes.
    """

    images_per_second: float
    seconds: float
    peak_memory: int
    checkpoint: int
    free: int


def dry_run(config: Config, console: Console) -> DryRun:
    """Does two steps, a validation, a save, a resume and two steps more, beside `config.output`.

    Everything runs as it will: both optimizers, the adversary with its voice, all processes. The
    folder it does this in is removed again; `config.output` is not touched.

    Raises:
        UserError: something would not work, in the words in which training would say it, or the
            disk is too small for the checkpoints that are to stay.
    """
    refuse_other_run(RunFolder(config.output), config)
    accelerator = start_accelerator(config)
    output = Path(config.output)
    folder = RunFolder(output.with_name(f".{output.name}.dry-run"))
    if accelerator.is_main_process:
        show_facts(describe(config, accelerator.num_processes), console)
        shutil.rmtree(folder.path, ignore_errors=True)
    accelerator.wait_for_everyone()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        for steps in (2, 4):
            train(_short(config, folder.path, steps), console, announce=False)
            if from_main(lambda: folder.progress(folder.latest())["step"]) < steps:
                raise UserError("the dry run was stopped by a signal")
            gc.collect()  # Accelerate leaves cycles, which would hold the first run's memory
            torch.cuda.empty_cache()
        result = from_main(lambda: _measured(config, folder))
        accelerator.wait_for_everyone()
    finally:  # no waiting here: where one process has failed the others never come
        if accelerator.is_main_process:
            shutil.rmtree(folder.path, ignore_errors=True)
    wanted = result.checkpoint * (config.training.keep_checkpoints + 2)
    if wanted > result.free:
        raise UserError(
            f"the disk of {config.output} has {result.free / 2**30:.1f} GiB left, and the "
            f"checkpoints need {wanted / 2**30:.1f}: lower training.keep_checkpoints or choose "
            "another output"
        )
    return result


def _short(config: Config, folder: Path, steps: int) -> Config:
    """The same run, a few steps long, its adversary heard from the second one on."""
    training = config.training.model_copy(
        update={
            "steps": steps,
            "log_every": 1,
            "checkpoint_every": 2,
            "validate_every": 2,
            "keep_checkpoints": 2,
            "trackers": (),
        }
    )
    changes = {"training": training, "output": str(folder)}
    if config.adversary is not None:
        soon = {"start": 1, "warmup_steps": 1, "ramp_steps": 0}
        changes["adversary"] = config.adversary.model_copy(update=soon)
    if config.validation is not None:
        few = {"images": min(config.validation.images, config.validation.batch_size)}
        changes["validation"] = config.validation.model_copy(update=few)
    return config.model_copy(update=changes)


def _measured(config: Config, folder: RunFolder) -> DryRun:
    before, last = [row for row in folder.log_rows() if row["group"] == "train"][-2:]
    size = sum(file.stat().st_size for file in folder.latest().rglob("*") if file.is_file())
    images = config.training.steps * (last["images"] - before["images"])
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:  # kilobytes, except on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    speed = last["images_per_second"]
    return DryRun(speed, images / speed, peak, size, shutil.disk_usage(folder.path).free)
