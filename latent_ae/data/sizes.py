"""The sizes of all pictures of a source, from their headers: nothing is decoded."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from latent_ae.data.decoding import UnreadableFile, UnreadableImage
from latent_ae.data.samples import Skipped
from latent_ae.data.sources import Source
from latent_ae.errors import UserError

__all__ = ["picture_sizes"]

_CHUNK = 64  # rows a task: a parquet file's pictures come along with their rows
_THREADS = 16  # a header on a network disk is waiting


def picture_sizes(source: Source) -> tuple[np.ndarray, list[Skipped]]:
    """Reads the size of each picture once, and from then on the cache beside those of `datasets`.

    Args:
        source: with random access.

    Returns:
        (width, height) of each row as it is after its EXIF orientation, int32 of shape (N, 2), 0
        where there is no picture to read, and these rows with the reason.

    Raises:
        UserError: the disk fails.
    """
    cache = _cache(source)
    sizes = _cached(cache, len(source.rows))
    known = sizes is not None
    if sizes is None:
        sizes = np.zeros((len(source.rows), 2), np.int32)
    skipped: list[Skipped] = []
    # Those that could not be read are looked at again: for the reason, and it may be gone.
    wanted = np.flatnonzero(sizes.min(axis=1) == 0)
    chunks = [wanted[start : start + _CHUNK] for start in range(0, len(wanted), _CHUNK)]
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        warnings.simplefilter("ignore")  # as when decoding; for all threads, which share filters
        for rows, found in zip(chunks, pool.map(lambda c: _read(source, c), chunks), strict=True):
            sizes[rows] = [(0, 0) if isinstance(item, Skipped) else item for item in found]
            skipped += [item for item in found if isinstance(item, Skipped)]
    if not known:
        _keep(cache, sizes)
    return sizes, skipped


def _read(source: Source, rows: np.ndarray) -> list[tuple[int, int] | Skipped]:
    found: list[tuple[int, int] | Skipped] = []
    for position in rows.tolist():
        row = source.rows[position]
        try:
            found.append(source.picture_size(row))
        except UnreadableFile as error:
            raise UserError(
                f"the size of picture {source.key(row, position)} cannot be read: {error}; start "
                "again when the disk is there"
            ) from error
        except UnreadableImage as error:
            found.append(Skipped(source.key(row, position), str(error)))
    return found


def _cache(source: Source) -> Path:
    """The file for these rows: their fingerprint changes with any file's time, and with filters."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "latent_ae" / f"{source.rows._fingerprint}.npy"


def _cached(cache: Path, rows: int) -> np.ndarray | None:
    try:
        sizes = np.load(cache, allow_pickle=False)
    except (OSError, ValueError):
        return None
    return sizes if sizes.shape == (rows, 2) and sizes.dtype == np.int32 else None


def _keep(cache: Path, sizes: np.ndarray) -> None:
    aside = cache.with_name(f".{cache.name}.{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            np.save(file, sizes)
        aside.replace(cache)
    except OSError:  # a cache that cannot be written only costs the reading again
        aside.unlink(missing_ok=True)
