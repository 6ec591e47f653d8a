"""Probes of stand-ins for an autoencoder whose answers are known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES, photograph_tensor

from latent_ae.data import normalize, to_uint8
from latent_ae.evaluation.gallery import Gallery, Shown, save_webp
from latent_ae.evaluation.probes import (
    channel_effects,
    code_map,
    equivariance,
    interpolate,
    noise_sensitivity,
    prior_draws,
)


class Pooling:
    """Averages of 4 × 4 pixels, and two channels of which the decoder ignores the last."""

    downsampling, channels, device = 4, 4, torch.device("cpu")

    def encode(self, images):
        pooled = F.avg_pool2d(images, 4)
        return torch.cat([pooled, pooled[:, :1]], 1), None

    def decode(self, latents, size=None):
        decoded = F.interpolate(latents[:, :3], scale_factor=4)
        return decoded if size is None else decoded[..., : size[0], : size[1]]


class Identity:
    downsampling, channels, device = 1, 3, torch.device("cpu")

    def encode(self, images):
        return images, None

    def decode(self, latents, size=None):
        return latents


@pytest.fixture(scope="module")
def images():
    return to_uint8(torch.cat([photograph_tensor(name, 64) for name in NAMES]))


def test_averages_follow_turns_mirrors_and_whole_shifts(images):
    rows = {row["transform"]: row for row in equivariance(Pooling(), images)}
    assert rows.keys() == {
        "scale 1/2",
        "scale 3/4",
        "rotate 90°",
        "mirror",
        "shift 4 px",
        "shift 2 px",
    }
    for name in ("rotate 90°", "mirror", "shift 4 px"):
        assert rows[name]["latents"] < 1e-6
    for name in ("scale 1/2", "scale 3/4", "shift 2 px"):
        assert rows[name]["latents"] > 0.01
    pictures = normalize(images)
    wanted = Pooling().encode(
        F.interpolate(pictures, scale_factor=0.5, mode="bicubic", antialias=True)
    )[0]
    codes = Pooling().encode(pictures)[0]
    half = F.interpolate(codes, scale_factor=0.5, mode="bicubic", antialias=True)
    spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean()
    error = ((wanted - half).square().mean() / spread).sqrt().item()
    assert rows["scale 1/2"]["latents"] == pytest.approx(error, rel=1e-5)


def test_a_half_shift_is_compared_with_what_lies_between(images):
    rows = {row["transform"]: row for row in equivariance(Pooling(), images)}
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 3, 64, 64)
    flat = {row["transform"]: row for row in equivariance(Pooling(), ramp)}
    assert flat["shift 2 px"]["latents"] < 1e-3  # on a ramp the mean of two averages is exact
    assert rows["shift 2 px"]["latents"] > 0.05


def test_noise_costs_what_its_variance_says():
    grey = torch.full((2, 3, 128, 128), 128, dtype=torch.uint8)
    std = torch.tensor([0.1, 0.2, 0.3])
    rows = noise_sensitivity(Identity(), grey, std, seed=0)
    assert rows[0] == {"noise": 0.0, "psnr": pytest.approx(100)}
    for row in rows[2:4]:
        variance = (row["noise"] * std / 2).square().mean().item() + 1 / (12 * 255**2)
        assert row["psnr"] == pytest.approx(-10 * math.log10(variance), abs=0.1)


def test_a_channel_that_the_decoder_ignores_has_no_effect(images):
    effects = channel_effects(Pooling(), images, torch.zeros(4))
    assert effects[3] == 0
    assert min(effects[:3]) > 5
    codes = Pooling().encode(normalize(images))[0]
    wanted = 127.5 * (codes[:, 0].square().mean() / 3).sqrt().item()
    assert effects[0] == pytest.approx(wanted, rel=1e-4)


def test_draws_are_seeded_and_have_the_moments():
    moments = torch.tensor([0.5, -0.5, 0.0, 0.0]), torch.tensor([0.1, 0.1, 0.01, 1.0])
    draws = prior_draws(Pooling(), moments, 66, 64, seed=1)
    assert [pictures.shape for pictures in draws.values()] == [(64, 3, 64, 64)] * 2
    again = prior_draws(Pooling(), moments, 66, 64, seed=1)
    assert all(torch.equal(draws[title], again[title]) for title in draws)
    fitted = normalize(list(draws.values())[1])
    assert fitted.mean((0, 2, 3)).tolist() == pytest.approx([0.5, -0.5, 0.0], abs=0.01)


def test_the_ends_of_an_interpolation_are_the_reconstructions(images):
    steps = interpolate(Pooling(), images[:2])
    decoded = to_uint8(Pooling().decode(Pooling().encode(normalize(images[:2]))[0]))
    assert len(steps) == 7
    assert (steps[[0, -1]].int() - decoded.int()).abs().max() <= 1
    middle = normalize(decoded).mean(0)
    assert (normalize(steps[3]) - middle).abs().max() < 0.02


def test_the_map_is_the_first_two_principal_components():
    codes = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)).double()
    codes[:, 3] *= 5
    points, shares = code_map(codes)
    centred = codes.numpy() - codes.numpy().mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    wanted = centred @ vectors[:, [-1, -2]]
    wanted /= wanted.std(0, ddof=1)
    np.testing.assert_allclose(np.abs(points.numpy()), np.abs(wanted), rtol=1e-6, atol=1e-9)
    assert shares == pytest.approx((values[[-1, -2]] / values.sum()).tolist())
    assert code_map(codes[:2])[0].shape == (2, 2)


def shown(position, lpips):
    image = torch.full((3, 60, 80), position, dtype=torch.uint8)
    return Shown(position, f"../{position}.png", image, image, {"lpips": lpips, "psnr": 1.0})


def test_a_gallery_keeps_the_first_and_the_worst_in_any_split():
    lpips = [0.3, 0.1, 0.5, 0.2, 0.4]
    one, two = Gallery(2, 3), Gallery(2, 3)
    for position, value in enumerate(lpips):
        (one if position % 2 else two).add(shown(position, value))
    one.merge(two)
    assert [s.position for s in one.first] == [0, 1]
    assert [s.position for s in one.worst] == [2, 4, 0]
    assert sorted(one.thumbnails) == list(range(5))


def test_saved_pictures_are_lossless_and_stay_in_their_folder(tmp_path, images):
    from PIL import Image

    name = save_webp(tmp_path / "pictures", "a", images[0])
    with Image.open(tmp_path / name) as picture:
        assert np.array_equal(np.asarray(picture), images[0].permute(1, 2, 0).numpy())
    gallery = Gallery(1, 1)
    gallery.add(shown(3, 0.5))
    entries = gallery.save(tmp_path / "pictures", 1)
    assert entries["shown"][0]["key"] == "../3.png"
    assert not list(tmp_path.glob("*.png"))
