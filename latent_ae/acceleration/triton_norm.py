"""GroupNorm followed by SiLU as one operation on CUDA, which recomputes instead of storing.

Plain functions without autograd: their caller fuses more than the normalisation. All arithmetic is
in fp32 and no result depends on the order in which programs run.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["available", "group_norm_silu", "apply_group_norm_silu", "group_norm_silu_backward"]

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 4096  # elements that a program holds in registers at a time
_TILE_CHANNELS = 128  # at most; a row of them is 256 bytes and more
_CHUNKS = 256  # partial results a picture at most: enough programs for a GPU, few to combine
_COMBINED = 1024  # partial results that a program combines at a time


@dataclass(frozen=True)
class _Split:
    """How pictures of shape (B, C, H, W) are divided among programs."""

    batch: int
    channels: int
    pixels: int

    @property
    def blocks(self) -> dict[str, int]:
        """Pixels and channels of a tile: powers of two, as Triton wants them."""
        channels = min(1 << (self.channels - 1).bit_length(), _TILE_CHANNELS)
        return {"BLOCK_P": max(_TILE // channels, 1), "BLOCK_C": channels}

    @property
    def rows(self) -> int:
        """Tiles that cover a picture's pixels."""
        return -(-self.pixels // self.blocks["BLOCK_P"])

    @property
    def tiles(self) -> int:
        """Tiles of a chunk, whose sums are one partial result."""
        return -(-self.rows // _CHUNKS)

    @property
    def chunks(self) -> int:
        """Chunks that cover a picture's pixels; none of them is empty."""
        return -(-self.rows // self.tiles)

    def launch(self, name: str, programs: int, *arguments: Any) -> None:
        """Runs a kernel with so many programs along the pixels, on its first tensor's device."""
        columns = -(-self.channels // self.blocks["BLOCK_C"])
        _launch(name, (programs, columns, self.batch), *arguments, **self.blocks, num_warps=8)


@cache
def _kernels() -> ModuleType | None:
    """The kernels; Triton has no wheels for some platforms and is imported when first needed."""
    try:
        from latent_ae.acceleration import triton_norm_kernels
    except ImportError:
        return None
    return triton_norm_kernels


def _launch(name: str, grid: tuple[int, ...], *arguments: Any, **options: int) -> None:
    """Runs a kernel on the device of its first tensor, which need not be the current one."""
    # Said, as Triton's versions differ on it: multiply and add round once together.
    options = {"enable_fp_fusion": True, **options}
    with torch.cuda.device_of(arguments[0]):
        getattr(_kernels(), name)[grid](*arguments, **options)


def _rows(x: Tensor) -> tuple[Tensor, _Split]:
    """Pictures in channels_last, and how they are divided."""
    batch, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    return x, _Split(batch, channels, height * width)


def available(x: Tensor) -> bool:
    """Whether the other functions take this tensor: 4-D, fp32, bf16 or fp16, on CUDA, with Triton.

    Tensors on the CPU only by Triton's interpreter, with `TRITON_INTERPRET=1` in the environment
    from before Triton is imported.
    """
    interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    fits = x.ndim == 4 and x.dtype in _TYPES
    fits = fits and type(x) in (Tensor, torch.nn.Parameter)  # none without storage
    if not fits or _kernels() is None:
        return False
    return interpreted or (x.is_cuda and _works(x.device, x.dtype))


@cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels can be built: Triton wants a C compiler, and GPUs that know the type."""
    x = torch.zeros(1, 8, 4, 4, device=device, dtype=dtype)
    weight = torch.ones(8, device=device)
    try:
        _, mean, rstd = group_norm_silu(x, weight, weight, 2, 1e-6)
        group_norm_silu_backward(x, x, weight, weight, mean, rstd)
    except Exception as error:  # whatever a compiler raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"Triton's kernels do not run here, torch's do: {reason}", stacklevel=2)
        return False
    return True


@torch.no_grad()
def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU of the normalised pictures (Wu & He 2018), and the statistics that `backward` needs.

    Args:
        x: of shape (B, C, H, W), for which `available` holds; copied unless in channels_last.
        weight: of shape (C,), of any floating type.
        bias: as `weight`.
        groups: of channels; divides C.
        eps: added to the variance.

    Returns:
        y of x's type and shape, in channels_last; each group's mean and 1/√(variance + eps), in
        fp32, of shape (B, groups).

    Raises:
        ValueError: `groups` does not divide C.
    """
    x, split = _rows(x)
    batch, channels, pixels = split.batch, split.channels, split.pixels
    if channels % groups:
        raise ValueError(f"{channels} channels do not make {groups} groups of one size")
    means, squares = x.new_empty((2, batch, split.chunks, channels), dtype=torch.float32)
    mean = x.new_empty((batch, groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    split.launch("statistics", split.chunks, x, means, squares, pixels, channels, split.tiles)
    chunk_pixels, group_size = split.tiles * split.blocks["BLOCK_P"], channels // groups
    sizes = (pixels, channels, split.chunks, chunk_pixels, group_size)
    elements = float(pixels * group_size)
    partial = (means, squares, mean, rstd)
    _launch("combine", (groups, batch), *partial, *sizes, elements, float(eps), BLOCK=_COMBINED)
    return apply_group_norm_silu(x, weight, bias, mean, rstd), mean, rstd


@torch.no_grad()
def apply_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """The y of `group_norm_silu` again, bit for bit, from its arguments and its statistics."""
    x, split = _rows(x)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    split.launch(
        "apply", split.rows, x, *_parameters(weight, bias, mean, rstd), y, *_sizes(x, mean)
    )
    return y


@torch.no_grad()
def group_norm_silu_backward(
    gy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, from that of y and the statistics of `group_norm_silu`.

    Args:
        gy: of y's shape, of any of the types of `available`; copied unless in channels_last.
        x: as in `group_norm_silu`, like the others.
        weight: of shape (C,).
        bias: of shape (C,).
        mean: of shape (B, groups).
        rstd: of shape (B, groups).

    Returns:
        The first in x's type and in channels_last, the others in weight's type.
    """
    (x, split), (gy, _) = _rows(x), _rows(gy)
    given, sizes = (gy, x, *_parameters(weight, bias, mean, rstd)), _sizes(x, mean)
    shape = (2, split.batch, split.chunks, split.channels)
    sums = x.new_empty(shape, dtype=torch.float32)
    split.launch("gradient_sums", split.chunks, *given, sums[0], sums[1], *sizes, split.tiles)
    sums = sums.sum(2)
    # Normalising takes the group's mean off the gradient, and its slope along the values.
    weighted = (sums * weight.float()).unflatten(-1, (mean.shape[1], -1))
    plain, scaled = weighted.sum(-1) / (split.pixels * weighted.shape[-1])
    gx = torch.empty_like(x, memory_format=torch.channels_last)
    split.launch("input_gradient", split.rows, *given, plain, scaled, gx, *sizes)
    gbias, gweight = sums.sum(1).to(weight.dtype)
    return gx, gweight, gbias


def _parameters(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Kernels see an address alone: no strides."""
    return tuple(tensor.contiguous() for tensor in tensors)


def _sizes(x: Tensor, mean: Tensor) -> tuple[int, int, int, int]:
    """Pixels, channels, groups, channels of a group."""
    channels, groups = x.shape[1], mean.shape[1]
    return x.shape[2] * x.shape[3], channels, groups, channels // groups
