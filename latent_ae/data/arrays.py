"""Columns of arrays: pictures of any number of bands in parquet, saved data sets and webdataset."""

from __future__ import annotations

from typing import Any

from latent_ae.errors import UserError

__all__ = ["array_type", "find_array_column", "require_readable"]

_NUMBERS = ("int", "uint", "float")
_NAMES = ("image", "img", "bands", "npy")
_KINDS = ("uint8", "uint16")


def array_type(feature: Any) -> tuple[int, str] | None:
    """The dimensions and the numbers' type of a column of arrays; None for any other column.

    `datasets` has arrays of fixed dimensions (`Array3D`), and lists of lists, which is also how it
    gives webdataset's `.npy`.
    """
    if hasattr(feature, "shape") and hasattr(feature, "dtype"):
        return len(feature.shape), feature.dtype
    depth = 0
    while hasattr(feature, "feature"):  # List, LargeList, Sequence
        feature, depth = feature.feature, depth + 1
    dtype = str(getattr(feature, "dtype", ""))
    return (depth, dtype) if depth > 1 and dtype.startswith(_NUMBERS) else None


def find_array_column(features: Any, channels: int) -> str | None:
    """The column of arrays that can be pictures, by its name or, if it is the first, by its type.

    Args:
        features: of a `datasets` data set.
        channels: of the pictures wanted; for one, arrays of two dimensions are pictures too.
    """
    found = {name: array_type(feature) for name, feature in features.items()}
    fitting = [
        name
        for name, kind in found.items()
        if kind is not None and (kind[0] == 3 or (kind[0] == 2 and channels == 1))
    ]
    return next((name for name in _NAMES if name in fitting), next(iter(fitting), None))


def require_readable(column: str, feature: Any, channels: int) -> str | None:
    """The numbers' type of a column of arrays, `uint8` or `uint16`; None for any other column.

    Raises:
        UserError: arrays that no picture of so many channels can be read from.
    """
    kind = array_type(feature)
    if kind is None:
        return None
    dimensions, dtype = kind
    wanted = f"H × W × {channels} of uint8 or uint16"
    if dtype not in _KINDS:
        hint = "no known white: scale them" if dtype.startswith("float") else "no known range"
        raise UserError(
            f"the column {column!r} holds arrays of {dtype}, which have {hint}; wanted is {wanted}"
        )
    if dimensions not in ((2, 3) if channels == 1 else (3,)):
        raise UserError(
            f"the column {column!r} holds arrays of {dimensions} dimensions; wanted is {wanted}"
        )
    shape = getattr(feature, "shape", ())
    if len(shape) == 3 and shape[2] not in (None, channels):
        found = " × ".join(str(side or "any") for side in shape)
        raise UserError(f"the column {column!r} holds arrays of {found}; wanted is {wanted}")
    return dtype
