"""Latents folders joined, and one divided."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from latent_ae.errors import UserError
from latent_ae.latents.files import sha256_of, write_whole
from latent_ae.latents.foreign import whole
from latent_ae.latents.format import (
    AutoencoderRecord,
    DataRecord,
    LatentsManifest,
    ShardRecord,
    picture_starts,
    read_manifest,
)
from latent_ae.latents.keys import key_hashes, make_keys_unique
from latent_ae.latents.part import Part
from latent_ae.latents.plan import Unit
from latent_ae.latents.rewrite import (
    check_hash,
    finish_folder,
    kept_columns,
    read_columns,
    renumbered,
    whole_index,
)
from latent_ae.latents.shards import MappedShard
from latent_ae.latents.statistics import Moments
from latent_ae.latents.writer import write_index

__all__ = ["merge", "split"]

# What version 2 did not note; the weights are compared too.
_UNTOLD = {"autoencoder.codebook_size", "autoencoder.codes", "autoencoder.codebook_sha256"}
_TOLERANCE = 1e-6  # of a sum of shares such as a third, written with a few digits


class _Source(NamedTuple):
    folder: Path
    manifest: LatentsManifest


def merge(folders: Sequence[str | Path], out: str | Path) -> LatentsManifest:
    """Joins folders that one autoencoder made in one way, without a copy of their shards.

    Shards are hard links where the file system has such. A picture's `position` becomes its
    running number. A key that several folders have gets its folder's name before it, as in
    `train/cat.png`; what is then still named alike gets `#` and its position, as from `encode`. The
    manifest's `data` has the source `merged`, the folders as its path and the number of all
    pictures; its `renamed` adds what is renamed here to the folders' own; the seed of the crops is
    the first folder's.

    Args:
        folders: two or more finished latents folders, of this version or one before.
        out: the folder to make.

    Returns:
        The manifest.

    Raises:
        UserError: the folders differ in the autoencoder's weights, scaling or codebook, the
            preprocessing (but for its seed), what is stored, the labels' names or the columns; one
            is damaged, or `out` is not empty.
    """
    sources = [_Source(Path(folder), read_manifest(folder)) for folder in folders]
    _check_mergeable(sources, Path(out))
    before = [_source_hashes(source) for source in sources]
    found, times = np.unique(np.concatenate([np.unique(own) for own in before]), return_counts=True)
    shared = found[times > 1]
    with whole(Path(out)) as aside:
        units: list[Unit] = []
        pictures = 0
        for source in sources:
            for record in source.manifest.shards:
                table = renumbered(whole_index(*source, record), pictures)
                pictures += len(picture_starts(table))
                units.append(Unit(len(units)))
                _link(source.folder / record.file, aside / units[-1].shard)
                table = _prefixed(table, source.folder.resolve().name, shared)
                sha256 = record.sha256 or sha256_of(source.folder / record.file)
                write_index(aside, units[-1], table, sha256, _moments_of(source, record))
        make_keys_unique(aside, units)
        after = _written_hashes(aside, units)
        changes = _merged(sources, pictures)
        changes["renamed"] += int((after != np.concatenate(before)).sum())
        return finish_folder(aside, units, sources[0].manifest, **changes)


def split(
    folder: str | Path, shares: Mapping[str, float], *, seed: int = 0
) -> dict[str, LatentsManifest]:
    """Divides a folder's pictures at random into new folders, all codes of a picture together.

    Where a picture goes depends on its key, the seed and the shares alone: not on the order, nor
    on what else is there. A picture's `position` becomes its running number in its part. The
    manifest's `data` has the source `split`, the divided folder as its path and the part's name as
    its split; its `num_classes` is the whole's.

    Args:
        folder: a finished latents folder, of this version or one before.
        shares: of each part's folder, its share of the pictures; together 1.
        seed: of the division.

    Returns:
        The manifest of each part.

    Raises:
        UserError: shares that are not positive or do not add up to 1, a part without a code, a
            part's folder that is not empty or lies in `folder` or another part's, or damage.
    """
    source = _Source(Path(folder), read_manifest(folder))
    _check_shares(shares, source.folder)
    bounds = list(itertools.accumulate(shares.values()))[:-1]
    with ExitStack() as stack:
        parts = [Part(stack.enter_context(whole(Path(out))), *source) for out in shares]
        for record in source.manifest.shards:
            # Numbered before they are divided: what is between two pictures may go.
            table = renumbered(whole_index(*source, record), 0)
            shard = MappedShard(source.folder / record.file)
            check_hash(source.folder, record.file, record.sha256)
            keys = table["key"].take(pa.array(picture_starts(table))).to_pylist()
            chosen = np.searchsorted(bounds, [_place(seed, key) for key in keys], side="right")
            of_row = chosen[table["position"].to_numpy()]
            for number, part in enumerate(parts):
                part.add(table.filter(pa.array(of_row == number)), shard)
        return {out: part.finish(Path(out).name) for out, part in zip(shares, parts, strict=True)}


def _source_hashes(source: _Source) -> np.ndarray:
    """Of the key of each picture, in order."""
    found = [np.empty(0, np.uint64)]
    for record in source.manifest.shards:
        table = whole_index(*source, record)
        found.append(key_hashes(table["key"].take(pa.array(picture_starts(table)))))
    return np.concatenate(found)


def _written_hashes(folder: Path, units: list[Unit]) -> np.ndarray:
    """The same of what has been written."""
    found = [np.empty(0, np.uint64)]
    for unit in units:
        table = read_columns(folder, unit.index, ("key", "position"))
        found.append(key_hashes(table["key"].take(pa.array(picture_starts(table)))))
    return np.concatenate(found)


def _prefixed(table: pa.Table, name: str, shared: np.ndarray) -> pa.Table:
    """The folder's name before each key that other folders have too."""
    alike = np.isin(key_hashes(table["key"]), shared)
    if not alike.any():
        return table
    keys = table["key"].to_pylist()
    keys = [f"{name}/{key}" if other else key for key, other in zip(keys, alike, strict=True)]
    place = table.schema.get_field_index("key")
    return table.set_column(place, "key", pa.array(keys, pa.string()))


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file.resolve(), to)
    except FileNotFoundError as error:
        raise UserError(f"{file.parent} is damaged: {file.name} is missing") from error
    except OSError:  # another file system, somebody else's file, or no links here
        write_whole(to, lambda aside: shutil.copyfile(file, aside))


