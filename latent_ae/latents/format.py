"""The latents folder: its manifest, its index and its names (docs/latents-format.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from latent_ae.autoencoder import weights_sha256
from latent_ae.config import Preprocessing, Storage
from latent_ae.errors import UserError
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.latents.statistics import Moments
from latent_ae.scaling import LatentScaling

__all__ = [
    "FORMAT",
    "INDEX_COLUMNS",
    "MANIFEST",
    "TENSORS",
    "AutoencoderRecord",
    "DataRecord",
    "LatentsManifest",
    "ShardRecord",
    "StoredShape",
    "index_bytes",
    "picture_starts",
    "read_manifest",
    "record_of",
    "tensor_name",
]

FORMAT = "latent_ae/latents"
FORMAT_VERSION = 3
MANIFEST = "manifest.json"
RECORD = b"latent_ae"  # where an index's metadata holds the record of its shard

# One row for each code, and one for each picture that could not be read: then `skipped` says why.
INDEX_COLUMNS: dict[str, pa.DataType] = {
    "key": pa.string(),
    "position": pa.int64(),  # the picture's row in the source
    "label": pa.int64(),
    "caption": pa.string(),
    "width": pa.int32(),  # of the original picture, in pixels
    "height": pa.int32(),
    "crop_left": pa.int32(),  # in the resized picture, in pixels
    "crop_top": pa.int32(),
    "flipped": pa.bool_(),
    "latent_height": pa.int16(),
    "latent_width": pa.int16(),
    "row": pa.int32(),  # in the shard's tensor of this size
    "skipped": pa.string(),
}


# Of what is stored of a picture: (c, h, w), or (h, w) of indices where a position has one code.
StoredShape = tuple[int, int] | tuple[int, int, int]

# What a shard's tensors are called, by what is stored.
TENSORS = {"moments": ("mean", "logvar"), "mode": ("mean",), "indices": ("indices",)}


class AutoencoderRecord(LatentScaling):
    """Which autoencoder made the latents, and how it wants them scaled."""

    path: str
    weights_sha256: str
    class_name: str
    downsampling: int = 0  # 0: not said, as in version 1
    channels: int = 0
    codebook_size: int = 0  # 0: latents are not quantised, or it is not said, as in version 2
    codes: int = 0  # a position
    codebook_sha256: str = ""

    @classmethod
    def of(cls, frozen: FrozenAutoencoder) -> AutoencoderRecord:
        """The record of an autoencoder that was loaded from a folder."""
        return cls(
            path=str(frozen.path.resolve()),
            weights_sha256=weights_sha256(frozen.path),
            class_name=frozen.class_name,
            downsampling=frozen.downsampling,
            channels=frozen.channels,
            codebook_size=frozen.codebook_size,
            codes=frozen.codes,
            codebook_sha256=frozen.codebook_sha256,
            **frozen.scaling.model_dump(),
        )


class DataRecord(BaseModel):
    """Which pictures: enough to notice that another run would see others."""

    source: str = ""
    path: str = ""
    split: str = ""
    filter: str | None = None
    limit: int | None = None
    rows: int | None = None  # None: a stream
    files: int | None = None  # of a stream
    fingerprint: str = ""
    label_names: list[str] = []
    columns: list[str] = []  # where keys, labels and captions are from, and what else was kept


class ShardRecord(BaseModel):
    """A shard that is whole: its two files, and what they hold."""

    file: str
    index: str
    rows: int  # codes
    sha256: str
    index_sha256: str = ""
    pictures: int = 0
    skipped: int = 0
    highest_label: int = -1
    last: bool = False  # the last of a file of a stream
    moments: Moments | None = None


class LatentsManifest(BaseModel):
    """What `manifest.json` says; `latent_shapes` are those of single codes, as they are stored."""

    format: str = FORMAT
    version: int = FORMAT_VERSION
    autoencoder: AutoencoderRecord
    data: DataRecord = DataRecord()
    preprocessing: Preprocessing
    storage: Storage
    latent_shapes: list[StoredShape]
    count: int
    pictures: int = 0
    skipped: int = 0
    renamed: int = 0  # keys that stood for several pictures
    label_names: list[str] = []
    num_classes: int = 0
    shards: list[ShardRecord]
    statistics: dict[str, float | int | list[float]] = {}
    versions: dict[str, str] = {}

    @property
    def latent_shape(self) -> StoredShape:
        """The shape of every code; raises `UserError` with buckets, where there are several."""
        if len(self.latent_shapes) != 1:
            raise UserError("these latents have several sizes (buckets); one is wanted here")
        return self.latent_shapes[0]


def tensor_name(name: str, size: tuple[int, int], buckets: bool) -> str:
    """The name of a tensor in a shard: `mean`, or with buckets `mean.24x40` (height × width)."""
    return f"{name}.{size[0]}x{size[1]}" if buckets else name


def picture_starts(table: pa.Table) -> np.ndarray:
    """Where each picture's rows begin: they are neighbours and share their position."""
    return np.flatnonzero(np.diff(table["position"].to_numpy(), prepend=-1))


def index_bytes(table: pa.Table, record: ShardRecord) -> bytes:
    """A shard's index as parquet, with what it says of the shard in its metadata."""
    content = json.dumps(record.model_dump(exclude={"index_sha256"})).encode()
    table = table.replace_schema_metadata({RECORD: content})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd", row_group_size=1 << 16)
    return buffer.getvalue().to_pybytes()


def record_of(index: Path) -> ShardRecord:
    """What a shard's index says of it.

    Raises:
        UserError: the file is damaged.
    """
    try:
        metadata = pq.read_schema(index).metadata
        return ShardRecord.model_validate(json.loads(metadata[RECORD]))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{index} is damaged: {str(error).splitlines()[0]}; remove it and run again"
        ) from error


def read_manifest(folder: str | Path) -> LatentsManifest:
    """Reads a latents folder's manifest, of this version or one before.

    Raises:
        UserError: the folder has none, or one that this version does not understand.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise UserError(f"{folder} is no finished latents folder: it has no {MANIFEST}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = range(1, FORMAT_VERSION + 1)
        if content.get("format") != FORMAT or content.get("version") not in known:
            raise UserError(
                f"{file} has format {content.get('format')!r} version {content.get('version')!r}; "
                f"this latent_ae reads {FORMAT!r} versions 1 to {FORMAT_VERSION}"
            )
        if content["version"] == 1:
            content = _from_version_1(content)
        elif content["version"] == 2 and content["storage"]["kind"] == "indices":
            # It had the shapes of latents there, and knew one code a position.
            content["latent_shapes"] = [shape[1:] for shape in content["latent_shapes"]]
        return LatentsManifest.model_validate(content)
    except (ValueError, ValidationError, AttributeError, KeyError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{file} is damaged: {first}") from error


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 knew fixed sizes and moments alone, and listed what was skipped."""
    resolution = content["preprocessing"]["resolution"]
    rows = max((shard["rows"] for shard in content["shards"]), default=1)
    dtype = content.pop("dtype")
    return content | {
        "preprocessing": {"resolution": resolution},
        "storage": {"dtype": dtype, "precision": "fp32", "shard_rows": rows},
        "latent_shapes": [content.pop("latent_shape")],
        "pictures": content["count"],
        "skipped": len(content.pop("skipped", [])),
    }
