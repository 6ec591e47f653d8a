"""diffusers' networks: what differs between their classes, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from torch import Tensor, nn

from latent_ae.config import AnyNetwork, NetworkConfig
from latent_ae.errors import UserError
from latent_ae.network_folders import folder_config, network_in

__all__ = [
    "NETWORKS",
    "Network",
    "NetworkSpec",
    "build_network",
    "downsampling",
    "image_channels",
    "load_network",
    "network_like",
    "require_checkpointing",
    "require_divisible",
    "require_statistics",
    "spec_named",
    "spec_of",
    "tidy_config",
    "untrained_network",
]

Network: TypeAlias = AutoencoderKL | AutoencoderKLFlux2 | AutoencoderDC | AutoencoderTiny


@dataclass(frozen=True)
class NetworkSpec:
    """What the rest of the package must know of one of diffusers' classes.

    Attributes:
        network: the class.
        levels: the key of its config that has an entry for each level; each after the first halves
            the side.
        encoded: what the bottleneck takes, from what `encode` returns.
        posterior: whether that are mean and log-variance, or latents alone.
        added: keys that its constructor writes into its config and does not take; diffusers warns
            of them wherever a config.json has them.
        statistics: those of `latent-ae export` that its config can hold; without any, its latents
            must not move.
        upcasts: whether its config can say `force_upcast`.
        checkpoints: whether it can compute activations again in the backward pass.
        encoder: the modules before the latents.
        decoder: the modules after them.
        blocks: each a unit to shard or to compile, without the outer layers.
        last_layer: the decoder's last convolution.
        at_last_layer: the gradient at that convolution's output, from the network and the gradient
            at the picture.
    """

    network: type[Any]
    levels: str
    encoded: Callable[[Any], Tensor]
    posterior: bool
    added: tuple[str, ...]
    statistics: tuple[str, ...]
    upcasts: bool
    checkpoints: bool
    encoder: Callable[[Any], list[nn.Module]]
    decoder: Callable[[Any], list[nn.Module]]
    blocks: Callable[[Any], list[nn.Module]]
    last_layer: Callable[[Any], nn.Conv2d]
    at_last_layer: Callable[[Any, Tensor], Tensor]

    @property
    def name(self) -> str:
        """Of diffusers' class."""
        return self.network.__name__


def _present(*modules: nn.Module | None) -> list[nn.Module]:
    """Those that there are and that have weights."""
    return [m for m in modules if m is not None and any(True for _ in m.parameters())]


def _dc_last_layer(network: AutoencoderDC) -> nn.Conv2d:
    """Where nothing is computed at full size, the last convolution is in an upsampling block."""
    last: Any = network.decoder.conv_out
    return last if isinstance(last, nn.Conv2d) else last.conv


def _dc_at_last_layer(network: AutoencoderDC, gradient: Tensor) -> Tensor:
    last: Any = network.decoder.conv_out
    shuffled = not isinstance(last, nn.Conv2d) and not last.interpolate
    return F.pixel_unshuffle(gradient, 2) if shuffled else gradient


def _tiny_blocks(network: AutoencoderTiny) -> list[nn.Module]:
    layers = [*network.encoder.layers, *network.decoder.layers]
    return [layer for layer in layers if hasattr(layer, "fuse")]  # AutoencoderTinyBlock


_KL = NetworkSpec(
    AutoencoderKL,
    levels="block_out_channels",
    encoded=lambda output: output.latent_dist.parameters,
    posterior=True,
    added=(),
    statistics=("scale", "shift", "channels", "folded"),
    upcasts=True,
    checkpoints=True,
    encoder=lambda n: _present(n.encoder, n.quant_conv),
    decoder=lambda n: _present(n.post_quant_conv, n.decoder),
    blocks=lambda n: _present(
        *n.encoder.down_blocks, n.encoder.mid_block, n.decoder.mid_block, *n.decoder.up_blocks
    ),
    last_layer=lambda n: n.decoder.conv_out,
    at_last_layer=lambda n, gradient: gradient,
)
NETWORKS = {
    "kl": _KL,
    # Loaded from a folder only. Its statistics are a BatchNorm's over patches of 2 × 2 latents,
    # which pipelines read.
    "flux2": replace(_KL, network=AutoencoderKLFlux2, statistics=(), upcasts=False),
    "dc": NetworkSpec(
        AutoencoderDC,
        levels="encoder_block_out_channels",
        encoded=lambda output: output.latent,
        posterior=False,
        added=(),
        statistics=("scale",),
        upcasts=False,
        checkpoints=False,
        encoder=lambda n: [n.encoder],
        decoder=lambda n: [n.decoder],
        blocks=lambda n: _present(*n.encoder.down_blocks, *n.decoder.up_blocks),
        last_layer=_dc_last_layer,
        at_last_layer=_dc_at_last_layer,
    ),
    "tiny": NetworkSpec(
        AutoencoderTiny,
        levels="encoder_block_out_channels",
        encoded=lambda output: output.latents,
        posterior=False,
        added=("block_out_channels",),
        statistics=("scale",),
        upcasts=False,  # it has the key, but its constructor sets it to false
        # diffusers' own leaves out the encoder's change from [-1, 1] to [0, 1].
        checkpoints=False,
        encoder=lambda n: [n.encoder],
        decoder=lambda n: [n.decoder],
        blocks=_tiny_blocks,
        last_layer=lambda n: n.decoder.layers[-1],
        at_last_layer=lambda n, gradient: 2 * gradient,  # its pictures are 2 · output − 1
    ),
}
_BY_NAME = {spec.name: spec for spec in NETWORKS.values()}


def spec_of(network: nn.Module) -> NetworkSpec:
    """The entry of `NETWORKS` for one of its networks."""
    return _BY_NAME[type(network).__name__]


def spec_named(class_name: str) -> NetworkSpec | None:
    """The entry of `NETWORKS` for a class of diffusers', if there is one."""
    return _BY_NAME.get(class_name)


def build_network(config: AnyNetwork) -> Network:
    """The network of a config: loaded from `path`, or with new weights.

    Raises:
        UserError: nothing that can be trained here lies at `path`, or it gives other channels than
            it takes.
    """
    if config.path is not None:
        network = load_network(config.path)
        taken, given = (network.config.get(f"{side}_channels") for side in ("in", "out"))
        if given not in (None, taken):
            raise UserError(
                f"network.path {config.path} takes {taken} channels and gives {given}; a network "
                "to train gives as many as it takes"
            )
        return network
    keys = config.model_dump(exclude={"kind", "path", "freeze", "init"})
    if isinstance(config, NetworkConfig):
        levels = len(config.block_out_channels)
        keys |= {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "use_post_quant_conv": config.use_quant_conv,
            "out_channels": config.in_channels,
        }
    elif config.kind == "tiny":
        keys["out_channels"] = config.in_channels
    return NETWORKS[config.kind].network(**keys, scaling_factor=1.0)  # until export measures it


def load_network(path: str | Path, dtype: torch.dtype = torch.float32) -> Network:
    """Loads an exported folder, or any of diffusers' that holds one of `NETWORKS`, from disk.

    Raises:
        UserError: there is no such folder, or it holds another class.
    """
    folder = Path(path)
    return network_in(folder, _spec_in(folder).network, dtype)


def _spec_in(folder: Path) -> NetworkSpec:
    name = folder_config(folder)["_class_name"]
    spec = spec_named(name)
    if spec is None:
        raise UserError(f"{folder} holds a {name}, not one of {', '.join(_BY_NAME)}")
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
