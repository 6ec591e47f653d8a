"""Where the weights of a new run begin; the same on every process, since seed and crops are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from latent_ae.autoencoder import Autoencoder, encode_mode, image_channels
from latent_ae.config import Config
from latent_ae.data import TrainingStream, normalize
from latent_ae.initialization import linear_code_, zero_residual_branches_
from latent_ae.quantized import QuantizedAutoencoder

__all__ = ["begin"]

_WITH_RESIDUALS = (AutoencoderKL, QuantizedAutoencoder)
# Of the crops that a bottleneck sees: the same ones, whatever the run's batches and processes.
_BATCH, _BATCHES = 8, 64


def begin(config: Config, model: Autoencoder, device: torch.device) -> None:
    """Applies `network.init`, and lets the bottleneck look at latents of training crops.

    Args:
        config: the run.
        model: not yet wrapped for several processes, which then take the first one's weights.
        device: where the encoder is to run.
    """
    network, init = model.network, config.network.init
    if isinstance(network, _WITH_RESIDUALS) and init == "zero_residual":
        zero_residual_branches_(network)
    elif isinstance(network, _WITH_RESIDUALS) and init == "linear":
        # As many pixels as 128 crops of 64² have: the fits look at all of them.
        crops = max(8, round(128 * (64 / config.data.resolution) ** 2))
        linear_code_(network, next(_crops(config, model, crops)))
    if wanted := model.bottleneck.starts_on():
        model.to(device)
        model.bottleneck.start(_latents(config, model, wanted, device))


def _crops(config: Config, model: Autoencoder, count: int) -> Iterator[Tensor]:
    """Batches of training crops, of shape (count, C, H, W), in [-1, 1]."""
    data = config.data.squares(count).model_copy(update={"workers": 0})
    channels = image_channels(model.network)
    stream = TrainingStream(data, seed=config.training.seed, channels=channels)
    while True:
        yield normalize(next(stream).images)


@torch.no_grad()
def _latents(config: Config, model: Autoencoder, wanted: int, device: torch.device) -> Tensor:
    """Latents of training crops with `wanted` positions in all, or of `_BATCHES` batches."""
    found: list[Tensor] = []
    for images in _crops(config, model, _BATCH):
        found.append(encode_mode(model.network, images.to(device))[0])
        positions = sum(latents[:, 0].numel() for latents in found)
        if positions >= wanted or len(found) == _BATCHES:
            break
    return torch.cat(found)
