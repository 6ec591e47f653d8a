"""EQ-VAE's regulariser: the geometry, the draws, and a step with it."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import photograph
from PIL import Image

from latent_ae import UserError
from latent_ae.config import EquivarianceConfig
from latent_ae.config_file import parse_config
from latent_ae.data import normalize
from latent_ae.losses import Draw, Equivariance
from latent_ae.training.prepare import prepare
from latent_ae.training.step import _accumulate, update

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def wide():
    """A real photograph that is no square, of shape (1, 3, 64, 96), in [-1, 1]."""
    picture = photograph("coffee").resize((96, 64), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turns_are_numpys_and_an_equivariant_code_follows_them(wide, turns):
    draw = Draw("transformed", (16, 24), turns)
    turned = draw.pictures(wide, 4)
    assert np.array_equal(turned[0].numpy(), np.rot90(wide[0].numpy(), turns, (1, 2)))
    latents = draw.latents(F.avg_pool2d(wide, 4))
    torch.testing.assert_close(latents, F.avg_pool2d(turned, 4))
    assert error(draw.latents(F.avg_pool2d(wide, 4)).flip(-1), F.avg_pool2d(turned, 4)) > 0.1


def test_pictures_shrink_as_pillow_does_it_and_an_equivariant_code_follows(wide):
    draw = Draw("transformed", (10, 15), 0)
    small = draw.pictures(wide, 4)
    assert small.shape[-2:] == (40, 60)
    levels = (wide[0].permute(1, 2, 0).numpy() + 1) * 127.5
    channels = [
        np.asarray(Image.fromarray(levels[..., i]).resize((60, 40), Image.Resampling.BILINEAR))
        for i in range(3)
    ]
    torch.testing.assert_close(
        small[0], torch.from_numpy(np.stack(channels)) / 127.5 - 1, atol=1e-4, rtol=0
    )
    # Latents without a low-pass: at one half each is the mean of four, to the last bit of rounding.
    halved = Draw("transformed", (8, 12)).latents(F.avg_pool2d(wide, 4))
    torch.testing.assert_close(halved, F.avg_pool2d(wide, 8))
    followed = error(draw.latents(F.avg_pool2d(wide, 4)), F.avg_pool2d(small, 4))
    assert followed < 0.1 < error(F.avg_pool2d(small, 4).flip(-1), F.avg_pool2d(small, 4))


def test_the_papers_draws_at_its_sizes():
    """256² at f8: sides 8 to 31 of 32, turns of 90, 180, 270; half the steps, an eighth small."""
    rule = Equivariance(EquivarianceConfig(), seed=3, factor=8, smallest=32)
    draws = [rule.draw(step, micro, (256, 256)) for step in range(4000) for micro in (0, 1)]
    kinds = Counter(draw.kind for draw in draws)
    assert kinds["transformed"] / 8000 == pytest.approx(0.5, abs=0.02)
    assert kinds["small"] / 8000 == pytest.approx(0.125, abs=0.015)
    transformed = [draw for draw in draws if draw.kind == "transformed"]
    assert {draw.sides for draw in transformed} == {(n, n) for n in range(8, 32)}
    assert {draw.sides[0] for draw in draws if draw.kind == "small"} == set(range(8, 32))
    assert {draw.turns for draw in transformed} == {1, 2, 3}
    assert {(d.sides, d.turns) for d in draws if d.kind == "plain"} == {((32, 32), 0)}
    counts = Counter(draw.sides[0] for draw in transformed)
    assert max(counts.values()) < 1.5 * min(counts.values())


def test_a_draw_is_a_function_of_seed_step_and_micro_step():
    config = EquivarianceConfig(anisotropic=True)
    rule, again = (Equivariance(config, 3, 8, 1) for _ in range(2))
    draws = [rule.draw(step, 0, (256, 384)) for step in range(50)]
    torch.manual_seed(1)
    assert draws == [again.draw(step, 0, (256, 384)) for step in range(50)]
    assert draws != [again.draw(step, 1, (256, 384)) for step in range(50)]
    assert draws != [Equivariance(config, 4, 8, 1).draw(s, 0, (256, 384)) for s in range(50)]
    shapes = {draw.sides for draw in draws}
    assert any(abs(height / width - 32 / 48) > 0.1 for height, width in shapes)


def test_scales_leave_what_the_losses_need():
    rule = Equivariance(EquivarianceConfig(probability=1), 0, factor=4, smallest=34)
    sides = {rule.draw(step, 0, (64, 128)).sides for step in range(200)}
    assert sides == {(n, 2 * n) for n in range(9, 16)}  # 36 pixels and more
    rule.require_room(64)
    with pytest.raises(UserError, match=r"a side of 32 are too small for losses\.equi.*raise data"):
        rule.require_room(32)


def test_bad_keys_are_told(tiny):
    def build(**keys):
        content = tiny().model_dump(mode="json", exclude_unset=True)
        content["losses"]["equivariance"] = keys
        return parse_config(content)

    with pytest.raises(UserError, match="smallest <= largest <= 1"):
        build(scales=[0.5, 1.5])
    with pytest.raises(UserError, match="there is no transform"):
        build(scales=None, rotate=False)
    with pytest.raises(UserError, match=r"too small for losses\.equivariance\.scales"):
        prepare(build())  # 32 pixels, which LPIPS needs


ALWAYS = {"probability": 1.0}
LARGE = {"resolution": 64}


@pytest.fixture
def run(tiny):
    """Builds a run with the regulariser, at sizes that leave room for LPIPS."""

    def build(equivariance=None, **sections):
        losses = {"equivariance": equivariance or ALWAYS} | sections.pop("losses", {})
        return prepare(tiny(losses=losses, data=LARGE, validation=None, **sections))

    return build


def test_a_step_is_against_the_transformed_picture(run):
    """The gradients of what is written out here, encoder and decoder both reached."""
    one = run(losses={"perceptual": None}, bottleneck={"weight": 0})
    images = normalize(next(one.stream).images)
    draw = Draw("transformed", (20, 20), 3)
    terms = _accumulate(one, images, draw)
    ours = [p.grad.clone() for p in one.network.parameters()]
    one.network.zero_grad()
    mean = one.network.encode(images).latent_dist.mean
    small = F.interpolate(mean, (20, 20), mode="bilinear", align_corners=False)
    decoded = one.network.decode(small.transpose(2, 3).flip(3)).sample
    wanted = F.interpolate(images, (40, 40), mode="bilinear", antialias=True)
    loss = (decoded - wanted.transpose(2, 3).flip(3)).abs().mean()
    loss.backward()
    assert terms["l1_transformed"].item() == pytest.approx(loss.item(), rel=1e-5)
    for p, gradient in zip(one.network.parameters(), ours, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-6)
    reached = {n.split(".")[0] for n, p in one.network.named_parameters() if p.grad.norm() > 0}
    assert {"encoder", "decoder"} <= reached


def test_small_pictures_are_encoded_and_rebuilt_at_their_size(run):
    one = run(losses={"perceptual": None}, bottleneck={"weight": 0})
    images = normalize(next(one.stream).images)
    terms = _accumulate(one, images, Draw("small", (16, 16)))
    small = F.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    decoded = one.network.decode(one.network.encode(small).latent_dist.mean).sample
    assert terms["l1_small"].item() == pytest.approx((decoded - small).abs().mean().item())


def test_steps_of_each_kind_have_means_of_their_own(run):
    heard = {"start": 0, "warmup_steps": 0, "channels": 4, "layers": 2}
    halves = {"probability": 0.4, "low_resolution": 0.5}
    one = run(
        equivariance=halves,
        adversary=heard,
        losses={"perceptual": None},
        training={"accumulation": 6, "seed": 2},
    )
    kinds = [one.equivariance.draw(0, micro, (64, 64)).kind for micro in range(6)]
    assert set(kinds) == {"plain", "transformed", "small"}
    terms = update(one).terms
    for kind in ("transformed", "small"):
        assert terms[f"share_{kind}"].item() == pytest.approx(kinds.count(kind) / 6)
        assert {f"l1_{kind}", f"total_{kind}"} <= terms.keys()
    assert "kl_small" in terms
    assert "kl_transformed" not in terms  # it is the whole picture's
    assert {"l1", "kl", "total", "d_accuracy", "adaptive_weight"} <= terms.keys()
    assert all(value.isfinite() for value in terms.values())


@pytest.mark.parametrize("pictures", [(64, 128), (160, 96), (320, 192), (64, 64)])
def test_a_scale_keeps_the_aspect(pictures):
    """Also where one side is held by what the losses need."""
    equivariance = Equivariance(EquivarianceConfig(), 0, 8, 32)
    height, width = (side // 8 for side in pictures)
    kinds = set()
    for step in range(300):
        draw = equivariance.draw(step, 0, pictures)
        kinds.add(draw.kind)
        short, long = sorted(draw.sides)
        wanted = short * max(height, width) / min(height, width)
        assert abs(long - wanted) <= 0.5 + 1e-9
        assert (draw.sides[0] <= draw.sides[1]) == (height <= width) or height == width
        assert short >= 4
    assert kinds == {"plain", "small", "transformed"}
