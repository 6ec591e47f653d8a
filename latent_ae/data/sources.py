"""Every source of pictures, opened through the `datasets` library and left undecoded.

Decoding is ours (`decoding.py`), because a picture that `datasets` fails on would end the run.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from latent_ae.channels import has_colours
from latent_ae.config import EncodingSource, SourceConfig
from latent_ae.data.arrays import find_array_column, require_readable
from latent_ae.data.decoding import decode_array, decode_image, upright_size
from latent_ae.data.filters import RowFilter
from latent_ae.errors import UserError

__all__ = ["SOURCES", "Source", "open_source", "source_of"]

_NUMBERS = ("int", "uint", "float")
# Columns that are read for a key, a label or a caption without being named.
_WORDS = ("__key__", "label", "cls", "json", "caption", "text", "txt")
_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif")


@dataclass
class Source:
    """An opened data set.

    Attributes:
        rows: a `datasets.Dataset`, or an `IterableDataset` when streaming; pictures undecoded.
        image_column: the column of the picture.
        label_names: the classes in order, empty when there are none.
        root: the folder that keys are relative to, for sources of files.
        key_column: of the name, where the config says it; likewise the next two.
        label_column: of the class.
        caption_column: of the text.
        keep: other columns to carry along, with their Arrow types.
        channels: of the pictures that are wanted.
        array_type: of the numbers, where the column holds arrays and not files of pictures.
    """

    rows: Any
    image_column: str
    label_names: list[str]
    root: Path | None = None
    key_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    keep: dict[str, Any] = field(default_factory=dict)
    channels: int = 3
    array_type: str | None = None

    def picture(self, row: dict[str, Any]) -> Any:
        """The row's picture, decoded: of Pillow's, or `Bands`, which answer to the same calls.

        Raises:
            UnreadableImage: it cannot be read, or has another number of channels.
        """
        value = row[self.image_column]
        if self.array_type is not None:
            return decode_array(value, self.channels, self.array_type)
        return decode_image(value, self.channels)

    def picture_size(self, row: dict[str, Any]) -> tuple[int, int]:
        """(width, height) of `picture`, without decoding it.

        Raises:
            UnreadableImage: there is no picture, as far as its header tells.
        """
        value = row[self.image_column]
        if self.array_type is not None:
            return decode_array(value, self.channels, self.array_type).size
        return upright_size(value)

    def key(self, row: dict[str, Any], position: int) -> str:
        """A name for the row: its path below the root, its `__key__`, or its position."""
        if self.key_column is not None and row[self.key_column] is not None:
            return str(row[self.key_column])
        if "__key__" in row:
            return str(row["__key__"])
        value = row[self.image_column]
        path = value.get("path") if isinstance(value, dict) else None
        if path and self.root and Path(path).is_relative_to(self.root):
            return Path(path).relative_to(self.root).as_posix()
        return f"{position:09d}"

    def first(self, count: int | None) -> Source:
        """The same with only its first rows; all of them, for None."""
        if count is None:
            return self
        known = hasattr(self.rows, "__len__")
        return replace(self, rows=self.rows.take(min(count, len(self.rows)) if known else count))

    def label(self, row: dict[str, Any]) -> int | None:
        """A class index by any of the names that data sets give it; `cls` is webdataset's."""
        if self.label_column is not None:
            values = [row[self.label_column]]
        else:
            values = [row.get("label"), row.get("cls"), _part(row.get("json"), "label")]
        for value in values:
            if isinstance(value, str) and value in self._label_places:
                return self._label_places[value]
            if (number := _whole_number(value)) is not None:
                return number
        return None

    def caption(self, row: dict[str, Any]) -> str | None:
        """A caption likewise, the first of several; `txt` is webdataset's."""
        if self.caption_column is not None:
            values = [row[self.caption_column]]
        else:
            values = [*map(row.get, ("caption", "text", "txt"))]
            values.append(_part(row.get("json"), "caption"))
        for value in values:
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, str):
                return first
        return None

    @cached_property
    def _label_places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.label_names)}


