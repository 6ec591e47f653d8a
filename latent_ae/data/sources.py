"""Every source of pictures, opened through the `datasets` library and left undecoded.

Decoding is ours (`decoding.py`), because a picture that `datasets` fails on would end the run.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_ae.config import SourceConfig
from latent_ae.errors import UserError

__all__ = ["SOURCES", "Source", "open_source", "source_of"]

_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif")


@dataclass
class Source:
    """An opened data set.

    Attributes:
        rows: a `datasets.Dataset`, or an `IterableDataset` when streaming; pictures undecoded.
        image_column: the column of the picture.
        label_names: the classes in order, empty when there are none.
        root: the folder that keys are relative to, for sources of files.
    """

    rows: Any
    image_column: str
    label_names: list[str]
    root: Path | None = None

    def key(self, row: dict[str, Any], position: int) -> str:
        """A name for the row: its path below the root, its `__key__`, or its position."""
        if "__key__" in row:
            return str(row["__key__"])
        value = row[self.image_column]
        path = value.get("path") if isinstance(value, dict) else None
        if path and self.root and Path(path).is_relative_to(self.root):
            return Path(path).relative_to(self.root).as_posix()
        return f"{position:09d}"


def open_source(config: SourceConfig) -> Source:
    """Opens a source and finds its picture column.

    Raises:
        UserError: nothing at this path, no column of pictures, or a source that cannot be read.
    """
    rows = SOURCES[config.source](config)
    if isinstance(rows, dict):
        if config.split not in rows:
            raise UserError(
                f"{config.path} has no split {config.split!r}; it has: {', '.join(rows)}"
            )
        rows = rows[config.split]
    return _prepare(rows, config)


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
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(f"the source {config.source} at {config.path} cannot be opened: {lines[0]}")


SOURCES: dict[str, Callable[[SourceConfig], Any]] = {
    "imagefolder": _imagefolder,
    "saved": _saved,
    "parquet": lambda config: _files(config, "parquet", "parquet"),
    "webdataset": lambda config: _files(config, "webdataset", "tar"),
    "hub": lambda config: _load(config.path, config),
}


def _prepare(rows: Any, config: SourceConfig) -> Source:
    import datasets

    features = rows.features
    if features is None:  # a stream whose columns are known only once it is read
        rows = rows._resolve_features()
        features = rows.features
    column = config.image_column or _find_image_column(features)
    if column is None or column not in features:
        wanted = f"no column {column!r}" if column else "no column of pictures"
        raise UserError(f"{config.path} has {wanted}; its columns: {', '.join(features)}")
    rows = rows.cast_column(column, datasets.Image(decode=False))
    label = features.get("label")
    names = list(label.names) if isinstance(label, datasets.ClassLabel) else []
    root = Path(config.path).resolve() if config.source == "imagefolder" else None
    return Source(rows, column, names, root)


def _find_image_column(features: Any) -> str | None:
    import datasets

    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            return name
    for name in ("image", "img", *_EXTENSIONS):
        if name in features:
            return name
    return None
