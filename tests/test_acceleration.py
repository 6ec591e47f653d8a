"""Accelerated networks against stock ones: results, gradients, memory, layout."""

import copy
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderTiny,
    VQModel,
)
from diffusers.models.attention_processor import AttnProcessor
from skimage import data as photographs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from latent_ae import UserError, accelerate_autoencoder
from latent_ae.acceleration import accelerated_layers, stock_layers
from latent_ae.acceleration.winograd import pays_off, winograd

WIDTHS = (32, 32, 64)


def network(kind=AutoencoderKL, widths=WIDTHS, **more):
    torch.manual_seed(0)
    levels = len(widths)
    made = kind(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        **more,
    )
    for module in made.modules():  # GroupNorms that do something
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return made


def photograph(side=64, batch=1):
    crops = [photographs.astronaut()[i : i + side, 180 : 180 + side] for i in range(batch)]
    pixels = torch.stack([torch.tensor(crop.copy()).permute(2, 0, 1) for crop in crops])
    return pixels / 127.5 - 1


def encoded(one, images):
    found = one.encode(images)
    return found.latent_dist.parameters if hasattr(found, "latent_dist") else found.latents


def latents_of(one, images):
    found = encoded(one, images)
    return found.chunk(2, 1)[0] if hasattr(one.encode(images), "latent_dist") else found


def both(one, images):
    return one.decode(latents_of(one, images)).sample


def gradients(one, images):
    images = images.clone().requires_grad_()
    one.zero_grad()
    output = both(one, images)
    (output * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).sum().backward()
    return {"images": images.grad} | {n: p.grad for n, p in one.named_parameters()}


