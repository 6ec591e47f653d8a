"""What no tensor says: the scale of the latents, and who must say it instead."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_ae.conversion.ldm_config import parse_ldm_config
from latent_ae.errors import UserError

__all__ = ["FAMILIES", "Hints", "resolve_config"]

# From the `vae/config.json` of each model on the hub; FLUX's and SD3's lack the quant convolutions.
FAMILIES: dict[str, dict[str, Any]] = {
    "sd1": {"scaling_factor": 0.18215, "sample_size": 512},
    "sdxl": {"scaling_factor": 0.13025, "sample_size": 1024},
    "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024},
    "flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024},
}
_LAYOUTS = {"sd1": (4, True), "sdxl": (4, True), "sd3": (16, False), "flux": (16, False)}


@dataclass(frozen=True)
class Hints:
    """What a person says about a file that the file does not say itself.

    Args:
        config: a diffusers `config.json` or an LDM YAML.
        family: a key of `FAMILIES`.
        scaling_factor: final = (raw − shift) · factor; over those of `config` and `family`.
        shift_factor: likewise.
    """

    config: Path | None = None
    family: str | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None

    def any(self) -> bool:
        """Whether anything was said."""
        values = (self.config, self.family, self.scaling_factor, self.shift_factor)
        return any(value is not None for value in values)

    def scale(self) -> dict[str, Any]:
        """The config's keys of family and factors, the more exact word last.

        Raises:
            UserError: there is no such family.
        """
        if self.family is not None and self.family not in FAMILIES:
            raise UserError(f"family {self.family!r} is unknown; valid: {', '.join(FAMILIES)}")
        said = {"scaling_factor": self.scaling_factor, "shift_factor": self.shift_factor}
        said = {key: value for key, value in said.items() if value is not None}
        return FAMILIES.get(self.family or "", {}) | said


def resolve_config(
    shapes: dict[str, Any],
    recorded: dict[str, Any] | None,
    measured: float | None,
    hints: Hints,
    where: str,
) -> tuple[dict[str, Any], list[str]]:
    """The config of a file, and what of it was taken on whose word.

    Args:
        shapes: the keys that the tensors' shapes decide.
        recorded: the config that the file carries, where `convert` wrote it.
        measured: the scale that a checkpoint of LDM's `LatentDiffusion` carries as a tensor.
        hints: what the caller says.
        where: the file, for sentences.

    Raises:
        UserError: nobody says the scale, it is no number, or a family with other latents was named.
    """
    base, notes = dict(recorded or {}), []
    if hints.config is not None:
        base, recorded = _read_config(hints.config), None
        notes.append(f"config from {hints.config}")
    elif recorded is not None:
        notes.append("config as recorded in the file")
    elif measured is not None:
        base["scaling_factor"] = measured
        notes.append(f"scaling_factor {measured:.6g} from the checkpoint's tensor scale_factor")
    _require_agreement(shapes, base, where, str(hints.config or "the config in its metadata"))
    said = hints.scale()
    if hints.family is not None:
        _require_family(shapes, hints.family, where)
    if recorded is not None:  # of the family's, the scale alone is news
        said.pop("sample_size", None)
    if said:
        notes.append("as you say: " + ", ".join(f"{key} {value}" for key, value in said.items()))
    if recorded is not None:  # as it was, keys that it leaves to diffusers' defaults too
        return _numbers(base | said, where), notes
    if "scaling_factor" not in base | said:
        raise UserError(f"{where} does not say its scaling_factor, and {_advice(shapes)}")
    if "norm_num_groups" not in base:
        notes.append("norm_num_groups 32, as LDM always has; no tensor says it")
    return _numbers(shapes | base | said, where), notes


def _numbers(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The config, if its factors are numbers to reckon with."""
    factor, shift = config.get("scaling_factor", 1.0), config.get("shift_factor")
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise UserError(f"{where}: scaling_factor {factor} is no positive number")
    if shift is not None and not (isinstance(shift, int | float) and math.isfinite(shift)):
        raise UserError(f"{where}: shift_factor {shift} is no number")
    return config


def _read_config(path: Path) -> dict[str, Any]:
    if path.is_dir():
        path = path / "config.json"
    if path.suffix != ".json":
        return parse_ldm_config(path)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"there is no config file {path}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict) or content.get("_class_name") != "AutoencoderKL":
        raise UserError(f"{path} is no config of diffusers' AutoencoderKL")
    # A diffusers config without it, as SD 1.x has, means diffusers' default.
    return {"scaling_factor": FAMILIES["sd1"]["scaling_factor"]} | content


def _require_agreement(
    shapes: dict[str, Any], config: dict[str, Any], where: str, speaker: str
) -> None:
    for key, value in shapes.items():
        if config.get(key, value) != value:
            raise UserError(f"{where} has {key} {value}, and {speaker} says {config[key]}")


def _layout(shapes: dict[str, Any]) -> tuple[int, bool]:
    return shapes["latent_channels"], shapes["use_quant_conv"]


def _require_family(shapes: dict[str, Any], family: str, where: str) -> None:
    channels, quant = _LAYOUTS[family]
    if _layout(shapes) != (channels, quant):
        raise UserError(
            f"{where} is no {family}: it has {_words(*_layout(shapes))}, where {family} has "
            f"{_words(channels, quant)}"
        )


def _words(channels: int, quant: bool) -> str:
    return f"{channels} latent channels {'with' if quant else 'without'} quant convolutions"


def _advice(shapes: dict[str, Any]) -> str:
    """Which families have these latents: their factors differ, and no shape tells them apart."""
    same = [
        f"--family {name} ({FAMILIES[name]['scaling_factor']})"
        for name, layout in _LAYOUTS.items()
        if layout == _layout(shapes)
    ]
    others = "--scaling-factor or --config"
    if not same:
        return f"nothing known has {_words(*_layout(shapes))}; give {others}"
    return f"its shapes fit several models; give {', '.join(same)}, {others}"
