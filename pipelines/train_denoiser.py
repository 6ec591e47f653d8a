"""Trains the denoiser of a latent diffusion model on a folder of latents.

    latent-ae encode MODEL DATA LATENTS
    accelerate launch pipelines/train_denoiser.py LATENTS OUT --denoiser dit --objective flow

One process or many. OUT becomes a saved `LatentDiffusionPipeline` (autoencoder, averaged denoiser,
scheduler), which stock diffusers loads; checkpoints and `log.jsonl` lie in `OUT-run`, and the same
command goes on where it was stopped. All that is random about a step follows from the seed, the
process and the step, so a resumed run sees what an uninterrupted one would have seen.

From Python: `train("latents", "pipeline", DenoiserConfig(seconds=60))`.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from rich.console import Console
from torch.utils.data import DataLoader

from denoiser_distance import Distance
from denoiser_examples import Examples
from denoiser_folders import build_pipeline, check_autoencoder, check_output, save_pipeline
from denoiser_log import Log
from denoiser_samples import draw_sheet
from denoiser_trainer import Trainer
from denoisers import PANELS, DenoiserConfig
from latent_ae.errors import UserError
from latent_ae.latents import LatentDataset
from latent_ae.processes import from_main
from latent_diffusion import LatentDiffusionPipeline
from training_parts import app_of

__all__ = ["DenoiserConfig", "train"]


def train(
    latents: str | Path,
    output: str | Path,
    config: DenoiserConfig | None = None,
    *,
    autoencoder: str | Path | None = None,
    run: str | Path | None = None,
    console: Console | None = None,
) -> Path:
    """Trains a denoiser, or goes on where it was stopped, and saves the pipeline.

    Args:
        latents: a latents folder.
        output: where the pipeline goes; a pipeline that is there gives way at the end.
        config: what to train; the same config resumes.
        autoencoder: the exported folder that made the latents; left out, the path they name.
        run: where checkpoints and log.jsonl go; left out, `output` with "-run" appended.
        console: where progress is shown; standard error when left out.

    Returns:
        `output`.

    Raises:
        UserError: the latents, the autoencoder, a folder or the config do not fit together, or the
            training diverges.
    """
    config, output = config or DenoiserConfig(), Path(output)
    folder = Path(run) if run else output.with_name(output.name + "-run")
    data = LatentDataset(latents)
    if data.manifest.storage.kind == "indices":
        raise UserError(
            f"{latents} holds codebook indices, which no diffusion of numbers fits: encode again "
            "with --store mode, the latents before the quantizer"
        )
    autoencoder = Path(autoencoder or data.manifest.autoencoder.path)
    vae = check_autoencoder(autoencoder, data.manifest)
    check_output(output, data.manifest, autoencoder)
    trainer = Trainer(config, data, folder)
    accelerator = trainer.accelerator
    pipeline = build_pipeline(trainer, data.manifest, vae.to(accelerator.device).eval())
    distance = Distance(trainer, pipeline, data) if config.distance_every else None
    loader = DataLoader(
        Examples(
            data, config, trainer.classes, (accelerator.process_index, accelerator.num_processes)
        ),
        batch_size=None,
        sampler=range(trainer.step * config.accumulation, config.steps * config.accumulation),
        num_workers=config.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    with Log(trainer, console or Console(stderr=True)) as log:
        batches = iter(loader)
        while (progress := trainer.progress()) < 1:
            log.add(trainer.update(list(islice(batches, config.accumulation)), progress))
            if trainer.step % config.log_every == 0:
                log.write()
            _look(trainer, pipeline, distance, log)
            if trainer.step % config.checkpoint_every == 0:
                trainer.save()
        log.write()
        trainer.require_sound()
        _look(trainer, pipeline, distance, log, last=True)
    trainer.save()
    if accelerator.is_main_process:
        save_pipeline(trainer, pipeline, autoencoder, output)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output


def _look(
    trainer: Trainer,
    pipeline: LatentDiffusionPipeline,
    distance: Distance | None,
    log: Log,
    *,
    last: bool = False,
) -> None:
    """Draws a sheet and measures the distance, if they are due at this step and not yet done."""

    def due(group: str, every: int) -> bool:
        if not every or (trainer.step % every and not last):
            return False
        return not from_main(lambda: (trainer.step, group) in log.done)

    config = trainer.config
    if due("samples", config.sample_every):
        path = trainer.folder / "samples" / f"step-{trainer.step:09d}.png"
        with log.paused(), trainer.averaged():
            if trainer.accelerator.is_main_process:
                draw_sheet(path, pipeline, config, trainer.shape)
            trainer.accelerator.wait_for_everyone()
        log.record("samples", {"sheet": f"samples/{path.name}"}, path)
    if distance is not None and due("distance", config.distance_every):
        with log.paused(), trainer.averaged():
            row = distance.measure()
        log.record("distance", row)
        log.tell(
            f"step {trainer.step} · Fréchet distance {row['frechet_distance'] or 0:.4g} "
            f"({row['features']}, {row['samples']} drawn to {row['pictures']} of the latents)"
        )


app = app_of(
    train,
    DenoiserConfig,
    PANELS,
    "Trains a denoiser on LATENTS and saves a diffusers pipeline to OUTPUT.",
    output="Where the pipeline goes.",
    paths={
        "autoencoder": "Default: the one the latents name.",
        "run": "Checkpoints and log. Default: OUTPUT-run.",
    },
    optional={"seconds": float, "distance_weights": str},
)

if __name__ == "__main__":
    app()
