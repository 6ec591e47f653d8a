"""Held-out pictures while a run trains: metrics and a sheet to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from latent_ae.autoencoder import (
    decode_latents,
    encode_mode,
    full_precision,
    image_channels,
    reconstruct,
    trained_parameters,
)
from latent_ae.channels import has_colours
from latent_ae.config import ValidationConfig
from latent_ae.data import evaluation_batches, normalize, to_uint8
from latent_ae.metrics import ReconstructionMetrics
from latent_ae.network_kinds import Network
from latent_ae.networks import network_like
from latent_ae.pictures import error_map, save_sheet
from latent_ae.processes import from_main
from latent_ae.training.checkpoint import averaged_state
from latent_ae.training.sharding import whole

if TYPE_CHECKING:
    from latent_ae.training.run import Run

__all__ = ["averaged_network", "validate"]

_SHEET_ROWS = 8


@contextmanager
def averaged_network(run: Run) -> Iterator[Network]:
    """The network with the EMA weights in it, for the time of a block.

    A sharded run lends a whole copy, to the main process only.
    """
    network, main = run.network, run.accelerator.is_main_process
    if run.sharded:
        state = network.state_dict()  # frozen weights and buffers too, which are not averaged
        if run.ema is not None:
            state |= averaged_state(network, run.ema)
        state = whole(state, keep=main)  # every process gathers
        if main:
            with torch.device("meta"):  # nothing is drawn: the random state stays
                copy: Any = network_like(network)
            copy.load_state_dict(state, assign=True)
            network = copy.to(run.accelerator.device)
        yield network
        return
    if run.ema is None:
        yield network
        return
    averaged = list(trained_parameters(network).values())
    run.ema.store(averaged)
    run.ema.copy_to(averaged)
    try:
        yield network
    finally:
        run.ema.restore(averaged)


def validate(run: Run) -> dict[str, float]:
    """Reconstructs the held-out pictures from the posterior mode, in fp32; writes a sheet.

    In a distillation the decoder gets the teacher's latents and is held against what it learns
    from.

    The main process measures while the others wait: nothing goes through the wrapped module.

    Returns:
        `psnr` (dB), `ssim`, `lpips` (AlexNet; not of pictures without colours), means over the
        pictures; the same on every process. Of a student also `latents`: their squared distance
        from the teacher's over the variance of those.

    Raises:
        UserError: the source cannot be opened or none of its pictures can be read.
    """
    config = run.config.validation
    assert config is not None, "the run has no validation"
    with averaged_network(run) as network:
        return from_main(lambda: _measure(run, network, config))


@torch.no_grad()
def _measure(run: Run, network: Network, config: ValidationConfig) -> dict[str, float]:
    device = run.accelerator.device
    channels = image_channels(network)
    metrics = ReconstructionMetrics(device, ("alex",) if has_colours(channels) else ())
    batches = evaluation_batches(
        config,
        config.resolution or run.config.data.resolution,
        batch_size=config.batch_size,
        limit=config.images,
        channels=channels,
    )
    kept, misses = [], []
    training = network.training
    network.eval()  # gradient checkpointing has nothing to save here
    with full_precision():
        for batch in batches:
            if not batch.samples:
                continue
            images = batch.images.to(device)
            if run.teacher is None:
                decoded = reconstruct(network, normalize(images))
            else:
                own, _ = encode_mode(network, normalize(images))
                lesson = run.teacher(normalize(images))
                misses.append((own - lesson.latents).square().mean() / lesson.latents.var())
                images = to_uint8(lesson.pictures)
                decoded = decode_latents(network, lesson.latents)
            rounded = metrics.update(images, decoded)
            if sum(len(pair[0]) for pair in kept) < _SHEET_ROWS:
                kept.append((images.cpu(), rounded.cpu()))
    network.train(training)
    images, decoded = (torch.cat(column)[:_SHEET_ROWS] for column in zip(*kept, strict=True))
    columns = {
        "teacher" if run.teacher else "input": images,
        "reconstruction": decoded,
        "error (4x)": error_map(images, decoded),
    }
    save_sheet(run.folder.sheet(run.step), columns)
    taught = {"latents": torch.stack(misses).mean().item()} if misses else {}
    return metrics.compute() | taught
