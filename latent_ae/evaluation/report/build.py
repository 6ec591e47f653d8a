"""Writes the report: reads results, fills the page, inlines everything it shows."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from latent_ae.evaluation.report import figures, numbers
from latent_ae.evaluation.report.inline import Inliner
from latent_ae.evaluation.report.paired import paired
from latent_ae.evaluation.report.result import Result, read_result
from latent_ae.evaluation.report.schema import Picture
from latent_ae.evaluation.report.tables import METRICS, reconstruction_table

__all__ = ["write_report"]

_HERE = Path(__file__).parent
_COLOURS = 6

T = TypeVar("T")


def write_report(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Writes one HTML file, which needs no other, about one evaluation or several side by side.

    Args:
        folders: what `latent-ae evaluate` wrote, measured by one protocol on the same pictures.
        out: the file.

    Raises:
        UserError: a folder has no evaluation, or a damaged one.
    """
    results = [read_result(folder, _style(place)) for place, folder in enumerate(folders)]
    page = _page(_with_titles(results))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(out.name + ".tmp")
    aside.write_text(page, encoding="utf-8")
    aside.replace(out)
    return out


def _style(place: int) -> str:
    return f"s{place % _COLOURS}" + (" dashed" if place >= _COLOURS else "")


def _with_titles(results: list[Result]) -> list[Result]:
    """Tells models of one name apart by their folders, and those of one folder name by number."""
    names = Counter(result.name for result in results)
    longer = {
        place: f"{result.name} ({result.folder.name})"
        for place, result in enumerate(results)
        if names[result.name] > 1
    }
    repeated = Counter(longer.values())
    return [
        result.model_copy(
            update={"title": title if repeated[title] < 2 else f"{title} {place + 1}"}
        )
        for place, result in enumerate(results)
        for title in [longer.get(place, result.name)]
    ]


def _page(results: list[Result]) -> str:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        fixed=numbers.fixed,
        significant=numbers.significant,
        count=numbers.count,
        short=numbers.short,
        percent=numbers.percent,
        metrics=_metrics,
    )
    script = (_HERE / "script.js").read_text(encoding="utf-8")
    # The page says itself that nothing may be fetched and that no other script may run.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    inliner = Inliner()
    return environment.get_template("page.html").render(
        results=results,
        first=results[0],
        several=len(results) > 1,
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        table=reconstruction_table(results),
        paired=paired(results),
        shown=_side_by_side(results, lambda one: one.pictures.shown, lambda part: part.key),
        priors=_side_by_side(results, lambda one: one.pictures.prior, lambda part: part.title),
        interpolations=_side_by_side(
            results, lambda one: one.pictures.interpolations, lambda part: " to ".join(part.keys)
        ),
        inliner=inliner,
        figures=figures,
        facts=_facts(results[0]),
        transforms=_transforms(results),
    )


def _metrics(picture: Picture) -> str:
    """The metrics of a picture in a line."""
    parts = []
    for name, value in picture.metrics.items():
        column = METRICS.get(name)
        title = name if column is None else column.title
        if name == "lpips_vgg":
            title = "LPIPS vgg"
        parts.append(f"{title} {numbers.fixed(value, 2 if name == 'psnr' else 3)}")
    return " · ".join(parts)


def _side_by_side(
    results: Sequence[Result], parts: Callable[[Result], Sequence[T]], name: Callable[[T], str]
) -> list[tuple[str, list[tuple[Result, T]]]]:
    """Parts of one name together, each with the model it is of."""
    found: dict[str, list[tuple[Result, T]]] = {}
    for result in results:
        for part in parts(result):
            found.setdefault(name(part), []).append((result, part))
    return list(found.items())


def _transforms(results: Sequence[Result]) -> list[tuple[str, list[Any]]]:
    """The transforms, each with what every model did under it (None where it was not tried)."""
    tried = [
        {one.transform: one for one in result.probes.equivariance} if result.probes else {}
        for result in results
    ]
    names = dict.fromkeys(name for one in tried for name in one)
    return [(name, [one.get(name) for one in tried]) for name in names]


def _facts(result: Result) -> list[tuple[str, list[tuple[str, str]]]]:
    """How it was measured, key by key."""
    protocol = result.protocol.model_dump(mode="json")
    return [
        ("Protocol", [(key, _plain(value)) for key, value in protocol.items()]),
        (
            "Data",
            [
                ("path", result.data.path),
                ("pictures", numbers.count(result.data.images)),
                ("SHA-256 of the pixels", result.data.pixels_sha256 or numbers.MISSING),
                *([("channels", result.data.note)] if result.data.note else []),
            ],
        ),
    ]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(one) for one in value) or "none"
    return "none" if value is None else str(value)
