"""From a training run to a folder that any diffusers pipeline loads."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from latent_ae.autoencoder import default_device, image_channels, weights_sha256
from latent_ae.config import Config
from latent_ae.config_file import plain
from latent_ae.export.card import model_card, protocol_of
from latent_ae.export.folding import fold_statistics
from latent_ae.export.lengths import settle_lengths
from latent_ae.export.statistics import (
    chosen_statistics,
    known_numbers,
    measure_latents,
    measuring_data,
    scaling_of,
    silence_posterior,
)
from latent_ae.export.weights import parse_options, save_weights
from latent_ae.folders import require_free, whole_folder
from latent_ae.lineage import latents_of
from latent_ae.network_kinds import Network, spec_of
from latent_ae.precision import PrecisionEvidence, measure_precision
from latent_ae.run_folder import RunFolder
from latent_ae.scaling import LatentScaling, LatentStatistics

__all__ = ["export_run"]

PRECISION_IMAGES = 4  # crops that are run in fp16 and bf16 too


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    checkpoint: str = "last",
    statistics: str | None = None,
    images: int = 256,
    data: str | Path | None = None,
    variants: Sequence[str] = (),
    max_shard_size: str = "10GB",
    license_name: str = "unknown",
) -> Path:
    """Writes a run's weights, averaged where there is an EMA, as a diffusers folder.

    The scale is measured on training crops, and on a few of them whether fp16 is safe
    (`force_upcast`, with the evidence in `latent_ae.json`). A distilled network's latents have
    their teacher's final scale, so its `scaling_factor` is 1. The folder is written aside, loaded
    again by stock diffusers and compared, then renamed into place. A run with an adversary leaves
    its `discriminator.safetensors` there too, for `adversary.path` of whoever fine-tunes; diffusers
    does not look at it.

    Args:
        run: a training run's folder.
        out: the folder to make; must not exist yet.
        checkpoint: `last`, `best` (of those kept, by `training.best_by`) or a step's number.
        statistics: `scale` writes `scaling_factor` alone, which every stock pipeline uses; `shift`
            adds `shift_factor`; `channels` adds `latents_mean` and `latents_std`; `folded` puts
            those of the channels into the weights, which every stock pipeline reads rightly; `kept`
            leaves those of the network that was fine-tuned. Left out: `kept` where the encoder was
            frozen, else `scale`.
        images: training crops to measure on.
        data: pictures to measure on, if not those of the run's config.
        variants: of the weights, beside fp32: `fp16`, `bf16`.
        max_shard_size: weights larger than this, such as "2GB", are split into several files.
        license_name: for the model card.

    Returns:
        `out`.

    Raises:
        UserError: `run` has no such checkpoint, `out` exists, the data cannot be read, or the
            network's class has no place for such statistics.
    """
    parse_options(variants, max_shard_size)
    folder, out = RunFolder(run), Path(out).absolute()
    require_free(out)
    network, progress = folder.trained_network(checkpoint)
    config = folder.config()
    frozen = config.network.freeze == "encoder"
    statistics = chosen_statistics(config, spec_of(network), statistics)
    network = network.to(default_device()).eval()  # pyright: ignore
    if isinstance(network, AutoencoderKL) and config.bottleneck.weight == 0 and not frozen:
        silence_posterior(network)
    crops = measuring_data(config, data)
    measured, sample = measure_latents(network, crops, images)
    if statistics != "kept" and settle_lengths(network, sample):
        measured, sample = measure_latents(network, crops, images)
    folded = None
    if statistics == "folded" and isinstance(network, AutoencoderKL):
        folded = {"mean": measured.channel_mean, "std": measured.channel_std}
        fold_statistics(network, **folded)
        measured, sample = measure_latents(network, crops, images)
    evidence = measure_precision(network, sample[:PRECISION_IMAGES])
    _describe_in_config(network, config, measured, statistics, evidence)
    with whole_folder(out) as aside:
        save_weights(network, aside, sample, variants, max_shard_size)
        record = _record(config, folder, progress, measured, aside, image_channels(network))
        record |= {
            "statistics": statistics,
            "teacher": _teacher(config),
            "folded": folded,
            "precision": evidence.to_json(),
            "license": license_name,
        }
        if frozen:
            record["latents_of"] = latents_of(network, str(config.network.path))
        judge = folder.checkpoint(progress["step"]) / "discriminator.safetensors"
        if judge.is_file():
            shutil.copyfile(judge, aside / judge.name)
        (aside / "latent_ae.json").write_text(json.dumps(record, indent=2) + "\n")
        settings = json.loads((aside / "config.json").read_text())
        card = model_card(settings, record, license_name, variants=variants)
        (aside / "README.md").write_text(card, encoding="utf-8")
    return out


def _describe_in_config(
    network: Network,
    config: Config,
    measured: LatentStatistics,
    statistics: str,
    evidence: PrecisionEvidence,
) -> None:
    """Writes into diffusers' config what pipelines read there: scale, precision, size of tiles."""
    if statistics != "kept":
        scaling = LatentScaling() if config.distillation else scaling_of(measured, statistics)
        network.register_to_config(**known_numbers(network, scaling))
    if spec_of(network).upcasts:
        # A frozen encoder that needed it before may need it for other pictures than these few.
        before = config.network.freeze == "encoder" and bool(network.config["force_upcast"])
        network.register_to_config(force_upcast=before or evidence.force_upcast)
    if config.network.path is None and "sample_size" in network.config:
        # The side of diffusers' tiles; ours has no other meaning.
        network.register_to_config(sample_size=max(256, config.data.resolution))


def _teacher(config: Config) -> dict[str, Any] | None:
    """Whose latents these are, by the hash of its weights where they still lie there."""
    if config.distillation is None:
        return None
    path = Path(config.distillation.teacher)
    return {"path": str(path), "weights_sha256": weights_sha256(path) if path.is_dir() else None}


def _record(
    config: Config,
    folder: RunFolder,
    progress: dict[str, Any],
    measured: LatentStatistics,
    out: Path,
    channels: int,
) -> dict[str, Any]:
    packages = ("latent_ae", "torch", "diffusers", "accelerate", "lpips")
    return {
        "format": 1,
        "config": plain(config),
        "trained": {"steps": progress["step"], "images": progress["images"]},
        "latents": measured.summary(),
        "metrics": folder.last_validation(progress["step"]) if config.validation else None,
        "metric_protocol": protocol_of(config, channels),
        "weights_sha256": weights_sha256(out),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in packages}},
    }
