"""The scale of the latents put into the weights, for pipelines that know nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

__all__ = ["fold_statistics"]


@torch.no_grad()
def fold_statistics(network: AutoencoderKL, mean: Sequence[float], std: Sequence[float]) -> None:
    """Changes the weights so that latents come out as (z − mean) / std, channel by channel.

    `quant_conv` takes the change after the encoder and `post_quant_conv` undoes it before the
    decoder. Both are convolutions of 1 × 1, so nothing changes at the borders and reconstructions
    stay what they were but for rounding; a network without them gets them. The posterior's
    log-variance moves by −2 log std.

    Args:
        network: changed in place, config included.
        mean: of each latent channel.
        std: of each latent channel, above 0.
    """
    offset, factor = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    channels = len(offset)
    if network.quant_conv is None:
        network.quant_conv = _identity(network, 2 * channels)
    if network.post_quant_conv is None:
        network.post_quant_conv = _identity(network, channels)
    network.register_to_config(use_quant_conv=True, use_post_quant_conv=True)

    inward: Any = network.quant_conv
    weight, bias = inward.weight.double().cpu(), inward.bias.double().cpu()
    weight[:channels] /= factor.view(-1, 1, 1, 1)
    bias[:channels] = (bias[:channels] - offset) / factor
    bias[channels:] -= 2 * factor.log()
    _put(inward, weight, bias)

    outward: Any = network.post_quant_conv
    weight, bias = outward.weight.double().cpu(), outward.bias.double().cpu()
    bias += weight[..., 0, 0] @ offset
    weight *= factor.view(1, -1, 1, 1)
    _put(outward, weight, bias)


def _identity(network: AutoencoderKL, channels: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, channels, 1)
    layer.weight.copy_(torch.eye(channels)[..., None, None])
    layer.bias.zero_()  # pyright: ignore[reportOptionalMemberAccess]
    return layer.to(network.device, network.dtype)


def _put(layer: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)  # pyright: ignore[reportOptionalMemberAccess]
