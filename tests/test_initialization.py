import json

import pytest
import torch
from conftest import photograph_tensor
from torch.nn import functional

from latent_ae import UserError, train
from latent_ae.autoencoder import build_network, decode_latents, encode_moments
from latent_ae.bottlenecks import split_moments
from latent_ae.config import NetworkConfig
from latent_ae.data import to_uint8
from latent_ae.evaluation import lanczos_reduction
from latent_ae.initialization import linear_code_, zero_residual_branches_

SMALL = {"layers_per_block": 1, "latent_channels": 4, "mid_block_add_attention": False}


def crops(count=96, size=48):
    """Random crops of photographs; the picture that is tested on is not among them."""
    torch.manual_seed(0)
    found = []
    for name in ("coffee", "rocket", "chelsea"):
        picture = photograph_tensor(name, 256)[0]
        for _ in range(count // 3):
            top, left = torch.randint(0, 256 - size, (2,)).tolist()
            found.append(picture[:, top : top + size, left : left + size])
    return torch.stack(found)


def psnr(a, b):
    return -10 * ((a.float() - b.float()) / 255).square().mean().log10().item()


def linear(**network):
    torch.manual_seed(0)
    built = build_network(NetworkConfig(**{**SMALL, **network}))
    linear_code_(built, crops())
    return built


@pytest.mark.parametrize(
    ("channels", "groups"), [((16, 32), 1), ((16, 32, 32), 4), ((16, 32, 64), 1)]
)
def test_untrained_network_is_a_codec_that_beats_lanczos(channels, groups):
    network = linear(block_out_channels=channels, norm_num_groups=groups)
    image = photograph_tensor("astronaut", 128)
    with torch.no_grad():
        mean, logvar = split_moments(encode_moments(network, image))
        decoded = to_uint8(decode_latents(network, mean))
    wanted = to_uint8(image)
    ours = psnr(decoded, wanted)
    lanczos = psnr(lanczos_reduction(wanted, mean[0].numel()), wanted)
    assert ours > lanczos
    assert 0.5 < mean.std() < 2
    assert (logvar == -6).all()


def test_the_code_is_the_karhunen_loeve_transform():
    """At one level nothing is lost before the latents: they must be the crops' own components."""
    network = linear(block_out_channels=(16, 32), norm_num_groups=1)
    images = crops()
    with torch.no_grad():
        mean, _ = split_moments(encode_moments(network, images))
    patches = functional.unfold(images, 2, stride=2).transpose(1, 2).flatten(0, 1).double()
    _, vectors = torch.linalg.eigh(torch.cov(patches.T))
    wanted = (patches - patches.mean(0)) @ vectors[:, -4:].flip(1)
    found = mean.flatten(2).transpose(1, 2).flatten(0, 1).double()
    for i in range(4):
        correlation = torch.corrcoef(torch.stack([found[:, i], wanted[:, i]]))[0, 1].abs()
        assert correlation > 0.99


def test_every_weight_can_still_be_trained():
    """Zeroed branches learn through their last convolution; after one step all of them move."""
    network = linear(block_out_channels=(16, 32), norm_num_groups=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    image = photograph_tensor("coffee", 64)
    for _ in range(2):
        optimizer.zero_grad()
        mean, logvar = split_moments(encode_moments(network, image))
        decoded = decode_latents(network, mean + 0.01 * logvar)
        (decoded - image).square().mean().backward()
        optimizer.step()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_zeroed_residual_blocks_are_the_identity():
    network = build_network(NetworkConfig(**SMALL, block_out_channels=(8, 8), norm_num_groups=4))
    zero_residual_branches_(network)
    block, features = network.encoder.down_blocks[0].resnets[0], torch.randn(1, 8, 16, 16)
    with torch.no_grad():
        assert torch.equal(block(features, None), features)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"block_out_channels": (32, 32), "norm_num_groups": 16}, "cannot carry"),
        ({"block_out_channels": (4, 8), "norm_num_groups": 1}, "cannot carry"),
        (
            {"block_out_channels": (8, 4), "norm_num_groups": 1, "latent_channels": 12},
            "fewer than the 12",
        ),
        ({"block_out_channels": (16,), "norm_num_groups": 1}, "two block_out_channels"),
        (
            {"block_out_channels": (16, 32), "mid_block_add_attention": True, "norm_num_groups": 1},
            "attention",
        ),
    ],
)
def test_networks_that_cannot_are_named(network, words):
    with pytest.raises(UserError, match=words):
        linear(**network)


@pytest.mark.parametrize("init", ["linear", "zero_residual"])
def test_training_starts_from_it_and_resumes(tiny, quiet, init):
    network = {"init": init, "block_out_channels": [16, 32], "norm_num_groups": 1}
    training = {"steps": 2, "learning_rate": 1e-5}
    run = train(tiny(network=network, training=training), quiet)
    log = (run / "log.jsonl").read_text()
    train(tiny(network=network, training={**training, "steps": 3}), quiet)
    again = (run / "log.jsonl").read_text()
    assert again.startswith(log)
    if init == "linear":
        assert json.loads(log.splitlines()[0])["l1"] < 0.15
