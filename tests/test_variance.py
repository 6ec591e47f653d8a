"""The decoder's variance against the likelihoods of torch.distributions, in float64."""

import math
import shutil

import pytest
import torch
from conftest import photograph_tensor
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar
from torch.distributions import Laplace, Normal, kl_divergence

from latent_ae import train
from latent_ae.config import BottleneckConfig, LossesConfig
from latent_ae.describe import describe
from latent_ae.losses import PIXEL_LOSSES
from latent_ae.losses.variance import EXACT_WEIGHTS, ROUNDING_ERRORS, VARIANCES
from latent_ae.objective import Objective
from latent_ae.outputs import Code, Reconstruction
from latent_ae.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

LEVEL = 2 / 255


def build(variance, pixel="l2", weight=2.0, start=0.0, **losses):
    config = LossesConfig(pixel=pixel, variance=variance, logvar_init=start, **losses)
    objective = Objective(config, BottleneckConfig(weight=weight))
    return objective if objective.perceptual else objective.double()


@pytest.fixture
def images():
    return torch.cat([photograph_tensor("coffee"), photograph_tensor("rocket")]).double()


@pytest.fixture
def posterior():
    """Of two pictures, with leaves to differentiate by."""
    generator = torch.Generator().manual_seed(1)
    mean, logvar = torch.randn(2, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    return mean.requires_grad_(), logvar.requires_grad_()


def reconstruction(images, posterior, deviation=0.1):
    """Noise of another strength on each channel; the pictures are leaves."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    strength = deviation * torch.tensor([1.0, 2.0, 3.0], dtype=images.dtype)[:, None, None]
    decoded = (images + strength * noise).requires_grad_()
    return Reconstruction(decoded, Code(posterior[0], {"kl": divergence(*posterior)}))


def divergence(mean, logvar):
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    return kl_divergence(Normal(mean, (0.5 * logvar).exp()), prior).flatten(1).sum(1)


def dequantized_error(images, decoder):
    """−log p of the pictures before they were rounded, the mean over what they may have been.

    Two points of Gauss and Legendre: exact for the square in a Gaussian's exponent.
    """
    away = LEVEL / 2 / math.sqrt(3)
    return -sum(decoder.log_prob(images + side * away).mean() for side in (-1, 1)) / 2


@pytest.mark.parametrize("start", [-1.0, -4.0])
def test_the_learned_l2_with_weight_2_is_the_exact_bound(images, posterior, start):
    given = reconstruction(images, posterior)
    total = build("learned", start=start)(images, given, 0).total
    decoder = Normal(given.images, math.exp(start / 2))
    kl = divergence(*posterior).mean() / images[0].numel()
    wanted = 2 * (dequantized_error(images, decoder) + kl) - math.log(2 * math.pi)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("start", [-1.0, -4.0])
def test_the_learned_l1_with_weight_1_is_the_exact_bound(images, posterior, start):
    """Rounding moves |e| by at most |u|, whose mean is a quarter of a level."""
    given = reconstruction(images, posterior)
    total = build("learned", "l1", weight=1.0, start=start)(images, given, 0).total
    scale = math.exp(start)
    kl = divergence(*posterior).mean() / images[0].numel()
    rounding = LEVEL / 4 / scale
    likelihood = Laplace(given.images, scale).log_prob(images).mean()
    wanted = -likelihood + rounding + kl - math.log(2)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_the_optimal_one_is_the_best_normal_decoder(images, posterior):
    """The scale that a search finds, and the bound there."""
    given = reconstruction(images, posterior)
    losses = build("optimal")(images, given, 0)
    found = minimize_scalar(
        lambda s: dequantized_error(images, Normal(given.images, math.exp(s / 2))).item(),
        bounds=(-9, 2),
        method="bounded",
        options={"xatol": 1e-9},
    )
    kl = divergence(*posterior).mean().item() / images[0].numel()
    wanted = 2 * (found.fun + kl) - math.log(2 * math.pi)
    assert losses.total.item() == pytest.approx(wanted, rel=1e-6)
    assert losses.terms["logvar"].item() == pytest.approx(found.x, abs=1e-5)


@pytest.mark.parametrize("perceptual", [None, {"net": "alex", "weight": 0.5}])
def test_the_optimal_gradient_is_the_learned_one_at_its_best(images, posterior, perceptual):
    if perceptual:  # whose network is fp32
        images = images.float()
    given = reconstruction(images, posterior)
    wanted_by = [given.images, *posterior]
    optimal = build("optimal", perceptual=perceptual)(images, given, 0)
    best = optimal.terms["logvar"].item()
    learned = build("learned", perceptual=perceptual, start=best)
    ours = torch.autograd.grad(optimal.total, wanted_by, retain_graph=True)
    at_best = learned(images, given, 0)
    *theirs, own = torch.autograd.grad(at_best.total, [*wanted_by, learned.logvar])
    assert own.item() == pytest.approx(0, abs=1e-6)
    assert at_best.total.item() == pytest.approx(optimal.total.item(), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("variance", ["learned", "per_channel", "optimal"])
def test_the_implied_weight_is_the_fixed_one_with_the_same_balance(images, posterior, variance):
    """Gradients of picture and code keep their ratio under that fixed weight."""
    given = reconstruction(images, posterior)
    objective = build(variance, start=-2.0)
    if objective.logvar is not None and objective.logvar.dim():
        objective.logvar.data = torch.tensor([-2.0, -3.0, -1.0], dtype=torch.float64)
    losses = objective(images, given, 0)
    implied = losses.terms["implied_weight"].item()
    fixed = build("fixed", weight=implied)(images, given, 0)
    leaves = [given.images, *posterior]
    ours, theirs = (
        torch.autograd.grad(one.total, leaves, retain_graph=True) for one in (losses, fixed)
    )
    factor = 2.0 / implied
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, factor * b, rtol=1e-6, atol=1e-12)
    shares = (ours[0] / theirs[0]).mean((0, 2, 3))  # one number a channel
    assert shares.mean().item() == pytest.approx(factor)
    if variance != "per_channel":  # there the mean alone is the fixed one's
        assert shares.tolist() == pytest.approx([factor] * 3)


def test_each_channel_finds_its_own_noise(images, posterior):
    decoded = reconstruction(images, posterior).images.detach()
    given = Reconstruction(decoded, Code(torch.zeros(2, 1, 1, 1)))
    objective = build("per_channel", start=-4.0)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        objective(images, given, 0).total.backward()
        optimizer.step()
    noise = 0.01 * torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    # 8,192 squares a channel: their mean is known to a sixtieth.
    torch.testing.assert_close(objective.logvar.exp().detach(), noise, rtol=0.05, atol=0)
    terms = objective(images, given, 0).terms
    assert [terms[f"logvar_{c}"].item() for c in range(3)] == objective.logvar.tolist()


def test_channels_of_one_variance_are_the_scalar_one(images, posterior):
    """With LPIPS, which stands in every channel's distance."""
    images = images.float()
    given = reconstruction(images, posterior)
    perceptual = {"net": "alex", "weight": 0.5}
    totals = [
        build(variance, start=-3.0, perceptual=perceptual)(images, given, 0).total.item()
        for variance in ("learned", "per_channel")
    ]
    assert totals[1] == pytest.approx(totals[0], rel=1e-5)


@pytest.mark.parametrize("pixel", list(PIXEL_LOSSES))
@pytest.mark.parametrize("variance", ["learned", "per_channel", "optimal"])
def test_a_picture_that_comes_back_exactly_keeps_everything_finite(images, variance, pixel):
    objective = build(variance, pixel, weight=0.0)
    decoded = images.clone().requires_grad_()
    losses = objective(images, Reconstruction(decoded, Code(torch.zeros(2, 1, 1, 1))), 0)
    losses.total.backward()
    assert losses.total.isfinite()
    assert decoded.grad.isfinite().all()
    if variance == "optimal":
        assert losses.terms["logvar"].item() == pytest.approx(math.log(ROUNDING_ERRORS[pixel]))
    assert "implied_weight" not in losses.terms  # there is no KL to weigh


@pytest.mark.parametrize("pixel", list(PIXEL_LOSSES))
def test_rounding_errors_are_those_of_rounding(pixel):
    fine = torch.linspace(-1, 1, 1_000_001, dtype=torch.float64)
    coarse = ((fine + 1) / LEVEL).round() * LEVEL - 1
    measured = PIXEL_LOSSES[pixel](fine, coarse).mean().item()
    if pixel == "charbonnier":
        assert 0.5 * ROUNDING_ERRORS[pixel] < measured < ROUNDING_ERRORS[pixel]
    else:
        assert ROUNDING_ERRORS[pixel] == pytest.approx(measured, rel=1e-3)


def test_the_config_names_every_variance():
    assert list(VARIANCES) == list(LossesConfig.model_fields["variance"].annotation.__args__)


@pytest.mark.parametrize("variance", list(VARIANCES))
def test_every_variance_takes_steps_from_a_config(tiny, quiet, variance):
    losses = {"pixel": "l2", "variance": variance, "perceptual": None}
    training = {"steps": 2, "log_every": 1, "checkpoint_every": 2}
    config = tiny(losses=losses, bottleneck={"weight": 2.0}, training=training, validation=None)
    folder = RunFolder(train(config, quiet))
    _, row = (row for row in folder.log_rows() if row["group"] == "train")
    state = load_file(folder.checkpoint(2) / "objective.safetensors")
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    trained = {"learned": (), "per_channel": (3,)}
    assert shapes == ({"logvar": trained[variance]} if variance in trained else {})
    if variance == "fixed":
        assert "implied_weight" not in row
        return
    assert all(value.abs().min() > 0 for value in state.values())  # moved from where it began
    if variance != "per_channel":  # there the mean of s is not the s of the harmonic mean
        assert row["implied_weight"] == pytest.approx(2 * math.exp(row["logvar"]), rel=1e-5)
    if variance == "optimal":
        assert row["logvar"] == pytest.approx(math.log(row["l2"] + LEVEL**2 / 12), rel=1e-5)


def test_a_resumed_run_with_an_s_a_channel_ends_bit_equal(tiny, quiet):
    config = tiny(
        losses={"variance": "per_channel", "logvar_init": -1.0, "perceptual": None},
        training={"log_every": 4},
        validation=None,
    )
    folder = RunFolder(train(config, quiet))
    files = ("objective.safetensors", "network/diffusion_pytorch_model.safetensors")
    whole = [load_file(folder.checkpoint(4) / name) for name in files]
    assert len(set(whole[0]["logvar"].tolist())) > 1
    shutil.rmtree(folder.checkpoint(4))
    train(config, quiet)
    for name, before in zip(files, whole, strict=True):
        again = load_file(folder.checkpoint(4) / name)
        assert all(torch.equal(again[key], value) for key, value in before.items())


def test_the_config_verb_tells_what_a_weight_means(tiny):
    def facts(**losses):
        told = describe(tiny(losses={"perceptual": None, **losses}, validation=None))
        return told["loss"], told["kl weight λ"]

    loss, weight = facts(pixel="l2", variance="optimal")
    assert loss.startswith("log(mean l2) + 1 + λ")
    assert "this times the distance; the exact bound of l2 has 2" in weight
    loss, weight = facts(pixel="l1", variance="per_channel", perceptual={"net": "alex"})
    assert loss.startswith("mean over channels c of (mean l1_c + 1 · LPIPS (alex)) / exp(s_c)")
    assert f"the exact bound of l1 without LPIPS has {EXACT_WEIGHTS['l1']:g}" in weight
    assert "exact bound" not in facts(pixel="charbonnier", variance="learned")[1]
    assert "variance 5e-07" in facts(pixel="l2")[1]
