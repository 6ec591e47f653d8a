import numpy as np
import pytest
import torch
from conftest import NAMES, photograph_tensor
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from latent_ae import UserError, evaluate, load_network
from latent_ae.data import to_uint8
from latent_ae.evaluation import lanczos_reduction
from latent_ae.losses import load_backbone
from latent_ae.metrics import ReconstructionMetrics


@pytest.fixture(scope="module")
def pairs():
    images = to_uint8(torch.cat([photograph_tensor(name, 96) for name in NAMES]))
    noise = 20 * torch.randn(images.shape, generator=torch.manual_seed(0))
    return images, (images + noise).round().clamp(0, 255).to(torch.uint8)


def test_metrics_are_those_of_scikit_image_and_lpips(pairs):
    images, other = pairs
    metrics = ReconstructionMetrics()
    metrics.update(images[:1], other[:1])
    metrics.update(images[1:], other[1:] / 127.5 - 1)  # floats are rounded to the same 8 bits
    stock = load_backbone("alex")
    for i in range(len(images)):
        a, b = (np.asarray(x[i].permute(1, 2, 0)) for x in (images, other))
        psnr = peak_signal_noise_ratio(a, b, data_range=255)
        ssim = structural_similarity(
            a,
            b,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        with torch.no_grad():
            lpips = stock(images[i] / 127.5 - 1, other[i] / 127.5 - 1).item()
        assert metrics.per_image["psnr"][i] == pytest.approx(psnr, abs=1e-3)
        assert metrics.per_image["ssim"][i] == pytest.approx(ssim, abs=2e-3)
        assert metrics.per_image["lpips"][i] == pytest.approx(lpips, abs=1e-5)
    assert metrics.compute()["psnr"] == pytest.approx(np.mean(metrics.per_image["psnr"]))


def test_a_flat_picture_does_not_make_the_mean_infinite():
    white = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    metrics = ReconstructionMetrics()
    metrics.update(white, white)
    assert metrics.compute()["psnr"] == pytest.approx(58.92, abs=0.01)


def test_lanczos_keeps_as_many_numbers_as_it_may():
    images = to_uint8(photograph_tensor("coffee", 64))
    assert torch.equal(lanczos_reduction(images, 3 * 64 * 64), images)
    errors = [
        (lanczos_reduction(images, values).float() - images.float()).square().mean().item()
        for values in (3 * 32 * 32, 3 * 16 * 16, 3)
    ]
    assert errors == sorted(errors)
    flat = lanczos_reduction(images, 3)[0]
    assert flat.flatten(1).float().std(1).max() == 0


def test_evaluation_is_the_reconstruction_of_stock_diffusers(exported, photos):
    result = evaluate(exported, photos, resolution=64, batch_size=3)
    from latent_ae.config import SourceConfig
    from latent_ae.data import evaluation_batches, normalize

    network, wanted = load_network(exported), ReconstructionMetrics()
    for batch in evaluation_batches(SourceConfig(path=str(photos)), 64):
        with torch.no_grad():
            decoded = network(normalize(batch.images), sample_posterior=False).sample
        wanted.update(batch.images, decoded)
    assert result.metrics == pytest.approx(wanted.compute(), rel=1e-4)
    assert result.protocol["images"] == 4
    assert result.protocol["values_per_image"] == 4 * 32 * 32
    assert result.lanczos["psnr"] > 20
    assert evaluate(exported, photos, resolution=64, limit=2).protocol["images"] == 2


def test_wrong_input(exported, photos, tmp_path):
    with pytest.raises(UserError, match="no multiple"):
        evaluate(exported, photos, resolution=65)
    with pytest.raises(UserError, match="too small to measure"):
        evaluate(exported, photos, resolution=16)
    with pytest.raises(UserError, match="no exported autoencoder"):
        evaluate(tmp_path, photos)
    with pytest.raises(UserError, match="there is no folder"):
        evaluate(exported, tmp_path / "none")
