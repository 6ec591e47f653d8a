"""From a training run to a folder that any diffusers pipeline loads."""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from latent_ae.autoencoder import (
    default_device,
    downsampling,
    encode_moments,
    reconstruct,
    weights_sha256,
)
from latent_ae.bottlenecks import LOGVAR_RANGE, split_moments
from latent_ae.config import Config, DataConfig
from latent_ae.config_file import plain
from latent_ae.data import TrainingStream, normalize, source_of
from latent_ae.errors import UserError
from latent_ae.precision import measure_precision
from latent_ae.run_folder import RunFolder
from latent_ae.scaling import LatentScaling, LatentStatistics

__all__ = ["IGNORED_BY", "export_run", "measure_latents"]

# Read from diffusers 0.42's sources (a test reads them again): stock pipelines that scale by
# `scaling_factor` alone, by which statistic they leave out.
IGNORED_BY = {
    "shift_factor": (
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "DiTPipeline",
        "PixArtAlphaPipeline",
    ),
    "latents_mean": (
        "StableDiffusionPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "DiTPipeline",
        "PixArtAlphaPipeline",
    ),
}


STATISTICS = ("scale", "shift", "channels")
PRECISION_IMAGES = 4  # crops that are run in fp16 and bf16 too


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    checkpoint: str = "last",
    statistics: str = "scale",
    images: int = 256,
    data: str | Path | None = None,
    license_name: str = "unknown",
) -> Path:
    """Writes a run's weights, averaged where there is an EMA, as a diffusers folder.

    The scale is measured on training crops, and on a few of them whether fp16 is safe
    (`force_upcast`, with the evidence in `latent_ae.json`). The folder is written aside, loaded
    again by stock diffusers and compared, then renamed into place. A run with an adversary leaves
    its `discriminator.safetensors` there too, for `adversary.path` of whoever fine-tunes; diffusers
    does not look at it.

    Args:
        run: a training run's folder.
        out: the folder to make; must not exist yet.
        checkpoint: `last`, `best` (of those kept, by `training.best_by`) or a step's number.
        statistics: `scale` writes `scaling_factor` alone, which every stock pipeline uses; `shift`
            adds `shift_factor`; `channels` adds `latents_mean` and `latents_std`.
        images: training crops to measure on.
        data: pictures to measure on, if not those of the run's config.
        license_name: for the model card.

    Returns:
        `out`.

    Raises:
        UserError: `run` has no such checkpoint, `out` exists, or the data cannot be read.
    """
    if statistics not in STATISTICS:
        raise UserError(f"statistics {statistics!r} is unknown; valid: {', '.join(STATISTICS)}")
    folder, out = RunFolder(run), Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; remove it or choose another folder")
    network, progress = folder.trained_network(checkpoint)
    config = folder.config()
    network = network.to(default_device()).eval()  # pyright: ignore
    if config.bottleneck.weight == 0:
        _silence_posterior(network)
    measured, sample = measure_latents(network, _measuring_data(config, data), images)
    network.register_to_config(**_scaling(measured, statistics).model_dump())
    evidence = measure_precision(network, sample[:PRECISION_IMAGES])
    network.register_to_config(force_upcast=evidence.force_upcast)
    if config.network.path is None:  # the side of diffusers' tiles; ours has no other meaning
        network.register_to_config(sample_size=max(256, config.data.resolution))
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        network.save_pretrained(aside)
        _forget_origin(aside / "config.json")
        _require_same(network, aside, sample)
        record = _record(config, folder, progress, measured, aside)
        record["precision"] = evidence.to_json()
        judge = folder.checkpoint(progress["step"]) / "discriminator.safetensors"
        if judge.is_file():
            shutil.copyfile(judge, aside / judge.name)
        (aside / "latent_ae.json").write_text(json.dumps(record, indent=2) + "\n")
        (aside / "README.md").write_text(_model_card(network, record, license_name))
        if out.exists():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


@torch.no_grad()
def measure_latents(
    network: AutoencoderKL, data: DataConfig, images: int
) -> tuple[LatentStatistics, Tensor]:
    """Encodes training crops and gathers the moments of their latents.

    Returns:
        The statistics, and one batch of the crops, of shape (B, 3, H, W), in [-1, 1].
    """
    batch = min(data.batch_size, images)
    stream = TrainingStream(data.model_copy(update={"workers": 0, "batch_size": batch}))
    measured, sample = LatentStatistics(), torch.empty(0)
    while measured.images < images:
        sample = normalize(next(stream).images.to(network.device))
        measured.update(*split_moments(encode_moments(network, sample)))
    return measured, sample


def _forget_origin(file: Path) -> None:
    """Takes out the path of the checkpoint, which means nothing on another machine."""
    content = json.loads(file.read_text())
    content.pop("_name_or_path", None)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def _silence_posterior(network: AutoencoderKL) -> None:
    """Makes the posterior of a plain autoencoder as narrow as there is: its code is the mean.

    Training left the log-variance's channels as they began; whoever samples would add noise that
    the decoder has never seen.
    """
    last, channels = network.quant_conv, network.config["latent_channels"]
    if last is None:
        last = network.encoder.conv_out
    last.weight[channels:] = 0
    last.bias[channels:] = LOGVAR_RANGE[0]  # pyright: ignore[reportOptionalSubscript]


