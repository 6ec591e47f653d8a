"""Sheets of pictures for people to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latent_ae.channels import bands_shown, shown

__all__ = ["error_map", "save_grid", "save_sheet", "title_font"]

_GAP = 6
_PAPER = (255, 255, 255)
_INK = (32, 32, 32)
ERROR_GAIN = 4


def error_map(images: Tensor, reconstruction: Tensor) -> Tensor:
    """|x − x̂| averaged over channels, × `ERROR_GAIN`, as grey uint8 of shape (B, 3, H, W).

    Args:
        images: uint8 of shape (B, C, H, W).
        reconstruction: likewise.
    """
    error = (images.float() - reconstruction.float()).abs().mean(1, keepdim=True)
    return (ERROR_GAIN * error).clamp_(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def save_sheet(path: str | Path, columns: dict[str, Tensor]) -> Path:
    """Writes a PNG with a titled column for each entry and a row for each picture.

    Args:
        path: where to; its folder is made.
        columns: title → uint8 pictures of shape (B, C, H, W), all of one size; titles say which
            bands are shown where these are not all.
    """
    pictures = list(columns.values())
    rows = [column[i] for i in range(len(pictures[0])) for column in pictures]
    titles = [f"{title}{bands_shown(column.shape[1])}" for title, column in columns.items()]
    return _save(path, rows, len(columns), titles)


def save_grid(path: str | Path, images: Tensor, columns: int) -> Path:
    """Writes a PNG with pictures (uint8, shape (B, C, H, W)) row by row, `columns` in a row."""
    return _save(path, list(images), columns, [])


def title_font(width: int) -> Any:
    """The font of the titles above pictures of `width` pixels."""
    return ImageFont.load_default(size=max(11, min(18, width // 11)))


def _save(path: str | Path, pictures: list[Tensor], columns: int, titles: list[str]) -> Path:
    height, width = pictures[0].shape[-2:]
    font = title_font(width)
    head = round(font.getbbox("Ag")[3]) + 2 * _GAP if titles else _GAP
    rows = -(-len(pictures) // columns)
    size = (columns * (width + _GAP) + _GAP, head + rows * (height + _GAP))
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        centre = _GAP + column * (width + _GAP) + width // 2
        draw.text((centre, head // 2), title, fill=_INK, font=font, anchor="mm")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        pixels = np.ascontiguousarray(shown(picture).permute(1, 2, 0).cpu().numpy())
        corner = (_GAP + column * (width + _GAP), head + row * (height + _GAP))
        sheet.paste(Image.fromarray(pixels), corner)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
