"""Held-out pictures while a run trains: metrics and a sheet to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from latent_ae.autoencoder import full_precision, reconstruct
from latent_ae.config import ValidationConfig
from latent_ae.data import evaluation_batches, normalize
from latent_ae.metrics import ReconstructionMetrics
from latent_ae.pictures import error_map, save_sheet

if TYPE_CHECKING:
    from latent_ae.training.run import Run

__all__ = ["averaged_weights", "validate"]

_SHEET_ROWS = 8


@contextmanager
def averaged_weights(run: Run) -> Iterator[None]:
    """Puts the EMA weights into the network for the time of a block."""
    if run.ema is None:
        yield
        return
    run.ema.store(run.network.parameters())
    run.ema.copy_to(run.network.parameters())
    try:
        yield
    finally:
        run.ema.restore(run.network.parameters())


@torch.no_grad()
def validate(run: Run, config: ValidationConfig) -> dict[str, float]:
    """Reconstructs the held-out pictures from the posterior mode, in fp32; writes a sheet.

    Runs on one process: nothing here goes through the wrapped module.

    Returns:
        `psnr` (dB), `ssim`, `lpips` (AlexNet), means over the pictures.

    Raises:
        UserError: the source cannot be opened or none of its pictures can be read.
    """
    device = run.accelerator.device
    metrics = ReconstructionMetrics(device)
    batches = evaluation_batches(
        config,
        config.resolution or run.config.data.resolution,
        batch_size=config.batch_size,
        limit=config.images,
    )
    kept = []
    with averaged_weights(run), full_precision():
        for batch in batches:
            if not batch.samples:
                continue
            images = batch.images.to(device)
            rounded = metrics.update(images, reconstruct(run.network, normalize(images)))
            if sum(len(pair[0]) for pair in kept) < _SHEET_ROWS:
                kept.append((images.cpu(), rounded.cpu()))
    images, decoded = (torch.cat(column)[:_SHEET_ROWS] for column in zip(*kept, strict=True))
    columns = {
        "input": images,
        "reconstruction": decoded,
        "error (4x)": error_map(images, decoded),
    }
    save_sheet(run.folder.sheet(run.step), columns)
    return metrics.compute()
