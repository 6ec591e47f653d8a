"""One tensor's name and shape in the two layouts: diffusers' `AutoencoderKL` and LDM's.

LDM's names are those of `ldm/modules/diffusionmodules/model.py` in CompVis/latent-diffusion. What
differs: LDM counts its decoder's levels from the largest picture, diffusers from the smallest; the
projections of attention are 1 × 1 convolutions there and matrices here.
"""

from __future__ import annotations

__all__ = ["ldm_name", "ldm_shape", "modern_name"]

_LEAVES = {"conv_shortcut": "nin_shortcut", "group_norm": "norm"}
_PROJECTIONS = {"to_q": "q", "to_k": "k", "to_v": "v"}
_KINDS = {"resnets": "block", "attentions": "attn"}
_SAMPLERS = {"downsamplers": "downsample", "upsamplers": "upsample"}
# Before diffusers 0.13 attention's projections had these names; it still reads them.
_FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def ldm_name(name: str, levels: int) -> str:
    """The name in LDM's layout of a tensor that diffusers calls `name`.

    Args:
        name: such as `decoder.up_blocks.0.resnets.2.conv1.weight`.
        levels: how many resolutions the network has.
    """
    match name.split("."):
        case [side, "down_blocks", level, kind, index, *leaf]:
            return ".".join([side, "down", level, *_part(kind, index, leaf)])
        case [side, "up_blocks", level, kind, index, *leaf]:
            return ".".join([side, "up", str(levels - 1 - int(level)), *_part(kind, index, leaf)])
        case [side, "mid_block", kind, index, *leaf]:
            return ".".join([side, "mid", f"{_KINDS[kind]}_{int(index) + 1}", *_leaf(leaf)])
        case [side, "conv_norm_out", leaf]:
            return f"{side}.norm_out.{leaf}"
    return name


def ldm_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape in LDM's layout: diffusers' only matrices are attention's projections."""
    return (*shape, 1, 1) if len(shape) == 2 else shape


def modern_name(name: str) -> str:
    """The present name in diffusers of a tensor that an old folder may call otherwise."""
    head, attention, tail = name.rpartition(".attentions.")
    index, _, leaf = tail.partition(".")
    projection, _, kind = leaf.partition(".")
    if attention and projection in _FORMER:
        return f"{head}{attention}{index}.{_FORMER[projection]}.{kind}"
    return name


def _part(kind: str, index: str, leaf: list[str]) -> list[str]:
    """Within a level: `resnets.1.…` is `block.1.…`, and a level has one sampler at most."""
    if kind in _SAMPLERS:
        return [_SAMPLERS[kind], *leaf]
    return [_KINDS[kind], index, *_leaf(leaf)]


def _leaf(leaf: list[str]) -> list[str]:
    if leaf[0] == "to_out":  # `to_out.0`; `to_out.1` is a dropout, which has no tensors
        return ["proj_out", *leaf[2:]]
    return [_LEAVES.get(leaf[0]) or _PROJECTIONS.get(leaf[0], leaf[0]), *leaf[1:]]
