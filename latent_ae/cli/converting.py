"""The verb `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from latent_ae.cli.app import app, say

__all__ = ["convert"]

_FILE = "What a single file does not say"


Source = Annotated[
    Path,
    typer.Argument(
        help="AutoencoderKL folder; or .safetensors, .ckpt, .pt, .pth, .bin: a VAE alone or a "
        "whole checkpoint.",
        metavar="SOURCE",
    ),
]
Target = Annotated[
    Path, typer.Argument(help="The .safetensors file, or the folder, to make.", metavar="TARGET")
]
Prefix = Annotated[
    str | None,
    typer.Option(
        help="Before a file's names. Written: none when left out, as folders of VAEs want; "
        "`first_stage_model.` as in a whole checkpoint. Read: found when left out."
    ),
]
Dtype = Annotated[
    Literal["fp32", "fp16", "bf16"] | None,
    typer.Option(help="Of what is written; each tensor keeps its own when left out."),
]
Family = Annotated[
    Literal["sd1", "sdxl", "sd3", "flux"] | None,
    typer.Option(help="Whose scale and shift these latents have.", rich_help_panel=_FILE),
]
ScalingFactor = Annotated[
    float | None,
    typer.Option(help="By which a denoiser's latents are multiplied.", rich_help_panel=_FILE),
]
ShiftFactor = Annotated[
    float | None, typer.Option(help="What is taken away before.", rich_help_panel=_FILE)
]
Config = Annotated[
    Path | None,
    typer.Option(help="A diffusers config.json, or LDM's YAML.", rich_help_panel=_FILE),
]
Ema = Annotated[
    bool,
    typer.Option(
        "--ema", help="Take an LDM run's averaged weights (model_ema.*).", rich_help_panel=_FILE
    ),
]


@app.command()
def convert(
    source: Source,
    target: Target,
    prefix: Prefix = None,
    dtype: Dtype = None,
    family: Family = None,
    scaling_factor: ScalingFactor = None,
    shift_factor: ShiftFactor = None,
    config: Config = None,
    ema: Ema = False,
) -> None:
    """Convert a diffusers folder to a single file in LDM's layout, or such a file to a folder.

    `latent-ae convert my-autoencoder vae.safetensors` makes what ComfyUI and AUTOMATIC1111's WebUI
    read, and a YAML for LDM; `latent-ae convert vae.safetensors folder` what diffusers reads.
    Weights stay bit-equal; a tensor too many or too few is refused. No file of others says its
    scaling factor: name it with `--family`, `--scaling-factor` or `--config` (docs/convert.md).
    """
    from latent_ae.conversion import convert

    made = convert(
        source,
        target,
        prefix=prefix,
        dtype=dtype,
        ema=ema,
        family=family,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        config=config,
    )
    for note in made.notes:
        say(f"note: {note}")
    kinds = ", ".join(f"{count} {name}" for name, count in made.dtypes.items())
    say(f"{made.target} is ready: {kinds} tensors, compared bit by bit")
