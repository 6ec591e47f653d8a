"""diffusers' networks: where they come from, and what is asked of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel

from latent_ae.config import (
    AnyBottleneck,
    AnyNetwork,
    FSQConfig,
    LFQConfig,
    NetworkConfig,
    VQConfig,
    VQNetworkConfig,
)
from latent_ae.errors import UserError
from latent_ae.network_folders import folder_config, network_in
from latent_ae.network_kinds import NETWORKS, Network, NetworkSpec, class_names, spec_named, spec_of
from latent_ae.quantized import QuantizedAutoencoder
from latent_ae.stock_vq import normalize_, quantized_of

__all__ = [
    "build_network",
    "code_channels",
    "downsampling",
    "image_channels",
    "load_network",
    "network_like",
    "require_checkpointing",
    "require_divisible",
    "require_statistics",
    "tidy_config",
    "untrained_network",
]


def build_network(network: AnyNetwork, bottleneck: AnyBottleneck | None = None) -> Network:
    """The network of a config: loaded from its `path`, or with new weights.

    Args:
        network: the section.
        bottleneck: that of the same config; needed where it quantises.

    Raises:
        UserError: nothing that can be trained here lies at `path`, or it gives other channels than
            it takes.
    """
    if network.path is not None:
        found = _to_train(network.path)
        wanted = isinstance(bottleneck, VQConfig) and bottleneck.normalized
        if wanted and isinstance(found, QuantizedAutoencoder):
            normalize_(found)  # a stock folder cannot say so
        return found
    keys = network.model_dump(exclude={"kind", "path", "freeze", "init"})
    if isinstance(network, NetworkConfig):
        keys |= _blocks(network.block_out_channels) | {
            "use_post_quant_conv": network.use_quant_conv,
            "out_channels": network.in_channels,
        }
    elif isinstance(network, VQNetworkConfig):
        assert isinstance(bottleneck, VQConfig | FSQConfig | LFQConfig), (
            "what quantises is not said"
        )
        channels = network.channels_for(bottleneck)
        keys |= _blocks(network.block_out_channels) | {
            "out_channels": network.in_channels,
            "vq_embed_dim": channels,
            "latent_channels": network.latent_channels or channels,
            **bottleneck.said(),
        }
    elif network.kind == "tiny":
        keys["out_channels"] = network.in_channels
    return NETWORKS[network.kind].network(**keys, scaling_factor=1.0)  # until export measures it


def _to_train(path: str) -> Network:
    network = load_network(path)
    taken, given = (network.config.get(f"{side}_channels") for side in ("in", "out"))
    if given not in (None, taken):
        raise UserError(
            f"network.path {path} takes {taken} channels and gives {given}; a network to train "
            "gives as many as it takes"
        )
    return network


def _blocks(widths: tuple[int, ...]) -> dict[str, tuple[str, ...]]:
    """The types of blocks, one a level, that diffusers wants told."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }


def load_network(path: str | Path, dtype: torch.dtype = torch.float32) -> Network:
    """Loads an exported folder, or any of diffusers' that holds one of `NETWORKS`, from disk.

    A `VQModel` comes as the `QuantizedAutoencoder` that does the same.

    Raises:
        UserError: there is no such folder, or it holds another class.
    """
    folder = Path(path)
    if folder_config(folder)["_class_name"] == VQModel.__name__:
        return quantized_of(network_in(folder, VQModel, dtype))
    return network_in(folder, _spec_in(folder).network, dtype)


def _spec_in(folder: Path) -> NetworkSpec:
    name = folder_config(folder)["_class_name"]
    spec = spec_named(name)
    if spec is None:
        raise UserError(f"{folder} holds a {name}, not one of {', '.join(class_names())}")
    return spec


def network_like(network: Network) -> Network:
    """A network of the same class and config, with weights of its own."""
    return _from_config(spec_of(network), network.config)


def untrained_network(path: str | Path) -> Network:
    """A network of the class and config in a folder, with new weights.

    Raises:
        UserError: there is no such folder, or it holds another class.
    """
    return _from_config(_spec_in(Path(path)), folder_config(path))


def _from_config(spec: NetworkSpec, config: Mapping[str, Any]) -> Network:
    taken = {key: value for key, value in config.items() if key not in spec.added}
    network: Any = spec.network.from_config(taken)
    return network


def tidy_config(network: Network, folder: Path) -> None:
    """Takes out of a saved config.json what its class does not take, and where it came from."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    for key in (*spec_of(network).added, "_name_or_path"):  # the path means nothing elsewhere
        content.pop(key, None)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def downsampling(network: Network) -> int:
    """The factor f between the side of an image and the side of its latents."""
    return 2 ** (len(network.config[spec_of(network).levels]) - 1)


def image_channels(network: Network) -> int:
    """The channels C of the images that a network takes and gives."""
    return network.config["in_channels"]


def code_channels(network: Network) -> int:
    """The channels c of the latents that a network's bottleneck gives."""
    return network.config.get("vq_embed_dim") or network.config["latent_channels"]


def require_checkpointing(network: Network) -> None:
    """Raises `UserError` where activations cannot be computed again in the backward pass."""
    spec = spec_of(network)
    if not spec.checkpoints:
        raise UserError(
            f"training.gradient_checkpointing: diffusers' {spec.name} has none that can be used; "
            "leave it out"
        )


def require_statistics(network: Network, frozen: bool) -> None:
    """Raises `UserError` where the latents may move and export could not say how to scale them.

    Args:
        network: that is to be trained.
        frozen: whether its encoder is.
    """
    spec = spec_of(network)
    if not spec.statistics and not frozen:
        raise UserError(
            f"diffusers' {spec.name} keeps its latents' statistics in a BatchNorm, which training "
            "all of it would leave behind: set network.freeze=encoder to train its decoder"
        )


def require_divisible(resolution: int, network: Network, key: str = "resolution") -> None:
    """Raises `UserError` unless the network's factor divides a side of `resolution` pixels."""
    factor = downsampling(network)
    if resolution % factor:
        raise UserError(f"{key} {resolution} is no multiple of the network's factor {factor}")
