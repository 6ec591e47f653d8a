"""One update: both optimizers, one forward pass of the autoencoder."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import nullcontext

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from latent_ae.adversary import adaptive_weight
from latent_ae.autoencoder import downsampling, trained_parameters
from latent_ae.data import Batch, normalize
from latent_ae.losses import PIXEL_LOSSES, Draw
from latent_ae.training.checkpoint import averaged_state
from latent_ae.training.guard import poison
from latent_ae.training.run import Run
from latent_ae.training.schedule import learning_rate
from latent_ae.training.sharding import clip_gradients
from latent_ae.training.teacher import Lesson

__all__ = ["Update", "update"]


class Update:
    """What an update leaves for the log.

    Attributes:
        terms: means over its micro-steps, on the device.
        batches: of this process, for their unreadable pictures.
        waited: seconds that it waited for data.
    """

    def __init__(self) -> None:
        self.terms: dict[str, Tensor] = {}
        self.batches: list[Batch] = []
        self.waited = 0.0
        self._counts: Counter[str] = Counter()

    @property
    def images(self) -> int:
        """Pictures of this process."""
        return sum(len(batch.images) for batch in self.batches)

    def add(self, terms: dict[str, Tensor]) -> None:
        """Takes the terms of one more micro-step."""
        for name, value in terms.items():
            self._counts[name] += 1
            before = self.terms.get(name, torch.zeros_like(value))
            self.terms[name] = before + (value - before) / self._counts[name]


def update(run: Run) -> Update:
    """Trains on `accumulation` micro-batches, then moves the weights once.

    Nothing here reads a number back from the device.
    """
    training, result = run.config.training, Update()
    _set_rates(run)
    run.autoencoder.train()
    for micro_step in range(training.accumulation):
        began = time.perf_counter()
        batch = next(run.stream)
        result.waited += time.perf_counter() - began
        result.batches.append(batch)
        images = normalize(batch.images.to(run.accelerator.device, non_blocking=True))
        if training.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        draw = None
        if run.equivariance is not None:
            sides = (images.shape[-2], images.shape[-1])
            draw = run.equivariance.draw(run.step, micro_step, sides)
        parts = [part for part in (run.objective, run.adversary) if part is not None]
        with run.accelerator.accumulate(run.autoencoder, *parts):
            if hasattr(run.autoencoder, "set_requires_gradient_sync"):  # FSDP2's no_sync
                run.autoencoder.set_requires_gradient_sync(run.accelerator.sync_gradients)  # pyright: ignore
            result.add(_accumulate(run, images, draw))
            if run.accelerator.sync_gradients:
                result.add(_apply(run))
    return result


def _accumulate(run: Run, images: Tensor, draw: Draw | None = None) -> dict[str, Tensor]:
    """Adds the gradients of one micro-batch, to the discriminator's weights and to the others."""
    rule = run.rule
    if draw is not None and draw.kind == "small":
        images = draw.pictures(images, downsampling(run.network))
    weight = rule.weight(run.step) if rule else 0.0
    run.last_input.wanted = weight > 0 and rule is not None and rule.config.adaptive
    lesson = _lesson(run, images)
    if lesson is None:
        reconstruction = run.autoencoder(images, draw)
    else:
        reconstruction = run.autoencoder(images, taught=lesson.latents)
        reconstruction.target = lesson.pictures
    target = reconstruction.target
    terms: dict[str, Tensor] = {}
    wish = None
    if rule is not None and rule.learns(run.step):
        terms, wish = _listen(run, target, reconstruction.images, weight)
    losses = run.objective(images, reconstruction, run.step)
    if wish is not None:
        _heed(run, reconstruction.images, weight, wish, losses.unit, terms)
    run.accelerator.backward(poison(losses.total))
    if run.share is not None:
        terms |= run.share.take()
    return _named(losses.terms, draw) | terms


def _named(terms: dict[str, Tensor], draw: Draw | None) -> dict[str, Tensor]:
    """The terms for the log, those measured on other pictures apart, and how often there are any.

    Beside transformed latents, the picture and its code are as in any step.
    """
    if draw is None:
        return terms
    apart = {"plain": set(), "transformed": {*PIXEL_LOSSES, "lpips", "total"}, "small": {*terms}}
    names = {name: f"{name}_{draw.kind}" for name in apart[draw.kind]}
    shares = {
        f"share_{kind}": torch.full_like(terms["total"], draw.kind == kind)
        for kind in ("transformed", "small")
    }
    return {names.get(name, name): value for name, value in terms.items()} | shares


