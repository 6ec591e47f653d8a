"""Stock networks beside accelerated ones, and the photographs that they encode."""

import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data as photographs

from latent_ae import load_config
from latent_ae.acceleration import accelerate_autoencoder
from latent_ae.autoencoder import build_network, load_network
from latent_ae.frozen import PRECISIONS

__all__ = [
    "KINDS",
    "OURS",
    "PHOTOGRAPHS",
    "STOCK",
    "build",
    "decode",
    "encode",
    "photograph_batch",
    "source",
]

ROOT = Path(__file__).parents[1]
STOCK = "stock"
# What is done to a copy of the stock network, by row.
KINDS = {
    STOCK: lambda network: network,
    "stock, channels_last": lambda network: network.to(memory_format=torch.channels_last),
    "ours": lambda network, **options: accelerate_autoencoder(network, **options),
    "ours, compiled": lambda network, **options: accelerate_autoencoder(
        network, compile=True, **options
    ),
}
OURS = tuple(kind for kind in KINDS if kind.startswith("ours"))
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def source(name, model=None):
    """A stock network in fp32 on the CPU, for inference.

    Args:
        name: of a file in configs/, whose network gets random weights, the same each time. Times
            do not depend on them.
        model: a folder of diffusers', taken instead.
    """
    if model is not None:
        network = load_network(model)
    else:
        torch.manual_seed(0)
        # The linear start of `tiny` is a fit: minutes that change no time.
        config = load_config(ROOT / f"configs/{name}.yaml", ["network.init=default"])
        network = build_network(config.network)
    return network.requires_grad_(False).eval()


def build(network, kind, precision, device, **options):
    """A copy of the network for a row.

    Args:
        network: from `source`.
        kind: of `KINDS`.
        precision: `fp32` or `bf16`, of weights and activations.
        device: a torch.device.
        options: for `accelerate_autoencoder`, in a row of ours.
    """
    # diffusers' own `to` warns of parts to keep in fp32, of which there are none here.
    copied = torch.nn.Module.to(copy.deepcopy(network), device, PRECISIONS[precision])
    return KINDS[kind](copied, **(options if kind in OURS else {}))


@torch.no_grad()
def encode(network, images):
    """The posterior's moments of shape (B, 2c, h, w), of pictures in [-1, 1]."""
    return network.encode(images.to(network.dtype)).latent_dist.parameters


@torch.no_grad()
def decode(network, latents):
    """Pictures of shape (B, 3, H, W), of raw latents of shape (B, c, h, w)."""
    return network.decode(latents.to(network.dtype)).sample


def photograph_batch(count, side):
    """Photographs of scikit-image's in [-1, 1], fp32 of shape (count, 3, side, side).

    The centre of each; one whose shorter side is less is enlarged first.
    """
    pictures = []
    for number in range(count):
        picture = Image.fromarray(getattr(photographs, PHOTOGRAPHS[number % 4])())
        scale = side / min(picture.size)
        if scale > 1:
            size = [max(side, round(length * scale)) for length in picture.size]
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        left, top = ((length - side) // 2 for length in picture.size)
        pictures.append(np.array(picture.crop((left, top, left + side, top + side))))
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return (pixels.float() / 127.5 - 1).contiguous()
