"""VA-VAE's regulariser: formulas, gradients, vision models of several kinds."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import photograph_tensor
from diffusers.models.upsampling import Upsample2D
from torch.utils._python_dispatch import TorchDispatchMode

from latent_ae import UserError
from latent_ae.config import AlignmentConfig
from latent_ae.data import normalize
from latent_ae.describe import describe
from latent_ae.losses.alignment import (
    Alignment,
    GradientShare,
    cosine_excess,
    distance_excess,
)
from latent_ae.losses.vision import VisionModel
from latent_ae.training.prepare import prepare
from latent_ae.training.step import _accumulate, update

pytestmark = pytest.mark.usefixtures("one_thread")

_SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
_MEAN, _STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def save_vision_model(folder, kind="vit", side=64):
    """A tiny vision model with random weights, and its image processor."""
    t = transformers
    size = {"image_size": 32, "patch_size": 8}
    text = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, **_SMALL}
    build = {
        "vit": lambda: t.ViTModel(t.ViTConfig(**size, **_SMALL)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**size, **_SMALL)),
        "registers": lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**size, **_SMALL)
        ),
        "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**size, **_SMALL)),
        "clip with text": lambda: t.CLIPModel(
            t.CLIPConfig(vision_config={**size, **_SMALL}, text_config=text)
        ),
        "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**size, **_SMALL)),
        "convnext": lambda: t.ConvNextModel(
            t.ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1])
        ),
        "swin": lambda: t.SwinModel(
            t.SwinConfig(image_size=64, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
        ),
        "mae": lambda: t.ViTMAEModel(t.ViTMAEConfig(**size, **_SMALL)),
        "bert": lambda: t.BertModel(t.BertConfig(vocab_size=32, **_SMALL)),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build[kind]().eval().save_pretrained(folder)
    size = {"height": side, "width": side}
    t.ViTImageProcessor(size=size, image_mean=_MEAN, image_std=_STD).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return save_vision_model(tmp_path_factory.mktemp("vision") / "vit")


def test_both_margins_are_their_formulas_in_float64():
    generator = torch.Generator().manual_seed(0)
    z, w = torch.randn(2, 6, 3, generator=generator), torch.randn(5, 3, generator=generator)
    f = torch.randn(2, 6, 5, generator=generator)

    def cos(a, b):
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    latents, features, projection = (x.double().numpy() for x in (z, f, w))
    first = [
        max(0.0, 1 - 0.5 - cos(projection @ latents[b, i], features[b, i]))
        for b in range(2)
        for i in range(6)
    ]
    second = [
        max(
            0.0,
            abs(cos(latents[b, i], latents[b, j]) - cos(features[b, i], features[b, j])) - 0.25,
        )
        for b in range(2)
        for i in range(6)
        for j in range(6)
    ]
    assert 0 < sum(value > 0 for value in first) < 12  # on either side of the margins
    assert 0 < sum(value > 0 for value in second) < 72
    assert cosine_excess(z @ w.T, f, 0.5).item() == pytest.approx(np.mean(first), rel=1e-5)
    assert distance_excess(z, f, 0.25).item() == pytest.approx(np.mean(second), rel=1e-5)


def test_features_are_brought_to_the_latents_grid(vit):
    alignment = Alignment(AlignmentConfig(model=str(vit), cosine_margin=0.1), 4)
    images, latents = photograph_tensor("coffee", 96), torch.randn(1, 4, 12, 12)
    terms = alignment(images, latents)
    resized = torch.nn.functional.interpolate(
        alignment.vision(images), (12, 12), mode="bilinear", align_corners=False
    )
    projected = torch.einsum("dc,bchw->bdhw", alignment.projection.weight, latents)
    cosine = torch.cosine_similarity(projected, resized, dim=1)
    assert terms["alignment_cosine"].item() == pytest.approx((0.9 - cosine).relu().mean().item())


@pytest.mark.parametrize(
    ("kind", "prefix", "grid"),
    [
        ("vit", 1, 8),
        ("dinov2", 1, 8),
        ("registers", 5, 8),
        ("clip", 1, 8),
        ("clip with text", 1, 8),
        ("siglip", 0, 8),
        ("convnext", None, 2),
        ("swin", 0, 8),
    ],
)
def test_a_map_of_features_from_each_kind_of_model(tmp_path, kind, prefix, grid):
    """Compared with `transformers` itself on a picture that its own processor has prepared."""
    folder = save_vision_model(tmp_path / "model", kind)
    vision = VisionModel(str(folder))
    images = photograph_tensor("coffee", 64)  # the processor's size: nothing is resized
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(
        images=((images[0] + 1) * 127.5).round().to(torch.uint8), return_tensors="pt"
    )["pixel_values"]
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model = getattr(model, "vision_model", model)
    options = {"interpolate_pos_encoding": True} if prefix is not None and kind != "dinov2" else {}
    options = {} if kind == "registers" else options
    with torch.no_grad():
        hidden = model(pixels, **options).last_hidden_state
    if prefix is not None:
        hidden = hidden[:, prefix:].transpose(1, 2).reshape(1, -1, grid, grid)
    found = vision(images)
    assert found.shape == (1, vision.channels, grid, grid)
    torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-4)


def test_what_gives_no_map_is_refused_in_one_sentence(tmp_path, vit, monkeypatch):
    with pytest.raises(UserError, match="BertModel, no vision model"):
        VisionModel(str(save_vision_model(tmp_path / "bert", "bert")))
    with pytest.raises(UserError, match="answers the same picture differently each time"):
        VisionModel(str(save_vision_model(tmp_path / "mae", "mae")))
    with pytest.raises(UserError, match="32 pixels with a single feature"):
        VisionModel(str(save_vision_model(tmp_path / "convnext", "convnext", side=32)))
    with pytest.raises(UserError, match=r"is no folder, and .*HF_HUB_OFFLINE is set"):
        VisionModel("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty cannot be loaded .*it needs config\.json"):
        VisionModel(str(tmp_path / "empty"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'latent_ae\[alignment\]'"):
        VisionModel(str(vit))


def test_pickled_weights_are_not_read(tmp_path, vit):
    model = transformers.AutoModel.from_pretrained(vit)
    folder = tmp_path / "pickled"
    save_vision_model(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled cannot be loaded"):
        VisionModel(str(folder))


@pytest.fixture
def run(tiny, vit):
    """Builds a run with an alignment."""

    def build(alignment=None, **sections):
        aligned = {"model": str(vit), "weight": 0.3} | (alignment or {})
        losses = {"alignment": aligned, "perceptual": None} | sections.pop("losses", {})
        sections = {"validation": None, "bottleneck": {"weight": 1e-3}} | sections
        return prepare(tiny(losses=losses, **sections))

    return build


def explicit(one, images):
    """The losses of a step, each differentiated for itself: at the latents and at the weights."""
    network = copy.deepcopy(one.network)
    posterior = network.encode(images).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape)
    reconstruction = (network.decode(latents).sample - images).abs().mean()
    kl = posterior.kl().mean() / images[0].numel()
    terms = one.objective.alignment(images, latents)
    aligned = terms["alignment_cosine"] + terms["alignment_distance"]
    ends = [latents, *network.parameters()]
    both = [
        torch.autograd.grad(loss, ends, retain_graph=True, allow_unused=True)
        for loss in (reconstruction, aligned, kl)
    ]
    both = [
        [torch.zeros_like(end) if g is None else g for g, end in zip(gs, ends, strict=True)]
        for gs in both
    ]
    (plain,) = torch.autograd.grad(aligned, one.objective.alignment.projection.weight)
    return both, plain


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_share_is_that_of_explicit_backward_passes(run, adaptive):
    one = run({"adaptive": adaptive})
    images = normalize(next(one.stream).images)
    torch.manual_seed(7)
    (rec, align, kl), plain = explicit(one, images)
    ratio = rec[0].norm() / align[0].norm() if adaptive else 1.0
    torch.manual_seed(7)
    terms = _accumulate(one, images)
    for p, a, b, c in zip(one.network.parameters(), rec[1:], align[1:], kl[1:], strict=True):
        torch.testing.assert_close(p.grad, a + 0.3 * ratio * b + 1e-3 * c, rtol=1e-3, atol=1e-6)
    gradient = one.objective.alignment.projection.weight.grad
    torch.testing.assert_close(gradient, plain * (1.0 if adaptive else 0.3), rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in one.objective.alignment.vision.parameters())
    if adaptive:
        assert terms["alignment_weight"].item() == pytest.approx(0.3 * ratio.item(), rel=1e-4)
    else:
        whole = terms["l1"] + 1e-3 * terms["kl"]
        whole = whole + 0.3 * (terms["alignment_cosine"] + terms["alignment_distance"])
        assert terms["total"].item() == pytest.approx(whole.item(), rel=1e-5)


class _Backwards(TorchDispatchMode):
    """Counts the convolutions that are differentiated."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.convolution_backward.default
        return function(*args, **(kwargs or {}))


