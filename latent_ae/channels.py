"""What of a picture of any number of channels the eye, and networks that learned from RGB, see."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the config, which needs no torch, asks here too
    from torch import Tensor

__all__ = ["as_rgb", "bands_shown", "has_colours", "shown"]


def has_colours(channels: int) -> bool:
    """Whether it is grey (1), RGB (3) or RGBA (4): LPIPS and others take these as RGB."""
    return channels in (1, 3, 4)


def as_rgb(images: Tensor) -> Tensor:
    """Grey thrice, RGB as it is, RGBA over white (colours weighed by a straight alpha).

    Args:
        images: of shape (B, C, H, W) with C of 1, 3 or 4, in [-1, 1]; -1 of alpha is transparent.

    Returns:
        Of shape (B, 3, H, W), in [-1, 1], with a gradient to every channel.
    """
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    if images.shape[1] == 4:
        alpha = (images[:, 3:] + 1) / 2
        return images[:, :3] * alpha + (1 - alpha)
    return images


def shown(images: Tensor) -> Tensor:
    """What a person is shown: as `as_rgb`; of two channels the first, of five or more three.

    Args:
        images: uint8 of shape (C, H, W) or (B, C, H, W).

    Returns:
        The same with three channels.
    """
    channels = images.shape[-3]
    if channels == 3:
        return images
    if channels == 4:
        alpha = images[..., 3:, :, :].float() / 255
        over = images[..., :3, :, :].float() * alpha + 255 * (1 - alpha)
        return over.round().to(images.dtype)
    if channels < 3:
        return images[..., :1, :, :].expand(*images.shape[:-3], 3, -1, -1)
    return images[..., :3, :, :]


def bands_shown(channels: int) -> str:
    """Which channels `shown` shows, in brackets for a caption; nothing where it shows all."""
    if has_colours(channels):
        return ""
    return " (band 1)" if channels < 3 else " (bands 1-3)"
