"""Channel statistics that come out the same whatever the order in which shards were written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel
from torch import Tensor

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
        means, logvars = ([p.float().numpy() for p in parts if len(p)] for parts in (mean, logvar))
        if not means:
            return None
        # NumPy, because torch's sums depend on the number of its threads; by channel, because
        # float64 copies of a whole shard would be four times its size.
        channels = [_of_channel(means, logvars, c) for c in range(means[0].shape[1])]
        return cls(
            elements=int(channels[0]["elements"]),
            codes=sum(map(len, means)),
            kl=math.fsum(channel.pop("kl") for channel in channels),
            **{name: [channel[name] for channel in channels] for name in _BY_CHANNEL},  # pyright: ignore
        )


_BY_CHANNEL = ("mean", "squares", "variance", "low", "high")


def _of_channel(
    means: Sequence[np.ndarray], logvars: Sequence[np.ndarray], channel: int
) -> dict[str, float]:
    values = np.concatenate([part[:, channel].ravel() for part in means]).astype(np.float64)
    average = float(values.mean())
    found = {
        "elements": len(values),
        "mean": average,
        "squares": float(np.square(values - average).sum()),
        "low": float(values.min()),
        "high": float(values.max()),
        "variance": 0.0,
        "kl": 0.0,
    }
    if logvars:
        logvar = np.concatenate([part[:, channel].ravel() for part in logvars]).astype(np.float64)
        variance = np.exp(logvar)
        found["variance"] = float(variance.sum())
        # ½ (μ² + σ² − 1 − log σ²), as `bottlenecks.gaussian_kl`.
        found["kl"] = 0.5 * float((np.square(values) + variance - 1 - logvar).sum())
    return found


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
