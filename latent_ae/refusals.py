"""What a config asks that its network cannot give: said before anything is trained or told."""

from __future__ import annotations

from latent_ae.adversary import shape_of_discriminator
from latent_ae.autoencoder import require_bottleneck
from latent_ae.config import SMALLEST_MEASURED, Config, colourless
from latent_ae.errors import UserError
from latent_ae.losses import Equivariance
from latent_ae.network_kinds import Network
from latent_ae.networks import (
    downsampling,
    image_channels,
    require_checkpointing,
    require_divisible,
    require_statistics,
)

__all__ = ["equivariance_of", "refuse_misfit"]


def refuse_misfit(config: Config, network: Network) -> None:
    """Raises `UserError` where a run and the network it is to train do not fit together."""
    require_bottleneck(config.bottleneck, network, config.network.path)
    if config.training.gradient_checkpointing:
        require_checkpointing(network)
    require_statistics(network, frozen=config.network.freeze == "encoder")
    require_divisible(config.data.resolution, network, "data.resolution")
    if config.data.buckets is not None:
        require_divisible(config.data.buckets.multiple, network, "data.buckets.multiple")
    if config.validation is not None and config.validation.resolution:
        require_divisible(config.validation.resolution, network, "validation.resolution")
    channels, smallest = image_channels(network), config.data.smallest_side()
    if reason := colourless(config.losses, channels):
        raise UserError(reason)
    if config.adversary is not None:
        shape_of_discriminator(config.adversary, smallest, channels)
    if equivariance := equivariance_of(config, network):
        remedy = "lower data.buckets.max_aspect or raise its resolutions"
        remedy = "raise data.resolution" if config.data.buckets is None else remedy
        equivariance.require_room(smallest, remedy)


def equivariance_of(config: Config, network: Network) -> Equivariance | None:
    """What draws a run's transforms, with the smallest pictures that its losses can take."""
    if config.losses.equivariance is None:
        return None
    smallest = SMALLEST_MEASURED if config.losses.perceptual else 1
    if config.adversary is not None:
        channels = image_channels(network)
        judge = shape_of_discriminator(config.adversary, config.data.smallest_side(), channels)
        smallest = max(smallest, judge.smallest_side)
    seed, factor = config.training.seed, downsampling(network)
    return Equivariance(config.losses.equivariance, seed, factor, smallest)
