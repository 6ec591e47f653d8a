"""What diffusers' stock pipelines do with the numbers of an autoencoder's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["IGNORED_BY", "caveats"]

_IGNORES = "ignores it"
_ONLY_DECODES = "uses it in decoding, not in encoding"
_ONLY_ENCODES = "uses it in encoding, not in decoding"

_SD = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
)
_SDXL = (
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
_SD3 = (
    "StableDiffusion3Pipeline",
    "StableDiffusion3Img2ImgPipeline",
    "StableDiffusion3InpaintPipeline",
)
_FLUX = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
_DIT = ("DiTPipeline",)

# What diffusers 0.42's pipelines do; tests/test_stock_pipelines.py runs each of them and compares,
# and reads in their sources whether they know `force_upcast`.
IGNORED_BY: dict[str, dict[str, str]] = {
    "shift_factor": {
        **dict.fromkeys((*_SD, *_SDXL, *_DIT), _IGNORES),
        "StableDiffusion3InpaintPipeline": _ONLY_ENCODES,
    },
    "latents_mean": {
        **dict.fromkeys((*_SD, *_SD3, *_FLUX, *_DIT), _IGNORES),
        "StableDiffusionXLInpaintPipeline": _ONLY_DECODES,
    },
    "force_upcast": dict.fromkeys((*_SD, *_SD3, *_FLUX, *_DIT), _IGNORES),
}


def caveats(config: Mapping[str, Any]) -> list[str]:
    """What a user of stock pipelines must know about an autoencoder with this config.

    One sentence for each number that some pipelines ignore, with the way out; empty for a config
    that all of them read rightly.
    """
    found = []
    way_out = "for them export with statistics `folded`, which every pipeline reads rightly"
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        found.append(f"latents_mean and latents_std: {_told('latents_mean')}; {way_out}")
        if (channels := config.get("latent_channels")) != 4:
            found.append(
                f"latents_mean and latents_std: StableDiffusionXLPipeline and its kin take 4 of "
                f"them and fail with {channels}; {way_out}"
            )
    elif config.get("shift_factor"):
        found.append(f"shift_factor: {_told('shift_factor')}; {way_out}")
    if config.get("force_upcast"):
        found.append(
            f"force_upcast: {_told('force_upcast')}; run the autoencoder in bf16 or fp32 there, "
            "not in fp16"
        )
    return found


def _told(statistic: str) -> str:
    ways: dict[str, list[str]] = {}
    for pipeline, way in IGNORED_BY[statistic].items():
        ways.setdefault(way, []).append(pipeline)
    return "; ".join(f"{_listed(names)} {_verb(way, names)}" for way, names in ways.items())


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _verb(way: str, names: list[str]) -> str:
    return way if len(names) == 1 else way.replace("ignores", "ignore").replace("uses", "use")
