"""Encoding and decoding in strips against the pass over the whole picture."""

import copy

import pytest
import torch
from skimage import data as photographs
from test_acceleration import encoded, network, photograph

from latent_ae import accelerate_autoencoder
from latent_ae.acceleration import stores
from latent_ae.acceleration.counting import strip_memory
from latent_ae.acceleration.moments import ChannelMoments
from latent_ae.acceleration.strips import in_strips, whole_bytes

SIZES = [(48, 48), (40, 88), (92, 36)]


@pytest.fixture(scope="module")
def stock():
    return network().eval().double().requires_grad_(False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("memory", [1e4, 3e5, 1e9])
def test_strips_are_the_whole_picture(stock, size, memory, tmp_path):
    fast = accelerate_autoencoder(copy.deepcopy(stock))
    images = torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1
    latents = encoded(stock, images).chunk(2, 1)[0]
    exact = {"encoder": stock.encoder(images), "decoder": stock.decoder(latents)}
    for name, given in (("encoder", images), ("decoder", latents)):
        found = in_strips(getattr(fast, name), given, memory, tmp_path)
        # Scale and shift of GroupNorm are rounded to fp32.
        torch.testing.assert_close(found, exact[name], rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.iterdir())  # files had no names


def test_a_photograph_has_no_seams(tmp_path):
    stock, exact = network().eval(), network().eval().double()
    fast = accelerate_autoencoder(network().eval(), memory=3e5, spill=tmp_path)
    picture = torch.tensor(photographs.chelsea()[:296, :448].copy()).permute(2, 0, 1)[None]
    images = picture / 127.5 - 1
    with torch.no_grad():
        codes = [encoded(one, images) for one in (stock, fast)]
        codes = [(one - encoded(exact, images.double())).abs().max() for one in codes]
        latents = encoded(stock, images).chunk(2, 1)[0]
        true = exact.decode(latents.double()).sample
        errors = [(one.decode(latents).sample - true).abs().max() for one in (stock, fast)]
        stock.enable_tiling()
        stock.tile_latent_min_size, stock.tile_sample_min_size = 32, 128
        tiled = (stock.decode(latents).sample - true).abs().max()
    # Rounding as that of the whole picture by stock layers, and nothing else.
    assert codes[1] < 2 * codes[0]
    assert errors[1] < 2 * errors[0]
    assert tiled > 100 * errors[1]  # what strips avoid


def test_small_pictures_and_training_go_through_whole(monkeypatch):
    images = photograph(32)
    fast = accelerate_autoencoder(network())
    need = whole_bytes(fast.encoder, images)
    monkeypatch.setattr("latent_ae.acceleration.layers.in_strips", lambda *_: 1 / 0)
    fast.encoder.memory = fast.decoder.memory = need + 1.0
    with torch.no_grad():
        encoded(fast, images)
        fast.encoder.memory = need - 1.0
        with pytest.raises(ZeroDivisionError):
            encoded(fast, images)
    encoded(fast, images)  # with a graph


@pytest.mark.parametrize("size", [(48, 48), (40, 88)])
def test_what_is_held_is_what_is_counted(stock, size, monkeypatch, tmp_path):
    fast = accelerate_autoencoder(copy.deepcopy(stock).float())
    budgets = []

    class Watched(stores.Budget):
        def __init__(self, *given):
            super().__init__(*given)
            budgets.append(self)

    monkeypatch.setattr("latent_ae.acceleration.strips.Budget", Watched)
    latents = torch.randn(1, 4, size[0] // 4, size[1] // 4)
    for coder, given in ((fast.encoder, torch.randn(1, 3, *size)), (fast.decoder, latents)):
        result = in_strips(coder, given, 1e5, tmp_path)
        counted = strip_memory(coder, *given.shape[2:])
        assert budgets[-1].most == counted.activations
        assert budgets[-1].held == 0
        assert result.numel() * 4 == counted.result
        assert counted.attention == 2 * 4 * 64 * latents[0, 0].numel()


def test_16_bits_and_autocast(tmp_path):
    fast = accelerate_autoencoder(network().eval())
    images = photograph(48)
    with torch.no_grad():
        exact = fast.encoder(images)
        half = accelerate_autoencoder(network().eval().bfloat16())
        whole = half.encoder(images.bfloat16())
        strips = in_strips(half.encoder, images.bfloat16(), 1e5, tmp_path)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = in_strips(fast.encoder, images, 1e5, tmp_path)
    assert strips.dtype == mixed.dtype == torch.bfloat16
    error = (whole.float() - exact).std()
    assert (strips.float() - exact).std() < 1.2 * error
    assert (mixed.float() - exact).std() < 1.2 * error


def test_a_full_disk_is_said(monkeypatch, tmp_path):
    fast = accelerate_autoencoder(network().eval(), memory=1e4, spill=tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores.os, "posix_fallocate", full)
    with torch.no_grad(), pytest.raises(OSError, match=r"no room for .* another folder by `spill`"):
        encoded(fast, photograph(48))


def test_moments_survive_a_large_mean():
    rows = torch.randn(1, 8, 30, 17) + 3000
    moments = ChannelMoments(1, 8)
    for first, last in stores.strips(30, 7):
        moments.add(rows[:, :, first:last].contiguous(memory_format=torch.channels_last))
    norm = torch.nn.GroupNorm(4, 8)
    scale, shift = moments.affine(norm)
    exact = norm.double()(rows.double())
    found = rows.double() * scale + shift
    torch.testing.assert_close(found, exact.detach(), rtol=0, atol=2e-3)


def test_the_memory_of_a_host_stands_behind_that_of_a_device():
    budget = stores.Budget(memory=10)
    like = torch.empty(0)
    store = stores._OnHost((4, 6, 5), 4 * 6 * 5 * 4, budget, like)
    budget.held += store.size
    picture = torch.randn(1, 4, 6, 5)
    for first, last in stores.strips(6, 4):
        store.write(first, picture[:, :, first:last])
    assert torch.equal(store.rows(1, 6), picture[:, :, 1:6])
    assert store.moments().pixels == 30
    store.free()
    assert (budget.held, budget.free) == (0, 8)


def test_a_file_system_that_cannot_reserve_is_taken(monkeypatch, tmp_path):
    fast = accelerate_autoencoder(network().eval())

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    images = photograph(48)
    with torch.no_grad():
        exact = fast.encoder(images)
        monkeypatch.setattr(stores.os, "posix_fallocate", unsupported)
        found = in_strips(fast.encoder, images, 1e4, tmp_path)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def test_exporters_get_the_whole_picture():
    fast = accelerate_autoencoder(network().eval(), memory=1e4)
    exported = torch.export.export(fast.decoder, (torch.randn(1, 4, 16, 16),))
    latents = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            exported.module()(latents), fast.decoder(latents), rtol=1e-4, atol=1e-4
        )
