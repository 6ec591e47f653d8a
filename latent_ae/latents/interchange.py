"""To and from two other layouts of latents: that of EDM2 and that of LightningDiT."""

from __future__ import annotations

from collections.abc import Callable

from latent_ae.latents.edm2 import export_edm2, import_edm2
from latent_ae.latents.format import LatentsManifest
from latent_ae.latents.lightningdit import export_lightningdit, import_lightningdit

__all__ = [
    "FORMATS",
    "export_edm2",
    "export_lightningdit",
    "import_edm2",
    "import_lightningdit",
]

# By name: what reads a layout into a latents folder, and what writes it from one.
FORMATS: dict[str, tuple[Callable[..., LatentsManifest], Callable[..., int]]] = {
    "edm2": (import_edm2, export_edm2),
    "lightningdit": (import_lightningdit, export_lightningdit),
}
