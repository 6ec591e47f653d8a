"""Every kind of diffusers' image autoencoder behind one face, and what its precision allows."""

import copy
import json
import math

import diffusers
import pytest
import torch
from conftest import photograph_tensor
from torch import nn

from latent_ae import UserError
from latent_ae.bottlenecks import gaussian_kl
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.precision import measure_precision

BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
KL = {**BLOCKS, "block_out_channels": (8, 16), "norm_num_groups": 4}
TINY = {
    "encoder_block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "num_encoder_blocks": (1,) * 4,
    "num_decoder_blocks": (1,) * 4,
}
DC = {
    "in_channels": 3,
    "latent_channels": 4,
    "attention_head_dim": 2,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
    "downsample_block_type": "pixel_unshuffle",
}
KINDS = {
    "AutoencoderKL": (KL, 2, 4, True),
    "AutoencoderTiny": (TINY, 8, 4, False),
    "AutoencoderDC": (DC, 2, 4, False),
    "VQModel": ({**KL, "latent_channels": 3, "num_vq_embeddings": 32}, 2, 3, False),
}


def saved(folder, name, options):
    torch.manual_seed(0)
    network = getattr(diffusers, name)(**options).eval()
    network.save_pretrained(folder)
    return network


@pytest.mark.parametrize("name", KINDS)
def test_encode_and_decode_are_stock_diffusers(name, tmp_path):
    options, factor, channels, has_posterior = KINDS[name]
    network = saved(tmp_path, name, options)
    frozen = FrozenAutoencoder(tmp_path)
    assert (frozen.class_name, frozen.downsampling, frozen.channels) == (name, factor, channels)
    images = photograph_tensor("coffee", 64)
    mean, logvar = frozen.encode(images)
    with torch.no_grad():
        output = network.encode(images)
        wanted = output.latent_dist.mode() if has_posterior else output[0]
        decoded = network.decode(wanted).sample
    assert (logvar is not None) == has_posterior
    torch.testing.assert_close(mean, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frozen.decode(wanted), decoded, rtol=1e-4, atol=1e-3)
    assert frozen.describe()["downsampling"] == factor
    json.dumps(frozen.describe(), allow_nan=False)


def test_sides_that_the_factor_does_not_divide_are_padded_and_cut_back(tmp_path):
    network = saved(tmp_path, "AutoencoderTiny", TINY)
    images = photograph_tensor("coffee", 64)[..., :61, :50]
    frozen = FrozenAutoencoder(tmp_path)
    padded = nn.functional.pad(images, (0, 6, 0, 3), mode="replicate")
    with torch.no_grad():
        wanted = network.decode(network.encode(padded)[0]).sample[..., :61, :50]
    found = frozen.decode(frozen.encode(images)[0], (61, 50))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_bits_of_a_code(tmp_path):
    saved(tmp_path / "kl", "AutoencoderKL", KL)
    saved(tmp_path / "vq", "VQModel", KINDS["VQModel"][0])
    saved(tmp_path / "tiny", "AutoencoderTiny", TINY)
    images = photograph_tensor("coffee", 64)
    kl, vq, tiny = (FrozenAutoencoder(tmp_path / name) for name in ("kl", "vq", "tiny"))
    mean, logvar = kl.encode(images)
    nats = gaussian_kl(mean.double(), logvar.double()).sum().item()
    assert kl.bits(mean, logvar).item() == pytest.approx(nats / math.log(2), rel=1e-5)
    assert kl.bits(mean, torch.full_like(mean, -30)).item() == 16 * mean.numel()
    assert vq.bits(*vq.encode(images)).item() == 5 * 32 * 32
    assert tiny.bits(*tiny.encode(images)).item() == 16 * 4 * 8 * 8


def test_what_is_no_autoencoder_of_pictures_is_one_sentence(tmp_path):
    unet = {
        "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    saved(tmp_path / "unet", "UNet2DModel", unet)
    saved(tmp_path / "video", "AutoencoderKLQwenImage", {"base_dim": 8})
    saved(tmp_path / "pickled", "AutoencoderKL", KL)
    weights = tmp_path / "pickled/diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("[]")
    for name, words in {
        "unet": "UNet2DModel, which is no autoencoder",
        "video": "takes no pictures",
        "pickled": "cannot be loaded",
        "broken": "no config of diffusers",
        "nothing": "no exported autoencoder",
    }.items():
        with pytest.raises(UserError, match=words):
            FrozenAutoencoder(tmp_path / name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_near(tmp_path, precision):
    saved(tmp_path, "AutoencoderKL", KL)
    images = photograph_tensor("coffee", 64)
    exact, low = FrozenAutoencoder(tmp_path), FrozenAutoencoder(tmp_path, precision=precision)
    a, b = (frozen.decode(frozen.encode(images)[0]) for frozen in (exact, low))
    assert b.dtype == torch.float32
    assert 0 < (a - b).abs().max() < 0.3
    assert (a - b).square().mean().sqrt() < 0.02


@pytest.fixture
def network():
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**KL).eval()


def test_activations_are_those_of_every_layer(network):
    images, seen = photograph_tensor("coffee", 64), {}
    layer = network.encoder.down_blocks[0].resnets[0].conv1
    hook = layer.register_forward_hook(lambda m, i, output: seen.update(size=output.abs().max()))
    with torch.no_grad():
        network(images)
    hook.remove()
    before = copy.deepcopy(network.state_dict())
    evidence = measure_precision(network, images)
    name = "encoder.down_blocks.0.resnets.0.conv1"
    assert evidence.layers[name] == pytest.approx(seen["size"].item(), rel=1e-5)
    assert not evidence.force_upcast
    assert evidence.fp16.psnr > evidence.bf16.psnr > 30
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    json.dumps(evidence.to_json(), allow_nan=False)


def test_an_overflow_in_fp16_is_named_and_forces_fp32(network):
    """GroupNorm takes the scale out again: in fp32 nothing changes, in fp16 it overflows."""
    images = photograph_tensor("coffee", 64)
    resnet = network.decoder.up_blocks[0].resnets[0]
    with torch.no_grad():
        plain = network(images).sample
        resnet.conv1.weight.mul_(1e6)
        resnet.conv1.bias.mul_(1e6)
        assert (network(images).sample - plain).abs().max() < 0.05
    evidence = measure_precision(network, images)
    assert evidence.force_upcast
    assert "decoder.up_blocks.0.resnets.0.conv1" in evidence.reason
    assert not evidence.fp16.finite
    assert evidence.bf16.finite


def test_little_headroom_forces_fp32_too(network):
    images = photograph_tensor("coffee", 64)
    name, largest = measure_precision(network, images).largest
    conv = network.decoder.up_blocks[0].resnets[0].conv1
    mine = measure_precision(network, images).layers["decoder.up_blocks.0.resnets.0.conv1"]
    with torch.no_grad():
        conv.weight.mul_(30_000 / mine)
        conv.bias.mul_(30_000 / mine)
    evidence = measure_precision(network, images)
    assert evidence.fp16.finite
    assert evidence.force_upcast
    assert "within a factor of 4" in evidence.reason
    assert largest < 30_000, name


def test_weights_without_numbers(network):
    with torch.no_grad():
        network.decoder.conv_out.bias.fill_(math.nan)
    evidence = measure_precision(network, photograph_tensor("coffee", 64))
    assert evidence.force_upcast
    assert "not finite even in fp32" in evidence.reason
