"""The folders around a denoiser's training: the latents' autoencoder, and the saved pipeline."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from diffusers import AutoModel

from denoiser_trainer import Trainer
from denoisers import build_scheduler
from latent_ae.errors import UserError
from latent_ae.latents import LatentsManifest, weights_sha256
from latent_ae.lineage import readable_latents
from latent_ae.network_folders import folder_config
from latent_ae.quantized import QuantizedAutoencoder
from latent_ae.scaling import LatentScaling
from latent_diffusion import LatentDiffusionPipeline
from training_parts import check_parent

__all__ = ["build_pipeline", "check_autoencoder", "check_output", "save_pipeline"]


def check_autoencoder(folder: Path, manifest: LatentsManifest) -> Any:
    """The autoencoder that made the latents, loaded.

    Raises:
        UserError: the folder's has other weights, or another scale than when it made them.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"the latents' autoencoder is not at {folder}: say where by --autoencoder")
    if manifest.autoencoder.weights_sha256 not in readable_latents(folder):
        raise UserError(
            f"the latents were made by other weights than those in {folder}: name the autoencoder "
            "that made them by --autoencoder, or encode again"
        )
    autoencoder = _load(folder)
    now = LatentScaling.of(autoencoder).model_dump()
    for name, value in now.items():
        then = getattr(manifest.autoencoder, name)
        if value != then:
            raise UserError(
                f"{name} in {folder / 'config.json'} is {value} but was {then} when the latents "
                "were made: encode again"
            )
    return autoencoder


def check_output(output: Path, manifest: LatentsManifest, autoencoder: Path) -> None:
    """Raises `UserError` unless it can be written, over a pipeline of the latents' autoencoder.

    Args:
        output: the pipeline's folder.
        manifest: of the latents.
        autoencoder: that of the pipeline, perhaps with a decoder of its own.
    """
    check_parent(output)
    if not output.exists():
        return
    if not (output / "model_index.json").is_file():
        raise UserError(f"{output} is there already and is no pipeline: choose another output")
    try:
        weights = weights_sha256(output / "vae")
    except (OSError, ValueError, KeyError, UserError) as error:
        raise UserError(
            f"the weights of the autoencoder in {output / 'vae'} cannot be read, so it is unclear "
            "whose pipeline that is: choose another output, or remove it"
        ) from error
    if weights not in (manifest.autoencoder.weights_sha256, weights_sha256(autoencoder)):
        raise UserError(
            f"{output} holds a pipeline with another autoencoder than the latents': choose another "
            "output, or remove it"
        )


def _load(folder: Path) -> Any:
    # Our own class, where the folder has code of its own: the same, and nothing foreign runs.
    own = folder_config(folder)["_class_name"] == QuantizedAutoencoder.__name__
    kind: Any = QuantizedAutoencoder if own else AutoModel
    try:
        return kind.from_pretrained(str(folder), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"diffusers cannot load the autoencoder in {folder}: {error}") from error


def build_pipeline(
    trainer: Trainer, manifest: LatentsManifest, autoencoder: Any
) -> LatentDiffusionPipeline:
    """The pipeline of the denoiser as it is now, the latents' autoencoder and their labels."""
    names = dict(enumerate(manifest.label_names)) if trainer.classes else {}
    scheduler = build_scheduler(trainer.config)
    pipeline = LatentDiffusionPipeline(autoencoder, trainer.denoiser, scheduler, names or None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(
    trainer: Trainer, pipeline: LatentDiffusionPipeline, autoencoder: Path, output: Path
) -> None:
    """Saves the pipeline with the averaged denoiser beside `output`, then takes its place.

    Args:
        trainer: whose denoiser the pipeline has.
        pipeline: what `build_pipeline` made.
        autoencoder: the folder of the latents' autoencoder.
        output: where to; what is there gives way.
    """
    trainer.ema.copy_to(trainer.denoiser.parameters())
    trainer.denoiser.cpu().eval()
    output = output.absolute()
    aside, old = (output.with_name(f".{output.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    pipeline.save_pretrained(aside)
    # Byte for byte the weights that the latents name, however an older diffusers wrote them.
    weights = "diffusion_pytorch_model*"
    for file in (aside / "vae").glob(weights):
        file.unlink()
    for file in autoencoder.glob(weights):
        shutil.copyfile(file, aside / "vae" / file.name)
    if output.exists():
        output.rename(old)
    aside.rename(output)
    shutil.rmtree(old, ignore_errors=True)
