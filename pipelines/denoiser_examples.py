"""What a latent denoiser learns from: batches of noisy latents, each error with its weight.

Which latents, noise and noise levels a process sees at a step follows from the seed, the process
and the step alone, so a resumed run goes on with what an uninterrupted one would have seen.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import cycle, islice

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.utils.data import Dataset

from denoisers import TRAIN_TIMESTEPS, DenoiserConfig, build_scheduler
from latent_ae.latents import BucketBatchSampler, LatentDataset

__all__ = ["Examples", "ddpm_weight", "flow_weight", "mix", "order_of"]


class Examples(Dataset[dict[str, Tensor]]):
    """Batches of noisy latents; which, is a function of seed, process and number alone.

    Item `number` is a batch: `noisy` and `target` of shape (B, c, h, w), `timestep` and `weight` of
    shape (B,), and `label` of shape (B,), which is `classes` in the place of missing and dropped
    labels. Step `s` takes the numbers from `s · accumulation` on. Latents of several sizes (aspect
    buckets) come in batches of one size.

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
        self._buckets = None
        if len(latents.index.sizes) > 1:
            self._buckets = BucketBatchSampler(latents, config.batch_size, seed=config.seed)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        config, (rank, world) = self.config, self.process
        with torch.random.fork_rng(devices=[]):  # LatentDataset draws from the global generator
            torch.manual_seed(mix(config.seed, rank, number))
            rows = [self.latents[i] for i in self._positions(number * world + rank)]
            latents = torch.stack([row["latents"] for row in rows])
            labels = torch.tensor([row["label"] for row in rows])
            drop = torch.rand(len(rows)) < config.label_dropout
            known = (labels >= 0) & (labels < self.classes)  # none is, when labels are left out
            labels = torch.where(known & ~drop, labels, self.classes)
            noisy, timestep, target, weight = self._corrupt(latents)
        return {
            "noisy": noisy,
            "timestep": timestep,
            "target": target,
            "weight": weight,
            "label": labels,
        }

    def _positions(self, batch: int) -> list[int]:
        """Where the latents of a batch lie, of an endless stream that is shuffled anew each epoch.

        Of latents of several sizes each comes at least once an epoch: a batch for which a size has
        too few takes some twice.
        """
        size, seed = self.config.batch_size, self.config.seed
        if self._buckets is not None:
            epoch, place = divmod(batch, len(self._buckets))
            return list(islice(cycle(_bucket_batches(self._buckets, epoch)[place]), size))
        places = (divmod(batch * size + i, len(self.latents)) for i in range(size))
        return [int(order_of(len(self.latents), seed, epoch)[place]) for epoch, place in places]

    def _corrupt(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        config, noise = self.config, torch.randn_like(latents)
        # One draw for the batch, spread evenly: less variance (Kingma et al. 2021, VDM, I.1).
        uniform = (torch.arange(len(latents)) + torch.rand(1)) / len(latents)
        if isinstance(self.scheduler, DDIMScheduler):
            # (63 + 0.9999999) / 64 is 1 in float32.
            timestep = (uniform * TRAIN_TIMESTEPS).long().clamp(max=TRAIN_TIMESTEPS - 1)
            noisy = self.scheduler.add_noise(latents, noise, timestep)  # pyright: ignore
            target, weight = noise, ddpm_weight(config, self.scheduler.alphas_cumprod[timestep])
            if config.prediction == "v_prediction":
                target = self.scheduler.get_velocity(latents, noise, timestep)  # pyright: ignore
            return noisy, timestep, target, weight
        sigma = uniform
        if config.sigmas == "logit_normal":
            sigma = (config.logit_mean + config.logit_std * torch.special.ndtri(uniform)).sigmoid()
        sigma = config.shift * sigma / (1 + (config.shift - 1) * sigma)
        s = sigma.view(-1, 1, 1, 1)
        noisy, target = (1 - s) * latents + s * noise, noise - latents
        return noisy, sigma * TRAIN_TIMESTEPS, target, flow_weight(config, sigma)


def ddpm_weight(config: DenoiserConfig, alphas_cumprod: Tensor) -> Tensor:
    """The weight of a squared error at these ᾱ in [0, 1], both of shape (B,).

    `min_snr` (Hang et al. 2023) weighs the error of the data by min(SNR, γ), which is
    min(SNR, γ) / SNR for the noise and min(SNR, γ) / (SNR + 1) for v. Nothing divides by an SNR of
    0, as it is at the last step of v-prediction: there the weight is 0.
    """
    if config.weighting == "none":
        return torch.ones_like(alphas_cumprod)
    signal, noise, gamma = alphas_cumprod, 1 - alphas_cumprod, config.snr_gamma
    if config.prediction == "epsilon":
        return (gamma * noise / signal).clamp(max=1)
    return torch.minimum(signal, gamma * noise)  # times noise + signal, which is 1


def flow_weight(config: DenoiserConfig, sigma: Tensor) -> Tensor:
    """The weight of a squared error at these σ in [0, 1], both of shape (B,).

    `cosmap`: 2 / (π (1 − 2σ + 2σ²)); `sigma_sqrt`: σ⁻², as diffusers calls what Esser et al. 2024
    compare; σ as small as the scheduler's first is the least that counts.
    """
    if config.weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
    if config.weighting == "sigma_sqrt":
        return sigma.clamp(min=1 / TRAIN_TIMESTEPS) ** -2
    return torch.ones_like(sigma)


@lru_cache(maxsize=2)
def order_of(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation, of shape (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch)))


@lru_cache(maxsize=2)
def _bucket_batches(sampler: BucketBatchSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def mix(*parts: int) -> int:
    """A seed that is unlike the seeds of other parts."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint32)[0])
