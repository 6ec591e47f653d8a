"""Which programs load a file, read from their sources; told, so that nobody finds out by trying."""

from __future__ import annotations

from typing import Any

from latent_ae.conversion.architecture import attention_levels

__all__ = ["tool_notes"]

# What each builds around the tensors; read in comfy/sd.py (`VAE`) and, for AUTOMATIC1111's, in
# modules/sd_vae.py, which puts the tensors into the first stage of the checkpoint at hand.
_COMMON = {
    "layers_per_block": [2],
    "norm_num_groups": [32],
    "in_channels": [3],
    "out_channels": [3],
    "mid_block_add_attention": [True],
    "attention within levels": [False],
}
TOOLS: dict[str, dict[str, list[Any]]] = {
    "ComfyUI": {
        **_COMMON,
        "block_out_channels": [[128, 256, 512, 512], [128, 256, 512]],
        "one quant convolution without the other": [False],
        "64 latent channels, those of HunyuanImage,": [False],
    },
    "AUTOMATIC1111's WebUI": {
        **_COMMON,
        "block_out_channels": [[128, 256, 512, 512]],
        "latent_channels": [4],
        "use_quant_conv": [True],
        "use_post_quant_conv": [True],
    },
}


def tool_notes(config: dict[str, Any]) -> list[str]:
    """One sentence a program: that it loads a bare file of this network, or what stands against it.

    Args:
        config: of diffusers, complete.
    """
    facts = dict(config)
    facts["attention within levels"] = any(map(any, attention_levels(config)))
    facts["one quant convolution without the other"] = (
        config["use_quant_conv"] != config["use_post_quant_conv"]
    )
    facts["64 latent channels, those of HunyuanImage,"] = config["latent_channels"] == 64
    notes = []
    for tool, wants in TOOLS.items():
        against = [
            f"{key} {facts[key]} (it takes {' or '.join(map(str, allowed))})"
            for key, allowed in wants.items()
            if facts[key] not in allowed
        ]
        notes.append(f"{tool} {'cannot use it: ' + '; '.join(against) if against else 'loads it'}")
    if config["norm_num_groups"] != 32:
        notes.append(
            f"no tensor says norm_num_groups {config['norm_num_groups']}: a program that takes 32 "
            "may load the file and decode it wrongly"
        )
    return notes