def _lesson(run: Run, images: Tensor) -> Lesson | None:
    """What the teacher makes of the pictures, where the run has one."""
    if run.teacher is None:
        return None
    # Some teachers overflow in fp16; bf16 holds whatever fp32 holds.
    half = run.config.training.precision == "bf16"
    with run.accelerator.autocast() if half else nullcontext():
        return run.teacher(images)


def _listen(
    run: Run, images: Tensor, reconstructed: Tensor, weight: float
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The discriminator's turn: its own gradients, its terms, and what it asks for.

    That is ∂L_adv/∂x̂, once it is heard.
    """
    assert run.adversary is not None
    fake = reconstructed.detach().requires_grad_(weight > 0)
    verdict = run.adversary(images, fake, run.step)
    wish = None
    if weight > 0:
        # With respect to the picture alone: the discriminator learns nothing from this loss.
        (wish,) = torch.autograd.grad(verdict.autoencoder, fake, retain_graph=True)
    # Never scaled for fp16: this network runs in fp32 there.
    loss = poison(verdict.discriminator) / run.config.training.accumulation
    loss.backward(inputs=list(run.adversary.parameters()))  # the picture's gradient is no use
    return verdict.terms, wish


def _heed(
    run: Run,
    reconstructed: Tensor,
    weight: float,
    wish: Tensor,
    unit: Tensor | float,
    terms: dict[str, Tensor],
) -> None:
    """Lets the wish wait at x̂ for the backward pass of the other losses.

    There it is added to their gradient, weighted by how long the two are at the last layer, and
    both go back through the autoencoder as one. The adaptive weight is bounded and told for the
    distance as it is, not divided by `unit`: a small variance must not bring it to its maximum.
    """
    assert run.rule is not None
    config, elements = run.rule.config, reconstructed[0].numel()
    features = run.last_input.take() if config.adaptive else None
    scale = _gradient_scale(run)

    def add(gradient: Tensor) -> Tensor:
        share: Tensor | float = weight
        if features is not None:
            largest = config.adaptive_max / elements  # LDM's losses are sums over an image
            own, other = map(run.last_input.gradient, (gradient * (unit / scale), wish))
            adaptive = adaptive_weight(features, own, other, run.last_input.kernel, largest)
            terms["adaptive_weight"] = adaptive * elements
            share = weight * adaptive / unit
        return gradient + scale * share * wish

    reconstructed.register_hook(add)


def _gradient_scale(run: Run) -> Tensor | float:
    """What Accelerate multiplies a loss by before its backward pass."""
    share = 1 / run.config.training.accumulation
    if run.accelerator.scaler is None:
        return share
    return run.accelerator.scaler.scale(torch.full((), share, device=run.accelerator.device))


def _apply(run: Run) -> dict[str, Tensor]:
    """Moves all weights by what has been gathered, except where it is not finite."""
    clip = run.config.training.clip_norm or torch.inf
    run.accelerator.unscale_gradients(run.optimizer)  # fp16's, before they are measured
    norm = clip_gradients(run.optimizer, clip)
    terms, bad = {"gradient_norm": norm.detach()}, ~norm.isfinite()
    rule = run.rule
    judge = run.discriminator_optimizer if rule and rule.learns(run.step) else None
    if judge is not None:
        norm = clip_gradients(judge, clip)
        terms["d_gradient_norm"] = norm.detach()
        bad = bad | ~norm.isfinite()
    skip = bad.float()  # both networks move, or neither does
    if run.accelerator.scaler is None:  # the scaler sets the same flag itself
        run.optimizer.optimizer.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
    run.optimizer.step()
    run.optimizer.zero_grad()
    if judge is not None:
        judge.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
        judge.step()
        judge.zero_grad()
    run.guard.count(bad)
    terms |= run.bottleneck.after_update(bad, run.step)
    if run.ema is not None:
        _average(run.ema, run.network)
        run.bottleneck.correct_averages(averaged_state(run.network, run.ema))
    return terms


@torch.no_grad()
def _average(ema: EMAModel, network: nn.Module) -> None:
    """`EMAModel.step` in one pass over the weights instead of three."""
    ema.optimization_step += 1
    ema.cur_decay_value = ema.get_decay(ema.optimization_step)
    weights: list[Tensor] = [*trained_parameters(network).values()]
    torch._foreach_lerp_(ema.shadow_params, weights, 1 - ema.cur_decay_value)


def _set_rates(run: Run) -> None:
    training, adversary = run.config.training, run.config.adversary
    rate = learning_rate(training, run.step) * run.rate_factor
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    if run.discriminator_optimizer is not None and adversary is not None:
        share = (adversary.learning_rate or training.learning_rate) / training.learning_rate
        for group in run.discriminator_optimizer.param_groups:
            group["lr"] = rate * share
