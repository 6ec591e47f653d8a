"""diffusers' autoencoders, faster and smaller in place: `accelerate_autoencoder(pipe.vae)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from latent_ae.acceleration.layers import FAST, fast_class

__all__ = ["accelerate_autoencoder", "accelerated_layers", "stock_layers"]

Network = TypeVar("Network", bound=nn.Module)
_STOCK = {fast: stock for stock, fast in FAST.items()}


def accelerate_autoencoder(network: Network, *, compile: bool = False) -> Network:
    """Makes an autoencoder of diffusers' compute the same in less time and memory, in place.

    Weights, names, config and `save_pretrained` stay as they are. Its convolutions' weights go into
    channels_last memory, and the layers of `AutoencoderKL` and its kin get forward passes of ours;
    layers that do more than stock ones (adapters, other processors of attention) keep theirs.

    Args:
        network: any of diffusers' autoencoders, in training or not.
        compile: give its blocks to `torch.compile`, each for the shapes that it meets; the first
            pictures of a shape then take from seconds to a minute.

    Returns:
        The same network.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if (fast := fast_class(module)) is not None:
            module.__class__ = fast
    if compile:
        for block in _blocks(network):
            block.compile(dynamic=False)
    return network


def accelerated_layers(network: nn.Module) -> int:
    """How many layers of a network have forward passes of ours."""
    return sum(type(module) in _STOCK for module in network.modules())


@contextmanager
def stock_layers(network: nn.Module) -> Iterator[None]:
    """Gives the layers their own forward passes back for a while, such as for hooks in them."""
    changed = [(m, type(m)) for m in network.modules() if type(m) in _STOCK]
    for module, kind in changed:
        module.__class__ = _STOCK[kind]
    try:
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind


def _blocks(network: Any) -> list[nn.Module]:
    """The units to compile: blocks that an encoder and a decoder consist of."""
    found: list[nn.Module] = []
    for coder in (network.encoder, network.decoder):
        for name in ("down_blocks", "mid_block", "up_blocks", "layers"):
            part = getattr(coder, name, None)
            if part is not None:
                found += part if isinstance(part, nn.ModuleList) else [part]
    return found
