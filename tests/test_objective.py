import math

import pytest
import torch
from conftest import photograph_tensor

from latent_ae.config import BottleneckConfig, LossesConfig
from latent_ae.objective import Objective
from latent_ae.outputs import Code, Reconstruction


def build(weight=1e-6, warmup=0, **losses):
    return Objective(LossesConfig(**losses), BottleneckConfig(weight=weight, warmup_steps=warmup))


def reconstruction(images, shift=0.1, kl=(5.0, 7.0)):
    latents = torch.zeros(len(images), 4, 8, 8)
    return Reconstruction(images + shift, Code(latents, {"kl": torch.tensor(kl)}))


@pytest.fixture
def images():
    return torch.cat([photograph_tensor("coffee"), photograph_tensor("rocket")])


def test_total_is_the_sum_of_its_parts_per_element(images):
    losses = build(weight=0.01, perceptual={"net": "alex", "weight": 0.5})(
        images, reconstruction(images), 0
    )
    terms = losses.terms
    elements = 3 * 64 * 64
    assert terms["l1"].item() == pytest.approx(0.1, rel=1e-4)
    assert terms["kl"].item() == pytest.approx(6.0 / elements)
    wanted = terms["l1"] + 0.5 * terms["lpips"] + 0.01 * 6.0 / elements
    assert losses.total.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_l2_with_weight_is_the_negative_elbo_of_a_gaussian_decoder(images):
    """2c/N · (−ELBO) minus its constant, in float64 by torch.distributions."""
    variance, elements = 0.05, images[0].numel()
    given = reconstruction(images)
    total = build(weight=2 * variance, pixel="l2")(images, given, 0).total
    decoder = torch.distributions.Normal(given.images.double(), math.sqrt(variance))
    log_likelihood = decoder.log_prob(images.double()).flatten(1).sum(1)
    constant = 0.5 * elements * math.log(2 * math.pi * variance)
    negative_elbo = -(log_likelihood + constant) + given.code.loss_terms["kl"].double()
    wanted = 2 * variance * negative_elbo.mean() / elements
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_learned_variance_is_trained_and_settles_at_the_error(images):
    """The optimum of e/exp(s) + s is s = log e: with L2, the mean squared error."""
    objective = build(weight=0, pixel="l2", variance="learned", logvar_init=0.0)
    assert [name for name, _ in objective.named_parameters()] == ["logvar"]
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        objective(images, reconstruction(images, shift=0.2), 0).total.backward()
        optimizer.step()
    assert objective.logvar.item() == pytest.approx(math.log(0.04), abs=1e-2)


def test_fixed_variance_trains_nothing_of_the_objective():
    objective = build(perceptual={"net": "alex"})
    assert not [p for p in objective.parameters() if p.requires_grad]


def test_weight_warms_up_linearly():
    objective = build(weight=8.0, warmup=3)
    rises = [objective.bottleneck_weight(step) for step in range(5)]
    assert rises == [2.0, 4.0, 6.0, 8.0, 8.0]


def test_terms_carry_no_graph(images):
    images = images.requires_grad_()
    losses = build(perceptual={"net": "alex"})(images, reconstruction(images), 0)
    assert losses.total.requires_grad
    assert not any(term.requires_grad for term in losses.terms.values())