def _whole_number(value: Any) -> int | None:
    """A label as a number: of any type that can be one, as large as the index holds."""
    if isinstance(value, str | bytes):
        value = int(value) if value.isascii() and value.strip().isdigit() else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if value % 1 == 0 and abs(value) < 1 << 62 else None


def _part(content: Any, name: str) -> Any:
    """A value of webdataset's `json`; None where a column of that name is something else."""
    return content.get(name) if isinstance(content, dict) else None


def open_source(config: SourceConfig, channels: int = 3) -> Source:
    """Opens a source and finds its picture column.

    Args:
        config: the source.
        channels: of the pictures that are wanted.

    Raises:
        UserError: nothing at this path, no column of such pictures, or a source that cannot be
            read.
    """
    rows = SOURCES[config.source](config)
    if isinstance(rows, dict):
        if config.split not in rows:
            raise UserError(
                f"{config.path} has no split {config.split!r}; it has: {', '.join(rows)}"
            )
        rows = rows[config.split]
    return _prepare(rows, config, channels)


def source_of(path: str | Path, kind: str | None = None, split: str = "train") -> SourceConfig:
    """The source at a path, its kind guessed from what lies there: what the command line takes.

    Args:
        path: a folder or file; with `kind` also a glob or a hub name.
        kind: one of `SOURCES`, where the guess would be wrong.
        split: of a saved data set or one on the hub.

    Raises:
        UserError: there is nothing at `path`, or no such kind.
    """
    where = Path(path)
    if kind is not None:
        if kind not in SOURCES:
            raise UserError(f"source {kind!r} is unknown; valid: {', '.join(SOURCES)}")
    elif where.suffix == ".tar" or (where.is_dir() and any(where.glob("*.tar"))):
        kind = "webdataset"
    elif where.suffix == ".parquet" or (where.is_dir() and any(where.glob("*.parquet"))):
        kind = "parquet"
    elif (where / "dataset_info.json").exists() or (where / "dataset_dict.json").exists():
        kind = "saved"
    elif where.is_dir():
        kind = "imagefolder"
    else:
        raise UserError(f"there is no folder, parquet or tar file at {path}")
    return SourceConfig.model_validate({"source": kind, "path": str(path), "split": split})


def _imagefolder(config: SourceConfig) -> Any:
    folder = Path(config.path)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    # Explicit patterns: left to itself, `datasets` reads "val" or "test" in a file's name as a
    # split of its own and silently leaves those pictures out of `train`.
    return _load(
        "imagefolder", config, data_files={"train": f"{glob.escape(str(folder.resolve()))}/**"}
    )


def _saved(config: SourceConfig) -> Any:
    import datasets

    if not Path(config.path).is_dir():
        raise UserError(f"there is no folder {config.path}")
    try:
        rows = datasets.load_from_disk(config.path)
    except Exception as error:
        raise _refusal(config, error) from error
    if not config.streaming:
        return rows
    if isinstance(rows, datasets.DatasetDict):
        return {name: split.to_iterable_dataset() for name, split in rows.items()}
    return rows.to_iterable_dataset()


def _files(config: SourceConfig, builder: str, extension: str) -> Any:
    path = Path(config.path)
    pattern = config.path
    if path.is_dir():
        pattern = f"{glob.escape(str(path))}/**/*.{extension}"
    return _load(builder, config, data_files={"train": pattern})


