"""What does an adversary change? Two exported autoencoders side by side, in numbers and pictures.

    latent-ae train configs/tiny_adversary.yaml data.path=IMAGES validation.path=HELD_OUT
    latent-ae train configs/tiny_adversary.yaml data.path=IMAGES validation.path=HELD_OUT \
        adversary=null output=runs/tiny_alone
    latent-ae export runs/tiny_alone without && latent-ae export runs/tiny_adversary with
    python benchmarks/adversary.py HELD_OUT without with --sheet docs/adversary.jpg

PSNR, SSIM and LPIPS as `latent-ae evaluate` has them, and the sharpness of the reconstructions: the
energy of their Laplacian over that of the pictures, 1 where there is as much fine structure as in
the picture, wherever it lies. The sheet shows photographs of scikit-image, which may be shown.
"""

import argparse
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from skimage import data as photographs
from torch.nn import functional

from latent_ae import evaluate
from latent_ae.autoencoder import load_network, reconstruct
from latent_ae.config import Protocol, SourceConfig
from latent_ae.data import CenterCrop, evaluation_batches, normalize, to_uint8
from latent_ae.pictures import save_sheet

SHOWN = ("astronaut", "chelsea", "coffee", "rocket")
LAPLACIAN = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]


def laplacian_energy(images):
    """The mean square of the Laplacian of the luma of uint8 pictures (B, 3, H, W)."""
    luma = images.float().mean(1, keepdim=True)
    return functional.conv2d(luma, LAPLACIAN).square().mean((1, 2, 3))


@torch.no_grad()
def sharpness(network, folder, resolution):
    """The median over pictures of the ratio of both energies."""
    ratios = []
    for batch in evaluation_batches(SourceConfig(path=folder), resolution):
        decoded = to_uint8(reconstruct(network, normalize(batch.images)))
        ratios.append(laplacian_energy(decoded) / laplacian_energy(batch.images))
    return torch.cat(ratios).median().item()


@torch.no_grad()
def sheet(networks, path, side):
    """Crops at their own size: that is where fine structure shows."""
    crop = CenterCrop(2 * side)
    pictures = [crop(Image.fromarray(getattr(photographs, name)())) for name in SHOWN]
    images = torch.stack(pictures)[:, :, side // 2 : -side // 2, side // 2 : -side // 2]
    columns = {"picture": images.contiguous()}
    for name, network in networks.items():
        columns[name] = to_uint8(reconstruct(network, normalize(images)))
    png = save_sheet(path.with_suffix(".png"), columns)
    if path.suffix != ".png":
        with Image.open(png) as drawn:
            drawn.convert("RGB").save(path, quality=92)
        png.unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="held-out pictures")
    parser.add_argument("models", nargs="+", help="exported folders; their names are the titles")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--sheet", type=Path, help="where to draw it")
    args = parser.parse_args()
    networks = {Path(model).name: load_network(model).eval() for model in args.models}
    print("| | PSNR (dB) | SSIM | LPIPS | sharpness |\n|-|-|-|-|-|")
    for model, (name, network) in zip(args.models, networks.items(), strict=True):
        protocol = Protocol(resolution=args.resolution)
        metrics = evaluate(model, args.data, protocol, quick=True, references=()).metrics
        cells = [f"{metrics['psnr']:.2f}", f"{metrics['ssim']:.3f}", f"{metrics['lpips']:.3f}"]
        cells.append(f"{sharpness(network, args.data, args.resolution):.2f}")
        print(f"| {name} | {' | '.join(cells)} |")
    if args.sheet:
        sheet(networks, args.sheet, 192)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    print(
        f"\n{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, {packages}"
    )


if __name__ == "__main__":
    main()
