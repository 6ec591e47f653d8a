"""Fashion-MNIST's files: from gzipped idx to arrays, and to a parquet table with named classes.

The format is that of LeCun et al., "The MNIST database": two zero bytes, the type of the values,
the number of dimensions, each dimension as a big-endian uint32, then the values in C order.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latent_ae.errors import UserError

__all__ = [
    "CLASSES",
    "PARTS",
    "SIDE",
    "disjoint_halves",
    "padded",
    "read_idx",
    "read_part",
    "write_parquet",
]

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PARTS = {"train": "train", "test": "t10k"}  # our names, and the files' own
SIDE = 32  # 28 and a margin of 2, so that the side can be halved five times
UNSIGNED_BYTES = 8  # the idx format's code for its values


def read_idx(path: Path) -> np.ndarray:
    """The array of a gzipped idx file of unsigned bytes.

    Raises:
        UserError: there is no such file, or it is another or a torn one.
    """
    if not path.is_file():
        raise UserError(
            f"there is no {path}: run `apt install dataset-fashion-mnist`, or name by --data the "
            "folder of the four gzipped files that Fashion-MNIST comes in"
        )
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no whole gzip file ({error}): fetch it again") from error
    if len(content) < 4 or content[:3] != bytes([0, 0, UNSIGNED_BYTES]):
        raise UserError(f"{path} is no idx file of unsigned bytes: it begins with {content[:4]!r}")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise UserError(f"{path} ends within its head: fetch it again")
    shape = tuple(int(edge) for edge in np.frombuffer(content[4:start], ">u4"))
    values = np.frombuffer(content, np.uint8, offset=start)
    if len(values) != math.prod(shape):
        raise UserError(
            f"{path} says that it holds {' × '.join(map(str, shape))} values but has "
            f"{len(values)}: fetch it again"
        )
    return values.reshape(shape).copy()  # `frombuffer` gives what nobody may write to


def read_part(data: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, uint8 of shape (N, 28, 28), and their classes, uint8 of shape (N,).

    Raises:
        UserError: the two files cannot be read, or do not belong together.
    """
    stem = PARTS[part]
    pictures = read_idx(data / f"{stem}-images-idx3-ubyte.gz")
    labels = read_idx(data / f"{stem}-labels-idx1-ubyte.gz")
    if pictures.ndim != 3 or max(pictures.shape[1:]) > SIDE or labels.shape != pictures.shape[:1]:
        raise UserError(
            f"the files of {stem} in {data} do not belong together: pictures of shape "
            f"{pictures.shape}, labels of shape {labels.shape}"
        )
    if labels.size == 0 or labels.max() >= len(CLASSES):
        raise UserError(f"the labels of {stem} in {data} are not those of {len(CLASSES)} classes")
    return pictures, labels


def write_parquet(pictures: np.ndarray, labels: np.ndarray, file: Path) -> None:
    """A table of PNGs, padded to `SIDE` in black, and of labels that know their names."""
    import datasets

    if file.exists():
        return
    datasets.disable_progress_bars()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    images = [{"bytes": _png(picture), "path": None} for picture in padded(pictures)]
    rows = datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".tmp")
    rows.to_parquet(aside)
    aside.rename(file)


def padded(pictures: np.ndarray) -> np.ndarray:
    """The pictures in the middle of black ones of `SIDE` pixels, of shape (N, 32, 32)."""
    height, width = pictures.shape[1:]
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    margins = ((0, 0), (top, SIDE - height - top), (left, SIDE - width - left))
    return np.pad(pictures, margins)


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def disjoint_halves(labels: np.ndarray, samples: int) -> list[Tensor]:
    """Rows of two sets of `samples` pictures that share none, sorted by class, as many of each.

    Raises:
        UserError: there are too few pictures, or `samples` is no multiple of the classes.
    """
    each, rest = divmod(samples, len(CLASSES))
    found = [np.flatnonzero(labels == place) for place in range(len(CLASSES))]
    if rest or min(map(len, found)) < 2 * each:
        most = len(CLASSES) * (min(map(len, found)) // 2)
        raise UserError(
            f"--samples {samples}: take a multiple of {len(CLASSES)} up to {most}, half the test "
            "pictures, as the other half is what they are compared with"
        )
    halves = (slice(0, each), slice(each, 2 * each))
    return [torch.from_numpy(np.concatenate([rows[part] for rows in found])) for part in halves]
