"""What a latents folder shall hold, fixed before the first picture, and the pieces of that work."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel

from latent_ae.config import EncodingSource, Preprocessing, Storage
from latent_ae.data import Source
from latent_ae.errors import UserError
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.latents.format import AutoencoderRecord, DataRecord, StoredShape

__all__ = [
    "Plan",
    "Unit",
    "data_record",
    "describe_difference",
    "shapes_of",
    "storage_for",
    "stream_files",
]

# Where the same latents may come from another place, or need no comparison.
_FREE = {"path"}
# Of the autoencoder, what version 2 did not note; its weights are compared anyway.
_UNTOLD = {"codebook_size", "codes", "codebook_sha256"}
# How many numbers a type has that indices may be stored in; the smallest is the first.
_INTEGERS = {"uint8": 1 << 8, "uint16": 1 << 16, "int32": 1 << 31}
_INDEX_FILE = re.compile(r"index-(\d{6})(?:-(\d{6}))?\.parquet")


@dataclass(frozen=True, order=True)
class Unit:
    """A shard's worth of work.

    With random access unit n is the rows [n·R, (n + 1)·R) of the source, R being `shard_rows`. A
    stream knows no such place, but its files: then `number` is the file and `part` counts its rows.
    """

    number: int
    part: int | None = None

    @property
    def stem(self) -> str:
        """What the names of its files share."""
        tail = "" if self.part is None else f"-{self.part:06d}"
        return f"{self.number:06d}{tail}"

    @property
    def shard(self) -> str:
        """The file of its tensors."""
        return f"shard-{self.stem}.safetensors"

    @property
    def index(self) -> str:
        """The file of its keys, labels and sizes, written last: where it is, the unit is whole."""
        return f"index-{self.stem}.parquet"

    @classmethod
    def of_index(cls, name: str) -> Unit | None:
        """The unit whose index has this name; None for other files."""
        if not (match := _INDEX_FILE.fullmatch(name)):
            return None
        return cls(int(match[1]), None if match[2] is None else int(match[2]))


class Plan(BaseModel):
    """All that decides the bytes of a folder; two runs with one plan write the same."""

    autoencoder: AutoencoderRecord
    data: DataRecord
    preprocessing: Preprocessing
    storage: Storage
    latent_shapes: list[StoredShape]

    def units(self) -> list[Unit] | None:
        """Every unit, or None for a stream, whose files end where they end."""
        if self.data.rows is None:
            return None
        return [Unit(n) for n in range(-(-self.data.rows // self.storage.shard_rows))]

    def rows_of(self, unit: Unit) -> range:
        """The rows of a unit, with random access."""
        size, rows = self.storage.shard_rows, self.data.rows or 0
        return range(unit.number * size, min((unit.number + 1) * size, rows))


def data_record(config: EncodingSource, source: Source) -> DataRecord:
    """What identifies the pictures, after the filter and the limit."""
    known = hasattr(source.rows, "__len__")
    rows = len(source.rows) if known else None
    digest = hashlib.sha256()
    spread = ((place, source.rows[place]) for place in _spread(rows or 0))
    for place, row in spread if known else enumerate(itertools.islice(source.rows, 1)):
        digest.update(
            source.key(row, place).encode() + b"\0" + _first_bytes(row[source.image_column])
        )
    columns = (config.key_column, config.label_column, config.caption_column)
    return DataRecord(
        **config.model_dump(include={"source", "path", "split", "filter", "limit"}),
        rows=rows,
        files=None if known else _files_of(source, config.limit),
        fingerprint=digest.hexdigest(),
        label_names=source.label_names,
        columns=[source.image_column, *(name or "" for name in columns), *config.keep],
    )


def stream_files(source: Source, files: int) -> Iterator[tuple[int, Any]]:
    """A stream's files, each with its number."""
    for number in range(files):
        yield number, source.rows if files == 1 else source.rows.shard(files, number)


def storage_for(frozen: FrozenAutoencoder, kind: str | None, dtype: str | None) -> dict[str, Any]:
    """The kind and type of what is stored, chosen where left out, refused where it cannot be.

    Raises:
        UserError: moments of an autoencoder without a posterior, indices of one without a codebook,
            or a type that does not hold them.
    """
    entries = frozen.codebook_size
    if kind is None:
        kind = "indices" if entries else "moments" if frozen.has_posterior else "mode"
    if kind == "moments" and not frozen.has_posterior:
        raise UserError(f"{frozen.class_name} has no posterior: it gives mode, not moments")
    if kind == "indices" and not entries:
        raise UserError(f"{frozen.class_name} has no codebook: there are no indices to store")
    if kind == "indices":
        fits = [name for name, most in _INTEGERS.items() if entries <= most]
        if not fits:
            raise UserError(f"a code is one of {entries:,}: more numbers than int32 has")
    else:
        fits = ["float16", "bfloat16", "float32"]
    dtype = dtype or fits[0]
    if dtype not in fits:
        raise UserError(f"{kind} cannot be stored as {dtype}; choose {' or '.join(fits)}")
    return {"kind": kind, "dtype": dtype}


def shapes_of(
    frozen: FrozenAutoencoder, kind: str, sizes: Sequence[tuple[int, int]]
) -> list[StoredShape]:
    """The shapes of what is stored of pictures of these (height, width), in pixels.

    That is (c, h, w); of indices (h, w) where a position has one code, (codes, h, w) where it has
    several.
    """
    depth = frozen.codes if kind == "indices" else frozen.channels
    flat = kind == "indices" and depth == 1
    sides = [
        (height // frozen.downsampling, width // frozen.downsampling) for height, width in sizes
    ]
    return [side if flat else (depth, *side) for side in sides]


def describe_difference(before: Plan, now: Plan) -> str | None:
    """Where two plans differ, in words; None where they would write the same bytes."""
    for part in type(now).model_fields:
        old, new = getattr(before, part), getattr(now, part)
        if isinstance(old, list):
            if old != new:
                return f"{part} {old}, not {new}"
            continue
        for name in type(new).model_fields:
            was, is_now = getattr(old, name), getattr(new, name)
            if name in _UNTOLD and not was:
                continue
            if name not in _FREE and was != is_now:
                if name == "fingerprint":
                    return "other pictures"
                return f"{part}.{name} {was!r}, not {is_now!r}"
    return None


def _spread(count: int) -> list[int]:
    """Up to 64 places, evenly spread: enough to notice another data set, cheap in any."""
    return sorted({round(i * (count - 1) / 63) for i in range(64)}) if count else []


def _first_bytes(value: Any) -> bytes:
    """How long a picture's file is, and how it begins."""
    path = value.get("path") if isinstance(value, dict) else None
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, np.ndarray):  # a picture of many bands
        return f"{content.shape} ".encode() + content.tobytes()[:4096]
    if isinstance(content, bytes):
        return f"{len(content)} ".encode() + content[:4096]
    try:
        with open(path or "", "rb") as file:
            return f"{os.fstat(file.fileno()).st_size} ".encode() + file.read(4096)
    except (OSError, TypeError):  # an URL of a stream, an array, no picture: the key must do
        return b""


def _files_of(source: Source, limit: int | None) -> int:
    # A limit counts rows of the whole stream, which no file can do alone.
    return 1 if limit is not None else max(1, int(source.rows.num_shards))
