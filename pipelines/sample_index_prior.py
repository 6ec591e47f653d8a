"""Draws pictures from a prior over codes that train_index_prior.py has saved.

python pipelines/sample_index_prior.py FOLDER --class 3 --count 8 --out sheet.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from index_prior import IndexPrior
from latent_ae.errors import UserError
from latent_ae.pictures import save_grid, save_sheet

__all__ = ["write_sheet"]

_SIDE = 128  # pixels; smaller pictures are enlarged by a whole number
_COLUMNS = 8


def write_sheet(path: Path, columns: dict[str, torch.Tensor]) -> None:
    """Writes a PNG: a titled column for each entry, or one entry without a title as a grid.

    Args:
        path: where to.
        columns: title → pictures, uint8 of shape (B, C, H, W), as many in each.
    """
    factor = max(1, _SIDE // next(iter(columns.values())).shape[-1])
    larger = {
        title: pictures.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        for title, pictures in columns.items()
    }
    if len(larger) == 1:
        (pictures,) = larger.values()
        save_grid(path, pictures, min(_COLUMNS, len(pictures)))
    else:
        save_sheet(path, larger)


def main(
    folder: Annotated[Path, typer.Argument(help="What train_index_prior.py has saved.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="By name or number; can be said again. Default: no class."),
    ] = None,
    count: Annotated[int, typer.Option(help="Pictures of each class.", min=1)] = 8,
    guidance_scale: Annotated[
        float, typer.Option(help="Classifier-free guidance; 1 is none.", min=0)
    ] = 1.0,
    temperature: Annotated[
        float, typer.Option(help="Divides the logits; 0 takes the likeliest code.", min=0)
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw among as many codes; 0: all.", min=0)] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw among codes of this probability together.", min=1e-9, max=1)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides the pictures.", min=0)] = 0,
    batch_size: Annotated[int, typer.Option(help="Pictures drawn at once.", min=1)] = 64,
    device: Annotated[str | None, typer.Option(help="Default: CUDA where there is one.")] = None,
) -> None:
    """Draws pictures of each class from the prior in FOLDER, a column a class."""
    try:
        if out.suffix.lower() != ".png":
            raise UserError(f"--out {out}: a sheet is a .png")
        prior = IndexPrior.from_pretrained(folder, device)
        asked = {name: prior.label_of(name) for name in classes or []} or {"": -1}
        if guidance_scale != 1 and not classes:
            raise UserError("--guidance-scale guides to a class: name one by --class")
        pictures = prior(
            [label for label in asked.values() for _ in range(count)],
            seed=seed,
            batch_size=batch_size,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        write_sheet(out, dict(zip(asked, pictures.split(count), strict=True)))
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{len(pictures)} pictures in {out}")


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
