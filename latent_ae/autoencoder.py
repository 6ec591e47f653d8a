"""A diffusers network and a bottleneck: the module that training runs forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor, nn

from latent_ae.bottlenecks import Bottleneck, build_bottleneck, split_moments
from latent_ae.config import AnyBottleneck, AutoencoderConfig, misfit
from latent_ae.errors import UserError
from latent_ae.losses import Draw, GradientShare
from latent_ae.network_folders import (
    WEIGHT_VARIANTS,
    WEIGHTS_FILE,
    folder_config,
    only_variant,
    stored_variants,
    weight_files,
    weights_sha256,
)
from latent_ae.network_kinds import Network, spec_of
from latent_ae.networks import (
    build_network,
    downsampling,
    image_channels,
    load_network,
    require_divisible,
)
from latent_ae.outputs import Code, Reconstruction
from latent_ae.quantized import QuantizedAutoencoder

__all__ = [
    "WEIGHTS_FILE",
    "WEIGHT_VARIANTS",
    "Autoencoder",
    "build_network",
    "decode_code",
    "decode_latents",
    "default_device",
    "downsampling",
    "encode_mode",
    "encode_moments",
    "encoder_side",
    "folder_config",
    "full_precision",
    "image_channels",
    "load_network",
    "only_variant",
    "reconstruct",
    "require_bottleneck",
    "require_divisible",
    "stored_variants",
    "trained_parameters",
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
        images: of shape (B, C, H, W), in [-1, 1].
    """
    encoded = encode_moments(network, images)
    return split_moments(encoded) if spec_of(network).posterior else (encoded.float(), None)


def decode_latents(network: Network, latents: Tensor) -> Tensor:
    """Images of shape (B, C, H, W), nominally in [-1, 1], not clamped.

    Args:
        network: diffusers' autoencoder.
        latents: raw, of shape (B, c, H/f, W/f).
    """
    decoded: Any = network.decode(latents)  # pyright: ignore[reportArgumentType]
    return decoded.sample


def decode_code(network: Network, latents: Tensor) -> Tensor:
    """Images of shape (B, C, H, W) of what a bottleneck gives, which is not quantised again."""
    if isinstance(network, VQModel):  # whichever quantiser it has
        return QuantizedAutoencoder.decode_entries(network, latents)  # pyright: ignore
    return decode_latents(network, latents)


def reconstruct(network: Network, images: Tensor) -> Tensor:
    """The reconstruction from the posterior's mode: what is measured and shown.

    Args:
        network: diffusers' autoencoder.
        images: of shape (B, C, H, W), in [-1, 1]; so is the result, nominally.
    """
    return decode_latents(network, encode_mode(network, images)[0])


def encoder_side(network: Network) -> list[nn.Module]:
    """The modules that make latents of pictures: those to freeze when the latents must not move."""
    return spec_of(network).encoder(network)


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name, in the network's order."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


class Autoencoder(nn.Module):
    """The way through: encoder, bottleneck, decoder.

    Training calls `forward` only: under DistributedDataParallel, the `encode` and `decode` of the
    unwrapped module would skip the synchronisation of gradients.

    Args:
        network: diffusers' autoencoder.
        bottleneck: from what it encodes to a `Code`.
        freeze_encoder: train the decoder alone. The encoder then runs without a graph, and the
            bottleneck's losses, which nothing could lower, are left out.

    Attributes:
        share: where the latents part for decoder and alignment; None without such a loss.
    """

    def __init__(
        self, network: Network, bottleneck: Bottleneck, *, freeze_encoder: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.bottleneck = bottleneck
        self.share: GradientShare | None = None
        self.encoder_frozen = freeze_encoder
        if freeze_encoder:
            for part in encoder_side(network):
                part.requires_grad_(False)

    @classmethod
    def from_config(cls, config: AutoencoderConfig) -> Autoencoder:
        """Builds both parts.

        Raises:
            UserError: `network.path` cannot be loaded, or the bottleneck does not fit what it
                holds.
        """
        network = build_network(config.network, config.bottleneck)
        require_bottleneck(config.bottleneck, network, config.network.path)
        frozen = config.network.freeze == "encoder"
        bottleneck = build_bottleneck(config.bottleneck, network, learns=not frozen)
        return cls(network, bottleneck, freeze_encoder=frozen)

    def train(self, mode: bool = True) -> Autoencoder:
        """As of any module; a frozen encoder stays in eval mode: its BatchNorms must not move."""
        super().train(mode)
        if self.encoder_frozen:
            for part in encoder_side(self.network):
                part.eval()
        return self

    def blocks(self) -> list[nn.Module]:
        """The network's blocks, each a unit to shard or to compile, without its outer layers."""
        return spec_of(self.network).blocks(self.network)

    def forward(
        self, images: Tensor, draw: Draw | None = None, taught: Tensor | None = None
    ) -> Reconstruction:
        """Maps images to their `Reconstruction`, in fp32.

        Args:
            images: of shape (B, C, H, W), in [-1, 1].
            draw: how the latents, and the pictures that they are to become, are transformed.
            taught: a teacher's latents of the images, of shape (B, c, h, w), of which the decoder
                learns instead; the own latents' squared distance from them, summed over a picture,
                is then the code's loss term `latents`.
        """
        code = self._encode(images)
        latents, target = code.latents, images
        if taught is not None:
            latents = taught
            code.loss_terms["latents"] = (code.latents - taught).square().flatten(1).sum(1)
        if self.share is not None:
            latents, code.latents = self.share.split(latents)
        if draw is not None and draw.kind == "transformed":
            target = draw.pictures(images, images.shape[-1] // latents.shape[-1])
            latents = draw.latents(latents)
        return Reconstruction(decode_code(self.network, latents).float(), code, target)

    def _encode(self, images: Tensor) -> Code:
        if not self.encoder_frozen:
            return self.bottleneck(encode_moments(self.network, images))
        with torch.no_grad():
            code = self.bottleneck(encode_moments(self.network, images))
        return replace(code, loss_terms={}, penalties={})


def require_bottleneck(
    bottleneck: AnyBottleneck, network: Network, path: str | None = None
) -> None:
    """Raises `UserError` unless a bottleneck suits what the network's encoder gives.

    Args:
        bottleneck: its section.
        network: diffusers' autoencoder.
        path: where it was loaded from, for the sentence.
    """
    spec = spec_of(network)
    name = f"the {spec.name} in {path}" if path else f"diffusers' {spec.name}"
    if reason := misfit(bottleneck.kind, name, spec.bottlenecks):
        raise UserError(reason)
    if isinstance(network, QuantizedAutoencoder):
        wanted: dict[str, Any] = bottleneck.said()  # pyright: ignore[reportAttributeAccessIssue]
        for key, value in wanted.items():
            found = network.config[key]
            found = tuple(found) if isinstance(found, list) else found
            if found != value:
                key = {"quantizer": "kind", "num_vq_embeddings": "codebook_size"}.get(key, key)
                found = str(found).lower() if isinstance(found, bool) else found
                where = path or "this network"
                raise UserError(
                    f"the quantiser of {where} is another than the config's: set "
                    f"bottleneck.{key}={found} (not {value})"
                )
