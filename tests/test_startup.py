"""What a verb does before its work begins: it loads little, and draws and computes little."""

import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn
from torch.nn import functional

from latent_ae.frozen import FrozenAutoencoder
from latent_ae.initialization import _ROWS, _fit
from latent_ae.losses import load_backbone
from latent_ae.losses.perceptual import _Undrawn

# What each verb imports, and what of it is left to those who use it.
UNUSED = {
    "train": ("latent_ae.training", {"torchmetrics", "torch_fidelity", "lpips", "pandas"}),
    "encode": ("latent_ae.latents", {"torchmetrics", "torch_fidelity", "lpips", "pandas"}),
}


@pytest.mark.parametrize("verb", UNUSED)
def test_a_verb_loads_nothing_that_it_may_not_need(verb):
    module, unused = UNUSED[verb]
    script = f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    loaded = set(json.loads(answer.stdout.splitlines()[-1]))
    assert module in loaded
    assert not unused & loaded


def test_undrawn_leaves_parameters_and_the_random_state_alone():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.GroupNorm(2, 4)
            self.embedding = nn.Embedding(5, 6)
            self.register_buffer("noise", torch.zeros(64).normal_())

    before = torch.get_rng_state()
    with _Undrawn():
        _ = nn.Linear(8, 8), nn.Embedding(5, 6), nn.Conv2d(3, 4, 3)
    assert torch.equal(before, torch.get_rng_state())
    with _Undrawn():
        made = Noisy()
    assert made.noise.std() > 0.5  # no file may hold it
    assert (made.norm.weight == 1).all()
    torch.manual_seed(0)
    first = nn.Linear(8, 8)
    torch.manual_seed(0)
    assert torch.equal(first.weight, nn.Linear(8, 8).weight)  # and outside it all is as ever


def test_the_distance_draws_no_weights_that_a_file_replaces(monkeypatch):
    first = load_backbone("alex").state_dict()
    # Without the fork that hides them, draws would move the random state.
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    before = torch.get_rng_state()
    again = load_backbone("alex").state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, first[name]) for name, value in again.items())
    load_backbone("alex", untrained=True)
    assert not torch.equal(before, torch.get_rng_state())


def _folder(path, **options):
    torch.manual_seed(0)
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        **options,
    )
    network.save_pretrained(path)
    return network


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_the_probe_is_as_small_as_the_config_allows(tmp_path, monkeypatch, kind):
    if kind == "kl":
        network, factor, channels = _folder(tmp_path / "vae", latent_channels=3), 4, 3
    else:
        network = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        )
        network.save_pretrained(tmp_path / "vae")
        factor, channels = 8, 4
    sides = []
    encode = type(network).encode
    monkeypatch.setattr(
        type(network),
        "encode",
        lambda self, x, *a, **k: sides.append(x.shape[-1]) or encode(self, x, *a, **k),
    )
    frozen = FrozenAutoencoder(tmp_path / "vae", "cpu")
    assert (frozen.downsampling, frozen.channels) == (factor, channels)
    assert frozen.has_posterior is (kind == "kl")
    assert sides == [4 * factor]


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_fit_copies_the_rows_it_looks_at_and_no_others(kernel):
    inputs, target = torch.rand(12, 3, 66, 60), torch.rand(12, 2, 66, 60)  # more than _ROWS
    state = torch.get_rng_state()
    weight, bias = _fit(inputs, target, kernel)
    torch.set_rng_state(state)
    patches = functional.unfold(inputs, kernel).transpose(1, 2).flatten(0, 1)
    reach = kernel // 2
    inner = functional.pad(target, [-reach] * 4)
    rows = torch.randperm(len(patches))[:_ROWS]
    x = patches[rows].double()
    y = inner.permute(0, 2, 3, 1).flatten(0, 2)[rows].double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.double)], 1)
    best = torch.linalg.lstsq(x, y).solution
    window = slice(1 - reach, 2 + reach)
    mine = weight[:, :, window, window].flatten(1)
    assert torch.allclose(mine.double(), best[:-1].T, atol=1e-4)
    assert torch.allclose(bias.double(), best[-1], atol=1e-4)
