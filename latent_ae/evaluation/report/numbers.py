"""Numbers for people to read."""

from __future__ import annotations

import math

__all__ = ["fixed", "significant", "count", "short", "percent"]

MISSING = "–"
_THIN = "\u202f"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def fixed(value: float | None, digits: int = 2) -> str:
    """With a fixed number of decimals, or a dash where there is no number."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{value:,.{digits}f}".replace(",", _THIN)
    if not text.strip("-0." + _THIN):
        text = text.lstrip("-")
    return text.replace("-", "−")


def significant(value: float | None, digits: int = 3) -> str:
    """With so many significant digits, as a power of ten where it is very large or small."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 6:
        return fixed(value, max(0, digits - 1 - exponent))
    return f"{fixed(value / 10.0**exponent, digits - 1)} × {power(exponent)}"


def power(exponent: int) -> str:
    """A power of ten."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def count(value: float | None) -> str:
    """A whole number with its thousands apart."""
    return fixed(value, 0)


def short(value: float | None) -> str:
    """A large number in millions or thousands."""
    if value is None:
        return MISSING
    return f"{significant(value / 1e6)} M" if value >= 1e6 else f"{significant(value / 1e3)} k"


def percent(value: float | None, digits: int = 0) -> str:
    """A share as so many in a hundred."""
    return MISSING if value is None else f"{fixed(100 * value, digits)} %"
