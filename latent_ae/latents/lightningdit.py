"""To and from the folders of LightningDiT (https://github.com/hustvl/LightningDiT)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor

from latent_ae.errors import UserError
from latent_ae.latents.dataset import LatentDataset
from latent_ae.latents.files import write_whole
from latent_ae.latents.foreign import (
    SHARD_BYTES,
    ForeignLatents,
    Picture,
    check_exportable,
    check_finite,
    import_latents,
    whole,
)
from latent_ae.latents.format import LatentsManifest
from latent_ae.latents.shards import MappedShard
from latent_ae.latents.statistics import Moments, combine

__all__ = ["export_lightningdit", "import_lightningdit"]

_FILE_ROWS = 10_000  # pictures


def import_lightningdit(
    source: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "float16",
    shard_bytes: int = SHARD_BYTES,
) -> LatentsManifest:
    """Makes a latents folder from the files that LightningDiT's `extract_features.py` writes.

    They hold one draw of the posterior for each picture and one for its mirror image, raw: that is
    stored as two codes of kind `mode`, and no reading draws anew. What its sampler repeats so that
    all processes have equally many pictures stays repeated; `latents_stats.pt` is not read.
    Nothing in the files says whose latents they hold: that `model` has made them cannot be
    checked, but for the number of channels.

    Args:
        source: the folder of safetensors files.
        model: the autoencoder's folder.
        out: the latents folder.
        dtype: of what is stored: `float16`, `bfloat16` or `float32`.
        shard_bytes: what a shard shall have at most.

    Returns:
        The manifest.

    Raises:
        UserError: a file is damaged, the autoencoder makes no such latents, or `out` is not empty.
    """
    source = Path(source)
    files = sorted(source.glob("*.safetensors"))  # the order of its own reader
    shape: tuple[int, ...] | None = None
    keys: list[str] = []
    for file in files:
        found = _opened(file, shape).shape("latents")
        shape = found[1:]
        keys += [f"{file.name}:{row}" for row in range(found[0])]
    if not keys or shape is None:
        raise UserError(f"{source} holds no latents: no row of a .safetensors file is in it")
    pictures = (picture for file in files for picture in _pictures(file, shape))
    foreign = ForeignLatents("lightningdit", source, "mode", True, shape, keys, pictures)
    return import_latents(foreign, model, out, dtype, shard_bytes)


def export_lightningdit(folder: str | Path, out: str | Path, *, seed: int = 0) -> int:
    """Writes the files that LightningDiT's `ImgLatentDataset` reads, from a latents folder.

    One draw of the posterior for each code, raw, or the mode where there is no posterior. The
    statistics beside them are those of all draws, in the place of the ones that its reader would
    estimate from at most 10,000.

    Args:
        folder: the latents folder, encoded with `flip`: the mirror image of a picture's latents is
            not the latents of its mirror image.
        out: the folder of safetensors files.
        seed: of the draws.

    Returns:
        How many pictures, and crops of such, were written.

    Raises:
        UserError: the folder holds no mirror images, indices or several sizes, a label is missing,
            or `out` is not empty.
    """
    manifest = check_exportable(folder, ("moments", "mode"), "LightningDiT")
    if not manifest.preprocessing.flip:
        raise UserError(
            f"{folder} holds no mirror images, which LightningDiT needs; encode with flip"
        )
    places = ("position", "crop_left", "crop_top")
    dataset = LatentDataset(folder, scale=False, seed=seed, columns=("label", "flipped", *places))
    labels = _labels(dataset, places)
    parts = []
    with whole(Path(out)) as aside:
        for number, start in enumerate(range(0, len(labels), _FILE_ROWS)):
            some = labels[start : start + _FILE_ROWS]
            first, end = 2 * start, 2 * (start + len(some))
            tensors = {
                "latents": _drawn(dataset, range(first, end, 2)),
                "latents_flip": _drawn(dataset, range(first + 1, end, 2)),
                "labels": some,
            }
            _write(aside / f"latents_rank00_shard{number:03d}.safetensors", tensors)
            if (moments := Moments.of([tensors["latents"]], [])) is not None:
                parts.append(moments)
        statistics = _statistics(combine(parts))
        write_whole(aside / "latents_stats.pt", lambda path: torch.save(statistics, path))
    return len(labels)


def _opened(file: Path, shape: tuple[int, ...] | None) -> MappedShard:
    """A file with all its tensors, of latents of this shape (None: of any)."""
    shard = MappedShard(file)
    for name in ("latents", "latents_flip", "labels"):
        if name not in shard:
            raise UserError(f"{file} has no tensor {name!r}; it has {', '.join(shard.names())}")
    latents, mirrored, labels = (shard.shape(n) for n in ("latents", "latents_flip", "labels"))
    if len(latents) != 4 or mirrored != latents or labels != latents[:1]:
        raise UserError(
            f"{file} holds latents of shape {latents}, latents_flip {mirrored}, labels {labels}; "
            "(N, c, h, w) twice and (N,) are wanted"
        )
    if shape is not None and latents[1:] != shape:
        raise UserError(f"{file} holds latents of shape {latents[1:]}, those before it {shape}")
    floats = [shard.rows(n, slice(0)).is_floating_point() for n in ("latents", "latents_flip")]
    if not all(floats) or shard.rows("labels", slice(0)).is_floating_point():
        raise UserError(f"{file} holds latents that are no floats, or labels that are")
    return shard


def _pictures(file: Path, shape: tuple[int, ...]) -> Iterator[Picture]:
    shard = _opened(file, shape)
    for row in range(shard.shape("labels")[0]):
        label = int(shard.rows("labels", row))
        if label < 0:
            raise UserError(f"{file}: row {row} has the label {label}")
        found = []
        for name in ("latents", "latents_flip"):
            latents = shard.rows(name, row).float()
            found.append({"mean": check_finite(latents, f"{file}: row {row} of {name}")})
        yield Picture(f"{file.name}:{row}", label, found)


def _labels(dataset: LatentDataset, places: tuple[str, ...]) -> Tensor:
    """The pictures' labels, once it is known that each code is followed by its mirror image's."""
    codes = np.arange(len(dataset))
    plain, mirrored = (dataset.index.table.take(pa.array(codes[k::2])) for k in (0, 1))
    alike = len(codes) % 2 == 0 and all(plain[n].equals(mirrored[n]) for n in places)
    flipped = [part["flipped"].to_numpy().astype(bool) for part in (plain, mirrored)]
    if not alike or flipped[0].any() or not flipped[1].all():
        raise UserError(
            f"{dataset.folder} has a picture without its mirror image, or the reverse: a code was "
            "skipped; encode again in another dtype"
        )
    if missing := plain["label"].null_count:
        raise UserError(
            f"{dataset.folder} has {missing} pictures without a label, which LightningDiT needs"
        )
    return torch.from_numpy(plain["label"].to_numpy().astype(np.int64))


def _drawn(dataset: LatentDataset, codes: range) -> Tensor:
    latents = torch.empty((len(codes), *dataset.manifest.latent_shape))
    for place, code in enumerate(codes):
        latents[place] = dataset[code]["latents"]
    return latents


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    latents = tensors["latents"]
    about = {
        "total_size": str(len(latents)),
        "dtype": str(latents.dtype),
        "device": str(latents.device),
    }
    write_whole(file, lambda path: save_file(tensors, path, about))


def _statistics(moments: Moments) -> dict[str, Tensor]:
    """Mean and unbiased standard deviation of each channel, each of shape (1, c, 1, 1)."""
    variance = [squares / max(moments.elements - 1, 1) for squares in moments.squares]
    columns = {"mean": moments.mean, "std": [v**0.5 for v in variance]}
    return {name: torch.tensor(values).view(1, -1, 1, 1) for name, values in columns.items()}
