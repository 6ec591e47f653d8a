"""The recipe of a prior over codes: its options, and its network, a stock Llama.

A Llama as LlamaGen's (Sun et al. 2024, arXiv:2406.06525), but for its rotary positions, which have
one dimension: they are relative, and in raster order the code above is always as many tokens back,
so one head can look there from anywhere.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from index_prior_tokens import Vocabulary
from latent_ae.errors import UserError

__all__ = ["PANELS", "PriorConfig", "build_prior", "llama"]

# The first key of each group, under which the script's help shows it and those after it.
PANELS = {"width": "Network", "labels": "Training", "workers": "Machine and log"}


class PriorConfig(BaseModel):
    """What prior to train, and for how long; each key is also an option of the script."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    width: PositiveInt = 384
    """Channels of a token."""
    depth: PositiveInt = 6
    """Layers."""
    heads: PositiveInt = 6
    """Attention heads; divides `width` into an even number of channels each."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of attention."""
    labels: bool = True
    """Condition on the classes of the latents, where there are any."""
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    """How often a class gives way to the null class, for classifier-free guidance."""
    steps: PositiveInt = 100_000
    """Optimizer updates in all."""
    seconds: PositiveFloat | None = None
    """Train at most this long (start and saving not counted), the learning rate falling in time."""
    batch_size: PositiveInt = 64
    """Pictures that a process takes at once."""
    accumulation: PositiveInt = 1
    """Such batches a process and step: the gradient is their mean."""
    learning_rate: PositiveFloat = 3e-4
    """The peak."""
    warmup_steps: NonNegativeInt = 500
    """Linear warm-up of the learning rate, on top of half a cosine down to zero."""
    weight_decay: NonNegativeFloat = 0.05
    """Of matrices; norms are left alone."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 for none."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of autocast; weights and optimizer stay fp32."""
    workers: NonNegativeInt = 0
    """Loader processes beside each training process."""
    seed: NonNegativeInt = 0
    """Of initialisation, order and dropped classes."""
    log_every: PositiveInt = 50
    """Steps between rows of log.jsonl."""
    checkpoint_every: PositiveInt = 1000
    """Steps between checkpoints; the last step always leaves one."""
    evaluate_every: NonNegativeInt = 1000
    """Steps between measures on held-out codes, and one last; 0: only the last."""

    @model_validator(mode="after")
    def _consistent(self) -> PriorConfig:
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(
                f"heads {self.heads} does not divide width {self.width} into an even number of "
                "channels each, which rotary positions want"
            )
        if (
            not self.labels
            and self.label_dropout != type(self).model_fields["label_dropout"].default
        ):
            raise ValueError("label_dropout is for training with labels; elsewhere it does nothing")
        return self


def llama() -> tuple[Any, Any]:
    """`LlamaConfig` and `LlamaForCausalLM` of transformers.

    Raises:
        UserError: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError(
            "a prior over codes needs the package transformers: pip install 'latent_ae[prior]'"
        ) from error
    return LlamaConfig, LlamaForCausalLM


def build_prior(config: PriorConfig, vocabulary: Vocabulary) -> Any:
    """A fresh `LlamaForCausalLM` for sequences of a vocabulary."""
    kind, network = llama()
    wide = 8 * config.width / 3  # three matrices of SwiGLU as costly as two of 4 · width
    return network(
        kind(
            vocab_size=vocabulary.entries,
            hidden_size=config.width,
            intermediate_size=32 * -(-round(wide) // 32),
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            max_position_embeddings=vocabulary.length + 1,
            attention_dropout=config.dropout,
            bos_token_id=None,
            eos_token_id=None,  # all pictures have the same number of codes
            pad_token_id=vocabulary.null,
        )
    )
