"""A small autoencoder for previews that speaks a large one's latent space."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console

from latent_ae.config import Config
from latent_ae.config_file import load_config
from latent_ae.data import source_of
from latent_ae.export import export_run
from latent_ae.folders import require_free
from latent_ae.networks import downsampling, image_channels, untrained_network
from latent_ae.run_folder import RunFolder
from latent_ae.training import train

__all__ = ["RECIPE", "distill", "distillation_config"]

RECIPE = Path(__file__).parent / "assets" / "distill_tiny.yaml"
_WIDTH, _BLOCKS = 64, 3  # TAESD's


def distillation_config(
    teacher: str | Path,
    data: str | Path,
    output: str | Path,
    overrides: Sequence[str] = (),
    *,
    source: str | None = None,
    split: str = "train",
    recipe: str | Path = RECIPE,
) -> Config:
    """The run that distills a teacher into an `AutoencoderTiny` of as many levels and channels.

    Args:
        teacher: the folder of an autoencoder.
        data: pictures.
        output: the run's folder.
        overrides: `key=value`, over all that follows from the other arguments.
        source: what `data` is, one of `latent_ae.data.SOURCES`; guessed from it when left out.
        split: which, where `data` has several.
        recipe: a YAML file for everything else.

    Raises:
        UserError: there is no such teacher, or the config is not valid.
    """
    with torch.device("meta"):  # its shape is enough
        network = untrained_network(teacher)
    levels = downsampling(network).bit_length()
    values = {
        "network.in_channels": image_channels(network),
        "network.latent_channels": network.config["latent_channels"],
        "network.encoder_block_out_channels": [_WIDTH] * levels,
        "network.decoder_block_out_channels": [_WIDTH] * levels,
        "network.num_encoder_blocks": [1] + [_BLOCKS] * (levels - 1),
        "network.num_decoder_blocks": [_BLOCKS] * (levels - 1) + [1],
        "distillation.teacher": str(teacher),
        "output": str(output),
    }
    values |= {
        f"data.{key}": value for key, value in source_of(data, source, split).model_dump().items()
    }
    derived = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return load_config(recipe, [*derived, *overrides])


def distill(
    teacher: str | Path,
    data: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    source: str | None = None,
    split: str = "train",
    recipe: str | Path = RECIPE,
    license_name: str = "unknown",
    console: Console | None = None,
) -> Path | None:
    """Trains a student in a run folder beside `out`, then exports it there.

    The same call goes on where a run was stopped. The student's `scaling_factor` is 1: its latents
    are the teacher's final ones, so that it takes the teacher's place in a pipeline as it is.

    Args:
        teacher: the folder of an autoencoder.
        data: pictures; `source` and `split` as in `distillation_config`.
        out: the folder to make; must not exist yet.
        overrides: `key=value` of the run's config; without `output` that is `out` with `-run`.
        source: see `data`.
        split: see `data`.
        recipe: a YAML file for everything that does not follow from the teacher.
        license_name: for the model card.
        console: where progress is shown; standard error when left out.

    Returns:
        `out`, on the main process; None where the run was stopped before its end, and on the other
        processes.

    Raises:
        UserError: something does not fit or cannot be read.
    """
    out = Path(out)
    require_free(out)
    output = out.with_name(f"{out.name}-run")
    config = distillation_config(
        teacher, data, output, overrides, source=source, split=split, recipe=recipe
    )
    folder = RunFolder(train(config, console))
    if not PartialState().is_main_process:
        return None
    kept = folder.all_checkpoints()
    if not kept or folder.progress(kept[-1])["step"] < config.training.steps:
        return None
    return export_run(folder.path, out, license_name=license_name)
