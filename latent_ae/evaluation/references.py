"""What no training at all would give: classical codecs at the same number of values or bits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from latent_ae.data import Bands, to_tensor
from latent_ae.errors import UserError

__all__ = [
    "CODECS",
    "Codec",
    "CodecResult",
    "codec_reference",
    "encode_at_most",
    "lanczos_reduction",
]

# Pillow frees the interpreter's lock while it encodes; processes of one machine share its cores.
_THREADS = max(1, (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
# The size dips by a few bytes at some qualities. In photographs a dip is one step wide.
_LOOK_AHEAD = 2


def lanczos_reduction(images: Tensor, values: int) -> Tensor:
    """Reduces each picture by Lanczos to at most `values` numbers and enlarges it again.

    Args:
        images: uint8 of shape (B, C, H, W); each channel is reduced by itself.
        values: how many numbers an autoencoder's code of one picture has.

    Returns:
        uint8 of shape (B, C, H, W).
    """
    height, width = images.shape[-2:]
    shrink = (values / images[0].numel()) ** 0.5
    small = (max(1, int(width * shrink + 1e-6)), max(1, int(height * shrink + 1e-6)))
    result = []
    for image in images:
        picture = _picture(image) if len(image) == 3 else Bands.of(image.permute(1, 2, 0).numpy())
        reduced = picture.resize(small, Image.Resampling.LANCZOS)
        result.append(to_tensor(reduced.resize((width, height), Image.Resampling.LANCZOS)))
    return torch.stack(result)


class Codec(NamedTuple):
    """A lossy file format.

    Attributes:
        encode: gives the file of an RGB picture at a quality.
        lowest: the smallest quality that differs from the next; the largest is 100.
    """

    encode: Callable[[Image.Image, int], bytes]
    lowest: int


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    """JPEG with halved chroma (Pillow's default) and optimal Huffman tables."""
    files = []
    for progressive in (False, True):
        file = BytesIO()
        picture.save(file, "JPEG", quality=quality, optimize=True, progressive=progressive)
        files.append(file.getvalue())
    return min(files, key=len)


def _webp(picture: Image.Image, quality: int) -> bytes:
    """Lossy WebP, at Pillow's default effort."""
    file = BytesIO()
    picture.save(file, "WEBP", quality=quality, method=4)
    return file.getvalue()


# libjpeg takes quality 0 for 1.
CODECS: dict[str, Codec] = {"JPEG": Codec(_jpeg, 1), "WebP": Codec(_webp, 0)}


@dataclass(frozen=True)
class CodecResult:
    """Pictures as a codec returns them.

    Attributes:
        images: uint8 of shape (B, 3, H, W).
        bits: those of each whole file, headers included.
        too_large: whether even the lowest quality of a picture takes more bits than allowed.
    """

    images: Tensor
    bits: list[int]
    too_large: list[bool]


def codec_reference(images: Tensor, bits: Sequence[float], codec: str) -> CodecResult:
    """Encodes each picture into at most its own number of bits, and decodes it.

    Args:
        images: uint8 of shape (B, 3, H, W).
        bits: allowed for each picture.
        codec: one of `CODECS`.

    Raises:
        UserError: an unknown codec.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        jobs = [
            pool.submit(encode_at_most, image, allowed, codec)
            for image, allowed in zip(images.cpu(), bits, strict=True)
        ]
        results = [job.result() for job in jobs]
    taken = [size for _, size in results]
    too_large = [size > allowed for size, allowed in zip(taken, bits, strict=True)]
    return CodecResult(torch.stack([picture for picture, _ in results]), taken, too_large)


def encode_at_most(image: Tensor, bits: float, codec: str) -> tuple[Tensor, int]:
    """Encodes a picture at the best quality whose whole file takes at most `bits`.

    Args:
        image: uint8 of shape (3, H, W).
        bits: allowed for the file, headers included.
        codec: one of `CODECS`.

    Returns:
        The decoded picture, uint8 of shape (3, H, W), and the bits of its file. These are more than
        allowed where even the lowest quality, which is then returned, takes more.

    Raises:
        UserError: an unknown codec.
    """
    if codec not in CODECS:
        raise UserError(f"codec {codec!r} is unknown; valid: {', '.join(CODECS)}")
    encode, lowest = CODECS[codec]
    picture = _picture(image)
    file = _best_file(lambda quality: encode(picture, quality), lowest, bits)
    if file is None:
        file = encode(picture, lowest)
    return to_tensor(Image.open(BytesIO(file)).convert("RGB")), 8 * len(file)


def _best_file(encode: Callable[[int], bytes], lowest: int, bits: float) -> bytes | None:
    """The file of the best quality found that fits; the next quality up does not fit."""
    best = encode(100)
    if 8 * len(best) <= bits:
        return best
    best, low, high = None, lowest - 1, 100  # `low` fits or is no quality, `high` does not fit
    while high - low > 1:
        middle = (low + high) // 2
        file = encode(middle)
        if 8 * len(file) <= bits:
            best, low = file, middle
        else:
            high = middle
    # Size rises with quality, but not strictly: beyond one quality that is too large, the next may
    # fit again.
    quality = high + 1
    while quality <= min(high + _LOOK_AHEAD, 99):
        file = encode(quality)
        if 8 * len(file) <= bits:
            best, high = file, quality + 1
        quality += 1
    return best


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
