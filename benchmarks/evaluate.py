"""What measuring costs beside the network's own forward pass.

    python benchmarks/evaluate.py PHOTOS [--images 8] [--rounds 3]

For a network of Stable Diffusion's size (random weights: the time does not depend on them) and for
configs/tiny.yaml's, in turns within one run: the network alone on pictures that are in memory, and
`evaluate` with its metrics (PSNR, SSIM, MS-SSIM, LPIPS, Fréchet features), then with the latent
space, then with the codecs too. Prints medians and the ratios to the network alone.
"""

import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from latent_ae import evaluate, load_config
from latent_ae.autoencoder import build_network
from latent_ae.config import Protocol
from latent_ae.data import CenterCrop, normalize
from latent_ae.evaluation import REFERENCES
from latent_ae.frozen import FrozenAutoencoder

ROOT = Path(__file__).parents[1]
SIDE = 256


def main(
    photos: Path,
    images: Annotated[int, typer.Option(help="Pictures a round.")] = 8,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 3,
    batch: Annotated[int, typer.Option(help="Pictures a pass.")] = 4,
) -> None:
    """Measures both networks."""
    files = sorted(photos.rglob("*.*"))[:images]
    pixels = torch.stack([CenterCrop(SIDE)(Image.open(f).convert("RGB")) for f in files])
    print("| network | | seconds a picture | to the network alone |\n|-|-|-|-|")
    for name in ("kl_f8", "tiny"):
        network = build_network(load_config(ROOT / f"configs/{name}.yaml").network)
        with tempfile.TemporaryDirectory() as folder:
            network.save_pretrained(folder)
            measure(name, folder, photos, pixels, rounds, batch)
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers"))
    print(
        f"\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores {platform.machine()}, {packages}; "
        f"{len(pixels)} pictures of {SIDE}², batches of {batch}, {rounds} rounds"
    )


def measure(name, folder, photos, pixels, rounds, batch):
    """The rows of one network; the variants take turns, so that noise meets all alike."""
    frozen = FrozenAutoencoder(folder)
    protocol = Protocol(images=len(pixels))
    options = {"batch_size": batch, "probes": 0}

    def alone():
        for part in pixels.split(batch):
            frozen.decode(frozen.encode(normalize(part))[0])

    variants = {
        "the network alone": alone,
        "evaluate, reconstruction": lambda: run(quick=True, references=()),
        "evaluate, and latent space": lambda: run(quick=False, references=()),
        "evaluate, and codecs": lambda: run(quick=False, references=REFERENCES),
    }

    def run(**more):
        evaluate(folder, photos, protocol, **options, **more)

    seconds = {title: [] for title in variants}
    for i in range(rounds + 1):
        for title, work in variants.items():
            began = time.perf_counter()
            work()
            if i:  # the first round warms up
                seconds[title].append(time.perf_counter() - began)
    ratios = {
        title: statistics.median(
            one / base for one, base in zip(times, seconds["the network alone"], strict=True)
        )
        for title, times in seconds.items()
    }
    for title, times in seconds.items():
        each = statistics.median(times) / len(pixels)
        print(f"| {name} | {title} | {each:.3f} | {ratios[title]:.2f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
