"""Whether a network's numbers fit into fp16 and bf16: evidence, and the flag that follows."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latent_ae.acceleration import stock_layers
from latent_ae.autoencoder import full_precision
from latent_ae.frozen import posterior_of
from latent_ae.quantized import QuantizedAutoencoder

__all__ = ["LowPrecision", "PrecisionEvidence", "measure_precision"]

LARGEST_FP16 = 65504.0
HEADROOM = 4  # other pictures, and a denoiser's latents, go further than those that were tried
LEAST_PSNR = 48.1  # dB; an error of one 8-bit level, root mean square


@dataclass
class LowPrecision:
    """A reconstruction with weights and activations of 16 bits against that of fp32.

    Attributes:
        finite: no infinity, no NaN.
        psnr: between the two, in dB, of pictures clamped to [-1, 1]; None where not finite.
        largest_error: in units of [-1, 1]; None where not finite.
    """

    finite: bool
    psnr: float | None
    largest_error: float | None


@dataclass
class PrecisionEvidence:
    """What low precision does to a network, and what follows.

    Attributes:
        layers: the largest |activation| of each layer in fp32, in the order they run.
        fp16: the reconstruction in fp16.
        bf16: the reconstruction in bf16.
        force_upcast: whether pipelines that run in fp16 must run this autoencoder in fp32, as
            diffusers' key of that name tells them.
        reason: why, in one sentence.
    """

    layers: dict[str, float]
    fp16: LowPrecision
    bf16: LowPrecision
    force_upcast: bool
    reason: str

    @property
    def largest(self) -> tuple[str, float]:
        """The layer with the largest activation, and that."""
        return max(self.layers.items(), key=lambda item: (math.isnan(item[1]), item[1]))

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is None, as JSON has no NaN."""
        name, value = self.largest
        finite = {key: size if math.isfinite(size) else None for key, size in self.layers.items()}
        return {
            "largest_activation": value if math.isfinite(value) else None,
            "largest_layer": name,
            "layers": [{"name": key, "largest": size} for key, size in finite.items()],
            "fp16": asdict(self.fp16),
            "bf16": asdict(self.bf16),
            "force_upcast": self.force_upcast,
            "reason": self.reason,
        }


@torch.no_grad()
def measure_precision(network: Any, images: Tensor) -> PrecisionEvidence:
    """Runs a network in fp32, fp16 and bf16 on the same pictures.

    Args:
        network: an autoencoder of diffusers' in fp32.
        images: of shape (B, C, H, W), in [-1, 1], on its device, of sides that its factor divides.
    """
    low = {}
    # TF32 is as rough as fp16, which it would have to judge. Pipelines run stock layers.
    with full_precision(), stock_layers(network):
        layers, exact, codes = _largest_activations(network, images)
        for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
            # torch's own `to`: diffusers' warns of layers that it would keep in fp32, even of none.
            smaller = nn.Module.to(copy.deepcopy(network), dtype)
            output, _ = _reconstruct(smaller, images.to(dtype), codes)
            low[name] = _difference(output, exact)
    evidence = PrecisionEvidence(layers, low["fp16"], low["bf16"], False, "")
    evidence.force_upcast, evidence.reason = _verdict(evidence)
    return evidence


def _reconstruct(
    network: Any, images: Tensor, codes: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Pictures, and the codes between where latents are quantised.

    With `codes` it decodes those: one that flips changes the picture by more than a grey level,
    and says nothing against a precision.
    """
    mean, _ = posterior_of(network.encode(images))
    if not isinstance(network, QuantizedAutoencoder):
        return network.decode(mean.to(images.dtype)).sample, None
    codes = network.indices(mean) if codes is None else codes
    failed = torch.where(mean.isfinite(), 0.0, torch.nan).sum()
    return network.decode_indices(codes) + failed, codes


def _largest_activations(
    network: nn.Module, images: Tensor
) -> tuple[dict[str, float], Tensor, Tensor | None]:
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                size = output.detach().abs().amax()  # NaN stays NaN
                found[name] = torch.maximum(found[name], size) if name in found else size

        return hook

    hooks = [m.register_forward_hook(note(name)) for name, m in network.named_modules() if name]
    try:
        output, codes = _reconstruct(network, images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: value.item() for name, value in found.items()}, output, codes


def _difference(output: Tensor, exact: Tensor) -> LowPrecision:
    if not torch.isfinite(output).all():
        return LowPrecision(False, None, None)
    error = (output.float().clamp(-1, 1) - exact.clamp(-1, 1)) / 2
    psnr = -10 * math.log10(max(error.square().mean().item(), 1e-12))
    return LowPrecision(True, psnr, 2 * error.abs().max().item())


def _verdict(evidence: PrecisionEvidence) -> tuple[bool, str]:
    name, largest = evidence.largest
    fp16 = evidence.fp16
    if not math.isfinite(largest):
        return True, f"{name} is not finite even in fp32"
    if largest >= LARGEST_FP16:
        return True, f"{name} reaches {largest:.3g}, beyond fp16's largest number, 65504"
    if not fp16.finite or fp16.psnr is None:
        return True, "the output in fp16 is not finite"
    if largest * HEADROOM >= LARGEST_FP16:
        return True, (
            f"{name} reaches {largest:.3g}, within a factor of {HEADROOM} of fp16's largest number"
        )
    if fp16.psnr < LEAST_PSNR:
        return True, (
            f"fp16 changes the output by more than a grey level: {fp16.psnr:.1f} dB against fp32"
        )
    return False, (
        f"no activation is beyond {largest:.3g}, {LARGEST_FP16 / max(largest, 1e-30):.0f} times "
        f"below fp16's largest number, and the output in fp16 is within {fp16.psnr:.1f} dB of fp32"
    )
