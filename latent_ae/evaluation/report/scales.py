"""Axes of charts: from values to places on the paper, and which values to name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from latent_ae.evaluation.report.numbers import fixed, power

__all__ = ["Axis", "Scale"]


@dataclass(frozen=True)
class Axis:
    """What an axis shows; without limits they come from the data."""

    label: str
    log: bool = False
    percent: bool = False
    low: float | None = None
    high: float | None = None


class Scale:
    """From values to places on the paper."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis, self.start, self.end = axis, start, end
        low = min(values) if axis.low is None else axis.low
        high = max(values) if axis.high is None else axis.high
        low, high = self._forward(low), self._forward(high)
        if high - low < 1e-9 * max(1.0, abs(high)):
            low, high = low - 0.5, high + 0.5
        pad = 0.04 * (high - low)
        self.low = low - (pad if axis.low is None else 0)
        self.high = high + (pad if axis.high is None else 0)

    def _forward(self, value: float) -> float:
        return math.log10(value) if self.axis.log else value

    def __call__(self, value: float) -> float:
        """Where a value stands."""
        share = (self._forward(value) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Values and their labels."""
        if not self.axis.log:
            return self._linear(self.low, self.high)
        first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
        if last - first >= 2:
            stride = -(-(last - first) // 6)
            return [(10.0**e, _plain(e)) for e in range(first, last + 1, stride)]
        around = range(math.floor(self.low), math.ceil(self.high) + 1)
        values = [m * 10.0**e for e in around for m in (1, 2, 5)]
        inside = [v for v in values if self.low <= math.log10(v) <= self.high]
        if len(inside) >= 2:
            return [(v, f"{v:g}") for v in inside]
        return self._linear(10**self.low, 10**self.high)

    def _linear(self, low: float, high: float) -> list[tuple[float, str]]:
        rough = (high - low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
        places = range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)
        values = [place * step for place in places]
        if self.axis.percent:
            return [(v, f"{fixed(100 * v, 0)} %") for v in values]
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(v, fixed(v, digits)) for v in values]


def _plain(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -3 <= exponent <= 3 else power(exponent)
