"""The part of an evaluation that needs more than one pass: probes, low precision, pictures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latent_ae.config import Protocol
from latent_ae.data import normalize
from latent_ae.evaluation.gallery import save_webp
from latent_ae.evaluation.measurement import Gathered
from latent_ae.evaluation.probes import (
    channel_effects,
    code_draws,
    code_map,
    equivariance,
    interpolate,
    noise_sensitivity,
    prior_draws,
)
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.precision import measure_precision

__all__ = ["look_closer"]

PRIOR_DRAWS = 8
INTERPOLATIONS = 2
LARGEST = 512  # pixels a side of what the probes look at
FEW = 2  # pictures where every channel, or every precision, takes a pass of its own
_UNSEEN = 0.05  # 8-bit levels; a channel that moves the picture less is dead


def look_closer(
    frozen: FrozenAutoencoder,
    protocol: Protocol,
    gathered: Gathered,
    folder: Path | None,
    *,
    probes: int,
    pictures: int,
) -> dict[str, Any]:
    """`probes`, `precision` and `pictures` of evaluation.json, and `channel_effects`.

    Args:
        frozen: the autoencoder.
        protocol: its seed and resolution count.
        gathered: what the one pass has found.
        folder: where pictures go; None for none.
        probes: how many pictures to look at; 0 leaves all of it out but the pictures.
        pictures: how many of the first to keep in `folder`.
    """
    images = _few_of_one_size(gathered, frozen.downsampling, probes)
    result: dict[str, Any] = {"probes": None, "precision": None, "pictures": {}}
    if probes and gathered.latents is not None and len(images):
        mean, std = gathered.latents.channel_moments()
        result["channel_effects"] = channel_effects(frozen, images[:FEW], mean)
        result["probes"] = {
            "images": len(images),
            "equivariance": equivariance(frozen, images),
            "sensitivity": noise_sensitivity(frozen, images, std, protocol.seed),
            "map": _map(gathered),
        }
        if protocol.precision == "fp32":
            few = normalize(images[:FEW]).to(frozen.device)
            result["precision"] = measure_precision(frozen.network, few).to_json()
    if folder is not None:
        kept = _save_pictures(frozen, protocol, gathered, images, folder)
        result["pictures"] = gathered.gallery.save(folder / "pictures", pictures) | kept
    return result


def note_effects(summary: dict[str, Any], effects: list[float]) -> None:
    """Writes how much each channel moves the picture into a latent summary's channels."""
    for channel, effect in zip(summary["channels"], effects, strict=True):
        channel["decoder_effect"] = effect
        channel["dead"] = channel["dead"] or effect < _UNSEEN


def _map(gathered: Gathered) -> dict[str, Any] | None:
    """Where the codes of the pictures that have a thumbnail lie among all codes."""
    if gathered.latents is None or gathered.latents.images < 2:
        return None
    places, codes = gathered.latents.codes()
    points, shares = code_map(codes)
    keys = {row["position"]: row["key"] for row in gathered.rows}
    chosen = [i for i, place in enumerate(places) if place in gathered.gallery.thumbnails]
    return {
        "keys": [keys[places[i]] for i in chosen],
        "points": points[chosen].tolist(),
        "variance": shares,
    }


def _few_of_one_size(gathered: Gathered, factor: int, count: int) -> Tensor:
    """The first pictures, cut about the centre to one size that the factor divides twice."""
    shown = gathered.gallery.first[:count]
    if not shown:
        return torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    step = 2 * factor if min(min(s.image.shape[-2:]) for s in shown) >= 2 * factor else factor
    # One batch of them must fit, however large the pictures are.
    sides = [min(LARGEST, *(s.image.shape[axis] for s in shown)) for axis in (-2, -1)]
    size = [side // step * step for side in sides]
    if not min(size):
        return torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    cut = []
    for s in shown:
        top, left = ((s.image.shape[axis - 2] - size[axis]) // 2 for axis in (0, 1))
        cut.append(s.image[:, top : top + size[0], left : left + size[1]])
    return torch.stack(cut)


def _save_pictures(
    frozen: FrozenAutoencoder,
    protocol: Protocol,
    gathered: Gathered,
    images: Tensor,
    folder: Path,
) -> dict[str, Any]:
    where = folder / "pictures"
    shutil.rmtree(where, ignore_errors=True)  # those of an earlier evaluation
    result: dict[str, Any] = {"prior": [], "interpolations": [], "map": []}
    if gathered.latents is None:
        return result
    side = min(protocol.resolution or 256, 256)
    if gathered.codes is not None:
        draws = code_draws(frozen, gathered.codes.together(), side, PRIOR_DRAWS, protocol.seed)
    else:
        moments = gathered.latents.channel_moments()
        draws = prior_draws(frozen, moments, side, PRIOR_DRAWS, protocol.seed)
    for number, (title, decoded) in enumerate(draws.items()):
        files = [save_webp(where, f"prior-{number}-{i}", x) for i, x in enumerate(decoded)]
        result["prior"].append({"title": title, "files": files})
    keys = [shown.key for shown in gathered.gallery.first]
    for i in range(0, min(len(images) - 1, 2 * INTERPOLATIONS), 2):
        steps = interpolate(frozen, images[i : i + 2])
        files = [save_webp(where, f"between-{i}-{j}", x) for j, x in enumerate(steps)]
        result["interpolations"].append({"keys": keys[i : i + 2], "files": files})
    for position, thumbnail in sorted(gathered.gallery.thumbnails.items()):
        result["map"].append(save_webp(where, f"map-{position:03d}", thumbnail))
    return result
