"""latent_ae: train, measure, export and use the autoencoder of a latent diffusion model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_ae.acceleration import accelerate_autoencoder
    from latent_ae.autoencoder import Autoencoder, load_network
    from latent_ae.config import Config
    from latent_ae.config_file import load_config
    from latent_ae.conversion import convert
    from latent_ae.distillation import distill
    from latent_ae.errors import UserError
    from latent_ae.evaluation import Evaluation, compare, evaluate
    from latent_ae.export import export_run
    from latent_ae.hub import push_to_hub
    from latent_ae.latents import LatentDataset, LatentStream, decode, encode
    from latent_ae.onnx_export import export_onnx
    from latent_ae.outputs import Code, Reconstruction
    from latent_ae.training import train

__version__ = "0.1.0"

__all__ = [
    "Autoencoder",
    "Code",
    "Config",
    "Evaluation",
    "LatentDataset",
    "LatentStream",
    "Reconstruction",
    "UserError",
    "accelerate_autoencoder",
    "compare",
    "convert",
    "decode",
    "distill",
    "encode",
    "evaluate",
    "export_onnx",
    "export_run",
    "load_config",
    "load_network",
    "push_to_hub",
    "train",
]

_HOME = {
    "Autoencoder": "autoencoder",
    "Code": "outputs",
    "Config": "config",
    "Evaluation": "evaluation",
    "LatentDataset": "latents",
    "LatentStream": "latents",
    "Reconstruction": "outputs",
    "UserError": "errors",
    "accelerate_autoencoder": "acceleration",
    "compare": "evaluation",
    "convert": "conversion",
    "decode": "latents",
    "distill": "distillation",
    "encode": "latents",
    "evaluate": "evaluation",
    "export_onnx": "onnx_export",
    "export_run": "export",
    "load_config": "config_file",
    "load_network": "autoencoder",
    "push_to_hub": "hub",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `import latent_ae` costs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'latent_ae' has no attribute {name!r}")
    return getattr(importlib.import_module(f"latent_ae.{_HOME[name]}"), name)
