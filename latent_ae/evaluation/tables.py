"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from latent_ae.evaluation.result import Evaluation

__all__ = ["codes_table", "latents_table", "reconstruction_table", "warnings_of"]

_FULL = 0.9  # of the fixed length that coded codes take: less is told
# Title, digits.
_METRICS = {
    "psnr": ("PSNR ↑", 2),
    "ssim": ("SSIM ↑", 3),
    "ms_ssim": ("MS-\nSSIM ↑", 3),
    "lpips": ("LPIPS ↓", 3),
    "lpips_vgg": ("LPIPS ↓\nvgg", 3),
}


def reconstruction_table(results: Sequence[Evaluation]) -> Table:
    """A row for each autoencoder, below each mean half its 95 % interval; then its references."""
    names = [name for name in _METRICS if any(name in result.metrics for result in results)]
    frechet = next((r.content["frechet"] for r in results if r.content["frechet"]), None)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)  # within 80 columns
    table.add_column("", overflow="fold")
    for name in names:
        table.add_column(_METRICS[name][0], justify="right", no_wrap=True)
    if frechet:
        table.add_column(f"Fréchet ↓\n{frechet['network']}", justify="right")
    table.add_column("values", justify="right")
    table.add_column("kbit", justify="right")
    for result in results:
        content, model = result.content, result.content["model"]
        cells = [_cell(name, result.metrics, result.intervals) for name in names]
        if frechet:
            cells.append(_number((content["frechet"] or {}).get("distance"), 3))
        cells += [f"{model['values_per_image']:,.0f}", f"{model['bits_per_image'] / 1000:,.1f}"]
        table.add_row(result.name, *cells, style="bold")
        for row in content["references"]:
            cells = [_number(row["metrics"].get(name), _METRICS[name][1]) for name in names]
            if frechet:
                cells.append(_number(row["frechet"], 3))
            bits = row["bits_per_image"]
            values = f"{model['values_per_image']:,.0f}" if bits is None else ""
            table.add_row(row["name"], *cells, values, _number(bits and bits / 1000, 1))
        table.add_section()
    return table


def latents_table(results: Sequence[Evaluation]) -> Table:
    """What the latent space is like, a column for each autoencoder."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("latent space")
    for result in results:
        table.add_column(result.name, justify="right", overflow="fold")
    facts = [_facts(result.content) for result in results]
    for title in facts[0]:
        table.add_row(title, *(fact.get(title, "–") for fact in facts))
    return table


def codes_table(results: Sequence[Evaluation]) -> Table:
    """How quantised latents use their codes, a column for each autoencoder; dashes without."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("codes")
    for result in results:
        table.add_column(result.name, justify="right", overflow="fold")
    facts = [_codes(result.content.get("codes")) for result in results]
    for title in next(fact for fact in facts if fact):
        table.add_row(title, *(fact.get(title, "–") for fact in facts))
    return table


def warnings_of(results: Sequence[Evaluation]) -> list[str]:
    """What a reader must know before trusting the numbers, a sentence each."""
    sentences = []
    for result in results:
        content, data = result.content, result.content["data"]
        if bad := data["not_finite"]:
            sentences.append(
                f"{result.name}: {len(bad)} of {data['images']} reconstructions hold NaN or "
                f"infinity and are in no mean: {_some(bad)}"
            )
        if note := data.get("note"):
            sentences.append(f"{result.name}: {note}")
        if data["skipped"]:
            keys = [skip["key"] for skip in data["skipped"]]
            sentences.append(
                f"{result.name}: {len(keys)} unreadable pictures were skipped: {_some(keys)}"
            )
        wanted = result.protocol.images
        if wanted and data["images"] + len(data["skipped"]) < wanted:
            sentences.append(
                f"{result.name}: protocol {result.protocol.name} wants {wanted:,} pictures, and "
                f"there were {data['images']:,}"
            )
        if (share := _slack(content)) < _FULL:
            sentences.append(
                f"{result.name}: JPEG and WebP may take the codes' fixed length, of which a coder "
                f"needs {100 * share:.0f} %"
            )
        for row in content["references"]:
            if row["too_small"]:
                sentences.append(
                    f"{result.name}: {row['name']} needs more bits than the code for "
                    f"{row['too_small']} pictures"
                )
    notes = {r.content["frechet"]["note"] for r in results if r.content["frechet"]}
    return sentences + [f"Fréchet distance: {note}" for note in notes if note]


