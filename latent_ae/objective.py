"""From a reconstruction to the number that is minimised, in units per image element."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from latent_ae.config import AnyBottleneck, Config, LossesConfig
from latent_ae.losses import PIXEL_LOSSES, Alignment, PerceptualLoss
from latent_ae.losses.variance import (
    ROUNDING_ERRORS,
    learned_logvar,
    optimal_logvar,
    scaled_distance,
    unit_of,
)
from latent_ae.network_kinds import Network
from latent_ae.networks import code_channels, image_channels
from latent_ae.outputs import Reconstruction

__all__ = ["Losses", "Objective"]


@dataclass
class Losses:
    """The total to differentiate, and the terms that made it, without graph, for the log.

    `unit` is what the distance was divided by, exp(s), without graph; 1 with a fixed variance.
    """

    total: Tensor
    terms: dict[str, Tensor]
    unit: Tensor | float = 1.0


class Objective(nn.Module):
    """The negative ELBO divided by the number of image elements, with a perceptual term.

    fixed:        D + λ·KL / (C·H·W)                          D = pixel + w·LPIPS
    learned:      (D + r) / exp(s) + s + λ·KL / (C·H·W)       one trained s
    per_channel:  the mean of (D_c + r) / exp(s_c) + s_c, + λ·KL / (C·H·W)
    optimal:      log(D + r) + 1 + λ·KL / (C·H·W)             the learned one at its best s

    `pixel` is the mean over image elements (D_c: of one channel), KL the sum over latent elements
    of an image, both then the mean over the batch; r is the error of 8-bit rounding. With L2 and
    fixed variance, λ is twice the variance of the Gaussian decoder; elsewhere s is its logarithm
    and λ = 2 is the exact bound (docs/theory.md, docs/decoder-variance.md). LPIPS belongs to no
    channel and stands in each D_c. The learned s is LDM's `logvar`
    (`ldm/modules/losses/contperceptual.py`), there left out of the optimizer; here it is this
    module's parameter.

    The penalties of a quantiser (codebook, commitment, entropy) are means over latents and added as
    they are, times λ, as in taming-transformers' `VQLPIPSWithDiscriminator`.

    An alignment adds weight · (cosine + distance). With its adaptive weight it adds the plain sum,
    as `GradientShare` weighs the gradients; that sum is not in the `total` of the terms.

    Args:
        losses: the reconstruction side.
        bottleneck: λ and its warm-up.
        channels: of the pictures.
        latent_channels: c, which an alignment projects.
        untrained: leave frozen networks' weights random, where only shapes matter.
    """

    def __init__(
        self,
        losses: LossesConfig,
        bottleneck: AnyBottleneck,
        *,
        channels: int = 3,
        latent_channels: int | None = None,
        untrained: bool = False,
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
        self.variance = losses.variance
        self.rounding = ROUNDING_ERRORS[losses.pixel]
        self.logvar = learned_logvar(losses.variance, channels, losses.logvar_init)
        self.alignment: Alignment | None = None
        if losses.alignment is not None:
            assert latent_channels is not None, "an alignment needs the number of channels"
            self.alignment = Alignment(losses.alignment, latent_channels, untrained=untrained)

    @classmethod
    def of(cls, config: Config, network: Network, *, untrained: bool = False) -> Objective:
        """That of a run, for the channels of its network."""
        return cls(
            config.losses,
            config.bottleneck,
            channels=image_channels(network),
            latent_channels=code_channels(network),
            untrained=untrained,
        )

    def forward(self, images: Tensor, reconstruction: Reconstruction, step: int) -> Losses:
        """The losses of a batch.

        Args:
            images: that were encoded, of shape (B, C, H, W), in [-1, 1].
            reconstruction: what the autoencoder made of them.
            step: optimizer updates done, for the warm-up of λ.
        """
        target = images if reconstruction.target is None else reconstruction.target
        errors = self.pixel(target, reconstruction.images)
        terms = {self.pixel_name: errors.mean()}
        by_channel = self.variance == "per_channel"
        total = errors.mean((0, 2, 3)) if by_channel else terms[self.pixel_name]
        if self.perceptual is not None:
            terms["lpips"] = self.perceptual(target, reconstruction.images).mean()
            total = total + self.perceptual_weight * terms["lpips"]
        unit: Tensor | float = 1.0
        if self.variance != "fixed":
            total, unit = self._calibrated(total + self.rounding, terms)
            if self.weight and "kl" in reconstruction.code.loss_terms:
                terms["implied_weight"] = self.bottleneck_weight(step) * unit
        elements = images[0].numel()
        for name, term in reconstruction.code.loss_terms.items():
            terms[name] = term.mean() / elements
            total = total + self.bottleneck_weight(step) * terms[name]
        for name, penalty in reconstruction.code.penalties.items():
            terms[name] = penalty.mean()
            total = total + self.bottleneck_weight(step) * terms[name]
        terms |= {"total": total, **reconstruction.code.statistics}
        if self.alignment is not None:
            aligned = self.alignment(images, reconstruction.code.latents)
            weight = 1.0 if self.alignment.config.adaptive else self.alignment.config.weight
            total = total + weight * sum(aligned.values())
            terms |= aligned if self.alignment.config.adaptive else aligned | {"total": total}
        return Losses(total, {name: term.detach() for name, term in terms.items()}, unit)

    def _calibrated(self, distance: Tensor, terms: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The distance in units of the decoder's variance, and that unit; notes s in `terms`."""
        logvar = optimal_logvar(distance) if self.logvar is None else self.logvar
        terms["logvar"] = logvar.mean()
        if logvar.dim():
            terms |= {f"logvar_{channel}": one for channel, one in enumerate(logvar)}
        return scaled_distance(distance, logvar), unit_of(logvar)

    def bottleneck_weight(self, step: int) -> float:
        """λ at a step: a linear rise over `warmup_steps`, then constant."""
        if step >= self.warmup_steps:
            return self.weight
        return self.weight * (step + 1) / (self.warmup_steps + 1)
