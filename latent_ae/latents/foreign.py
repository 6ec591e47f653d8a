"""What it takes to read and write the latents of other programs, whatever their layout."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latent_ae.config import Preprocessing, Storage
from latent_ae.errors import UserError
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.latents.chunks import Row
from latent_ae.latents.encoder import DTYPES, EncodedBatch
from latent_ae.latents.folder import UnfinishedFolder
from latent_ae.latents.format import AutoencoderRecord, DataRecord, LatentsManifest, read_manifest
from latent_ae.latents.plan import Plan, Unit, storage_for
from latent_ae.latents.spool import Spool
from latent_ae.latents.writer import OpenShard, write_shard

__all__ = [
    "SHARD_BYTES",
    "ForeignLatents",
    "Picture",
    "check_exportable",
    "check_finite",
    "import_latents",
    "whole",
]

SHARD_BYTES = 64 << 20


@dataclass
class Picture:
    """A picture's codes: its own and, where there is one, that of its mirror image.

    Attributes:
        key: unique among the pictures.
        label: its class.
        codes: `mean` and perhaps `logvar` of each, float32, of shape (c, h, w).
    """

    key: str
    label: int | None
    codes: list[dict[str, Tensor]]


@dataclass
class ForeignLatents:
    """An opened set of latents in another layout.

    Attributes:
        layout: its name, for the manifest.
        path: where it lies.
        kind: `moments` or `mode`.
        flip: whether mirror images are stored too.
        shape: of every code, (c, h, w).
        keys: of all pictures, in their order.
        pictures: the same, read when asked for.
    """

    layout: str
    path: Path
    kind: str
    flip: bool
    shape: tuple[int, ...]
    keys: list[str]
    pictures: Iterator[Picture]


def import_latents(
    foreign: ForeignLatents, model: str | Path, out: str | Path, dtype: str, shard_bytes: int
) -> LatentsManifest:
    """Writes a latents folder, a shard in memory at a time; it appears when it is whole.

    Args:
        foreign: what shall be in it.
        model: the autoencoder's folder.
        out: the latents folder.
        dtype: of what is stored: `float16`, `bfloat16` or `float32`.
        shard_bytes: what a shard shall have at most.

    Raises:
        UserError: the autoencoder makes no such latents, `out` is not empty, or what is read is
            damaged or does not fit the type.
    """
    plan = _plan(foreign, FrozenAutoencoder(model, "cpu"), dtype, shard_bytes)
    pictures = iter(foreign.pictures)
    with whole(Path(out)) as aside:
        folder = UnfinishedFolder(aside, plan)
        try:
            for unit in plan.units() or ():
                _write_unit(aside, plan, unit, pictures)
            return folder.finish()
        finally:
            folder.release()


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A folder to write into, which gets the name `out` at the end and goes if something fails.

    Raises:
        UserError: `out` is not empty or cannot be replaced, or an earlier run has left its folder.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already and not empty; choose another folder")
    if out.is_mount():  # cannot be renamed over, which is better known before the work than after
        raise UserError(f"{out} is a disk of its own; choose a folder in it")
    aside = out.with_name(f".{out.name}.partial")
    try:
        aside.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(
            f"{aside} is there: another run is writing, or was stopped; then remove it"
        ) from error
    try:
        yield aside
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def check_finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor itself; raises `UserError` where a value of it is NaN or infinite."""
    if not tensor.isfinite().all():
        raise UserError(f"{name} holds values that are not finite")
    return tensor


def check_exportable(folder: str | Path, kinds: tuple[str, ...], layout: str) -> LatentsManifest:
    """A folder's manifest; raises `UserError` if it holds another kind, or several sizes."""
    manifest = read_manifest(folder)
    if manifest.storage.kind not in kinds:
        raise UserError(
            f"{folder} holds {manifest.storage.kind}; {layout} needs {' or '.join(kinds)}"
        )
    if manifest.preprocessing.buckets:
        raise UserError(f"{folder} holds latents of several sizes (buckets); {layout} needs one")
    return manifest


def _plan(foreign: ForeignLatents, frozen: FrozenAutoencoder, dtype: str, shard_bytes: int) -> Plan:
    channels, height, width = foreign.shape
    if channels != frozen.channels:
        raise UserError(
            f"{foreign.path} holds latents of {channels} channels; {frozen.path} makes "
            f"{frozen.channels}"
        )
    if height != width or not height:
        raise UserError(f"{foreign.path} holds latents of {height} × {width}; squares are wanted")
    cut = Preprocessing(resolution=height * frozen.downsampling, flip=foreign.flip)
    stored = storage_for(frozen, foreign.kind, dtype)
    values = channels * height * width * (2 if foreign.kind == "moments" else 1)
    rows = max(1, shard_bytes // (values * DTYPES[dtype].itemsize * cut.variants))
    return Plan(
        autoencoder=AutoencoderRecord.of(frozen),
        data=DataRecord(
            source=foreign.layout,
            path=str(foreign.path),
            rows=len(foreign.keys),
            fingerprint=hashlib.sha256("\0".join(foreign.keys).encode()).hexdigest(),
        ),
        preprocessing=cut,
        storage=Storage(precision="fp32", shard_rows=rows, **stored),
        latent_shapes=[(channels, height, width)],
    )


def _write_unit(folder: Path, plan: Plan, unit: Unit, pictures: Iterator[Picture]) -> None:
    """Takes as many pictures as the unit has rows, and writes its shard and index."""
    shard = OpenShard(unit, Spool(folder / f"spool-{unit.stem}.bin", {}))  # stays empty
    size = (plan.preprocessing.resolution, plan.preprocessing.resolution)
    for position, picture in zip(plan.rows_of(unit), pictures, strict=False):
        row = {"label": picture.label, "caption": None, "kept": {}, "size": size}
        for flipped, code in zip((False, True), picture.codes, strict=False):
            shard.rows.append(Row(picture.key, position, flipped=flipped, **row))
            shard.add(_stored(picture.key, code, plan.storage.dtype, size))
    write_shard(folder, plan, shard, {})


def _stored(key: str, code: dict[str, Tensor], dtype: str, size: tuple[int, int]) -> EncodedBatch:
    tensors = {name: tensor[None].to(DTYPES[dtype]) for name, tensor in code.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{key}: its {name} is too large for {dtype}; choose another dtype")
    return EncodedBatch(size, tensors, finite=torch.ones(1, dtype=torch.bool))
