"""What a latents folder holds, for a terminal."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from latent_ae.errors import UserError
from latent_ae.latents.format import LatentsManifest, ShardRecord, read_manifest
from latent_ae.latents.rewrite import read_columns

__all__ = ["describe"]

_ROWS = 10  # of a table of classes or reasons
_CHANNELS = 16
_EXAMPLES = 3
_KINDS = {
    "moments": "mean and log-variance",
    "mode": "the mode alone",
    "indices": "codebook indices",
}
# What makes one reason many: paths, Python's objects; and, as far as only counting goes, numbers.
_NAMES = re.compile(r"'[^']*'|<[^<>]*>")
_NUMBERS = re.compile(r"\d+")


@dataclass
class _Content:
    """What only the indices know."""

    labels: Counter[int | None] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)  # by reason, but for its numbers
    examples: dict[str, list[str]] = field(default_factory=dict)  # the first reason, then keys


def describe(folder: str | Path) -> Group:
    """A latents folder within 100 columns: whose latents, of which pictures, how distributed.

    Args:
        folder: a finished latents folder, of this version or one before.

    Raises:
        UserError: it is unfinished, or its manifest or an index is missing or damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    content = _Content()
    for record in manifest.shards:
        _count(folder, record, content)
    parts: list[RenderableType] = [_facts(folder, manifest)]
    if manifest.preprocessing.buckets:
        parts.append(_sizes(manifest, content))
    if content.skipped:
        parts.append(_skipped(content))
    if set(content.labels) - {None}:
        parts.append(_classes(manifest, content))
    if "channel_mean" in manifest.statistics:
        parts.append(_statistics(manifest))
    return Group(*parts)


def _count(folder: Path, record: ShardRecord, content: _Content) -> None:
    wanted = ("key", "label", "latent_height", "latent_width", "skipped")
    table = codes = read_columns(folder, record.index, wanted)
    if "skipped" in table.column_names:
        codes = table.filter(table["skipped"].is_null())
        for row in table.filter(table["skipped"].is_valid()).select(["key", "skipped"]).to_pylist():
            reason = _NAMES.sub("'…'", row["skipped"])
            kind = _NUMBERS.sub("…", reason)
            content.skipped[kind] += 1
            examples = content.examples.setdefault(kind, [reason])
            if len(examples) <= _EXAMPLES:
                examples.append(row["key"])
    for pair in codes["label"].value_counts().to_pylist():
        content.labels[pair["values"]] += pair["counts"]
    if "latent_height" in table.column_names:
        sides = ["latent_height", "latent_width"]
        for row in codes.group_by(sides).aggregate([([], "count_all")]).to_pylist():
            content.sizes[row[sides[0]], row[sides[1]]] += row["count_all"]


