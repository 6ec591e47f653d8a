"""Every YAML of configs/ takes a step, shrunk; its losses, schedule and all else as written."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_alignment import save_vision_model

from latent_ae import train
from latent_ae.config_file import load_config
from latent_ae.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
# One of each sort by default; CI runs them all.
QUICK = ("kl_f8", "ft_mse", "eq_f8", "va_f16")
RECIPES = [
    pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
    for path in sorted((ROOT / "configs").glob("*.yaml"))
]
SMALL = {
    "data.source": "imagefolder",
    "data.resolution": 64,
    "data.batch_size": 2,
    "data.workers": 0,
    "training.steps": 2,
    "training.accumulation": 1,
    "training.precision": "fp32",
}


def narrowed(network):
    """Overrides that make a new network small."""
    widths = [8] * len(network.block_out_channels)
    if network.init == "linear":  # which needs two channels a signal
        widths = [32] * len(widths)
        widths[-1] = max(32, 2 * network.latent_channels + 8)
    return {
        "network.block_out_channels": widths,
        "network.norm_num_groups": min(4, network.norm_num_groups),
    }


def shrunk(recipe, photos, exported, vision, output):
    """The overrides that bring a recipe onto a few small pictures."""
    changes = {**SMALL, "data.path": photos, "output": output}
    changes["validation"] = f"{{path: {photos}, images: 2, resolution: 64}}"
    changes |= {"network.path": exported} if recipe.network.path else narrowed(recipe.network)
    if recipe.data.resize:
        changes["data.resize"] = 64
    if recipe.data.buckets:
        changes["data.buckets.resolutions"] = [64, 96]
    if recipe.adversary:  # heard in the second of the two steps
        changes |= {"adversary.start": 1, "adversary.warmup_steps": 1, "adversary.channels": 4}
        changes |= {"adversary.layers": 2}
    if recipe.losses.perceptual:  # VGG16 would have to be fetched
        changes["losses.perceptual.net"] = "alex"
    if recipe.losses.alignment:
        changes["losses.alignment.model"] = vision
    return [f"{key}={value}" for key, value in changes.items()]


@pytest.mark.parametrize("path", RECIPES)
def test_every_recipe_takes_a_step(path, photos, exported, quiet, tmp_path):
    recipe, vision = load_config(path), tmp_path / "vision"
    if recipe.losses.alignment:
        save_vision_model(vision)
    overrides = shrunk(recipe, photos, exported, vision, tmp_path / "run")
    checkpoint = RunFolder(train(load_config(path, overrides), quiet)).checkpoint(2)
    averaged, raw = (
        load_file(checkpoint / name)
        for name in ("ema.safetensors", "network/diffusion_pytorch_model.safetensors")
    )
    assert any(not torch.equal(averaged[name], raw[name]) for name in averaged)
    if recipe.network.freeze == "encoder":
        before = load_file(exported / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(raw[name], before[name]) for name in raw if "encoder" in name)


def test_the_table_of_the_docs_names_them_all():
    table = (ROOT / "docs" / "recipes.md").read_text()
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`{path.stem}`" in table, path.stem
