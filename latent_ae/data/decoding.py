"""From the bytes of any picture file to upright 8-bit RGB, or to the reason why not."""

from __future__ import annotations

import errno
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

__all__ = ["UnreadableFile", "UnreadableImage", "decode_image", "to_rgb", "upright_size"]


class UnreadableImage(Exception):
    """The picture cannot be read right; the message is the reason."""


class UnreadableFile(UnreadableImage):
    """The system refuses the file just now, whatever the picture: a mount that is gone, say."""


# What says nothing of the picture. A file that is not there is the data set's own fault.
_SYSTEM = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOTCONN}
_SYSTEM |= {errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENETDOWN, errno.ENETUNREACH}


def decode_image(value: Any) -> Image.Image:
    """Decodes what a `datasets` image column holds when it is not decoded there.

    Args:
        value: a dict with `bytes` or `path`, bytes, a path, or an array or PIL image.

    Returns:
        An RGB picture, turned upright by its EXIF orientation, alpha laid over white.

    Raises:
        UnreadableImage: truncated, no picture, or a kind with no certain reading.
        UnreadableFile: likewise, where another time the same file may be read.
    """
    # Pillow warns of odd metadata and of large pictures; neither changes the pixels.
    with _reasons(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(value) as picture:
            picture.load()
            return to_rgb(ImageOps.exif_transpose(picture))


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


def _from_deep(picture: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits; `convert` would clip everything above 255 to white."""
    values = np.asarray(picture)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise UnreadableImage(
            f"mode {picture.mode} with values {values.min():g} to {values.max():g} "
            "has no known white"
        )
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