def test_the_share_costs_no_backward_pass(run):
    counts = []
    for sections in ({"alignment": {"adaptive": True}}, {"alignment": {"adaptive": False}}):
        one = run(**sections)
        images = normalize(next(one.stream).images)
        with _Backwards() as backwards:
            _accumulate(one, images)
        counts.append(backwards.count)
    modules = list(one.network.modules())
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in modules)
    upsamplings = sum(isinstance(m, Upsample2D) for m in modules)  # four convolutions each
    assert counts == [convolutions + 3 * upsamplings] * 2


def test_the_share_has_no_scale_and_survives_a_gradient_that_is_gone():
    share, generator = GradientShare(0.5), torch.Generator().manual_seed(0)
    rec, align = torch.randn(2, 2, 4, 4, 4, generator=generator)
    combined = share.combine(rec, align)
    torch.testing.assert_close(combined - rec, 0.5 * align * rec.norm() / align.norm())
    torch.testing.assert_close(share.combine(1024 * rec, 1024 * align), 1024 * combined)
    torch.testing.assert_close(share.combine(rec, torch.zeros_like(rec)), rec)
    assert share.combine(rec, 1e-25 * align).isfinite().all()
    assert share.combine(rec, torch.full_like(align, torch.nan)).isnan().all()


def test_only_the_projection_is_trained_saved_and_averaged(run):
    one = run(training={"ema": 0.5})
    weight = one.objective.alignment.projection.weight
    before, frozen = weight.detach().clone(), copy.deepcopy(one.objective.alignment.vision)
    update(one)
    assert not torch.equal(weight, before)
    for a, b in zip(one.objective.alignment.vision.parameters(), frozen.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
    assert not one.objective.alignment.vision.train().training
    state = one.checkpoint()._whole_state()
    assert list(state["objective"]) == ["alignment.projection.weight"]
    assert len(one.ema.shadow_params) == len(list(one.network.parameters()))


def test_both_are_told_and_the_memory_is_counted(tiny, vit):
    """By `latent-ae config`, which builds nothing."""
    aligned = {"model": str(vit), "weight": 0.3}
    losses = {"alignment": aligned, "equivariance": {"scales": None}, "perceptual": None}
    facts = describe(tiny(losses=losses))
    assert f"0.3 × the adaptive weight · alignment with {vit}" in facts["loss"]
    assert "in 50% of the steps latents are turned" in facts["loss"]
    assert "vision model 0 MiB" in facts["memory a process"]


def test_with_an_adversary_and_turns_all_gradients_are_numbers(run):
    heard = {"start": 0, "warmup_steps": 0, "channels": 4, "layers": 2}
    turned = {"equivariance": {"probability": 1, "scales": None}}
    one = run(adversary=heard, losses=turned, training={"accumulation": 2})
    terms = update(one).terms
    assert terms["gradient_norm"].isfinite()
    assert {
        "alignment_weight",
        "adaptive_weight",
        "alignment_cosine",
        "l1_transformed",
    } <= terms.keys()


def test_the_processors_size_is_found(tmp_path, vit):
    assert VisionModel(str(vit)).resolution == 64
    assert VisionModel(str(vit), 40).grid == 5
    folder = save_vision_model(tmp_path / "cropped")
    file = folder / "preprocessor_config.json"
    content = json.loads(file.read_text())
    content |= {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 72}}
    content |= {"do_center_crop": True, "crop_size": {"height": 48, "width": 48}}
    file.write_text(json.dumps(content))
    assert VisionModel(str(folder)).resolution == 48
