"""A latents folder while it is being made: claimed, resumed, finished."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet
from pydantic import ValidationError

from latent_ae.errors import UserError
from latent_ae.latents.files import FolderLock, sha256_of, write_whole
from latent_ae.latents.format import (
    MANIFEST,
    LatentsManifest,
    read_manifest,
    record_of,
)
from latent_ae.latents.keys import make_keys_unique
from latent_ae.latents.plan import Plan, Unit, describe_difference
from latent_ae.latents.statistics import summary

__all__ = ["Done", "UnfinishedFolder", "added_up"]

PLAN = "unfinished.json"
# Anything else is somebody's, such as webdataset's shard-0.tar.
_OWN = re.compile(
    r"shard-\d{6}(-\d{6})?\.safetensors|index-\d{6}(-\d{6})?\.parquet|manifest\.json"
    r"|unfinished\.json|\.lock|spool-\d{6}(-\d{6})?\.bin|\..+\.tmp|\.nfs.*|\.DS_Store"
)


@dataclass(frozen=True)
class Done:
    """Units that are whole, and the files of a stream that are encoded to their end."""

    units: frozenset[Unit]
    files: frozenset[int] = frozenset()


class UnfinishedFolder:
    """The main process's view of the folder; it holds the lock until `finish` or `release`.

    Args:
        path: the folder, made where there is none.
        plan: what it shall hold.

    Attributes:
        finished: its manifest, if an earlier run of the same plan has finished it.

    Raises:
        UserError: it holds other files, or latents of another plan, or another run writes into it.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, not a folder")
        for file in path.iterdir() if path.exists() else ():
            if not _OWN.fullmatch(file.name):
                raise UserError(f"{path} holds other files ({file.name}); choose an empty folder")
        self.path, self.plan = path, plan
        path.mkdir(parents=True, exist_ok=True)
        self.lock: FolderLock | None = None
        self.finished = self._finished()
        if self.finished is not None and not (path / PLAN).exists():
            return  # nothing to write, so nothing to lock
        self.lock = FolderLock(path, rank=0)
        try:
            self.finished = self._finished()  # another run may have come to its end just now
            if self.finished is None:
                self._begin()
            else:
                self._clean()
        except BaseException:
            self.release()
            raise

    def units(self) -> list[Unit]:
        """The units that are whole, in order."""
        units = (Unit.of_index(file.name) for file in self.path.iterdir())
        return sorted(unit for unit in units if unit is not None)

    def done(self) -> Done:
        """What is whole."""
        units = self.units()
        if self.plan.data.rows is not None:
            return Done(frozenset(units))
        lasts = {u.number: u.part for u in units if record_of(self.path / u.index).last}
        counts = Counter(unit.number for unit in units)
        files = {n for n, last in lasts.items() if last is not None and counts[n] == last + 1}
        return Done(frozenset(units), frozenset(files))

    def finish(self) -> LatentsManifest:
        """Makes the keys unique, adds up the shards, writes the manifest, cleans up."""
        plan, units = self.plan, self.units()
        renamed = make_keys_unique(self.path, units)
        sums = added_up(self.path, units)
        highest = max((shard.highest_label for shard in sums["shards"]), default=-1)
        names = plan.data.label_names
        manifest = LatentsManifest(
            **{name: getattr(plan, name) for name in Plan.model_fields},
            **sums,
            renamed=renamed,
            label_names=names,
            num_classes=max(len(names), highest + 1),
            versions={name: version(name) for name in ("latent_ae", "torch", "diffusers")},
        )
        if not manifest.count:
            reason = _first_reason(self.path, units)
            raise UserError(
                f"not one picture could be encoded: {reason}; when that is mended, remove "
                f"{self.path} and run again"
            )
        content = manifest.model_dump_json(indent=2) + "\n"
        write_whole(self.path / MANIFEST, content.encode())
        self._clean()
        return manifest

    def release(self) -> None:
        """Lets another run in; what is whole stays."""
        if self.lock is not None:
            self.lock.release()

    def _finished(self) -> LatentsManifest | None:
        if not (self.path / MANIFEST).exists():
            return None
        manifest = read_manifest(self.path)
        before = Plan(**{name: getattr(manifest, name) for name in Plan.model_fields})
        if difference := describe_difference(before, self.plan):
            raise UserError(
                f"{self.path} holds finished latents of another kind: {difference}; remove it or "
                "choose another folder"
            )
        return manifest

    def _begin(self) -> None:
        file = self.path / PLAN
        if file.exists():
            try:
                before = Plan.model_validate_json(file.read_text(encoding="utf-8"))
            except (ValidationError, ValueError) as error:
                first = str(error).splitlines()[0]
                raise UserError(f"{file} is damaged ({first}); remove the folder") from error
            if difference := describe_difference(before, self.plan):
                raise UserError(
                    f"{self.path} was begun with {difference}; give the same again, or choose "
                    "another folder"
                )
        elif self.units():
            raise UserError(f"{self.path} holds shards but no {PLAN}; choose an empty folder")
        else:
            write_whole(file, (self.plan.model_dump_json(indent=2) + "\n").encode())
        for file in self.path.glob(".*.tmp"):
            file.unlink()

    def _clean(self) -> None:
        """Leaves what the manifest names, and nothing of the making."""
        for pattern in (PLAN, "spool-*.bin", ".*.tmp"):
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)
        if self.lock is not None:
            self.lock.release(remove=True)


def added_up(folder: Path, units: Sequence[Unit]) -> dict[str, Any]:
    """What the indices say of their shards, and its sums, by their names in the manifest."""
    shards = []
    for unit in units:
        record = record_of(folder / unit.index)
        record.index_sha256 = sha256_of(folder / unit.index)
        shards.append(record)
    return {
        "shards": shards,
        "count": sum(shard.rows for shard in shards),
        "pictures": sum(shard.pictures for shard in shards),
        "skipped": sum(shard.skipped for shard in shards),
        "statistics": summary([shard.moments for shard in shards if shard.moments]),
    }


def _first_reason(folder: Path, units: list[Unit]) -> str:
    for unit in units:
        for row in pyarrow.parquet.read_table(folder / unit.index).to_pylist():
            if row["skipped"] is not None:
                return f"{row['key']}: {row['skipped']}"
    return "there is none"
