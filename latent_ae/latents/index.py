"""The indices of a latents folder, as far as reading needs them in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latent_ae.errors import UserError
from latent_ae.latents.format import LatentsManifest

__all__ = ["LatentIndex", "read_index"]


class LatentIndex:
    """Where each code lies; a few bytes a code, however many columns the folder has.

    Args:
        folder: a finished latents folder.
        manifest: its manifest.
        columns: to hold beside that, as Arrow arrays.

    Attributes:
        shard: of each code, the place of its shard in the manifest.
        row: its row in the shard's tensor.
        size: its latent's place in `sizes`.
        sizes: the (height, width) of latents that occur.
        table: the columns asked for.
        picture: where the codes of each picture begin, and one end more.
    """

    def __init__(self, folder: Path, manifest: LatentsManifest, columns: Sequence[str]) -> None:
        shapes = sorted({shape[-2:] for shape in manifest.latent_shapes})
        place = {size: number for number, size in enumerate(shapes)}
        self.sizes = shapes
        shard, row, size, begins, tables = [], [], [], [], []
        count = 0
        for number, record in enumerate(manifest.shards):
            part = read_index(folder / record.index, columns)
            if part.num_rows != record.rows:
                raise UserError(
                    f"{folder} is damaged: {record.index} has {part.num_rows} codes, the manifest "
                    f"says {record.rows}"
                )
            shard.append(np.full(part.num_rows, number, np.int32))
            row.append(part["row"].to_numpy().astype(np.int32))
            size.append(_places(part, place))
            if "position" in part.column_names:
                new = np.diff(part["position"].to_numpy(), prepend=-1) != 0
            else:
                new = np.ones(part.num_rows, bool)
            begins.append(np.flatnonzero(new) + count)
            count += part.num_rows
            tables.append(_large(part.select(list(columns))))
        self.shard, self.row, self.size = (
            np.concatenate(parts or [np.empty(0, np.int32)]) for parts in (shard, row, size)
        )
        self.picture = np.concatenate([*begins, [count]])
        self.table = pa.concat_tables(tables).combine_chunks() if tables else pa.table({})

    def __len__(self) -> int:
        return len(self.row)


def read_index(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A shard's index without the pictures that were skipped.

    Args:
        file: the parquet file.
        columns: to read, beside what locates a code; all when left out.

    Raises:
        UserError: it is missing, damaged, or has no such column.
    """
    try:
        reader = pq.ParquetFile(file)
        known = reader.schema_arrow.names
        if missing := [name for name in columns or () if name not in known]:
            raise UserError(
                f"{file.parent} has no column {missing[0]!r}; it has {', '.join(known)}"
            )
        needed = ("row", "latent_height", "latent_width", "position")
        wanted = None
        if columns is not None:
            wanted = list(dict.fromkeys([*columns, *(n for n in needed if n in known)]))
        table = reader.read(wanted)
    except FileNotFoundError as error:
        raise UserError(f"{file.parent} is damaged: {file.name} is missing") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file.parent} is damaged: {file.name}: {error}") from error
    return table.filter(table["row"].is_valid()) if table["row"].null_count else table


def _large(table: pa.Table) -> pa.Table:
    """Words with 64-bit offsets: a column of them may have more than two gigabytes."""
    types = [(f.name, pa.large_string() if f.type == pa.string() else f.type) for f in table.schema]
    return table.cast(pa.schema(types)) if table.num_columns else table


def _places(part: pa.Table, place: dict[tuple[int, int], int]) -> np.ndarray:
    if len(place) == 1 or "latent_height" not in part.column_names:
        return np.zeros(part.num_rows, np.int16)
    heights, widths = (part[f"latent_{name}"].to_numpy() for name in ("height", "width"))
    found = np.full(part.num_rows, -1, np.int16)
    for (height, width), number in place.items():
        found[(heights == height) & (widths == width)] = number
    return found
