"""The latent space's numbers against direct computation, closed forms and numpy."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import NAMES, photograph_tensor
from torch.distributions import Normal, kl_divergence

from latent_ae.data import to_uint8
from latent_ae.evaluation.latent_space import LatentSpace
from latent_ae.evaluation.prior import negentropy, sliced_wasserstein
from latent_ae.evaluation.spectrum import BINS, Spectrum, radial_power
from latent_ae.scaling import LatentScaling


@pytest.fixture(scope="module")
def posteriors():
    generator = torch.Generator().manual_seed(0)
    shift = torch.tensor([0.0, 1.0, -2.0]).view(-1, 1, 1)
    mean = shift + torch.randn(6, 3, 8, 8, generator=generator)
    logvar = -3 + 0.5 * torch.randn(6, 3, 8, 8, generator=generator)
    mean[:, 2] = -2.0  # a channel that says nothing of the picture
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return mean, logvar, images


def gathered(posteriors, places, step=2):
    mean, logvar, images = posteriors
    space = LatentSpace(3)
    for i in range(0, len(places), step):
        rows = places[i : i + step]
        space.update(mean[rows], logvar[rows], images[rows], rows)
    return space


def test_channels_are_what_all_latents_at_once_give(posteriors):
    mean, logvar, _ = posteriors
    summary = gathered(posteriors, list(range(6))).summary(LatentScaling())
    m, v = mean.double(), logvar.double().exp()
    kl = kl_divergence(Normal(m, v.sqrt()), Normal(0.0, 1.0))
    for c, channel in enumerate(summary["channels"]):
        total = m[:, c].var(correction=0) + v[:, c].mean()
        assert channel["mean"] == pytest.approx(m[:, c].mean().item())
        assert channel["std"] == pytest.approx(total.sqrt().item())
        assert channel["kl_nats"] == pytest.approx(kl[:, c].mean().item())
        signal = m[:, c].var(correction=0) / total
        assert channel["signal_share"] == pytest.approx(signal.item(), abs=1e-9)
        active = (m[:, c].var(0, correction=0) > 0.01).double().mean()
        assert channel["active_units"] == pytest.approx(active.item())
        widths = v[:, c].sqrt().flatten()
        low, average, high = channel["posterior_std"]
        assert average == pytest.approx(widths.mean().item())
        assert low == pytest.approx(widths.quantile(0.05).item(), rel=0.06)
        assert high == pytest.approx(widths.quantile(0.95).item(), rel=0.06)
    assert [channel["dead"] for channel in summary["channels"]] == [False, False, True]
    assert summary["kl_nats_per_image"] == pytest.approx(kl.sum().item() / 6)
    assert summary["kl_bits_per_value"] == pytest.approx(kl.mean().item() / math.log(2))
    json.dumps(summary, allow_nan=False)


def test_shares_of_processes_add_up_to_the_whole(posteriors):
    whole = gathered(posteriors, list(range(6)))
    first, second = gathered(posteriors, [0, 1, 4, 5]), gathered(posteriors, [2, 3])
    first.merge(second)
    first.merge(LatentSpace(3))  # a process without a picture
    a, b = (space.summary(LatentScaling()) for space in (whole, first))
    assert first.codes()[0] == list(range(6))
    for one, other in zip(a["channels"], b["channels"], strict=True):
        for key, value in one.items():
            assert other[key] == pytest.approx(value, rel=1e-10), key
    assert b["aggregate"] == pytest.approx(a["aggregate"], rel=1e-10)
    rings = [[x or 0 for x in one["spectrum"]["latents"]] for one in (a, b)]  # 8² lacks some
    assert rings[1] == pytest.approx(rings[0], rel=1e-10)


def test_a_code_without_a_posterior_has_no_kl(posteriors):
    mean, _, images = posteriors
    space = LatentSpace(3)
    space.update(mean, None, images, range(6))
    summary = space.summary(LatentScaling())
    assert summary["kl_nats_per_image"] is None
    assert summary["channels"][0]["posterior_std"] is None
    assert summary["channels"][0]["std"] == pytest.approx(mean[:, 0].std(correction=0).item())
    json.dumps(summary, allow_nan=False)


def test_pictures_of_several_sizes_and_small_ones(posteriors):
    mean, logvar, images = posteriors
    space = LatentSpace(3)
    space.update(mean[:1], logvar[:1], images[:1], [0])
    space.update(mean[1:2, :, :5], logvar[1:2, :, :5], images[1:2, :, :10], [1])
    space.update(mean[2:3, :, :2, :2], logvar[2:3, :, :2, :2], images[2:3, :, :4, :4], [2])
    summary = space.summary(LatentScaling())
    assert summary["active_units"] is None
    assert summary["images"] == 3
    json.dumps(summary, allow_nan=False)


def test_saturated_posteriors_are_counted(posteriors):
    mean, logvar, images = posteriors
    narrow = logvar.clone()
    narrow[:3, 1] = -30
    space = LatentSpace(3)
    space.update(mean, narrow, images, range(6))
    channels = space.summary(LatentScaling())["channels"]
    assert [channel["saturated"] for channel in channels] == [0.0, 0.5, 0.0]


def test_scaling_brings_latents_to_the_prior():
    generator = torch.Generator().manual_seed(1)
    mean = 5 + 3 * torch.randn(40, 2, 16, 16, generator=generator)
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    space = LatentSpace(2)
    space.update(mean, None, images, range(40))
    scaling = LatentScaling(scaling_factor=1 / 3, shift_factor=5.0)
    aggregate = space.summary(scaling)["aggregate"]
    assert aggregate["scaled_sliced_wasserstein"] < 2 * aggregate["floor"] + 0.02
    assert aggregate["prior_kl"] == pytest.approx((25 + 9 - 1) / 2 - math.log(3), rel=0.03)
    # Directions differ: E[(m·θ)²] = |m|²/d, and the deviation is 3 in all of them.
    assert aggregate["sliced_wasserstein"] == pytest.approx(math.sqrt(25 + 4), rel=0.2)


def test_sliced_wasserstein_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, 6, generator=generator)
    floors = [sliced_wasserstein(normal[:n]) for n in (200, 2000, 20_000)]
    assert floors == sorted(floors, reverse=True)
    assert floors[-1] < 0.03
    assert sliced_wasserstein(2.5 * normal) == pytest.approx(1.5, rel=0.02)
    one = torch.randn(20_000, 1, generator=generator)
    one = (one - one.mean()) / one.std()  # its own moments would be seen
    wanted = math.sqrt(0.7**2 + 0.5**2)  # in one dimension: (m² + (s − 1)²)^½
    assert sliced_wasserstein(0.7 + 1.5 * one) == pytest.approx(wanted, rel=0.03)
    reference = scipy.stats.wasserstein_distance(one[:, 0] + 2, one[:, 0])
    assert sliced_wasserstein(one + 2) == pytest.approx(reference, rel=0.02)


@pytest.mark.parametrize(
    ("draw", "entropy"),
    [
        (lambda rng, n: rng.normal(3, 0.2, n), None),
        (lambda rng, n: rng.uniform(-1, 1, n), math.log(2)),
        (lambda rng, n: rng.laplace(0, 1, n), 1 + math.log(2)),
    ],
)
def test_negentropy_is_the_gap_to_the_normal_entropy(draw, entropy):
    values = draw(np.random.default_rng(0), 200_000)
    wanted = 0.0
    if entropy is not None:
        wanted = 0.5 * math.log(2 * math.pi * math.e * values.var()) - entropy
    assert negentropy(torch.from_numpy(values)) == pytest.approx(wanted, abs=0.02)


def test_negentropy_of_nearly_nothing_is_none():
    assert negentropy(torch.ones(5000)) == 0
    assert negentropy(torch.randn(10)) == 0


def test_radial_power_is_numpys():
    maps = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(0)).double()
    sums, counts = radial_power(maps)
    window = np.hanning(12)[:, None] * np.hanning(20)
    wanted, many = np.zeros((3, BINS)), np.zeros(BINS)
    for b in range(2):
        for c in range(3):
            x = maps[b, c].numpy()
            x = (x - (x * window).sum() / window.sum()) * window
            power = np.abs(np.fft.fft2(x)) ** 2
            for i, v in enumerate(np.fft.fftfreq(12)):
                for j, u in enumerate(np.fft.fftfreq(20)):
                    ring = math.ceil(math.hypot(u, v) * 2 * BINS) - 1
                    if 0 <= ring < BINS:
                        wanted[c, ring] += power[i, j]
                        many[ring] += c == 0
    np.testing.assert_allclose(sums.numpy(), wanted, rtol=1e-9)
    np.testing.assert_allclose(counts.numpy(), many)


def test_spectra_of_what_is_known():
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(32, 2, 64, 64, generator=generator)
    frequency = (torch.fft.fftfreq(64)[:, None] ** 2 + torch.fft.fftfreq(64) ** 2).sqrt()
    frequency[0, 0] = 1
    pink = torch.fft.ifft2(torch.fft.fft2(white) / frequency).real  # amplitude 1/f: power 1/f²
    for maps, slope in ((white, 0.0), (pink, -2.0)):
        spectrum = Spectrum(2)
        spectrum.update(maps, torch.zeros(32, 3, 64, 64, dtype=torch.uint8))
        assert spectrum.summary()["slope"] == pytest.approx(slope, abs=0.1)
    # White noise has three quarters of what lies within half a cycle above a quarter.
    spectrum = Spectrum(2)
    spectrum.update(white, torch.zeros(32, 3, 64, 64, dtype=torch.uint8))
    assert spectrum.summary()["high_share"] == pytest.approx(0.75, abs=0.02)


def test_photographs_have_the_slope_of_photographs():
    images = to_uint8(torch.cat([photograph_tensor(name, 256) for name in NAMES]))
    spectrum = Spectrum(3)
    spectrum.update(torch.nn.functional.interpolate(images.float(), (64, 64)), images)
    assert -3.5 < spectrum.summary()["pictures_slope"] < -1
