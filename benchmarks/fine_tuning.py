"""What does the decoder gain when it alone is trained on? An autoencoder before and after.

    python benchmarks/fine_tuning.py BASE PHOTOS HELD_OUT --out runs/fine_tuning \
        --sheet docs/fine-tuning.jpg training.steps=1500

Trains BASE's decoder by configs/ft_mse.yaml with the overrides given, exports it, and measures both
on the held-out pictures. Latents are compared bit by bit, by stock diffusers. What has been done is
kept, so the command goes on where it was stopped. The sheet shows photographs of scikit-image.
"""

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from adversary import sheet
from diffusers import AutoencoderKL

from latent_ae import evaluate, export_run, load_config, train
from latent_ae.autoencoder import load_network
from latent_ae.config import Protocol, SourceConfig
from latent_ae.data import evaluation_batches, normalize
from latent_ae.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
# The recipe is for eight GPUs; these make it one for a CPU.
SMALL = {
    "data.resolution": 64,
    "data.resize": "null",
    "data.batch_size": 8,
    "data.workers": 0,
    "losses.perceptual.net": "alex",
    "training.learning_rate": 3.0e-4,
    "training.warmup_steps": 50,
    "training.schedule": "cosine",
    "training.ema": 0.995,
    "training.steps": 1500,
    "training.log_every": 100,
    "training.checkpoint_every": 500,
    "validation": "null",
}


def fine_tune(base, photos, out, overrides):
    """The exported folder, made unless it is there."""
    if not (out / "autoencoder").exists():
        settings = [f"{key}={value}" for key, value in SMALL.items()]
        settings += [f"network.path={base}", f"data.path={photos}", f"output={out / 'run'}"]
        config = load_config(ROOT / "configs/ft_mse.yaml", [*settings, *overrides])
        run = RunFolder(train(config))
        if run.progress(run.latest())["step"] < config.training.steps:  # a signal has ended it
            sys.exit(f"{out} is not done; the same command goes on")
        export_run(run.path, out / "autoencoder")
    return out / "autoencoder"


@torch.no_grad()
def equal_latents(folders, held_out, resolution):
    """On how many of the held-out pictures the posteriors are equal bit by bit, and of how many."""
    one, two = (AutoencoderKL.from_pretrained(folder).eval() for folder in folders)
    equal = count = 0
    for batch in evaluation_batches(SourceConfig(path=held_out), resolution, batch_size=1):
        images = normalize(batch.images)
        a, b = (network.encode(images).latent_dist.parameters for network in (one, two))
        equal, count = equal + torch.equal(a, b), count + 1
    return equal, count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="folder of the autoencoder to go on from")
    parser.add_argument("photos", help="pictures to train on")
    parser.add_argument("held_out", help="pictures to measure on")
    parser.add_argument("overrides", nargs="*", help="key=value, over the recipe's")
    parser.add_argument("--out", type=Path, default=Path("runs/fine_tuning"))
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--sheet", type=Path, help="where to draw it")
    args = parser.parse_intermixed_args()
    tuned = fine_tune(args.base, args.photos, args.out, args.overrides)
    folders = {"before": args.base, "after": tuned}
    print("| | PSNR (dB) | SSIM | LPIPS | scaling_factor |\n|-|-|-|-|-|")
    for name, folder in folders.items():
        protocol = Protocol(resolution=args.resolution)
        metrics = evaluate(folder, args.held_out, protocol, quick=True, references=()).metrics
        cells = [f"{metrics['psnr']:.2f}", f"{metrics['ssim']:.3f}", f"{metrics['lpips']:.3f}"]
        cells.append(f"{json.loads((folder / 'config.json').read_text())['scaling_factor']:.5f}")
        print(f"| {name} | {' | '.join(cells)} |")
    equal, count = equal_latents(folders.values(), args.held_out, args.resolution)
    print(f"\nlatents equal bit by bit: {equal} of {count} pictures")
    if args.sheet:
        networks = {name: load_network(folder).eval() for name, folder in folders.items()}
        sheet(networks, args.sheet, 192)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    machine = platform.processor() or platform.machine()
    print(f"{time.strftime('%Y-%m-%d')}, {machine}, {packages}")


if __name__ == "__main__":
    main()
