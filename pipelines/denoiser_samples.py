"""What a denoiser draws while it is trained: pictures, and sheets of them to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoiser_examples import mix
from denoisers import DenoiserConfig
from latent_ae.data import to_uint8
from latent_ae.pictures import save_grid, save_sheet, title_font
from latent_diffusion import LatentDiffusionPipeline

__all__ = ["decode", "draw", "draw_sheet", "noise_of"]

_COLUMNS, _ROWS = 8, 4
_SIDE = 128  # pixels; smaller pictures are enlarged by a whole number
_SHEET = 1  # keeps its noise apart from other draws of the same seed


@torch.no_grad()
def decode(pipeline: LatentDiffusionPipeline, latents: Tensor) -> Tensor:
    """Pictures, uint8 of shape (B, 3, H, W), of scaled latents of shape (B, c, h, w)."""
    return to_uint8(pipeline.decode_latents(latents.to(pipeline.vae.device))).cpu()


def draw(
    pipeline: LatentDiffusionPipeline, config: DenoiserConfig, noise: Tensor, labels: Tensor
) -> Tensor:
    """Pictures, uint8 of shape (B, 3, H, W), that the denoiser makes of noise.

    Args:
        pipeline: with the weights that shall draw.
        config: steps, guidance and how many are drawn at once.
        noise: of shape (B, c, h, w); it decides the pictures.
        labels: of shape (B,); where one is no class, nothing is asked for and nothing guides.
    """
    pictures: list[Tensor] = [torch.empty(0)] * len(noise)
    known = (labels >= 0) & (labels < pipeline.num_classes)
    for places in (known.nonzero()[:, 0], (~known).nonzero()[:, 0]):
        for some in places.split(config.sample_batch_size):
            if not len(some):
                continue
            asked = labels[some].tolist() if known[some[0]] else None
            latents: Any = pipeline(
                class_labels=asked,
                latents=noise[some],
                num_inference_steps=config.sampling_steps,
                guidance_scale=config.guidance_scale if asked else 1.0,
                output_type="latent",
            )
            for place, picture in zip(some.tolist(), decode(pipeline, latents.images), strict=True):
                pictures[place] = picture
    return torch.stack(pictures)


def noise_of(shape: tuple[int, int, int], *seed: int) -> Tensor:
    """Gaussian noise of `shape`, the same on every device and in every batch."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(mix(*seed)))


def draw_sheet(
    path: Path,
    pipeline: LatentDiffusionPipeline,
    config: DenoiserConfig,
    shape: tuple[int, int, int],
) -> Path:
    """Writes a PNG of what the denoiser draws from noise that is the same at every step.

    With classes a column is a class (evenly spread over all, if there are more than fit) and a row
    is one noise; without, each picture has its own.

    Args:
        path: where to; the sheet appears there whole.
        pipeline: with the weights that shall draw.
        config: the seed, and how to draw.
        shape: (c, h, w) of the latents.
    """
    count = pipeline.num_classes
    columns = min(_COLUMNS, count) or _COLUMNS
    classes = [place * count // columns for place in range(columns)] if count else []
    different = _ROWS if classes else _ROWS * columns
    noise = torch.stack([noise_of(shape, config.seed, i, 0, _SHEET) for i in range(different)])
    if classes:
        labels = torch.tensor(classes).repeat_interleave(_ROWS)
        pictures = draw(pipeline, config, noise.repeat(columns, 1, 1, 1), labels)
    else:
        pictures = draw(pipeline, config, noise, torch.full((different,), -1))
    factor = max(1, _SIDE // pictures.shape[-1])
    pictures = pictures.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    aside = path.with_name(f".{path.name}")
    if classes:
        titles = _titles(pipeline, classes, pictures.shape[-1])
        save_sheet(aside, dict(zip(titles, pictures.split(_ROWS), strict=True)))
    else:
        save_grid(aside, pictures, columns)
    return aside.replace(path)


def _titles(pipeline: LatentDiffusionPipeline, classes: list[int], width: int) -> list[str]:
    """The classes' first names, as much of each as fits above a picture of `width` pixels."""
    names = {int(index): name for index, name in (pipeline.config["id2label"] or {}).items()}
    first = [names.get(label, f"class {label}").split(",")[0] for label in classes]
    font = title_font(width)

    def fitted(name: str) -> str:
        if font.getlength(name) <= width:
            return name
        starts = (name[:end].rstrip() + "…" for end in range(len(name) - 1, 0, -1))
        return next((start for start in starts if font.getlength(start) <= width), "…")

    titles = [fitted(name) for name in first]
    # A column of its own for each, also where names are alike as far as they fit.
    return titles if len(set(titles)) == len(titles) else [str(label) for label in classes]
