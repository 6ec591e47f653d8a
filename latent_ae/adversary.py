"""The discriminator in training: when it learns, when it is heard, and how loudly."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.grad import conv2d_weight

from latent_ae.config import AdversaryConfig, DiscriminatorConfig
from latent_ae.errors import UserError
from latent_ae.losses import (
    ADVERSARIAL_LOSSES,
    NLayerDiscriminator,
    lecam,
    load_discriminator,
    r1_penalty,
)

__all__ = ["Adversary", "Verdict", "adaptive_weight", "shape_of_discriminator"]

_EPSILON = 1e-4  # LDM's, beside the length of the adversarial gradient


@dataclass
class Verdict:
    """What a discriminator says of a batch.

    Attributes:
        autoencoder: the loss of the autoencoder, a scalar; differentiate it with respect to the
            reconstruction only.
        discriminator: the loss of the discriminator, regularisers included, a scalar.
        terms: scalars for the log, without graph.
    """

    autoencoder: Tensor
    discriminator: Tensor
    terms: dict[str, Tensor]


class Adversary(nn.Module):
    """A discriminator and its losses: the module that training runs forward.

    One pass serves both sides. The autoencoder's gradient is taken with respect to the
    reconstruction alone, so it never reaches the discriminator's weights; the reconstruction comes
    detached, so the discriminator's loss never reaches the autoencoder.

    Args:
        config: of the discriminator and its losses.
        channels: of the pictures.
    """

    average_real: Tensor
    average_fake: Tensor

    def __init__(self, config: AdversaryConfig, channels: int = 3) -> None:
        super().__init__()
        self.config = config
        self.loss = ADVERSARIAL_LOSSES[config.loss]
        self.discriminator = _build(config, channels)
        if config.lecam:
            self.register_buffer("average_real", torch.zeros(()))
            self.register_buffer("average_fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor, step: int) -> Verdict:
        """Judges a batch.

        Args:
            real: pictures of shape (B, C, H, W), in [-1, 1].
            fake: their reconstructions, detached from the autoencoder.
            step: updates done, for the lazy penalty.
        """
        config = self.config
        with _never_fp16(real.device.type):
            # Apart: in one batch its statistics would tell which is which, and the gradient of the
            # reconstruction's verdicts would run through the pictures' half as zeros.
            on_real, on_fake = self.discriminator(real), self.discriminator(fake)
        loss = self.loss.discriminator(on_real, on_fake)
        correct = (on_real > 0).float().mean() + (on_fake < 0).float().mean()
        terms = {
            "d_loss": loss,
            "d_real": on_real.mean(),
            "d_fake": on_fake.mean(),
            "d_accuracy": correct / 2,
        }
        if config.lecam:
            self._follow(terms["d_real"], terms["d_fake"])
            terms["lecam"] = lecam(on_real, on_fake, self.average_real, self.average_fake)
            loss = loss + config.lecam * terms["lecam"]
        if config.r1 and step % config.r1_every == 0:
            penalty = r1_penalty(self.discriminator, real)
            loss = loss + config.r1 * config.r1_every * penalty
        terms["adversarial"] = self.loss.autoencoder(on_fake)
        detached = {name: value.detach() for name, value in terms.items()}
        return Verdict(terms["adversarial"], loss, detached)

    @torch.no_grad()
    def _follow(self, real: Tensor, fake: Tensor) -> None:
        """Moves the averages towards this batch's verdicts, over all processes."""
        now = torch.stack([real, fake])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(now)
            now = now / dist.get_world_size()
        for average, value in zip((self.average_real, self.average_fake), now, strict=True):
            # A batch that was no number must not be remembered: its update is skipped.
            moved = average.lerp(value, 1 - self.config.lecam_decay)
            average.copy_(torch.where(value.isfinite(), moved, average))

    def learns(self, step: int) -> bool:
        """Whether the discriminator is trained at a step; before that, nothing of it runs."""
        return step >= self.config.start - self.config.warmup_steps

    def weight(self, step: int) -> float:
        """The weight of the adversarial term at a step: 0 before `start`, then the ramp."""
        if step < self.config.start:
            return 0.0
        risen = (step - self.config.start + 1) / (self.config.ramp_steps + 1)
        return self.config.weight * min(1.0, risen)


def adaptive_weight(
    features: Tensor, g_rec: Tensor, g_adv: Tensor, kernel: tuple[int, int], largest: float
) -> Tensor:
    """LDM's weight ‖∂L_rec/∂w‖ / (‖∂L_adv/∂w‖ + 1e-4), w being the last layer, at no backward pass.

    The last layer is a convolution, so both gradients follow from its input and the gradients at
    its output, as the rows of one convolution's weight gradient. Over several processes they are
    those of the whole batch. (`ldm/modules/losses/contperceptual.py`, which differentiates both
    losses a second time for it, and on each process for itself.)

    Args:
        features: the last convolution's input, of shape (B, K, H, W).
        g_rec: ∂L_rec/∂x̂, of shape (B, C, H, W).
        g_adv: ∂L_adv/∂x̂, of the same shape.
        kernel: of that convolution, of stride 1 with as much padding as keeps the size.
        largest: the result is at most this.
    """
    # Half precision holds gradients that are as large as 1; the lengths grow back afterwards.
    scales = torch.stack([g.detach().abs().amax().float() for g in (g_rec, g_adv)])
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
    both = torch.cat([g_rec / scales[0], g_adv / scales[1]], dim=1).to(features.dtype)
    shape = (both.shape[1], features.shape[1], *kernel)
    padding = (kernel[0] // 2, kernel[1] // 2)
    gradient = conv2d_weight(features, shape, both, padding=padding).float()  # pyright: ignore
    rec, adv = gradient.chunk(2)
    rec, adv = rec * scales[0], adv * scales[1]
    if dist.is_available() and dist.is_initialized():
        stacked = torch.stack([rec, adv])
        dist.all_reduce(stacked)
        rec, adv = stacked / dist.get_world_size()
    return (rec.norm() / (adv.norm() + _EPSILON)).clamp(max=largest)


def shape_of_discriminator(
    config: AdversaryConfig, resolution: int, channels: int = 3
) -> NLayerDiscriminator:
    """The discriminator of a config, without memory for its weights.

    Raises:
        UserError: pictures of this resolution are too small for it.
    """
    with torch.device("meta"):
        discriminator = NLayerDiscriminator(config, channels)
    side = discriminator.smallest_side
    if resolution < side:
        raise UserError(
            f"data.resolution {resolution} is too small for a discriminator of {config.layers} "
            f"layers, which needs {side}; lower adversary.layers"
        )
    return discriminator


def _never_fp16(device: str) -> AbstractContextManager[Any]:
    """fp32 where autocast would take fp16, in which discriminators overflow."""
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _build(config: AdversaryConfig, channels: int) -> NLayerDiscriminator:
    if config.path is None:
        return NLayerDiscriminator(config, channels)
    discriminator = load_discriminator(config.path, config)
    if discriminator.in_channels != channels:
        raise UserError(
            f"adversary.path {config.path} judges pictures of {discriminator.in_channels} "
            f"channels, the network makes {channels}; leave adversary.path out"
        )
    for name in DiscriminatorConfig.model_fields:
        given, wanted = getattr(discriminator.config, name), getattr(config, name)
        if given != wanted:
            raise UserError(
                f"adversary.path {config.path} has {name} {given}; set adversary.{name} to it"
            )
    return discriminator
