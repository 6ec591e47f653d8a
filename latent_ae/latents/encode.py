"""A data set through the encoder, into a latents folder."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from latent_ae.autoencoder import (
    default_device,
    downsampling,
    encode_moments,
    load_network,
    require_divisible,
    weights_sha256,
)
from latent_ae.bottlenecks import split_moments
from latent_ae.config import SourceConfig
from latent_ae.data import Batch, Sample, evaluation_batches, normalize, open_source, source_of
from latent_ae.errors import UserError
from latent_ae.latents.format import (
    INDEX_SCHEMA,
    MANIFEST,
    AutoencoderRecord,
    LatentsManifest,
    Preprocessing,
    ShardRecord,
    SkippedRecord,
    index_name,
    shard_name,
)
from latent_ae.scaling import LatentScaling, LatentStatistics

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
    config = data if isinstance(data, SourceConfig) else source_of(data)
    source = open_source(config)
    out = _claim(Path(out))
    side = resolution // downsampling(network)
    shape = (network.config["latent_channels"], side, side)
    writer = _ShardWriter(out, DTYPES[dtype], shard_rows)
    statistics = LatentStatistics()
    batches: Iterator[Batch] = evaluation_batches(
        source, resolution, batch_size=batch_size, workers=workers, limit=limit
    )
    if console is not None:
        total = -(-len(source.rows) // batch_size) if hasattr(source.rows, "__len__") else None  # pyright: ignore
        batches = iter(track(batches, "encode", total=total, console=console))
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
        autoencoder=AutoencoderRecord(
            path=str(Path(model).resolve()),
            weights_sha256=weights_sha256(model),
            class_name=type(network).__name__,
            **LatentScaling.of(network).model_dump(),
        ),
        preprocessing=Preprocessing(resolution=resolution),
        latent_shape=shape,
        dtype=dtype,
        count=writer.count,
        label_names=source.label_names,
        num_classes=len(source.label_names) or writer.highest_label + 1,
        shards=writer.shards,
        skipped=writer.skipped,
        statistics=statistics.summary(),
        versions={n: version(n) for n in ("latent_ae", "torch", "diffusers")}
        | {"python": platform.python_version()},
    )
    _write_whole(out / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
    return manifest


def _claim(out: Path) -> Path:
    """Makes the folder; an unfinished one of an earlier run is begun again."""
    if (out / MANIFEST).exists():
        raise UserError(f"{out} holds finished latents; remove it or choose another folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder")
    foreign = [
        file.name
        for file in (out.iterdir() if out.exists() else [])
        if not file.name.startswith(("shard-", "index-"))
    ]
    if foreign:
        raise UserError(f"{out} holds other files ({foreign[0]}); choose an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    for file in out.iterdir():
        file.unlink()
    return out


class _ShardWriter:
    """Gathers rows and writes a shard, then its index, when there are enough."""

    def __init__(self, folder: Path, dtype: torch.dtype, shard_rows: int) -> None:
        self.folder, self.dtype, self.shard_rows = folder, dtype, shard_rows
        self.count, self.highest_label = 0, -1
        self.shards: list[ShardRecord] = []
        self.skipped: list[SkippedRecord] = []
        self._samples: list[Sample] = []
        self._means: list[Tensor] = []
        self._logvars: list[Tensor] = []

    def add(self, samples: list[Sample], mean: Tensor, logvar: Tensor) -> None:
        for name, values in (("mean", mean), ("logvar", logvar)):
            if not torch.isfinite(values.to(self.dtype)).all():
                reason = "is not finite" if not torch.isfinite(values).all() else "overflows"
                raise UserError(
                    f"the {name} of one of {', '.join(s.key for s in samples)} {reason} in "
                    f"{self.dtype}; store float32, or check the autoencoder"
                )
        self._samples += samples
        self._means += list(mean.to(self.dtype))
        self._logvars += list(logvar.to(self.dtype))
        while len(self._samples) >= self.shard_rows:
            self._write(self.shard_rows)

    def flush(self) -> None:
        if self._samples:
            self._write(len(self._samples))

    def _write(self, rows: int) -> None:
        number = len(self.shards)
        samples, self._samples = self._samples[:rows], self._samples[rows:]
        tensors = {
            "mean": torch.stack(self._means[:rows]).contiguous(),
            "logvar": torch.stack(self._logvars[:rows]).contiguous(),
        }
        self._means, self._logvars = self._means[rows:], self._logvars[rows:]
        file = self.folder / shard_name(number)
        aside = file.with_name(file.name + ".tmp")
        save_file(tensors, aside)
        digest = hashlib.sha256(aside.read_bytes()).hexdigest()
        aside.rename(file)
        index = pa.Table.from_pylist(
            [
                {
                    **{name: getattr(s, name) for name in ("key", "label", "caption")},
                    **{"width": s.width, "height": s.height, "shard": number, "row": row},
                }
                for row, s in enumerate(samples)
            ],
            schema=INDEX_SCHEMA,
        )
        buffer = pa.BufferOutputStream()
        pyarrow.parquet.write_table(index, buffer)
        _write_whole(self.folder / index_name(number), buffer.getvalue().to_pybytes())
        record = ShardRecord(file=file.name, index=index_name(number), rows=rows, sha256=digest)
        self.shards.append(record)
        self.count += rows
        labels = [s.label for s in samples if s.label is not None]
        self.highest_label = max([self.highest_label, *labels])


def _write_whole(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
