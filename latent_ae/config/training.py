"""How long, how fast, how precise."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from latent_ae.config.section import Section

__all__ = ["Beta", "Tracker", "TrainingConfig"]

Tracker = Literal["wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(Section):
    """How long, how fast, how precise."""

    steps: PositiveInt = 100_000
    """Optimizer updates in all."""
    learning_rate: PositiveFloat = 1e-4
    """The peak; never scaled behind your back."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Adam's."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's, decoupled."""
    warmup_steps: NonNegativeInt = 0
    """Linear warm-up of the learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """From the peak: stay, or fall to zero at the last step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of autocast; weights, optimizer and EMA stay fp32."""
    accumulation: PositiveInt = 1
    """Micro-steps an update."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest gradient norm (after unscaling), of each of both networks; 0 for none."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the averaged weights that are validated and exported; 0 for none."""
    channels_last: bool = True
    """Memory layout of the network: faster convolutions, same numbers within rounding."""
    stock_layers: bool = False
    """Leave the network's forward passes to diffusers, instead of those of
    `accelerate_autoencoder`, which keep less than half of the activations for the backward pass."""
    gradient_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of storing them."""
    compile: bool = False
    """`torch.compile` each block of the network; needs a C++ compiler, and minutes at the start."""
    shard: bool = False
    """Share out weights, gradients and optimizer over the processes (FSDP2) instead of copying
    them to each (DDP)."""
    seed: int = 0
    """Of initialisation, order, crops and posterior noise."""
    log_every: PositiveInt = 20
    """Steps between rows of log.jsonl and TensorBoard."""
    validate_every: PositiveInt = 2000
    """Steps between validations; the last step is always validated."""
    checkpoint_every: PositiveInt = 1000
    """Steps between checkpoints; the last step always leaves one."""
    keep_checkpoints: PositiveInt = 2
    """How many of them stay; the one with the best validation stays beside them."""
    best_by: Literal["lpips", "psnr", "ssim"] = "lpips"
    """What makes a validation the best: the lowest LPIPS, or the highest PSNR or SSIM. Of pictures
    that have no LPIPS (of 2 or more than 4 channels) it is PSNR instead."""
    patience: PositiveInt = 20
    """Updates in a row that may be skipped because a loss or gradient is no number; then the run
    goes back to its last checkpoint."""
    rollbacks: NonNegativeInt = 3
    """How often it may go back before it stops; 0 stops at once."""
    rollback_rate: PositiveFloat = Field(default=0.5, le=1)
    """What the learning rates are multiplied by each time."""
    trackers: tuple[Tracker, ...] = ()
    """Beside TensorBoard, which is always written: `wandb` and others that Accelerate knows."""
