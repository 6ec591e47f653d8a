"""Between diffusers' `VQModel` and the same network with a quantiser of `quantized.py`."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor, nn

from latent_ae.quantized import QuantizedAutoencoder, VectorQuantizer

__all__ = [
    "CODE_FILE",
    "OWN_KEYS",
    "codebook_sha256",
    "is_plain",
    "normalize_",
    "quantized_of",
    "stock_of",
]

CODE_FILE = "quantized.py"  # beside weights that only it can load

# What the config of `QuantizedAutoencoder` has beside `VQModel`'s.
OWN_KEYS = ("quantizer", "heads", "depth", "normalized", "levels")
_STOCK, _OURS = "quantize.embedding.weight", "quantize.codebooks"


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether `VQModel` can say what a `QuantizedAutoencoder` of this config does.

    That is one codebook. Where latents and entries have length 1, the nearest entry by direction is
    the nearest by distance, |z − e|² = |z|² + 1 − 2 z·e, so a codebook of normalised entries does
    without normalised latents.
    """
    return config["quantizer"] == "vq" and config["heads"] == config["depth"] == 1


def quantized_of(stock: VQModel) -> QuantizedAutoencoder:
    """A `VQModel` as a `QuantizedAutoencoder` of the same weights, type, device and config."""
    ours: Any = QuantizedAutoencoder.from_config(dict(stock.config))
    ours.load_state_dict(_renamed(stock.state_dict(), _STOCK, _OURS, lambda t: t[None]))
    # Not diffusers' `to`, which warns of layers to keep in fp32, of which there are none.
    nn.Module.to(ours, stock.device, stock.dtype)
    return ours.train(stock.training)


def normalize_(network: QuantizedAutoencoder) -> None:
    """Takes a network's latents and entries for directions, if that changes nothing it does.

    That is where all entries of its one codebook have length 1; any other is left as it is.
    """
    lengths = network.quantize.codebooks.detach().norm(dim=-1) if is_plain(network.config) else None
    if lengths is not None and torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3):
        network.quantize.normalized = True
        network.register_to_config(normalized=True)


def stock_of(network: QuantizedAutoencoder) -> VQModel:
    """A `VQModel` that reconstructs as a network for which `is_plain` holds."""
    assert is_plain(network.config)
    own = (*OWN_KEYS, "auto_map")
    config = {key: value for key, value in network.config.items() if key not in own}
    stock: Any = VQModel.from_config(config)

    def single(codebooks: Tensor) -> Tensor:
        return F.normalize(codebooks[0], dim=-1) if network.config["normalized"] else codebooks[0]

    state = _renamed(network.state_dict(), _OURS, _STOCK, single)
    stock.load_state_dict(state)
    nn.Module.to(stock, network.device, network.dtype)
    return stock.train(network.training)


def codebook_sha256(network: QuantizedAutoencoder) -> str:
    """The sha256 (hex) of all that gives a code's number its meaning: the entries, in fp32."""
    quantizer = network.quantize
    if isinstance(quantizer, VectorQuantizer):
        content = quantizer.codebooks.detach().float().cpu().numpy().tobytes()
    else:
        content = b""
    said = {key: network.config[key] for key in (*OWN_KEYS, "vq_embed_dim", "num_vq_embeddings")}
    said["levels"] = list(said["levels"] or ())
    return sha256(repr(sorted(said.items())).encode() + content).hexdigest()


def _renamed(state: dict[str, Tensor], old: str, new: str, change: Any) -> dict[str, Tensor]:
    return {new if k == old else k: change(v) if k == old else v for k, v in state.items()}
