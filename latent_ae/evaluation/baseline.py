"""What no training at all would give: the picture made smaller and larger again."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latent_ae.data import to_tensor

__all__ = ["lanczos_reduction"]


def lanczos_reduction(images: Tensor, values: int) -> Tensor:
    """Reduces each picture by Lanczos to at most `values` numbers and enlarges it again.

    Args:
        images: uint8 of shape (B, 3, H, W).
        values: how many numbers an autoencoder's code of one picture has.

    Returns:
        uint8 of shape (B, 3, H, W).
    """
    height, width = images.shape[-2:]
    shrink = (values / (3 * height * width)) ** 0.5
    small = (max(1, int(width * shrink + 1e-6)), max(1, int(height * shrink + 1e-6)))
    result = []
    for image in images.cpu():
        picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        reduced = picture.resize(small, Image.Resampling.LANCZOS)
        result.append(to_tensor(reduced.resize((width, height), Image.Resampling.LANCZOS)))
    return torch.stack(result)
