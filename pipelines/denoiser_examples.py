"""What a latent denoiser learns from: a batch of noisy latents for each step.

Which latents, noise and noise levels a process sees at a step follows from the seed, the process
and the step alone, so a resumed run goes on with what an uninterrupted one would have seen.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.utils.data import Dataset

from denoisers import TRAIN_TIMESTEPS, DenoiserConfig, build_scheduler
from latent_ae.latents import LatentDataset

__all__ = ["Examples"]


class Examples(Dataset[dict[str, Tensor]]):
    """What the denoiser learns from at each step, as a function of seed, process and step alone.

    Item `step` is a batch: `noisy` and `target` of shape (B, c, h, w), `timestep` of shape (B,) and
    `label` of shape (B,), which is `classes` in the place of missing and dropped labels.

    Args:
        latents: what to learn.
        config: the batch size, the objective and the seed.
        classes: how many classes; also the index of the null class.
        process: the index and the number of processes.
    """

    def __init__(
        self,
        latents: LatentDataset,
        config: DenoiserConfig,
        classes: int = 0,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        self.latents, self.config, self.classes, self.process = latents, config, classes, process
        self.scheduler = build_scheduler(config)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        config, (rank, world) = self.config, self.process
        with torch.random.fork_rng(devices=[]):  # LatentDataset draws from the global generator
            torch.manual_seed(_mix(config.seed, rank, step))
            first = (step * world + rank) * config.batch_size
            rows = [self._row(first + i) for i in range(config.batch_size)]
            latents = torch.stack([row["latents"] for row in rows])
            labels = torch.tensor([row["label"] for row in rows])
            drop = torch.rand(len(rows)) < config.label_dropout
            known = (labels >= 0) & (labels < self.classes)  # none is, when labels are left out
            labels = torch.where(known & ~drop, labels, self.classes)
            noisy, timestep, target = self._corrupt(latents)
        return {"noisy": noisy, "timestep": timestep, "target": target, "label": labels}

    def _row(self, position: int) -> dict[str, Any]:
        """The picture at a position of an endless stream that is shuffled anew each epoch."""
        epoch, place = divmod(position, len(self.latents))
        return self.latents[int(_order(len(self.latents), self.config.seed, epoch)[place])]

    def _corrupt(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.randn_like(latents)
        # One draw for the batch, spread evenly: less variance (Kingma et al. 2021, VDM, I.1).
        uniform = (torch.arange(len(latents)) + torch.rand(1)) / len(latents)
        if isinstance(self.scheduler, DDIMScheduler):
            # (63 + 0.9999999) / 64 is 1 in float32.
            timestep = (uniform * TRAIN_TIMESTEPS).long().clamp(max=TRAIN_TIMESTEPS - 1)
            noisy = self.scheduler.add_noise(latents, noise, timestep)  # pyright: ignore
            if self.config.prediction == "epsilon":
                return noisy, timestep, noise
            return noisy, timestep, self.scheduler.get_velocity(latents, noise, timestep)  # pyright: ignore
        sigma = uniform
        if self.config.sigmas == "logit_normal":
            sigma = torch.special.ndtri(uniform).sigmoid()
        s = sigma.view(-1, 1, 1, 1)
        return (1 - s) * latents + s * noise, sigma * TRAIN_TIMESTEPS, noise - latents


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(_mix(seed, epoch)))


def _mix(*parts: int) -> int:
    """A seed that is unlike the seeds of other parts."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint32)[0])
