"""diffusers' autoencoders, faster and smaller in place: `accelerate_autoencoder(pipe.vae)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from latent_ae.acceleration.layers import FAST, all_fast, fast_class
from latent_ae.errors import UserError

__all__ = ["accelerate_autoencoder", "accelerated_layers", "stock_layers"]

Network = TypeVar("Network", bound=nn.Module)
_STOCK = {fast: stock for stock, fast in FAST.items()}


def accelerate_autoencoder(
    network: Network,
    *,
    channels_last: bool = True,
    compile: bool = False,
    memory: float | None = None,
    spill: str | Path | None = None,
) -> Network:
    """Makes an autoencoder of diffusers' compute the same in less time and memory, in place.

    Weights, names, config and `save_pretrained` stay as they are. The layers of `AutoencoderKL` and
    its kin get forward passes of ours; layers that do more than stock ones (adapters, other
    processors of attention) keep theirs.

    Args:
        network: any of diffusers' autoencoders, in training or not.
        channels_last: put the weights of convolutions into that layout.
        compile: give its blocks to `torch.compile`, each for the shapes that it meets; the first
            pictures of a shape then take from seconds to a minute.
        memory: bytes for activations on the device. Pictures that need more are encoded and decoded
            layer by layer in strips, with the same result, whenever autograd keeps nothing; on top
            of it come weights, keys and values of attention and the pictures themselves.
        spill: a folder on a disk for what a CPU then has no memory for; the system's for temporary
            files when left out. A GPU uses its host's memory.

    Returns:
        The same network.

    Raises:
        UserError: `memory` is given, and layers of the network are not stock ones.
    """
    for module in network.modules():
        if channels_last and isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if (fast := fast_class(module)) is not None:
            module.__class__ = fast  # pyright: ignore[reportAttributeAccessIssue]
    if memory is not None:
        _bound(network, memory, spill)
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


def _bound(network: Any, memory: float, spill: str | Path | None) -> None:
    if memory <= 0:
        raise UserError(f"memory is {memory}, not a number of bytes above 0")
    for coder in (network.encoder, network.decoder):
        if type(coder) not in _STOCK or not all_fast(coder):
            raise UserError(
                f"memory: strips know stock layers of AutoencoderKL and its kin; this "
                f"{type(network).__name__} has others"
            )
        coder.memory, coder.spill = float(memory), spill


def _blocks(network: Any) -> list[nn.Module]:
    """The units to compile: blocks that an encoder and a decoder consist of."""
    found: list[nn.Module] = []
    for coder in (network.encoder, network.decoder):
        for name in ("down_blocks", "mid_block", "up_blocks", "layers"):
            part = getattr(coder, name, None)
            if part is not None:
                found += part if isinstance(part, nn.ModuleList) else [part]
    return found
