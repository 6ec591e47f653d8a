"""diffusers' autoencoders, faster and smaller in place: `accelerate_autoencoder(pipe.vae)`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from latent_ae.acceleration.layers import FAST, fast_class, goes_in_strips
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
    its kin get forward passes of ours; layers that do more than stock ones (adapters, hooks,
    other processors of attention) run theirs, also where they get them later. What is not there:
    gradients of gradients and `torch.func`'s transforms (within `stock_layers` both are).

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
        UserError: `memory` is no number of bytes, or layers of the network are not stock ones, or
            there is no folder `spill`. Nothing is changed then.
    """
    _require(memory, spill)
    changed = [(m, fast) for m in network.modules() if (fast := fast_class(m)) is not None]
    _set_classes(changed)
    coders = _coders(network)
    if memory is not None and not (coders and all(map(goes_in_strips, coders))):
        _set_classes((module, _STOCK[fast]) for module, fast in changed)
        raise UserError(
            f"memory: strips know stock layers of AutoencoderKL and its kin; this "
            f"{type(network).__name__} has others"
        )
    for coder in coders:
        if type(coder) in _STOCK:
            coder.memory, coder.spill = math.inf if memory is None else float(memory), spill
    convolutions = [m for m in network.modules() if channels_last and isinstance(m, nn.Conv2d)]
    for module in convolutions:
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for block in _blocks(coders) if compile else []:
        block.compile(dynamic=False)
    return network


def accelerated_layers(network: nn.Module) -> int:
    """How many layers of a network have forward passes of ours."""
    return sum(type(module) in _STOCK for module in network.modules())


@contextmanager
def stock_layers(network: nn.Module) -> Iterator[None]:
    """Gives the layers their own forward passes back for a while, such as for hooks in them."""
    changed = [(m, type(m)) for m in network.modules() if type(m) in _STOCK]
    _set_classes((module, _STOCK[fast]) for module, fast in changed)
    try:
        yield
    finally:
        _set_classes(changed)


def _set_classes(changes: Iterable[tuple[nn.Module, type[nn.Module]]]) -> None:
    for module, kind in changes:
        module.__class__ = kind  # pyright: ignore[reportAttributeAccessIssue]


def _require(memory: float | None, spill: str | Path | None) -> None:
    if memory is not None and not memory > 0:
        raise UserError(f"memory is {memory}, not a number of bytes above 0")
    if spill is not None and not Path(spill).is_dir():
        raise UserError(f"spill: there is no folder {spill}")


def _coders(network: Any) -> list[Any]:
    """Encoder and decoder, where a network has them."""
    found = (getattr(network, name, None) for name in ("encoder", "decoder"))
    return [coder for coder in found if coder is not None]


def _blocks(coders: list[Any]) -> list[nn.Module]:
    """The units to compile: blocks that an encoder and a decoder consist of."""
    found: list[nn.Module] = []
    for coder in coders:
        for name in ("down_blocks", "mid_block", "up_blocks", "layers"):
            part = getattr(coder, name, None)
            if part is not None:
                found += part if isinstance(part, nn.ModuleList) else [part]
    return found
