"""How much memory training needs, counted before it is taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from latent_ae.acceleration import accelerate_autoencoder
from latent_ae.adversary import Adversary
from latent_ae.autoencoder import Autoencoder, image_channels, trained_parameters
from latent_ae.bottlenecks import build_bottleneck
from latent_ae.config import Config
from latent_ae.network_kinds import Network
from latent_ae.networks import network_like, untrained_network
from latent_ae.objective import Objective

__all__ = ["TrainingMemory", "count_saved_bytes", "training_memory"]

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingMemory(dict[str, int]):
    """Bytes on one device by purpose; `total` is their sum."""

    @property
    def total(self) -> int:
        """Of all entries, in bytes."""
        return sum(self.values())


def training_memory(config: Config, network: Network, processes: int = 1) -> TrainingMemory:
    """The memory of an update: what stays, and what the backward pass needs.

    The forward pass is run on tensors without storage, and what autograd would save is added up: no
    memory is taken and nothing is computed. What it leaves out are the workspaces of convolutions
    and the allocator's slack, in practice a tenth to a third more.

    Args:
        config: the run.
        network: its network; only the configuration is looked at.
        processes: how many share a sharded run.
    """
    adversary, channels = config.adversary, image_channels(network)
    with FakeTensorMode(allow_non_fake_inputs=True):
        frozen, alike = config.network.freeze == "encoder", network_like(network)
        bottleneck = build_bottleneck(config.bottleneck, alike, learns=not frozen)
        model = Autoencoder(alike, bottleneck, freeze_encoder=frozen)
        if not config.training.stock_layers:
            accelerate_autoencoder(model.network, channels_last=False)  # which changes no size
        if config.training.gradient_checkpointing:
            model.network.enable_gradient_checkpointing()
        model.train()
        objective = Objective.of(config, network, untrained=True)
        judge = adversary and Adversary(adversary.model_copy(update={"path": None}), channels)
        saved = 0
        for shape in config.data.largest_shapes():
            images = torch.empty(shape.batch_size, channels, shape.height, shape.width)
            count = count_saved_bytes(model, objective, judge or None, images, config)
            saved = max(saved, count)
    share = processes if config.training.shard else 1
    weights, trained = _bytes(model) // share, _bytes(model, trained=True) // share
    # Moving averages of codebooks, and what is gathered for them.
    weights += 2 * sum(b.numel() * b.element_size() for b in model.bottleneck.buffers())
    memory = TrainingMemory(
        {
            "weights and EMA": weights + (trained if config.training.ema else 0),
            "gradients and optimizer": 3 * trained,
            "activations": saved,
        }
    )
    if judge:
        memory["discriminator"] = 4 * _bytes(judge)
    if objective.perceptual is not None:
        memory["LPIPS"] = _bytes(objective.perceptual)
    if objective.alignment is not None:
        memory["vision model"] = _bytes(objective.alignment)
    if config.distillation:
        with FakeTensorMode():
            memory["teacher"] = _bytes(untrained_network(config.distillation.teacher))
    return memory


def count_saved_bytes(
    model: nn.Module,
    objective: nn.Module,
    judge: nn.Module | None,
    images: Tensor,
    config: Config,
) -> int:
    """The most that autograd holds at one time in a step, in bytes, weights not counted.

    The autoencoder's part stays while the discriminator's graph comes and goes, then LPIPS'.
    """
    dtype, held = _AUTOCAST[config.training.precision], {}
    weights = {p.untyped_storage()._cdata for part in (model, objective) for p in part.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            held[storage._cdata] = storage.nbytes()
            alive.append(storage)  # or its address would be given away again
        return tensor

    alive: list[Any] = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)
    with hooks(pack, lambda tensor: tensor), autocast:
        reconstruction = model(images)
        forward, peak = dict(held), 0
        if judge is not None:
            judge(images, reconstruction.images.detach().requires_grad_(), 0)
            peak = sum(held.values())
            held.clear()
            held.update(forward)
        objective(images, reconstruction, 0)
    return max(peak, sum(held.values()))


def _bytes(module: nn.Module, *, trained: bool = False) -> int:
    parameters = trained_parameters(module).values() if trained else module.parameters()
    return sum(p.numel() * p.element_size() for p in parameters)
