"""To and from two other layouts of latents: that of EDM2 and that of LightningDiT."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor

from latent_ae.errors import UserError
from latent_ae.latents.dataset import LatentDataset
from latent_ae.latents.files import write_whole
from latent_ae.latents.foreign import (
    SHARD_BYTES,
    ForeignLatents,
    Picture,
    check_finite,
    import_latents,
    whole,
)
from latent_ae.latents.format import LatentsManifest, read_manifest
from latent_ae.latents.shards import MappedShard
from latent_ae.latents.statistics import Moments, combine

__all__ = [
    "FORMATS",
    "export_edm2",
    "export_lightningdit",
    "import_edm2",
    "import_lightningdit",
]

_LABELS = "dataset.json"
_FILE_ROWS = 10_000  # pictures in a file of LightningDiT's


def import_edm2(
    archive: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "float16",
    shard_bytes: int = SHARD_BYTES,
) -> LatentsManifest:
    """Makes a latents folder, of moments, from the archive that EDM2's `dataset_tool.py` encodes.

    EDM2 (NVlabs/edm2, `training/encoders.py`) shows the encoder pixels in [0, 1], not the [-1, 1]
    that it was trained for and that `encode` shows it: these are not the latents that the same
    autoencoder gives here, must not be mixed with such, and decode to pixels in [0, 1]. The
    manifest's `data.source`, `edm2`, tells them; its `statistics` are theirs, the scaling of
    the autoencoder's config is not. Nothing in the archive says whose latents it holds: that
    `model` has made them cannot be checked, but for the number of channels.

    Args:
        archive: the zip file: an .npy of mean and standard deviation for each picture.
        model: the autoencoder's folder.
        out: the latents folder.
        dtype: of what is stored: `float16`, `bfloat16` or `float32`.
        shard_bytes: what a shard shall have at most.

    Returns:
        The manifest.

    Raises:
        UserError: the archive is damaged, the autoencoder makes no such latents, or `out` is not
            empty.
    """
    archive = Path(archive)
    try:
        file = zipfile.ZipFile(archive)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{archive} cannot be read as a zip file: {error}") from error
    with file:
        names = sorted(name for name in set(file.namelist()) if name.lower().endswith(".npy"))
        if not names:
            raise UserError(f"{archive} holds no latents: no .npy is in it")
        labels = _edm2_labels(file, names)
        channels, *sides = _edm2_array(file, names[0]).shape
        shape = (channels // 2, *sides)
        pictures = (_edm2_picture(file, name, labels.get(name), shape) for name in names)
        foreign = ForeignLatents("edm2", archive, "moments", False, shape, names, pictures)
        return import_latents(foreign, model, out, dtype, shard_bytes)


def export_edm2(folder: str | Path, archive: str | Path) -> int:
    """Writes the archive that EDM2's `ImageFolderDataset` reads, from a latents folder of moments.

    Each code becomes an image, crops and mirror images too. Its `StabilityVAEEncoder` then needs
    the manifest's `channel_mean` and `channel_std` for `raw_mean` and `raw_std`, and its `decode`,
    which expects pixels in [0, 1], has to map [-1, 1] to them (unless `import_edm2` made the
    folder).

    Args:
        folder: the latents folder.
        archive: the zip file to write; its name ends in .zip.

    Returns:
        How many codes were written.

    Raises:
        UserError: the folder holds no moments or several sizes, or `archive` is there already or
            has another ending.
    """
    archive = Path(archive)
    if archive.suffix.lower() != ".zip":
        raise UserError(f"{archive} has to end in .zip: EDM2 takes it for a folder else")
    if archive.exists():
        raise UserError(f"{archive} is there already; choose another name")
    _check_exportable(folder, ("moments",), "EDM2")
    dataset = LatentDataset(folder, columns=("label",))
    archive.parent.mkdir(parents=True, exist_ok=True)
    write_whole(archive, lambda path: _write_edm2(path, dataset))
    return len(dataset)


def import_lightningdit(
    source: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "float16",
    shard_bytes: int = SHARD_BYTES,
) -> LatentsManifest:
    """Makes a latents folder from the files that LightningDiT's `extract_features.py` writes.

    They hold one draw of the posterior for each picture and one for its mirror image, raw: that is
    stored as two codes of kind `mode`, and no reading draws anew. What its sampler repeats so that
    all processes have equally many pictures stays repeated; `latents_stats.pt` is not read.
    Nothing in the files says whose latents they hold: that `model` has made them cannot be
    checked, but for the number of channels.

    Args:
        source: the folder of safetensors files.
        model: the autoencoder's folder.
        out: the latents folder.
        dtype: of what is stored: `float16`, `bfloat16` or `float32`.
        shard_bytes: what a shard shall have at most.

    Returns:
        The manifest.

    Raises:
        UserError: a file is damaged, the autoencoder makes no such latents, or `out` is not empty.
    """
    source = Path(source)
    files = sorted(source.glob("*.safetensors"))  # the order of its own reader
    shape: tuple[int, ...] | None = None
    keys: list[str] = []
    for file in files:
        rows, *shape = _lightningdit_file(file, shape).shape("latents")
        shape = tuple(shape)
        keys += [f"{file.name}:{row}" for row in range(rows)]
    if not keys or shape is None:
        raise UserError(f"{source} holds no latents: no row of a .safetensors file is in it")
    pictures = (picture for file in files for picture in _lightningdit_pictures(file, shape))
    foreign = ForeignLatents("lightningdit", source, "mode", True, shape, keys, pictures)
    return import_latents(foreign, model, out, dtype, shard_bytes)


def export_lightningdit(folder: str | Path, out: str | Path, *, seed: int = 0) -> int:
    """Writes the files that LightningDiT's `ImgLatentDataset` reads, from a latents folder.

    One draw of the posterior for each code, raw, or the mode where there is no posterior. The
    statistics beside them are those of all draws, in the place of the ones that its reader would
    estimate from at most 10,000.

    Args:
        folder: the latents folder, encoded with `flip`: the mirror image of a picture's latents is
            not the latents of its mirror image.
        out: the folder of safetensors files.
        seed: of the draws.

    Returns:
        How many pictures, and crops of such, were written.

    Raises:
        UserError: the folder holds no mirror images, indices or several sizes, a label is missing,
            or `out` is not empty.
    """
    manifest = _check_exportable(folder, ("moments", "mode"), "LightningDiT")
    if not manifest.preprocessing.flip:
        raise UserError(
            f"{folder} holds no mirror images, which LightningDiT needs; encode with flip"
        )
    places = ("position", "crop_left", "crop_top")
    dataset = LatentDataset(folder, scale=False, seed=seed, columns=("label", "flipped", *places))
    labels = _lightningdit_labels(dataset, places)
    parts = []
    with whole(Path(out)) as aside:
        for number, start in enumerate(range(0, len(labels), _FILE_ROWS)):
            some = labels[start : start + _FILE_ROWS]
            first, end = 2 * start, 2 * (start + len(some))
            tensors = {
                "latents": _drawn(dataset, range(first, end, 2)),
                "latents_flip": _drawn(dataset, range(first + 1, end, 2)),
                "labels": some,
            }
            _write_lightningdit(aside / f"latents_rank00_shard{number:03d}.safetensors", tensors)
            if (moments := Moments.of([tensors["latents"]], [])) is not None:
                parts.append(moments)
        statistics = _lightningdit_statistics(combine(parts))
        write_whole(aside / "latents_stats.pt", lambda path: torch.save(statistics, path))
    return len(labels)


FORMATS: dict[str, tuple[Callable[..., LatentsManifest], Callable[..., int]]] = {
    "edm2": (import_edm2, export_edm2),
    "lightningdit": (import_lightningdit, export_lightningdit),
}
