"""Everything a run holds while it trains, and how it is put together."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from latent_ae.adversary import Adversary, shape_of_discriminator
from latent_ae.autoencoder import Autoencoder, require_divisible
from latent_ae.config import Config, TrainingConfig
from latent_ae.data import TrainingStream, normalize, require_one_readable
from latent_ae.errors import UserError
from latent_ae.initialization import linear_code_, zero_residual_branches_
from latent_ae.objective import Objective
from latent_ae.processes import from_main
from latent_ae.run_folder import RunFolder
from latent_ae.training.checkpoint import Checkpoint
from latent_ae.training.guard import Guard
from latent_ae.training.processes import claim_folder, start_accelerator
from latent_ae.training.sharding import shard_

__all__ = ["Run", "prepare"]


@dataclass
class Run:
    """A training run in memory.

    `autoencoder`, `objective` and `adversary` are the modules that training calls, wrapped for
    several processes; `network` and `rule` are the first and the last without the wrapping: the
    autoencoder's network, and the adversary that says when it learns and how much it weighs.
    """

    config: Config
    folder: RunFolder
    accelerator: Accelerator
    autoencoder: nn.Module
    network: AutoencoderKL
    objective: nn.Module
    optimizer: AcceleratedOptimizer
    adversary: nn.Module | None
    rule: Adversary | None
    discriminator_optimizer: torch.optim.Optimizer | None
    ema: EMAModel | None
    last_input: LastInput
    guard: Guard
    sharded: bool
    stream: TrainingStream = None  # pyright: ignore  # opened where the restored run stands
    step: int = 0
    images: int = 0
    rollbacks: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def rate_factor(self) -> float:
        """What rollbacks have left of the learning rates."""
        return self.config.training.rollback_rate**self.rollbacks

    def checkpoint(self) -> Checkpoint:
        """What of this run is saved and restored."""
        return Checkpoint(
            self.accelerator,
            self.network,
            self.accelerator.unwrap_model(self.objective),
            self.optimizer,
            self.rule,
            self.discriminator_optimizer,
            self.ema,
        )

    def save(self) -> None:
        """Writes the checkpoint of this step, unless it lies there already."""
        self.checkpoint().save(
            self.folder,
            {
                "step": self.step,
                "images": self.images,
                "skipped": self.guard.look()[1],
                "rollbacks": self.rollbacks,
                "learning_rate": self.config.training.learning_rate,
            },
            loader=self.stream.state_dict(),
            keep=self.config.training.keep_checkpoints,
            best_by=self.config.training.best_by,
        )

    def restore(self) -> None:
        """Goes to the newest checkpoint, or to the beginning where there is none."""
        progress: dict[str, Any] = {"step": 0, "images": 0, "rollbacks": 0, "loader": None}
        found = from_main(lambda: [path.name for path in self.folder.all_checkpoints()])
        if found:
            progress |= self.checkpoint().restore(self.folder.checkpoints / found[-1])
        self.close()
        self.step, self.images = progress["step"], progress["images"]
        rate = self.config.training.learning_rate
        # Whoever has chosen another rate begins anew with it.
        same = progress.get("learning_rate", rate) == rate
        self.rollbacks = progress["rollbacks"] if same else 0
        self.guard.begin(progress.get("skipped", 0))
        # The first one leaves the sizes of the pictures in the cache of its machine.
        in_turn = (
            self.accelerator.local_main_process_first if self.config.data.buckets else nullcontext
        )
        with in_turn():
            self.stream = TrainingStream(
                self.config.data,
                seed=self.config.training.seed,
                rank=self.accelerator.process_index,
                world=self.accelerator.num_processes,
                start=progress["images"],
                state=progress["loader"],
            )

    def close(self) -> None:
        """Ends the loader's workers."""
        if self.stream is not None:
            self.stream.close()


