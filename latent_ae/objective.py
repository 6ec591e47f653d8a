"""From a reconstruction to the number that is minimised, in units per image element."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latent_ae.config import AnyBottleneck, LossesConfig
from latent_ae.losses import PIXEL_LOSSES, PerceptualLoss
from latent_ae.outputs import Reconstruction

__all__ = ["Losses", "Objective"]


@dataclass
class Losses:
    """The total to differentiate, and the terms that made it, without graph, for the log."""

    total: Tensor
    terms: dict[str, Tensor]


class Objective(nn.Module):
    """The negative ELBO divided by the number of image elements, with a perceptual term.

    fixed variance:    pixel + w·LPIPS + λ·KL / (C·H·W)
    learned variance:  (pixel + w·LPIPS) / exp(s) + s + λ·KL / (C·H·W)

    `pixel` is the mean over image elements, KL the sum over latent elements of an image, both then
    the mean over the batch. With L2 and fixed variance, λ is twice the variance of the Gaussian
    decoder; with the learned one s is its logarithm up to a factor and λ = 2 is the exact bound
    (docs/theory.md). The learned s is LDM's `logvar` (`ldm/modules/losses/contperceptual.py`),
    there left out of the optimizer; here it is this module's parameter.

    Args:
        losses: the reconstruction side.
        bottleneck: λ and its warm-up.
        untrained: leave LPIPS' weights random, where only shapes matter.
    """

    def __init__(
        self, losses: LossesConfig, bottleneck: AnyBottleneck, *, untrained: bool = False
    ) -> None:
        super().__init__()
        self.pixel = PIXEL_LOSSES[losses.pixel]
        self.pixel_name = losses.pixel
        self.weight = bottleneck.weight
        self.warmup_steps = bottleneck.warmup_steps
        self.perceptual_weight = losses.perceptual.weight if losses.perceptual else 0.0
        self.perceptual: PerceptualLoss | None = None
        if losses.perceptual is not None:
            net, path = losses.perceptual.net, losses.perceptual.path
            self.perceptual = PerceptualLoss(net, path, untrained=untrained)
        self.logvar: nn.Parameter | None = None
        if losses.variance == "learned":
            self.logvar = nn.Parameter(torch.tensor(float(losses.logvar_init)))

    def forward(self, images: Tensor, reconstruction: Reconstruction, step: int) -> Losses:
        """The losses of a batch.

        Args:
            images: the targets, of shape (B, C, H, W), in [-1, 1].
            reconstruction: what the autoencoder made of them.
            step: optimizer updates done, for the warm-up of λ.
        """
        pixel = self.pixel(images, reconstruction.images).mean()
        terms = {self.pixel_name: pixel}
        total = pixel
        if self.perceptual is not None:
            terms["lpips"] = self.perceptual(images, reconstruction.images).mean()
            total = total + self.perceptual_weight * terms["lpips"]
        if self.logvar is not None:
            total = total / self.logvar.exp() + self.logvar
            terms["logvar"] = self.logvar
        elements = images[0].numel()
        for name, term in reconstruction.code.loss_terms.items():
            terms[name] = term.mean() / elements
            total = total + self.bottleneck_weight(step) * terms[name]
        terms |= {"total": total, **reconstruction.code.statistics}
        return Losses(total, {name: term.detach() for name, term in terms.items()})

    def bottleneck_weight(self, step: int) -> float:
        """λ at a step: a linear rise over `warmup_steps`, then constant."""
        if step >= self.warmup_steps:
            return self.weight
        return self.weight * (step + 1) / (self.warmup_steps + 1)
