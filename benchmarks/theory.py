"""The argument of docs/theory.md on real photographs: what the KL term buys and what it costs.

Trains the same small network three times, as a plain autoencoder and as a KL-VAE at two weights,
and decodes draws from N(0, I) with each.

    python benchmarks/theory.py TRAIN_PHOTOS HELD_OUT_PHOTOS --steps 2500

Writes docs/theory-<name>.png and prints the table, with date, machine and versions.
"""

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer

from latent_ae import evaluate, export_run, load_config, load_network, train
from latent_ae.autoencoder import decode_latents
from latent_ae.data import to_uint8
from latent_ae.pictures import save_grid

ROOT = Path(__file__).parents[1]
WEIGHTS = {"autoencoder": 0.0, "kl-1e-4": 1e-4, "kl-1e-2": 1e-2}


def main(
    photos: Path,
    held_out: Path,
    steps: Annotated[int, typer.Option(help="Updates of each of the three.")] = 2500,
    runs: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/theory"),
) -> None:
    """Trains, measures and draws."""
    rows = [row(name, weight, photos, held_out, steps, runs) for name, weight in WEIGHTS.items()]
    print("| | λ | PSNR (dB) | LPIPS | KL (bits a latent value) | latents' mean, std |")
    print("|-|-|-|-|-|-|")
    for cells in rows:
        print("| " + " | ".join(cells) + " |")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    print(f"\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores {platform.machine()}, {packages}")


def row(name, weight, photos, held_out, steps, runs):
    """Trains one of the three and returns its line of the table."""
    settings = [
        f"data.path={photos}",
        "data.workers=1",
        f"bottleneck.weight={weight}",
        "losses={pixel: l2}",
        # The linear start would give every model standardised latents: here they must find theirs.
        "network.init=default",
        "network.norm_num_groups=8",
        "training.learning_rate=2e-3",
        f"training.steps={steps}",
        "validation=null",
        f"output={runs / name}",
    ]
    config = load_config(ROOT / "configs/quickstart.yaml", settings)
    train(config)
    folder = runs / f"{name}-exported"
    if not folder.exists():
        export_run(runs / name, folder, images=512)
    metrics = evaluate(folder, held_out, quick=True, references=()).metrics
    latents = json.loads((folder / "latent_ae.json").read_text())["latents"]
    network = load_network(folder)
    channels, side = network.config["latent_channels"], config.data.resolution
    values = channels * (side // config.network.downsampling) ** 2
    noise = torch.randn(8, channels, 32, 32, generator=torch.manual_seed(0))
    with torch.no_grad():
        save_grid(
            ROOT / f"docs/theory-{name}.png", to_uint8(decode_latents(network, noise)), columns=8
        )
    bits = latents["kl_nats_per_image"] / values / 0.6931 if weight else None
    return [
        "plain autoencoder" if weight == 0 else "KL-VAE",
        f"{weight:g}",
        f"{metrics['psnr']:.2f}",
        f"{metrics['lpips']:.3f}",
        "–" if bits is None else f"{bits:.2f}",
        f"{latents['mean']:.2f}, {latents['std']:.2f}",
    ]


if __name__ == "__main__":
    typer.run(main)
