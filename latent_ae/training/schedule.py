"""The learning rate as a function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from latent_ae.config import TrainingConfig

__all__ = ["learning_rate"]


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of the update that follows `step` finished ones.

    A linear rise over `warmup_steps`, then `constant`, or a fall to zero at the last step, `linear`
    or as half a cosine (Loshchilov & Hutter 2017, without restarts).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * left
