"""A latents folder looked through to the last byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import track

from latent_ae.errors import UserError
from latent_ae.latents.faults import (
    Codes,
    checked_index,
    index_faults,
    moments_faults,
    tensor_faults,
)
from latent_ae.latents.files import sha256_of
from latent_ae.latents.format import (
    MANIFEST,
    LatentsManifest,
    ShardRecord,
    picture_starts,
    read_manifest,
)
from latent_ae.latents.keys import key_hashes
from latent_ae.latents.rewrite import read_columns
from latent_ae.latents.shards import MappedShard
from latent_ae.latents.statistics import summary

__all__ = ["verify"]


def verify(folder: str | Path, *, console: Console | None = None) -> list[str]:
    """Checks every hash, value, key and sum of a latents folder, a shard in memory at a time.

    Args:
        folder: a finished latents folder, of this version or one before.
        console: where progress is shown; nothing is, when left out.

    Returns:
        A sentence for each fault, the file first; none when all is well.

    Raises:
        UserError: the manifest is missing or damaged.
    """
    check = _Check(Path(folder), read_manifest(folder))
    shards = check.manifest.shards
    for record in track(shards, "verify", console=console, disable=console is None):
        check.shard(record)
    check.keys()
    check.totals()
    check.files()
    return check.faults


class _Check:
    """The faults found so far, and what has to be known of all shards together."""

    def __init__(self, folder: Path, manifest: LatentsManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.faults: list[str] = []
        self._hashes: dict[str, np.ndarray] = {}  # of the pictures' keys, by index

    def shard(self, record: ShardRecord) -> None:
        """Checks its two files; the one as far as it goes without the other."""
        table = self._index(record)
        known = len(self.faults)
        if not self._is_there(record.file, record.sha256):
            return
        as_written = len(self.faults) == known
        try:
            shard = MappedShard(self.folder / record.file)
        except UserError as error:
            self._say(record.file, f"cannot be read: {error.__cause__}")
            return
        codes = Codes(table, self.manifest, record)
        for fault in tensor_faults(shard, codes):
            self._say(record.file, fault)
        if as_written and len(self.faults) == known:  # what is changed has other sums anyway
            for fault in moments_faults(shard, codes):
                self._say(record.file, fault)

    def keys(self) -> None:
        """Checks that each stands for one picture, which version 1 did not promise."""
        if self.manifest.version == 1:
            return
        every = np.concatenate([*self._hashes.values(), np.empty(0, np.uint64)])
        values, counts = np.unique(every, return_counts=True)
        suspects = values[counts > 1]
        seen: dict[str, str] = {}
        for index, hashes in self._hashes.items():
            places = np.flatnonzero(np.isin(hashes, suspects))
            if not len(places):
                continue
            keys = _of_pictures(read_columns(self.folder, index, ("key", "position")))
            for key in keys.take(pa.array(places)).to_pylist():
                if key in seen:
                    self._say(index, f"key {key!r} is that of another picture in {seen[key]} too")
                seen.setdefault(key, index)

    def totals(self) -> None:
        """Checks that the manifest is the sum of its shards; version 1 knew fewer of these."""
        manifest, shards = self.manifest, self.manifest.shards
        sums = {"count": sum(shard.rows for shard in shards)}
        classes = len(manifest.label_names)
        if manifest.version > 1:
            sums["pictures"] = sum(shard.pictures for shard in shards)
            sums["skipped"] = sum(shard.skipped for shard in shards)
            classes = max([classes, *(shard.highest_label + 1 for shard in shards)])
            wanted = summary([shard.moments for shard in shards if shard.moments])
            for name in sorted(wanted.keys() | manifest.statistics.keys()):
                if wanted.get(name) != manifest.statistics.get(name):
                    self._say(MANIFEST, f"statistics.{name} is not what the shards add up to")
        for name, total in sums.items():
            if (said := getattr(manifest, name)) != total:
                self._say(MANIFEST, f"{name} is {said}, the shards add up to {total}")
        if manifest.num_classes < classes:
            self._say(MANIFEST, f"num_classes is {manifest.num_classes}, there are {classes}")

    def files(self) -> None:
        """Checks that the manifest names every file, once."""
        names = [name for record in self.manifest.shards for name in (record.file, record.index)]
        known = {MANIFEST}
        for name in names:
            if name in known:
                self._say(MANIFEST, f"{name} is named more than once")
            known.add(name)
        for path in sorted(self.folder.iterdir()):
            if path.name not in known:
                self._say(path.name, "the manifest does not name it")

    def _say(self, file: str, fault: str) -> None:
        self.faults.append(f"{file}: {fault}")

    def _is_there(self, name: str, sha256: str) -> bool:
        """Whether there is such a file; says so if not, or if it is another than was written."""
        file = self.folder / name
        if not file.is_file():
            self._say(name, "the file is missing")
            return False
        if sha256 and (found := sha256_of(file)) != sha256:
            self._say(name, f"its sha256 is {found[:12]}…, the manifest says {sha256[:12]}…")
        return True

    def _index(self, record: ShardRecord) -> pa.Table | None:
        """A shard's index, checked; None where it cannot be worked with."""
        if not self._is_there(record.index, record.index_sha256):
            return None
        try:
            table = checked_index(self.folder / record.index, self.manifest)
        except UserError as error:
            self._say(record.index, str(error))
            return None
        for fault in index_faults(table, self.folder, Codes(table, self.manifest, record)):
            self._say(record.index, fault)
        if self.manifest.version > 1:
            self._hashes[record.index] = key_hashes(_of_pictures(table))
        return table


def _of_pictures(table: pa.Table) -> pa.ChunkedArray:
    """A key for each picture, not for each of its codes."""
    return table["key"].take(pa.array(picture_starts(table)))
