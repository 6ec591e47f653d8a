"""Between diffusers' folders and single files in LDM's layout."""

from latent_ae.conversion.convert import Conversion, convert

__all__ = ["Conversion", "convert"]
