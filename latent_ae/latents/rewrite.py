"""What joining and dividing latents folders share: whole indices, and folders that are finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latent_ae.errors import UserError
from latent_ae.latents.files import sha256_of, write_whole
from latent_ae.latents.folder import added_up
from latent_ae.latents.format import (
    INDEX_COLUMNS,
    MANIFEST,
    LatentsManifest,
    ShardRecord,
    picture_starts,
)
from latent_ae.latents.plan import Unit

__all__ = [
    "check_hash",
    "finish_folder",
    "kept_columns",
    "read_columns",
    "renumbered",
    "whole_index",
]


def whole_index(folder: Path, manifest: LatentsManifest, record: ShardRecord) -> pa.Table:
    """A shard's index with its skipped pictures, its columns those of this version.

    Args:
        folder: a finished latents folder, of this version or one before.
        manifest: its manifest.
        record: the shard.

    Raises:
        UserError: the file is missing, damaged, or lacks a column.
    """
    table = read_columns(folder, record.index).replace_schema_metadata(None)
    check_hash(folder, record.index, record.index_sha256)
    if manifest.version == 1:
        table = _with_later_columns(table, manifest)
    if missing := [name for name in INDEX_COLUMNS if name not in table.column_names]:
        raise UserError(f"{folder} is damaged: {record.index} has no column {missing[0]!r}")
    if (codes := len(table) - table["row"].null_count) != record.rows:
        raise UserError(
            f"{folder} is damaged: {record.index} has {codes} codes, the manifest says "
            f"{record.rows}"
        )
    return table


def read_columns(folder: Path, index: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Those of some columns that an index has; all when left out.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with pq.ParquetFile(folder / index) as file:
            known = file.schema_arrow.names
            wanted = None if columns is None else [name for name in columns if name in known]
            table = file.read(wanted)
        table.validate(full=True)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is damaged: {index} is missing") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{folder} is damaged: {index}: {str(error).splitlines()[0]}") from error
    return table


def check_hash(folder: Path, name: str, sha256: str) -> None:
    """Raises `UserError` for a file that has changed: who rewrites it would hide the damage."""
    if sha256 and sha256_of(folder / name) != sha256:
        raise UserError(f"{folder} is damaged: the sha256 of {name} is not the manifest's")


def kept_columns(folder: Path, manifest: LatentsManifest) -> dict[str, str]:
    """The columns of the data that were carried along, with their types in words.

    Raises:
        UserError: the first index is missing or damaged.
    """
    schema = whole_index(folder, manifest, manifest.shards[0]).schema
    return {field.name: str(field.type) for field in schema if field.name not in INDEX_COLUMNS}


def renumbered(table: pa.Table, first: int) -> pa.Table:
    """The same with its pictures' positions counted from `first`: no two can share one then."""
    begins = np.zeros(len(table), np.int64)
    begins[picture_starts(table)] = 1
    place = table.schema.get_field_index("position")
    return table.set_column(place, "position", pa.array(first - 1 + np.cumsum(begins)))


def finish_folder(
    folder: Path, units: Sequence[Unit], like: LatentsManifest, **changes: Any
) -> LatentsManifest:
    """Adds up what the indices say and writes the manifest, of this version, after all else.

    Args:
        folder: whose shards and indices are whole.
        units: its shards.
        like: a manifest whose other values hold here too.
        changes: the values that do not.
    """
    same = {name: value for name, value in like if name != "version"}
    manifest = LatentsManifest(**(same | added_up(folder, units) | changes))
    write_whole(folder / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
    return manifest


def _with_later_columns(table: pa.Table, manifest: LatentsManifest) -> pa.Table:
    """Version 1 listed one code a picture, of one size, and none that was skipped."""
    height, width = manifest.latent_shape[-2:]
    known: dict[str, Any] = {
        "position": np.arange(len(table)),
        "latent_height": np.full(len(table), height),
        "latent_width": np.full(len(table), width),
    }
    columns = {}
    for name, dtype in INDEX_COLUMNS.items():
        if name in table.column_names:
            columns[name] = table[name].cast(dtype)
        elif name in known:
            columns[name] = pa.array(known[name]).cast(dtype)
        elif name not in ("key", "row"):
            columns[name] = pa.nulls(len(table), dtype)
    return pa.table(columns)
