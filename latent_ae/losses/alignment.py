"""VA-VAE's regulariser: latents that are like a vision model's features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from latent_ae.channels import as_rgb
from latent_ae.config import AlignmentConfig
from latent_ae.losses.vision import VisionModel

__all__ = ["Alignment", "GradientShare", "cosine_excess", "distance_excess"]


def cosine_excess(latents: Tensor, features: Tensor, margin: float) -> Tensor:
    """The marginal cosine loss: mean ReLU(1 − m₁ − cos(z'ᵢ, fᵢ)) over places and images.

    Yao et al. 2025, "Reconstruction vs. Generation", the marginal cosine similarity loss.

    Args:
        latents: projected, of shape (B, N, D).
        features: of the same shape.
        margin: m₁.
    """
    return F.relu(1 - margin - F.cosine_similarity(latents, features, dim=-1)).mean()


def distance_excess(latents: Tensor, features: Tensor, margin: float) -> Tensor:
    """The marginal distance-matrix loss: mean ReLU(|cos(zᵢ, zⱼ) − cos(fᵢ, fⱼ)| − m₂).

    The pairs are all those of one image (Yao et al. 2025, the marginal distance matrix similarity
    loss). It holds a few matrices of N × N numbers an image.

    Args:
        latents: not projected, of shape (B, N, c).
        features: of shape (B, N, D).
        margin: m₂.
    """
    of_latents, of_features = (
        unit @ unit.mT for unit in (F.normalize(part, dim=-1) for part in (latents, features))
    )
    return F.relu((of_latents - of_features).abs() - margin).mean()


class Alignment(nn.Module):
    """Two margins between latents and the features of a frozen vision model.

    Features are resized to the latents' grid (bilinear), as in VA-VAE. The projection W of the
    latents to the features' channels is linear, without bias, and is trained.

    Args:
        config: the model and the margins.
        latent_channels: c.
        untrained: random weights for the model, where only shapes matter.

    Raises:
        UserError: the model cannot be loaded, or gives no map of features.
    """

    def __init__(
        self, config: AlignmentConfig, latent_channels: int, *, untrained: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionModel(config.model, config.resolution, untrained=untrained)
        self.projection = nn.Linear(latent_channels, self.vision.channels, bias=False)

    def forward(self, images: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """The two terms, `alignment_cosine` and `alignment_distance`, each a scalar.

        Args:
            images: that were encoded, of shape (B, C, H, W), in [-1, 1]; grey and RGBA ones are
                shown to the model as RGB (`channels.as_rgb`).
            latents: of shape (B, c, h, w).
        """
        features = self.vision(as_rgb(images))
        if features.shape[-2:] != latents.shape[-2:]:
            sides = (latents.shape[-2], latents.shape[-1])
            features = F.interpolate(features, sides, mode="bilinear", align_corners=False)
        with torch.autocast(latents.device.type, enabled=False):
            z, f = (part.float().flatten(2).mT for part in (latents, features))
            return {
                "alignment_cosine": cosine_excess(self.projection(z), f, self.config.cosine_margin),
                "alignment_distance": distance_excess(z, f, self.config.distance_margin),
            }


class GradientShare:
    """Gives the alignment's gradient at the latents the reconstruction's length, times a weight.

    VA-VAE weighs by ‖∂L_rec/∂w‖ / ‖∂L_align/∂w‖, w being the encoder's last layer, which costs a
    second backward pass through decoder and LPIPS. Here the latents leave as two copies, one for
    the decoder and one for the alignment. The backward pass brings both gradients back at the
    same time, and their sum goes on, so it costs no pass at all. Lengths are those at the latents,
    over the whole batch and all processes. What a discriminator wishes is in the decoder's share.

    Args:
        weight: of the alignment.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.ratio: Tensor | None = None

    def split(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The latents twice: for the decoder, for the alignment."""
        return _Split.apply(latents, self)  # pyright: ignore[reportReturnType]

    def take(self) -> dict[str, Tensor]:
        """What the last backward pass weighed the alignment's gradient by, for the log."""
        ratio, self.ratio = self.ratio, None
        return {} if ratio is None else {"alignment_weight": self.weight * ratio}

    def combine(self, reconstruction: Tensor, alignment: Tensor) -> Tensor:
        """The gradient that goes on to the encoder, of the shape of both."""
        squares = torch.stack([g.float().square().sum() for g in (reconstruction, alignment)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(squares)
        rec, align = squares.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        self.ratio = torch.where(squares[1] > 0, rec / align, 0)  # all margins may be met
        # In this order neither factor overflows where the alignment is nearly satisfied.
        return reconstruction + (self.weight * rec) * (alignment / align)


class _Split(torch.autograd.Function):
    """Two copies of a tensor whose gradients meet in `GradientShare.combine`."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, share: GradientShare) -> tuple[Tensor, Tensor]:
        ctx.share = share
        return latents.view_as(latents), latents.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.share.combine(*gradients), None
