"""What can be wrong with a shard and its index, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from latent_ae.bottlenecks import LOGVAR_RANGE
from latent_ae.errors import UserError
from latent_ae.latents.encoder import DTYPES
from latent_ae.latents.format import (
    INDEX_COLUMNS,
    TENSORS,
    LatentsManifest,
    ShardRecord,
    record_of,
    tensor_name,
)
from latent_ae.latents.keys import key_hashes
from latent_ae.latents.rewrite import read_columns
from latent_ae.latents.shards import MappedShard
from latent_ae.latents.statistics import Moments

__all__ = ["Codes", "checked_index", "index_faults", "moments_faults", "tensor_faults"]

_SLACK = 0.125  # bfloat16's step between 16 and 32
# The hash watches over each bit. Sums may differ in their last digits from one processor to
# another, whose vector units add in other orders: a folder that was moved is no worse for it.
_DIGITS = 1e-9


class Codes:
    """The codes that an index lists, by the size of their latents.

    Args:
        table: the index; None where it cannot be read.
        manifest: of the folder.
        record: of the shard.

    Attributes:
        rows: of each (height, width), its codes' rows in the shard, in the index's order.
        keys: of each, their keys.
    """

    def __init__(
        self, table: pa.Table | None, manifest: LatentsManifest, record: ShardRecord
    ) -> None:
        self.table, self.manifest, self.record = table, manifest, record
        self.rows: dict[tuple[int, int], np.ndarray] = {}
        self.keys: dict[tuple[int, int], pa.ChunkedArray] = {}
        self.shapes = {shape[-2:]: shape for shape in sorted(manifest.latent_shapes)}
        if table is None:
            return
        encoded: pa.Table = table.filter(table["row"].is_valid())
        sizes = np.full((encoded.num_rows, 2), next(iter(self.shapes)))
        if manifest.version > 1:
            both = [encoded[f"latent_{name}"].fill_null(-1) for name in ("height", "width")]
            sizes = np.stack([side.to_numpy() for side in both], axis=1)
        for size in np.unique(sizes, axis=0):
            own = encoded.filter(pa.array((sizes == size).all(1)))
            self.rows[int(size[0]), int(size[1])] = own["row"].to_numpy()
            self.keys[int(size[0]), int(size[1])] = own["key"]

    def key(self, size: tuple[int, int], row: int) -> str:
        """Whose code a row is, as far as that is known."""
        keys = self.keys.get(size, ())
        return repr(keys[row].as_py()) if row < len(keys) else f"row {row}"

    def tensors(self, shard: MappedShard) -> dict[str, tuple[tuple[int, int], tuple[int, ...]]]:
        """Size and shape of each tensor that the shard ought to have."""
        buckets, kind = self.manifest.preprocessing.buckets, self.manifest.storage.kind
        wanted = {}
        for size, shape in self.shapes.items():
            for base in TENSORS[kind]:
                name = tensor_name(base, size, buckets)
                count = len(self.rows.get(size, ()))
                if self.table is None:  # then only the manifest and the shard can be compared
                    count = self.record.rows
                    if buckets:
                        count = shard.shape(name)[0] if name in shard else 0
                if count or not buckets:
                    wanted[name] = (size, (count, *shape))
        return wanted


def checked_index(file: Path, manifest: LatentsManifest) -> pa.Table:
    """An index that can be worked with.

    Raises:
        UserError: it cannot be read, or columns are missing, of other types or have gaps.
    """
    try:
        table = read_columns(file.parent, file.name)
    except UserError as error:
        # Its cause: which file of which folder it was is said before.
        raise UserError(f"cannot be read: {str(error.__cause__).splitlines()[0]}") from error
    old = manifest.version == 1
    for name in ("key", "label", "row") if old else INDEX_COLUMNS:
        if name not in table.column_names:
            raise UserError(f"column {name!r} is missing")
        found, wanted = table.schema.field(name).type, INDEX_COLUMNS[name]
        if found != wanted and not old:
            raise UserError(f"column {name!r} is of type {found}, not {wanted}")
        if table[name].null_count and name in ("key", "position"):
            raise UserError(f"column {name!r} has gaps")
    return table


def index_faults(table: pa.Table, folder: Path, codes: Codes) -> Iterator[str]:
    """What an index says that cannot be, in itself or beside the manifest."""
    record, encoded = codes.record, table.filter(table["row"].is_valid())
    found = {"rows": len(encoded)}
    if codes.manifest.version > 1:
        labels = encoded["label"].drop_null().to_numpy()
        found["pictures"] = pictures = len(np.unique(encoded["position"].to_numpy()))
        found["skipped"] = len(np.unique(table["position"].to_numpy())) - pictures
        found["highest_label"] = int(labels.max(initial=-1))
        yield from _record_faults(folder, record)
        yield from _picture_faults(table)
    for name, number in found.items():
        if (said := getattr(record, name)) != number:
            yield f"{name} is {number}, the manifest says {said}"
    for size, rows in codes.rows.items():
        if size not in codes.shapes:
            yield f"{codes.key(size, 0)} has latents of {_by(size)}, which the manifest lacks"
        wrong = np.flatnonzero(rows != np.arange(len(rows)))
        if len(wrong):
            place = int(wrong[0])
            yield f"{codes.key(size, place)} is row {rows[place]} of {_by(size)}, not {place}"


def tensor_faults(shard: MappedShard, codes: Codes) -> Iterator[str]:
    """Tensors that are missing or too many, of another type or shape, and wrong values."""
    wanted, stored = codes.tensors(shard), codes.manifest.storage.dtype
    for name in shard.names():
        if name not in wanted:
            yield f"tensor {name!r} does not belong here"
    for name, (size, shape) in wanted.items():
        if name not in shard:
            yield f"tensor {name!r} is missing"
        elif shard.shape(name) != shape:
            yield f"tensor {name!r} is {_by(shard.shape(name))}, not {_by(shape)}"
        else:
            tensor = shard.rows(name, slice(None))
            if tensor.dtype != DTYPES[stored]:
                dtype = str(tensor.dtype).removeprefix("torch.")
                yield f"tensor {name!r} is {dtype}, the manifest says {stored}"
            size_of_codebook = codes.manifest.autoencoder.codebook_size
            for row, more, fault in _value_faults(name.partition(".")[0], tensor, size_of_codebook):
                others = f" and of {more} more" if more else ""
                yield f"{name} of {codes.key(size, row)}{others} {fault}"


def moments_faults(shard: MappedShard, codes: Codes) -> Iterator[str]:
    """Sums of the manifest that are not those of the shard, whose tensors are as they ought to be.

    Indices have none, nor has version 1.
    """
    if codes.manifest.version == 1:
        return
    parts: dict[str, list[Tensor]] = {"mean": [], "logvar": []}
    for name in codes.tensors(shard):
        if (base := name.partition(".")[0]) in parts:
            parts[base].append(shard.rows(name, slice(None)))
    found, said = Moments.of(parts["mean"], parts["logvar"]), codes.record.moments
    if found is None or said is None:
        if found is not said:
            yield f"the manifest has {'no ' if said is None else ''}moments of it"
        return
    for name in Moments.model_fields:
        own, other = (np.atleast_1d(getattr(moments, name)) for moments in (found, said))
        if not _alike(name, own, other, found.elements):
            yield f"the manifest's moments.{name} is not that of its codes"


def _record_faults(folder: Path, record: ShardRecord) -> Iterator[str]:
    try:
        own = record_of(folder / record.index)
    except UserError:
        yield "it lacks the record of its shard"
        return
    if own != record.model_copy(update={"index_sha256": ""}):
        yield "its record of the shard is another than the manifest's"


def _picture_faults(table: pa.Table) -> Iterator[str]:
    """Rows that are neither code nor skipped, and neighbours of one position that are not alike."""
    coded, read = table["row"].is_valid().to_numpy(), table["skipped"].is_null().to_numpy()
    wrong = np.flatnonzero(coded != read)
    if len(wrong):
        key = table["key"][int(wrong[0])].as_py()
        yield f"{key!r} has both a row and a reason to be skipped, or neither"
    hashes = key_hashes(table["key"])
    apart = (np.diff(table["position"].to_numpy()) == 0) & (hashes[1:] != hashes[:-1])
    if apart.any():
        first, second = table["key"].slice(int(apart.argmax()), 2).to_pylist()
        yield f"{first!r} and {second!r} have one position, as if they were one picture"


def _value_faults(kind: str, tensor: Tensor, entries: int) -> Iterator[tuple[int, int, str]]:
    """The first row with a fault, how many more have it, and the fault.

    Args:
        kind: `mean`, `logvar` or `indices`.
        tensor: of shape (n, …).
        entries: the numbers that a code can have; 0 where nobody has noted it.
    """
    if not tensor.numel():
        return
    low, high = LOGVAR_RANGE
    if kind == "indices":
        numbers = tensor.to(torch.int64)
        faults = {"has negative values": numbers < 0}
        if entries:
            faults[f"has values above {entries - 1}"] = numbers >= entries
    else:
        finite = tensor.isfinite()
        faults = {"has values that are not finite": ~finite}
        if kind == "logvar":
            outside = (tensor < low - _SLACK) | (tensor > high + _SLACK)
            faults[f"has values outside [{low:g}, {high:g}]"] = outside & finite
    for fault, places in faults.items():
        rows = places.flatten(1).any(1).nonzero()[:, 0]
        if len(rows):
            yield int(rows[0]), len(rows) - 1, fault


def _alike(name: str, own: np.ndarray, other: np.ndarray, elements: int) -> bool:
    if own.shape != other.shape:
        return False
    if name in ("elements", "codes", "low", "high"):
        return bool((own == other).all())
    slack = _DIGITS if name == "mean" else _DIGITS * elements  # the others are sums
    close = (
        math.isclose(a, b, rel_tol=_DIGITS, abs_tol=slack) for a, b in zip(own, other, strict=True)
    )
    return all(close)


def _by(sides: Sequence[int]) -> str:
    return " × ".join(map(str, sides))
