"""How far has configs/photos_f8.yaml come? An exported folder against the standing goal.

    latent-ae train configs/photos_f8.yaml data.path=IMAGES validation.path=HELD_OUT
    latent-ae export runs/photos_f8 autoencoder
    python benchmarks/photos_f8.py runs/photos_f8 autoencoder HELD_OUT --sheet docs/photos-f8.jpg

The goal is what FLUX.2's tiny autoencoder (f8, 32 channels) reaches on 200 photographs of BSDS500,
256² centre crops: other photographs of the same kind, so a yardstick and not a contest. Prints the
validations of the run, with the time they took, and the exported folder's 95 % intervals.
"""

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

from adversary import sheet

from latent_ae import evaluate
from latent_ae.autoencoder import load_network
from latent_ae.config import Protocol
from latent_ae.run_folder import RunFolder

GOAL = {"psnr": 28.29, "ssim": 0.879, "lpips": 0.0382}


def row(name, metrics):
    cells = [f"{metrics[key]:.{digits}f}" for key, digits in zip(GOAL, (2, 3, 4), strict=True)]
    print(f"| {name} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the training run's folder")
    parser.add_argument("model", type=Path, help="the exported folder")
    parser.add_argument("held_out", help="pictures to measure on")
    parser.add_argument("--sheet", type=Path, help="where to draw it")
    args = parser.parse_args()
    print("| | PSNR (dB) | SSIM | LPIPS |\n|-|-|-|-|")
    for found in RunFolder(args.run).log_rows():
        if found["group"] == "validation":
            row(f"after {found['step']:,} steps", found)
    result = evaluate(args.model, args.held_out, Protocol(resolution=256), quick=True)
    row("exported", result.metrics)
    for reference in result.content["references"]:
        row(f"{reference['name']}, {reference['detail']}", reference["metrics"])
    row("goal", GOAL)
    print(f"\n95 % intervals: {json.dumps(result.intervals)}")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    machine = platform.processor() or platform.machine()
    print(f"{time.strftime('%Y-%m-%d')}, {machine}, {packages}")
    if args.sheet:
        sheet({"f8, 32 channels": load_network(args.model).eval()}, args.sheet, 192)


if __name__ == "__main__":
    main()
