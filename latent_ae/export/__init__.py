"""From a training run to a folder that any diffusers pipeline loads."""

from latent_ae.export.run import export_run
from latent_ae.export.statistics import measure_latents
from latent_ae.export.stock import IGNORED_BY, caveats
from latent_ae.export.words import loading_call

__all__ = ["IGNORED_BY", "caveats", "export_run", "loading_call", "measure_latents"]
