"""A diffusers network and a bottleneck: the module that training runs forward."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from latent_ae.bottlenecks import build_bottleneck, split_moments
from latent_ae.config import AutoencoderConfig, NetworkConfig
from latent_ae.errors import UserError
from latent_ae.losses import Draw, GradientShare
from latent_ae.outputs import Code, Reconstruction

__all__ = [
    "Autoencoder",
    "build_network",
    "decode_latents",
    "default_device",
    "downsampling",
    "encode_moments",
    "encoder_side",
    "folder_config",
    "full_precision",
    "image_channels",
    "load_network",
    "only_variant",
    "reconstruct",
    "require_divisible",
    "stored_variants",
    "trained_parameters",
    "weight_files",
    "weights_sha256",
]

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
WEIGHT_VARIANTS = ("fp16", "bf16")


def build_network(config: NetworkConfig) -> AutoencoderKL:
    """The `AutoencoderKL` of a config: loaded from `path`, or with new weights.

    Raises:
        UserError: nothing that diffusers can load lies at `path`, or it gives other channels than
            it takes.
    """
    if config.path is not None:
        network = load_network(config.path)
        taken, given = (network.config[f"{side}_channels"] for side in ("in", "out"))
        if taken != given:
            raise UserError(
                f"network.path {config.path} takes {taken} channels and gives {given}; a network "
                "to train gives as many as it takes"
            )
        return network
    levels = len(config.block_out_channels)
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return AutoencoderKL(
        **config.model_dump(exclude={"path", "freeze", "init"}),
        out_channels=config.in_channels,
        use_post_quant_conv=config.use_quant_conv,
        **blocks,
        scaling_factor=1.0,  # until export measures it
    )


def load_network(path: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Loads an exported folder, or any `AutoencoderKL` folder of diffusers', from disk.

    Raises:
        UserError: there is no such folder, or it is no `AutoencoderKL`.
    """
    folder = Path(path)
    name = folder_config(folder)["_class_name"]
    if name != "AutoencoderKL":
        raise UserError(f"{folder} holds a {name}, not an AutoencoderKL")
    try:
        network = AutoencoderKL.from_pretrained(
            folder,
            torch_dtype=dtype,
            variant=only_variant(folder),
            local_files_only=True,
            low_cpu_mem_usage=False,
            use_safetensors=True,  # never a pickle
        )
    except Exception as error:  # diffusers', safetensors' and torch's
        raise UserError(f"the autoencoder at {folder} cannot be loaded: {error}") from error
    return network  # pyright: ignore[reportReturnType]


