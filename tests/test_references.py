from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import NAMES, photograph
from PIL import Image

from latent_ae import UserError
from latent_ae.data import to_tensor
from latent_ae.evaluation import references
from latent_ae.evaluation.references import CODECS, codec_reference, encode_at_most

SIDE = 96


@pytest.fixture(scope="module")
def images():
    return torch.stack([to_tensor(photograph(name, SIDE)) for name in NAMES])


def pictures(images):
    return [Image.fromarray(np.asarray(image.permute(1, 2, 0))) for image in images]


def sizes(image, codec):
    """The bits of a picture's file at each quality."""
    encode, lowest = CODECS[codec]
    (picture,) = pictures(image[None])
    return {quality: 8 * len(encode(picture, quality)) for quality in range(lowest, 101)}


@pytest.mark.parametrize("codec", CODECS)
def test_the_best_quality_that_fits_is_taken(codec, images):
    generator = np.random.default_rng(0)
    for image in images[:2]:
        table = sizes(image, codec)
        smallest, largest = min(table.values()), table[100]
        for allowed in np.exp(generator.uniform(np.log(smallest), np.log(largest), 20)):
            picture, taken = encode_at_most(image, allowed, codec)
            best = max(quality for quality, size in table.items() if size <= allowed)
            assert taken <= allowed
            assert taken == table[best]
            assert table[best + 1] > allowed
            wanted = CODECS[codec].encode(pictures(image[None])[0], best)
            assert torch.equal(picture, to_tensor(Image.open(BytesIO(wanted)).convert("RGB")))


@pytest.mark.parametrize("codec", CODECS)
def test_a_budget_of_exactly_a_quality_is_enough_and_one_bit_less_is_not(codec, images):
    table = sizes(images[0], codec)
    for quality in (20, 50, 90, 100):
        assert encode_at_most(images[0], table[quality], codec)[1] == table[quality]
        assert encode_at_most(images[0], table[quality] - 1, codec)[1] < table[quality]
    assert encode_at_most(images[0], 1e9, codec)[1] == table[100]


@pytest.mark.parametrize("codec", CODECS)
def test_quality_rises_with_bits(codec, images):
    errors = []
    for bits_per_pixel in (0.6, 1.2, 2.4, 4.8):
        result = codec_reference(images, [bits_per_pixel * SIDE**2] * len(images), codec)
        assert not any(result.too_large)
        errors.append((result.images.float() - images.float()).square().mean((1, 2, 3)))
    for coarse, fine in pairwise(errors):
        assert (fine < coarse).all()


@pytest.mark.parametrize("codec", CODECS)
def test_a_batch_is_its_pictures_each_with_its_own_budget(codec, images):
    budgets = [5000.0, 9000.0, 100.0, 20000.0]
    result = codec_reference(images, budgets, codec)
    assert result.images.shape == images.shape
    assert result.images.dtype == torch.uint8
    for i, (image, allowed) in enumerate(zip(images, budgets, strict=True)):
        picture, taken = encode_at_most(image, allowed, codec)
        assert torch.equal(result.images[i], picture)
        assert result.bits[i] == taken
    assert result.too_large == [False, False, True, False]
    lowest = CODECS[codec].lowest
    assert result.bits[2] == sizes(images[2], codec)[lowest] > 100


def test_the_search_survives_sizes_that_do_not_rise_with_quality():
    def search(table, allowed):
        tried = []

        def encode(quality):
            tried.append(quality)
            return bytes(table[quality])

        file = references._best_file(encode, 0, 8 * allowed)
        assert len(tried) < 25
        return None if file is None else len(file)

    generator = np.random.default_rng(0)
    for _ in range(200):
        table = np.arange(101) * 2 + generator.integers(0, 12, 101)
        allowed = int(generator.integers(0, 230))
        taken = search(table, allowed)
        if taken is None:
            assert table[0] > allowed
            continue
        assert taken <= allowed
        if table[100] <= allowed:
            assert taken == table[100]
    # Quality 51 dips below its lower neighbour; 50 is too large and 51 is not.
    dip = np.arange(101) * 10
    dip[50], dip[51] = 520, 500
    assert search(dip, 505) == 500


def test_flat_pictures_whose_files_shrink_with_quality():
    flat = torch.tensor([200, 30, 60], dtype=torch.uint8).view(3, 1, 1).expand(3, 128, 128)
    table = sizes(flat, "WebP")
    assert table[0] > table[100]
    picture, taken = encode_at_most(flat, table[100], "WebP")
    assert taken == table[100]
    assert (picture.float() - flat.float()).abs().max() < 4


def test_progressive_is_taken_where_it_is_smaller():
    picture = photograph("coffee", 256)
    files = []
    for progressive in (False, True):
        file = BytesIO()
        picture.save(file, "JPEG", quality=75, optimize=True, progressive=progressive)
        files.append(len(file.getvalue()))
    encoded = CODECS["JPEG"].encode(picture, 75)
    assert len(encoded) == min(files) == files[1] < files[0]
    flat = Image.new("RGB", (32, 32))
    assert not Image.open(BytesIO(CODECS["JPEG"].encode(flat, 75))).info.get("progressive")


@pytest.mark.parametrize("codec", CODECS)
def test_odd_sizes_and_noise(codec):
    noise = torch.randint(0, 256, (3, 517, 263), dtype=torch.uint8, generator=torch.manual_seed(0))
    picture, taken = encode_at_most(noise, 2.0 * 517 * 263, codec)
    assert picture.shape == noise.shape
    assert taken <= 2.0 * 517 * 263


def test_an_unknown_codec(images):
    with pytest.raises(UserError, match="valid: JPEG, WebP"):
        encode_at_most(images[0], 1000, "PNG")
    with pytest.raises(UserError, match="valid: JPEG, WebP"):
        codec_reference(images, [1000] * 4, "PNG")
