"""How a run is put together, and what is refused before its first step."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from latent_ae.acceleration import accelerate_autoencoder
from latent_ae.adversary import Adversary
from latent_ae.autoencoder import (
    Autoencoder,
    image_channels,
    trained_parameters,
)
from latent_ae.config import Config, TrainingConfig
from latent_ae.data import require_one_readable
from latent_ae.errors import UserError
from latent_ae.losses import GradientShare
from latent_ae.network_kinds import Network
from latent_ae.objective import Objective
from latent_ae.refusals import equivariance_of, refuse_misfit
from latent_ae.run_folder import RunFolder
from latent_ae.training.beginning import begin
from latent_ae.training.guard import Guard
from latent_ae.training.processes import claim_folder, start_accelerator
from latent_ae.training.run import LastInput, Run
from latent_ae.training.sharding import alike, shard_
from latent_ae.training.teacher import Teacher

__all__ = ["prepare"]


def prepare(config: Config) -> Run:
    """Builds a run, or restores it from the newest checkpoint in its folder.

    Raises:
        UserError: the config cannot be met here, or the folder holds a different run.
    """
    folder = RunFolder(config.output)
    accelerator = start_accelerator(config)
    claim_folder(folder, config, accelerator)
    teacher = Teacher(config.distillation, accelerator.device) if config.distillation else None
    torch.manual_seed(config.training.seed)
    model = Autoencoder.from_config(config)
    _check(config, model.network, teacher)
    if not folder.all_checkpoints():
        begin(config, model, accelerator.device)
    objective, channels = Objective.of(config, model.network), image_channels(model.network)
    alignment = config.losses.alignment
    model.share = GradientShare(alignment.weight) if alignment and alignment.adaptive else None
    adversary = rule = Adversary(config.adversary, channels) if config.adversary else None
    if config.training.channels_last:
        for part in (objective, adversary):  # or LPIPS would copy every picture back
            if part is not None:
                part.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    network, bottleneck, last_input = model.network, model.bottleneck, LastInput(model.network)
    autoencoder = _ready(model, config.training, accelerator)
    # DDP refuses a module that has nothing to train: without a learned variance, only autocast.
    fixed = not any(p.requires_grad for p in objective.parameters())
    objective = accelerator.prepare_model(objective, evaluation_mode=fixed)
    learning = list(trained_parameters(network).values())
    trained = [*learning, *trained_parameters(objective).values()]
    optimizer = _adam(trained, config.training, config.training.betas)
    discriminator_optimizer = None
    if adversary is not None and config.adversary is not None:
        adversary = accelerator.prepare_model(adversary)
        judged = list(adversary.parameters())
        discriminator_optimizer = _adam(judged, config.training, config.adversary.betas)
    ema = None
    if config.training.ema:
        ema = EMAModel(learning, decay=config.training.ema, foreach=True)
    run = Run(
        config,
        folder,
        accelerator,
        autoencoder,
        network,
        bottleneck,
        objective,
        accelerator.prepare_optimizer(optimizer),  # pyright: ignore[reportArgumentType]
        adversary,
        rule,
        discriminator_optimizer,
        ema,
        last_input,
        Guard(accelerator.device),
        _sharded(config.training, accelerator),
        teacher,
        model.share,
        equivariance_of(config, network),
    )
    # Each process draws its own posterior noise; the seed of a fresh run, the state of a resumed.
    torch.manual_seed(config.training.seed + 1_000_003 * (1 + accelerator.process_index))
    run.restore()
    return run


def _ready(model: Autoencoder, training: TrainingConfig, accelerator: Accelerator) -> nn.Module:
    """The model as the options ask, on its device, wrapped for several processes.

    From here on only the wrapped forward pass may be called in training.
    """
    sharded = _sharded(training, accelerator)
    if training.channels_last and not sharded:  # FSDP2 wants contiguous weights; pictures suffice
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if not training.stock_layers:
        accelerate_autoencoder(model.network, channels_last=False)  # the layout is as asked by now
    if training.gradient_checkpointing:
        model.network.enable_gradient_checkpointing()
    if training.compile:
        _require_compiler(accelerator.device)
        for block in model.blocks():  # in place, so that names and hooks stay
            block.compile(dynamic=False)  # Inductor fails on some shapes that are not fixed
    wrapped = accelerator.prepare_model(model, evaluation_mode=sharded)
    if sharded:
        shard_(model, accelerator.device, accelerator.num_processes)
    return wrapped


def _require_compiler(device: torch.device) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # inductor's own kinds
        raise UserError(f"training.compile needs a C++ compiler on {device}: {error}") from error


def _sharded(training: TrainingConfig, accelerator: Accelerator) -> bool:
    return training.shard and accelerator.num_processes > 1


def _adam(
    parameters: list[nn.Parameter], training: TrainingConfig, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    # Fused: its kernel reads the flag that skips an update, without the host.
    return torch.optim.AdamW(
        [{"params": kind} for kind in alike(parameters)],
        lr=training.learning_rate,
        betas=betas,
        weight_decay=training.weight_decay,
        fused=True,
    )


def _check(config: Config, network: Network, teacher: Teacher | None) -> None:
    """Refuses before the first step what would fail later."""
    refuse_misfit(config, network)
    if teacher is not None:
        teacher.require_same_shape(network)
    if config.validation is not None:
        require_one_readable(config.validation, image_channels(network))
