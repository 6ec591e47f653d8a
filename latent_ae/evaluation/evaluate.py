"""Reconstruction quality of any autoencoder that diffusers can load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from latent_ae.autoencoder import (
    default_device,
    downsampling,
    full_precision,
    load_network,
    reconstruct,
    require_divisible,
    weights_sha256,
)
from latent_ae.config import SMALLEST_MEASURED, SourceConfig
from latent_ae.data import Skipped, evaluation_batches, normalize, source_of
from latent_ae.errors import UserError
from latent_ae.evaluation.baseline import lanczos_reduction
from latent_ae.metrics import ReconstructionMetrics

__all__ = ["Evaluation", "evaluate"]


@dataclass
class Evaluation:
    """The metrics of an autoencoder on a data set, and exactly how they were taken.

    Attributes:
        metrics: means of `psnr` (dB), `ssim`, `lpips`.
        lanczos: the same for the picture reduced by Lanczos to as many numbers as its latents have.
        protocol: everything that another measurement must share to be comparable.
        skipped: pictures that could not be read.
    """

    metrics: dict[str, float]
    lanczos: dict[str, float]
    protocol: dict[str, Any]
    skipped: list[Skipped]

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {
            "metrics": self.metrics,
            "lanczos": self.lanczos,
            "protocol": self.protocol,
            "skipped": [vars(skip) for skip in self.skipped],
        }


@torch.no_grad()
def evaluate(
    model: str | Path,
    data: str | Path | SourceConfig,
    *,
    resolution: int = 256,
    limit: int | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Reconstructs pictures from the posterior mode in fp32 and measures the difference.

    Args:
        model: an exported folder, or any `AutoencoderKL` folder.
        data: a source, or a path whose kind is guessed.
        resolution: shorter side after the Lanczos resize, and side of the centre crop, in pixels.
        limit: take only the first pictures.
        batch_size: pictures a pass.
        device: CUDA where there is one, when left out.

    Raises:
        UserError: no such model or data, or a resolution that the network cannot take.
    """
    device = torch.device(device or default_device())
    network = load_network(model).to(device).eval()  # pyright: ignore
    require_divisible(resolution, network)
    if resolution < SMALLEST_MEASURED:
        raise UserError(
            f"resolution {resolution} is too small to measure; the least is {SMALLEST_MEASURED}"
        )
    digest = weights_sha256(model)
    values = _latent_values(network, resolution)
    source = data if isinstance(data, SourceConfig) else source_of(data)
    metrics, lanczos = ReconstructionMetrics(device), ReconstructionMetrics(device)
    skipped: list[Skipped] = []
    for batch in evaluation_batches(source, resolution, batch_size=batch_size, limit=limit):
        skipped += batch.skipped
        if not batch.samples:
            continue
        images = batch.images.to(device)
        with full_precision():
            metrics.update(images, reconstruct(network, normalize(images)))
        lanczos.update(images, lanczos_reduction(batch.images, values).to(device))
    protocol = {
        "data": source.path,
        "images": len(metrics.per_image["psnr"]),
        "preprocessing": f"shorter side to {resolution} by Lanczos, centre crop",
        "resolution": resolution,
        "code": "posterior mode",
        "precision": "fp32",
        "output": "clamped, rounded to 8 bits; PSNR of a picture at most 58.9 dB",
        "lpips": "v0.1, alex",
        "model": str(model),
        "weights_sha256": digest,
        "values_per_image": values,
    }
    return Evaluation(metrics.compute(), lanczos.compute(), protocol, skipped)


def _latent_values(network: AutoencoderKL, resolution: int) -> int:
    side = resolution // downsampling(network)
    return network.config["latent_channels"] * side * side
