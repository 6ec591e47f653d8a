"""What evaluation.json says: the report's view of it, checked part by part."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from latent_ae.config.protocol import Protocol

__all__ = ["Content", "Picture", "Reference"]


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
Numbers = dict[str, Number]
Intervals = dict[str, tuple[Number, Number] | None]


class _Part(BaseModel):
    # Keys of a later version are passed over: what is known can still be shown.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Skip(_Part):
    """A picture that could not be read."""

    key: str
    reason: str = ""


class Data(_Part):
    """What was measured on."""

    path: str
    images: int
    pixels_sha256: str | None = None
    skipped: list[Skip] = []
    not_finite: list[str] = []
    note: str | None = None


class Model(_Part):
    """Which autoencoder."""

    path: str | None = None
    class_name: str | None = None
    weights_sha256: str | None = None
    downsampling: int | None = None
    latent_channels: int | None = None
    encoder_parameters: int | None = None
    decoder_parameters: int | None = None
    values_per_image: Number = None
    bits_per_image: Number = None
    scaling_factor: Number = None
    shift_factor: Number = None
    latents_mean: list[Number] | None = None
    latents_std: list[Number] | None = None


class Frechet(_Part):
    """The Fréchet distance between originals and reconstructions."""

    network: str
    distance: Number = None
    features: int | None = None
    images: int | None = None
    note: str | None = None


class Reference(_Part):
    """What an ordinary way of making pictures smaller reaches with the same budget."""

    name: str
    detail: str = ""
    metrics: Numbers = {}
    intervals: Intervals = {}
    frechet: Number = None
    bits_per_image: Number = None
    too_small: int | None = None


class Channel(_Part):
    """One channel of the latents."""

    mean: Number = None
    std: Number = None
    kl_nats: Number = None
    posterior_std: tuple[Number, Number, Number] | None = None
    signal_share: Number = None
    active_units: Number = None
    saturated: Number = None
    largest: Number = None
    prior_kl: Number = None
    decoder_effect: Number = None
    dead: bool = False


class Spectrum(_Part):
    """Power densities over spatial frequency."""

    frequency: list[Number]
    latents: list[Number]
    pictures: list[Number] = []
    high_share: Number = None
    pictures_high_share: Number = None
    slope: Number = None
    pictures_slope: Number = None


class Latents(_Part):
    """Statistics of the latents."""

    images: int | None = None
    mean: Number = None
    std: Number = None
    kl_nats_per_image: Number = None
    kl_bits_per_value: Number = None
    active_units: Number = None
    channels: list[Channel] = []
    aggregate: Numbers | None = None
    spectrum: Spectrum | None = None


class Bits(_Part):
    """What codes take."""

    fixed_length: Number = None
    entropy: Number = None
    coded: Number = None


class Slot(_Part):
    """The use of one codebook; its curve holds (share of the entries, frequency times size)."""

    level: int = 0
    head: int = 0
    usage: Number = None
    dead: int | None = None
    perplexity: Number = None
    entropy_bits: Number = None
    largest_share: Number = None
    curve: list[tuple[Number, Number]] = []


class Codes(_Part):
    """The use of the codes of quantised latents."""

    size: int
    per_position: int = 1
    positions: int | None = None
    usage: Number = None
    usage_uniform: Number = None
    dead: int | None = None
    perplexity: Number = None
    entropy_bits: Number = None
    bits_per_pixel: Bits = Bits()
    bits_per_image: Bits = Bits()
    slots: list[Slot] = []


class Equivariance(_Part):
    """How far transforming and encoding fail to commute."""

    transform: str
    latents: Number = None
    psnr: Number = None


class Sensitivity(_Part):
    """PSNR of what is decoded from disturbed latents."""

    noise: Number = None
    psnr: Number = None


class CodeMap(_Part):
    """Codes laid out in two dimensions."""

    keys: list[str] = []
    points: list[tuple[Number, Number]] = []
    variance: list[Number] = []


class Probes(_Part):
    """Experiments on the latents."""

    images: int | None = None
    equivariance: list[Equivariance] = []
    sensitivity: list[Sensitivity] = []
    map: CodeMap | None = None


class Layer(_Part):
    """The largest magnitude that left a layer."""

    name: str
    largest: Number = None


class Reduced(_Part):
    """The network in a smaller number format against fp32."""

    finite: bool | None = None
    psnr: Number = None
    largest_error: Number = None


class Precision(_Part):
    """What fp16 and bf16 do to the network."""

    largest_activation: Number = None
    largest_layer: str | None = None
    layers: list[Layer] = []
    fp16: Reduced | None = None
    bf16: Reduced | None = None
    force_upcast: bool | None = None
    reason: str = ""


class Picture(_Part):
    """An input, its reconstruction, and how far apart they are."""

    key: str
    input: str
    reconstruction: str
    metrics: Numbers = {}


class Prior(_Part):
    """Pictures decoded from random latents."""

    title: str
    files: list[str] = []


class Interpolation(_Part):
    """Pictures decoded on the way between two codes."""

    keys: tuple[str, str]
    files: list[str] = []


class Pictures(_Part):
    """The files of the folder `pictures/`."""

    shown: list[Picture] = []
    worst: list[Picture] = []
    prior: list[Prior] = []
    interpolations: list[Interpolation] = []
    map: list[str] = []


class Content(_Part):
    """evaluation.json."""

    format: Literal[1]
    name: str
    date: str = ""
    versions: dict[str, str | None] = {}
    machine: str = ""
    seconds: Numbers = {}
    protocol: Protocol
    data: Data
    model: Model = Model()
    metrics: Numbers
    intervals: Intervals = {}
    frechet: Frechet | None = None
    references: list[Reference] = []
    latents: Latents | None = None
    codes: Codes | None = None
    probes: Probes | None = None
    precision: Precision | None = None
    pictures: Pictures = Field(default_factory=Pictures)