def _facts(folder: Path, manifest: LatentsManifest) -> Table:
    """Two columns: a name and what there is to say."""
    made, stored = manifest.autoencoder, manifest.storage
    factor = f", f{made.downsampling} with {made.channels} channels" if made.downsampling else ""
    renamed = f", {_number(manifest.renamed)} renamed" if manifest.renamed else ""
    codes = f"{_number(manifest.count)} of {_number(manifest.pictures)} pictures"
    facts = {
        "latents": str(folder),
        "autoencoder": f"{made.class_name} {made.weights_sha256[:12]}{factor}",
        "": made.path,
        "codebook": _codebook(manifest),
        "pictures": _source(manifest),
        "cut": _cut(manifest),
        "stored": f"{_KINDS[stored.kind]} ({stored.kind}) as {stored.dtype}; the encoder ran in "
        f"{stored.precision}",
        "shape": _shape(manifest),
        "codes": f"{codes}; {_number(manifest.skipped)} skipped{renamed}",
        "shards": _bytes(folder, manifest),
        "versions": ", ".join(f"{name} {number}" for name, number in manifest.versions.items()),
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        if fact:
            table.add_row(name, Text(fact))  # as text: names may hold what looks like markup
    return table


def _codebook(manifest: LatentsManifest) -> str:
    made = manifest.autoencoder
    if not made.codebook_size:
        return ""
    codes = "a code" if made.codes == 1 else f"{made.codes} codes"
    return (
        f"{made.codebook_sha256[:12]}, {codes} of {_number(made.codebook_size)} values a position"
    )


def _source(manifest: LatentsManifest) -> str:
    data = manifest.data
    parts = [" ".join(part for part in (data.source, data.path) if part) or "not noted"]
    parts += [f"split {data.split}"] if data.split else []
    parts += [f"where {data.filter}"] if data.filter else []
    parts += [f"the first {_number(data.limit)}"] if data.limit else []
    return ", ".join(parts)


def _cut(manifest: LatentsManifest) -> str:
    """The preprocessing as one would tell it."""
    cut = manifest.preprocessing
    size = f"{cut.resolution} × {cut.resolution}"
    way = {"lanczos": "Lanczos", "adm": "as ADM"}.get(cut.resample, cut.resample)
    if cut.buckets:
        ratio = f"{cut.resize / cut.resolution:g} times " if cut.resize else ""
        parts = [f"resized ({way}) to cover {ratio}the nearest of {len(manifest.latent_shapes)}"]
        parts[0] += f" sizes of about {size} pixels (sides multiples of {cut.bucket_step})"
    else:
        parts = [f"shorter side to {cut.resize or cut.resolution} ({way})"]
    crops = "the centre" if cut.crops == 1 else f"{cut.crops} random crops (seed {cut.seed})"
    parts.append(f"{crops} of it" if cut.buckets else f"{crops}, {size} pixels")
    parts += ["each mirrored too"] if cut.flip else []
    parts += [f"none below {cut.min_side} pixels a side"] if cut.min_side else []
    return ", ".join(parts)


def _shape(manifest: LatentsManifest) -> str:
    if manifest.preprocessing.buckets:
        return f"{len(manifest.latent_shapes)} sizes (buckets)"
    return " × ".join(map(str, manifest.latent_shape))


def _bytes(folder: Path, manifest: LatentsManifest) -> str:
    """How much there is on the disk, in all and a picture."""
    sums = []
    for name in ("file", "index"):
        files = [folder / getattr(record, name) for record in manifest.shards]
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{folder} is damaged: {missing[0]} is missing")
        sums.append(sum(file.stat().st_size for file in files))
    a_picture = f"{sum(sums) / max(1, manifest.pictures) / 1024:,.1f} KiB a picture"
    return f"{len(manifest.shards)}; {_size(sums[0])} and {_size(sums[1])} of index; {a_picture}"


def _sizes(manifest: LatentsManifest, content: _Content) -> Table:
    table = _table("latents h × w", "pixels", "codes", "share")
    factor = manifest.autoencoder.downsampling
    for (height, width), count in sorted(content.sizes.items()):
        pixels = f"{height * factor} × {width * factor}" if factor else ""
        share = f"{count / manifest.count:.1%}"
        table.add_row(f"{height} × {width}", pixels, _number(count), share)
    if unused := len(manifest.latent_shapes) - len(content.sizes):
        table.caption = f"{unused} more that no picture has"
    return table


def _skipped(content: _Content) -> Table:
    table = _table("skipped because", "pictures", "such as")
    table.columns[2].justify = "left"
    for column, width in ((table.columns[0], 44), (table.columns[2], 40)):
        column.max_width, column.overflow = width, "ellipsis"
    for kind, count in content.skipped.most_common(_ROWS):
        reason, *keys = content.examples[kind]
        table.add_row(Text(reason), _number(count), Text("\n".join(keys)))
    if (more := len(content.skipped) - _ROWS) > 0:
        table.caption = f"{more} more reasons"
    return table


def _classes(manifest: LatentsManifest, content: _Content) -> Table:
    """The commonest first."""
    names, labels = manifest.label_names, content.labels
    table = _table(f"class, of {_number(manifest.num_classes)}", "name", "codes", "share")
    table.columns[1].justify, table.columns[1].overflow = "left", "ellipsis"
    for label, count in labels.most_common(_ROWS):
        name = names[label] if label is not None and label < len(names) else ""
        number = "none" if label is None else str(label)
        table.add_row(number, Text(name), _number(count), f"{count / manifest.count:.1%}")
    if (more := len(labels) - _ROWS) > 0:
        rest = manifest.count - sum(count for _, count in labels.most_common(_ROWS))
        table.caption = f"{_number(more)} more share {_number(rest)} ({rest / manifest.count:.1%})"
    return table


def _statistics(manifest: LatentsManifest) -> Table:
    said = manifest.statistics
    table = _table("channel", "mean", "std", "lowest", "highest")
    names = ("channel_mean", "channel_std", "channel_low", "channel_high")
    columns = [said[name] for name in names if name in said]  # version 1 had two of them
    rows = list(zip(*columns, strict=True))  # pyright: ignore[reportArgumentType]
    for channel, row in enumerate(rows[:_CHANNELS]):
        table.add_row(str(channel), *(f"{value:.4f}" for value in row))
    if len(rows) > _CHANNELS:
        table.add_row("…", *("" for _ in columns))
    table.add_section()
    table.add_row("all", *(f"{said[name]:.4f}" for name in ("mean", "std") if name in said))
    if "kl_nats_per_code" in said:
        table.caption = f"raw values as stored; KL {said['kl_nats_per_code']:,.1f} nats a code"
    return table


def _table(*titles: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption_justify="left")
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left")
    return table


def _number(value: int) -> str:
    return f"{value:,}"


def _size(count: float) -> str:
    unit, bigger = "bytes", ["TiB", "GiB", "MiB", "KiB"]
    while count >= 1024 and bigger:
        count, unit = count / 1024, bigger.pop()
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
