"""diffusers' networks: built from a config, or loaded from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from latent_ae.config import NetworkConfig
from latent_ae.errors import UserError
from latent_ae.network_folders import folder_config, only_variant

__all__ = ["build_network", "downsampling", "load_network", "require_divisible"]


def build_network(config: NetworkConfig) -> AutoencoderKL:
    """The `AutoencoderKL` of a config: loaded from `path`, or with new weights.

    Raises:
        UserError: nothing that diffusers can load lies at `path`.
    """
    if config.path is not None:
        return load_network(config.path)
    levels = len(config.block_out_channels)
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return AutoencoderKL(
        **config.model_dump(exclude={"path", "init"}),
        use_post_quant_conv=config.use_quant_conv,
        **blocks,
        scaling_factor=1.0,  # until export measures it
    )


def load_network(path: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Loads an exported folder, or any `AutoencoderKL` folder of diffusers', from disk.

    Raises:
        UserError: there is no such folder, or it is no `AutoencoderKL`.
    """
    folder = Path(path)
    name = folder_config(folder)["_class_name"]
    if name != "AutoencoderKL":
        raise UserError(f"{folder} holds a {name}, not an AutoencoderKL")
    try:
        network = AutoencoderKL.from_pretrained(
            folder,
            torch_dtype=dtype,
            variant=only_variant(folder),
            local_files_only=True,
            low_cpu_mem_usage=False,
            use_safetensors=True,  # never a pickle
        )
    except Exception as error:  # diffusers', safetensors' and torch's
        raise UserError(f"the autoencoder at {folder} cannot be loaded: {error}") from error
    return network  # pyright: ignore[reportReturnType]


def downsampling(network: AutoencoderKL) -> int:
    """The factor f between the side of an image and the side of its latents."""
    return 2 ** (len(network.config["block_out_channels"]) - 1)


def require_divisible(resolution: int, network: AutoencoderKL, key: str = "resolution") -> None:
    """Raises `UserError` unless the network's factor divides a side of `resolution` pixels."""
    factor = downsampling(network)
    if resolution % factor:
        raise UserError(f"{key} {resolution} is no multiple of the network's factor {factor}")