def _measuring_data(config: Config, data: str | Path | None) -> DataConfig:
    if data is None:
        return config.data
    source = source_of(data).model_dump()
    return config.data.model_copy(update=source)


def _scaling(measured: LatentStatistics, statistics: str) -> LatentScaling:
    factor = 1 / measured.std
    if statistics == "scale":
        return LatentScaling(scaling_factor=factor)
    if statistics == "shift":
        return LatentScaling(scaling_factor=factor, shift_factor=measured.mean)
    # Pipelines with channel statistics compute (z − mean) · factor / std: with std · factor in
    # the file they get unit variance, and those that know the factor alone still do nearly.
    std = [value * factor for value in measured.channel_std]
    return LatentScaling(scaling_factor=factor, latents_mean=measured.channel_mean, latents_std=std)


@torch.no_grad()
def _require_same(network: AutoencoderKL, folder: Path, images: Tensor) -> None:
    """Compares with what stock diffusers makes of the folder; a difference is a bug, not input."""
    loaded: Any = AutoencoderKL.from_pretrained(folder, local_files_only=True)
    loaded = loaded.to(network.device).eval()
    results = [reconstruct(model, images) for model in (network, loaded)]
    difference = (results[0] - results[1]).abs().max().item()
    if difference > 1e-4:  # fp32 rounding under another memory layout stays below
        raise RuntimeError(f"the exported folder reconstructs differently, by up to {difference}")


def _record(
    config: Config,
    folder: RunFolder,
    progress: dict[str, Any],
    measured: LatentStatistics,
    out: Path,
) -> dict[str, Any]:
    packages = ("latent_ae", "torch", "diffusers", "accelerate", "lpips")
    return {
        "format": 1,
        "config": plain(config),
        "trained": {"steps": progress["step"], "images": progress["images"]},
        "latents": measured.summary(),
        "metrics": folder.last_validation(progress["step"]) if config.validation else None,
        "metric_protocol": _protocol(config),
        "weights_sha256": weights_sha256(out),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in packages}},
    }


def _protocol(config: Config) -> str | None:
    held_out = config.validation
    if held_out is None:
        return None
    size = held_out.resolution or config.data.resolution
    return (
        f"the first {held_out.images} pictures of {held_out.path}, shorter side to {size} by "
        "Lanczos, centre crop, posterior mode, fp32, rounded to 8 bits, LPIPS v0.1 alex"
    )


def _model_card(network: AutoencoderKL, record: dict[str, Any], license_name: str) -> str:
    config, latents, factor = record["config"], record["latents"], downsampling(network)
    data = config["data"]
    channels = network.config["latent_channels"]
    metrics = dict(record["metrics"] or {})
    taken = metrics.pop("step", None)
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    protocol = f"Protocol: {record['metric_protocol']}; taken at step {taken}."
    table = f"\n| metric | value |\n|-|-|\n{rows}\n\n{protocol}\n"
    return f"""---
library_name: diffusers
license: {license_name}
tags: [autoencoder, vae, latent-diffusion, latent_ae]
---

# An autoencoder for latent diffusion

A KL-VAE (`diffusers.AutoencoderKL`), f{factor} with {channels} channels: an image of 3 × H × W
becomes latents of {channels} × H/{factor} × W/{factor}. Trained with latent_ae.

```python
from diffusers import AutoencoderKL
vae = AutoencoderKL.from_pretrained("path/to/this/folder")
```

| | |
|-|-|
| data | {data["path"]} ({data["source"]}), {data["resolution"]}² crops |
| training | {record["trained"]["steps"]} steps, {record["trained"]["images"]} images |
| objective | {_objective_in_words(config)} |
| scaling_factor | {network.config["scaling_factor"]:.5f}, measured on {latents["images"]} crops |
| KL | {latents["kl_nats_per_image"]:.0f} nats an image |
| force_upcast | {str(network.config["force_upcast"]).lower()}: {record["precision"]["reason"]} |

## Metrics on held-out pictures
{table if metrics else "None were taken while it trained."}
## Licence
{license_name}. The resolved config and all statistics are in `latent_ae.json`.
"""


def _objective_in_words(config: dict[str, Any]) -> str:
    losses, text = config["losses"], config["losses"]["pixel"].upper()
    if "perceptual" in losses:
        text += f" + {losses['perceptual']['weight']:g} LPIPS-{losses['perceptual']['net']}"
    text += f" + {config['bottleneck']['weight']:g} KL"
    if adversary := config.get("adversary"):
        text += f" + {adversary['weight']:g} PatchGAN ({adversary['loss']}"
        text += f", from step {adversary['start']})"
    return text
