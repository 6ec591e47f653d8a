"""Continuous latents: with a Gaussian posterior, or as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_ae.bottlenecks.base import Bottleneck
from latent_ae.outputs import Code

__all__ = ["LOGVAR_RANGE", "KLBottleneck", "NoBottleneck", "gaussian_kl", "split_moments"]

# exp() of a half of these is a standard deviation between 3e-7 and 2.2e4: wide enough for any
# posterior, narrow enough that exp(logvar) stays finite. diffusers clamps to the same range.
LOGVAR_RANGE = (-30.0, 20.0)


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and clamped log-variance, each of shape (B, c, h, w), in fp32, of an encoder's output.

    Args:
        moments: of shape (B, 2c, h, w), the mean's channels before the log-variance's.
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) ‖ N(0, 1)) of each latent element, in nats, shape as given.

    The closed form ½ (μ² + σ² − 1 − log σ²) of Kingma & Welling 2014, appendix B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


class KLBottleneck(Bottleneck):
    """A diagonal Gaussian posterior q(z|x) = N(μ(x), σ²(x)) held near the prior N(0, I).

    The sample is reparametrised, z = μ + σ·ε with ε ~ N(0, I) (Kingma & Welling 2014, §2.4): the
    randomness enters beside the graph, so the gradient reaches μ and σ. The divergence from the
    prior is exact, not estimated from the sample (appendix B of the same paper; `gaussian_kl`).

    With `deterministic` the code is μ and there is no KL term: a plain autoencoder.
    """

    def __init__(self, deterministic: bool = False) -> None:
        super().__init__()
        self.deterministic = deterministic

    def forward(self, moments: Tensor) -> Code:
        """Maps moments of shape (B, 2c, h, w) to a `Code` with latents of shape (B, c, h, w).

        Its one loss term, `kl`, is in nats per image: summed over the latent, of shape (B,).
        """
        mean, logvar = split_moments(moments)
        if self.deterministic:
            return Code(mean, statistics={"latent_std": mean.detach().std()})
        std = torch.exp(0.5 * logvar)
        noise = torch.randn(mean.shape, device=mean.device)  # whatever the memory layout
        latents = mean + std * noise
        kl = gaussian_kl(mean, logvar).flatten(1).sum(1)
        statistics = {"latent_std": latents.detach().std(), "posterior_std": std.detach().mean()}
        return Code(latents, {"kl": kl}, statistics)


class NoBottleneck(Bottleneck):
    """Latents as the encoder gives them, for networks without a posterior."""

    def forward(self, latents: Tensor) -> Code:
        """Maps latents of shape (B, c, h, w) to a `Code` of the same, in fp32."""
        latents = latents.float()
        return Code(latents, statistics={"latent_std": latents.detach().std()})
