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
from latent_ae.scaling import LatentScaling
from latent_diffusion import LatentDiffusionPipeline

__all__ = ["check_autoencoder", "load_autoencoder", "save_pipeline"]


def check_autoencoder(folder: Path, manifest: LatentsManifest) -> None:
    """Refuses any autoencoder but the one that made the latents, scaled as it was then."""
    if not (folder / "config.json").is_file():
        raise UserError(f"the latents' autoencoder is not at {folder}: say where by --autoencoder")
    if weights_sha256(folder) != manifest.autoencoder.weights_sha256:
        raise UserError(
            f"the latents were made by other weights than those in {folder}: name the autoencoder "
            "that made them by --autoencoder, or encode again"
        )
    now = LatentScaling.of(load_autoencoder(folder)).model_dump()
    for name, value in now.items():
        then = getattr(manifest.autoencoder, name)
        if value != then:
            raise UserError(
                f"{name} in {folder / 'config.json'} is {value} but was {then} when the latents "
                "were made: encode again"
            )


def load_autoencoder(folder: Path) -> Any:
    """The autoencoder in a folder; raises `UserError` where diffusers cannot load it."""
    try:
        return AutoModel.from_pretrained(str(folder), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"diffusers cannot load the autoencoder in {folder}: {error}") from error


def save_pipeline(
    trainer: Trainer, manifest: LatentsManifest, autoencoder: Path, output: Path
) -> None:
    """Saves the averaged denoiser with its autoencoder beside `output`, then takes its place."""
    denoiser = trainer.denoiser
    trainer.ema.copy_to(denoiser.parameters())
    names = dict(enumerate(manifest.label_names)) if trainer.classes else {}
    pipe = LatentDiffusionPipeline(
        load_autoencoder(autoencoder),
        denoiser.cpu().eval(),
        build_scheduler(trainer.config),
        names or None,
    )
    output = output.absolute()
    aside, old = (output.with_name(f".{output.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    pipe.save_pretrained(aside)
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
