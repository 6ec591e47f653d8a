"""Small charts as inline SVG, in the page's own colours, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from latent_ae.evaluation.report.scales import Axis, Scale

__all__ = ["Series", "Thumbnail", "line_chart", "bar_chart", "map_chart"]

# Small in its own units: scaled to a phone's width, the labels are still legible.
_WIDTH, _HEIGHT = 420, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 44
_SIDE = 420


@dataclass(frozen=True)
class Series:
    """A line; names of points are shown where the pointer rests on them."""

    name: str
    points: Sequence[tuple[float | None, float | None]]
    style: str = "s0"
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Thumbnail:
    """A small picture on a map: the id of its symbol, what it shows, where it stands."""

    symbol: str
    name: str
    x: float
    y: float


def line_chart(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    step: bool = False,
    dots: bool = False,
    level: tuple[float, str] | None = None,
) -> Markup:
    """Lines over two axes, or nothing where no line has a point.

    Args:
        title: what it shows.
        series: the lines; points without a number, or not above zero on a log axis, are left out.
        x: the axis below.
        y: the axis at the left.
        step: each value holds until the next, as in a distribution function.
        dots: mark each point.
        level: a value of y to draw a line at, and what it is.
    """
    kept = [(one, _drawable(one, x, y)) for one in series]
    kept = [(one, points) for one, points in kept if points]
    if not kept:
        return Markup("")
    heights = [py for _, points in kept for _, py, _ in points]
    heights += [level[0]] if level else []
    across = Scale(x, [px for _, points in kept for px, _, _ in points], _LEFT, _WIDTH - _RIGHT)
    up = Scale(y, heights, _HEIGHT - _BOTTOM, _TOP)
    body = _axes(across, up)
    if level:
        places = [(across(px), up(py)) for _, points in kept for px, py, _ in points]
        body += _level(up(level[0]), level[1], places)
    for one, points in kept:
        places = [(across(px), up(py)) for px, py, _ in points]
        body += _path(places, one.style, step)
        if dots:
            names = [name for _, _, name in points]
            body += _dots(one, places, names)
    return _figure(title, body, _HEIGHT, [(one.name, one.style) for one, _ in kept])


def bar_chart(
    title: str, bars: Sequence[tuple[str, float | None]], x: Axis, y: Axis, style: str = "s0"
) -> Markup:
    """One bar from zero for each label, or nothing where no bar has a number."""
    values = [value for _, value in bars if value is not None]
    if not values:
        return Markup("")
    low, high = min(0.0, *values), max(0.0, *values)
    limits = Axis(
        y.label, low=low if low == 0 else None, high=high if high == 0 else None, percent=y.percent
    )
    up = Scale(limits, [low, high], _HEIGHT - _BOTTOM, _TOP)
    room = (_WIDTH - _LEFT - _RIGHT) / len(bars)
    body = _frame(up, y.label) + _label_below(x.label)
    every = -(-len(bars) // 16)
    for place, (name, value) in enumerate(bars):
        middle = round(_LEFT + (place + 0.5) * room, 1)
        if place % every == 0:
            body += _text(middle, _HEIGHT - _BOTTOM + 16, name, "tick", "middle")
        if value is not None:
            top, bottom = sorted((up(value), up(0)))
            wide = max(1.0, min(0.72 * room, 44))
            body += Markup(
                '<rect class="bar {}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>'
            ).format(
                style,
                round(middle - wide / 2, 1),
                top,
                round(wide, 1),
                round(max(bottom - top, 0.5), 1),
                f"{name}: {value:.4g}",
            )
    return _figure(title, body, _HEIGHT, [])


def map_chart(
    title: str, thumbnails: Sequence[Thumbnail], symbols: Markup, side: float, x: str, y: str
) -> Markup:
    """Small pictures where their codes stand, or nothing where there are none.

    Args:
        title: what it shows.
        thumbnails: the pictures.
        symbols: definitions of symbols that stand nowhere else in the page.
        side: of a symbol, in the chart's units.
        x: the label below.
        y: the label at the left.
    """
    if not thumbnails:
        return Markup("")
    half = side / 2
    across = Scale(Axis(x), [one.x for one in thumbnails], 24 + half, _SIDE - 8 - half)
    up = Scale(Axis(y), [one.y for one in thumbnails], _SIDE - 24 - half, 8 + half)
    body = Markup("<defs>{}</defs>").format(symbols)
    body += Markup('<rect class="paper" x="24" y="8" width="{}" height="{}"/>').format(
        _SIDE - 32, _SIDE - 32
    )
    body += _text(_SIDE / 2 + 8, _SIDE - 6, x, "label", "middle")
    body += _upright(12, _SIDE / 2 - 8, y)
    for one in thumbnails:
        body += Markup(
            '<use href="#{}" x="{}" y="{}" class="thumb"><title>{}</title></use>'
        ).format(one.symbol, round(across(one.x) - half, 1), round(up(one.y) - half, 1), one.name)
    return _figure(title, body, _SIDE, [])


def _drawable(one: Series, x: Axis, y: Axis) -> list[tuple[float, float, str]]:
    names = one.names or [""] * len(one.points)
    return [
        (px, py, name)
        for (px, py), name in zip(one.points, names, strict=True)
        if px is not None
        and py is not None
        and math.isfinite(px + py)
        and (px > 0 or not x.log)
        and (py > 0 or not y.log)
    ]


def _text(x: float, y: float, text: str, css: str, anchor: str) -> Markup:
    mark = Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>')
    return mark.format(css, x, y, anchor, text)


def _upright(x: float, y: float, text: str) -> Markup:
    mark = Markup(
        '<text class="label" transform="translate({} {}) rotate(-90)" '
        'text-anchor="middle">{}</text>'
    )
    return mark.format(x, y, text)


def _label_below(text: str) -> Markup:
    return _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, text, "label", "middle")


def _frame(up: Scale, label: str) -> Markup:
    """Horizontal lines with their values."""
    body = _upright(12, (_TOP + _HEIGHT - _BOTTOM) / 2, label)
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    for value, text in up.ticks():
        body += line.format(_LEFT, _WIDTH - _RIGHT, up(value), up(value))
        body += _text(_LEFT - 7, up(value) + 4, text, "tick", "end")
    return body


def _axes(across: Scale, up: Scale) -> Markup:
    base = _HEIGHT - _BOTTOM
    body = _frame(up, up.axis.label) + _label_below(across.axis.label)
    line = Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    body += line.format(_LEFT, _WIDTH - _RIGHT, base, base)
    for value, text in across.ticks():
        body += line.format(across(value), across(value), base, base + 4)
        body += _text(across(value), base + 17, text, "tick", "middle")
    return body


def _level(height: float, text: str, places: Sequence[tuple[float, float]]) -> Markup:
    """A line, named at the end that fewer of the places crowd."""
    body = Markup('<line class="level" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
        _LEFT, _WIDTH - _RIGHT, height, height
    )
    below = height < _TOP + 20
    height += 15 if below else -6
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    crowd = [px > middle for px, py in places if abs(py - height) < 20]
    if 2 * sum(crowd) < len(crowd):
        return body + _text(_WIDTH - _RIGHT - 6, height, text, "note", "end")
    return body + _text(_LEFT + 6, height, text, "note", "start")


def _path(places: Sequence[tuple[float, float]], style: str, step: bool) -> Markup:
    commands = [f"M{places[0][0]} {places[0][1]}"]
    for px, py in places[1:]:
        commands.append(f"H{px}V{py}" if step else f"L{px} {py}")
    return Markup('<path class="line {}" d="{}"/>').format(style, "".join(commands))


def _dots(one: Series, places: Sequence[tuple[float, float]], names: Sequence[str]) -> Markup:
    mark = Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}">{}</circle>')
    # Where dots nearly touch, their outlines would cut the line into pieces.
    style = one.style if len(places) <= 60 else f"{one.style} dense"
    radius = 3 if len(places) <= 24 else 2 if len(places) <= 60 else 1.2
    body = Markup("")
    for (px, py), name in zip(places, names, strict=True):
        title = Markup("<title>{}</title>").format(name) if name else ""
        body += mark.format(style, px, py, radius, title)
    return body


def _figure(title: str, body: Markup, height: float, legend: list[tuple[str, str]]) -> Markup:
    items = Markup("").join(
        Markup('<li><i class="swatch {}"></i>{}</li>').format(style, name) for name, style in legend
    )
    return Markup(
        '<figure class="chart"><figcaption>{}</figcaption>{}'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>{}</svg></figure>'
    ).format(
        title,
        Markup('<ul class="legend">{}</ul>').format(items) if len(legend) > 1 else "",
        _WIDTH,
        height,
        title,
        title,
        body,
    )
