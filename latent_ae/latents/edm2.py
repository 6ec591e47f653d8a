"""To and from the archives of EDM2 (https://github.com/NVlabs/edm2)."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import torch

from latent_ae.errors import UserError
from latent_ae.latents.dataset import LatentDataset
from latent_ae.latents.files import write_whole
from latent_ae.latents.foreign import (
    SHARD_BYTES,
    ForeignLatents,
    Picture,
    check_exportable,
    check_finite,
    import_latents,
)
from latent_ae.latents.format import LatentsManifest

__all__ = ["export_edm2", "import_edm2"]

_LABELS = "dataset.json"


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
        labels = _labels(file, names)
        channels, *sides = _array(file, names[0]).shape
        shape = (channels // 2, *sides)
        pictures = (_picture(file, name, labels.get(name), shape) for name in names)
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
    check_exportable(folder, ("moments",), "EDM2")
    dataset = LatentDataset(folder, columns=("label",))
    archive.parent.mkdir(parents=True, exist_ok=True)
    write_whole(archive, lambda path: _write(path, dataset))
    return len(dataset)


def _content(file: zipfile.ZipFile, name: str) -> bytes:
    try:
        return file.read(name)
    except Exception as error:  # zipfile's, zlib's and the system's
        raise UserError(f"{file.filename} is damaged: {name}: {error}") from error


def _labels(file: zipfile.ZipFile, names: list[str]) -> dict[str, int]:
    """The class of every picture; empty where the archive says of none."""
    if _LABELS not in file.namelist():
        return {}
    try:
        content = json.loads(_content(file, _LABELS))["labels"]
        if content is None:
            return {}
        found = dict(content)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file.filename} is damaged: {_LABELS}: {error}") from error
    for name in names:
        label = found.get(name)
        if type(label) is not int or label < 0:
            raise UserError(f"{file.filename}: {_LABELS} gives {name} the class {label!r}")
    return found


def _array(file: zipfile.ZipFile, name: str) -> np.ndarray:
    """Mean and standard deviation, float32, of shape (2c, h, w)."""
    content = io.BytesIO(_content(file, name))
    try:
        array = np.lib.format.read_array(content, allow_pickle=False)
    except Exception as error:  # of a rubbish header numpy may raise nearly anything
        raise UserError(f"{file.filename} is damaged: {name}: {error}") from error
    if array.ndim != 3 or len(array) % 2 or array.dtype.kind != "f":
        raise UserError(
            f"{file.filename}: {name} has shape {array.shape} and type {array.dtype}; (2c, h, w) "
            "and floats are wanted"
        )
    return array.astype(np.float32)


def _picture(
    file: zipfile.ZipFile, name: str, label: int | None, shape: tuple[int, ...]
) -> Picture:
    array = _array(file, name)
    if array.shape != (2 * shape[0], *shape[1:]):
        raise UserError(
            f"{file.filename}: {name} has shape {array.shape}, others (2·{shape[0]}, "
            f"{shape[1]}, {shape[2]})"
        )
    mean, std = check_finite(torch.from_numpy(array), f"{file.filename}: {name}").chunk(2)
    if (std < 0).any():
        raise UserError(f"{file.filename}: {name} holds negative standard deviations")
    logvar = (2 * std.log()).clamp(-30, 20)  # diffusers' bounds, and a standard deviation of 0
    return Picture(name, label, [{"mean": mean, "logvar": logvar}])


def _write(path: Path, dataset: LatentDataset) -> None:
    labels = dataset.index.table["label"].to_pylist()
    pairs = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for number, label in enumerate(labels):
            name = f"{number // 1000:05d}/img-mean-std-{number:08d}.npy"
            mean, logvar = dataset.moments(number)
            array = torch.cat([mean, torch.exp(0.5 * logvar)]).numpy()
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            _add(file, name, content.getvalue())
            pairs.append([name, label])
        known = pairs if None not in labels else None
        _add(file, _LABELS, json.dumps({"labels": known}).encode())


def _add(file: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(name)  # dated 1980: the same latents, the same bytes
    info.external_attr = 0o644 << 16  # else it is nobody's to read once unpacked
    file.writestr(info, content)
