"""The autoencoder's tensors among those of an LDM checkpoint, and an account of all the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from latent_ae.conversion.architecture import Shapes
from latent_ae.conversion.weights import WeightFile
from latent_ae.errors import UserError

__all__ = ["FirstStage", "find_first_stage"]

_ANCHOR = "decoder.conv_in.weight"
# What a training run of LDM leaves beside the autoencoder, within its prefix.
_LOSS, _EMA = "loss.", "model_ema."


@dataclass(frozen=True)
class FirstStage:
    """Where an autoencoder's tensors lie in a file.

    Attributes:
        shapes: by LDM's names, without a prefix.
        names: in the file, by LDM's names.
        measured: the checkpoint's own `scale_factor`, where LDM has measured one.
        notes: what was found and what is left out.
    """

    shapes: Shapes
    names: dict[str, str]
    measured: float | None
    notes: list[str] = field(default_factory=list)


def find_first_stage(file: WeightFile, prefix: str | None, ema: bool) -> FirstStage:
    """Finds the autoencoder in a file, by the one place where a decoder begins.

    Args:
        file: of LDM's layout.
        prefix: before its names; found when None.
        ema: whether to take the averaged weights of a training run.

    Raises:
        UserError: there is no autoencoder, there are several, or no averaged weights.
    """
    prefix = _prefix(file) if prefix is None else prefix
    own = {name[len(prefix) :]: name for name in file.shapes if name.startswith(prefix)}
    losses = [name for name in own if name.startswith(_LOSS)]
    averaged = {name: own[name] for name in own if name.startswith(_EMA)}
    names = {ldm: own[ldm] for ldm in own if not ldm.startswith((_LOSS, _EMA))}
    notes = [f"its names begin with {prefix!r}"] if prefix else []
    if losses:
        notes.append(f"left out: {len(losses)} tensors of the training's losses ({_LOSS}*)")
    if ema:
        names = _averaged(names, averaged, file)
        notes.append("the averaged weights (model_ema.*) are taken, the others left out")
    elif averaged:
        notes.append(f"left out: {len(averaged)} tensors of averaged weights; --ema takes them")
    if others := Counter(name.split(".")[0] for name in file.shapes.keys() - set(own.values())):
        told = ", ".join(f"{count} of {name}" for name, count in others.most_common(6))
        notes.append(f"left out: {others.total()} tensors beside the autoencoder ({told})")
    shapes = {ldm: file.shapes[name] for ldm, name in names.items()}
    return FirstStage(shapes, names, _measured(file, prefix), notes)


def _prefix(file: WeightFile) -> str:
    found = sorted(n.removesuffix(_ANCHOR) for n in file.shapes if n.endswith(_ANCHOR))
    if any(".up_blocks." in name or name.startswith("up_blocks.") for name in file.shapes):
        raise UserError(
            f"{file.path} has diffusers' names already; its folder, with the config.json, is what "
            "AutoencoderKL.from_pretrained loads"
        )
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{file.path} holds several autoencoders; choose one with --prefix: "
            f"{', '.join(map(repr, found))}"
        )
    some = ", ".join(list(file.shapes)[:3])
    raise UserError(f"{file.path} holds no autoencoder: no *{_ANCHOR} among {some}, …")


def _averaged(names: dict[str, str], averaged: dict[str, str], file: WeightFile) -> dict[str, str]:
    """LDM's `LitEma` names its buffers after the parameters, without their dots."""
    buffers = {name: averaged.get(_EMA + name.replace(".", "")) for name in names}
    missing = [name for name, buffer in buffers.items() if buffer is None]
    if missing:
        raise UserError(
            f"{file.path} holds no averaged weights ({_EMA}*) of {len(missing)} tensors, such as "
            f"{missing[0]}; leave --ema out"
        )
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def _measured(file: WeightFile, prefix: str) -> float | None:
    """LDM's `LatentDiffusion` keeps the scale as a buffer, where it measured one (scale_by_std)."""
    if not prefix or file.shapes.get("scale_factor") not in ((), (1,)):
        return None
    return float(file.tensor("scale_factor"))
