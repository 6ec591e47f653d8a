"""The latents folder: its manifest, its index and its names (docs/latents-format.md)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
from diffusers import AutoencoderKL
from pydantic import BaseModel, ValidationError

from latent_ae.autoencoder import weights_sha256
from latent_ae.errors import UserError
from latent_ae.scaling import LatentScaling

__all__ = [
    "FORMAT",
    "INDEX_SCHEMA",
    "MANIFEST",
    "OWN_FILE",
    "AutoencoderRecord",
    "LatentsManifest",
    "Preprocessing",
    "ShardRecord",
    "SkippedRecord",
    "index_name",
    "read_manifest",
    "shard_name",
]

FORMAT = "latent_ae/latents"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

# What an unfinished folder may hold: anything else is somebody's, such as webdataset's shard-0.tar.
OWN_FILE = re.compile(
    r"(shard-\d{5}\.safetensors|index-\d{5}\.parquet)(\.tmp)?|manifest\.json\.tmp"
)

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int64()),
        ("caption", pa.string()),
        ("width", pa.int32()),  # of the original picture, in pixels
        ("height", pa.int32()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
    ]
)


class AutoencoderRecord(LatentScaling):
    """Which autoencoder made the latents, and how it wants them scaled."""

    path: str
    weights_sha256: str
    class_name: str

    @classmethod
    def of_folder(cls, folder: str | Path, network: AutoencoderKL) -> AutoencoderRecord:
        """The record of a network that was loaded from a folder."""
        return cls(
            path=str(Path(folder).resolve()),
            weights_sha256=weights_sha256(folder),
            class_name=type(network).__name__,
            **LatentScaling.of(network).model_dump(),
        )


class Preprocessing(BaseModel):
    """What was done to a picture before the encoder saw it."""

    resolution: int
    resize: str = "shorter side, Lanczos"
    crop: str = "center"


class ShardRecord(BaseModel):
    """A shard that is whole."""

    file: str
    index: str
    rows: int
    sha256: str


class SkippedRecord(BaseModel):
    """A picture that is not in the folder, and why."""

    key: str
    reason: str


class LatentsManifest(BaseModel):
    """What `manifest.json` says.

    `latent_shape` is (c, h, w); `dtype` is that of the stored moments.
    """

    format: str = FORMAT
    version: int = FORMAT_VERSION
    autoencoder: AutoencoderRecord
    preprocessing: Preprocessing
    latent_shape: tuple[int, int, int]
    dtype: str
    count: int
    label_names: list[str] = []
    num_classes: int = 0
    shards: list[ShardRecord]
    skipped: list[SkippedRecord] = []
    statistics: dict[str, float | int | list[float]] = {}
    versions: dict[str, str] = {}


def shard_name(number: int) -> str:
    """The file of a shard's moments."""
    return f"shard-{number:05d}.safetensors"


def index_name(number: int) -> str:
    """The file of a shard's keys, labels and sizes."""
    return f"index-{number:05d}.parquet"


def read_manifest(folder: str | Path) -> LatentsManifest:
    """Reads a latents folder's manifest.

    Raises:
        UserError: the folder has none, or one that this version does not understand.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise UserError(f"{folder} is no finished latents folder: it has no {MANIFEST}")
    try:
        content = json.loads(file.read_text())
        if content.get("format") != FORMAT or content.get("version") != FORMAT_VERSION:
            raise UserError(
                f"{file} has format {content.get('format')!r} version {content.get('version')!r}; "
                f"this latent_ae reads {FORMAT!r} version {FORMAT_VERSION}"
            )
        return LatentsManifest.model_validate(content)
    except (json.JSONDecodeError, ValidationError, AttributeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{file} is damaged: {first}") from error
