"""A frozen autoencoder whose final latents a run learns to write and to read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latent_ae.autoencoder import decode_latents, encode_mode
from latent_ae.config import DistillationConfig
from latent_ae.errors import UserError
from latent_ae.network_kinds import Network, spec_of
from latent_ae.networks import downsampling, image_channels, load_network
from latent_ae.scaling import LatentScaling

__all__ = ["Lesson", "Teacher"]


@dataclass
class Lesson:
    """What a teacher makes of a batch.

    Attributes:
        latents: final, as pipelines hand them to a denoiser; fp32, of shape (B, c, h, w).
        pictures: what shall come of them; fp32, of shape (B, C, H, W), in [-1, 1].
    """

    latents: Tensor
    pictures: Tensor


class Teacher:
    """Encodes a batch once, without gradients; it is in no checkpoint and in no optimizer.

    Args:
        config: its folder, and what the decoder shall learn from.
        device: where it runs.

    Raises:
        UserError: there is no autoencoder of a known class in its folder, or one whose final
            latents its config does not tell.
    """

    def __init__(self, config: DistillationConfig, device: torch.device) -> None:
        self.config = config
        self.network: Network = load_network(config.teacher).requires_grad_(False).eval()
        self.network.to(device)  # pyright: ignore[reportArgumentType]
        spec = spec_of(self.network)
        if not spec.statistics:
            raise UserError(
                f"distillation.teacher {config.teacher} is an {spec.name}, whose latents pipelines "
                "scale by a BatchNorm over patches: no AutoencoderTiny can take its place"
            )
        self.scaling = LatentScaling.of(self.network)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Lesson:
        """The lesson of pictures of shape (B, C, H, W), in [-1, 1]: latents at their mode."""
        raw, _ = encode_mode(self.network, images)
        pictures = images
        if self.config.target == "teacher":
            pictures = decode_latents(self.network, raw).float().clamp(-1, 1)
        return Lesson(self.scaling.to_final(raw), pictures)

    def require_same_shape(self, network: Network) -> None:
        """Raises `UserError` unless a network's latents have the teacher's shape."""
        own, wanted = (
            f"f{downsampling(n)} with {n.config['latent_channels']} channels of pictures with "
            f"{image_channels(n)}"
            for n in (network, self.network)
        )
        if own != wanted:
            raise UserError(
                f"the latents of distillation.teacher {self.config.teacher} are {wanted}, those of "
                f"the network {own}: give the network the levels, latent_channels and in_channels "
                "of the teacher"
            )
