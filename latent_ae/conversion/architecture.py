"""What an `AutoencoderKL` is made of: told by a config, or by the shapes of LDM's tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers import AutoencoderKL

from latent_ae.conversion.names import ldm_name, ldm_shape
from latent_ae.errors import UserError

__all__ = [
    "LDM_GROUPS",
    "Shapes",
    "attention_levels",
    "block_types",
    "complete_config",
    "diffusers_shapes",
    "require_same",
    "require_shapes",
    "shapes_config",
]

Shapes = dict[str, tuple[int, ...]]

DOWN = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")  # without and with attention
UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
LDM_GROUPS = 32  # `Normalize` in LDM's model.py


def complete_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A diffusers config with every key of `AutoencoderKL`, defaults filled in.

    Args:
        config: some of its keys.
        where: begins the sentence of the error.

    Raises:
        UserError: diffusers can build nothing from it.
    """
    network = _skeleton(config, where)
    whole = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in whole.items()}


def diffusers_shapes(config: dict[str, Any], where: str) -> Shapes:
    """The names and shapes of the tensors that diffusers makes of a config.

    Raises:
        UserError: diffusers can build nothing from it.
    """
    state = _skeleton(config, where).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def block_types(attention: Iterable[bool]) -> dict[str, list[str]]:
    """The config's types of blocks, from whether each level has attention, largest picture first.

    LDM decides once for both sides: `attn_resolutions`.
    """
    levels = list(attention)
    return {
        "down_block_types": [DOWN[flag] for flag in levels],
        "up_block_types": [UP[flag] for flag in reversed(levels)],
    }


def attention_levels(config: dict[str, Any]) -> tuple[list[bool], list[bool]]:
    """Which levels have attention, in the encoder and in the decoder, largest picture first.

    Raises:
        UserError: a block is of a type for which LDM has no counterpart.
    """
    for kinds in (config["down_block_types"], config["up_block_types"]):
        if len(kinds) != len(config["block_out_channels"]):
            raise UserError(
                f"the config has {len(config['block_out_channels'])} block_out_channels and "
                f"{len(kinds)} types of blocks: {', '.join(kinds)}"
            )
        for kind in kinds:
            if kind not in DOWN + UP:
                raise UserError(
                    f"LDM's layout has no counterpart of diffusers' {kind}; it can hold "
                    f"{', '.join(DOWN + UP)}"
                )
    down = [kind == DOWN[1] for kind in config["down_block_types"]]
    return down, [kind == UP[1] for kind in reversed(config["up_block_types"])]


def shapes_config(shapes: Shapes, where: str) -> dict[str, Any]:
    """Derives the keys of a diffusers config that the shapes of LDM's tensors decide.

    Args:
        shapes: by LDM's names, without a prefix.
        where: begins the sentence of the error.

    Raises:
        UserError: the tensors are of no KL autoencoder that `AutoencoderKL` can be.
    """
    shape = _shape_reader(shapes, where)
    levels = _count(shapes, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    widths = [shape(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    moments, latents = shape("encoder.conv_out.weight", 4)[0], shape("decoder.conv_in.weight", 4)[1]
    stem = shape("encoder.conv_in.weight", 4)
    if not levels or moments != 2 * latents:
        raise UserError(
            f"{where} is no KL autoencoder: its encoder gives {moments} channels over {levels} "
            f"levels and its decoder takes {latents}; twice as many are wanted, means and variances"
        )
    if stem[0] != widths[0]:
        raise UserError(
            f"{where}: encoder.conv_in has {stem[0]} channels and level 0 has {widths[0]} (LDM's "
            "ch_mult begins with another number than 1); AutoencoderKL has one width there"
        )
    _require_square_quant_conv(shapes, latents, where)
    return {
        "in_channels": stem[1],
        "out_channels": shape("decoder.conv_out.weight", 4)[0],
        "block_out_channels": widths,
        "layers_per_block": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight"),
        "latent_channels": latents,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        **block_types(f"encoder.down.{i}.attn.0.q.weight" in shapes for i in range(levels)),
    }


def require_shapes(found: Shapes, config: dict[str, Any], where: str) -> dict[str, str]:
    """Compares LDM's tensors with those that a config asks for: none missing, none too many.

    Args:
        found: by LDM's names, without a prefix.
        config: of diffusers.
        where: begins the sentence of the error.

    Returns:
        LDM's name of each of diffusers' tensors.

    Raises:
        UserError: they differ; the sentence names the tensors.
    """
    wanted = diffusers_shapes(config, where)
    names = {name: ldm_name(name, len(config["block_out_channels"])) for name in wanted}
    require_same({names[name]: ldm_shape(shape) for name, shape in wanted.items()}, found, where)
    return names


def require_same(wanted: Shapes, found: Shapes, where: str) -> None:
    """Raises `UserError`, naming the tensors, unless both have the same names and shapes."""
    problems = []
    if missing := sorted(wanted.keys() - found.keys()):
        problems.append(f"without {_listed(missing)}")
    if unknown := sorted(found.keys() - wanted.keys()):
        problems.append(f"with unknown tensors {_listed(unknown)}")
    wrong = [
        f"{name} of shape {found[name]} where {shape} is wanted"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    if wrong:
        problems.append(f"with {_listed(wrong)}")
    if problems:
        raise UserError(f"{where} is no such autoencoder: it comes {'; '.join(problems)}")


def _skeleton(config: dict[str, Any], where: str) -> AutoencoderKL:
    """The network without memory for its weights."""
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with torch.device("meta"):
            return AutoencoderKL.from_config(known)  # pyright: ignore[reportReturnType]
    except Exception as error:  # whatever diffusers and torch make of wrong values
        hint = "" if "norm_num_groups" in known else "; name norm_num_groups by --config"
        raise UserError(
            f"{where}: diffusers builds no AutoencoderKL of it: {error}{hint}"
        ) from error


def _count(shapes: Shapes, pattern: str) -> int:
    found = [int(match[1]) for name in shapes if (match := re.fullmatch(pattern, name))]
    return max(found, default=-1) + 1


def _shape_reader(shapes: Shapes, where: str) -> Callable[[str, int], tuple[int, ...]]:
    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in shapes:
            raise UserError(f"{where} is no first stage in LDM's layout: it has no {name}")
        if len(shapes[name]) != dimensions:
            raise UserError(
                f"{where} is no autoencoder of pictures: its {name} is of shape {shapes[name]}"
            )
        return shapes[name]

    return shape


def _require_square_quant_conv(shapes: Shapes, latents: int, where: str) -> None:
    embedded = shapes.get("post_quant_conv.weight", (latents, latents))
    if embedded[:2] != (latents, latents):
        raise UserError(
            f"{where}: its latents have {embedded[1]} channels outside the quant convolutions and "
            f"{latents} inside (LDM's embed_dim and z_channels); AutoencoderKL has one number"
        )


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + rest
