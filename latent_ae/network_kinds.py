"""diffusers' networks: what differs between their classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from torch import Tensor, nn

from latent_ae.config import FITTING
from latent_ae.quantized import QuantizedAutoencoder

__all__ = ["NETWORKS", "Network", "NetworkSpec", "class_names", "spec_named", "spec_of"]

Network: TypeAlias = (
    AutoencoderKL | AutoencoderKLFlux2 | AutoencoderDC | AutoencoderTiny | QuantizedAutoencoder
)


@dataclass(frozen=True)
class NetworkSpec:
    """What the rest of the package must know of one of diffusers' classes.

    Attributes:
        network: the class.
        levels: the key of its config that has an entry for each level; each after the first halves
            the side.
        encoded: what the bottleneck takes, from what `encode` returns.
        bottlenecks: the kinds that suit what the encoder gives.
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
    bottlenecks: tuple[str, ...]
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

    @property
    def posterior(self) -> bool:
        """Whether the encoder gives mean and log-variance, or latents alone."""
        return "kl" in self.bottlenecks

    @property
    def quantizes(self) -> bool:
        """Whether the latents become codes before they are decoded."""
        return "vq" in self.bottlenecks


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
    bottlenecks=FITTING["kl"],
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
        bottlenecks=FITTING["dc"],
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
        bottlenecks=FITTING["tiny"],
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
    "vq": replace(
        _KL,
        network=QuantizedAutoencoder,
        encoded=lambda output: output.latents,
        bottlenecks=FITTING["vq"],
        statistics=("scale",),
        encoder=lambda n: _present(n.encoder, n.quant_conv, n.quantize),
    ),
}
_BY_NAME = {spec.name: spec for spec in NETWORKS.values()}
# Loaded with a quantiser of ours, which can do the same.
_BY_NAME["VQModel"] = NETWORKS["vq"]


def spec_of(network: nn.Module) -> NetworkSpec:
    """The entry of `NETWORKS` for one of its networks."""
    return _BY_NAME[type(network).__name__]


def spec_named(class_name: str) -> NetworkSpec | None:
    """The entry of `NETWORKS` for a class of diffusers', if there is one."""
    return _BY_NAME.get(class_name)


def class_names() -> tuple[str, ...]:
    """Of all classes of diffusers' that `spec_named` knows."""
    return tuple(_BY_NAME)
