"""A latents folder back to pictures."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from latent_ae.channels import has_colours
from latent_ae.data import Bands, to_uint8
from latent_ae.errors import UserError
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.latents.dataset import LatentDataset
from latent_ae.latents.entries import check_codebook
from latent_ae.lineage import readable_latents

__all__ = ["decode", "open_autoencoder"]


def decode(
    latents: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    precision: str = "fp32",
    device: torch.device | str | None = None,
    console: Console | None = None,
) -> int:
    """Decodes the codes of a latents folder to files named by their keys.

    Pictures of 1, 3 and 4 channels become PNG, others TIFF with a page a band.

    Args:
        latents: what `encode` wrote; of a posterior the mode is decoded.
        out: the folder for the pictures; files of the same names are replaced.
        model: the autoencoder, if it no longer lies where the manifest says.
        batch_size: latents a pass of the decoder.
        limit: only the first codes.
        precision: of the decoder: `fp32`, `bf16` or `fp16`.
        device: CUDA where there is one, when left out.
        console: where progress is shown; nothing is, when left out.

    Returns:
        How many pictures were written.

    Raises:
        UserError: no such folder, or an autoencoder with other weights than the encoder's (its
            decoder apart, where it was trained alone), or of indices with another codebook.
    """
    dataset = LatentDataset(latents, sample=False, scale=False, columns=("key",))
    frozen = open_autoencoder(dataset, model, precision, device)
    count = min(len(dataset), limit or len(dataset))
    written: set[Path] = set()
    suffix = ".png" if has_colours(frozen.image_channels) else ".tiff"
    title = {"description": "decode", "console": console, "disable": console is None}
    batches = list(_of_one_size(dataset, count, batch_size))
    for positions in track(batches, **title):  # pyright: ignore[reportArgumentType]
        rows = [dataset[position] for position in positions]
        pictures = _decoded(frozen, rows)
        if dataset.manifest.data.source == "edm2":  # whose pixels lie in [0, 1]
            pictures = 2 * pictures - 1
        for row, picture in zip(rows, to_uint8(pictures).cpu(), strict=True):
            file = _file_of(Path(out), row["key"], suffix)
            if file in written:  # several crops of one picture
                file = file.with_name(f"{file.stem}-{len(written)}{suffix}")
            written.add(file)
            file.parent.mkdir(parents=True, exist_ok=True)
            _save(picture, file)
    return count


def open_autoencoder(
    dataset: LatentDataset,
    model: str | Path | None,
    precision: str = "fp32",
    device: torch.device | str | None = None,
) -> FrozenAutoencoder:
    """The autoencoder that made the latents; raises `UserError` for any other."""
    record = dataset.manifest.autoencoder
    path = model or record.path
    frozen = FrozenAutoencoder(path, device, precision)
    if record.weights_sha256 not in readable_latents(path):
        raise UserError(
            f"{dataset.folder} was encoded by another autoencoder than the one at {path}"
        )
    if dataset.manifest.storage.kind == "indices":
        check_codebook(frozen.codebook_sha256, path, dataset.folder, dataset.manifest)
    return frozen


def _of_one_size(dataset: LatentDataset, count: int, batch_size: int) -> list[list[int]]:
    """The first positions in batches, in order within each size."""
    groups: dict[tuple[int, int], list[int]] = {}
    for position in range(count):
        groups.setdefault(dataset.size_of(position), []).append(position)
    return [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]


def _decoded(frozen: FrozenAutoencoder, rows: list[dict]) -> torch.Tensor:
    if "indices" in rows[0]:
        indices = torch.stack([row["indices"] for row in rows])
        # One code a position is stored without a dimension of its own.
        return frozen.decode_indices(indices.view(len(rows), -1, *indices.shape[-2:]))
    return frozen.decode(torch.stack([row["latents"] for row in rows]))


def _save(picture: torch.Tensor, file: Path) -> None:
    pixels = np.ascontiguousarray(picture.permute(1, 2, 0).numpy())
    if not has_colours(pixels.shape[2]):
        Bands.of(pixels).save(file)
    else:
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file)


def _file_of(out: Path, key: str, suffix: str) -> Path:
    """A key's file below `out`: a key with `..` or a leading `/` must not leave it."""
    parts = [part for part in PurePosixPath(key).parts if part not in ("/", "..")]
    parts = [part if len(part.encode()) <= 200 else _short(part) for part in parts]
    path = out.joinpath(*parts) if parts else out / "picture"
    return path.with_name(path.name + suffix)


def _short(part: str) -> str:
    """Keys may be URLs; file systems take 255 bytes."""
    return part[:40] + "-" + hashlib.sha256(part.encode()).hexdigest()[:16]
