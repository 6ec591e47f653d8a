"""Everything a run holds while it trains, and how it is put together."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import nn

from latent_ae.autoencoder import Autoencoder, require_divisible
from latent_ae.config import Config
from latent_ae.config_file import dump_yaml, load_config
from latent_ae.data import TrainingStream, normalize, require_one_readable
from latent_ae.errors import UserError
from latent_ae.initialization import linear_code_, zero_residual_branches_
from latent_ae.objective import Objective
from latent_ae.run_folder import RunFolder
from latent_ae.training.checkpoint import Checkpoint

__all__ = ["Run", "prepare"]

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
# These decide what a checkpoint's tensors mean; everything else may change between two starts.
_FIXED = ("network", "bottleneck", "losses.variance", "training.ema")


@dataclass
class Run:
    """A training run in memory; `autoencoder` and `objective` are wrapped for several processes."""

    config: Config
    folder: RunFolder
    accelerator: Accelerator
    autoencoder: nn.Module
    network: AutoencoderKL
    objective: nn.Module
    optimizer: AcceleratedOptimizer
    ema: EMAModel | None
    stream: TrainingStream
    step: int = 0
    images: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def effective_batch(self) -> int:
        """Pictures an update, over all processes and micro-steps."""
        training, data = self.config.training, self.config.data
        return data.batch_size * training.accumulation * self.accelerator.num_processes

    def checkpoint(self) -> Checkpoint:
        """What of this run is saved and restored."""
        return Checkpoint(
            self.accelerator,
            self.network,
            self.accelerator.unwrap_model(self.objective),
            self.optimizer,
            self.ema,
        )


def prepare(config: Config) -> Run:
    """Builds a run, or restores it from the newest checkpoint in its folder.

    Raises:
        UserError: the config cannot be met here, or the folder holds a different run.
    """
    folder = RunFolder(config.output)
    accelerator = _accelerator(config)
    _claim(folder, config, accelerator)
    torch.manual_seed(config.training.seed)
    model = Autoencoder.from_config(config)
    _check_resolution(config, model.network)
    if config.validation is not None:  # now, not when the first validation comes
        require_one_readable(config.validation)
    if not folder.all_checkpoints():
        _initialize(config, model.network)
    if config.training.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    objective = Objective(config.losses, config.bottleneck)
    trained = [p for part in (model, objective) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.training.learning_rate,
        betas=config.training.betas,
        weight_decay=config.training.weight_decay,
        fused=True,
    )
    network = model.network
    # From here on only the wrapped forward passes may be called in training.
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    # DDP refuses a module that has nothing to train: without a learned variance, only autocast.
    fixed = not any(p.requires_grad for p in objective.parameters())
    objective = accelerator.prepare_model(objective, evaluation_mode=fixed)
    ema = None
    if config.training.ema:
        ema = EMAModel(network.parameters(), decay=config.training.ema, foreach=True)
    run = Run(
        config,
        folder,
        accelerator,
        wrapped,
        network,
        objective,
        optimizer,
        ema,
        stream=None,  # pyright: ignore[reportArgumentType]  # its start is known after the restore
    )
    # Each process draws its own posterior noise; the seed of a fresh run, the state of a resumed.
    torch.manual_seed(config.training.seed + 1_000_003 * (1 + accelerator.process_index))
    progress = {"step": 0, "images": 0, "loader": None}
    if folder.all_checkpoints():
        progress = run.checkpoint().restore(folder.latest())
    run.step, run.images = progress["step"], progress["images"]
    run.stream = TrainingStream(
        config.data,
        seed=config.training.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        start=progress["images"],
        state=progress["loader"],
    )
    return run


def _accelerator(config: Config) -> Accelerator:
    # Training decides the number of micro-steps, not the launcher's environment.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    # A process that trains twice may do so in another precision; Accelerate keeps the first one's.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=_PRECISIONS[config.training.precision],
        gradient_accumulation_steps=config.training.accumulation,
    )
    if config.training.precision == "fp16" and accelerator.scaler is None:
        # Accelerate would train on, without the scaling that keeps small gradients from vanishing.
        raise UserError("training.precision fp16 needs a GPU; take bf16 or fp32 on this machine")
    return accelerator


def _claim(folder: RunFolder, config: Config, accelerator: Accelerator) -> None:
    """Writes the resolved config; refuses a folder whose checkpoints are of another network."""
    if folder.all_checkpoints():
        before, now = folder.config().model_dump(), config.model_dump()
        for key in _FIXED:
            old, new = (_at(content, key) for content in (before, now))
            if old != new:
                raise UserError(
                    f"{folder.path} holds a run with another {key}; choose another `output`, or "
                    f"resume with the config in {folder.config_file}"
                )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.path.mkdir(parents=True, exist_ok=True)
        head = "# Resolved by latent_ae; resume with the command that began this run.\n"
        aside = folder.config_file.with_suffix(".tmp")
        aside.write_text(head + dump_yaml(config))
        load_config(aside)  # what cannot be read back must not replace what can
        aside.replace(folder.config_file)
    accelerator.wait_for_everyone()


def _initialize(config: Config, network: AutoencoderKL) -> None:
    """Applies `network.init`; the same on every process, since seed and crops are."""
    if config.network.init == "zero_residual":
        zero_residual_branches_(network)
    elif config.network.init == "linear":
        # As many pixels as 128 crops of 64² have: the fits look at all of them.
        crops = max(8, round(128 * (64 / config.data.resolution) ** 2))
        data = config.data.model_copy(update={"workers": 0, "batch_size": crops})
        images = next(TrainingStream(data, seed=config.training.seed)).images
        linear_code_(network, normalize(images))


def _at(content: dict, key: str) -> object:
    for part in key.split("."):
        content = content[part]
    return content


def _check_resolution(config: Config, network: AutoencoderKL) -> None:
    require_divisible(config.data.resolution, network, "data.resolution")
    if config.validation and config.validation.resolution:
        require_divisible(config.validation.resolution, network, "validation.resolution")
