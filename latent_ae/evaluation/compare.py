"""Several autoencoders in one table, if they were measured alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_ae.autoencoder import weights_sha256
from latent_ae.config import Protocol, SourceConfig
from latent_ae.config_file import load_protocol
from latent_ae.data import source_of
from latent_ae.errors import UserError
from latent_ae.evaluation.evaluate import evaluate
from latent_ae.evaluation.measurement import REFERENCES
from latent_ae.evaluation.result import Evaluation, what_is_asked

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
    protocol = protocol if isinstance(protocol, Protocol) else load_protocol(protocol)
    paths, names = [Path(model) for model in models], _names(models)
    stored = {path: Evaluation.load(path) for path in paths if _is_result(path)}
    for path in paths:
        if path not in stored and not path.is_dir():
            raise UserError(f"there is no folder {path} to compare")
        if path not in stored and data is None:
            raise UserError(
                f"{path} is no result folder; to measure it as an autoencoder give --data"
            )
    if stored:  # better known before the work
        require_comparable(list(stored.values()))
        if len(stored) < len(paths):
            _require_same_protocol(next(iter(stored.values())), protocol, "what is to be measured")
    results, folders = [], []
    for path, name in zip(paths, names, strict=True):
        folder = path if path in stored or out is None else Path(out) / name
        if path not in stored:
            where = None if out is None else folder
            stored[path] = _measure(path, data, protocol, where, name, options)
        results.append(stored[path])
        if _is_result(folder):
            folders.append(folder)
    require_comparable(results)
    return results, folders


def require_comparable(results: Sequence[Evaluation]) -> None:
    """Raises `UserError` unless all were measured by one protocol on the same pixels."""
    first = results[0]
    for other in results[1:]:
        _require_same_protocol(first, other.protocol, other.name)
        pair, differ = (first.content, other.content), ""
        networks = [(content["frechet"] or {}).get("network") for content in pair]
        weights = [content["asked"]["weights"] for content in pair]
        if networks[0] != networks[1] or weights[0] != weights[1]:
            differ = "the networks or weights of LPIPS or the Fréchet distance"
        elif pair[0]["data"]["pixels_sha256"] != pair[1]["data"]["pixels_sha256"]:
            counts = [content["data"]["images"] for content in pair]
            differ = f"the pixels they were measured on ({counts[0]} and {counts[1]} pictures)"
        if differ:
            raise UserError(
                f"{first.name} and {other.name} cannot stand in one table, they differ in "
                f"{differ}; measure both alike"
            )


def _require_same_protocol(first: Evaluation, protocol: Protocol, other: str) -> None:
    pairs = zip(first.protocol.model_dump().items(), protocol.model_dump().values(), strict=True)
    differ = [f"{key} ({a} and {b})" for (key, a), b in pairs if a != b and key != "name"]
    if differ:
        raise UserError(
            f"{first.name} and {other} cannot stand in one table, they differ in "
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
    protocol: Protocol,
    folder: Path | None,
    name: str,
    options: dict[str, Any],
) -> Evaluation:
    if folder is not None and _is_result(folder):
        kept = Evaluation.load(folder)
        asked = what_is_asked(
            data if isinstance(data, SourceConfig) else source_of(data),
            options.get("quick", False),
            options.get("references", REFERENCES),
            options.get("frechet_weights"),
            options.get("lpips_weights"),
        )
        same = kept.content["model"]["weights_sha256"] == weights_sha256(model)
        if same and kept.protocol == protocol and kept.content["asked"] == asked:
            return kept
    return evaluate(model, data, protocol, out=folder, name=name, **options)
