"""LDM's YAML of a first stage: written from a diffusers config, and read back to one.

The form is that of `models/first_stage_models/kl-f8/config.yaml` in CompVis/latent-diffusion.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from latent_ae.config_file import read_yaml
from latent_ae.conversion.architecture import LDM_GROUPS, attention_levels, block_types
from latent_ae.errors import UserError

__all__ = ["dump_ldm_config", "ldm_obstacles", "parse_ldm_config"]

_HEAD = """\
# LDM's config of {name} (a first stage of ldm.models.autoencoder.AutoencoderKL).
# scale_factor is an argument of LatentDiffusion, not of the first stage.
"""


def ldm_obstacles(config: dict[str, Any]) -> list[str]:
    """Why LDM's own `AutoencoderKL` class cannot be this network; empty where it can.

    Args:
        config: of diffusers, complete.
    """
    widths, (down, up) = config["block_out_channels"], attention_levels(config)
    found = []
    if config["norm_num_groups"] != LDM_GROUPS:
        found.append(f"norm_num_groups {config['norm_num_groups']}, where LDM has {LDM_GROUPS}")
    if any(width % widths[0] for width in widths):
        found.append(f"block_out_channels {widths}, which are no multiples of the first")
    if not (config["use_quant_conv"] and config["use_post_quant_conv"]):
        found.append("no quant convolutions, which LDM always has")
    if down != up:
        found.append("attention at other levels of the encoder than of the decoder")
    if not config["mid_block_add_attention"] and any(down):
        found.append("attention at some level but not in the middle")
    return found


def dump_ldm_config(config: dict[str, Any], name: str) -> str:
    """The YAML of a network that LDM's class can be.

    Args:
        config: of diffusers, complete.
        name: of the weights' file.
    """
    widths, (down, _) = config["block_out_channels"], attention_levels(config)
    resolution = _resolution(config)
    ddconfig = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": resolution,
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [resolution >> level for level, flag in enumerate(down) if flag],
        "dropout": 0.0,
    }
    if not config["mid_block_add_attention"]:
        ddconfig["attn_type"] = "none"
    params = {
        "embed_dim": config["latent_channels"],
        "lossconfig": {"target": "torch.nn.Identity"},
        "ddconfig": ddconfig,
    }
    content = {
        "model": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params},
        "scale_factor": config["scaling_factor"],
    }
    return _HEAD.format(name=name) + yaml.safe_dump(content, sort_keys=False)


def parse_ldm_config(path: Path) -> dict[str, Any]:
    """The keys of a diffusers config that an LDM YAML decides.

    Args:
        path: a YAML of a first stage, or of a whole latent diffusion model; of the latter, and
            of what `dump_ldm_config` writes, the scale is read too.

    Raises:
        UserError: it is none, or of a network that `AutoencoderKL` cannot be.
    """
    content = read_yaml(path)
    try:
        model = content["model"]["params"]
        params = model["first_stage_config"]["params"] if "first_stage_config" in model else model
        ddconfig, scale = params["ddconfig"], model.get("scale_factor", content.get("scale_factor"))
        resolution, multipliers = ddconfig["resolution"], ddconfig["ch_mult"]
        sides = [resolution >> level for level in range(len(multipliers))]
        config: dict[str, Any] = {
            "in_channels": ddconfig["in_channels"],
            "out_channels": ddconfig["out_ch"],
            "block_out_channels": [ddconfig["ch"] * factor for factor in multipliers],
            "layers_per_block": ddconfig["num_res_blocks"],
            "latent_channels": ddconfig["z_channels"],
            "sample_size": resolution,
            "mid_block_add_attention": ddconfig.get("attn_type") != "none",
            **block_types(side in ddconfig["attn_resolutions"] for side in sides),
        }
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is no config of an LDM first stage: {error!r}") from error
    odd = [key for key in ("use_linear_attn", "tanh_out", "give_pre_end") if ddconfig.get(key)]
    if odd or ddconfig.get("attn_type") == "linear":
        names = ", ".join(odd or ["attn_type: linear"])
        raise UserError(f"{path} asks for {names}, which diffusers' AutoencoderKL does not have")
    return config if scale is None else config | {"scaling_factor": scale}


def _resolution(config: dict[str, Any]) -> int:
    """The side of training pictures, by which LDM names the levels that have attention."""
    side, factor = config["sample_size"], 2 ** (len(config["block_out_channels"]) - 1)
    return side if isinstance(side, int) and side > 0 and side % factor == 0 else 8 * factor
