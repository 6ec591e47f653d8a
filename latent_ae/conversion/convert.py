"""An autoencoder from diffusers' layout to LDM's, and back."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor

from latent_ae.autoencoder import WEIGHTS_FILE, folder_config
from latent_ae.conversion.architecture import (
    attention_levels,
    complete_config,
    diffusers_shapes,
    require_same,
    require_shapes,
    shapes_config,
)
from latent_ae.conversion.first_stage import find_first_stage
from latent_ae.conversion.ldm_config import dump_ldm_config, ldm_obstacles
from latent_ae.conversion.names import ldm_name, ldm_shape, modern_name
from latent_ae.conversion.scale import Hints, resolve_config
from latent_ae.conversion.tools import tool_notes
from latent_ae.conversion.weights import PICKLED, WeightFile, folder_weights, same_bits, serialized
from latent_ae.errors import UserError
from latent_ae.folders import folder_aside, require_free, whole_folder
from latent_ae.frozen import PRECISIONS

__all__ = ["Conversion", "convert"]

RECORD = "latent_ae.config"  # the metadata's key under which a file keeps its diffusers config


@dataclass(frozen=True)
class Conversion:
    """What `convert` has made.

    Attributes:
        target: the file or folder.
        layout: `ldm` or `diffusers`.
        tensors: how many.
        dtypes: how many tensors there are of each dtype.
        config: diffusers' config of the network.
        notes: what a person should know, a sentence each.
    """

    target: Path
    layout: str
    tensors: int
    dtypes: dict[str, int]
    config: dict[str, Any]
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    prefix: str | None = None,
    dtype: str | None = None,
    ema: bool = False,
    family: str | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    config: str | Path | None = None,
) -> Conversion:
    """Converts a diffusers folder to a single file in LDM's layout, or such a file to a folder.

    Everything is derived from the config or, the other way, from the tensors' shapes. Nothing is
    left over and nothing is missing; what was written is read again and compared bit by bit before
    it appears. The file carries the folder's config, so the way back is exact.

    Args:
        source: a folder of `AutoencoderKL`, or a `.safetensors`, `.ckpt`, `.pt`, `.pth` or `.bin`
            file; it may be a whole checkpoint, of which the first stage alone is read.
        target: a `.safetensors` file, beside which a YAML for LDM appears where LDM's class can be
            this network; or a folder. Must not exist yet.
        prefix: before the names of a file's tensors: none is what ComfyUI's and AUTOMATIC1111's
            folders of VAEs want, `first_stage_model.` what a whole checkpoint has. Read from the
            file when left out.
        dtype: `fp32`, `fp16` or `bf16`; each tensor keeps its own when left out.
        ema: take the averaged weights of an LDM training run.
        family: `sd1`, `sdxl`, `sd3` or `flux`: whose scale and shift a foreign file's latents have.
        scaling_factor: likewise: final = (raw − shift_factor) · scaling_factor.
        shift_factor: likewise.
        config: a diffusers `config.json` or an LDM YAML that describes a foreign file.

    Returns:
        What was made, and what a person should know about it.

    Raises:
        UserError: a tensor is missing, unknown or misshapen, the scale is unknown, the layout
            cannot hold the network, or `target` exists.
    """
    source, target = Path(source), Path(target).absolute()
    hints = Hints(None if config is None else Path(config), family, scaling_factor, shift_factor)
    if dtype is not None and dtype not in PRECISIONS:
        raise UserError(f"dtype {dtype!r} is unknown; valid: {', '.join(PRECISIONS)}")
    if prefix and not prefix.endswith("."):
        raise UserError(f"the prefix {prefix!r} does not end in a dot; try {prefix + '.'!r}")
    if not source.exists():
        raise UserError(f"there is no folder or file {source}")
    if not source.is_dir():
        return _to_folder(source, target, prefix, dtype, ema, hints)
    if ema or hints.any():
        raise UserError(
            f"{source} is a diffusers folder: its config.json says its scale and all else; --ema, "
            "--family, --scaling-factor, --shift-factor and --config are for single files"
        )
    return _to_file(source, target, prefix or "", dtype)


def _to_file(source: Path, target: Path, prefix: str, dtype: str | None) -> Conversion:
    if target.suffix != ".safetensors":
        raise UserError(f"{source} is a folder, so the target is a .safetensors file, not {target}")
    described = target.with_suffix(".yaml")
    for path in (target, described):
        if path.exists():
            raise UserError(f"{path} exists already; remove it or choose another name")
    record = _folder_config(source)
    config = complete_config(record, str(source))
    _require_expressible(config, source)
    stored = {modern_name(name): tensor for name, tensor in folder_weights(source).items()}
    wanted = diffusers_shapes(config, str(source))
    require_same(wanted, {name: tuple(t.shape) for name, t in stored.items()}, str(source))
    stored = _cast(stored, dtype, source)
    levels = len(config["block_out_channels"])
    names = {name: prefix + ldm_name(name, levels) for name in stored}
    tensors = {names[n]: t.reshape(ldm_shape(tuple(t.shape))) for n, t in stored.items()}
    obstacles = ldm_obstacles(config)
    with folder_aside(target) as aside:
        weights = aside / target.name
        weights.write_bytes(serialized(tensors, {"format": "pt", RECORD: json.dumps(record)}))
        _require_same_bits(stored, _as_diffusers(WeightFile(weights), names, wanted))
        if not obstacles:
            (aside / described.name).write_text(dump_ldm_config(config, target.name))
        weights.rename(target)
        if not obstacles:
            (aside / described.name).rename(described)
    notes = [f"no YAML for LDM: its class cannot have {'; '.join(obstacles)}"] if obstacles else []
    notes = notes or [f"LDM's config is {described.name}"]
    notes += tool_notes(config) if not prefix else []
    return _conversion(target, "ldm", stored, record, notes)


def _to_folder(
    source: Path, target: Path, prefix: str | None, dtype: str | None, ema: bool, hints: Hints
) -> Conversion:
    if target.suffix in (".safetensors", *PICKLED):
        raise UserError(f"{source} is a file, so the target is a folder, not {target}")
    require_free(target)
    where, file = str(source), WeightFile(source)
    found = find_first_stage(file, prefix, ema)
    derived = shapes_config(found.shapes, where)
    recorded = _recorded(file)
    config, notes = resolve_config(derived, recorded, found.measured, hints, where)
    names = require_shapes(found.shapes, config, where)
    if recorded is None or hints.config is not None:
        config = complete_config(config, where)
    config |= {"_class_name": "AutoencoderKL"}
    config.setdefault("_diffusers_version", version("diffusers"))
    in_file = {name: found.names[ldm] for name, ldm in names.items()}
    wanted = diffusers_shapes(config, where)
    tensors = _cast(_as_diffusers(file, in_file, wanted), dtype, source)
    with whole_folder(target) as aside:
        (aside / WEIGHTS_FILE).write_bytes(serialized(tensors, {"format": "pt"}))
        (aside / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        _require_stock_loads(aside, tensors)
    return _conversion(target, "diffusers", tensors, config, [*found.notes, *notes])


def _folder_config(folder: Path) -> dict[str, Any]:
    config = folder_config(folder)
    name = config["_class_name"]
    if name != "AutoencoderKL":
        raise UserError(
            f"{folder} is of class {name}, for which LDM has no layout; AutoencoderKL has one"
        )
    config.pop("_name_or_path", None)  # means nothing on another machine
    return config


def _require_expressible(config: dict[str, Any], source: Path) -> None:
    attention_levels(config)  # refuses other types of blocks
    if config["act_fn"] not in ("silu", "swish"):
        raise UserError(
            f"{source} has act_fn {config['act_fn']!r}; all readers of LDM's layout compute SiLU"
        )


def _recorded(file: WeightFile) -> dict[str, Any] | None:
    """The config that `convert` has left in a file."""
    if RECORD not in file.metadata:
        return None
    try:
        return dict(json.loads(file.metadata[RECORD]))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file.path}: its metadata's {RECORD} is no JSON object") from error


def _as_diffusers(
    file: WeightFile, names: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """A file's tensors by diffusers' names and in their shapes."""
    return {name: file.tensor(names[name]).reshape(shapes[name]) for name in shapes}


def _cast(tensors: dict[str, Tensor], dtype: str | None, source: Path) -> dict[str, Tensor]:
    if dtype is None:
        return {name: tensor.contiguous() for name, tensor in tensors.items()}
    cast = {name: tensor.to(PRECISIONS[dtype]).contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.isfinite().all() and not cast[name].isfinite().all():
            raise UserError(
                f"{source}: {name} has values up to {tensor.abs().max().item():.3g}, which {dtype} "
                "cannot hold; choose bf16 or fp32"
            )
    return cast


def _require_same_bits(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Compares with what a reader makes of the file; a difference is a bug, not input."""
    for name, tensor in wanted.items():
        if not same_bits(tensor, found[name]):
            raise RuntimeError(f"{name} came back changed")


def _require_stock_loads(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Loads a folder with stock diffusers; anything missing or left over is a bug, not input."""
    loaded: Any = AutoencoderKL.from_pretrained(
        folder,
        local_files_only=True,
        low_cpu_mem_usage=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    network, told = loaded
    if any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise RuntimeError(f"stock diffusers loads the folder with {told}")
    state = network.state_dict()
    _require_same_bits(state, {name: tensors[name].to(state[name].dtype) for name in state})


def _conversion(
    target: Path, layout: str, tensors: dict[str, Tensor], config: dict[str, Any], notes: list[str]
) -> Conversion:
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    return Conversion(target, layout, len(tensors), dict(dtypes), config, tuple(notes))
