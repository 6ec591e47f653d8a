"""Measures any autoencoder that diffusers can load, by a named protocol."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from latent_ae.autoencoder import full_precision
from latent_ae.channels import bands_shown, has_colours
from latent_ae.config import Protocol, SourceConfig
from latent_ae.config_file import load_protocol
from latent_ae.data import CenterCrop, evaluation_batches, open_source, source_of
from latent_ae.errors import UserError
from latent_ae.evaluation.frechet import FEATURE_NETWORKS, FrechetDistance
from latent_ae.evaluation.look import look_closer, note_effects
from latent_ae.evaluation.measurement import MODEL, REFERENCES, Gathered, Measurement
from latent_ae.evaluation.result import (
    Evaluation,
    intervals_of,
    means_of,
    per_image_table,
    pixels_digest,
    reference_rows,
    what_is_asked,
)
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.metrics import ReconstructionMetrics
from latent_ae.processes import place

__all__ = ["evaluate"]


def evaluate(
    model: str | Path,
    data: str | Path | SourceConfig,
    protocol: str | Protocol = "photos256",
    *,
    out: str | Path | None = None,
    name: str | None = None,
    quick: bool = False,
    references: Sequence[str] = REFERENCES,
    batch_size: int = 8,
    workers: int = 0,
    probes: int = 8,
    pictures: int = 8,
    feature_network: nn.Module | None = None,
    frechet_weights: str | None = None,
    lpips_weights: str | None = None,
    device: torch.device | str | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Reconstructs pictures and measures the difference, the latent space, and low precision.

    Under a launcher the processes share the pictures in whole batches, and all return the same
    numbers as one process would; what needs more passes is the main process's alone.

    Args:
        model: an exported folder, or any image autoencoder of diffusers'.
        data: a source, or a path whose kind is guessed.
        protocol: a name in `PROTOCOLS`, or a `Protocol`.
        out: a folder for evaluation.json, per_image.parquet and pictures; nothing is written when
            left out.
        name: a short title; the model's folder when left out.
        quick: leave out the latent space, the probes and low precision.
        references: which of `Lanczos`, `JPEG`, `WebP` to measure beside it.
        batch_size: pictures a pass; 1 where the protocol leaves them at their own size.
        workers: loader processes.
        probes: pictures that the probes look at.
        pictures: how many of the first, and how many of the worst, are kept in `out`.
        feature_network: of the Fréchet distance, in place of the protocol's: uint8 pictures of
            shape (B, 3, H, W) to features of shape (B, `num_features`).
        frechet_weights: a file of the feature network's weights.
        lpips_weights: a safetensors file of VGG16's weights.
        device: CUDA where there is one, when left out.
        console: where progress is shown; nothing is, when left out.

    Raises:
        UserError: no such model, data or protocol, `out` holds something else, weights that cannot
            be had, no picture that can be read, or none whose reconstruction is finite.
    """
    began = time.perf_counter()
    rank, world, device = place(device)
    protocol = protocol if isinstance(protocol, Protocol) else load_protocol(protocol)
    folder = None if out is None else _writable(Path(out))
    data = data if isinstance(data, SourceConfig) else source_of(data)
    frozen = FrozenAutoencoder(model, device, protocol.precision)
    source, channels = open_source(data, frozen.image_channels), frozen.image_channels
    frechet = _frechet(protocol, feature_network, frechet_weights, device, channels)
    lpips = protocol.lpips if has_colours(channels) else ()
    measurement = Measurement(
        frozen,
        protocol,
        ReconstructionMetrics(device, lpips, ms_ssim=True, lpips_path=lpips_weights),
        frechet,
        references=[n for n in references if n == "Lanczos" or channels == 3],
        latents=not quick,
        gallery=(max(pictures, probes), pictures) if folder else (probes, 0),
    )
    size = batch_size if protocol.resolution else 1
    options = {"batch_size": size, "workers": workers, "rank": rank, "world": world}
    batches = evaluation_batches(source, _crop(protocol, frozen), limit=protocol.images, **options)
    with full_precision():
        for batch in _tracked(batches, source, protocol, size * world, rank, console):
            measurement.update(batch)
        gathered, frechet = _together(measurement, frechet, world)
        _require_some(gathered, frozen)
        asked = what_is_asked(data, quick, references, frechet_weights, lpips_weights)
        result = _result(frozen, protocol, gathered, frechet, name or Path(model).absolute().name)
        result.content |= {"asked": asked, "processes": world}
        result.content["data"] |= {"path": data.path, "note": _channels_in_words(channels)}
        if folder and rank == 0:
            result.save(folder)  # what follows may fail, such as for memory
        if rank == 0:
            few = {"probes": 0 if quick else probes, "pictures": pictures}
            _look(result, frozen, gathered, folder, **few)
    seconds = time.perf_counter() - began
    result.content["seconds"] = {"all": seconds, "model": gathered.model_seconds}
    if folder and rank == 0:
        result.save(folder)
    return result


def _look(
    result: Evaluation,
    frozen: FrozenAutoencoder,
    gathered: Gathered,
    folder: Path | None,
    **counts: int,
) -> None:
    """Adds to a result what needs more passes."""
    closer = look_closer(frozen, result.protocol, gathered, folder, **counts)
    if effects := closer.pop("channel_effects", None):
        note_effects(result.content["latents"], effects)
    result.content |= closer


