"""What a network's latents look like on training crops, and the scale that follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from latent_ae.autoencoder import encode_mode, image_channels
from latent_ae.bottlenecks import LOGVAR_RANGE
from latent_ae.config import Config, DataConfig
from latent_ae.data import TrainingStream, normalize, source_of
from latent_ae.errors import UserError
from latent_ae.network_kinds import Network, NetworkSpec
from latent_ae.scaling import LatentScaling, LatentStatistics

__all__ = [
    "STATISTICS",
    "chosen_statistics",
    "known_numbers",
    "measure_latents",
    "measuring_data",
    "scaling_of",
    "silence_posterior",
]

STATISTICS: tuple[str, ...] = ("scale", "shift", "channels", "folded", "kept")


@torch.no_grad()
def measure_latents(
    network: Network, data: DataConfig, images: int
) -> tuple[LatentStatistics, Tensor]:
    """Encodes training crops and gathers the moments of their latents.

    Returns:
        The statistics, and one batch of the crops, of shape (B, C, H, W), in [-1, 1].
    """
    batch = min(data.batch_size, images)
    # Squares also where there are buckets: the first batches would be of a few shapes.
    data = data.squares(batch).model_copy(update={"workers": 0})
    stream = TrainingStream(data, channels=image_channels(network))
    measured, sample = LatentStatistics(), torch.empty(0)
    while measured.images < images:
        sample = normalize(next(stream).images.to(network.device))
        measured.update(*encode_mode(network, sample))
    return measured, sample


@torch.no_grad()
def silence_posterior(network: AutoencoderKL) -> None:
    """Makes the posterior of a plain autoencoder as narrow as there is: its code is the mean.

    Training left the log-variance's channels as they began; whoever samples would add noise that
    the decoder has never seen.
    """
    last, channels = network.quant_conv, network.config["latent_channels"]
    if last is None:
        last = network.encoder.conv_out
    last.weight[channels:] = 0
    last.bias[channels:] = LOGVAR_RANGE[0]  # pyright: ignore[reportOptionalSubscript]


def measuring_data(config: Config, data: str | Path | None) -> DataConfig:
    """The run's own training crops, or crops like them of the pictures at `data`."""
    if data is None:
        return config.data
    source = source_of(data).model_dump()
    return config.data.model_copy(update=source)


def chosen_statistics(config: Config, spec: NetworkSpec, statistics: str | None) -> str:
    """What to write, one of `STATISTICS`: what was asked for, or what fits the run.

    Args:
        config: the run's.
        spec: of the network's class.
        statistics: what was asked for, if anything.

    Raises:
        UserError: no such statistics, or not for this run or this class.
    """
    if statistics is not None and statistics not in STATISTICS:
        raise UserError(f"statistics {statistics!r} is unknown; valid: {', '.join(STATISTICS)}")
    frozen = config.network.freeze == "encoder"
    chosen = statistics or ("kept" if frozen else "scale")
    if config.distillation and chosen != "scale":
        raise UserError(
            f"statistics {chosen!r}: a distilled network's latents are its teacher's, scaled "
            "already; leave --statistics out"
        )
    if frozen and chosen != "kept":
        raise UserError(
            f"statistics {chosen!r} would scale the latents anew, which the frozen encoder of "
            "this run has left where they were; leave it out, or say `kept`"
        )
    if chosen == "kept" and config.network.path is None:
        raise UserError("statistics 'kept': this run began with a new network, which had none")
    if chosen != "kept" and chosen not in spec.statistics:
        raise UserError(
            f"statistics {chosen!r} have no place in an {spec.name}; valid there: "
            f"{', '.join(spec.statistics)}"
        )
    return chosen


def known_numbers(network: Network, scaling: LatentScaling) -> dict[str, Any]:
    """The keys of a scaling that the config of the network's class has."""
    return {key: value for key, value in scaling.to_config().items() if key in network.config}


def scaling_of(measured: LatentStatistics, statistics: str) -> LatentScaling:
    """The numbers of a config that bring such latents to unit variance, by one of `STATISTICS`."""
    if statistics == "folded":  # the weights hold them
        return LatentScaling()
    factor = 1 / measured.std
    if statistics == "shift":
        return LatentScaling(scaling_factor=factor, shift_factor=measured.mean)
    if statistics == "channels":
        # Pipelines with channel statistics compute (z − mean) · factor / std: with std · factor in
        # the file they get unit variance, and those that know the factor alone still do nearly.
        mean, std = measured.channel_mean, [value * factor for value in measured.channel_std]
        return LatentScaling(scaling_factor=factor, latents_mean=mean, latents_std=std)
    return LatentScaling(scaling_factor=factor)
