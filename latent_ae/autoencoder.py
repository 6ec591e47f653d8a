"""A diffusers network and a bottleneck: the module that training runs forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from latent_ae.bottlenecks import build_bottleneck, split_moments
from latent_ae.config import AutoencoderConfig
from latent_ae.network_folders import (
    WEIGHT_VARIANTS,
    WEIGHTS_FILE,
    folder_config,
    only_variant,
    stored_variants,
    weight_files,
    weights_sha256,
)
from latent_ae.networks import build_network, downsampling, load_network, require_divisible
from latent_ae.outputs import Reconstruction

__all__ = [
    "WEIGHTS_FILE",
    "WEIGHT_VARIANTS",
    "Autoencoder",
    "build_network",
    "decode_latents",
    "default_device",
    "downsampling",
    "encode_moments",
    "folder_config",
    "full_precision",
    "load_network",
    "only_variant",
    "reconstruct",
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


def encode_moments(network: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean and log-variance of the posterior, of shape (B, 2c, H/f, W/f).

    Args:
        network: diffusers' autoencoder.
        images: of shape (B, 3, H, W), in [-1, 1].
    """
    posterior: Any = network.encode(images).latent_dist  # pyright: ignore
    return posterior.parameters


def decode_latents(network: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images of shape (B, 3, H, W), nominally in [-1, 1], not clamped.

    Args:
        network: diffusers' autoencoder.
        latents: raw, of shape (B, c, H/f, W/f).
    """
    decoded: Any = network.decode(latents)  # pyright: ignore[reportArgumentType]
    return decoded.sample


def reconstruct(network: AutoencoderKL, images: Tensor) -> Tensor:
    """The reconstruction from the posterior's mode: what is measured and shown.

    Args:
        network: diffusers' autoencoder.
        images: of shape (B, 3, H, W), in [-1, 1]; so is the result, nominally.
    """
    mean, _ = split_moments(encode_moments(network, images))
    return decode_latents(network, mean)


class Autoencoder(nn.Module):
    """The way through: encoder, bottleneck, decoder.

    Training calls `forward` only: under DistributedDataParallel, the `encode` and `decode` of the
    unwrapped module would skip the synchronisation of gradients.
    """

    def __init__(self, network: AutoencoderKL, bottleneck: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.bottleneck = bottleneck

    @classmethod
    def from_config(cls, config: AutoencoderConfig) -> Autoencoder:
        """Builds both parts; raises `UserError` where `network.path` cannot be loaded."""
        return cls(build_network(config.network), build_bottleneck(config.bottleneck))

    def blocks(self) -> list[nn.Module]:
        """The network's blocks, each a unit to shard or to compile, without its outer layers."""
        encoder, decoder = self.network.encoder, self.network.decoder
        parts = [*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks]
        return [part for part in parts if part is not None]  # pyright: ignore

    def forward(self, images: Tensor) -> Reconstruction:
        """Maps images of shape (B, 3, H, W) in [-1, 1] to their `Reconstruction`, in fp32."""
        code = self.bottleneck(encode_moments(self.network, images))
        return Reconstruction(decode_latents(self.network, code.latents).float(), code)
