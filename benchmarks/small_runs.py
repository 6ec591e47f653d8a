"""What the studies of the objective share: the quickstart's network, trained and exported."""

import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]


def train_autoencoder(run, photos, steps, settings):
    """The quickstart's network with `settings` changed, exported to `run`/autoencoder, once."""
    from latent_ae import export_run, load_config, train
    from latent_ae.run_folder import RunFolder

    if (run / "autoencoder").exists():
        return
    settings = [
        f"data.path={photos}",
        "data.workers=0",
        *settings,
        f"training.steps={steps}",
        "validation=null",
        f"output={run / 'training'}",
    ]
    folder = RunFolder(train(load_config(ROOT / "configs/quickstart.yaml", settings)))
    if folder.progress(folder.latest())["step"] < steps:  # a signal has ended it
        sys.exit(f"{run} is not done; the same command goes on")
    export_run(run / "training", run / "autoencoder", images=512)


def mean(values):
    """Of an iterable."""
    values = list(values)
    return sum(values) / len(values)


def provenance():
    """Date, machine and versions, as a line below a table."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores {platform.machine()}, {packages}"
