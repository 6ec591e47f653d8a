"""Latents of which only the direction counts, brought to about length 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latent_ae.autoencoder import encode_mode
from latent_ae.network_kinds import Network
from latent_ae.quantized import QuantizedAutoencoder
from latent_ae.stock_vq import is_plain

__all__ = ["settle_lengths"]


@torch.no_grad()
def settle_lengths(network: Network, images: Tensor) -> bool:
    """Scales what comes before a quantiser of directions, so that its latents have length about 1.

    Training holds their length to nothing. `VQModel` finds the nearest entry by |z|² + 1 − 2 z·e,
    which in fp32 forgets the last term where |z| is large. The factor is a power of two: no weight
    is rounded, and no direction changes.

    Args:
        network: in fp32; changed in place where it has one codebook of directions, else left alone.
        images: of shape (B, C, H, W), in [-1, 1].

    Returns:
        Whether it was changed.
    """
    if not isinstance(network, QuantizedAutoencoder) or not network.config["normalized"]:
        return False
    if not is_plain(network.config):  # our own class looks at directions
        return False
    length = encode_mode(network, images)[0].norm(dim=1).square().mean().sqrt().item()
    if not math.isfinite(length) or length == 0:
        return False
    factor = 2.0 ** -round(math.log2(length))
    network.quant_conv.weight.mul_(factor)
    assert network.quant_conv.bias is not None
    network.quant_conv.bias.mul_(factor)
    return factor != 1
