"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latent_ae.errors import UserError

__all__ = ["folder_aside", "require_free", "whole_folder"]


def require_free(out: Path) -> None:
    """Raises `UserError` where something is that would be overwritten; an empty folder is not."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; remove it or choose another folder")


@contextmanager
def folder_aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, of which nothing remains."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes its name at the end if all went well."""
    with folder_aside(out) as aside:
        yield aside
        if out.exists():
            out.rmdir()
        aside.rename(out)
