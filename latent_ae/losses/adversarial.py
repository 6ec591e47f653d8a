"""What verdicts are worth: losses of the autoencoder and of the discriminator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from latent_ae.losses.discriminator import NLayerDiscriminator

__all__ = ["ADVERSARIAL_LOSSES", "AdversarialLoss", "lecam", "r1_penalty"]


@dataclass(frozen=True)
class AdversarialLoss:
    """A pair of losses; each maps verdicts of shape (B, 1, h, w) to a scalar.

    Attributes:
        autoencoder: of the verdicts on reconstructions.
        discriminator: of the verdicts on pictures and on reconstructions.
    """

    autoencoder: Callable[[Tensor], Tensor]
    discriminator: Callable[[Tensor, Tensor], Tensor]


def _hinge(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())


def _cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (functional.softplus(-real).mean() + functional.softplus(fake).mean())


def _raise_verdict(fake: Tensor) -> Tensor:
    return -fake.mean()


def _non_saturating(fake: Tensor) -> Tensor:
    return functional.softplus(-fake).mean()


# Hinge: Lim & Ye 2017; vanilla and non-saturating: Goodfellow et al. 2014, eq. 1 and §3, on logits.
# The factor ½ and the autoencoder's side of the first two are LDM's
# (taming/modules/losses/vqperceptual.py), so that its weights carry over.
ADVERSARIAL_LOSSES: dict[str, AdversarialLoss] = {
    "hinge": AdversarialLoss(_raise_verdict, _hinge),
    "vanilla": AdversarialLoss(_raise_verdict, _cross_entropy),
    "non_saturating": AdversarialLoss(_non_saturating, _cross_entropy),
}


def lecam(real: Tensor, fake: Tensor, average_real: Tensor, average_fake: Tensor) -> Tensor:
    """E[(D(x) − ᾱ_fake)²] + E[(D(x̂) − ᾱ_real)²] (LeCam; Tseng et al. 2021, eq. 6).

    Args:
        real: verdicts on pictures, of shape (B, 1, h, w).
        fake: verdicts on reconstructions, of the same shape.
        average_real: moving average of the verdicts on pictures, a scalar.
        average_fake: moving average of the verdicts on reconstructions, a scalar.
    """
    return (real - average_fake).square().mean() + (fake - average_real).square().mean()


def r1_penalty(discriminator: NLayerDiscriminator, real: Tensor) -> Tensor:
    """½ E‖∇ₓ D(x)‖², a picture's D being the mean of its verdicts (R₁; Mescheder et al. 2018).

    Always in fp32: a gradient of a gradient loses bf16's eight bits twice.

    Args:
        discriminator: whose gradient is to be small on pictures.
        real: of shape (B, C, H, W), in [-1, 1].
    """
    with torch.autocast(real.device.type, enabled=False), torch.enable_grad():
        real = real.detach().float().requires_grad_()
        verdicts = discriminator(real).mean((1, 2, 3)).sum()
        (gradient,) = torch.autograd.grad(verdicts, real, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()
