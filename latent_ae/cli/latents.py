"""The verbs of finished latents folders: `latents info`, `verify`, `merge`, …."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from latent_ae.cli.app import BatchSize, Limit, app, stderr
from latent_ae.errors import UserError

__all__ = ["latents"]

latents = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Look at latents folders, check, join, divide and convert them.",
)
app.add_typer(latents, name="latents")

Folder = Annotated[Path, typer.Argument(help="What `encode` wrote.", metavar="FOLDER")]
Format = Annotated[
    Literal["edm2", "lightningdit"],
    typer.Option(
        "--format",
        help="`edm2`: a zip of means and standard deviations; `lightningdit`: safetensors shards "
        "of samples and their mirror images.",
    ),
]


@latents.command()
def info(folder: Folder) -> None:
    """What a folder holds: its autoencoder, pictures, sizes, statistics, what was skipped."""
    from rich.console import Console

    from latent_ae.latents.describe import describe

    Console().print(describe(folder))


@latents.command()
def verify(folder: Folder) -> None:
    """Check every hash, every value and every key; exit code 2 if anything is wrong."""
    from latent_ae.latents.verify import verify

    problems = verify(folder, console=stderr())
    for problem in problems[:50]:
        print(problem)
    if problems:
        count = "a fault" if len(problems) == 1 else f"{len(problems)} faults"
        raise UserError(f"{folder} has {count}" + ", the first 50 shown" * (len(problems) > 50))
    stderr().print(f"{folder} is sound", markup=False)


@latents.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Two or more latents folders.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
) -> None:
    """Join folders that one autoencoder made in the same way."""
    from latent_ae.latents.merge import merge

    manifest = merge(folders, out)
    stderr().print(f"{manifest.count} latents in {out}", markup=False)


@latents.command()
def split(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="The parts are folders in it.", metavar="OUT")],
    share: Annotated[
        list[str],
        typer.Option(help="A part's name and share, such as train=0.95; repeat for each."),
    ],
    seed: Annotated[int, typer.Option(help="Which pictures go where.", min=0)] = 0,
) -> None:
    """Divide a folder at random, picture by picture."""
    from latent_ae.latents.merge import split

    shares: dict[str, float] = {}
    for part in share:
        name, _, number = part.partition("=")
        try:
            shares[str(out / name)] = float(number)
        except ValueError:
            raise UserError(f"--share {part!r} is not NAME=NUMBER") from None
        if not name or Path(name).name != name:
            raise UserError(f"--share {part!r} has no plain name of a folder")
    if len(shares) != len(share):
        raise UserError("--share gives two parts one name")
    for path, manifest in split(folder, shares, seed=seed).items():
        stderr().print(f"{manifest.count} latents in {path}", markup=False)


@latents.command()
def decode(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="The folder for the pictures.", metavar="OUT")],
    model: Annotated[
        Path | None, typer.Option(help="The autoencoder, if it has moved since.")
    ] = None,
    batch_size: BatchSize = 8,
    limit: Limit = None,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="Of the decoder.")
    ] = "fp32",
) -> None:
    """Decode a folder back to PNG files, named by their keys."""
    from latent_ae.latents import decode

    console = stderr()
    options: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "console": console}
    count = decode(folder, out, model=model, precision=precision, **options)
    console.print(f"{count} pictures in {out}", markup=False)


@latents.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A zip or a folder of shards.", metavar="SOURCE")],
    model: Annotated[
        Path, typer.Argument(help="The autoencoder that made the latents.", metavar="MODEL")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.", metavar="OUT")],
    format: Format,
) -> None:
    """Make a latents folder of what another project has encoded."""
    from latent_ae.latents.interchange import FORMATS

    manifest = FORMATS[format][0](source, model, out)
    stderr().print(f"{manifest.count} latents in {out}", markup=False)


@latents.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="The zip or folder to make.", metavar="OUT")],
    format: Format,
) -> None:
    """Write a folder as another project reads it."""
    from latent_ae.latents.interchange import FORMATS

    FORMATS[format][1](folder, out)
    stderr().print(f"written to {out}", markup=False)
