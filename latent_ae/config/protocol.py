"""How an autoencoder is measured: everything that two results must share to be compared."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from latent_ae.config.data import SMALLEST_MEASURED
from latent_ae.config.section import Section

__all__ = ["PROTOCOLS", "Protocol"]

Lpips = Literal["alex", "vgg"]


class Protocol(Section):
    """A way to measure. The pictures themselves are told apart by a hash of their pixels."""

    name: str = "custom"
    """What to call it; a changed protocol is called after the one it began as."""
    resolution: PositiveInt | None = Field(default=256, ge=SMALLEST_MEASURED)
    """Shorter side after the resize, and side of the centre crop, in pixels; null: each picture at
    its own size."""
    resize: Literal["lanczos", "bicubic", "adm", "none"] = "lanczos"
    """`adm`: halved by averages while twice too large, then bicubic, as guided-diffusion prepares
    ImageNet; `none`: the crop is cut from the picture as it is."""
    fit: Literal["pad", "crop"] = "pad"
    """Where the network's factor does not divide a side: `pad` repeats the last pixels, decodes and
    measures the picture's own pixels; `crop` cuts to the largest size it divides."""
    images: PositiveInt | None = None
    """Only the first pictures of the data; null: all."""
    code: Literal["mode", "sample"] = "mode"
    """Decode the posterior's mode, or one draw (seeded by picture)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the network's weights and activations; metrics are fp32, statistics float64."""
    lpips: tuple[Lpips, ...] = ("alex",)
    """Backbones of LPIPS v0.1."""
    frechet: Literal["alexnet", "vgg16", "inception"] | None = "alexnet"
    """Features of the Fréchet distance: `inception` is the literature's rFID; `alexnet` ships with
    the package and compares only with itself; null: none."""
    seed: NonNegativeInt = 0
    """Of draws from posteriors, probes and the bootstrap."""

    @field_validator("lpips")
    @classmethod
    def _each_once(cls, value: tuple[Lpips, ...]) -> tuple[Lpips, ...]:
        if len(set(value)) != len(value):
            raise ValueError("names each backbone once")
        return value

    @model_validator(mode="after")
    def _resize_means_something(self) -> Protocol:
        if self.resolution is None and self.resize != "none" and "resize" in self.model_fields_set:
            raise ValueError("with resolution null nothing is resized; set resize to none")
        return self

    def in_words(self) -> str:
        """One sentence."""
        if self.resolution is None:
            size = "pictures at their own size"
        elif self.resize == "none":
            size = f"centre crop of {self.resolution}"
        else:
            size = f"shorter side to {self.resolution} by {_RESIZES[self.resize]}, centre crop"
        code = "posterior mode" if self.code == "mode" else "one draw from the posterior"
        lpips = f"LPIPS v0.1 {' and '.join(self.lpips)}" if self.lpips else "no LPIPS"
        frechet = f"Fréchet distance on {self.frechet}" if self.frechet else "no Fréchet distance"
        return f"{size}, {code}, {self.precision}, rounded to 8 bits, {lpips}, {frechet}"


_RESIZES = {"lanczos": "Lanczos", "bicubic": "bicubic", "adm": "halving and bicubic (ADM)"}

# Published tables seldom say all of it. What theirs leave open is filled in with what their
# evaluation code or its usual predecessor does; docs/evaluation.md says which is which.
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="photos256"),
        Protocol(name="native", resolution=None, resize="none"),
        Protocol(
            name="imagenet256-val50k",
            resize="adm",
            images=50_000,
            lpips=("alex", "vgg"),
            frechet="inception",
        ),
        Protocol(
            name="coco2017-val5k",
            resize="bicubic",
            images=5_000,
            code="sample",
            lpips=("alex", "vgg"),
            frechet="inception",
        ),
    )
}
