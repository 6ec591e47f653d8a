"""An autoencoder in words: what it is, how it was trained, how it is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import VQModel

from latent_ae.export.stock import caveats
from latent_ae.network_kinds import NetworkSpec
from latent_ae.quantized import QuantizedAutoencoder

__all__ = ["how_to_load", "last_part", "loading_call", "objective_in_words", "title"]

_KINDS = {
    "AutoencoderKL": "A KL-VAE",
    "AutoencoderKLFlux2": "A KL-VAE",
    "AutoencoderDC": "A deep-compression autoencoder",
    "AutoencoderTiny": "A tiny autoencoder",
}
_QUANTIZERS = {
    "vq": "vector quantisation",
    "fsq": "finite scalar quantisation",
    "lfq": "lookup-free quantisation",
}


def loading_call(class_name: str, path: str) -> tuple[str, str]:
    """The name to import from diffusers and the call that loads a folder.

    Args:
        class_name: that of its config.json.
        path: of the folder.
    """
    if class_name == QuantizedAutoencoder.__name__:  # the folder carries its code
        return "AutoModel", f"AutoModel.from_pretrained({path!r}, trust_remote_code=True)"
    return class_name, f"{class_name}.from_pretrained({path!r})"


def title(spec: NetworkSpec, config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The heading of a model card and its first sentences.

    Args:
        spec: of the network's class.
        config: diffusers' config.json.
        record: what `latent_ae.json` records, if anything.
    """
    factor, pictures = 2 ** (len(config[spec.levels]) - 1), config.get("in_channels", 3)
    trained = " Trained with latent_ae." if record else ""
    if teacher := record.get("teacher"):
        told = f", weights sha256 {teacher['weights_sha256'][:12]}"
        trained += (
            " Its latents are the final (scaled) ones of the autoencoder "
            f"{last_part(teacher['path'])}{told if teacher['weights_sha256'] else ''}: it stands "
            "in for that one in a pipeline."
        )
    if spec.quantizes:
        return f"""# A discrete autoencoder

{_codes_in_words(config, factor)}: an image of {pictures} × H × W becomes whole numbers.{trained}"""
    channels = config["latent_channels"]
    return f"""# An autoencoder for latent diffusion

{_KINDS[spec.name]} (`diffusers.{spec.name}`), f{factor} with {channels} channels: an image of
{pictures} × H × W becomes latents of {channels} × H/{factor} × W/{factor}.{trained}"""


def _codes_in_words(config: Mapping[str, Any], factor: int) -> str:
    kind, size = config.get("quantizer", "vq"), config["num_vq_embeddings"]
    codes = config.get("heads", 1) * config.get("depth", 1)
    name = VQModel.__name__ if "quantizer" not in config else QuantizedAutoencoder.__name__
    where = "`diffusers.VQModel`" if name == VQModel.__name__ else "its code is in this folder"
    each = "one code" if codes == 1 else f"{codes} codes"
    bits = codes * math.log2(size)
    return (
        f"A VQ-VAE with {_QUANTIZERS[kind]} ({where}), f{factor}: {each} of {size:,} values for "
        f"{factor} × {factor} pixels, {bits / factor**2:.3g} bits a pixel before entropy coding"
    )


def how_to_load(config: Mapping[str, Any], name: str, variants: Sequence[str]) -> str:
    """The section of a model card that says how the folder is loaded.

    Args:
        config: diffusers' config.json.
        name: what `from_pretrained` shall be given.
        variants: of the weights.
    """
    imported, call = loading_call(config.get("_class_name", "AutoencoderKL"), name)
    call = call.replace("'", '"')
    variable = "vae" if imported not in ("VQModel", "AutoModel") else "vq"
    text = f"""```python
from diffusers import {imported}
{variable} = {call}
```"""
    if variable == "vq":
        text += """

`vq.encode(pictures).latents` are latents before the quantiser, which `vq.decode` applies."""
        if imported == "AutoModel":
            text += """
`vq.indices(latents)` are the codes, of shape (B, codes, h, w); `vq.decode_indices` takes them."""
    else:
        text += """

As the autoencoder of a pipeline: `DiffusionPipeline.from_pretrained(PIPELINE, vae=vae)`, where the
pipeline's denoiser was trained on this autoencoder's latents."""
    if variants:
        told = " or ".join(f'`variant="{variant}"`' for variant in variants)
        text += f"\nWeights of 16 bits: {told}, with the `torch_dtype` of that name."
        if config.get("force_upcast") and "fp16" in variants:
            text += " In fp16 it overflows: only where a pipeline reads `force_upcast`."
    if notes := caveats(config):
        text += "\n\n" + "\n".join(f"- {note}." for note in notes)
    return text


def objective_in_words(config: Mapping[str, Any]) -> str:
    """What a run minimised, from its resolved config."""
    losses, text = config["losses"], config["losses"]["pixel"].upper()
    if "perceptual" in losses:
        text += f" + {losses['perceptual']['weight']:g} LPIPS-{losses['perceptual']['net']}"
    if (variance := losses.get("variance", "fixed")) != "fixed":
        text = f"{text}, over a variance that is {variance.replace('_', ' ')},"
    frozen = config["network"].get("freeze") == "encoder"
    if (weight := config["bottleneck"].get("weight")) and not frozen:
        text += f" + {_penalties(weight, config['bottleneck'])}"
    if alignment := losses.get("alignment"):
        text += (
            f" + {alignment['weight']:g} alignment with {last_part(alignment['model'])} (VA-VAE)"
        )
    if "equivariance" in losses:
        text += ", also of latents scaled and turned with the picture (EQ-VAE)"
    if frozen:
        text += ", the encoder frozen"
    if "distillation" in config:
        text += " + squared distance of the latents from the teacher's"
    if adversary := config.get("adversary"):
        text += f" + {adversary['weight']:g} PatchGAN ({adversary['loss']}"
        text += f", from step {adversary['start']})"
    return text


def _penalties(weight: float, bottleneck: Mapping[str, Any]) -> str:
    """The bottleneck's terms with their weights."""
    kind = bottleneck.get("kind", "kl")
    if kind == "kl":
        return f"{weight:g} KL"
    terms = [f"{weight * bottleneck.get('commitment', 0.25):g} commitment"]
    if kind == "lfq":
        terms.append(f"{weight * bottleneck.get('entropy', 0.1):g} entropy")
    elif bottleneck.get("update", "gradient") == "gradient":
        terms.insert(0, f"{weight:g} codebook")
    return " + ".join(terms)


def last_part(path: str) -> str:
    """Of a path of any system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
