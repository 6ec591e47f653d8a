"""What the KL weight buys and costs: reconstruction, prior gap, and what a denoiser makes of it.

Trains the quickstart's network (f4, 8 channels) with L2 at four weights over two decades on the same
pictures for the same steps, measures each on held-out photographs, then trains the same small
denoiser on the latents of the same crops for the same steps and draws from it.

    python benchmarks/kl_weights.py TRAIN_PHOTOS HELD_OUT_PHOTOS --runs runs/kl_weights

Every stage that has been done is kept, so the command goes on where it was stopped. Prints the tables
of docs/latents.md, writes docs/kl-weights.svg, docs/kl-weights-samples.jpg and results.json.
"""

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "pipelines"))

WEIGHTS = (1e-4, 4.6e-4, 2.2e-3, 1e-2)
SIDE, PER_PHOTO = 64, 4  # crops for the denoiser, from photographs whose shorter side is 128
DRAWS, SAMPLING_STEPS, BATCH = 1000, 25, 100


def main(
    photos: Path,
    held_out: Path,
    steps: Annotated[int, typer.Option(help="Updates of each autoencoder.")] = 2000,
    denoiser_steps: Annotated[int, typer.Option(help="Updates of each denoiser.")] = 3000,
    runs: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/kl_weights"),
    only_train: Annotated[bool, typer.Option(help="Stop before anything is measured.")] = False,
) -> None:
    """Trains, measures, tells."""
    for name, folder, seed in (("crops", photos, 0), ("held_out_crops", held_out, 1)):
        cut_crops(folder, runs / name, seed)
    for weight in WEIGHTS:
        train_autoencoder(runs / f"{weight:g}", weight, photos, steps)
        train_denoiser(runs / f"{weight:g}", runs / "crops", denoiser_steps)
    if only_train:
        return
    rows = [measure(runs / f"{weight:g}", weight, held_out, runs) for weight in WEIGHTS]
    (runs / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    tell(rows)
    draw(rows, runs)


def cut_crops(photos, out, seed):
    """The same 64² crops for every autoencoder: four of each photograph."""
    from latent_ae.data import resize_shorter_side

    if out.exists():
        return
    aside = out.with_name(f".{out.name}.tmp")
    aside.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for file in sorted(photos.rglob("*.*")):
        picture = resize_shorter_side(Image.open(file).convert("RGB"), 2 * SIDE)
        for i in range(PER_PHOTO):
            left, top = (int(rng.integers(0, edge - SIDE + 1)) for edge in picture.size)
            crop = picture.crop((left, top, left + SIDE, top + SIDE))
            crop.save(aside / f"{file.stem}-{i}.png")
    aside.rename(out)


def train_autoencoder(run, weight, photos, steps):
    from latent_ae import export_run, load_config, train

    if (run / "autoencoder").exists():
        return
    settings = [
        f"data.path={photos}",
        "data.workers=0",
        f"bottleneck.weight={weight}",
        "losses={pixel: l2}",  # with which the weight is twice the decoder's variance
        f"training.steps={steps}",
        "validation=null",
        f"output={run / 'training'}",
    ]
    train(load_config(ROOT / "configs/quickstart.yaml", settings))
    export_run(run / "training", run / "autoencoder", images=512)


def train_denoiser(run, crops, steps):
    from denoisers import DenoiserConfig
    from latent_ae import encode
    from train_denoiser import train

    if (run / "pipeline").exists():
        return
    if not (run / "latents/manifest.json").exists():
        encode(
            run / "autoencoder", crops, run / "latents", resolution=SIDE, batch_size=64, workers=0
        )
    config = DenoiserConfig(
        channels=(32, 64, 64),
        layers=1,
        attention=1,
        steps=steps,
        batch_size=32,
        learning_rate=1e-3,
        warmup_steps=100,
        precision="bf16",
        ema=0.998,
        log_every=200,
    )
    train(run / "latents", run / "pipeline", config)


if __name__ == "__main__":
    typer.run(main)
