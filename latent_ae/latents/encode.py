"""A data set through the encoder, into a latents folder."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from rich.console import Console
from rich.progress import track

from latent_ae.autoencoder import (
    default_device,
    downsampling,
    encode_moments,
    load_network,
    require_divisible,
)
from latent_ae.bottlenecks import split_moments
from latent_ae.config import SourceConfig
from latent_ae.data import Batch, evaluation_batches, normalize, open_source, source_of
from latent_ae.errors import UserError
from latent_ae.latents.format import (
    MANIFEST,
    OWN_FILE,
    AutoencoderRecord,
    LatentsManifest,
    Preprocessing,
    SkippedRecord,
)
from latent_ae.latents.writer import ShardWriter, write_whole
from latent_ae.scaling import LatentStatistics

__all__ = ["DTYPES", "encode"]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@torch.no_grad()
def encode(
    model: str | Path,
    data: str | Path | SourceConfig,
    out: str | Path,
    *,
    resolution: int = 256,
    batch_size: int = 8,
    workers: int = 2,
    dtype: str = "float16",
    shard_rows: int = 1024,
    limit: int | None = None,
    device: torch.device | str | None = None,
    console: Console | None = None,
) -> LatentsManifest:
    """Writes mean and log-variance of every picture's posterior, unscaled.

    Args:
        model: an exported folder, or any `AutoencoderKL` folder.
        data: a source, or a path whose kind is guessed.
        out: the latents folder; a shard appears in it whole or not at all, the manifest last.
        resolution: shorter side after the Lanczos resize, and side of the centre crop, in pixels.
        batch_size: pictures a pass of the encoder.
        workers: loader processes.
        dtype: of the stored moments: `float16`, `bfloat16` or `float32`.
        shard_rows: pictures a shard.
        limit: take only the first pictures.
        device: CUDA where there is one, when left out.
        console: where progress is shown; nothing is, when left out.

    Returns:
        The manifest.

    Raises:
        UserError: no such model or data, `out` is taken, or moments that `dtype` cannot hold.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; valid: {', '.join(DTYPES)}")
    network = load_network(model).to(torch.device(device or default_device())).eval()  # pyright: ignore
    network = network.to(memory_format=torch.channels_last)  # pyright: ignore
    require_divisible(resolution, network)
    source = open_source(data if isinstance(data, SourceConfig) else source_of(data))
    out = _claim(Path(out))
    record = AutoencoderRecord.of_folder(model, network)
    writer, statistics = ShardWriter(out, DTYPES[dtype], shard_rows), LatentStatistics()
    batches: Iterable[Batch] = evaluation_batches(
        source, resolution, batch_size=batch_size, workers=workers, limit=limit
    )
    if console is not None:
        rows = len(source.rows) if hasattr(source.rows, "__len__") else limit
        total = None if rows is None else -(-min(rows, limit or rows) // batch_size)
        batches = track(batches, "encode", total=total, console=console)
    for batch in batches:
        writer.skipped += [SkippedRecord(**vars(skip)) for skip in batch.skipped]
        if not batch.samples:
            continue
        images = normalize(batch.images.to(network.device, non_blocking=True))
        images = images.contiguous(memory_format=torch.channels_last)
        mean, logvar = split_moments(encode_moments(network, images))
        statistics.update(mean, logvar)
        writer.add(batch.samples, mean.cpu(), logvar.cpu())
    writer.flush()
    manifest = LatentsManifest(
        autoencoder=record,
        preprocessing=Preprocessing(resolution=resolution),
        latent_shape=_latent_shape(network, resolution),
        dtype=dtype,
        count=writer.count,
        label_names=source.label_names,
        num_classes=len(source.label_names) or writer.highest_label + 1,
        shards=writer.shards,
        skipped=writer.skipped,
        statistics=statistics.summary(),
        versions={name: version(name) for name in ("latent_ae", "torch", "diffusers")},
    )
    write_whole(out / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
    return manifest


def _latent_shape(network: AutoencoderKL, resolution: int) -> tuple[int, int, int]:
    side = resolution // downsampling(network)
    return (network.config["latent_channels"], side, side)


def _claim(out: Path) -> Path:
    """Makes the folder; an unfinished one of an earlier run is begun again."""
    if (out / MANIFEST).exists():
        raise UserError(f"{out} holds finished latents; remove it or choose another folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder")
    found = list(out.iterdir()) if out.exists() else []
    for file in found:
        if not OWN_FILE.fullmatch(file.name):
            raise UserError(f"{out} holds other files ({file.name}); choose an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    for file in found:
        file.unlink()
    return out
