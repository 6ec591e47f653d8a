"""Codes without a codebook."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_ae.bottlenecks.base import Bottleneck
from latent_ae.bottlenecks.gradients import straight_through
from latent_ae.bottlenecks.usage import UsageMeter, averaged, entropy, perplexity
from latent_ae.config import FSQConfig, LFQConfig
from latent_ae.outputs import Code
from latent_ae.quantized import FiniteScalarQuantizer, LookupFreeQuantizer, Quantizer

__all__ = ["FSQBottleneck", "LFQBottleneck"]

_COUNTED = 2**20  # codes beyond which they are not counted


class _Counting(Bottleneck):
    """Knows which codes were used lately."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.meter = UsageMeter(1, quantizer.size) if quantizer.size <= _COUNTED else None

    @torch.no_grad()
    def _statistics(self, latents: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        found = {"latent_std": latents.detach().std()}
        if self.meter is None:
            return found
        counts = self.meter.count(numbers.flatten()[None])
        return found | {"perplexity": perplexity(counts).mean()}

    @torch.no_grad()
    def after_update(self, skipped: Tensor, step: int) -> dict[str, Tensor]:
        """As of any `Bottleneck`."""
        return {} if self.meter is None else self.meter.after_update(skipped, step)[1]


class FSQBottleneck(_Counting):
    """Channels rounded to levels, with the gradient of the identity (Mentzer et al. 2023, eq. 1).

    There is nothing to commit to and no codebook to learn: no loss terms.
    """

    quantizer: FiniteScalarQuantizer

    def __init__(self, quantizer: FiniteScalarQuantizer, config: FSQConfig) -> None:
        super().__init__(quantizer)

    def forward(self, encoded: Tensor) -> Code:
        """Maps latents of shape (B, c, h, w) to a `Code` of values in [-1, 1], in fp32 or more."""
        with torch.autocast(encoded.device.type, enabled=False):
            bounded = self.quantizer.bounded(encoded)
            rounded = bounded.round()
            entries = self.quantizer.scaled(straight_through(bounded, rounded))
            statistics = self._statistics(entries, self.quantizer.number(rounded.detach()))
            return Code(entries, statistics=statistics)


class LFQBottleneck(_Counting):
    """Signs, held near to ±1, sure of themselves and all in use (Yu et al. 2023, eq. 3 to 5).

    With q(e|z) ∝ exp(−‖z − e‖² / τ) over all codes e, the penalties are

        commitment · mean (z − sign z)²  and  entropy · (E[H(q(·|z))] − γ H(E[q(·|z)]))

    q is a product over the bits, so the first entropy is a sum over them. The second is one over
    groups of bits taken for independent, which bounds it from above (Zhao et al. 2024,
    arXiv:2406.07548); with all bits in one group it is exact. Its mean runs over all processes, but
    over one micro-step: with accumulation each has its own.
    """

    quantizer: LookupFreeQuantizer

    def __init__(self, quantizer: LookupFreeQuantizer, config: LFQConfig) -> None:
        super().__init__(quantizer)
        self.config = config

    def forward(self, encoded: Tensor) -> Code:
        """Maps latents of shape (B, c, h, w) to a `Code` of ±1, in fp32 or more."""
        with torch.autocast(encoded.device.type, enabled=False):
            latents = self.quantizer.bounded(encoded)
            numbers = self.quantizer.indices(latents)
            entries = self.quantizer.entries(numbers).to(latents)
            config, penalties = self.config, {}
            distance = (latents - entries).square().flatten(1).mean(1)
            penalties["commitment"] = config.commitment * distance
            statistics = self._statistics(latents, numbers)
            if config.entropy:
                single, joint = self._entropies(latents)
                penalties["entropy"] = config.entropy * (single - config.diversity * joint)
                statistics |= {
                    "entropy_single": single.detach().mean(),
                    "entropy_joint": joint.detach(),
                }
            return Code(straight_through(latents, entries), {}, statistics, penalties)

    def _entropies(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """E[H(q(·|z))] of each picture, of shape (B,), and H(E[q(·|z)]), in nats a position."""
        # (z + 1)² − (z − 1)² = 4 z: the odds of +1 against −1.
        odds = 4 * latents / self.config.temperature
        positive = odds.sigmoid()
        # H = log(1 + eᵒ) − o · p, without a logarithm of 0.
        single = F.softplus(odds) - odds * positive
        joint = latents.new_zeros(())
        for bits in positive.permute(0, 2, 3, 1).flatten(0, 2).split(self.config.group, 1):
            half = bits.shape[1] // 2
            low, high = _products(bits[:, :half]), _products(bits[:, half:])
            joint = joint + entropy(averaged(low.T @ high / len(bits)).flatten())
        return single.sum(1).flatten(1).mean(1), joint


def _products(bits: Tensor) -> Tensor:
    """Probabilities of all 2ⁿ words, of shape (N, 2ⁿ), of independent bits of shape (N, n)."""
    words = bits.new_ones(len(bits), 1)
    for bit in bits.unbind(1):
        words = torch.cat([words * (1 - bit[:, None]), words * bit[:, None]], 1)
    return words