def _crop(protocol: Protocol, frozen: FrozenAutoencoder) -> CenterCrop:
    multiple = frozen.downsampling if protocol.fit == "crop" else 1
    return CenterCrop(protocol.resolution, protocol.resize, multiple)


def _writable(folder: Path) -> Path:
    """The folder, made now: what cannot be written is better known before the work."""
    if (folder / "evaluation.json").exists():
        raise UserError(f"{folder} holds a result already; remove it or choose another folder")
    strangers = [
        item.name
        for item in (folder.iterdir() if folder.is_dir() else [])
        if item.name not in (".per_image.tmp", "per_image.parquet", "pictures")
    ]
    if strangers:
        raise UserError(f"{folder} holds other files ({strangers[0]}); choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written")
    return folder


def _frechet(
    protocol: Protocol,
    network: nn.Module | None,
    weights: str | None,
    device: torch.device,
    channels: int,
) -> FrechetDistance | None:
    if network is None and (protocol.frechet is None or not has_colours(channels)):
        return None
    if network is not None:
        return FrechetDistance(network, device, type(network).__name__)
    name = str(protocol.frechet)
    return FrechetDistance(FEATURE_NETWORKS[name](weights), device, name)


def _channels_in_words(channels: int) -> str | None:
    """How pictures that are not RGB are measured and shown, and what is left out."""
    if channels == 3:
        return None
    seen = {1: "see grey as RGB", 4: "see RGBA over white"}.get(channels)
    told = "LPIPS, the Fréchet distance, JPEG and WebP are left out"
    if seen is not None:
        told = f"LPIPS and the Fréchet distance {seen}; JPEG and WebP are left out"
    elif shown := bands_shown(channels):
        told += f"; pictures show{shown}"
    return f"pictures of {channels} channel{'s' * (channels > 1)}: {told}"


def _tracked(
    batches: Any,
    source: Any,
    protocol: Protocol,
    rows_a_step: int,
    rank: int,
    console: Console | None,
) -> Any:
    if console is None or rank != 0:
        return batches
    rows = len(source.rows) if hasattr(source.rows, "__len__") else protocol.images
    total = None if rows is None else -(-min(rows, protocol.images or rows) // rows_a_step)
    return track(batches, "evaluate", total=total, console=console, transient=True)


def _together(
    measurement: Measurement, frechet: FrechetDistance | None, world: int
) -> tuple[Gathered, FrechetDistance | None]:
    """What all processes have measured, the same on each."""
    own = measurement.finish()
    if world == 1:
        return own, frechet
    from accelerate.utils import gather_object

    first, *others = gather_object([own])  # all processes' shares, in the order of their ranks
    if frechet is not None:
        frechet = FrechetDistance(frechet.network, frechet.device, frechet.name)
        for share in (first, *others):
            frechet.merge(share.frechet)
    for other in others:
        first.merge(other)
    return first, frechet


def _require_some(gathered: Gathered, frozen: FrozenAutoencoder) -> None:
    if not gathered.rows:
        last = gathered.skipped[-1] if gathered.skipped else None
        reason = f"; the last, {last.key}: {last.reason}" if last else ""
        raise UserError(f"no picture of the data set can be read{reason}")
    if not any(row["finite"] for row in gathered.rows):
        raise UserError(
            f"the reconstruction of every picture by {frozen.path} in {frozen.precision} holds NaN "
            f"or infinity, beginning with {gathered.rows[0]['key']}; try precision=fp32"
        )


def _result(
    frozen: FrozenAutoencoder,
    protocol: Protocol,
    gathered: Gathered,
    frechet: FrechetDistance | None,
    name: str,
) -> Evaluation:
    good = [row for row in gathered.rows if row["finite"]]
    rows = reference_rows(gathered, protocol.seed)
    distance = None
    if frechet is not None:
        found = frechet.compute(MODEL)
        distance = {"network": frechet.name, **vars(found)}
        for row in rows:
            row["frechet"] = frechet.compute(row["name"]).distance
    mean_of = {name: sum(row[name] for row in good) / len(good) for name in ("values", "bits")}
    content = {
        "format": 1,
        "name": name,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            package: version(package)
            for package in ("latent_ae", "torch", "diffusers", "torchmetrics", "lpips")
        },
        "machine": _machine(frozen.device),
        "protocol": protocol.model_dump(mode="json"),
        "data": {
            "images": len(gathered.rows),
            "pixels_sha256": pixels_digest(gathered.rows),
            "skipped": [vars(skip) for skip in gathered.skipped],
            "not_finite": [row["key"] for row in gathered.rows if not row["finite"]],
        },
        "model": {
            **frozen.describe(),
            "values_per_image": mean_of["values"],
            "bits_per_image": mean_of["bits"],
        },
        "metrics": means_of(good),
        "intervals": intervals_of(good, protocol.seed),
        "frechet": distance,
        "references": rows,
        "latents": gathered.latents.summary(frozen.scaling) if gathered.latents else None,
        "codes": gathered.codes.summary() if gathered.codes else None,
        "probes": None,
        "precision": None,
        "pictures": {},
    }
    return Evaluation(name, protocol, content, per_image_table(gathered.rows))


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores {platform.machine()}"
