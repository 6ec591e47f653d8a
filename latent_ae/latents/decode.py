"""A latents folder back to pictures."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from latent_ae.autoencoder import decode_latents, default_device, load_network, weights_sha256
from latent_ae.data import to_uint8
from latent_ae.errors import UserError
from latent_ae.latents.dataset import LatentDataset

__all__ = ["decode"]


@torch.no_grad()
def decode(
    latents: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    device: torch.device | str | None = None,
    console: Console | None = None,
) -> int:
    """Decodes the posterior modes of a latents folder to PNG files named by their keys.

    Args:
        latents: what `encode` wrote.
        out: the folder for the pictures; files of the same names are replaced.
        model: the autoencoder, if it no longer lies where the manifest says.
        batch_size: latents a pass of the decoder.
        limit: only the first rows.
        device: CUDA where there is one, when left out.
        console: where progress is shown; nothing is, when left out.

    Returns:
        How many pictures were written.

    Raises:
        UserError: no such folder, or an autoencoder with other weights than the encoder's.
    """
    dataset = LatentDataset(latents, sample=False, scale=False)
    record = dataset.manifest.autoencoder
    model = model or record.path
    network = load_network(model)
    if weights_sha256(model) != record.weights_sha256:
        raise UserError(f"{latents} was encoded by another autoencoder than the one at {model}")
    network = network.to(torch.device(device or default_device())).eval()  # pyright: ignore
    count = min(len(dataset), limit or len(dataset))
    written: set[Path] = set()
    starts = range(0, count, batch_size)
    for start in track(starts, "decode", console=console, disable=console is None):
        rows = [dataset[i] for i in range(start, min(start + batch_size, count))]
        batch = torch.stack([row["latents"] for row in rows]).to(network.device)
        pictures = to_uint8(decode_latents(network, batch)).cpu()
        for row, picture in zip(rows, pictures, strict=True):
            file = _file_of(Path(out), row["key"])
            if file in written:  # tars may repeat a key
                file = file.with_name(f"{file.stem}-{len(written)}.png")
            written.add(file)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())).save(file)
    return count


def _file_of(out: Path, key: str) -> Path:
    """A key's PNG below `out`: a key with `..` or a leading `/` must not leave it."""
    parts = [part for part in PurePosixPath(key).parts if part not in ("/", "..")]
    path = out.joinpath(*parts) if parts else out / "picture"
    return path.with_name(path.name + ".png")
