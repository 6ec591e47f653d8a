"""What a config means before it costs anything: sizes, ratios, units, batch."""

from __future__ import annotations

import os

import torch

from latent_ae.adversary import shape_of_discriminator
from latent_ae.autoencoder import require_bottleneck
from latent_ae.config import AdversaryConfig, Config
from latent_ae.memory import training_memory
from latent_ae.networks import (
    Network,
    build_network,
    downsampling,
    require_checkpointing,
    require_divisible,
)

__all__ = ["describe"]


def describe(
    config: Config, processes: int | None = None, network: Network | None = None
) -> dict[str, str]:
    """Facts about a run, by title; the network is built without memory for its weights.

    Args:
        config: the run.
        processes: how many train; the launcher's environment says it when left out.
        network: the run's, where it is at hand: a large one need not be loaded again.

    Raises:
        UserError: `network.path` cannot be loaded, or a resolution does not fit the network or the
            discriminator.
    """
    if network is None:
        with torch.device("cpu" if config.network.path else "meta"):
            network = build_network(config.network)
    require_divisible(config.data.resolution, network, "data.resolution")
    require_bottleneck(config.bottleneck.kind, network, config.network.path)
    if config.training.gradient_checkpointing:
        require_checkpointing(network)
    factor, side = downsampling(network), config.data.resolution
    channels = network.config["latent_channels"]
    shape = (channels, side // factor, side // factor)
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    training = config.training
    micro, accumulation = config.data.batch_size, training.accumulation
    batch = micro * accumulation * processes
    parts = {"encoder": network.encoder, "decoder": network.decoder, "in all": network}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    values = channels * shape[1] * shape[2]
    facts = {
        "parameters": ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        "images": f"3 × {side} × {side} in [-1, 1]",
        "latents": " × ".join(map(str, shape)) + f" (f{factor}, {channels} channels)",
        "compression": f"{3 * side * side / values:g} image values a latent value",
        "loss": _loss(config) + ", per image element",
        **_bottleneck(config, values / (3 * side * side)),
        "adversary": _adversary(config.adversary, config) if config.adversary else "none",
        "effective batch": f"{batch} = {micro} a process × {accumulation} micro-steps × "
        f"{processes} process{'es' if processes > 1 else ''}",
        "learning rate": _rate(config, batch),
        "training": f"{training.steps:,} steps, {training.steps * batch:,} images",
    }
    memory = training_memory(config, network, processes)
    largest = ", ".join(f"{name} {_size(size)}" for name, size in memory.items())
    return {**facts, "memory a process": f"about {_size(memory.total)} ({largest})"}


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _rate(config: Config, batch: int) -> str:
    training = config.training
    text = (
        f"{training.learning_rate:g}, {training.learning_rate / batch:.3g} a picture of the batch"
    )
    if training.warmup_steps:
        text += f"; rises over {training.warmup_steps:,} steps"
    return text + (f"; then {training.schedule}" if training.schedule != "constant" else "")


def _adversary(config: AdversaryConfig, run: Config) -> str:
    judge = shape_of_discriminator(config, run.data.resolution)
    count = sum(p.numel() for p in judge.parameters())
    weight = f"{config.weight:g}{' × the adaptive weight' if config.adaptive else ''}"
    learns = max(0, config.start - config.warmup_steps)
    return (
        f"{config.loss}, {count:,} parameters, sees {judge.receptive_field} pixels; learns from "
        f"step {learns:,}, is heard from {config.start:,} with weight {weight}"
    )


def _loss(config: Config) -> str:
    losses, text = config.losses, f"mean {config.losses.pixel}"
    if losses.perceptual:
        text += f" + {losses.perceptual.weight:g} · LPIPS ({losses.perceptual.net})"
    if losses.variance == "learned":
        text = f"({text}) / exp(s) + s"
    if config.distillation:
        return text + " + (z − the teacher's z)² / (C·H·W)"
    with_kl = config.bottleneck.kind == "kl" and config.bottleneck.weight
    return text + " + λ · KL / (C·H·W)" if with_kl else text


def _bottleneck(config: Config, values_per_element: float) -> dict[str, str]:
    """What the latents go through or come from, under its title."""
    if teacher := config.distillation:
        learns = "its reconstruction" if teacher.target == "teacher" else "the picture"
        return {"teacher": f"{teacher.teacher}; the decoder makes {learns} of its final latents"}
    if config.bottleneck.kind == "none":
        return {"bottleneck": "none: the latents go straight through"}
    return {"kl weight λ": _weight(config, values_per_element)}


def _weight(config: Config, values_per_element: float) -> str:
    weight = config.bottleneck.weight
    if weight == 0:
        return "0: a plain autoencoder, the code is the mean"
    text = f"{weight:g}; one nat a latent value costs {weight * values_per_element:.3g}"
    if config.losses.pixel == "l2" and config.losses.variance == "fixed":
        text += f"; as a Gaussian decoder, variance {weight / 2:.3g}"
    return text