class LastInput:
    """What the decoder's last convolution received, kept while `wanted`."""

    def __init__(self, network: AutoencoderKL) -> None:
        self.wanted = False
        self.features: Tensor | None = None
        last: Any = network.decoder.conv_out
        self.kernel: tuple[int, int] = last.kernel_size
        last.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.wanted:
            features = inputs[0].detach()
            device = features.device.type
            # Half the memory in bf16; sums over all pixels are more than fp16 can hold.
            half = torch.is_autocast_enabled(device)
            if half and torch.get_autocast_dtype(device) == torch.bfloat16:
                features = features.bfloat16()
            self.features = features

    def take(self) -> Tensor:
        """The features, of shape (B, K, H, W); they are let go."""
        features, self.features = self.features, None
        assert features is not None, "the decoder has not run"
        return features


def prepare(config: Config) -> Run:
    """Builds a run, or restores it from the newest checkpoint in its folder.

    Raises:
        UserError: the config cannot be met here, or the folder holds a different run.
    """
    folder = RunFolder(config.output)
    accelerator = start_accelerator(config)
    claim_folder(folder, config, accelerator)
    torch.manual_seed(config.training.seed)
    model = Autoencoder.from_config(config)
    _check(config, model.network)
    if not folder.all_checkpoints():
        _initialize(config, model.network)
    objective = Objective(config.losses, config.bottleneck)
    adversary = rule = Adversary(config.adversary) if config.adversary else None
    if config.training.channels_last:
        for part in (objective, adversary):  # or LPIPS would copy every picture back
            if part is not None:
                part.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    network, last_input = model.network, LastInput(model.network)
    autoencoder = _ready(model, config.training, accelerator)
    # DDP refuses a module that has nothing to train: without a learned variance, only autocast.
    fixed = not any(p.requires_grad for p in objective.parameters())
    objective = accelerator.prepare_model(objective, evaluation_mode=fixed)
    trained = [*network.parameters(), *(p for p in objective.parameters() if p.requires_grad)]
    optimizer = _adam(trained, config.training, config.training.betas)
    discriminator_optimizer = None
    if adversary is not None and config.adversary is not None:
        adversary = accelerator.prepare_model(adversary)
        judged = list(adversary.parameters())
        discriminator_optimizer = _adam(judged, config.training, config.adversary.betas)
    ema = None
    if config.training.ema:
        ema = EMAModel(network.parameters(), decay=config.training.ema, foreach=True)
    run = Run(
        config,
        folder,
        accelerator,
        autoencoder,
        network,
        objective,
        accelerator.prepare_optimizer(optimizer),  # pyright: ignore[reportArgumentType]
        adversary,
        rule,
        discriminator_optimizer,
        ema,
        last_input,
        Guard(accelerator.device),
        _sharded(config.training, accelerator),
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
    if training.gradient_checkpointing:
        model.network.enable_gradient_checkpointing()
    if training.compile:
        _require_compiler(accelerator.device)
        for block in model.blocks():  # in place, so that names and hooks stay
            block.compile()
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
        [p for p in parameters if p.requires_grad],
        lr=training.learning_rate,
        betas=betas,
        weight_decay=training.weight_decay,
        fused=True,
    )


def _initialize(config: Config, network: AutoencoderKL) -> None:
    """Applies `network.init`; the same on every process, since seed and crops are."""
    if config.network.init == "zero_residual":
        zero_residual_branches_(network)
    elif config.network.init == "linear":
        # As many pixels as 128 crops of 64² have: the fits look at all of them.
        crops = max(8, round(128 * (64 / config.data.resolution) ** 2))
        data = config.data.squares(crops).model_copy(update={"workers": 0})
        images = next(TrainingStream(data, seed=config.training.seed)).images
        linear_code_(network, normalize(images))


def _check(config: Config, network: AutoencoderKL) -> None:
    """Refuses before the first step what would fail later."""
    require_divisible(config.data.resolution, network, "data.resolution")
    if config.data.buckets is not None:
        require_divisible(config.data.buckets.multiple, network, "data.buckets.multiple")
    if config.validation is not None:
        if config.validation.resolution:
            require_divisible(config.validation.resolution, network, "validation.resolution")
        require_one_readable(config.validation)
    if config.adversary is not None:
        shape_of_discriminator(config.adversary, config.data.smallest_side())
