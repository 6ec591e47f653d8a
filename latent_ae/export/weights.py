"""The weights of an exported folder: as trained, and rounded to 16 bits beside them."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latent_ae.autoencoder import WEIGHT_VARIANTS, decode_code, encode_mode, reconstruct
from latent_ae.errors import UserError
from latent_ae.frozen import PRECISIONS
from latent_ae.network_kinds import Network
from latent_ae.networks import tidy_config
from latent_ae.quantized import QuantizedAutoencoder
from latent_ae.stock_vq import is_plain, stock_of

__all__ = ["VARIANTS", "parse_options", "save_weights"]

_ROUNDING = 1e-4  # fp32's under another memory layout stays below
_FLIPPED = 1e-3  # of the codes
# The weights beside fp32.
VARIANTS = {name: PRECISIONS[name] for name in WEIGHT_VARIANTS}


def parse_options(variants: Sequence[str], max_shard_size: str) -> None:
    """Raises `UserError` unless `save_weights` can take these."""
    if unknown := set(variants) - set(VARIANTS):
        raise UserError(
            f"variant {min(unknown)!r} is unknown; valid: {', '.join(VARIANTS)} (fp32 is always "
            "there)"
        )
    if not re.fullmatch(r"0*[1-9]\d*[KMGT]B", max_shard_size, re.IGNORECASE):
        raise UserError(
            f"a shard's size is a whole number of KB, MB or GB, such as 2GB, not {max_shard_size!r}"
        )


def save_weights(
    network: Network,
    folder: Path,
    images: Tensor,
    variants: Sequence[str] = (),
    max_shard_size: str = "10GB",
) -> None:
    """Writes config.json and the weights in fp32, then again for each variant, and reads them back.

    Args:
        network: in fp32.
        folder: where to.
        images: what stock diffusers, having loaded the folder, must reconstruct as the network
            does; of shape (B, C, H, W), in [-1, 1].
        variants: some of `VARIANTS`, each for `from_pretrained(folder, variant=...)`.
        max_shard_size: larger weights are split into several files.

    Raises:
        UserError: a weight is beyond fp16's largest number.
    """
    written = _as_written(network)
    written.save_pretrained(folder, max_shard_size=max_shard_size)
    tidy_config(network, folder)  # before diffusers reads it, and warns
    _require_same(network, _load(folder, written), images)
    for variant in dict.fromkeys(variants):
        # Not `network.to`: diffusers' own warns there of layers to keep, of which there are none.
        rounded = copy.deepcopy(written)
        nn.Module.to(rounded, VARIANTS[variant])
        if not all(torch.isfinite(parameter).all() for parameter in rounded.parameters()):
            raise UserError(f"a weight is too large for {variant}: leave that variant out")
        rounded.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        tidy_config(network, folder)
        _require_same_weights(rounded, _load(folder, rounded, variant))


def _load(folder: Path, like: Network, variant: str | None = None) -> Network:
    loaded: Any = type(like).from_pretrained(
        folder, variant=variant, torch_dtype=like.dtype, local_files_only=True
    )
    return loaded.to(like.device).eval()


def _as_written(network: Network) -> Any:
    """The network in the class that the folder names: diffusers' own wherever that can say it."""
    if isinstance(network, QuantizedAutoencoder) and is_plain(network.config):
        return stock_of(network)
    return network


@torch.no_grad()
def _require_same(network: Network, loaded: Any, images: Tensor) -> None:
    """A difference is a bug, not input."""
    if isinstance(network, QuantizedAutoencoder):
        found, theirs = (encode_mode(one, images)[0] for one in (network, loaded))
        entries = network.quantize.entries(network.indices(found))
        # Of entries that are equally near, rounding may take either.
        flipped = (loaded.quantize(theirs)[0] - entries).abs().amax(1) > _ROUNDING
        if (share := flipped.float().mean().item()) > _FLIPPED:
            raise RuntimeError(f"the exported folder quantises {share:.2%} of latents differently")
        before, after = (decode_code(one, entries) for one in (network, loaded))
    else:
        before, after = (reconstruct(one, images) for one in (network, loaded))
    difference = (before - after).abs().max().item()
    if difference > _ROUNDING:
        raise RuntimeError(f"the exported folder reconstructs differently, by up to {difference}")


def _require_same_weights(network: Network, loaded: Network) -> None:
    wanted, found = network.state_dict(), loaded.state_dict()
    if not all(torch.equal(wanted[name], found[name]) for name in wanted):
        raise RuntimeError(f"the weights in {network.dtype} read back differently")
