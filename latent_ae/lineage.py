"""Which latents an autoencoder reads: its own, and those of the one it was fine-tuned from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from latent_ae.autoencoder import encoder_side
from latent_ae.errors import UserError
from latent_ae.network_folders import weights_sha256
from latent_ae.network_kinds import Network
from latent_ae.networks import load_network

__all__ = ["latents_of", "readable_latents"]


def readable_latents(folder: str | Path) -> set[str]:
    """The `weights_sha256` of every autoencoder whose latents the one in a folder decodes.

    Its own, and where it was trained with its encoder frozen, those that export has recorded.

    Raises:
        UserError: the folder has no safetensors weights.
    """
    own, record = weights_sha256(folder), Path(folder) / "latent_ae.json"
    try:
        told = json.loads(record.read_text())["latents_of"]
    except (OSError, ValueError, KeyError, TypeError):  # other people's folders have none
        told = []
    return {own, *(name for name in told if isinstance(name, str))}


def latents_of(network: Network, base: str | Path) -> list[str]:
    """Whose latents a network makes that was trained with its encoder frozen.

    Args:
        network: after its training.
        base: the folder that it began with.

    Returns:
        `readable_latents` of that folder if its encoder is the network's bit by bit, else nothing:
        the folder is gone, or has changed.
    """
    try:
        before = load_network(base)
        known = readable_latents(base)
    except UserError:
        return []
    now, then = _encoder_weights(network), _encoder_weights(before)
    same = type(network) is type(before) and now.keys() == then.keys()
    return sorted(known) if same and all(torch.equal(now[k], then[k]) for k in now) else []


def _encoder_weights(network: Network) -> dict[tuple[int, str], Tensor]:
    parts = enumerate(encoder_side(network))
    return {(n, k): v.cpu() for n, part in parts for k, v in part.state_dict().items()}
