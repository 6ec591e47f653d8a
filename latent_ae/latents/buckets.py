"""Batches of latents of one size, from a folder that has several."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from latent_ae.latents.dataset import LatentDataset

__all__ = ["BucketBatchSampler"]


class BucketBatchSampler(Sampler[list[int]]):
    """For a `DataLoader`'s `batch_sampler`: each batch has latents of one (h, w).

    Every item comes once an epoch, but for what fills no batch where `drop_last` says so. The
    batches of all sizes are mixed. It divides nothing among processes: Accelerate does that with
    whole batches, and skips those that a resumed run has had.

    Args:
        dataset: what to draw from.
        batch_size: items a batch.
        shuffle: anew each epoch (`set_epoch`).
        seed: of the order.
        drop_last: leave out what is fewer than `batch_size`.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.drop_last, self.epoch = drop_last, 0
        index = dataset.index
        sizes = index.size if dataset.variants == "all" else index.size[index.picture[:-1]]
        self._groups = [np.flatnonzero(sizes == number) for number in range(len(index.sizes))]

    def set_epoch(self, epoch: int) -> None:
        """Another order from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        more = 0 if self.drop_last else self.batch_size - 1
        return sum((len(group) + more) // self.batch_size for group in self._groups)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        batches = []
        for group in self._groups:
            order = rng.permutation(group) if self.shuffle else group
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                if len(batch) == self.batch_size or not self.drop_last:
                    batches.append(batch.tolist())
        places = rng.permutation(len(batches)) if self.shuffle else range(len(batches))
        for place in places:
            yield batches[place]
