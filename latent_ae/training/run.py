"""Everything a run holds while it trains."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from latent_ae.adversary import Adversary
from latent_ae.bottlenecks import Bottleneck
from latent_ae.config import Config
from latent_ae.data import BucketPlan, TrainingStream
from latent_ae.errors import UserError
from latent_ae.losses import Equivariance, GradientShare
from latent_ae.network_kinds import Network, spec_of
from latent_ae.networks import image_channels
from latent_ae.processes import from_main
from latent_ae.run_folder import RunFolder
from latent_ae.training.checkpoint import Checkpoint
from latent_ae.training.guard import Guard
from latent_ae.training.teacher import Teacher

__all__ = ["LastInput", "Run"]


@dataclass
class Run:
    """A training run in memory.

    `autoencoder`, `objective` and `adversary` are the modules that training calls, wrapped for
    several processes; `network`, `bottleneck` and `rule` are the first and the last without the
    wrapping: the autoencoder's parts, and the adversary that says when it learns and how much it
    weighs.
    """

    config: Config
    folder: RunFolder
    accelerator: Accelerator
    autoencoder: nn.Module
    network: Network
    bottleneck: Bottleneck
    objective: nn.Module
    optimizer: AcceleratedOptimizer
    adversary: nn.Module | None
    rule: Adversary | None
    discriminator_optimizer: torch.optim.Optimizer | None
    ema: EMAModel | None
    last_input: LastInput
    guard: Guard
    sharded: bool
    teacher: Teacher | None = None
    share: GradientShare | None = None
    equivariance: Equivariance | None = None
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
            self.bottleneck,
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
                channels=image_channels(self.network),
            )
        if self.stream.plan is not None:
            self._agree_on(self.stream.plan)
            # With another number of processes it goes on where the next batch begins.
            self.images = self.stream.plan.begins(self.images)

    def _agree_on(self, plan: BucketPlan) -> None:
        """Raises `UserError` unless all processes have found the same pictures."""
        own = torch.tensor([plan.fingerprint], device=self.accelerator.device)
        if self.accelerator.gather(own).unique().numel() > 1:  # pyright: ignore
            raise UserError(
                "the processes do not find the same pictures of the same sizes: some files can be "
                "read on one machine and not on another; mend the data, or remove the caches of "
                "`datasets`, and start again"
            )

    def close(self) -> None:
        """Ends the loader's workers."""
        if self.stream is not None:
            self.stream.close()


class LastInput:
    """What the decoder's last convolution received, kept while `wanted`."""

    def __init__(self, network: Network) -> None:
        self.wanted = False
        self.features: Tensor | None = None
        self._network, self._spec = network, spec_of(network)
        last: Any = self._spec.last_layer(network)
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

    def gradient(self, at_picture: Tensor) -> Tensor:
        """The gradient at that convolution's output, from the one at the decoder's."""
        return self._spec.at_last_layer(self._network, at_picture)
