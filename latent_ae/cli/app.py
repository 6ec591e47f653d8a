"""The application that the verbs register with, and the options that several of them share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from latent_ae.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "BatchSize",
    "ConfigFile",
    "Data",
    "Limit",
    "Model",
    "Overrides",
    "Resolution",
    "Source",
    "Split",
    "Workers",
    "app",
    "is_main_process",
    "require_writable",
    "say",
    "stderr",
]

app = typer.Typer(
    name="latent-ae",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Train, measure, export and use the autoencoder of a latent diffusion model.\n\n"
    "The usual way: `train` a config, `export` the run, `evaluate` the exported folder, `encode` a "
    "data set with it. Every verb that takes MODEL takes any folder of diffusers' `AutoencoderKL`, "
    "and, where nothing else is said, of its other autoencoders of pictures.",
)

ConfigFile = Annotated[
    Path, typer.Argument(help="YAML file, such as configs/kl_f8.yaml.", metavar="CONFIG")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Dotted keys over the file's: training.steps=100", metavar="[KEY=VALUE]..."
    ),
]
Model = Annotated[
    Path,
    typer.Argument(
        help="Exported folder, or any autoencoder folder of diffusers'.", metavar="MODEL"
    ),
]
Data = Annotated[
    str,
    typer.Argument(
        help="Folder of images, saved data set, parquet file(s), webdataset tar(s) or, with "
        "--source hub, a name on the hub.",
        metavar="DATA",
    ),
]
Resolution = Annotated[
    int,
    typer.Option(help="Shorter side after the Lanczos resize, and side of the centre crop.", min=1),
]
Limit = Annotated[int | None, typer.Option(help="Take only the first N pictures.", min=1)]
Source = Annotated[
    Literal["imagefolder", "saved", "parquet", "webdataset", "hub"] | None,
    typer.Option(help="What DATA is; guessed from the path when left out."),
]
Split = Annotated[str, typer.Option(help="Which split, where DATA has several.")]
BatchSize = Annotated[int, typer.Option(help="Pictures a pass.", min=1)]
Workers = Annotated[int, typer.Option(help="Loader processes.", min=0)]


def stderr() -> Console:
    """The console for everything that is not the answer."""
    from rich.console import Console

    return Console(stderr=True)


def say(sentence: str) -> None:
    """Prints to standard error as it is; a pipe gets one line for a sentence."""
    stderr().print(sentence, markup=False, highlight=False, soft_wrap=True)


def is_main_process() -> bool:
    """Whether this is the one process of a launcher's that speaks."""
    return os.environ.get("RANK", "0") == "0"


def require_writable(file: Path) -> None:
    """Raises `UserError` unless a file can be written here: better known before the work."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"{file} cannot be written")