def _facts(content: dict[str, Any]) -> dict[str, str]:
    latents, probes, model = content["latents"] or {}, content["probes"] or {}, content["model"]
    aggregate, spectrum = latents.get("aggregate", {}), latents.get("spectrum", {})
    channels = latents.get("channels", [])
    equivariance = {
        row["transform"]: f"{row['latents']:.2f} ({row['psnr']:.1f} dB)"
        for row in probes.get("equivariance", [])
    }
    noise = {row["noise"]: row["psnr"] for row in probes.get("sensitivity", [])}
    precision = content["precision"] or {}
    return {
        "factor, channels": f"f{model['downsampling']}, {model['latent_channels']}",
        "mean, std": f"{_number(latents.get('mean'), 2)}, {_number(latents.get('std'), 2)}",
        "KL, bits a value": _number(latents.get("kl_bits_per_value"), 2),
        "active units": _percent(latents.get("active_units")),
        "dead channels": str(sum(channel["dead"] for channel in channels)) if channels else "–",
        "from N(0, I): KL of a value": _number(aggregate.get("prior_kl"), 3),
        "from N(0, I): sliced W₂ of 4 × 4": _number(aggregate.get("sliced_wasserstein_patch"), 3),
        "power above half Nyquist": _percent(spectrum.get("high_share")),
        "  the pictures'": _percent(spectrum.get("pictures_high_share")),
        "equivariance, scale 1/2": equivariance.get("scale 1/2", "–"),
        "equivariance, rotate 90°": equivariance.get("rotate 90°", "–"),
        "PSNR with noise of .1, .4 std": ", ".join(_number(noise.get(x), 1) for x in (0.1, 0.4)),
        "largest activation": _number(precision.get("largest_activation"), 1),
        "fp16, bf16 against fp32 (dB)": ", ".join(
            _number((precision.get(name) or {}).get("psnr"), 1) for name in ("fp16", "bf16")
        ),
        "force_upcast": str(precision.get("force_upcast", "–")).lower(),
    }


def _codes(codes: dict[str, Any] | None) -> dict[str, str]:
    if not codes:
        return {}
    pixel, image = codes["bits_per_pixel"], codes["bits_per_image"]

    def bits(name: str) -> str:
        return f"{pixel[name]:.4f} ({image[name] / 1000:,.1f})"

    slots = codes["per_position"]
    return {
        "entries": f"{codes['size']:,}" + (f", {slots} a position" if slots > 1 else ""),
        "positions": f"{codes['positions']:,}",
        "usage": f"{100 * codes['usage']:.1f} %",
        "  of as many uniform draws": f"{100 * codes['usage_uniform']:.1f} %",
        "dead entries": f"{codes['dead']:,}",
        "perplexity": _number(codes["perplexity"], 1),
        "entropy, bits a code": _number(codes["entropy_bits"], 2),
        "bits a pixel (kbit a picture)": "",
        "  fixed length": bits("fixed_length"),
        "  entropy": bits("entropy"),
        "  coded stream": bits("coded"),
    }


def _slack(content: dict[str, Any]) -> float:
    """The share of the codecs' budget that the coded stream takes; 1 where there are none."""
    if not content.get("codes") or all(
        row["bits_per_image"] is None for row in content["references"]
    ):
        return 1.0
    bits = content["codes"]["bits_per_image"]
    return bits["coded"] / bits["fixed_length"] if bits["fixed_length"] else 1.0


def _cell(name: str, means: dict[str, float], intervals: dict[str, Any]) -> str:
    mean, digits = means.get(name), _METRICS[name][1]
    if mean is None or name not in intervals:
        return _number(mean, digits)
    low, high = intervals[name]
    return f"{mean:.{digits}f}\n±{(high - low) / 2:.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
