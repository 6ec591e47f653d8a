"""What the numbers of codes stand for: the entries of the autoencoder that gave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latent_ae.errors import UserError
from latent_ae.latents.format import LatentsManifest
from latent_ae.lineage import readable_latents
from latent_ae.networks import load_network
from latent_ae.quantized import QuantizedAutoencoder, Quantizer
from latent_ae.stock_vq import codebook_sha256

__all__ = ["check_codebook", "quantizer_for"]


def quantizer_for(model: str | Path, folder: str | Path, manifest: LatentsManifest) -> Quantizer:
    """The quantizer of an autoencoder, whose entries a folder's indices are the numbers of.

    Args:
        model: the autoencoder's folder.
        folder: of the latents, for the words of an error.
        manifest: of the latents.

    Raises:
        UserError: the folder holds no indices, or there is no such autoencoder, or its codebook is
            another than theirs.
    """
    if manifest.storage.kind != "indices":
        raise UserError(f"{folder} holds {manifest.storage.kind}: there are no entries to look up")
    network: Any = load_network(model)
    if not isinstance(network, QuantizedAutoencoder):
        raise UserError(f"{model} holds a {type(network).__name__}, which has no codebook")
    check_codebook(codebook_sha256(network), model, folder, manifest)
    return network.quantize.requires_grad_(False).eval()


def check_codebook(
    found: str, model: str | Path, folder: str | Path, manifest: LatentsManifest
) -> None:
    """Raises `UserError` unless a folder's indices are numbers of an autoencoder's own entries.

    Args:
        found: the autoencoder's `codebook_sha256`.
        model: its folder.
        folder: of the latents.
        manifest: of the latents; one of version 2 tells the weights alone.
    """
    record = manifest.autoencoder
    if record.codebook_sha256:
        same = found == record.codebook_sha256
    else:
        same = record.weights_sha256 in readable_latents(model)
    if not same:
        raise UserError(
            f"{folder} holds the numbers of another codebook's entries than that of {model}: name "
            "the autoencoder that encoded them"
        )
