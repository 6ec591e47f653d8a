"""Several autoencoders in one table, if they were measured alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_ae.autoencoder import weights_sha256
from latent_ae.config import Protocol, SourceConfig
from latent_ae.errors import UserError
from latent_ae.evaluation.evaluate import evaluate
from latent_ae.evaluation.result import Evaluation

__all__ = ["compare", "require_comparable"]


def compare(
    models: Sequence[str | Path],
    data: str | Path | SourceConfig | None = None,
    protocol: str | Protocol = "photos256",
    *,
    out: str | Path | None = None,
    **options: Any,
) -> tuple[list[Evaluation], list[Path]]:
    """Reads or measures each, and refuses what cannot stand in one table.

    Args:
        models: folders that `evaluate` wrote, or autoencoders, which need `data`.
        data: the pictures to measure autoencoders on.
        protocol: how to measure them.
        out: where a result folder of each autoencoder goes, by its name; nothing is written when
            left out.
        options: of `evaluate`.

    Returns:
        The evaluations and, of those that have one, their result folders.

    Raises:
        UserError: nothing to compare, an autoencoder without `data`, or other protocols or pixels.
    """
    if not models:
        raise UserError("name at least one result folder or autoencoder to compare")
    results, folders = [], []
    for path, name in zip(map(Path, models), _names(models), strict=True):
        folder = path
        if _is_result(path):
            results.append(Evaluation.load(path))
        else:
            if not path.is_dir():
                raise UserError(f"there is no folder {path} to compare")
            if data is None:
                raise UserError(
                    f"{path} is no result folder; to measure it as an autoencoder give --data"
                )
            folder = None if out is None else Path(out) / name
            results.append(_measure(path, data, protocol, folder, name, options))
        if folder is not None:
            folders.append(folder)
    require_comparable(results)
    return results, folders


def require_comparable(results: Sequence[Evaluation]) -> None:
    """Raises `UserError` unless all were measured by one protocol on the same pixels."""
    first = results[0]
    for other in results[1:]:
        pairs = zip(
            first.protocol.model_dump().items(), other.protocol.model_dump().values(), strict=True
        )
        differ = [f"{key} ({a} and {b})" for (key, a), b in pairs if a != b and key != "name"]
        digests = [result.content["data"]["pixels_sha256"] for result in (first, other)]
        if not differ and digests[0] != digests[1]:
            counts = [result.content["data"]["images"] for result in (first, other)]
            differ = [f"the pixels they were measured on ({counts[0]} and {counts[1]} pictures)"]
        if differ:
            raise UserError(
                f"{first.name} and {other.name} cannot stand in one table, they differ in "
                f"{', '.join(differ)}; measure both alike"
            )


def _is_result(path: Path) -> bool:
    return (path / "evaluation.json").is_file()


def _names(models: Sequence[str | Path]) -> list[str]:
    """The folders' names, with their parents' where these are not enough, else numbered."""
    paths = [Path(model).absolute() for model in models]
    short = Counter(path.name for path in paths)
    names = [p.name if short[p.name] == 1 else f"{p.parent.name}-{p.name}" for p in paths]
    seen = Counter(names)
    return [name if seen[name] == 1 else f"{name}-{i + 1}" for i, name in enumerate(names)]


def _measure(
    model: Path,
    data: Any,
    protocol: str | Protocol,
    folder: Path | None,
    name: str,
    options: dict[str, Any],
) -> Evaluation:
    if folder is not None and _is_result(folder):
        kept = Evaluation.load(folder)
        same = kept.content["model"]["weights_sha256"] == weights_sha256(model)
        where = data.path if isinstance(data, SourceConfig) else str(data)
        whole = options.get("quick") or kept.content["latents"] is not None
        if same and whole and kept.protocol == protocol and kept.content["data"]["path"] == where:
            return kept
    return evaluate(model, data, protocol, out=folder, name=name, **options)
