"""The charts of the report, from results."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from latent_ae.evaluation.report.charts import (
    Series,
    Thumbnail,
    bar_chart,
    line_chart,
    map_chart,
)
from latent_ae.evaluation.report.inline import Inliner
from latent_ae.evaluation.report.numbers import percent
from latent_ae.evaluation.report.result import Result
from latent_ae.evaluation.report.scales import Axis
from latent_ae.evaluation.report.schema import Codes, Slot

__all__ = [
    "channels",
    "code_map",
    "codes",
    "distributions",
    "layers",
    "sensitivity",
    "slot_name",
    "spectrum",
]

_MOST_POINTS = 256
_STYLES = [f"s{place}{dashed}" for dashed in ("", " dashed") for place in range(6)]
_FP16_LARGEST = 65504.0


def distributions(results: Sequence[Result]) -> list[Markup]:
    """The share of pictures at or below each PSNR and LPIPS."""
    share = Axis("share of pictures", percent=True, low=0.0, high=1.0)
    charts = []
    for key, title, label in (
        ("psnr", "PSNR of the pictures", "PSNR (dB)"),
        ("lpips", "LPIPS of the pictures", "LPIPS (alex)"),
    ):
        lines = [
            Series(result.title, _cumulative(result.per_image.get(key, [])), result.style)
            for result in results
        ]
        charts.append(line_chart(title, lines, Axis(label), share, step=True))
    return [chart for chart in charts if chart]


def _cumulative(values: Sequence[float | None]) -> list[tuple[float | None, float | None]]:
    known = sorted(value for value in values if value is not None and value == value)
    if not known:
        return []
    last = len(known) - 1
    number = min(len(known), _MOST_POINTS)
    places = sorted({round(i * last / max(1, number - 1)) for i in range(number)})
    points: list[tuple[float | None, float | None]] = [(known[0], 0.0)]
    return points + [(known[place], (place + 1) / len(known)) for place in places]


def spectrum(results: Sequence[Result]) -> Markup:
    """Power of latents and of pictures over spatial frequency."""
    lines, pictures = [], []
    for result in results:
        found = result.latents.spectrum if result.latents else None
        if not found:
            continue
        points = list(zip(found.frequency, found.latents, strict=False))
        lines.append(Series(result.title, points, result.style))
        below = list(zip(found.frequency, found.pictures, strict=False))
        if below and below not in [one.points for one in pictures]:
            pictures.append(Series("pictures", below, "muted"))
    if len(pictures) > 1:
        # Models of different factors see the pictures at different sizes: one line says enough.
        pictures = pictures[:1]
    return line_chart(
        "Power over spatial frequency",
        pictures + lines,
        Axis("frequency (cycles a latent pixel)", log=True),
        Axis("power (mean 1)", log=True),
    )


def sensitivity(results: Sequence[Result]) -> Markup:
    """PSNR of what is decoded from latents with noise added."""
    lines = [
        Series(
            result.title,
            [(one.noise, one.psnr) for one in result.probes.sensitivity],
            result.style,
        )
        for result in results
        if result.probes
    ]
    return line_chart(
        "PSNR of the decoder's output when noise is added to the latents",
        lines,
        Axis("noise (standard deviations of the latents)"),
        Axis("PSNR (dB)"),
        dots=True,
    )


def channels(result: Result) -> Markup:
    """What each channel carries."""
    found = result.latents.channels if result.latents else []
    bars = [(str(place), channel.kl_nats) for place, channel in enumerate(found)]
    return bar_chart(
        f"KL of each channel, {result.title}",
        bars,
        Axis("channel"),
        Axis("KL (nats a value)"),
        result.style,
    )


def codes(results: Sequence[Result]) -> list[Markup]:
    """How often each entry occurs, most used first: models of one codebook in one chart."""
    lines = [
        (
            result,
            [
                Series(slot_name(found, slot), slot.curve, _STYLES[place % len(_STYLES)])
                for place, slot in enumerate(found.slots)
            ],
        )
        for result in results
        if (found := result.codes)
    ]
    single = [
        Series(result.title, one[0].points, result.style) for result, one in lines if len(one) == 1
    ]
    charts = [_codes_chart("How often each entry occurs", single)]
    for result, several in lines:
        if len(several) > 1:
            charts.append(_codes_chart(f"How often each entry occurs, {result.title}", several))
    return [chart for chart in charts if chart]


def slot_name(codes: Codes, slot: Slot) -> str:
    """What to call one of several codebooks."""
    levels, heads = (len({getattr(s, key) for s in codes.slots}) for key in ("level", "head"))
    level = f"level {slot.level}" * (levels > 1)
    return ", ".join(filter(None, [level, f"head {slot.head}" * (heads > 1)])) or "all"


def _codes_chart(title: str, lines: Sequence[Series]) -> Markup:
    return line_chart(
        title,
        lines,
        Axis("entries, most used first", percent=True, low=0.0, high=1.0),
        Axis("frequency × entries", log=True),
        level=(1.0, "all used equally"),
    )


def layers(results: Sequence[Result]) -> Markup:
    """The largest activation of each layer, with the largest number of fp16."""
    lines = [
        Series(
            result.title,
            [(float(place), layer.largest) for place, layer in enumerate(found, 1)],
            result.style,
            [layer.name for layer in found],
        )
        for result in results
        if result.precision and (found := result.precision.layers)
    ]
    return line_chart(
        "Largest activation of each layer",
        lines,
        Axis("layer, in forward order"),
        Axis("largest magnitude", log=True),
        dots=True,
        level=(_FP16_LARGEST, "65 504, the largest number of fp16"),
    )


def code_map(result: Result, inliner: Inliner) -> Markup:
    """The pictures where their codes stand.

    Raises:
        UserError: a thumbnail is missing.
    """
    found = result.probes.map if result.probes else None
    if not found:
        return Markup("")
    side = 40.0 if len(found.points) <= 40 else 28.0 if len(found.points) <= 160 else 20.0
    symbols, thumbnails = Markup(""), []
    for key, (x, y), path in zip(found.keys, found.points, result.pictures.map, strict=False):
        if x is None or y is None:
            continue
        name, definition = inliner.symbol(result, path, side)
        symbols += definition
        thumbnails.append(Thumbnail(name, key, x, y))
    shares = [f" ({percent(share)} of the variance)" for share in found.variance] + ["", ""]
    return map_chart(
        f"Map of codes, {result.title}",
        thumbnails,
        symbols,
        side,
        f"component 1{shares[0]}",
        f"component 2{shares[1]}",
    )