def _moments_of(source: _Source, record: ShardRecord) -> Moments | None:
    """What the record says; of version 1, which said nothing, what the shard says."""
    if record.moments is not None or source.manifest.version != 1:
        return record.moments
    shard = MappedShard(source.folder / record.file)
    return Moments.of(*([shard.rows(name, slice(None))] for name in ("mean", "logvar")))


def _place(seed: int, key: str) -> float:
    """A number in [0, 1) that a seed and a key have for ever."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)  # 48 bits: no rounding up to 1


def _check_shares(shares: Mapping[str, float], folder: Path) -> None:
    if not shares or not all(share > 0 for share in shares.values()):
        raise UserError("every part needs a share above 0")
    if abs(total := math.fsum(shares.values()) - 1) > _TOLERANCE:
        raise UserError(f"the shares add up to {total + 1:g}; they have to be 1 together")
    paths = [Path(out).resolve() for out in shares]
    if len(set(paths)) != len(paths):
        raise UserError("two parts have the same folder; give each its own")
    for path in paths:
        if inside := [p for p in (folder.resolve(), *paths) if p in path.parents]:
            raise UserError(f"{path} lies in {inside[0]}; choose another folder")


def _check_mergeable(sources: list[_Source], out: Path) -> None:
    paths = [source.folder.resolve() for source in sources]
    if len(set(paths)) < 2 or len(set(paths)) != len(paths):
        raise UserError("merging needs two or more folders, each of them once")
    if inside := [path for path in paths if path in out.resolve().parents]:
        raise UserError(f"{out} lies in {inside[0]}; choose another folder")
    first, *others = sources
    wanted = _comparable(first)
    for other in others:
        for name, value in _comparable(other).items():
            if name in _UNTOLD and not (value and wanted[name]):
                continue
            if value != wanted[name]:
                raise UserError(
                    f"{other.folder} cannot be merged with {first.folder}: {name} is {value!r}, "
                    f"not {wanted[name]!r}"
                )


def _comparable(source: _Source) -> dict[str, Any]:
    """What has to be the same in all folders, by its name in the manifest."""
    manifest = source.manifest
    parts = {
        "autoencoder": manifest.autoencoder.model_dump(
            exclude={"path", "downsampling", "channels"}  # version 1 did not note the last two
        ),
        "preprocessing": manifest.preprocessing.model_dump(exclude={"seed"}),
        "storage": manifest.storage.model_dump(exclude={"shard_rows"}),
    }
    found = {f"{part}.{key}": value for part, keys in parts.items() for key, value in keys.items()}
    found |= {"label_names": manifest.label_names, "latent_shapes": manifest.latent_shapes}
    return found | {"kept columns": kept_columns(*source)}


def _how_much(record: AutoencoderRecord) -> tuple[bool, bool]:
    """How much a record of the same autoencoder says: the older the version, the less."""
    return record.downsampling > 0, record.codebook_size > 0


def _merged(sources: list[_Source], pictures: int) -> dict[str, Any]:
    """What the manifest of several says in other words than the first of them."""
    manifests = [source.manifest for source in sources]
    first = manifests[0]
    columns = {tuple(manifest.data.columns) for manifest in manifests}
    versions: dict[str, list[str]] = {}
    for manifest in manifests:
        for name, number in manifest.versions.items():
            versions.setdefault(name, []).append(number)
    return {
        "autoencoder": max((m.autoencoder for m in manifests), key=_how_much),
        "data": DataRecord(
            source="merged",
            path=", ".join(str(source.folder.resolve()) for source in sources),
            rows=pictures,
            label_names=first.label_names,
            columns=first.data.columns if len(columns) == 1 else [],
        ),
        "storage": first.storage.model_copy(
            update={"shard_rows": max(manifest.storage.shard_rows for manifest in manifests)}
        ),
        "renamed": sum(manifest.renamed for manifest in manifests),
        "num_classes": max(manifest.num_classes for manifest in manifests),
        "versions": {name: ", ".join(dict.fromkeys(known)) for name, known in versions.items()},
    }
