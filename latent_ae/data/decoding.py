"""From any picture file or array to an upright picture of 8 bits, or to the reason why not."""

from __future__ import annotations

import errno
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from latent_ae.data.bands import Bands

__all__ = [
    "UnreadableFile",
    "UnreadableImage",
    "decode_array",
    "decode_image",
    "to_rgb",
    "upright_size",
]


class UnreadableImage(Exception):
    """The picture cannot be read right; the message is the reason."""


class UnreadableFile(UnreadableImage):
    """The system refuses the file just now, whatever the picture: a mount that is gone, say."""


# What says nothing of the picture. A file that is not there is the data set's own fault.
_SYSTEM = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOTCONN}
_SYSTEM |= {errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENETDOWN, errno.ENETUNREACH}


def decode_image(value: Any, channels: int = 3) -> Image.Image | Bands:
    """Decodes what a `datasets` image column holds when it is not decoded there.

    Args:
        value: a dict with `bytes` or `path`, bytes, a path, or an array or PIL image.
        channels: of the picture wanted: 1 grey, 3 RGB, 4 RGBA; other numbers, and 4 too, may be a
            TIFF of as many pages, each a band.

    Returns:
        A picture of that mode, turned upright by its EXIF orientation; for grey and RGB alpha is
        laid over white.

    Raises:
        UnreadableImage: truncated, no picture, or a kind with no certain reading.
        UnreadableFile: likewise, where another time the same file may be read.
    """
    # Pillow warns of odd metadata and of large pictures; neither changes the pixels.
    with _reasons(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(value) as picture:
            if channels not in (1, 3) and _pages(picture) > 1:
                return _from_pages(picture, channels)
            picture.load()
            return _with_channels(ImageOps.exif_transpose(picture), channels)


def upright_size(value: Any) -> tuple[int, int]:
    """The (width, height) that `decode_image` would give, from the header: nothing is decoded.

    A PNG whose orientation stands behind its pixels is taken as it lies; no camera writes that.

    Args:
        value: as for `decode_image`.

    Raises:
        UnreadableImage: there is no header of a picture.
        UnreadableFile: likewise, where another time the same file may be read.
    """
    with _reasons(), _open(value) as picture:
        width, height = picture.size
        if picture.format == "TIFF":  # Pillow has turned its size already
            return width, height
        # Not the PNG class's own, which decodes the picture to look for an orientation behind it.
        turned = Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


@contextmanager
def _reasons() -> Iterator[None]:
    """Whatever Pillow raises becomes an `UnreadableImage` with the reason."""
    try:
        yield
    except UnreadableImage:
        raise
    except MemoryError as error:
        raise UnreadableFile("there is no memory left to decode a picture") from error
    except OSError as error:  # Pillow's own has no number
        kind = UnreadableFile if error.errno in _SYSTEM else UnreadableImage
        raise kind(f"{type(error).__name__}: {error}") from error
    except Exception as error:  # Pillow's decoders raise nearly every type there is
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def _open(value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise UnreadableImage("no picture in this row")
    if isinstance(value, bytes | bytearray):
        return Image.open(io.BytesIO(value))
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    return Image.open(value)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Converts any of Pillow's modes to RGB without clipping 16-bit data or dropping alpha."""
    mode = picture.mode
    if mode.startswith("I") or mode == "F":
        return _from_deep(picture).convert("RGB")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture if mode == "RGB" else picture.convert("RGB")


def decode_array(value: Any, channels: int, kind: str) -> Image.Image | Bands:
    """A picture of what a `datasets` column of arrays holds.

    Args:
        value: an array or nested lists, of shape (H, W, channels), for one channel also (H, W).
        channels: of the picture wanted.
        kind: of its numbers: `uint8`, or `uint16`, which is scaled to 8 bits as 16-bit grey is.

    Raises:
        UnreadableImage: another shape, or none.
    """
    try:
        pixels = np.asarray(value).astype(kind, copy=False)
    except (ValueError, TypeError) as error:  # rows of different lengths, None
        raise UnreadableImage("no rectangular array in this row") from error
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] != channels or not pixels.size:
        found = " × ".join(map(str, pixels.shape))
        raise UnreadableImage(f"an array of {found} where H × W × {channels} is wanted")
    pixels = np.ascontiguousarray(pixels if kind == "uint8" else _eight_bits(pixels))
    if channels in (1, 3):
        return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    return Bands.of(pixels)


def _with_channels(picture: Image.Image, channels: int) -> Image.Image:
    if channels == 3:
        return to_rgb(picture)
    if channels == 1:
        return to_rgb(picture).convert("L")  # of equal channels exactly that channel
    if channels == 4:
        clear = picture.has_transparency_data
        return (picture if clear else to_rgb(picture)).convert("RGBA")
    raise UnreadableImage(
        f"a picture of mode {picture.mode} where {channels} bands are wanted: only a TIFF of "
        f"{channels} pages or an array has them"
    )


def _pages(picture: Image.Image) -> int:
    return getattr(picture, "n_frames", 1) if picture.format == "TIFF" else 1


def _from_pages(picture: Image.Image, channels: int) -> Bands:
    """The pages of a TIFF, each a grey band of 8 or 16 bits."""
    if (count := _pages(picture)) != channels:
        raise UnreadableImage(f"a TIFF of {count} pages where {channels} bands are wanted")
    bands = []
    for page in range(count):
        picture.seek(page)
        picture.load()
        band = ImageOps.exif_transpose(picture)
        if len(band.getbands()) != 1 or band.mode == "P":
            raise UnreadableImage(f"page {page + 1} is of mode {band.mode}, not one grey band")
        bands.append(to_rgb(band).convert("L"))
    if len({band.size for band in bands}) > 1:
        raise UnreadableImage("the pages of the TIFF differ in size")
    return Bands(bands)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """0 … 65535 to 0 … 255, rounded."""
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _from_deep(picture: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits; `convert` would clip everything above 255 to white."""
    values = np.asarray(picture)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise UnreadableImage(
            f"mode {picture.mode} with values {values.min():g} to {values.max():g} "
            "has no known white"
        )
    return Image.fromarray(_eight_bits(values))
