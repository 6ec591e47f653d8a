"""The table of reconstruction metrics: models, then what ordinary compression reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from latent_ae.evaluation.report.numbers import count, fixed, significant
from latent_ae.evaluation.report.result import Result
from latent_ae.evaluation.report.schema import Reference

__all__ = ["Cell", "Column", "Row", "Table", "reconstruction_table"]


@dataclass(frozen=True)
class Column:
    """A quantity: which way is better is 1, -1 or 0 for neither."""

    key: str
    title: str
    unit: str = ""
    better: int = 0
    digits: int = 4

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return {1: "↑", -1: "↓", 0: ""}[self.better]

    def text(self, value: float | None) -> str:
        """The value as the table shows it."""
        if self.key in ("values", "bits"):
            return count(value)
        return significant(value) if self.key == "frechet" else fixed(value, self.digits)


@dataclass
class Cell:
    """A number, its interval, whether it is the best model's, and the marks of its footnotes."""

    text: str
    interval: str = ""
    best: bool = False
    mark: str = ""


@dataclass
class Row:
    """A model, or a reference for some models."""

    title: str
    style: str = ""
    detail: str = ""
    mark: str = ""
    cells: list[Cell] = field(default_factory=list)


@dataclass
class Table:
    """Columns, rows of models, each model's rows of references, and footnotes (mark, text)."""

    columns: list[Column]
    models: list[Row]
    references: list[tuple[Row, list[Row]]]
    notes: list[tuple[str, str]]


METRICS = {
    column.key: column
    for column in (
        Column("psnr", "PSNR", "dB", 1, 2),
        Column("ssim", "SSIM", "", 1),
        Column("ms_ssim", "MS-SSIM", "", 1),
        Column("lpips", "LPIPS", "alex", -1),
        Column("lpips_vgg", "LPIPS", "vgg", -1),
    )
}


class _Notes:
    """Footnotes, lettered; the same words get the same letter."""

    def __init__(self) -> None:
        self.marks: dict[str, str] = {}

    def mark(self, text: str | None) -> str:
        if not text:
            return ""
        return self.marks.setdefault(text, chr(ord("a") + len(self.marks) % 26))


def reconstruction_table(results: Sequence[Result]) -> Table:
    """How near reconstructions come to their pictures."""
    columns = _columns(results)
    notes = _Notes()
    models = []
    for result in results:
        values = _values(result)
        row = Row(result.title, result.style)
        for column in columns:
            cell = Cell(column.text(values.get(column.key)), _interval(result.intervals, column))
            if column.key == "frechet" and result.frechet:
                cell.mark = notes.mark(result.frechet.note)
            row.cells.append(cell)
        models.append(row)
    if len(results) > 1:
        for place, column in enumerate(columns):
            _mark_best(column, [_values(one).get(column.key) for one in results], models, place)
    references = [
        (row, [_reference_row(one, columns, notes) for one in result.references])
        for row, result in zip(models, results, strict=True)
        if result.references
    ]
    return Table(columns, models, references, [(mark, text) for text, mark in notes.marks.items()])


def _columns(results: Sequence[Result]) -> list[Column]:
    named = [name for result in results for name in result.metrics]
    named += [n for result in results for one in result.references for n in one.metrics]
    columns = [column for key, column in METRICS.items() if key in named]
    columns += [Column(name, name) for name in dict.fromkeys(named) if name not in METRICS]
    networks = {result.frechet.network for result in results if result.frechet}
    if networks:
        columns.append(Column("frechet", "Fréchet distance", ", ".join(sorted(networks)), -1))
    return [*columns, Column("values", "Values", "a picture"), Column("bits", "Bits", "a picture")]


def _values(result: Result) -> dict[str, float | None]:
    return {
        **result.metrics,
        "frechet": result.frechet.distance if result.frechet else None,
        "values": result.model.values_per_image,
        "bits": result.model.bits_per_image,
    }


def _interval(intervals: dict, column: Column) -> str:
    low, high = intervals.get(column.key) or (None, None)
    if low is None or high is None:
        return ""
    return f"{column.text(low)} – {column.text(high)}"


def _mark_best(
    column: Column, values: Sequence[float | None], rows: Sequence[Row], place: int
) -> None:
    known = [value for value in values if value is not None]
    if not column.better or len(known) < 2:
        return
    best = column.text(max(known, key=lambda value: column.better * value))
    # What reads the same is equally good.
    for row in rows:
        row.cells[place].best = row.cells[place].text == best


def _reference_row(reference: Reference, columns: Sequence[Column], notes: _Notes) -> Row:
    small = ""
    if reference.too_small:
        pictures = "1 picture" if reference.too_small == 1 else f"{reference.too_small} pictures"
        small = f"{reference.name}: the budget is too small for {pictures}."
    values = {
        **reference.metrics,
        "frechet": reference.frechet,
        "bits": reference.bits_per_image,
    }
    cells = [
        Cell(column.text(values.get(column.key)), _interval(reference.intervals, column))
        for column in columns
    ]
    return Row(reference.name, "", reference.detail, notes.mark(small), cells)
