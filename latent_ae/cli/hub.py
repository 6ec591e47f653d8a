"""The verb that shares: push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latent_ae.cli.app import Model, app, say

__all__ = ["push"]


@app.command()
def push(
    model: Model,
    repository: Annotated[
        str, typer.Argument(help="`name` or `user/name` on the hub.", metavar="REPOSITORY")
    ],
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="What `latent-ae evaluate MODEL DATA --out` wrote: its numbers, its protocol and "
            "its first pictures go into the card, for everyone to see."
        ),
    ] = None,
    pictures: Annotated[
        int, typer.Option(help="How many of the evaluation's pictures to show.", min=0)
    ] = 4,
    license: Annotated[
        str | None,
        typer.Option(help="Such as apache-2.0; the one of the export when left out."),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(help="Upload nothing: write the folder, ready to upload, to this place."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Where the repository is made: only for you.")
    ] = False,
) -> None:
    """Upload an autoencoder to the Hugging Face hub, with a card of measured facts.

    Where the hub cannot be reached, the folder stays ready beside MODEL. The token is that of
    `hf auth login`, or HF_TOKEN.
    """
    from latent_ae.hub import prepare_upload, push_to_hub

    if to is not None:
        prepare_upload(
            model,
            to,
            repository,
            evaluation=evaluation,
            license_name=license,
            pictures=pictures,
        )
        say(f"{to} is ready: hf upload {repository} {to}")
        return
    address = push_to_hub(
        model,
        repository,
        evaluation=evaluation,
        license_name=license,
        pictures=pictures,
        private=private or None,
    )
    print(address)
