import json

import pytest
import torch
from conftest import photograph_tensor
from diffusers import AutoencoderKL

from latent_ae import Autoencoder, UserError, load_network
from latent_ae.autoencoder import (
    build_network,
    decode_latents,
    downsampling,
    encode_moments,
    weights_sha256,
)
from latent_ae.config import AutoencoderConfig, BottleneckConfig, NetworkConfig

SMALL = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "latent_channels": 3,
    "norm_num_groups": 4,
}


def autoencoder(weight=1e-6, **network):
    torch.manual_seed(0)
    return Autoencoder.from_config(
        AutoencoderConfig(
            network=NetworkConfig(**SMALL, **network), bottleneck=BottleneckConfig(weight=weight)
        )
    )


@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
def test_shapes(size):
    model, images = autoencoder(), torch.rand(2, 3, *size) * 2 - 1
    result = model(images)
    assert result.images.shape == images.shape
    assert result.code.latents.shape == (2, 3, size[0] // 4, size[1] // 4)
    assert downsampling(model.network) == 4


@pytest.mark.parametrize("weight", [0.0, 1e-6])
def test_every_parameter_has_a_gradient(weight):
    model = autoencoder(weight)
    result = model(photograph_tensor("coffee"))
    terms = sum(term.sum() for term in result.code.loss_terms.values())
    (result.images.square().mean() + terms).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_reconstructs_as_stock_diffusers_does():
    model, images = autoencoder(weight=0.0), photograph_tensor("coffee")
    with torch.no_grad():
        wanted = model.network(images, sample_posterior=False).sample
        assert torch.equal(model(images).images, wanted)
        mean = encode_moments(model.network, images)[:, :3]
        assert torch.equal(decode_latents(model.network, mean), wanted)


def test_gradient_equals_stock_diffusers_own():
    ours, theirs = autoencoder(weight=0.0), autoencoder(weight=0.0).network
    images = photograph_tensor("rocket")
    (ours(images).images - images).square().mean().backward()
    (theirs(images, sample_posterior=False).sample - images).square().mean().backward()
    for a, b in zip(ours.network.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_autocast_output_is_fp32():
    with torch.autocast("cpu", torch.bfloat16):
        result = autoencoder()(photograph_tensor("coffee"))
    assert result.images.dtype == torch.float32
    assert result.code.latents.dtype == torch.float32


def test_quant_convs_come_and_go_together():
    network = build_network(NetworkConfig(**SMALL, use_quant_conv=False))
    assert network.quant_conv is None
    assert network.post_quant_conv is None


def test_an_existing_folder_can_be_built_on(tmp_path):
    network = autoencoder().network
    network.save_pretrained(tmp_path / "vae")
    again = build_network(NetworkConfig(path=str(tmp_path / "vae")))
    for a, b in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(weights_sha256(tmp_path / "vae")) == 64


def test_what_is_no_autoencoder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_network(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(UserError, match="holds a UNet2DModel"):
        load_network(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_network(tmp_path)
    with pytest.raises(UserError, match="has no diffusion_pytorch_model"):
        weights_sha256(tmp_path)


def test_a_half_precision_folder_is_trained_in_fp32(tmp_path):
    autoencoder().network.to(torch.float16).save_pretrained(tmp_path / "vae")
    network = load_network(tmp_path / "vae")
    assert isinstance(network, AutoencoderKL)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
