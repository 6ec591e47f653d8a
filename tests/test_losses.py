from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from conftest import NAMES, photograph_tensor
from PIL import Image
from safetensors.torch import load_file, save_file

from latent_ae import UserError
from latent_ae.losses import PIXEL_LOSSES, PerceptualLoss, charbonnier, load_backbone

EXAMPLES = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def perceptual():
    return PerceptualLoss("alex")


def example(name):
    with Image.open(EXAMPLES / f"ex_{name}.png") as picture:
        return lpips.im2tensor(np.asarray(picture.convert("RGB")))


def test_published_distances_of_lpips_examples(perceptual):
    # README of the lpips repository: (ref, p0) 0.722, (ref, p1) 0.138, AlexNet.
    with torch.no_grad():
        p0 = perceptual(example("ref"), example("p0")).item()
        p1 = perceptual(example("ref"), example("p1")).item()
    assert p0 == pytest.approx(0.722, abs=5e-4)
    assert p1 == pytest.approx(0.138, abs=5e-4)


def test_agrees_with_stock_lpips_on_photographs(perceptual):
    stock = load_backbone("alex")
    images = torch.cat([photograph_tensor(name, 96) for name in NAMES])
    other = (images + 0.2 * torch.randn(images.shape, generator=torch.manual_seed(0))).clamp(-1, 1)
    with torch.no_grad():
        ours, theirs = perceptual(images, other), stock(images, other).flatten()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradient_reaches_the_reconstruction_and_nothing_else(perceptual):
    image = photograph_tensor("astronaut").requires_grad_()
    other = photograph_tensor("astronaut").add(0.1).requires_grad_()
    perceptual(image, other).sum().backward()
    assert image.grad is None
    assert other.grad.abs().max() > 0
    assert not any(p.requires_grad for p in perceptual.parameters())


def test_gradient_is_stock_lpips_gradient(perceptual):
    stock = load_backbone("alex")
    image = photograph_tensor("coffee")
    grads = []
    for loss in (perceptual, stock):
        other = (image * 0.8).requires_grad_()
        loss(image, other).sum().backward()
        grads.append(other.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flat_pictures_in_half_precision_are_no_nan(perceptual, dtype):
    # Stock lpips divides by a norm + 1e-10, which is 0 in fp16.
    flat = torch.zeros(1, 3, 64, 64)
    other = flat.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        distance = perceptual(flat, other)
    distance.sum().backward()
    assert distance.item() == 0
    assert torch.isfinite(other.grad).all()


def test_stays_in_eval_mode(perceptual):
    perceptual.train()
    assert not any(module.training for module in perceptual.modules())


def test_vgg_from_a_file(tmp_path):
    # The right names and shapes with other numbers: what is tested is the way in.
    state = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).net.state_dict()
    features = {"features." + name.split(".", 1)[1]: value for name, value in state.items()}
    save_file({k: v.half() for k, v in features.items()}, tmp_path / "vgg.safetensors")
    model = load_backbone("vgg", str(tmp_path / "vgg.safetensors"))
    for name, value in model.net.state_dict().items():
        torch.testing.assert_close(value, state[name].half().float())
    loss = PerceptualLoss("vgg", str(tmp_path / "vgg.safetensors"))
    with torch.no_grad():
        assert loss(photograph_tensor("coffee"), photograph_tensor("rocket")).item() > 0


def test_wrong_backbone_files_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_backbone("vgg", str(tmp_path / "none.safetensors"))
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_backbone("vgg", str(tmp_path / "junk"))
    asset = Path(__file__).parents[1] / "latent_ae/assets/lpips_alexnet.safetensors"
    with pytest.raises(UserError, match=r"no vgg backbone|another network"):
        load_backbone("vgg", str(asset))
    assert all(value.dtype == torch.float16 for value in load_file(asset).values())


def test_vgg_without_file_or_network_says_both_ways(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network here")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match=r"no network here.*losses\.perceptual\.path"):
        load_backbone("vgg")


@pytest.mark.parametrize("name", PIXEL_LOSSES)
def test_pixel_losses_are_per_element_and_zero_at_zero(name):
    image = photograph_tensor("chelsea")
    loss = PIXEL_LOSSES[name](image, image)
    assert loss.shape == image.shape
    assert loss.abs().max() == 0
    assert (PIXEL_LOSSES[name](image, image + 0.3) > 0).all()


def test_charbonnier_lies_between_l1_and_l2():
    small, large = torch.tensor(1e-5), torch.tensor(0.5)
    assert charbonnier(torch.tensor(0.0), large).item() == pytest.approx(0.5, abs=1e-3)
    assert charbonnier(torch.tensor(0.0), small).item() < small.item() / 10