def _load(builder: str, config: SourceConfig, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    split = config.split if config.source == "hub" else "train"
    try:
        return datasets.load_dataset(builder, split=split, streaming=config.streaming, **options)
    except Exception as error:  # whatever a builder or a network raises, the person needs a reason
        raise _refusal(config, error) from error


def _refusal(config: SourceConfig, error: Exception) -> UserError:
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__  # `datasets` says only that an error occurred
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "corresponds to no data" in lines[0]:
        return UserError(f"{config.path} holds no pictures")
    return UserError(f"the source {config.source} at {config.path} cannot be opened: {lines[0]}")


SOURCES: dict[str, Callable[[SourceConfig], Any]] = {
    "imagefolder": _imagefolder,
    "saved": _saved,
    "parquet": lambda config: _files(config, "parquet", "parquet"),
    "webdataset": lambda config: _files(config, "webdataset", "tar"),
    "hub": lambda config: _load(config.path, config),
}


def _prepare(rows: Any, config: SourceConfig, channels: int) -> Source:
    import datasets

    features = rows.features
    if features is None:  # a stream whose columns are known only once it is read
        rows = rows._resolve_features()
        features = rows.features
    column = config.image_column or _find_image_column(features, channels)
    if column is None or column not in features:
        wanted = f"no column {column!r}" if column else "no column of pictures"
        raise UserError(f"{config.path} has {wanted}; its columns: {', '.join(features)}")
    array_type = require_readable(column, features[column], channels)
    # The others are left undecoded too: a damaged mask is no reason to lose the picture.
    pictures = [n for n, f in features.items() if isinstance(f, datasets.Image)]
    if array_type is None and column not in pictures:
        pictures.append(column)
    for name in pictures:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    named = _named_columns(config, features)
    if config.filter is not None:
        rows = _filtered(rows, RowFilter(config.filter), features)
    wanted = [column, *_WORDS, *named.get("keep", ())]
    wanted += [named.get(f"{name}_column") for name in ("key", "label", "caption")]
    rows = rows.select_columns([name for name in features if name in wanted])
    names = _label_names(rows, named.get("label_column"), features)
    if array_type is not None and hasattr(rows, "__len__"):  # as lists they would take far longer
        rows = rows.with_format("numpy", columns=[column], output_all_columns=True)
    root = Path(config.path).resolve() if config.source == "imagefolder" else None
    kind = {"channels": channels, "array_type": array_type}
    return Source(rows, column, names, root, **named, **kind)


def _named_columns(config: SourceConfig, features: Any) -> dict[str, Any]:
    """What an `EncodingSource` says of columns, checked."""
    if not isinstance(config, EncodingSource):
        return {}
    named = {k: getattr(config, k) for k in ("key_column", "label_column", "caption_column")}
    for name in (*named.values(), *config.keep):
        if name is not None and name not in features:
            raise UserError(
                f"{config.path} has no column {name!r}; its columns: {', '.join(features)}"
            )
    return named | {"keep": {name: features.arrow_schema.field(name).type for name in config.keep}}


def _label_names(rows: Any, column: str | None, features: Any) -> list[str]:
    import datasets

    feature = features.get(column or "label")
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if getattr(feature, "dtype", "") not in ("string", "large_string"):
        if column is not None and not str(getattr(feature, "dtype", "")).startswith(_NUMBERS):
            raise UserError(f"the column {column!r} holds neither numbers nor words for labels")
        return []
    if not hasattr(rows, "__len__"):
        if column is None:
            return []
        raise UserError(f"the labels in {column!r} are words, whose order no stream can know")
    found = sorted(value for value in rows.unique(column or "label") if value is not None)
    return [] if all(value.strip().isdigit() for value in found) else found


def _filtered(rows: Any, keep: RowFilter, features: Any) -> Any:
    keep.require_columns(features)
    if not hasattr(rows, "__len__"):
        return rows.filter(keep)
    # Only the columns that it names are read, never the pictures.
    few = rows.select_columns(keep.columns) if keep.columns else [{}] * len(rows)
    chosen = [place for place, row in enumerate(few) if keep(row)]
    if not chosen:
        raise UserError(f"no row of the data set satisfies {keep.expression!r}")
    return rows.select(chosen)


def _find_image_column(features: Any, channels: int) -> str | None:
    import datasets

    arrays = find_array_column(features, channels)
    if arrays is not None and not has_colours(channels):
        return arrays
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            return name
    for name in ("image", "img", *_EXTENSIONS):
        if name in features:
            return name
    return arrays
