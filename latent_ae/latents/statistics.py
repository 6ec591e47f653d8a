"""Channel statistics that come out the same whatever the order in which shards were written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import BaseModel
from torch import Tensor

from latent_ae.bottlenecks import gaussian_kl

__all__ = ["Moments", "combine", "summary"]


class Moments(BaseModel):
    """Sums over some codes, of each channel; what several of them add up to is exact.

    `squares` is the sum of squared distances from the channel's own mean in these codes, so that a
    mean far from zero costs no digits (Welford 1962; pooled as Chan, Golub & LeVeque 1979).
    """

    elements: int  # latent elements a channel
    codes: int
    mean: list[float]
    squares: list[float]
    variance: list[float]  # sum of the posterior's σ²
    kl: float  # nats
    low: list[float]
    high: list[float]

    @classmethod
    def of(cls, mean: Sequence[Tensor], logvar: Sequence[Tensor]) -> Moments | None:
        """Of stored codes, each tensor of shape (N, c, h, w); None where there is no code.

        Args:
            mean: the means or latents, one tensor for each size.
            logvar: the log-variances; empty where there is no posterior.
        """
        mean = [part for part in mean if len(part)]
        if not mean:
            return None
        # By channel, in slices: float64 copies of a whole shard would be four times its size.
        channels = mean[0].shape[1]
        values = [torch.cat([p[:, c].double().flatten() for p in mean]) for c in range(channels)]
        averages = [v.mean() for v in values]
        noise = [
            sum((p[:, c].double().exp().sum().item() for p in logvar), 0.0) for c in range(channels)
        ]
        kl = math.fsum(
            gaussian_kl(m[:, c].double(), v[:, c].double()).sum().item()
            for m, v in zip(mean, [part for part in logvar if len(part)], strict=False)
            for c in range(channels)
        )
        return cls(
            elements=values[0].numel(),
            codes=sum(map(len, mean)),
            mean=[a.item() for a in averages],
            squares=[(v - a).square().sum().item() for v, a in zip(values, averages, strict=True)],
            variance=noise,
            kl=kl,
            low=[v.min().item() for v in values],
            high=[v.max().item() for v in values],
        )


def combine(parts: Sequence[Moments]) -> Moments:
    """The moments of all codes together; `math.fsum` rounds once, so no order matters."""
    elements, codes = sum(p.elements for p in parts), sum(p.codes for p in parts)
    channels = range(len(parts[0].mean))
    mean = [math.fsum(p.elements * p.mean[c] for p in parts) / elements for c in channels]
    between = [[p.elements * (p.mean[c] - mean[c]) ** 2 for p in parts] for c in channels]
    squares = [math.fsum([*between[c], *(p.squares[c] for p in parts)]) for c in channels]
    return Moments(
        elements=elements,
        codes=codes,
        mean=mean,
        squares=squares,
        variance=[math.fsum(p.variance[c] for p in parts) for c in channels],
        kl=math.fsum(p.kl for p in parts),
        low=[min(p.low[c] for p in parts) for c in channels],
        high=[max(p.high[c] for p in parts) for c in channels],
    )


def summary(parts: Sequence[Moments]) -> dict[str, float | int | list[float]]:
    """What the manifest says: of z ~ q(z|x) over all codes, in raw units.

    The variance is Var[μ(x)] + E[σ²(x)], the law of total variance: no sampling noise in it.
    """
    if not parts:
        return {}
    total = combine(parts)
    channel_mean, channels = total.mean, range(len(total.mean))
    variance = [(total.squares[c] + total.variance[c]) / total.elements for c in channels]
    mean = math.fsum(channel_mean) / len(channel_mean)
    spread = [variance[c] + (channel_mean[c] - mean) ** 2 for c in channels]
    return {
        "codes": total.codes,
        "mean": mean,
        "std": math.sqrt(math.fsum(spread) / len(spread)),
        "channel_mean": channel_mean,
        "channel_std": [math.sqrt(v) for v in variance],
        "channel_low": total.low,
        "channel_high": total.high,
        "kl_nats_per_code": total.kl / total.codes,
    }