KINDS = {
    "kl": (AutoencoderKL, {}),
    "without attention": (AutoencoderKL, {"mid_block_add_attention": False}),
    "without quant convolutions": (
        AutoencoderKL,
        {"use_quant_conv": False, "use_post_quant_conv": False},
    ),
    "flux2": (AutoencoderKLFlux2, {"latent_channels": 4}),
    "vq": (VQModel, {"latent_channels": 4, "num_vq_embeddings": 16}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_stock_diffusers(kind):
    cls, more = KINDS[kind]
    stock = network(cls, **more).double()
    fast = accelerate_autoencoder(copy.deepcopy(stock))
    assert accelerated_layers(fast) > 10
    images = photograph(40, batch=2).double()
    with torch.no_grad():
        torch.testing.assert_close(encoded(fast, images), encoded(stock, images))
        latents = latents_of(stock, images)
        theirs, ours = (one.decode(latents).sample for one in (stock, fast))
        torch.testing.assert_close(ours, theirs)
    theirs, ours = (gradients(one, images) for one in (stock, fast))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if gradient is None:  # a codebook's, in VQModel's loss alone
            assert ours[name] is None
            continue
        torch.testing.assert_close(ours[name], gradient, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("with_winograd", [True, False])
def test_fp32_is_as_near_to_float64_as_stock(with_winograd, monkeypatch):
    known = (torch.backends.cpu.get_cpu_capability(),) if with_winograd else ()
    monkeypatch.setattr("latent_ae.acceleration.winograd._CAPABILITIES", known)
    stock = network(widths=(64, 64, 64)).eval()
    fast = accelerate_autoencoder(copy.deepcopy(stock))
    images = photograph(128)
    with torch.no_grad():
        exact = both(copy.deepcopy(stock).double(), images.double())
        theirs, ours = (both(one, images) for one in (stock, fast))
    took_part = pays_off(torch.empty(1, 64, 32, 32), torch.empty(64, 64, 3, 3))
    assert took_part == with_winograd
    deviation = exact.std()
    assert (ours - theirs).abs().max() < 1e-5 * exact.abs().max().clamp(min=1)
    # A direct convolution in channels_last adds in another order than stock's.
    assert (ours - exact).std() < (1.5 if with_winograd else 2.5) * (theirs - exact).std()
    assert (ours - exact).std() < 1e-5 * deviation


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_is_no_further_from_fp32_than_stock(autocast):
    stock = network().eval()
    fast = accelerate_autoencoder(copy.deepcopy(stock))
    images = photograph(64, batch=2)
    exact = gradients(stock, images)
    with torch.no_grad():
        picture = both(stock, images)
    errors = []
    for one in (stock, fast):
        one = one if autocast else copy.deepcopy(one).bfloat16()
        half = images if autocast else images.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                off = (both(one, half).float() - picture).std()
            found = gradients(one, half)
        named = [(n, g) for n, g in exact.items() if not n.endswith("to_k.bias")]  # that is 0
        lost = torch.cat([(found[n].float() - g).flatten() / g.norm() for n, g in named])
        errors.append((off.item(), lost.square().mean().sqrt().item()))
    (stock_picture, stock_gradient), (fast_picture, fast_gradient) = errors
    assert fast_picture < 1.15 * stock_picture
    assert fast_gradient < 1.15 * stock_gradient


def saved_bytes(one, images, dtype=None):
    held, weights = {}, {p.untyped_storage().data_ptr() for p in one.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = both(one, images)
    del output
    return sum(held.values())


@pytest.mark.parametrize(("dtype", "share"), [(None, 0.45), (torch.bfloat16, 0.45)])
def test_backward_keeps_less_than_half_of_what_stock_keeps(dtype, share):
    stock = network()
    fast = accelerate_autoencoder(copy.deepcopy(stock))
    images = photograph(64)
    assert saved_bytes(fast, images, dtype) < share * saved_bytes(stock, images, dtype)


def test_checkpointing_gives_the_same_gradients():
    fast = accelerate_autoencoder(network().double())
    images = photograph(32).double()
    plain = gradients(fast, images)
    fast.enable_gradient_checkpointing()
    for name, gradient in gradients(fast, images).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_weights_changed_before_backward_are_refused():
    fast = accelerate_autoencoder(network())
    output = both(fast, photograph(32))
    with torch.no_grad():
        fast.decoder.mid_block.resnets[0].conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_frozen_parts_get_no_gradients():
    fast = accelerate_autoencoder(network())
    fast.encoder.requires_grad_(False)
    fast.quant_conv.requires_grad_(False)
    fast.decoder.up_blocks[0].resnets[0].norm1.requires_grad_(False)
    both(fast, photograph(32)).sum().backward()
    for name, parameter in fast.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_layout_is_channels_last_without_hidden_copies(monkeypatch):
    monkeypatch.setattr("latent_ae.acceleration.convolution.pays_off", lambda *_: False)
    fast = accelerate_autoencoder(network().eval())
    images = photograph(128).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        latents = latents_of(fast, images).contiguous(memory_format=torch.channels_last)
        with torch.profiler.profile(record_shapes=True) as profile:
            encoded(fast, images)
            picture = fast.decode(latents).sample
    assert picture.is_contiguous(memory_format=torch.channels_last)

    def is_picture(shape):  # and neither weights nor statistics
        return len(shape) == 4 and shape[0] == 1

    large = [
        (event.cpu_parent and event.cpu_parent.name, event.input_shapes[0])
        for event in profile.events()
        if event.name == "aten::copy_" and is_picture(event.input_shapes[0])
    ]
    parents = Counter(parent for parent, _ in large)
    for inner in ("aten::addmm", "aten::_slow_conv2d_forward"):  # what a product begins with: bias
        parents.pop(inner, None)
    # The four parts of each upsampling's result, put in their places, and the padding before each
    # downsampling. Nothing changes its layout.
    levels = len(WIDTHS) - 1
    assert parents == {None: 4 * levels, "aten::constant_pad_nd": levels}, large


def test_names_files_and_copies_are_as_before(tmp_path):
    stock = network()
    fast = accelerate_autoencoder(copy.deepcopy(stock))
    assert list(fast.state_dict()) == list(stock.state_dict())
    assert accelerated_layers(copy.deepcopy(fast)) == accelerated_layers(fast)
    fast.save_pretrained(tmp_path)
    again = AutoencoderKL.from_pretrained(tmp_path)
    assert accelerated_layers(again) == 0
    for name, tensor in stock.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_stock_layers_for_a_while():
    # SDPA has no second derivative.
    fast = accelerate_autoencoder(network(mid_block_add_attention=False).eval())
    count = accelerated_layers(fast)
    images = photograph(32)
    with stock_layers(fast):
        assert accelerated_layers(fast) == 0
        x = images.clone().requires_grad_()
        (first,) = torch.autograd.grad(both(fast, x).sum(), x, create_graph=True)
        first.square().sum().backward()  # a gradient of a gradient
    assert x.grad is not None
    assert accelerated_layers(fast) == count
    (first,) = torch.autograd.grad(both(fast, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        first.square().sum().backward()


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


def _adapter(one):
    resnet = one.decoder.up_blocks[0].resnets[0]
    resnet.conv2 = Adapter(resnet.conv2)  # behind it no norm takes the factor back


def _processor(one):
    one.encoder.mid_block.attentions[0].set_processor(AttnProcessor())


def _circular(one):
    for module in one.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


def _hook(one):
    for name in ("resnets.0.norm1", "resnets.1.conv2", "attentions.0.to_q"):
        layer = one.decoder.mid_block.get_submodule(name)
        layer.register_forward_hook(lambda module, given, result: 2 * result)


def _weight_norm(one):
    conv = one.decoder.up_blocks[1].resnets[0].conv2
    nn.utils.parametrizations.weight_norm(conv).parametrizations.weight.original0.data.mul_(2)


def _dropout(one):
    one.encoder.down_blocks[0].resnets[0].dropout.p = 0.5  # nothing in eval mode


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("change", [_adapter, _processor, _circular, _hook, _weight_norm, _dropout])
def test_what_is_put_into_layers_has_its_effect(change, before):
    stock, fast = network().eval(), network().eval()
    plain = copy.deepcopy(stock)
    for one in (stock, fast):
        if one is fast and not before:
            accelerate_autoencoder(one)
        change(one)
    if before:
        accelerate_autoencoder(fast)
    images = photograph(32)
    with torch.no_grad():
        exact, found = both(stock, images), both(fast, images)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
        if change not in (_processor, _dropout):
            assert (both(plain, images) - exact).abs().max() > 1e-2
    layers = accelerated_layers(fast)
    with pytest.raises(UserError, match="has others"):
        accelerate_autoencoder(fast, memory=1e9)
    assert accelerated_layers(fast) == layers  # what is refused changes nothing


def test_layers_of_video_are_left_to_stock():
    torch.manual_seed(0)
    stock = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    fast = accelerate_autoencoder(copy.deepcopy(stock))
    video = torch.rand(1, 3, 5, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(both(fast, video), both(stock, video), rtol=1e-4, atol=1e-5)


def test_offloading_by_accelerate_works():
    from accelerate import cpu_offload

    stock = network().eval()
    fast = accelerate_autoencoder(copy.deepcopy(stock))
    images = photograph(32)
    with torch.no_grad():
        exact = both(stock, images)
        cpu_offload(fast.decoder, execution_device=torch.device("cpu"))
        torch.testing.assert_close(both(fast, images), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of jit
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_is_good_for_other_sizes():
    decoder = accelerate_autoencoder(network(widths=(64, 64, 64)).eval()).decoder
    with torch.no_grad():
        traced = torch.jit.trace(decoder, torch.randn(1, 4, 32, 32), check_trace=False)
        latents = torch.randn(1, 4, 40, 36)
        torch.testing.assert_close(traced(latents), decoder(latents), rtol=1e-4, atol=1e-4)


def test_a_count_on_fake_tensors_leaves_winograd_alone():
    stock = network(widths=(64, 64, 64)).eval()
    fast = accelerate_autoencoder(copy.deepcopy(stock))
    images = photograph(128)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            fast.encoder(torch.empty(1, 3, 128, 128))
        assert (both(fast, images) - both(stock, images)).abs().max() < 1e-4


def test_other_classes_get_their_layout_alone():
    torch.manual_seed(0)
    stock = AutoencoderTiny(
        encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4,
    ).eval()  # fmt: skip
    fast = accelerate_autoencoder(copy.deepcopy(stock))
    assert accelerated_layers(fast) == 0
    images = photograph(32)
    with torch.no_grad():
        torch.testing.assert_close(both(fast, images), both(stock, images))
    with pytest.raises(UserError, match="AutoencoderTiny has others"):
        accelerate_autoencoder(fast, memory=1e9)


@pytest.mark.parametrize("memory", [0, -1, float("nan")])
def test_memory_is_a_number_of_bytes(memory):
    with pytest.raises(UserError, match="bytes above 0"):
        accelerate_autoencoder(network(), memory=memory)


def test_spill_is_a_folder(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        accelerate_autoencoder(network(), memory=1e9, spill=tmp_path / "missing")


def test_each_call_says_what_memory_there_is(tmp_path):
    fast = accelerate_autoencoder(network(), memory=1e9, spill=tmp_path)
    assert (fast.encoder.memory, fast.decoder.spill) == (1e9, tmp_path)
    accelerate_autoencoder(fast)
    assert (fast.encoder.memory, fast.decoder.spill) == (math.inf, None)


@pytest.mark.parametrize("size", [(32, 32), (37, 51)])
@pytest.mark.parametrize("rows", [(1, 1), (0, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("buffer", [2**20, 2**15])
def test_winograd_is_the_convolution(size, rows, bias, layout, buffer, monkeypatch):
    monkeypatch.setattr("latent_ae.acceleration.winograd._BUFFER", buffer)  # small: inner blocks
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 72, 3, padding=1, bias=bias).double()
    x = torch.randn(2, 64, *size, dtype=torch.float64)
    with torch.no_grad():
        exact = conv(x)[:, :, 1 - rows[0] : size[0] - 1 + rows[1]]
        offset = conv.bias.float() if bias else None
        given = x.float().contiguous(memory_format=layout)
        ours = winograd(given, conv.weight.float(), offset, rows)
        theirs = conv.float()(x.float())[:, :, 1 - rows[0] : size[0] - 1 + rows[1]]
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert (ours - exact).abs().max() < 3e-6 * exact.abs().max()
    assert (ours - exact).std() < 2 * (theirs - exact).std()


COMPILED = """
import copy, sys
sys.path.insert(0, "tests")
from test_acceleration import gradients, network, photograph
from latent_ae import accelerate_autoencoder
stock = network(widths=(16, 16))
fast = accelerate_autoencoder(copy.deepcopy(stock), compile=True)
images = photograph(32)
theirs, ours = gradients(stock, images), gradients(fast, images)
for name, gradient in theirs.items():
    if not name.endswith("to_k.bias"):  # which is 0, as softmax takes no notice of it
        assert (ours[name] - gradient).abs().max() < 1e-3 * gradient.abs().max(), name
print("equal", len(theirs))
"""


@pytest.mark.slow
def test_compiled_blocks_have_the_same_gradients(tmp_path):
    pytest.importorskip("torch._inductor.cpp_builder").get_cpp_compiler()
    # In a process of its own: dynamo's warnings are its own affair.
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[1],
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.startswith("equal")
