"""One key, one picture: what data sets do not always hold to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latent_ae.latents.files import write_whole
from latent_ae.latents.format import index_bytes, picture_starts, record_of
from latent_ae.latents.plan import Unit

__all__ = ["key_hashes", "make_keys_unique"]

_HASH = pc.MatchSubstringOptions("#")


def make_keys_unique(folder: Path, units: list[Unit]) -> int:
    """Appends `#` and its place to the key of every picture but the first of those named alike.

    What is renamed stays so: after a kill, the same call ends in the same files. The memory is
    eight bytes a picture.

    Returns:
        How many pictures bear such a key.
    """
    hashes = [key_hashes(_keys(folder / unit.index)[0]) for unit in units]
    every = np.concatenate(hashes or [np.empty(0, np.uint64)])
    values, counts = np.unique(every, return_counts=True)
    suspects, seen, renamed = values[counts > 1], set(), 0
    for unit, own in zip(units, hashes, strict=True):
        file = folder / unit.index
        if np.isin(own, suspects).any():
            _rename(file, unit, (values, suspects), seen)
        renamed += sum(key.endswith(_mark(unit, place)) for key, place in _marked(file))
    return renamed


def _mark(unit: Unit, position: int) -> str:
    number = "" if unit.part is None else f"{unit.number}-"  # a stream counts anew in each file
    return f"#{number}{position}"


def _keys(file: Path) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Key and position of each picture, whose variants are neighbours and share both."""
    table = pq.read_table(file, columns=["key", "position"])
    positions = table["position"].to_numpy()
    first = picture_starts(table)
    return table["key"].take(pa.array(first)), positions[first]


def key_hashes(keys: pa.ChunkedArray) -> np.ndarray:
    """Eight bytes a key, to find those that occur twice without holding all."""
    if not len(keys):
        return np.empty(0, np.uint64)
    # Here, because readers of latents have no other use for pandas.
    from pandas.util import hash_array  # pyright: ignore[reportAttributeAccessIssue]

    return hash_array(  # pyright: ignore
        keys.to_numpy().astype(object)
    )


def _marked(file: Path) -> Iterator[tuple[str, int]]:
    keys, positions = _keys(file)
    if len(keys):
        marked: pa.ChunkedArray = pc.call_function("match_substring", [keys], _HASH)
        for place in np.flatnonzero(marked.to_numpy()):
            yield keys[int(place)].as_py(), int(positions[place])


def _rename(file: Path, unit: Unit, known: tuple[np.ndarray, np.ndarray], seen: set[str]) -> None:
    """Rewrites an index if it repeats a key that was `seen`; adds its own to these.

    Args:
        file: the index.
        unit: whose it is.
        known: the hashes of all keys, sorted, and of those that occur more than once.
        seen: keys that have been given away.
    """
    values, suspects = known
    record, table = record_of(file), pq.read_table(file)
    keys, positions = table["key"].to_pylist(), table["position"].to_pylist()
    alike = np.isin(key_hashes(table["key"]), suspects)
    changed = False
    for place, key in enumerate(keys):
        if place and positions[place] == positions[place - 1]:
            keys[place] = keys[place - 1]  # another crop of the same picture
        elif alike[place] and key in seen:
            keys[place], changed = _free(key, _mark(unit, positions[place]), values), True
        elif alike[place]:
            seen.add(key)
    if changed:
        column = table.schema.get_field_index("key")
        table = table.set_column(column, "key", pa.array(keys, pa.string()))
        write_whole(file, index_bytes(table, record))


def _free(key: str, mark: str, values: np.ndarray) -> str:
    """The key with so many marks that no picture bears it yet."""
    taken = True
    while taken:
        key += mark
        taken = np.isin(key_hashes(pa.chunked_array([[key]])), values).item()
    return key
