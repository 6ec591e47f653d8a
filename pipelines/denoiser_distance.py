"""How far a denoiser's pictures are, as a crowd, from the pictures that its latents decode to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from denoiser_examples import order_of
from denoiser_samples import decode, draw, noise_of
from denoiser_trainer import Trainer
from latent_ae.channels import has_colours
from latent_ae.errors import UserError
from latent_ae.evaluation import FEATURE_NETWORKS, FrechetDistance
from latent_ae.latents import LatentDataset
from latent_ae.processes import from_main
from latent_diffusion import LatentDiffusionPipeline

__all__ = ["Distance"]

_DISTANCE = 2  # keeps its noise apart from other draws of the same seed


class Distance:
    """The Fréchet distance on features between drawn pictures and the latents' own pictures.

    Picture `i` is drawn from noise of the seed and `i`, with the label and the size of the i-th
    latent of an order that the seed fixes; when the latents are used up, the order begins again.
    The first of the same order, each once, are what is compared with: a draw from their posterior,
    decoded. So the autoencoder's own error is in neither. Processes take batches in turn.

    Args:
        trainer: whose folder keeps the features' moments of the latents' pictures.
        pipeline: with the weights that shall draw.
        data: the latents.

    Raises:
        UserError: there are fewer than two latents, their pictures are too small for the features,
            or the network's weights are not to be had.
    """

    def __init__(
        self, trainer: Trainer, pipeline: LatentDiffusionPipeline, data: LatentDataset
    ) -> None:
        config = trainer.config
        if len(data) < 2:
            raise UserError(f"{data.folder} holds one latent; a Fréchet distance takes two")
        self.config, self.pipeline, self.accelerator = config, pipeline, trainer.accelerator
        self.data = LatentDataset(data.folder, columns=("label",), seed=config.seed)
        labels = self.data.index.table["label"].fill_null(-1).to_numpy()
        self.labels = torch.from_numpy(labels.astype(np.int64))
        network = FEATURE_NETWORKS[config.distance_features](config.distance_weights)
        self.network = network.to(self.accelerator.device)
        self._require_large_enough()
        self.samples = config.distance_samples
        self.pictures = min(self.samples, len(data))
        self.file = trainer.folder / f"reference-{config.distance_features}.safetensors"
        self.identity = self._identity()

    def measure(self) -> dict[str, Any]:
        """A row of the log: the distance, of how many, on which features; on every process."""
        if not from_main(lambda: self._cached() is not None):
            moments = self._moments(self.pictures, self._decoded)
            if self.accelerator.is_main_process:
                self._keep(moments)
        drawn = self._moments(self.samples, self._drawn)
        row = {
            "frechet_distance": None,
            "samples": self.samples,
            "pictures": self.pictures,
            "features": self.config.distance_features,
        }
        if self.accelerator.is_main_process:
            frechet = self._empty()
            frechet.merge({"real": self._cached(), "reconstructions": {"drawn": drawn}})
            row["frechet_distance"] = frechet.compute("drawn").distance
        return row

    def _require_large_enough(self) -> None:
        channels = self.pipeline.vae.config.get("in_channels", 3)
        if not has_colours(channels):
            raise UserError(
                f"the autoencoder's pictures have {channels} channels, and the features of "
                f"{self.config.distance_features} are of 1, 3 or 4: take --distance-every 0"
            )
        factor = self.pipeline.vae_scale_factor
        for height, width in ((factor * h, factor * w) for h, w in self.data.index.sizes):
            picture = torch.zeros(1, 3, height, width, dtype=torch.uint8)
            try:
                self.network(picture.to(self.accelerator.device))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a kernel is larger than what is left of the picture
                name = self.config.distance_features
                raise UserError(
                    f"pictures of {height} × {width} are too small for the features of {name}: "
                    "take --distance-features inception, or --distance-every 0"
                ) from error

    def _moments(
        self, count: int, pictures_of: Callable[[list[int]], Iterable[Tensor]]
    ) -> dict[str, Tensor]:
        """What all processes together know of the features of pictures 0 to `count` - 1."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        own, size = self._empty(), self.config.sample_batch_size
        for start in range(rank * size, count, world * size):
            for pictures in pictures_of(list(range(start, min(start + size, count)))):
                own.update(pictures, {})
        together = self._empty()
        for state in gather_object([own.state()]):
            together.merge(state)
        return together.state()["real"]

    def _decoded(self, numbers: list[int]) -> Iterable[Tensor]:
        for some in self._by_size(numbers):
            latents = [self.data[self._position(number)]["latents"] for number in some]
            yield decode(self.pipeline, torch.stack(latents))

    def _drawn(self, numbers: list[int]) -> Iterable[Tensor]:
        channels, seed = self.data.manifest.latent_shapes[0][0], self.config.seed
        for some in self._by_size(numbers):
            shape = (channels, *self.data.size_of(self._position(some[0])))
            noise = torch.stack([noise_of(shape, seed, number, 0, _DISTANCE) for number in some])
            labels = self.labels[[self._position(number) for number in some]]
            yield draw(self.pipeline, self.config, noise, labels)

    def _by_size(self, numbers: list[int]) -> Iterable[list[int]]:
        groups: dict[tuple[int, int], list[int]] = {}
        for number in numbers:
            groups.setdefault(self.data.size_of(self._position(number)), []).append(number)
        return groups.values()

    def _position(self, number: int) -> int:
        count = len(self.data)
        return int(order_of(count, self.config.seed, 0)[number % count])

    def _empty(self) -> FrechetDistance:
        return FrechetDistance(self.network, self.accelerator.device)

    def _identity(self) -> str:
        """What the kept moments depend on."""
        manifest = (self.data.folder / "manifest.json").read_bytes()
        weights = self.config.distance_weights
        parts = {
            "latents": hashlib.sha256(manifest).hexdigest(),
            "weights": hashlib.sha256(Path(weights).read_bytes()).hexdigest() if weights else None,
            "pictures": self.pictures,
            "seed": self.config.seed,
        }
        return json.dumps(parts)

    def _keep(self, moments: dict[str, Tensor]) -> None:
        aside = self.file.with_suffix(".tmp")
        save_file(moments, aside, metadata={"of": self.identity})
        aside.replace(self.file)

    def _cached(self) -> dict[str, Tensor] | None:
        """The kept moments, if they are of these pictures and features."""
        try:
            with safe_open(self.file, "pt") as file:
                if (file.metadata() or {}).get("of") != self.identity:
                    return None
                return {name: file.get_tensor(name) for name in ("count", "mean", "scatter")}
        except (OSError, SafetensorError):  # there is none yet, or it is damaged
            return None
