"""Metrics of reconstructions against the libraries that define them, on real photographs."""

import numpy as np
import pytest
import torch
from conftest import NAMES, photograph_tensor
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure as torchmetrics_ms_ssim,
)

from latent_ae.data import to_uint8
from latent_ae.losses import load_backbone
from latent_ae.metrics import SMALLEST_MS_SSIM, ReconstructionMetrics


@pytest.fixture(scope="module")
def pairs():
    images = to_uint8(torch.cat([photograph_tensor(name, 192) for name in NAMES]))
    noise = 20 * torch.randn(images.shape, generator=torch.manual_seed(0))
    return images, (images + noise).round().clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def metrics(pairs):
    images, other = pairs
    found = ReconstructionMetrics(ms_ssim=True)
    found.update(images[:1], other[:1])
    found.update(images[1:], other[1:] / 127.5 - 1)  # floats are rounded to the same 8 bits
    return found


@pytest.mark.parametrize("i", range(len(NAMES)))
def test_metrics_are_those_of_scikit_image_lpips_and_torchmetrics(pairs, metrics, i):
    a, b = (np.asarray(x[i].permute(1, 2, 0)) for x in pairs)
    ssim = structural_similarity(
        a,
        b,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
    )
    image, other = (x[i : i + 1] for x in pairs)
    with torch.no_grad():
        lpips = load_backbone("alex")(image / 127.5 - 1, other / 127.5 - 1).item()
    ms_ssim = torchmetrics_ms_ssim(other.double() / 255, image.double() / 255, data_range=1.0)
    wanted = {
        "psnr": peak_signal_noise_ratio(a, b, data_range=255),
        "ssim": ssim,
        "ms_ssim": ms_ssim.item(),
        "lpips": lpips,
    }
    assert {name: values[i] for name, values in metrics.per_image.items()} == pytest.approx(
        wanted, rel=0, abs=1e-4
    )


def test_the_mean_is_over_pictures(metrics):
    for name, values in metrics.per_image.items():
        assert metrics.compute()[name] == pytest.approx(np.mean(values))


def test_a_flat_picture_does_not_make_the_mean_infinite():
    white = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    metrics = ReconstructionMetrics()
    metrics.update(white, white)
    assert metrics.compute()["psnr"] == pytest.approx(58.92, abs=0.01)


def test_ms_ssim_says_where_it_cannot_be_taken(pairs):
    images, other = (x[:1, :, :, : SMALLEST_MS_SSIM - 1] for x in pairs)
    values = ReconstructionMetrics(lpips=(), ms_ssim=True).measure(images, other)
    assert torch.isnan(values["ms_ssim"]).all()
    assert values["ssim"].isfinite().all()
    images, other = (x[:1, :, :SMALLEST_MS_SSIM, :SMALLEST_MS_SSIM] for x in pairs)
    values = ReconstructionMetrics(lpips=(), ms_ssim=True).measure(images, other)
    assert 0 < values["ms_ssim"].item() < 1


def test_pictures_that_contradict_each_other_have_an_ms_ssim(pairs):
    images = pairs[0][:1]
    values = ReconstructionMetrics(lpips=(), ms_ssim=True).measure(images, 255 - images)
    assert values["ms_ssim"].item() == 0  # not NaN, which a negative term to a power would be