def folder_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a diffusers folder, which has a `_class_name`.

    Raises:
        UserError: there is none.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        pipeline = (Path(folder) / "model_index.json").is_file()
        hint = f"; try {Path(folder) / 'vae'}" if pipeline else ""
        raise UserError(f"{folder} is no exported autoencoder: it has no config.json{hint}")
    try:
        config = json.loads(file.read_text())
        config["_class_name"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is no config of diffusers") from error
    return config


def stored_variants(folder: str | Path) -> list[str]:
    """The weights of 16 bits that a folder holds, some of `WEIGHT_VARIANTS`."""
    return [name for name in WEIGHT_VARIANTS if any(map(Path.is_file, _places(folder, name)))]


def only_variant(folder: str | Path) -> str | None:
    """The variant, such as `fp16`, to load from a folder that holds no other weights, else None."""
    if any(map(Path.is_file, _places(folder, None))):
        return None
    return next(iter(stored_variants(folder)), None)


def _places(folder: str | Path, variant: str | None) -> tuple[Path, Path]:
    """Where diffusers keeps weights: in a file, or in several under an index."""
    infix = f".{variant}" if variant else ""
    plain, index = Path(folder) / WEIGHTS_FILE, Path(folder) / f"{WEIGHTS_FILE}.index.json"
    return plain.with_suffix(f"{infix}.safetensors"), index.with_suffix(f"{infix}.json")


def downsampling(network: AutoencoderKL) -> int:
    """The factor f between the side of an image and the side of its latents."""
    return 2 ** (len(network.config["block_out_channels"]) - 1)


def image_channels(network: AutoencoderKL) -> int:
    """The channels C of the images that a network takes and gives."""
    return network.config["in_channels"]


def require_divisible(resolution: int, network: AutoencoderKL, key: str = "resolution") -> None:
    """Raises `UserError` unless the network's factor divides a side of `resolution` pixels."""
    factor = downsampling(network)
    if resolution % factor:
        raise UserError(f"{key} {resolution} is no multiple of the network's factor {factor}")


def default_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def full_precision() -> Iterator[None]:
    """Turns off TF32 on GPUs, which convolutions take for fp32 by default: for measurements."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of an autoencoder folder's weights, in order.

    Raises:
        UserError: the folder has none, or a damaged index.
    """
    plain, index = _places(folder, only_variant(folder))
    if plain.is_file():
        return [plain]
    if not index.is_file():
        raise UserError(f"{folder} has no {WEIGHTS_FILE}")
    try:  # diffusers has split a large network
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [Path(folder) / name for name in sorted(names)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is no index of diffusers") from error


def weights_sha256(path: str | Path) -> str:
    """The sha256 (hex) of an autoencoder folder's weights: which autoencoder made these latents.

    Raises:
        UserError: the folder has no safetensors weights.
    """
    digest = hashlib.sha256()
    for file in weight_files(path):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def encode_moments(network: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean and log-variance of the posterior, of shape (B, 2c, H/f, W/f).

    Args:
        network: diffusers' autoencoder.
        images: of shape (B, C, H, W), in [-1, 1].
    """
    posterior: Any = network.encode(images).latent_dist  # pyright: ignore
    return posterior.parameters


def decode_latents(network: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images of shape (B, C, H, W), nominally in [-1, 1], not clamped.

    Args:
        network: diffusers' autoencoder.
        latents: raw, of shape (B, c, H/f, W/f).
    """
    decoded: Any = network.decode(latents)  # pyright: ignore[reportArgumentType]
    return decoded.sample


def reconstruct(network: AutoencoderKL, images: Tensor) -> Tensor:
    """The reconstruction from the posterior's mode: what is measured and shown.

    Args:
        network: diffusers' autoencoder.
        images: of shape (B, C, H, W), in [-1, 1]; so is the result, nominally.
    """
    mean, _ = split_moments(encode_moments(network, images))
    return decode_latents(network, mean)


def encoder_side(network: AutoencoderKL) -> list[nn.Module]:
    """The modules that make latents of pictures: those to freeze when the latents must not move."""
    parts = (network.encoder, getattr(network, "quant_conv", None))
    return [part for part in parts if part is not None]  # pyright: ignore


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name, in the network's order."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


class Autoencoder(nn.Module):
    """The way through: encoder, bottleneck, decoder.

    Training calls `forward` only: under DistributedDataParallel, the `encode` and `decode` of the
    unwrapped module would skip the synchronisation of gradients.

    Args:
        network: diffusers' autoencoder.
        bottleneck: from what it encodes to a `Code`.
        freeze_encoder: train the decoder alone. The encoder then runs without a graph, and the
            bottleneck's losses, which nothing could lower, are left out.

    Attributes:
        share: where the latents part for decoder and alignment; None without such a loss.
    """

    def __init__(
        self, network: AutoencoderKL, bottleneck: nn.Module, *, freeze_encoder: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.bottleneck = bottleneck
        self.share: GradientShare | None = None
        self.encoder_frozen = freeze_encoder
        if freeze_encoder:
            for part in encoder_side(network):
                part.requires_grad_(False)

    @classmethod
    def from_config(cls, config: AutoencoderConfig) -> Autoencoder:
        """Builds both parts; raises `UserError` where `network.path` cannot be loaded."""
        return cls(
            build_network(config.network),
            build_bottleneck(config.bottleneck),
            freeze_encoder=config.network.freeze == "encoder",
        )

    def blocks(self) -> list[nn.Module]:
        """The network's blocks, each a unit to shard or to compile, without its outer layers."""
        encoder, decoder = self.network.encoder, self.network.decoder
        parts = [*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks]
        return [part for part in parts if part is not None]  # pyright: ignore

    def forward(self, images: Tensor, draw: Draw | None = None) -> Reconstruction:
        """Maps images to their `Reconstruction`, in fp32.

        Args:
            images: of shape (B, 3, H, W), in [-1, 1].
            draw: how the latents, and the pictures that they are to become, are transformed.
        """
        code = self._encode(images)
        latents, target = code.latents, images
        if self.share is not None:
            latents, code.latents = self.share.split(latents)
        if draw is not None and draw.kind == "transformed":
            target = draw.pictures(images, images.shape[-1] // latents.shape[-1])
            latents = draw.latents(latents)
        return Reconstruction(decode_latents(self.network, latents).float(), code, target)

    def _encode(self, images: Tensor) -> Code:
        if not self.encoder_frozen:
            return self.bottleneck(encode_moments(self.network, images))
        with torch.no_grad():
            code = self.bottleneck(encode_moments(self.network, images))
        return replace(code, loss_terms={})
