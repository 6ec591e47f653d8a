import pytest
import torch
from conftest import photograph_tensor
from safetensors.torch import save_file
from torch import nn

from latent_ae import UserError
from latent_ae.adversary import Adversary, adaptive_weight
from latent_ae.config import AdversaryConfig, DiscriminatorConfig
from latent_ae.losses import (
    ADVERSARIAL_LOSSES,
    NLayerDiscriminator,
    lecam,
    load_discriminator,
    r1_penalty,
    save_discriminator,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def build(**options):
    torch.manual_seed(0)
    return Adversary(AdversaryConfig(channels=8, layers=2, **options))


@pytest.fixture
def images():
    return torch.cat([photograph_tensor("coffee"), photograph_tensor("rocket")])


def test_layout_is_that_of_the_ldm_papers():
    """Names and shapes of `loss.discriminator.main.*` in LDM's released checkpoints."""
    state = NLayerDiscriminator(DiscriminatorConfig(norm="batch")).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items() if value.dim()}
    batch_norms = {
        f"main.{place}.{name}": (width,)
        for place, width in ((3, 128), (6, 256), (9, 512))
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    assert shapes == batch_norms | {
        "main.0.weight": (64, 3, 4, 4),
        "main.0.bias": (64,),
        "main.2.weight": (128, 64, 4, 4),
        "main.5.weight": (256, 128, 4, 4),
        "main.8.weight": (512, 256, 4, 4),
        "main.11.weight": (1, 512, 4, 4),
        "main.11.bias": (1,),
    }
    verdicts = NLayerDiscriminator(DiscriminatorConfig())(torch.zeros(2, 3, 256, 256))
    assert verdicts.shape == (2, 1, 30, 30)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_a_verdict_sees_what_the_config_says(layers):
    """The receptive field by its definition: which pixels one verdict's gradient reaches."""
    torch.manual_seed(0)
    discriminator = NLayerDiscriminator(DiscriminatorConfig(layers=layers, channels=4, norm="none"))
    side = discriminator.receptive_field
    assert side == {1: 16, 2: 34, 3: 70, 4: 142}[layers]
    image = torch.randn(1, 3, 256, 256, requires_grad=True)
    verdicts = discriminator(image)
    middle = verdicts.shape[-1] // 2
    (gradient,) = torch.autograd.grad(verdicts[0, 0, middle, middle], image)
    rows = gradient.abs().sum((0, 1, 3)).nonzero()
    assert (rows.max() - rows.min() + 1).item() == side
    smallest = discriminator.smallest_side
    assert discriminator(torch.zeros(1, 3, smallest, smallest)).numel() >= 1


def test_verdicts_of_group_norm_do_not_depend_on_the_batch(images):
    discriminator = build().discriminator
    alone = torch.cat([discriminator(x[None]) for x in images])
    torch.testing.assert_close(discriminator(images), alone)


def test_batch_norm_keeps_pictures_and_reconstructions_apart(images):
    """One pass over both would let the statistics tell which is which."""
    adversary = build(norm="batch")
    verdicts = [adversary(images, fake, 0).terms["d_real"] for fake in (images + 1, images * 0)]
    assert torch.equal(*verdicts)


def test_spectral_norm_bounds_every_layer():
    discriminator = build(norm="none", spectral_norm=True).discriminator
    for _ in range(20):  # power iterations
        discriminator(torch.randn(1, 3, 32, 32))
    discriminator.eval()
    for module in discriminator.main:
        if isinstance(module, nn.Conv2d):
            largest = torch.linalg.matrix_norm(module.weight.flatten(1), 2)
            assert largest.item() == pytest.approx(1, abs=2e-2)


def test_losses_are_their_formulas():
    real, fake = torch.randn(2, 3, 1, 5, 5, dtype=torch.float64)
    labels = torch.ones_like(real)
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    both = 0.5 * (cross_entropy(real, labels) + cross_entropy(fake, 1 - labels))
    margin = nn.functional.hinge_embedding_loss  # max(0, 1 - x) where the target is -1
    hinge = 0.5 * (margin(real, -labels) + margin(-fake, -labels))
    wanted = {
        "hinge": (-fake.mean(), hinge),
        "vanilla": (-fake.mean(), both),
        "non_saturating": (cross_entropy(fake, labels), both),
    }
    assert ADVERSARIAL_LOSSES.keys() == wanted.keys()
    for name, (autoencoder, discriminator) in wanted.items():
        torch.testing.assert_close(ADVERSARIAL_LOSSES[name].autoencoder(fake), autoencoder)
        torch.testing.assert_close(
            ADVERSARIAL_LOSSES[name].discriminator(real, fake), discriminator
        )


def test_lecam_follows_the_verdicts_and_pulls_them_to_the_other_average(images):
    adversary = build(lecam=0.1, lecam_decay=0.9)
    fake = images.flip(-1)
    verdict = adversary(images, fake, 1)
    on_real, on_fake = adversary.discriminator(images), adversary.discriminator(fake)
    assert adversary.average_real.item() == pytest.approx(0.1 * on_real.mean().item(), rel=1e-5)
    assert adversary.average_fake.item() == pytest.approx(0.1 * on_fake.mean().item(), rel=1e-5)
    a, b = adversary.average_real.double(), adversary.average_fake.double()
    wanted = (on_real.double() - b).pow(2).mean() + (on_fake.double() - a).pow(2).mean()
    assert verdict.terms["lecam"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert lecam(torch.ones(3), torch.zeros(3), torch.tensor(1.0), torch.tensor(0.0)).item() == 2
    plain = verdict.discriminator - 0.1 * verdict.terms["lecam"]
    assert plain.item() == pytest.approx(verdict.terms["d_loss"].item(), rel=1e-5)


def test_r1_is_the_squared_gradient_on_pictures(images):
    """Of a linear discriminator it is half the squared length of its weights."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 4), nn.Unflatten(1, (1, 2, 2)))
    wanted = 0.5 * linear[1].weight.mean(0).square().sum()
    torch.testing.assert_close(r1_penalty(linear, images), wanted)
    r1_penalty(linear, images).backward()
    assert linear[1].weight.grad.abs().sum() > 0


def test_r1_comes_every_so_often_and_weighs_as_much_more(images):
    adversary = build(r1=2.0, r1_every=4)
    losses = [adversary(images, images.flip(-1), step).discriminator for step in range(5)]
    penalty = r1_penalty(adversary.discriminator, images)
    assert losses[1] == losses[2] == losses[3]
    assert losses[0] == losses[4]
    assert (losses[0] - losses[1]).item() == pytest.approx(8 * penalty.item(), rel=1e-3)


def test_when_it_learns_and_how_much_it_weighs():
    adversary = build(start=10, warmup_steps=4, ramp_steps=3, weight=0.8)
    assert [adversary.learns(step) for step in (0, 5, 6, 10)] == [False, False, True, True]
    assert [adversary.weight(step) for step in (9, 10, 11, 12, 13, 99)] == pytest.approx(
        [0, 0.2, 0.4, 0.6, 0.8, 0.8]
    )


def test_accuracy_is_the_share_of_right_verdicts(images):
    adversary = build()
    with torch.no_grad():
        adversary.discriminator.main[-1].weight.zero_()
        adversary.discriminator.main[-1].bias.fill_(1.0)  # everything passes for real
    assert adversary(images, images, 0).terms["d_accuracy"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaptive_weight_is_what_autograd_gives(dtype):
    """LDM's way: both losses differentiated with respect to the last layer's weights, in fp64."""
    torch.manual_seed(0)
    last = nn.Conv2d(16, 3, 3, padding=1).double()
    features = torch.randn(2, 16, 12, 12, dtype=torch.float64)
    image = last(features)
    # Lengths as in training: a gradient per element is far below what fp16 can hold.
    rec = 1e-6 * (image - 0.3).square().sum()
    adv = 1e-3 * image.sin().sum()
    by_autograd = [
        torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm() for loss in (rec, adv)
    ]
    wanted = by_autograd[0] / (by_autograd[1] + 1e-4)
    g_rec, g_adv = (
        torch.autograd.grad(loss, image, retain_graph=True)[0].float() for loss in (rec, adv)
    )
    ours = adaptive_weight(features.to(dtype), g_rec, g_adv, (3, 3), 1e4)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert ours.item() == pytest.approx(wanted.item(), rel=tolerance)
    assert adaptive_weight(features.to(dtype), g_rec, g_adv, (3, 3), 1e-9).item() == pytest.approx(
        1e-9
    )


def test_adaptive_weight_of_a_large_picture_in_bf16():
    """L1's gradient has one sign over large areas: its sum is more than fp16 holds."""
    torch.manual_seed(0)
    features = torch.rand(4, 16, 192, 192)
    g_rec, g_adv = torch.full((4, 3, 192, 192), 1e-6), 1e-9 * torch.randn(4, 3, 192, 192)
    for rec, adv in ((g_rec, g_adv), (g_adv, g_rec)):
        exact = adaptive_weight(features, rec, adv, (3, 3), 1e9)
        rounded = adaptive_weight(features.bfloat16(), rec, adv, (3, 3), 1e9)
        assert rounded.item() == pytest.approx(exact.item(), rel=3e-2)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_batch_without_numbers_is_not_remembered(images, norm):
    """One NaN in LeCam's averages would spoil every update that follows."""
    adversary = build(lecam=0.1, norm=norm)
    adversary(images, images.flip(-1), 0)
    before = {k: v.clone() for k, v in adversary.state_dict().items()}
    adversary(images, images * torch.nan, 1)
    for name, value in adversary.state_dict().items():
        assert value.isfinite().all(), name
        if "average_fake" in name:
            assert torch.equal(value, before[name])
    assert adversary(images, images.flip(-1), 2).discriminator.isfinite()


def test_batch_norm_is_torchs(images):
    torch.manual_seed(0)
    ours = build(norm="batch").discriminator
    theirs = nn.Sequential(
        *(nn.BatchNorm2d(m.num_features) if isinstance(m, nn.BatchNorm2d) else m for m in ours.main)
    )
    theirs.load_state_dict(ours.main.state_dict())
    torch.testing.assert_close(ours(images), theirs(images))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.main.state_dict()[name], value)


def test_a_file_of_ldms_loads_with_the_layout_of_the_config(tmp_path, images):
    judge = build(norm="batch").discriminator
    state = {f"loss.discriminator.{k}": v.contiguous() for k, v in judge.state_dict().items()}
    save_file(state | {"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "ldm.safetensors")
    config = AdversaryConfig(
        channels=8, layers=2, norm="batch", path=str(tmp_path / "ldm.safetensors")
    )
    assert torch.equal(Adversary(config).discriminator.eval()(images), judge.eval()(images))


def test_a_silent_discriminator_gets_the_largest_weight_and_no_nan():
    features, gradient = torch.randn(1, 8, 6, 6), torch.randn(1, 3, 6, 6)
    weight = adaptive_weight(features, gradient, torch.zeros_like(gradient), (3, 3), 50.0)
    assert weight.item() == 50.0


@pytest.mark.parametrize(
    "options", [{}, {"norm": "batch"}, {"norm": "none", "spectral_norm": True}]
)
def test_weights_come_back_from_safetensors(tmp_path, images, options):
    discriminator = build(**options).discriminator
    save_discriminator(discriminator, tmp_path / "d.safetensors")
    again = load_discriminator(tmp_path / "d.safetensors")
    assert all(getattr(again.config, name) == value for name, value in options.items())
    discriminator.eval()
    assert torch.equal(again.eval()(images), discriminator(images))
    chosen = AdversaryConfig(channels=8, layers=2, path=str(tmp_path / "d.safetensors"), **options)
    assert torch.equal(Adversary(chosen).discriminator.eval()(images), discriminator(images))


def test_wrong_files_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no discriminator"):
        load_discriminator(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(UserError, match="holds no such discriminator"):
        load_discriminator(tmp_path / "text")
    save_discriminator(build().discriminator, tmp_path / "d.safetensors")
    with pytest.raises(UserError, match=r"has channels 8; set adversary\.channels"):
        Adversary(AdversaryConfig(channels=16, layers=2, path=str(tmp_path / "d.safetensors")))


def test_discriminators_stay_in_fp32_under_fp16(images):
    adversary = build()
    with torch.autocast("cpu", dtype=torch.float16):
        verdict = adversary(images, images, 0)
    plain = adversary(images, images, 0)
    assert torch.equal(verdict.autoencoder, plain.autoencoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(adversary(images, images, 0).autoencoder, plain.autoencoder)
