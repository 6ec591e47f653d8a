import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from latent_ae.bottlenecks import KLBottleneck, build_bottleneck, gaussian_kl, split_moments
from latent_ae.config import BottleneckConfig


def moments(seed=0, batch=3):
    torch.manual_seed(seed)
    return torch.randn(batch, 8, 6, 5)


def test_kl_is_the_closed_form_in_float64():
    mean, logvar = split_moments(moments())
    posterior = torch.distributions.Normal(mean.double(), (0.5 * logvar.double()).exp())
    prior = torch.distributions.Normal(0.0, 1.0)
    wanted = torch.distributions.kl_divergence(posterior, prior)
    torch.testing.assert_close(gaussian_kl(mean, logvar).double(), wanted, rtol=1e-5, atol=1e-6)


def test_kl_term_is_nats_per_image_as_diffusers_has_it():
    code = KLBottleneck()(moments())
    assert code.loss_terms["kl"].shape == (3,)
    torch.testing.assert_close(
        code.loss_terms["kl"], DiagonalGaussianDistribution(moments()).kl(), rtol=1e-5, atol=1e-4
    )


def test_kl_is_zero_at_the_prior_and_positive_beside_it():
    at = torch.zeros(1, 8, 4, 4)
    assert KLBottleneck()(at).loss_terms["kl"].item() == 0
    assert KLBottleneck()(at + 0.1).loss_terms["kl"].item() > 0


def test_samples_have_the_posteriors_moments():
    torch.manual_seed(0)
    given = torch.cat([torch.full((1, 4, 8, 8), 1.5), torch.full((1, 4, 8, 8), -2.0)], 1)
    draws = torch.stack([KLBottleneck()(given).latents for _ in range(400)])
    assert draws.mean().item() == pytest.approx(1.5, abs=0.01)
    assert draws.std().item() == pytest.approx(torch.tensor(-1.0).exp().item(), rel=0.01)


def test_reparametrised_gradient_is_the_analytic_one():
    # For E[z²] = μ² + σ² the derivatives are 2μ and, in log σ², σ².
    mean = torch.full((1, 4, 100, 100), 0.7)
    logvar = torch.full((1, 4, 100, 100), -0.5)
    given = torch.cat([mean, logvar], 1).requires_grad_()
    torch.manual_seed(0)
    KLBottleneck()(given).latents.square().sum().backward()
    by_mean, by_logvar = given.grad.chunk(2, 1)
    assert by_mean.mean().item() == pytest.approx(1.4, rel=0.02)
    assert by_logvar.mean().item() == pytest.approx(torch.tensor(-0.5).exp().item(), rel=0.03)


def test_deterministic_code_is_the_mean_without_kl():
    bottleneck = build_bottleneck(BottleneckConfig(weight=0), network=None)
    code = bottleneck(moments())
    assert torch.equal(code.latents, moments()[:, :4])
    assert code.loss_terms == {}


def test_mode_is_diffusers_mode():
    wanted = DiagonalGaussianDistribution(moments()).mode()
    assert torch.equal(split_moments(moments())[0], wanted)


@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_wild_logvar_stays_finite(value):
    given = torch.cat([torch.zeros(1, 4, 2, 2), torch.full((1, 4, 2, 2), value)], 1)
    code = KLBottleneck()(given.requires_grad_())
    (code.latents.sum() + code.loss_terms["kl"].sum()).backward()
    assert torch.isfinite(code.latents).all()
    assert torch.isfinite(given.grad).all()


def test_half_precision_moments_are_computed_in_fp32():
    code = KLBottleneck()(moments().bfloat16())
    assert code.latents.dtype == torch.float32
    assert code.loss_terms["kl"].dtype == torch.float32
