"""FSDP2 by one key: weights, gradients and optimizer shared out over the processes.

Checkpoints hold whole tensors whatever the run, so a sharded run goes on unsharded, and on another
number of processes. Every function here that returns whole tensors is a collective: all processes
call it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from latent_ae.autoencoder import Autoencoder

__all__ = ["alike", "clip_gradients", "fill_", "like_parameters", "shard_", "whole"]


def shard_(model: Autoencoder, device: torch.device, world: int) -> None:
    """Shards a model in place: each block of the network by itself, the rest with the whole."""
    mesh = init_device_mesh(device.type, (world,))
    for value in model.state_dict().values():  # as DDP does: all begin with the main one's
        dist.broadcast(value, src=0)
    for block in model.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(value: Any, keep: bool = True) -> Any:
    """The same structure of dicts, lists and tensors with every sharded tensor gathered.

    Args:
        value: the structure.
        keep: what is gathered goes to the host's memory, tensor by tensor; or nowhere.
    """
    if isinstance(value, DTensor):
        gathered = value.full_tensor()
        return gathered.cpu() if keep else torch.empty(0)
    if isinstance(value, dict):
        return {key: whole(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item, keep) for item in value]
    return value


@torch.no_grad()
def fill_(target: Tensor, source: Tensor) -> None:
    """Copies a whole tensor into one that may be sharded."""
    target.copy_(_as(source, target))


def parameters_of(optimizer: Any) -> list[nn.Parameter]:
    """All that an optimizer trains, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def like_parameters(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """An optimizer's whole state, its moments sharded as its parameters are."""
    parameters = parameters_of(optimizer)
    moments = {
        index: {
            name: _as(value, parameters[index]) if value.dim() else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
        if index < len(parameters)  # the objective's come last, and may have been put down
    }
    return {**state, "state": moments}


def alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The sharded ones, then the others: torch's kernels for many tensors take one kind at a time.

    The objective's parameters are never sharded, and come last in any case.
    """
    parameters = list(parameters)
    kinds = [
        [p for p in parameters if isinstance(p, DTensor) is sharded] for sharded in (True, False)
    ]
    return [kind for kind in kinds if kind]


def clip_gradients(optimizer: Any, largest: float) -> Tensor:
    """Scales an optimizer's gradients to at most this length, in place; returns what it was."""
    kinds = alike(p for p in parameters_of(optimizer) if p.grad is not None)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in kind]) for kind in kinds]  # pyright: ignore
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, largest, norm)
    return norm


def _as(source: Tensor, target: Tensor) -> Tensor:
    if isinstance(target, DTensor):
        source = source.to(target.device, target.dtype)
        return distribute_tensor(source, target.device_mesh, target.placements)
    return source
