"""The command line. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import os
import sys

from latent_ae.cli import converting, encoding, hub, latents, measuring, onnx, training
from latent_ae.cli.app import app
from latent_ae.errors import UserError

__all__ = [
    "app",
    "converting",
    "encoding",
    "hub",
    "latents",
    "main",
    "measuring",
    "onnx",
    "training",
]


def main() -> None:
    """Runs the command line: bad input becomes one sentence and exit code 2."""
    try:
        app()
    except (UserError, OSError) as error:  # OSError: no permission, no space, a file for a folder
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (process {rank})'}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        # Not by its class: the verbs that need no torch must not import it.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(
            "error: the GPU's memory is too small for this; lower the batch size (`--batch-size`; "
            "for training data.batch_size, with a higher training.accumulation, or set "
            "training.gradient_checkpointing=true): "
            f"{str(error).splitlines()[0]}",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
