"""Starting Accelerate, and the folder that all processes share."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from latent_ae.config import Config, DiscriminatorConfig
from latent_ae.config_file import dump_yaml, load_config
from latent_ae.errors import UserError
from latent_ae.run_folder import RunFolder, write_whole

__all__ = ["claim_folder", "refuse_other_run", "start_accelerator"]

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
# These decide what a checkpoint's tensors mean; everything else may change between two starts.
_FIXED = ("network", "bottleneck", "distillation", "losses.variance", "training.ema")
# A run may be resumed with an adversary that it did not have, or without the one it had.
_FIXED_IF_BOTH = tuple(f"adversary.{name}" for name in DiscriminatorConfig.model_fields)


def start_accelerator(config: Config) -> Accelerator:
    """Accelerate's object for a run.

    Raises:
        UserError: the precision or a tracker is not to be had here.
    """
    training = config.training
    # Training decides the number of micro-steps, not the launcher's environment.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    # A process that trains twice may do so in another precision; Accelerate keeps the first one's.
    AcceleratorState._reset_state()
    have = {tracker.value for tracker in get_available_trackers()}
    for name in training.trackers:  # Accelerate leaves out what is not installed
        if name not in have:
            raise UserError(f"training.trackers: {name} is not installed here")
    try:
        accelerator = Accelerator(
            mixed_precision=_PRECISIONS[training.precision],
            gradient_accumulation_steps=training.accumulation,
            log_with=list(training.trackers) or None,
            project_dir=config.output,
            kwargs_handlers=[
                # The others wait while the main process validates; half an hour is no hang.
                InitProcessGroupKwargs(timeout=timedelta(hours=2)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except ValueError as error:
        raise UserError(f"training: Accelerate refuses this config: {error}") from error
    if training.precision == "fp16" and accelerator.scaler is None:
        # Accelerate would train on, without the scaling that keeps small gradients from vanishing.
        raise UserError("training.precision fp16 needs a GPU; take bf16 or fp32 on this machine")
    return accelerator


def refuse_other_run(folder: RunFolder, config: Config) -> None:
    """Raises `UserError` if the folder's checkpoints are of another network than the config's."""
    if not folder.all_checkpoints():
        return
    before, now = folder.config().model_dump(), config.model_dump()
    both = before["adversary"] is not None and now["adversary"] is not None
    for key in (*_FIXED, *(_FIXED_IF_BOTH if both else ())):
        old, new = (_at(content, key) for content in (before, now))
        if old != new:
            raise UserError(
                f"{folder.path} holds a run with another {key}; choose another `output`, or "
                f"resume with the config in {folder.config_file}"
            )


def claim_folder(folder: RunFolder, config: Config, accelerator: Accelerator) -> None:
    """Writes the resolved config; refuses a folder whose checkpoints are of another network.

    Raises:
        UserError: they are.
    """
    refuse_other_run(folder, config)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.sweep()
        head = "# Resolved by latent_ae; resume with the command that began this run.\n"
        text = head + dump_yaml(config)
        # What cannot be read back must not replace what can.
        write_whole(folder.config_file, text, check=load_config)
    accelerator.wait_for_everyone()


def _at(content: dict[str, Any], key: str) -> object:
    for part in key.split("."):
        content = content[part]
    return content
