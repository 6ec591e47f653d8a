"""The verbs of latents folders: encode, decode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from latent_ae.cli.app import (
    BatchSize,
    Data,
    Limit,
    Model,
    Resolution,
    Source,
    Split,
    Workers,
    app,
    stderr,
)

__all__ = ["decode", "encode"]


@app.command()
def encode(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Argument(help="The latents folder to make.", metavar="OUT")],
    resolution: Resolution = 256,
    batch_size: BatchSize = 8,
    workers: Workers = 2,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"], typer.Option(help="Of the stored moments.")
    ] = "float16",
    limit: Limit = None,
    source: Source = None,
    split: Split = "train",
) -> None:
    """Encode a data set to latents: mean and log-variance of every picture.

    The folder holds `manifest.json`, safetensors shards and a parquet index;
    `latent_ae.LatentDataset` reads it, samples and scales. Without a manifest a folder is
    unfinished: the same command begins it again.
    """
    from latent_ae.data import source_of
    from latent_ae.latents import encode

    console = stderr()
    manifest = encode(
        model,
        source_of(data, source, split),
        out,
        resolution=resolution,
        batch_size=batch_size,
        workers=workers,
        dtype=dtype,
        limit=limit,
        console=console,
    )
    for skip in manifest.skipped:
        console.print(f"skipped {skip.key}: {skip.reason}", style="yellow", markup=False)
    shape = " × ".join(map(str, manifest.latent_shape))
    console.print(f"{manifest.count} latents of {shape} in {out}")


@app.command()
def decode(
    latents: Annotated[Path, typer.Argument(help="What `encode` wrote.", metavar="LATENTS")],
    out: Annotated[Path, typer.Argument(help="The folder for the pictures.", metavar="OUT")],
    model: Annotated[
        Path | None, typer.Option(help="The autoencoder, if it has moved since.")
    ] = None,
    batch_size: BatchSize = 8,
    limit: Limit = None,
) -> None:
    """Decode a latents folder back to PNG files, named by their keys."""
    from latent_ae.latents import decode

    console = stderr()
    options: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "console": console}
    count = decode(latents, out, model=model, **options)
    console.print(f"{count} pictures in {out}")
