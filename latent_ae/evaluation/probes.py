"""Questions that need more passes through the network, asked of a few pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from latent_ae.data import normalize, to_uint8
from latent_ae.frozen import FrozenAutoencoder

__all__ = [
    "channel_effects",
    "code_draws",
    "code_map",
    "equivariance",
    "interpolate",
    "noise_sensitivity",
    "prior_draws",
]

NOISES = (0.0, 0.03, 0.1, 0.2, 0.4, 0.8)
INTERPOLATION_STEPS = 7


def _scale(maps: Tensor, factor: float) -> Tensor:
    return F.interpolate(maps, scale_factor=factor, mode="bicubic", antialias=True)


def equivariance(frozen: FrozenAutoencoder, images: Tensor) -> list[dict[str, Any]]:
    """Whether transforming a picture and transforming its code are the same.

    Codes that follow such transforms are easier for a denoiser to learn (Kouzelis et al. 2025,
    EQ-VAE). Of each transform T: `latents`, the root mean square of E(T x) − T E(x) over the
    standard deviation of E(T x) about the channels' means; `psnr` (dB), between D(T E(x)) and T x.

    Args:
        frozen: the autoencoder.
        images: uint8 of shape (B, C, H, W), of one size.

    Returns:
        A row for each transform that keeps sizes the factor divides.
    """
    factor, (height, width) = frozen.downsampling, images.shape[-2:]
    pictures = normalize(images).to(frozen.device)
    codes, _ = frozen.encode(pictures)
    pairs: list[tuple[str, Tensor, Tensor]] = []
    for share, name in ((0.5, "scale 1/2"), (0.75, "scale 3/4")):
        sides = (height * share, width * share)
        if all(side % factor == 0 for side in sides):
            pairs.append((name, _scale(pictures, share), _scale(codes, share)))
    if height == width:
        turned = (pictures.rot90(1, (-2, -1)), codes.rot90(1, (-2, -1)))
        pairs.append(("rotate 90°", *turned))
    pairs.append(("mirror", pictures.flip(-1), codes.flip(-1)))
    if factor > 1 and codes.shape[-1] > 2:
        shifted = pictures[..., factor:]
        pairs.append((f"shift {factor} px", shifted, codes[..., 1:]))
        half = factor // 2
        between = (codes[..., :-1] + codes[..., 1:]) / 2
        pairs.append((f"shift {half} px", pictures[..., half : width - factor + half], between))
    return [_equivariance_row(frozen, *pair) for pair in pairs]


def _equivariance_row(
    frozen: FrozenAutoencoder, name: str, pictures: Tensor, codes: Tensor
) -> dict[str, Any]:
    wanted, _ = frozen.encode(pictures)
    spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean()
    error = (wanted - codes).square().mean()
    decoded = frozen.decode(codes, (pictures.shape[-2], pictures.shape[-1]))
    relative = (error / spread.clamp(min=1e-30)).sqrt().item()
    return {"transform": name, "latents": relative, "psnr": _psnr(decoded, pictures)}


def noise_sensitivity(
    frozen: FrozenAutoencoder, images: Tensor, std: Tensor, seed: int
) -> list[dict[str, float]]:
    """How fast the reconstruction falls when noise is laid over the code.

    A denoiser's errors reach the picture through this curve.

    Args:
        frozen: the autoencoder.
        images: uint8 of shape (B, C, H, W), of one size.
        std: standard deviation of each channel, of shape (c,).
        seed: of the noise.

    Returns:
        Rows of `noise` (in standard deviations of a channel) and `psnr` (dB, against the picture).
    """
    pictures = normalize(images).to(frozen.device)
    codes, _ = frozen.encode(pictures)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(codes.shape, generator=generator) * std.float().view(-1, 1, 1).cpu()
    noise, size = noise.to(codes.device), (images.shape[-2], images.shape[-1])
    return [
        {"noise": level, "psnr": _psnr(frozen.decode(codes + level * noise, size), pictures)}
        for level in NOISES
    ]


def channel_effects(frozen: FrozenAutoencoder, images: Tensor, mean: Tensor) -> list[float]:
    """The change of the picture, in 8-bit levels (RMS), when a channel is replaced by its mean.

    Args:
        frozen: the autoencoder.
        images: uint8 of shape (B, C, H, W), of one size.
        mean: of each channel, of shape (c,).
    """
    codes, _ = frozen.encode(normalize(images))
    whole, effects = frozen.decode(codes).clamp(-1, 1), []
    for channel in range(codes.shape[1]):
        without = codes.clone()
        without[:, channel] = mean[channel].item()
        change = frozen.decode(without).clamp(-1, 1) - whole
        effects.append(127.5 * change.square().mean().sqrt().item())
    return effects


def prior_draws(
    frozen: FrozenAutoencoder, moments: tuple[Tensor, Tensor], side: int, count: int, seed: int
) -> dict[str, Tensor]:
    """What draws from N(0, I) decode to, and from the normal of each channel's moments.

    Args:
        frozen: the autoencoder.
        moments: mean and standard deviation of each channel, each of shape (c,).
        side: of the pictures, in pixels, rounded down to what the factor divides.
        count: how many.
        seed: of the draws.

    Returns:
        uint8 pictures of shape (count, C, side, side), by title.
    """
    size = max(1, side // frozen.downsampling)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, frozen.channels, size, size, generator=generator)
    mean, std = (moment.float().cpu().view(-1, 1, 1) for moment in moments)
    draws = {"N(0, I)": noise, "N(mean, std²) of each channel": mean + std * noise}
    return {title: to_uint8(frozen.decode(draw)).cpu() for title, draw in draws.items()}


def code_draws(
    frozen: FrozenAutoencoder, numbers: NDArray[Any], side: int, count: int, seed: int
) -> dict[str, Tensor]:
    """What random codes decode to: all equally likely, and as likely as they occur in their slot.

    Args:
        frozen: an autoencoder whose latents are quantised.
        numbers: of the codes of some pictures, of shape (slots, N).
        side: as of `prior_draws`.
        count: likewise.
        seed: likewise.

    Returns:
        As `prior_draws`.
    """
    size = max(1, side // frozen.downsampling)
    rng = np.random.default_rng(seed)
    shape = (count, len(numbers), size, size)
    drawn = [rng.choice(row, (count, size, size)) for row in numbers]
    draws = {
        "codes, all equally likely": rng.integers(frozen.codebook_size, size=shape),
        "codes, as likely as they occur": np.stack(drawn, 1).astype(np.int64),
    }
    return {
        title: to_uint8(frozen.decode_indices(torch.from_numpy(draw))).cpu()
        for title, draw in draws.items()
    }


def interpolate(frozen: FrozenAutoencoder, images: Tensor) -> Tensor:
    """Decodes points on the line between the codes of two pictures.

    Args:
        frozen: the autoencoder.
        images: the two, uint8 of shape (2, C, H, W).

    Returns:
        uint8 of shape (7, C, H, W).
    """
    codes, _ = frozen.encode(normalize(images))
    steps = torch.linspace(0, 1, INTERPOLATION_STEPS, device=codes.device).view(-1, 1, 1, 1)
    size = (images.shape[-2], images.shape[-1])
    return to_uint8(frozen.decode(torch.lerp(codes[:1], codes[1:], steps), size)).cpu()


def code_map(codes: Tensor) -> tuple[Tensor, list[float]]:
    """The first two principal components of codes.

    Args:
        codes: of shape (n, d).

    Returns:
        Points of shape (n, 2), in standard deviations, and the components' shares of the variance.
    """
    centred = codes.double() - codes.double().mean(0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    left = F.pad(left, (0, max(0, 2 - left.shape[1])))[:, :2]
    singular = F.pad(singular, (0, max(0, 2 - len(singular))))
    share = singular.square() / singular.square().sum().clamp(min=1e-30)
    return left * max(1, len(codes) - 1) ** 0.5, share[:2].tolist()


def _psnr(decoded: Tensor, pictures: Tensor) -> float:
    """Mean over pictures, of both rounded to 8 bits."""
    error = (to_uint8(decoded).float() - to_uint8(pictures).float()).div_(255)
    return (-10 * error.square().mean((1, 2, 3)).clamp(min=1e-10).log10()).mean().item()
