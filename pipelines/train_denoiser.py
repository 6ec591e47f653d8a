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

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from torch.utils.data import DataLoader

from denoiser_examples import Examples
from denoiser_folders import check_autoencoder, save_pipeline
from denoiser_log import Log
from denoiser_trainer import Trainer
from denoisers import DenoiserConfig
from latent_ae.errors import UserError
from latent_ae.latents import LatentDataset

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
        UserError: the latents, the autoencoder, a folder or the config do not fit together.
    """
    config, output = config or DenoiserConfig(), Path(output)
    folder = Path(run) if run else output.with_name(output.name + "-run")
    data = LatentDataset(latents)
    if data.manifest.storage.kind == "indices":
        raise UserError(f"{latents} holds codebook indices, which no diffusion of numbers fits")
    autoencoder = Path(autoencoder or data.manifest.autoencoder.path)
    check_autoencoder(autoencoder, data.manifest)
    if output.exists() and not (output / "model_index.json").is_file():
        raise UserError(f"{output} is there already and is no pipeline: choose another output")
    trainer = Trainer(config, data, folder)
    accelerator = trainer.accelerator
    loader = DataLoader(
        Examples(
            data, config, trainer.classes, (accelerator.process_index, accelerator.num_processes)
        ),
        batch_size=None,
        sampler=range(trainer.step, config.steps),
        num_workers=config.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    with Log(trainer, console or Console(stderr=True)) as log:
        for batch in loader:
            progress = trainer.progress()
            if progress >= 1:
                break
            log.add(trainer.update(batch, progress))
            if trainer.step % config.log_every == 0:
                log.write()
            if trainer.step % config.checkpoint_every == 0:
                trainer.save()
        log.write()
    trainer.save()
    if accelerator.is_main_process:
        save_pipeline(trainer, data.manifest, autoencoder, output)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output


def _command() -> Callable[..., None]:
    """The script's command; its options are the keys of `DenoiserConfig`."""

    def command(
        latents: Path, output: Path, autoencoder: Path | None, run: Path | None, **options: Any
    ) -> None:
        try:
            train(latents, output, DenoiserConfig(**options), autoencoder=autoencoder, run=run)
        except (UserError, ValidationError) as error:
            if os.environ.get("RANK", "0") == "0":
                typer.echo(f"error: {_sentence(error)}", err=True)
            raise typer.Exit(2) from None

    def parameter(name: str, kind: type, info: Any, default: Any) -> inspect.Parameter:
        annotation = Annotated[kind, info]
        by_name = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, by_name, default=default, annotation=annotation)

    where, empty = typer.Option, inspect.Parameter.empty
    parameters = [
        parameter("latents", Path, typer.Argument(help="A latents folder."), empty),
        parameter("output", Path, typer.Argument(help="Where the pipeline goes."), empty),
        parameter("autoencoder", Path, where(help="Default: the one the latents name."), None),
        parameter("run", Path, where(help="Checkpoints and log. Default: OUTPUT-run."), None),
    ]
    for name, field in DenoiserConfig.model_fields.items():
        is_list = isinstance(field.default, tuple)
        default = ",".join(map(str, field.default)) if is_list else field.default
        kind: Any = str if is_list else float if name == "seconds" else field.annotation
        parameters.append(parameter(name, kind, where(help=field.description), default))
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore
    command.__doc__ = "Trains a denoiser on LATENTS and saves a diffusers pipeline to OUTPUT."
    return command


def _sentence(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(
        f"--{str(item['loc'][0]).replace('_', '-')}: {item['msg']}, not {item['input']!r}"
        for item in error.errors()
    )


app = typer.Typer(add_completion=False)
app.command()(_command())

if __name__ == "__main__":
    app()
