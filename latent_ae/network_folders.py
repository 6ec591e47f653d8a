"""What lies in a diffusers folder of an autoencoder: config, weights, variants."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from latent_ae.errors import UserError

__all__ = [
    "WEIGHTS_FILE",
    "WEIGHT_VARIANTS",
    "folder_config",
    "network_in",
    "only_variant",
    "stored_variants",
    "weight_files",
    "weights_sha256",
]

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
WEIGHT_VARIANTS = ("fp16", "bf16")


def folder_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a diffusers folder, which has a `_class_name`.

    Raises:
        UserError: there is none.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        pipeline = (Path(folder) / "model_index.json").is_file()
        hint = f"; try {Path(folder) / 'vae'}" if pipeline else ""
        if not Path(folder).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            hint = (
                f"; a model of the hub is fetched by: hf download {folder} --local-dir models/vae"
            )
        raise UserError(f"{folder} is no exported autoencoder: it has no config.json{hint}")
    try:
        config = json.loads(file.read_text())
        config["_class_name"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is no config of diffusers") from error
    return config


def network_in(folder: Path, kind: type[Any], dtype: Any) -> Any:
    """A folder's network, loaded from disk alone and never from a pickle.

    Args:
        folder: of diffusers'.
        kind: the class that its config.json names.
        dtype: of the weights, torch's.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return kind.from_pretrained(
            folder,
            torch_dtype=dtype,
            variant=only_variant(folder),
            local_files_only=True,
            low_cpu_mem_usage=False,
            use_safetensors=True,
        )
    except Exception as error:  # diffusers', safetensors' and torch's
        raise UserError(f"the autoencoder at {folder} cannot be loaded: {error}") from error


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
