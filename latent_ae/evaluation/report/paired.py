"""Models against the first of them, picture by picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latent_ae.evaluation.report.numbers import fixed, percent
from latent_ae.evaluation.report.result import Result
from latent_ae.evaluation.report.tables import METRICS, Column

__all__ = ["Difference", "paired"]

_DRAWS = 1000


@dataclass(frozen=True)
class Difference:
    """A metric's mean difference, its interval, and the share of pictures that got better."""

    text: str
    interval: str
    share: str


def paired(results: Sequence[Result]) -> tuple[list[Column], list[tuple[Result, list[Difference]]]]:
    """Differences to the first model, of each metric that all have for each picture.

    The spread between pictures is much larger than that between models; the difference on one
    picture is free of it.
    """
    first = results[0].per_image
    others = [one for one in results[1:] if one.per_image.get("key") == first.get("key")]
    columns = [
        column
        for key, column in METRICS.items()
        if others and all(key in one.per_image for one in (results[0], *others))
    ]
    rows = [(other, [_difference(results[0], other, one) for one in columns]) for other in others]
    return columns, rows


def _difference(first: Result, other: Result, column: Column) -> Difference:
    before = np.array(first.per_image[column.key], dtype=np.float64)
    after = np.array(other.per_image[column.key], dtype=np.float64)
    change = (after - before)[np.isfinite(after - before)]
    if not len(change):
        return Difference(fixed(None), "", percent(None))
    rng = np.random.default_rng(0)
    means = [change[rng.integers(0, len(change), len(change))].mean() for _ in range(_DRAWS)]
    low, high = np.quantile(means, (0.025, 0.975))
    better = float(np.mean(column.better * change > 0))
    return Difference(
        _signed(change.mean(), column),
        f"{_signed(low, column)} to {_signed(high, column)}",
        percent(better),
    )


def _signed(value: float, column: Column) -> str:
    text = fixed(float(value), column.digits)
    return f"+{text}" if value > 0 and text.strip("0.") else text
