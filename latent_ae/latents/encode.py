"""A data set through the encoder, into a latents folder."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor

from latent_ae.autoencoder import default_device
from latent_ae.config import EncodingSource, Preprocessing, SourceConfig, Storage
from latent_ae.data import Source, open_source, source_of
from latent_ae.errors import UserError
from latent_ae.frozen import PRECISIONS, FrozenAutoencoder, fast_precision
from latent_ae.latents.chunks import Chunk, load_chunks
from latent_ae.latents.encoder import DTYPES, BatchEncoder, Batches
from latent_ae.latents.files import FolderLock
from latent_ae.latents.folder import Done, UnfinishedFolder
from latent_ae.latents.format import TENSORS, AutoencoderRecord, LatentsManifest, read_manifest
from latent_ae.latents.plan import (
    Plan,
    Unit,
    data_record,
    describe_difference,
    shapes_of,
    storage_for,
)
from latent_ae.latents.progress import EncodeProgress
from latent_ae.latents.spool import Spool
from latent_ae.latents.writer import OpenShard, ShardWriter
from latent_ae.processes import from_main, place, wait_for_everyone

__all__ = ["Job", "claim", "encode", "require_outside"]

_SHARD_BYTES = 64 << 20


@dataclass
class Job:
    """An opened autoencoder and source, and the plan of what they make together."""

    frozen: FrozenAutoencoder
    source: Source
    plan: Plan
    batch_size: int
    workers: int

    @classmethod
    def of(
        cls,
        model: str | Path,
        data: str | Path | SourceConfig,
        preprocessing: Preprocessing,
        *,
        batch_size: int | None = None,
        workers: int | None = None,
        store: str | None = None,
        dtype: str | None = None,
        precision: str | None = None,
        shard_bytes: int = _SHARD_BYTES,
        device: torch.device | str | None = None,
    ) -> Job:
        """Opens both and fixes all that decides the bytes; arguments as `encode`'s.

        Raises:
            UserError: no such model or data, or things that do not fit together.
        """
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is unknown; valid: {', '.join(DTYPES)}")
        if precision is not None and precision not in PRECISIONS:
            raise UserError(f"precision {precision!r} is unknown; valid: {', '.join(PRECISIONS)}")
        config = data if isinstance(data, SourceConfig) else source_of(data)
        config = EncodingSource.model_validate(config.model_dump())
        precision = precision or fast_precision(torch.device(device or default_device()))
        frozen = FrozenAutoencoder(model, device, precision)
        try:
            preprocessing = preprocessing.for_factor(frozen.downsampling)
        except ValueError as error:
            raise UserError(str(error)) from error
        source = open_source(config, frozen.image_channels).first(config.limit)
        stored = storage_for(frozen, store, dtype)
        shapes = shapes_of(frozen, stored["kind"], preprocessing.sizes())
        a_code = max(map(math.prod, shapes)) * len(TENSORS[stored["kind"]])
        a_picture = a_code * DTYPES[stored["dtype"]].itemsize * preprocessing.variants
        rows = max(1, shard_bytes // a_picture)
        plan = Plan(
            autoencoder=AutoencoderRecord.of(frozen),
            data=data_record(config, source),
            preprocessing=preprocessing,
            storage=Storage(precision=precision, shard_rows=rows, **stored),  # pyright: ignore
            latent_shapes=shapes,
        )
        # A CPU's caches like small batches; a GPU's many cores like large ones.
        batch_size = batch_size or (32 if frozen.device.type == "cuda" else 2)
        workers = _workers(frozen.device) if workers is None else workers
        return cls(frozen, source, plan, batch_size, workers)

    def run(
        self,
        folder: Path,
        units: Collection[Unit],
        progress: EncodeProgress,
        **stream: Any,
    ) -> None:
        """Encodes units into a folder that the main process has claimed.

        Args:
            folder: the latents folder.
            units: with random access, which ones.
            progress: is told of everything.
            stream: `files`, `share` and `done` of `load_chunks`, for a stream.
        """
        encoder = BatchEncoder(self.frozen, self.plan.storage)
        batches = Batches(self.frozen.device, self.batch_size)
        writer = ShardWriter(
            folder,
            self.plan,
            self.source.keep,
            encoded=lambda b: None if b.replayed else progress.encoded(len(b.finite), b.seconds),
        )
        options = {"batch_size": self.batch_size, "workers": self.workers, **stream}
        options["pin"] = self.frozen.device.type == "cuda"
        shard: OpenShard | None = None
        replayed = 0

        def full(images: Tensor, checks: list[int]) -> None:
            nonlocal replayed
            assert shard is not None
            before = shard.spool.batches
            if replayed < len(before) and before[replayed].checks == checks:
                writer.batch(shard, before[replayed])
                replayed += 1
                return
            shard.spool.keep(replayed)  # nothing of it is written to before these are used up
            writer.batch(shard, encoder(images, checks))

        try:
            for chunk in _timed(load_chunks(self.source, self.plan, units, **options), progress):
                if shard is None:
                    shard = self._open(folder, chunk.unit)
                    replayed = 0
                shard.rows += chunk.rows
                batches.add(chunk, full)
                progress.advance(chunk.pictures)
                if chunk.ends_unit:
                    shard.last = chunk.ends_file
                    writer.finish(shard)
                    shard = None
        finally:
            writer.close()

    def _open(self, folder: Path, unit: Unit) -> OpenShard:
        identity = {"batch_size": self.batch_size, "unit": unit.stem}
        return OpenShard(unit, Spool(folder / f"spool-{unit.stem}.bin", identity))


def encode(
    model: str | Path,
    data: str | Path | SourceConfig,
    out: str | Path,
    *,
    resolution: int = 256,
    preprocessing: Preprocessing | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    store: str | None = None,
    dtype: str | None = None,
    precision: str | None = None,
    shard_bytes: int = _SHARD_BYTES,
    limit: int | None = None,
    device: torch.device | str | None = None,
    console: Console | None = None,
) -> LatentsManifest:
    """Writes the code of every picture, unscaled, or goes on where an earlier run was stopped.

    Under a launcher the processes share the work, shard by shard; each shard is the same whoever
    writes it, so a run may be resumed by another number of processes.

    Args:
        model: an exported folder, or any image autoencoder of diffusers'.
        data: a source (an `EncodingSource` names columns), or a path whose kind is guessed.
        out: the latents folder (docs/latents-format.md).
        resolution: side of the centre crop after a Lanczos resize, in pixels.
        preprocessing: in its place, with several crops, mirror images or aspect buckets.
        batch_size: codes a pass of the encoder; 32 on a GPU and 2 on a CPU when left out.
        workers: loader processes; left out, 2 on a CPU, and on a GPU its share of the cores, at
            most 16.
        store: `moments`, `mode` or `indices`; what the autoencoder gives, when left out.
        dtype: of what is stored: `float16` (when left out), `bfloat16`, `float32`; for indices
            `uint8`, `uint16` or `int32`, the smallest that holds them when left out.
        precision: of the encoder: `bf16`, `fp16` or `fp32`; left out, bf16 where it is fast.
        shard_bytes: what a shard shall have at most.
        limit: take only the first pictures.
        device: CUDA where there is one, when left out.
        console: where progress is shown; nothing is, when left out.

    Returns:
        The manifest.

    Raises:
        UserError: no such model or data, things that do not fit together, `out` holds something
            else or another run writes into it, the disk is full, or no code is finite.
    """
    rank, world, device = place(device)
    config = data if isinstance(data, SourceConfig) else source_of(data)
    if limit is not None:
        config = EncodingSource.model_validate(config.model_dump() | {"limit": limit})
    cut = preprocessing or _preprocessing(resolution)
    job = Job.of(
        model,
        config,
        cut,
        batch_size=batch_size,
        workers=workers,
        store=store,
        dtype=dtype,
        precision=precision,
        shard_bytes=shard_bytes,
        device=device,
    )
    out = Path(out)
    require_outside(out, config)
    folder, found = claim(out, job.plan, world)
    if isinstance(found, LatentsManifest):
        return found
    lock = FolderLock(out, rank) if rank else None
    try:
        share = _share(job.plan, found, rank, world)
        known = job.plan.data.rows is not None
        total = sum(len(job.plan.rows_of(unit)) for unit in share["units"]) if known else None
        title = "encode" if world == 1 else f"encode (process 1 of {world})"
        with EncodeProgress(console if rank == 0 else None, total, title) as progress:
            job.run(out, progress=progress, **share)
        wait_for_everyone()
        if folder is not None:
            folder.finish()
        wait_for_everyone()
    finally:
        for held in (lock, folder):
            if held is not None:
                held.release()
    return read_manifest(out)


def claim(
    out: Path, plan: Plan, world: int = 1
) -> tuple[UnfinishedFolder | None, LatentsManifest | Done]:
    """The main process claims the folder; all learn its manifest or, unfinished, what is done.

    Raises:
        UserError: on every process, where the folder cannot be had.
    """
    folder: UnfinishedFolder | None = None

    def look() -> tuple[Plan, LatentsManifest | Done | UserError]:
        nonlocal folder
        try:
            folder = UnfinishedFolder(out, plan)
            return plan, folder.finished or folder.done()
        except UserError as error:  # raised by all: nobody shall wait for the others
            return plan, error

    main_plan, found = look() if world == 1 else from_main(look)
    if isinstance(found, UserError):
        raise found
    if difference := describe_difference(main_plan, plan):
        raise UserError(f"the main process encodes with {difference}: machines that differ?")
    return folder, found


def _share(plan: Plan, done: Done, rank: int, world: int) -> dict[str, Any]:
    """What is left to this process: `units`, or `files`, `share` and `done` of a stream."""
    if (units := plan.units()) is not None:
        return {"units": [unit for unit in units if unit not in done.units][rank::world]}
    files = range(plan.data.files or 1)
    open_files = [number for number in files if number not in done.files]
    if len(open_files) >= world:
        return {"units": (), "files": open_files[rank::world], "done": done.units}
    return {"units": (), "files": open_files, "share": (rank, world), "done": done.units}


def _timed(chunks: Iterator[Chunk], progress: EncodeProgress) -> Iterator[Chunk]:
    """The same, with the time spent on waiting for them noted."""
    while True:
        began = time.perf_counter()
        chunk = next(chunks, None)
        progress.waiting_seconds += time.perf_counter() - began
        if chunk is None:
            return
        yield chunk


def require_outside(out: Path, config: SourceConfig) -> None:
    """Refuses a folder whose own index the source would read as data, when it is opened again."""
    inside = Path(config.path).resolve() in out.resolve().parents
    if inside and config.source in ("parquet", "webdataset"):
        raise UserError(f"{out} lies in the data, {config.path}, and would become part of it")


def _workers(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # decoding is little beside encoding there, and the encoder wants the cores
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(2, min(16, (cores or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _preprocessing(resolution: int) -> Preprocessing:
    try:
        return Preprocessing(resolution=resolution)
    except ValidationError as error:
        raise UserError(f"resolution {resolution} is not positive") from error
