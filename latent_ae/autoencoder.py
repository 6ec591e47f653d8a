"""A diffusers network and a bottleneck: the module that training runs forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from latent_ae.bottlenecks import build_bottleneck, split_moments
from latent_ae.config import AutoencoderConfig, misfit
from latent_ae.errors import UserError
from latent_ae.network_folders import (
    WEIGHT_VARIANTS,
    WEIGHTS_FILE,
    folder_config,
    only_variant,
    stored_variants,
    weight_files,
    weights_sha256,
)
from latent_ae.networks import (
    Network,
    build_network,
    downsampling,
    load_network,
    require_divisible,
    spec_of,
)
from latent_ae.outputs import Reconstruction

__all__ = [
    "WEIGHTS_FILE",
    "WEIGHT_VARIANTS",
    "Autoencoder",
    "build_network",
    "decode_latents",
    "default_device",
    "downsampling",
    "encode_mode",
    "encode_moments",
    "folder_config",
    "full_precision",
    "load_network",
    "only_variant",
    "reconstruct",
    "require_bottleneck",
    "require_divisible",
    "stored_variants",
    "weight_files",
    "weights_sha256",
]


def default_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def full_precision() -> Iterator[None]:
    """Turns off TF32 on GPUs, which convolutions take for fp32 by default: for measurements."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def encode_moments(network: Network, images: Tensor) -> Tensor:
    """What the network's bottleneck takes: a posterior's moments, or latents without one.

    Args:
        network: diffusers' autoencoder.
        images: of shape (B, 3, H, W), in [-1, 1].

    Returns:
        Mean and log-variance of the posterior, of shape (B, 2c, H/f, W/f); or latents of shape
        (B, c, H/f, W/f) where the network has no posterior.
    """
    output: Any = network.encode(images)  # pyright: ignore[reportArgumentType]
    return spec_of(network).encoded(output)


def encode_mode(network: Network, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and log-variance of the posterior, fp32, each of shape (B, c, H/f, W/f).

    Latents without a posterior come with None.

    Args:
        network: diffusers' autoencoder.
        images: of shape (B, 3, H, W), in [-1, 1].
    """
    encoded = encode_moments(network, images)
    return split_moments(encoded) if spec_of(network).posterior else (encoded.float(), None)


def decode_latents(network: Network, latents: Tensor) -> Tensor:
    """Images of shape (B, 3, H, W), nominally in [-1, 1], not clamped.

    Args:
        network: diffusers' autoencoder.
        latents: raw, of shape (B, c, H/f, W/f).
    """
    decoded: Any = network.decode(latents)  # pyright: ignore[reportArgumentType]
    return decoded.sample


def reconstruct(network: Network, images: Tensor) -> Tensor:
    """The reconstruction from the posterior's mode: what is measured and shown.

    Args:
        network: diffusers' autoencoder.
        images: of shape (B, 3, H, W), in [-1, 1]; so is the result, nominally.
    """
    return decode_latents(network, encode_mode(network, images)[0])


class Autoencoder(nn.Module):
    """The way through: encoder, bottleneck, decoder.

    Training calls `forward` only: under DistributedDataParallel, the `encode` and `decode` of the
    unwrapped module would skip the synchronisation of gradients.
    """

    def __init__(self, network: Network, bottleneck: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.bottleneck = bottleneck

    @classmethod
    def from_config(cls, config: AutoencoderConfig) -> Autoencoder:
        """Builds both parts.

        Raises:
            UserError: `network.path` cannot be loaded, or the bottleneck does not fit what it
                holds.
        """
        network = build_network(config.network)
        require_bottleneck(config.bottleneck.kind, network, config.network.path)
        return cls(network, build_bottleneck(config.bottleneck))

    def blocks(self) -> list[nn.Module]:
        """The network's blocks, each a unit to shard or to compile, without its outer layers."""
        return spec_of(self.network).blocks(self.network)

    def forward(self, images: Tensor, taught: Tensor | None = None) -> Reconstruction:
        """Encodes and decodes pictures.

        Args:
            images: of shape (B, 3, H, W), in [-1, 1].
            taught: a teacher's latents of them, of shape (B, c, h, w), of which the decoder learns
                instead; the own latents' squared distance from them, summed over a picture, is then
                the code's loss term `latents`.

        Returns:
            The reconstruction, in fp32.
        """
        code = self.bottleneck(encode_moments(self.network, images))
        latents = code.latents if taught is None else taught
        if taught is not None:
            code.loss_terms["latents"] = (code.latents - taught).square().flatten(1).sum(1)
        return Reconstruction(decode_latents(self.network, latents).float(), code)


def require_bottleneck(kind: str, network: Network, path: str | None = None) -> None:
    """Raises `UserError` unless a bottleneck of this kind suits what the network's encoder gives.

    Args:
        kind: the bottleneck's.
        network: diffusers' autoencoder.
        path: where it was loaded from, for the sentence.
    """
    spec = spec_of(network)
    name = f"the {spec.name} in {path}" if path else f"diffusers' {spec.name}"
    if reason := misfit(kind, name, spec.posterior):
        raise UserError(reason)
