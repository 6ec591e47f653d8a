"""Any image autoencoder of diffusers', behind one face: for measuring, not for training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor, nn

from latent_ae.acceleration import accelerate_autoencoder
from latent_ae.autoencoder import default_device
from latent_ae.bottlenecks import gaussian_kl, split_moments
from latent_ae.errors import UserError
from latent_ae.network_folders import folder_config, network_in, weights_sha256
from latent_ae.network_kinds import spec_named
from latent_ae.networks import downsampling, load_network
from latent_ae.quantized import QuantizedAutoencoder
from latent_ae.scaling import LatentScaling
from latent_ae.stock_vq import codebook_sha256

__all__ = ["PRECISIONS", "FrozenAutoencoder", "fast_precision", "posterior_of"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PROBE_SIDE = 128  # pixels; the deepest autoencoder of images halves seven times at most
_PROBE_LATENTS = 4  # side of the probe's latents, where the config tells the factor


class FrozenAutoencoder:
    """An autoencoder folder that diffusers can load, in eval mode and without gradients.

    `AutoencoderKL` and its kin give a posterior; `AutoencoderTiny`, `AutoencoderDC`, `VQModel` and
    others give latents alone, which then are their own mode.

    Args:
        path: an exported folder, or any image autoencoder of diffusers' on disk.
        device: CUDA where there is one, when left out.
        precision: of weights and activations: `fp32`, `bf16` or `fp16`.

    Attributes:
        network: diffusers' object; a `QuantizedAutoencoder` in place of a `VQModel`.
        class_name: of the folder's class.
        downsampling: the factor between the side of a picture and the side of its latents.
        has_posterior: whether its encoder gives a distribution, or latents alone.
        channels: of the latents.
        image_channels: of the pictures.
        scaling: the numbers of its config that scale latents.

    Raises:
        UserError: there is no such folder, or it is no autoencoder of pictures.
    """

    def __init__(
        self,
        path: str | Path,
        device: torch.device | str | None = None,
        precision: str = "fp32",
    ) -> None:
        self.path = Path(path)
        self.precision = precision
        self.device = torch.device(device or default_device())
        self.class_name: str = folder_config(self.path)["_class_name"]
        self.network = _load(self.path, PRECISIONS[precision]).to(self.device)
        accelerate_autoencoder(self.network)
        self.scaling = LatentScaling.of(self.network)  # pyright: ignore
        self.image_channels = int(self.network.config.get("in_channels") or 3)
        self.downsampling, self.channels = self._probe()

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the posterior, fp32, each of shape (B, c, h, w).

        Sides that the factor does not divide are padded by their last pixels. Autoencoders without
        a posterior give no log-variance.

        Args:
            images: of shape (B, C, H, W), in [-1, 1].
        """
        height, width = images.shape[-2:]
        pad = (-width % self.downsampling, -height % self.downsampling)
        if any(pad):
            images = F.pad(images, (0, pad[0], 0, pad[1]), mode="replicate")
        images = images.to(self.device, PRECISIONS[self.precision])
        images = images.contiguous(memory_format=torch.channels_last)
        return posterior_of(self.network.encode(images))

    @torch.no_grad()
    def decode(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Pictures of shape (B, C, H, W), fp32, nominally in [-1, 1], not clamped.

        Args:
            latents: raw, of shape (B, c, h, w).
            size: height and width to cut to, where `encode` has padded.
        """
        if self.quantizes:  # before they are rounded to 16 bits
            return self.decode_indices(self.indices(latents), size)
        latents = latents.to(self.device, PRECISIONS[self.precision])
        latents = latents.contiguous(memory_format=torch.channels_last)
        decoded = self.network.decode(latents).sample.float()
        return decoded if size is None else decoded[..., : size[0], : size[1]]

    @property
    def codebook_size(self) -> int:
        """How many different numbers a code can have; 0 where latents are not quantised."""
        return self.network.quantize.size if self.quantizes else 0

    @property
    def codes(self) -> int:
        """How many codes a position has; 0 where latents are not quantised."""
        return self.network.quantize.codes if self.quantizes else 0

    @property
    def quantizes(self) -> bool:
        """Whether latents become codes before they are decoded."""
        return isinstance(self.network, QuantizedAutoencoder)

    @property
    def codebook_sha256(self) -> str:
        """The sha256 (hex) of what gives the codes' numbers their meaning; empty without codes."""
        return codebook_sha256(self.network) if self.quantizes else ""

    @torch.no_grad()
    def indices(self, latents: Tensor) -> Tensor:
        """The numbers of the codes, int64 of shape (B, codes, h, w).

        Args:
            latents: raw, before the quantizer, of shape (B, c, h, w).
        """
        return self.network.indices(latents.to(self.device))

    @torch.no_grad()
    def entries(self, indices: Tensor) -> Tensor:
        """What the decoder receives, fp32 of shape (B, c, h, w), for codes as `indices` gives."""
        return self.network.quantize.entries(indices.to(self.device, torch.int64)).float()

    @torch.no_grad()
    def decode_indices(self, indices: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Pictures of shape (B, C, H, W) as `decode`, from codes as `indices` gives."""
        decoded = self.network.decode_indices(indices.to(self.device, torch.int64)).float()
        return decoded if size is None else decoded[..., : size[0], : size[1]]

    def bits(self, mean: Tensor, logvar: Tensor | None) -> Tensor:
        """How many bits each code carries, of shape (B,).

        log2 of the codebook's size a code, where latents are quantised. With a posterior, its KL
        from N(0, I): what bits-back coding would send (Hinton & van Camp 1993; Townsend et al.
        2019). At most, and elsewhere, 16 a value: nobody has to store latents finer than that.
        """
        stored = torch.full((len(mean),), 16.0 * mean[0].numel(), device=mean.device)
        if self.quantizes:
            numbers = self.codes * mean[0, 0].numel()
            return torch.full_like(stored, math.log2(self.codebook_size) * numbers)
        if logvar is None:
            return stored
        return stored.minimum(gaussian_kl(mean, logvar).flatten(1).sum(1) / math.log(2))

    def describe(self) -> dict[str, Any]:
        """What it is, for a JSON file."""
        return {
            "path": str(self.path),
            "class_name": self.class_name,
            "weights_sha256": weights_sha256(self.path),
            "downsampling": self.downsampling,
            "latent_channels": self.channels,
            "encoder_parameters": _count(getattr(self.network, "encoder", None)),
            "decoder_parameters": _count(getattr(self.network, "decoder", None)),
            **self.scaling.model_dump(),
        }

    def _probe(self) -> tuple[int, int]:
        self.downsampling = 1
        side = _PROBE_SIDE
        if spec_named(self.class_name) is not None:  # a probe as small as it may be: seconds less
            side = min(side, _PROBE_LATENTS * downsampling(self.network))
        image = torch.zeros(1, self.image_channels, side, side)
        try:
            mean, logvar = self.encode(image)
            self.has_posterior = logvar is not None
            decoded = self.decode(mean)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a video's wants five dimensions, an audio's two, …
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{self.path} holds a {self.class_name}, which takes no pictures of shape "
                f"(B, {self.image_channels}, H, W): {reason}"
            ) from error
        factor, rest = divmod(side, mean.shape[-1])
        if mean.ndim != 4 or rest or decoded.shape != image.shape:
            raise UserError(
                f"{self.path} holds a {self.class_name} that makes {tuple(decoded.shape)} of a "
                f"picture of {tuple(image.shape)}: it is no autoencoder of pictures"
            )
        return factor, mean.shape[1]


def fast_precision(device: torch.device) -> str:
    """`bf16` where the device computes in it (Ampere and later, AVX512-BF16, AMX), else `fp32`."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    # oneDNN takes bf16 on older CPUs too, and is slower there than in fp32.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return "bf16" if fast else "fp32"


def posterior_of(output: Any) -> tuple[Tensor, Tensor | None]:
    """Mean and log-variance, fp32, each of shape (B, c, h, w), of what any `encode` returns.

    Latents without a posterior come with None.

    Raises:
        TypeError: it holds neither.
    """
    if (posterior := getattr(output, "latent_dist", None)) is not None:
        return split_moments(posterior.parameters)
    for name in ("latents", "latent"):
        if (found := getattr(output, name, None)) is not None:
            return found.float(), None
    raise TypeError(f"its encoder gives {type(output).__name__}")


def _load(folder: Path, dtype: torch.dtype) -> Any:
    name = folder_config(folder)["_class_name"]
    if name in (VQModel.__name__, QuantizedAutoencoder.__name__):
        network: Any = load_network(folder, torch.float32)
        # Its entries stay in fp32: rounded ones would be another codebook, with other numbers for
        # latents that lie between two entries.
        for part in network.children():
            if part is not network.quantize:
                part.to(dtype)
        return network.requires_grad_(False).eval()
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None or not all(hasattr(kind, verb) for verb in ("encode", "decode")):
        raise UserError(f"{folder} holds a {name}, which is no autoencoder of diffusers")
    return network_in(folder, kind, dtype).requires_grad_(False).eval()


def _count(module: nn.Module | None) -> int | None:
    return None if module is None else sum(p.numel() for p in module.parameters())
