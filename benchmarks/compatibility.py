"""Which stock pipelines read which numbers of an autoencoder's config: docs/compatibility.md.

    python benchmarks/compatibility.py

Builds each pipeline with tiny random companions around an autoencoder, lets its scheduler say what
the picture's latents are, and compares what comes out with the autoencoder's own reconstruction.
"""

import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from skimage import data

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import stock_pipelines

from latent_ae.export.folding import fold_statistics

TITLES = {
    "scale": "scaling_factor",
    "shift_factor": "and shift_factor",
    "latents_mean": "and latents_mean, latents_std",
    "folded": "folded into the weights",
}


def autoencoder(kind, statistics):
    """Random weights, with 16 channels for SD3 and FLUX and 4 elsewhere."""
    torch.manual_seed(0)
    channels = 16 if "StableDiffusion3" in kind or "Flux" in kind else 4
    network = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=0.6,
        shift_factor=0.0,
    )
    if statistics == "folded":
        repeat = channels // 4
        fold_statistics(network, stock_pipelines.MEAN * repeat, stock_pipelines.STD * repeat)
        network.register_to_config(scaling_factor=1.0)
    return stock_pipelines.told(network, statistics)


def cell(kind, statistics, image):
    decoding, encoding = stock_pipelines.differences(kind, autoencoder(kind, statistics), image)
    wrong = [
        f"{name} off by {difference:.2g}"
        for name, difference in (("decoding", decoding), ("encoding", encoding))
        if difference is not None and difference > 1e-3
    ]
    return "; ".join(wrong) or "right"


def main():
    photo = Image.fromarray(data.astronaut()).resize((64, 64), Image.Resampling.LANCZOS)
    image = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(64, 64, 3)
    image = image.permute(2, 0, 1)[None] / 127.5 - 1
    packages = ", ".join(f"{name} {version(name)}" for name in ("diffusers", "transformers"))
    print(f"{time.strftime('%Y-%m-%d')}, CPU, torch {torch.__version__}, {packages}\n")
    print(f"| pipeline | {' | '.join(TITLES.values())} |")
    print("|-" * (1 + len(TITLES)) + "|")
    for kind in stock_pipelines.BUILDERS:
        cells = [cell(kind, statistics, image) for statistics in TITLES]
        print(f"| `{kind}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
