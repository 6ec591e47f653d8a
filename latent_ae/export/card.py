"""The model card of an exported folder."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL

from latent_ae.autoencoder import downsampling
from latent_ae.config import Config

__all__ = ["model_card", "protocol_of"]


def protocol_of(config: Config) -> str | None:
    """How the metrics of a run's validation are taken, in one sentence; None without one."""
    held_out = config.validation
    if held_out is None:
        return None
    size = held_out.resolution or config.data.resolution
    return (
        f"the first {held_out.images} pictures of {held_out.path}, shorter side to {size} by "
        "Lanczos, centre crop, posterior mode, fp32, rounded to 8 bits, LPIPS v0.1 alex"
    )


def model_card(network: AutoencoderKL, record: dict[str, Any], license_name: str) -> str:
    """The README.md of an exported folder, from what `latent_ae.json` records."""
    config, latents, factor = record["config"], record["latents"], downsampling(network)
    data = config["data"]
    channels = network.config["latent_channels"]
    metrics = dict(record["metrics"] or {})
    taken = metrics.pop("step", None)
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    protocol = f"Protocol: {record['metric_protocol']}; taken at step {taken}."
    table = f"\n| metric | value |\n|-|-|\n{rows}\n\n{protocol}\n"
    return f"""---
library_name: diffusers
license: {license_name}
tags: [autoencoder, vae, latent-diffusion, latent_ae]
---

# An autoencoder for latent diffusion

A KL-VAE (`diffusers.AutoencoderKL`), f{factor} with {channels} channels: an image of 3 × H × W
becomes latents of {channels} × H/{factor} × W/{factor}. Trained with latent_ae.

```python
from diffusers import AutoencoderKL
vae = AutoencoderKL.from_pretrained("path/to/this/folder")
```

| | |
|-|-|
| data | {data["path"]} ({data["source"]}), {data["resolution"]}² crops |
| training | {record["trained"]["steps"]} steps, {record["trained"]["images"]} images |
| objective | {_objective_in_words(config)} |
| scaling_factor | {network.config["scaling_factor"]:.5f}, measured on {latents["images"]} crops |
| KL | {latents["kl_nats_per_image"]:.0f} nats an image |
| force_upcast | {str(network.config["force_upcast"]).lower()}: {record["precision"]["reason"]} |

## Metrics on held-out pictures
{table if metrics else "None were taken while it trained."}
## Licence
{license_name}. The resolved config and all statistics are in `latent_ae.json`.
"""


def _objective_in_words(config: dict[str, Any]) -> str:
    losses, text = config["losses"], config["losses"]["pixel"].upper()
    if "perceptual" in losses:
        text += f" + {losses['perceptual']['weight']:g} LPIPS-{losses['perceptual']['net']}"
    text += f" + {config['bottleneck']['weight']:g} KL"
    if adversary := config.get("adversary"):
        text += f" + {adversary['weight']:g} PatchGAN ({adversary['loss']}"
        text += f", from step {adversary['start']})"
    return text
