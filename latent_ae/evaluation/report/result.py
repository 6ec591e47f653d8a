"""A folder that `latent-ae evaluate` wrote, read back and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from pyarrow import types
from pydantic import ValidationError

from latent_ae.errors import UserError
from latent_ae.evaluation.report.schema import Content

__all__ = ["Result", "read_result"]

_NUMBERS = ("psnr", "ssim", "ms_ssim", "lpips", "lpips_vgg")


class Result(Content):
    """What one evaluation found, where it lies, and its numbers picture by picture."""

    folder: Path
    per_image: dict[str, list[Any]]
    title: str
    """The name, made longer where two results share it."""
    style: str
    """CSS classes that give this model its colour everywhere."""

    def file(self, path: str) -> bytes:
        """A file of the folder.

        Raises:
            UserError: it is not there, or lies outside of the folder.
        """
        # A folder may come from a stranger: its report must not carry off other files.
        whole = (self.folder / path).resolve()
        if not whole.is_relative_to(self.folder.resolve()):
            raise _damaged(self.folder, f"it names the file {path!r}, which lies outside of it")
        if not whole.is_file():
            raise _damaged(self.folder, f"its file {path} is missing")
        return whole.read_bytes()


def read_result(folder: str | Path, style: str = "s0") -> Result:
    """Reads the folder of one evaluation.

    Raises:
        UserError: it has no evaluation, or a damaged one.
    """
    folder = Path(folder)
    file = folder / "evaluation.json"
    if not file.is_file():
        raise UserError(
            f"{folder} has no evaluation.json; give a folder that `latent-ae evaluate` wrote"
        )
    try:
        content = Content.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _damaged(folder, f"evaluation.json, {place or 'top'}: {first['msg']}") from error
    except ValueError as error:
        raise _damaged(folder, f"evaluation.json is not JSON ({error})") from error
    per_image = _read_table(folder)
    return Result(
        **dict(content), folder=folder, per_image=per_image, title=content.name, style=style
    )


def _read_table(folder: Path) -> dict[str, list[Any]]:
    file = folder / "per_image.parquet"
    if not file.is_file():
        raise _damaged(folder, f"its file {file.name} is missing")
    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(folder, f"{file.name} cannot be read") from error
    for field in table.schema:
        kind = field.type
        if field.name in _NUMBERS and not (types.is_floating(kind) or types.is_null(kind)):
            raise _damaged(folder, f"{file.name}, {field.name}: {kind} is no floating-point number")
    return table.to_pydict()


def _damaged(folder: Path, why: str) -> UserError:
    return UserError(f"the evaluation {folder} is damaged: {why}; run `latent-ae evaluate` again")
