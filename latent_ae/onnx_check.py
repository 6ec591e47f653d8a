"""What onnxruntime makes of photographs, compared with torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from skimage import data
from torch import Tensor

from latent_ae.bottlenecks import LOGVAR_RANGE
from latent_ae.errors import UserError
from latent_ae.frozen import FrozenAutoencoder

__all__ = ["PHOTOGRAPHS", "TOLERANCE", "compare_with_torch"]

# The largest difference that is accepted, as a part of the range of torch's fp32 values.
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2}
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")  # they come with scikit-image
SIDE = 256  # pixels; but latents of 32² at most, as attention costs their square
LEAST = 1e-12  # keeps a flat output from dividing by zero


def compare_with_torch(
    frozen: FrozenAutoencoder, folder: str | Path, precision: str = "fp32"
) -> dict[str, Any]:
    """Runs both halves in onnxruntime and in torch on photographs of two sizes and batches.

    Both encoders are given the photographs, both decoders torch's means; then onnxruntime's decoder
    is given its own encoder's means and the two reconstructions are compared.

    Args:
        frozen: the autoencoder in fp32, on the CPU.
        folder: holds `vae_encoder/model.onnx` and `vae_decoder/model.onnx`.
        precision: of these files.

    Returns:
        For each size the largest absolute differences, the same as parts of the range that torch's
        values have, and those of the reconstructions.

    Raises:
        UserError: one of them is beyond `TOLERANCE`, or not finite.
    """
    encode, decode = (_runner(Path(folder) / f"vae_{part}") for part in ("encoder", "decoder"))
    side = max(2, min(32, SIDE // frozen.downsampling))
    sizes = []
    for batch, rows, columns in ((1, side, side), (2, max(1, 3 * side // 4), 5 * side // 4)):
        size = (rows * frozen.downsampling, columns * frozen.downsampling)
        images = _photographs(batch, *size, frozen.image_channels)
        pairs = _pairs(frozen, encode, decode, images)
        known: dict[str, Any] = {"shape": list(images.shape)}
        for name, (wanted, got) in pairs.items():
            known[name] = _difference(wanted, got)
            if not known[name]["relative"] <= TOLERANCE[precision]:  # NaN is not
                raise UserError(
                    f"onnxruntime and torch differ: {name} of {tuple(images.shape)} by up to "
                    f"{known[name]['largest']:.3g}, {known[name]['relative']:.3g} of their range, "
                    f"where {TOLERANCE[precision]:g} is accepted; try another opset, or fp32"
                )
        sizes.append(known)
    return {
        "pictures": f"scikit-image's {', '.join(PHOTOGRAPHS)}, cut to the aspect, Lanczos",
        "tolerance": TOLERANCE[precision],
        "sizes": sizes,
    }


def _runner(folder: Path) -> Any:
    """A function from one tensor to the file's one output, in fp32, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (entry,) = session.get_inputs()
    kind = np.float16 if entry.type == "tensor(float16)" else np.float32

    def run(values: Tensor) -> Tensor:
        (result,) = session.run(None, {entry.name: values.numpy().astype(kind)})
        return torch.from_numpy(np.asarray(result, np.float32))

    return run


def _pairs(
    frozen: FrozenAutoencoder, encode: Any, decode: Any, images: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """What torch and onnxruntime compute, by what it is."""
    mean, logvar = frozen.encode(images)
    found = encode(images)
    pairs = {"latents": (mean, found[:, : frozen.channels])}
    if logvar is not None:
        pairs["logvar"] = (logvar, found[:, frozen.channels :].clamp(*LOGVAR_RANGE))
    decoded = frozen.decode(mean)
    pairs["decoded"] = (decoded, decode(mean))
    pairs["reconstruction"] = (decoded, decode(pairs["latents"][1]))
    return pairs


def _difference(wanted: Tensor, got: Tensor) -> dict[str, float]:
    largest = (wanted - got).abs().max().item()
    extent = (wanted.max() - wanted.min()).item()
    return {"largest": largest, "range": extent, "relative": largest / max(extent, LEAST)}


def _photographs(batch: int, height: int, width: int, channels: int) -> Tensor:
    """The first ones, of shape (batch, C, height, width), in [-1, 1]; others for other batches.

    Their colours in turn stand for however many channels the network takes.
    """
    names = PHOTOGRAPHS[batch - 1 : 2 * batch - 1]
    pictures = [Image.fromarray(getattr(data, name)()) for name in names]
    fitted = [ImageOps.fit(p, (width, height), Image.Resampling.LANCZOS) for p in pictures]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in fitted]))
    pixels = pixels[..., [channel % 3 for channel in range(channels)]]
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
