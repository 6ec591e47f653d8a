"""What strips hold, counted from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latent_ae.acceleration.strips import blocks_of, downsampler_of, upsampler_of

__all__ = ["StripMemory", "strip_memory"]


@dataclass
class StripMemory:
    """Bytes that one picture takes on its way through an encoder or a decoder in strips.

    Attributes:
        activations: in memory and files together, at their most.
        attention: keys and values, at their most; always in memory.
        result: what comes out, in memory.
    """

    activations: int = 0
    attention: int = 0
    result: int = 0


class _Ledger:
    """Follows what is held; sizes are in values."""

    def __init__(self) -> None:
        self.held = self.most = 0

    def take(self, size: int) -> int:
        self.held += size
        self.most = max(self.most, self.held)
        return size

    def give(self, size: int) -> None:
        self.held -= size


def strip_memory(coder: Any, height: int, width: int, element_size: int = 4) -> StripMemory:
    """What `in_strips` holds at its peak, beside the strip that it computes.

    Args:
        coder: diffusers' `Encoder` or `Decoder`; only shapes of weights are looked at.
        height: of its input.
        width: of its input.
        element_size: bytes of a value.
    """
    ledger, found, pixels = _Ledger(), StripMemory(), height * width
    current = ledger.take(coder.conv_in.out_channels * pixels)
    computed = False  # whether the rows are made from those of `current` when they are read
    for block in blocks_of(coder):
        attentions = getattr(block, "attentions", None) or []
        for resnet, attention in zip(
            block.resnets, [*attentions, *[None] * len(block.resnets)], strict=False
        ):
            size = resnet.conv1.out_channels * pixels
            if computed or resnet.conv_shortcut is not None:
                base = ledger.take(
                    size if resnet.conv_shortcut else resnet.conv1.in_channels * pixels
                )
                if resnet.conv_shortcut is None:
                    ledger.give(current)
                hidden = ledger.take(size)
                if resnet.conv_shortcut is not None:
                    ledger.give(current)
                current, computed = base, False
            else:
                hidden = ledger.take(size)
            ledger.give(hidden)
            if attention is not None:
                pairs = 2 * attention.to_k.out_features * pixels
                found.attention = max(found.attention, pairs * element_size)
        if (layer := downsampler_of(block)) is not None:
            pixels //= 4
            result = ledger.take(layer.conv.out_channels * pixels)
            ledger.give(current)
            current = result
        elif upsampler_of(block) is not None:
            pixels, computed = 4 * pixels, True
    found.activations = ledger.most * element_size
    found.result = coder.conv_out.out_channels * pixels * element_size
    return found
