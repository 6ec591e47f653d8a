"""What a config means before it costs anything: sizes, ratios, units, batch."""

from __future__ import annotations

import math
import os
from itertools import groupby

import torch

from latent_ae.adversary import shape_of_discriminator
from latent_ae.config import (
    Config,
    DataConfig,
    FSQConfig,
    LFQConfig,
    LossesConfig,
    VQConfig,
    largest_cut,
)
from latent_ae.losses.variance import EXACT_WEIGHTS
from latent_ae.memory import training_memory
from latent_ae.network_kinds import Network
from latent_ae.networks import build_network, code_channels, downsampling, image_channels
from latent_ae.refusals import refuse_misfit

__all__ = ["describe"]

_PENALTIES = {
    "vq": "(codebook + β · commitment)",
    "lfq": "(commitment + entropy)",
}


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
            network = build_network(config.network, config.bottleneck)
    refuse_misfit(config, network)
    factor, side = downsampling(network), config.data.resolution
    pixels = image_channels(network) * side * side
    channels = code_channels(network)
    shape = (channels, side // factor, side // factor)
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    training = config.training
    micro, accumulation = config.data.batch_size, training.accumulation
    batch = micro * accumulation * processes
    at = f" at {side}²" if len(set(config.data.resolutions)) > 1 else ""
    parts = {"encoder": network.encoder, "decoder": network.decoder, "in all": network}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    values = channels * shape[1] * shape[2]
    facts = {
        "parameters": ", ".join(f"{name} {count:,}" for name, count in counts.items())
        + _frozen(config),
        "images": f"{image_channels(network)} × {side} × {side} in [-1, 1]",
        "latents": " × ".join(map(str, shape)) + f" (f{factor}, {channels} channels)",
        "compression": _compression(config, pixels / values, values / channels),
        "loss": _loss(config) + ", per image element",
        **_bottleneck(config, values / pixels),
        "adversary": _adversary(config, image_channels(network)) if config.adversary else "none",
        "effective batch": f"{batch}{at} = {micro} a process × {accumulation} micro-steps × "
        f"{processes} process{'es' if processes > 1 else ''}",
        "learning rate": _rate(config, batch),
        "training": _length(config, accumulation * processes),
    }
    if config.data.buckets is not None:
        facts["images"] += ", or as many pixels"
        facts |= _buckets(config.data)
    memory = training_memory(config, network, processes)
    largest = ", ".join(f"{name} {_size(size)}" for name, size in memory.items())
    return {**facts, "memory a process": f"about {_size(memory.total)} ({largest})"}


def _buckets(data: DataConfig) -> dict[str, str]:
    """The shapes of each resolution, width × height, and their batch size, under its title."""
    assert data.buckets is not None
    lines: dict[str, str] = {}
    for resolution, buckets in groupby(data.shapes(), key=lambda bucket: bucket.resolution):
        found = sorted(buckets, key=lambda bucket: bucket.width / bucket.height)
        sides = ", ".join(f"{bucket.width} × {bucket.height}" for bucket in found)
        share = data.resolutions.count(resolution) / len(data.resolutions)
        lost = largest_cut([(b.height, b.width) for b in found], data.buckets.max_aspect)
        lost = 1 - (1 - lost) / data.room**2
        lines[f"buckets at {resolution}²"] = (
            f"{found[0].batch_size} a process, {share:.0%} of the pictures, cut by up to "
            f"{lost:.0%} if no longer than {data.buckets.max_aspect:g} to 1: {sides}"
        )
    return lines


def _length(config: Config, times: int) -> str:
    """How long it trains; `times` is the number of batches an update."""
    steps, data = config.training.steps, config.data
    sizes = {bucket.resolution: bucket.batch_size for bucket in data.shapes()}
    batch = len(data.resolutions) / sum(1 / sizes[side] for side in data.resolutions)
    about = "about " if len(sizes) > 1 else ""
    return f"{steps:,} steps, {about}{round(steps * times * batch):,} images"


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


def _adversary(run: Config, channels: int) -> str:
    config = run.adversary
    assert config is not None
    judge = shape_of_discriminator(config, run.data.smallest_side(), channels)
    count = sum(p.numel() for p in judge.parameters())
    weight = f"{config.weight:g}{' × the adaptive weight' if config.adaptive else ''}"
    learns = max(0, config.start - config.warmup_steps)
    return (
        f"{config.loss}, {count:,} parameters, sees {judge.receptive_field} pixels; learns from "
        f"step {learns:,}, is heard from {config.start:,} with weight {weight}"
    )


def _loss(config: Config) -> str:
    losses = config.losses
    text = f"mean {losses.pixel}{'_c' if losses.variance == 'per_channel' else ''}"
    if losses.perceptual:
        text += f" + {losses.perceptual.weight:g} · LPIPS ({losses.perceptual.net})"
    text = {
        "fixed": text,
        "learned": f"({text}) / exp(s) + s",
        "per_channel": f"mean over channels c of ({text}) / exp(s_c) + s_c",
        "optimal": f"log({text}) + 1",
    }[losses.variance]
    if config.distillation:
        return text + " + (z − the teacher's z)² / (C·H·W)"
    if config.bottleneck.kind in _PENALTIES and config.network.freeze == "nothing":
        text += f" + {config.bottleneck.weight:g} · {_PENALTIES[config.bottleneck.kind]}"
    kl = config.bottleneck.kind == "kl" and config.bottleneck.weight
    if kl and config.network.freeze == "nothing":
        text += " + λ · KL / (C·H·W)"
    return text + _regularisers(losses)


def _bottleneck(config: Config, values_per_element: float) -> dict[str, str]:
    """What the latents go through or come from, under its title."""
    if teacher := config.distillation:
        learns = "its reconstruction" if teacher.target == "teacher" else "the picture"
        return {"teacher": f"{teacher.teacher}; the decoder makes {learns} of its final latents"}
    if config.bottleneck.kind == "none":
        return {"bottleneck": "none: the latents go straight through"}
    if isinstance(config.bottleneck, VQConfig | FSQConfig | LFQConfig):
        return {"codes": _codes(config.bottleneck)}
    return {"kl weight λ": _weight(config, values_per_element)}


def _compression(config: Config, ratio: float, positions: float) -> str:
    if not isinstance(config.bottleneck, VQConfig | FSQConfig | LFQConfig):
        return f"{ratio:g} image values a latent value"
    bits = math.log2(config.bottleneck.codebook_size) * config.bottleneck.codes * positions
    bits /= config.data.resolution**2
    return f"{bits:.3g} bits a pixel before entropy coding, of 8 a value of the picture"


def _codes(bottleneck: VQConfig | FSQConfig | LFQConfig) -> str:
    """How many codes a position has, of how many values, and how they learn."""
    number = bottleneck.codes if bottleneck.codes > 1 else "one"
    text = f"{number} of {bottleneck.codebook_size:,} a position"
    if isinstance(bottleneck, FSQConfig):
        return f"{text} ({' × '.join(map(str, bottleneck.levels))} levels)"
    if isinstance(bottleneck, LFQConfig):
        return f"{text} ({bottleneck.bits} signs)"
    text += "; entries " + ("of length 1 " if bottleneck.normalized else "")
    text += "by the optimizer" if bottleneck.update == "gradient" else "as moving averages"
    text += ", started by k-means" if bottleneck.kmeans else ""
    if bottleneck.revive_after:
        text += f", revived after {bottleneck.revive_after} updates without use"
    return text


def _frozen(config: Config) -> str:
    return "; the decoder's alone learn" if config.network.freeze == "encoder" else ""


def _regularisers(losses: LossesConfig) -> str:
    text, alignment, equivariance = "", losses.alignment, losses.equivariance
    if alignment:
        adaptive = " × the adaptive weight" if alignment.adaptive else ""
        text += f" + {alignment.weight:g}{adaptive} · alignment with {alignment.model}"
    if equivariance:
        scaled = equivariance.scales and "scaled by {:g} to {:g}".format(*equivariance.scales)
        turned = "turned" if equivariance.rotate else None
        what = " and ".join(filter(None, (scaled, turned)))
        text += f"; in {equivariance.probability:.0%} of the steps latents are {what}"
    return text


def _weight(config: Config, values_per_element: float) -> str:
    weight, losses = config.bottleneck.weight, config.losses
    if config.network.freeze == "encoder":
        return "without effect: the encoder is frozen, its KL is what it is"
    if weight == 0:
        return "0: a plain autoencoder, the code is the mean"
    text = f"{weight:g}; one nat a latent value costs {weight * values_per_element:.3g}"
    if losses.variance == "fixed":
        gaussian = losses.pixel == "l2"
        return text + (f"; as a Gaussian decoder, variance {weight / 2:.3g}" if gaussian else "")
    scale = "the distance" if losses.variance == "optimal" else "exp(s)"
    text += f"; as a fixed weight, this times {scale}"
    if exact := EXACT_WEIGHTS.get(losses.pixel):
        where = " without LPIPS" if losses.perceptual else ""
        text += f"; the exact bound of {losses.pixel}{where} has {exact:g}"
    return text
