"""The model card of an autoencoder: what was measured and recorded, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from latent_ae.channels import has_colours
from latent_ae.config import Config
from latent_ae.export.words import how_to_load, last_part, objective_in_words, title
from latent_ae.network_kinds import NETWORKS, spec_named

__all__ = ["model_card", "protocol_of", "without_paths"]

_UNITS = {"psnr": "PSNR (dB)", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS (AlexNet)"}
_HERE = "path/to/this/folder"


def protocol_of(config: Config, channels: int = 3) -> str | None:
    """How the metrics of a run's validation are taken, in one sentence; None without one.

    Args:
        config: the run.
        channels: of its pictures.
    """
    held_out = config.validation
    if held_out is None:
        return None
    size = held_out.resolution or config.data.resolution
    how = "posterior mode"
    if config.distillation:
        learns = "the picture" if config.distillation.target == "picture" else "its reconstruction"
        how = f"decoded from the teacher's latents and held against {learns}"
    return (
        f"the first {held_out.images} pictures of {held_out.path}, shorter side to {size} by "
        f"Lanczos, centre crop, {how}, fp32, rounded to 8 bits"
        + (", LPIPS v0.1 alex" if has_colours(channels) else "")
    )


def model_card(
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    license_name: str,
    *,
    name: str = _HERE,
    variants: Sequence[str] = (),
    evaluation: Mapping[str, Any] | None = None,
    pictures: Sequence[tuple[str, str]] = (),
) -> str:
    """The README.md of an autoencoder's folder.

    Args:
        config: diffusers' config.json.
        record: what `latent_ae.json` records; empty for an autoencoder that was not trained here.
        license_name: an identifier of the hub's, such as `apache-2.0`.
        name: what `from_pretrained` shall be given.
        variants: of the weights.
        evaluation: the content of an evaluation.json of the same weights.
        pictures: paths of inputs and reconstructions, relative to the card.
    """
    spec = spec_named(config.get("_class_name", "AutoencoderKL")) or NETWORKS["kl"]
    # What diffusers takes for keys that older configs lack.
    missing = {"scaling_factor": 0.18215, "force_upcast": True} if spec.upcasts else {}
    config = {"scaling_factor": 1.0, **missing, **config}
    record = without_paths(record)
    parts = [
        _front(license_name, name, evaluation, spec.quantizes),
        title(spec, config, record),
        how_to_load(config, name, variants),
        _facts(config, record),
        _metrics(record, evaluation),
        _shown(pictures),
        f"## Licence\n\n{license_name}.",
    ]
    if record:
        parts.append("The resolved config and all statistics are in `latent_ae.json`.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(
    license_name: str, name: str, evaluation: Mapping[str, Any] | None, discrete: bool
) -> str:
    tags = ["autoencoder", "vq-vae" if discrete else "vae", "latent-diffusion", "latent_ae"]
    results = None
    if evaluation:
        data = evaluation["data"]
        results = [
            EvalResult(
                task_type="image-to-image",
                task_name="reconstruction",
                dataset_type=last_part(data["path"]),
                dataset_name=f"{data['images']} pictures of {last_part(data['path'])}",
                metric_type=metric,
                metric_name=_UNITS.get(metric, metric),
                metric_value=round(value, 4),
            )
            for metric, value in evaluation["metrics"].items()
        ]
    data = ModelCardData(
        library_name="diffusers",
        license=license_name,
        tags=tags,
        model_name=last_part(name) if results else None,
        eval_results=results,
    )
    return f"---\n{data.to_yaml()}\n---"


def _facts(config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    scale = f"{config['scaling_factor']:.5f}"
    upcast = str(config.get("force_upcast", False)).lower()
    rows = {"scaling_factor": scale, "force_upcast": upcast}
    if record:
        trained, latents = record["config"], record["latents"]
        data = trained["data"]
        rows = {
            "data": f"{data['path']} ({data['source']}), {_crops(data)}",
            "training": f"{record['trained']['steps']} steps, {record['trained']['images']} images",
            "objective": objective_in_words(trained),
            "scaling_factor": f"{scale}, {_measured(record)}",
        }
        if (kl := latents.get("kl_nats_per_image")) is not None:
            rows["KL"] = f"{kl:.0f} nats an image"
        rows["force_upcast"] = upcast
        if precision := record.get("precision"):
            rows["force_upcast"] = str(precision["force_upcast"]).lower()
            rows["force_upcast"] += f": {precision['reason']}"
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if value := config.get(key):
            numbers = value if isinstance(value, list) else [value]
            rows[key] = ", ".join(f"{number:.4f}" for number in numbers)
    return "\n".join(["| | |", "|-|-|", *(f"| {key} | {told} |" for key, told in rows.items())])


def _crops(data: Mapping[str, Any]) -> str:
    if buckets := data.get("buckets"):
        sides = sorted(set(buckets["resolutions"] or [data["resolution"]]))
        return f"shapes of about {', '.join(f'{side}²' for side in sides)} pixels"
    return f"{data['resolution']}² crops"


def _measured(record: Mapping[str, Any]) -> str:
    if record.get("teacher"):
        return f"the teacher's; their deviation is {record['latents']['std']:.3f}, measured"
    if record.get("statistics") == "kept":
        return "as it was before this fine-tuning"
    text = f"measured on {record['latents']['images']} crops"
    if record.get("statistics") == "folded":
        return f"as the weights hold each channel's mean and deviation, {text}"
    return text


def _metrics(record: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    head = "## Metrics on held-out pictures\n\n"
    if evaluation:
        return head + _evaluated(evaluation)
    metrics = dict(record.get("metrics") or {})
    if not metrics:
        return head + "None were taken." if record else ""
    taken = metrics.pop("step", None)
    rows = "\n".join(f"| {_UNITS.get(key, key)} | {value:.4f} |" for key, value in metrics.items())
    protocol = f"Protocol: {record['metric_protocol']}; taken at step {taken}."
    return f"{head}| metric | value |\n|-|-|\n{rows}\n\n{protocol}"


def _evaluated(evaluation: Mapping[str, Any]) -> str:
    metrics, intervals = evaluation["metrics"], evaluation["intervals"]
    references = evaluation.get("references") or []
    titles = [f"{row['name']}, {row['detail']}" for row in references]
    lines = [f"| {' | '.join(['metric', 'this', '95 %', *titles])} |"]
    lines.append("|" + "-|" * (3 + len(titles)))
    for key, value in metrics.items():
        low, high = intervals.get(key, (None, None))
        between = "" if low is None else f"{low:.3f} – {high:.3f}"
        others = [row["metrics"].get(key) for row in references]
        cells = [_UNITS.get(key, key), f"{value:.3f}", between, *map(_number, others)]
        lines.append(f"| {' | '.join(cells)} |")
    protocol, data = evaluation["protocol"], evaluation["data"]
    if frechet := evaluation.get("frechet"):
        title = f"Fréchet distance ({frechet['network']})"
        others = [_number(row["frechet"]) for row in references]
        lines.append(f"| {' | '.join([title, _number(frechet['distance']), '', *others])} |")
    settings = ", ".join(f"{key} {value}" for key, value in protocol.items() if key != "name")
    versions = ", ".join(f"{key} {value}" for key, value in evaluation["versions"].items())
    return (
        "\n".join(lines)
        + f"\n\n{data['images']} pictures of {last_part(data['path'])} (sha256 of their pixels "
        + f"{data['pixels_sha256'][:12]}), protocol {protocol['name']} ({settings}); "
        + f"{evaluation['date']}, {versions}."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _shown(pictures: Sequence[tuple[str, str]]) -> str:
    if not pictures:
        return ""
    rows = [f"| ![input]({before}) | ![reconstruction]({after}) |" for before, after in pictures]
    return "\n".join(["## Pictures", "", "| input | reconstruction |", "|-|-|", *rows])


def without_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    """A latent_ae.json with the last part of each path alone: the rest tells where somebody works.

    Names of data sets on the hub stay whole.
    """
    config = record.get("config") or {}
    hub = (config.get("data") or {}).get("source") == "hub"
    shortened: dict[str, str] = {}

    def cleaned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: cleaned(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [cleaned(item, key) for item in value]
        if not isinstance(value, str) or not re.search(r"[/\\]", value) or (hub and key == "path"):
            return value
        shortened[value] = last_part(value)
        return shortened[value]

    result = {**record, "config": cleaned(config)} if config else dict(record)
    if teacher := record.get("teacher"):
        result["teacher"] = {**teacher, "path": last_part(teacher["path"])}
    protocol = record.get("metric_protocol")
    for long in sorted(shortened, key=len, reverse=True):
        protocol = protocol and protocol.replace(long, shortened[long])
    return {**result, "metric_protocol": protocol} if protocol else result
