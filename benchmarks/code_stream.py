"""How near the coded size of an evaluation comes to the entropy of codes, and how fast it is.

    python benchmarks/code_stream.py [--patch 4]

Codes of real photographs, those of scikit-image: the mean colour of each square patch, red, green
and blue each rounded to one of a few levels, so that the codebook has levels³ entries. Beside it
stand what two general compressors make of the same numbers, little-endian in as few bytes as they
need, picture after picture. These, unlike the coder, can also learn from neighbours. The streams
are read back and compared. Seconds are of the better of two rounds, a million codes.
"""

import lzma
import time
import zlib
from typing import Annotated

import numpy as np
import scipy.stats
import torch
import typer
from measuring import last_lines, record
from skimage import data

from latent_ae.evaluation.code_stream import read_codes, write_codes

NAMES = ("astronaut", "cat", "chelsea", "coffee", "colorwheel", "hubble_deep_field", "rocket")
LEVELS = (4, 8, 16, 32, 64)


def colours(patch):
    """Mean colours in [0, 1) of all patches, of shape (N, 3)."""
    found = []
    for name in NAMES:
        picture = getattr(data, name)()[..., :3].astype(np.float64) / 256
        height, width = (side // patch * patch for side in picture.shape[:2])
        cut = picture[:height, :width].reshape(height // patch, patch, width // patch, patch, 3)
        found.append(cut.mean((1, 3)).reshape(-1, 3))
    return np.concatenate(found)


def best_of_two(work):
    """The result of a call, and the seconds of the quicker of two."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
    return result, min(seconds)


def row_of(values, levels):
    size = levels**3
    digits = (values * levels).astype(np.int64)
    numbers = (digits @ [1, levels, levels**2])[None]
    stream, writing = best_of_two(lambda: write_codes(numbers, size))
    back, reading = best_of_two(lambda: read_codes(stream, numbers.shape, size))
    assert np.array_equal(back, numbers)
    plain = numbers.astype(np.min_scalar_type(size - 1)).tobytes()
    counts = np.unique(numbers, return_counts=True)[1]
    bits = {
        "fixed length": np.log2(size),
        "entropy": scipy.stats.entropy(counts, base=2),
        "coded": 8 * stream.nbytes / numbers.size,
        "deflate": 8 * len(zlib.compress(plain, 9)) / numbers.size,
        "xz": 8 * len(lzma.compress(plain, preset=9)) / numbers.size,
    }
    cells = [f"{size:,}", f"{len(counts):,}", *(f"{value:.2f}" for value in bits.values())]
    cells += [f"{1e6 * seconds / numbers.size:.2f}" for seconds in (writing, reading)]
    return f"| {' | '.join(cells)} |"


def main(patch: Annotated[int, typer.Option(help="Side of a patch in pixels.")] = 4):
    values = colours(patch)
    print(f"{len(values):,} codes, bits of each\n")
    print(
        "| entries | used | fixed length | entropy | coded | deflate | xz | s to write | to read |"
    )
    print("|-|-|-|-|-|-|-|-|-|")
    for levels in LEVELS:
        print(row_of(values, levels))
    print(last_lines(record(torch.device("cpu"), ("constriction", "numpy", "scikit-image"))))


if __name__ == "__main__":
    typer.run(main)
