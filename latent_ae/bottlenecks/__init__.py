"""What stands between encoder and decoder: the mathematics that diffusers leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from latent_ae.bottlenecks.base import Bottleneck
from latent_ae.bottlenecks.finite import FSQBottleneck, LFQBottleneck
from latent_ae.bottlenecks.gaussian import (
    LOGVAR_RANGE,
    KLBottleneck,
    NoBottleneck,
    gaussian_kl,
    split_moments,
)
from latent_ae.bottlenecks.vector import VQBottleneck
from latent_ae.config import AnyBottleneck
from latent_ae.quantized import QuantizedAutoencoder

__all__ = [
    "BOTTLENECKS",
    "LOGVAR_RANGE",
    "Bottleneck",
    "FSQBottleneck",
    "KLBottleneck",
    "LFQBottleneck",
    "NoBottleneck",
    "VQBottleneck",
    "build_bottleneck",
    "gaussian_kl",
    "split_moments",
]

# From a config, the network's quantiser where it has one, and whether the encoder learns.
BOTTLENECKS: dict[str, Callable[[Any, Any, bool], Bottleneck]] = {
    "kl": lambda config, quantizer, learns: KLBottleneck(deterministic=config.weight == 0),
    "none": lambda config, quantizer, learns: NoBottleneck(),
    "vq": lambda config, quantizer, learns: VQBottleneck(quantizer, config, learns),
    "fsq": lambda config, quantizer, learns: FSQBottleneck(quantizer, config),
    "lfq": lambda config, quantizer, learns: LFQBottleneck(quantizer, config),
}


def build_bottleneck(config: AnyBottleneck, network: Any, *, learns: bool = True) -> Bottleneck:
    """The bottleneck of a config (its `kind` has been validated against `BOTTLENECKS`).

    Args:
        config: the section.
        network: diffusers' autoencoder, which holds the quantiser of a bottleneck that has one.
        learns: whether the encoder is trained.
    """
    quantizer = network.quantize if isinstance(network, QuantizedAutoencoder) else None
    return BOTTLENECKS[config.kind](config, quantizer, learns)
