"""Quantisers and their bottlenecks, against references in float64 and other libraries."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import photograph_tensor
from diffusers import VQModel
from scipy.cluster.vq import kmeans2
from vector_quantize_pytorch import FSQ, LFQ, VectorQuantize

from latent_ae.bottlenecks import build_bottleneck
from latent_ae.bottlenecks.gradients import rotated
from latent_ae.bottlenecks.kmeans import kmeans
from latent_ae.bottlenecks.usage import perplexity, tallied
from latent_ae.config import FSQConfig, LFQConfig, VQConfig
from latent_ae.quantized import (
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    QuantizedAutoencoder,
    VectorQuantizer,
)
from latent_ae.stock_vq import codebook_sha256, is_plain, quantized_of, stock_of

SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
KINDS = {
    "vq": VQConfig(kind="vq", codebook_size=16),
    "rotation": VQConfig(kind="vq", codebook_size=16, gradient="rotation"),
    "normalized": VQConfig(kind="vq", codebook_size=16, normalized=True),
    "ema": VQConfig(kind="vq", codebook_size=16, update="ema"),
    "heads": VQConfig(kind="vq", codebook_size=16, heads=2, normalized=True, gradient="rotation"),
    "residual": VQConfig(kind="vq", codebook_size=8, depth=3, heads=2),
    "fsq": FSQConfig(kind="fsq", levels=(8, 5, 4, 3)),
    "lfq": LFQConfig(kind="lfq", bits=4),
}


def network(config, **changes):
    torch.manual_seed(0)
    keys = SMALL | {"num_vq_embeddings": config.codebook_size} | config.said() | changes
    built = QuantizedAutoencoder(**keys)
    if config.kind == "vq":  # apart, so that no two entries are nearly the same
        torch.nn.init.normal_(built.quantize.codebooks)
    return built


def bottleneck_of(config, **changes):
    built = network(config, **changes).double()
    return build_bottleneck(config, built).double().train(), built.quantize


def latents(batch=2, side=5, dtype=torch.float64):
    return torch.randn(batch, 4, side, side, dtype=dtype, generator=torch.manual_seed(1))


def reference(config, z, books):
    """Entries and the two penalties by loops over levels, heads and positions.

    Returns entries of shape (B, c, h, w), the codebook's and the commitment's term of each picture
    (with graphs to `z` and `books`), and numbers of shape (B, codes, h, w).
    """
    batch, channels, height, width = z.shape
    part = channels // config.heads
    entries, numbers = torch.zeros_like(z), torch.zeros(batch, config.codes, height, width).long()
    codebook, commitment = ([[] for _ in range(batch)] for _ in range(2))
    for b, i, j, head in product(range(batch), range(height), range(width), range(config.heads)):
        place = slice(head * part, (head + 1) * part)
        left = z[b, place, i, j]
        if config.normalized:
            left = left / left.norm()
        total = torch.zeros_like(left)
        for level in range(config.depth):
            book = books[level * config.heads + head]
            if config.normalized:
                book = book / book.norm(dim=1, keepdim=True)
            distances = [(left - entry).square().sum().item() for entry in book]
            nearest = int(np.argmin(distances))
            numbers[b, level * config.heads + head, i, j] = nearest
            codebook[b].append((left.detach() - book[nearest]).square())
            commitment[b].append((left - book[nearest].detach()).square())
            total = total + book[nearest].detach()
            left = left - book[nearest].detach()
        entries[b, place, i, j] = total
    terms = [
        torch.stack([torch.cat(one).mean() for one in kind]) for kind in (codebook, commitment)
    ]
    return entries, *terms, numbers


@pytest.mark.parametrize("name", ["vq", "rotation", "normalized", "heads", "residual", "ema"])
class TestVectorQuantization:
    def test_entries_numbers_and_penalties_are_those_of_the_formulas(self, name):
        config = KINDS[name]
        bottleneck, quantizer = bottleneck_of(config)
        z = latents()
        code = bottleneck(z)
        entries, codebook, commitment, numbers = reference(config, z, quantizer.codebooks)
        torch.testing.assert_close(code.latents, entries)
        torch.testing.assert_close(quantizer.indices(z), numbers)
        torch.testing.assert_close(quantizer.entries(numbers), entries)
        torch.testing.assert_close(code.penalties["commitment"], 0.25 * commitment)
        assert ("codebook" in code.penalties) == (config.update == "gradient")
        if config.update == "gradient":
            torch.testing.assert_close(code.penalties["codebook"], codebook)

    def test_penalties_have_the_formulas_gradients(self, name):
        config = KINDS[name]
        bottleneck, quantizer = bottleneck_of(config)
        books = quantizer.codebooks.detach().clone().requires_grad_()
        ours, theirs = (latents().requires_grad_() for _ in range(2))
        weights = torch.tensor([0.7, -1.3], dtype=torch.float64)
        _, codebook, commitment, _ = reference(config, theirs, books)
        total = 0.25 * commitment
        if config.update == "gradient":
            total = total + codebook
        (weights * total).sum().backward()
        (weights * sum(bottleneck(ours).penalties.values())).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        if config.update == "gradient":
            torch.testing.assert_close(quantizer.codebooks.grad, books.grad)
        else:
            assert quantizer.codebooks.grad is None
            assert not quantizer.codebooks.requires_grad

    def test_the_decoders_gradient_goes_through_as_it_is_or_turned(self, name):
        config = KINDS[name]
        bottleneck, quantizer = bottleneck_of(config)
        z = latents().requires_grad_()
        weights = torch.randn(z.shape, dtype=z.dtype, generator=torch.manual_seed(2))
        (weights * bottleneck(z).latents).sum().backward()
        assert quantizer.codebooks.grad is None  # the codebook learns by its own term alone
        expected = torch.zeros_like(z)
        given = z.detach().clone().requires_grad_()
        bounded = quantizer.bounded(given)
        entries = reference(config, z.detach(), quantizer.codebooks.detach())[0]
        part = 4 // config.heads
        for b, i, j, head in product(range(2), range(5), range(5), range(config.heads)):
            place = slice(head * part, (head + 1) * part)
            vector, entry = bounded[b, place, i, j].detach(), entries[b, place, i, j]
            matrix = torch.eye(part, dtype=z.dtype)
            if config.gradient == "rotation":
                matrix = explicit_rotation(vector, entry)
                torch.testing.assert_close(matrix @ vector, entry)  # it is what it says
            expected[b, place, i, j] = matrix.T @ weights[b, place, i, j]
        (through,) = torch.autograd.grad(bounded, given, expected)  # the normalisation, if any
        torch.testing.assert_close(z.grad, through)


def explicit_rotation(source, target):
    """(|e| / |z|) R of Fifty et al. 2024, as a matrix."""
    a, b = source / source.norm(), target / target.norm()
    r = (a + b) / (a + b).norm()
    matrix = torch.eye(len(a), dtype=a.dtype) - 2 * torch.outer(r, r) + 2 * torch.outer(b, a)
    return matrix * target.norm() / source.norm()


def test_rotation_and_commitment_are_those_of_another_library():
    torch.manual_seed(3)
    theirs = VectorQuantize(dim=4, codebook_size=16, rotation_trick=True, accept_image_fmap=True)
    theirs.eval()
    book = theirs.codebook.detach().double()
    z = latents(dtype=torch.float32).requires_grad_()
    entries, numbers, _ = theirs(z)
    weights = torch.randn(z.shape)
    (weights * entries).sum().backward() if entries.requires_grad else None
    quantizer = VectorQuantizer(16, 4).double()
    with torch.no_grad():
        quantizer.codebooks[0] = book
    assert torch.equal(quantizer.indices(z.detach().double())[:, 0], numbers)
    torch.testing.assert_close(quantizer.entries(numbers[:, None]).float(), entries.detach())


def test_a_rotation_by_half_a_turn_is_finite():
    z = torch.tensor([[[[[1.0]], [[0.0]]]]], requires_grad=True)  # (1, 1, 2, 1, 1)
    rotated(z, -z.detach()).sum().backward()
    assert z.grad.isfinite().all()


class TestFiniteScalar:
    @pytest.mark.parametrize("levels", [(8, 5, 4, 3), (3, 3, 4, 6), (7, 7, 5, 3)])
    def test_entries_and_numbers_are_those_of_another_library(self, levels):
        z = 3 * latents(dtype=torch.float32)
        ours, theirs = FiniteScalarQuantizer(levels), FSQ(list(levels))
        entries, numbers = theirs(z)
        assert torch.equal(ours.indices(z)[:, 0], numbers.long())
        torch.testing.assert_close(ours.entries(ours.indices(z)), entries)

    def test_every_number_comes_back(self):
        quantizer = FiniteScalarQuantizer((8, 5, 4, 3))
        numbers = torch.arange(480).view(1, 1, 20, 24)
        entries = quantizer.entries(numbers)
        assert len(entries.permute(0, 2, 3, 1).reshape(480, 4).unique(dim=0)) == 480
        assert entries.abs().max() == 1
        unbounded = torch.atanh(entries.double().clamp(-0.999, 0.999) * 0.9)
        assert unbounded.isfinite().all()
        rounded = (entries * torch.tensor([4, 2, 2, 1]).view(1, 4, 1, 1)).round()
        assert torch.equal(quantizer.number(rounded), numbers)

    def test_the_gradient_is_that_of_the_bound(self):
        bottleneck, quantizer = bottleneck_of(KINDS["fsq"])
        z = latents().requires_grad_()
        weights = torch.randn(z.shape, dtype=z.dtype, generator=torch.manual_seed(2))
        code = bottleneck(z)
        (weights * code.latents).sum().backward()
        levels = np.array([8, 5, 4, 3]).reshape(1, 4, 1, 1)
        half, offset = (levels - 1) * 1.001 / 2, np.where(levels % 2, 0, 0.5)
        moved = z.detach().numpy() + np.arctanh(offset / half)
        slope = half * (1 - np.tanh(moved) ** 2) / (levels // 2)
        np.testing.assert_allclose(z.grad.numpy(), weights.numpy() * slope, rtol=1e-9)
        torch.testing.assert_close(code.latents.float(), quantizer.entries(quantizer.indices(z)))
        assert not code.penalties
        assert not code.loss_terms


class TestLookupFree:
    def test_entries_are_signs_and_numbers_their_bits(self):
        z = latents(dtype=torch.float32)
        quantizer = LookupFreeQuantizer(4)
        numbers = quantizer.indices(z)
        assert torch.equal(quantizer.entries(numbers), torch.where(z > 0, 1.0, -1.0))
        theirs = LFQ(codebook_size=16, dim=4).eval()
        entries, found, _ = theirs(z)
        assert torch.equal(entries, quantizer.entries(numbers))
        assert len(torch.stack([numbers[:, 0], found], -1).flatten(0, 2).unique(dim=0)) == len(
            found.unique()
        )  # the same codes, whatever the order of the bits

    @pytest.mark.parametrize("group", [4, 2, 3])
    def test_penalties_and_gradients_are_those_of_the_sum_over_all_codes(self, group):
        config = LFQConfig(kind="lfq", bits=4, temperature=0.5, group=group, diversity=0.7)
        bottleneck, _ = bottleneck_of(config)
        ours, theirs = ((0.3 * latents()).requires_grad_() for _ in range(2))
        code = bottleneck(ours)
        signs = torch.where(theirs > 0, 1.0, -1.0).double()
        commitment = (theirs - signs).square().flatten(1).mean(1)
        codes = torch.tensor([*product((-1.0, 1.0), repeat=4)], dtype=torch.float64)
        vectors = theirs.permute(0, 2, 3, 1)
        distances = (vectors[..., None, :] - codes).square().sum(-1)
        shares = (-distances / 0.5).softmax(-1)
        single = -(shares * shares.log()).sum(-1).flatten(1).mean(1)
        joint, first = 0.0, 0
        for size in [len(part) for part in torch.arange(4).split(group)]:
            words = codes[:, first : first + size]
            marginal = [
                shares.mean((0, 1, 2))[(words == word).all(1)].sum() for word in words.unique(dim=0)
            ]
            joint = joint - sum(p * p.log() for p in marginal)
            first += size
        torch.testing.assert_close(code.penalties["commitment"], 0.25 * commitment)
        entropy = 0.1 * (single - 0.7 * joint)
        torch.testing.assert_close(code.penalties["entropy"], entropy)
        (code.penalties["entropy"] + code.penalties["commitment"]).sum().backward()
        (entropy + 0.25 * commitment).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)

    def test_latents_far_from_zero_have_finite_gradients(self):
        bottleneck, _ = bottleneck_of(KINDS["lfq"])
        z = (100 * latents()).requires_grad_()
        sum(bottleneck(z).penalties.values()).sum().backward()
        assert z.grad.isfinite().all()


class TestCodebook:
    def test_averages_follow_the_formula_and_skip_bad_updates(self):
        config = VQConfig(kind="vq", codebook_size=16, update="ema", decay=0.9, revive_after=0)
        bottleneck, quantizer = bottleneck_of(config)
        before = quantizer.codebooks.detach().clone()
        sizes, sums = np.ones(16), before[0].numpy().copy()
        good, bad = torch.tensor(False), torch.tensor(True)
        for step in range(3):
            parts = [latents() + step, latents() - step]  # two micro-steps
            numbers = [quantizer.indices(part)[:, 0].flatten() for part in parts]
            for part in parts:
                bottleneck(part)
            bottleneck.after_update(good, step)
            vectors = torch.cat([part.permute(0, 2, 3, 1).reshape(-1, 4) for part in parts]).numpy()
            found = torch.cat(numbers).numpy()
            counts = np.bincount(found, minlength=16)
            totals = np.zeros((16, 4))
            np.add.at(totals, found, vectors)
            sizes, sums = 0.9 * sizes + 0.1 * counts, 0.9 * sums + 0.1 * totals
            smooth = (sizes + 1e-5) / (sizes.sum() + 16e-5) * sizes.sum()
            wanted = torch.from_numpy(sums / smooth[:, None])
            torch.testing.assert_close(
                quantizer.codebooks.detach()[0], wanted, rtol=1e-6, atol=1e-6
            )
        kept = quantizer.codebooks.detach().clone()
        bottleneck(torch.full((1, 4, 2, 2), torch.nan, dtype=torch.float64))
        bottleneck.after_update(bad, 3)
        assert torch.equal(quantizer.codebooks, kept)
        assert bottleneck.sums.isfinite().all()

    @pytest.mark.parametrize("update", ["gradient", "ema"])
    def test_dead_entries_are_moved_onto_latents(self, update):
        config = VQConfig(kind="vq", codebook_size=16, update=update, revive_after=2)
        bottleneck, quantizer = bottleneck_of(config)
        with torch.no_grad():
            quantizer.codebooks[0, 4:] = 1e3
            if update == "ema":
                bottleneck.sums.copy_(quantizer.codebooks)
        z = latents()
        revived = []
        for step in range(2):
            bottleneck(z)
            revived.append(bottleneck.after_update(torch.tensor(False), step))
        assert revived[0] == {}
        assert revived[1]["codes_revived"] >= 12
        vectors = z.permute(0, 2, 3, 1).reshape(-1, 4)
        moved = quantizer.codebooks[0, 4:]
        assert (torch.cdist(moved, vectors).min(1).values < 1e-6).all()
        assert len(moved.unique(dim=0)) == 12  # each on another latent
        average = {"quantize.codebooks": torch.zeros_like(quantizer.codebooks)}
        bottleneck.correct_averages(average)
        assert torch.equal(average["quantize.codebooks"][0, 4:], moved)
        used = bottleneck(z).statistics["code_usage"]
        assert used == 1

    def test_evaluation_gathers_nothing(self):
        bottleneck, _ = bottleneck_of(KINDS["ema"])
        bottleneck.eval()
        bottleneck(latents())
        assert bottleneck.after_update(torch.tensor(False), 0) == {}

    def test_usage_is_of_the_last_updates(self):
        config = VQConfig(kind="vq", codebook_size=16, revive_after=0)
        bottleneck, quantizer = bottleneck_of(config)
        one = quantizer.codebooks[0, :1].detach().view(1, 4, 1, 1)
        for step in range(100):
            bottleneck(one)
            bottleneck.after_update(torch.tensor(False), step)
        statistics = bottleneck(one).statistics
        assert statistics["code_usage"] == pytest.approx(1 / 16)
        assert statistics["perplexity"] == pytest.approx(1)

    def test_perplexity_is_exp_of_the_entropy(self):
        counts = tallied(torch.tensor([[0, 0, 1, 2], [3, 3, 3, 3]]), 5)
        assert counts.tolist() == [[2, 1, 1, 0, 0], [0, 0, 0, 4, 0]]
        shares = np.array([0.5, 0.25, 0.25])
        wanted = math.exp(-(shares * np.log(shares)).sum())
        assert perplexity(counts).tolist() == pytest.approx([wanted, 1])


class TestKMeans:
    def test_clusters_are_as_tight_as_scipys(self):
        rng = np.random.default_rng(0)
        vectors = np.concatenate([rng.normal(place, 0.3, (60, 4)) for place in range(8)])
        ours = kmeans(torch.from_numpy(vectors), 8, torch.Generator().manual_seed(0))
        theirs, _ = kmeans2(vectors, 8, minit="++", seed=0)
        spread = [
            np.square(vectors[:, None] - c).sum(-1).min(1).mean() for c in (ours.numpy(), theirs)
        ]
        assert spread[0] < 1.5 * spread[1]

    def test_fewer_vectors_than_centres_give_different_centres(self):
        centres = kmeans(latents().reshape(-1, 4)[:10], 16, torch.Generator().manual_seed(0))
        assert centres.isfinite().all()
        assert len(centres.unique(dim=0)) == 16

    @pytest.mark.parametrize("name", ["vq", "normalized", "residual", "ema"])
    def test_codebooks_start_where_latents_are(self, name):
        bottleneck, quantizer = bottleneck_of(KINDS[name])
        z = latents(batch=8, side=8)
        before = bottleneck(z).statistics["quantization_error"]
        bottleneck.start(z)
        after = bottleneck(z).statistics["quantization_error"]
        assert after < 0.8 * before
        if name == "normalized":
            torch.testing.assert_close(quantizer.codebooks.norm(dim=-1).mean().item(), 1.0)


class TestStock:
    @pytest.mark.parametrize("normalized", [False, True])
    def test_one_codebook_is_a_stock_model_and_back(self, normalized):
        config = VQConfig(kind="vq", codebook_size=16, normalized=normalized)
        ours = network(config).eval()
        stock = stock_of(ours)
        assert type(stock) is VQModel
        image = photograph_tensor("chelsea", 64)
        with torch.no_grad():
            z = ours.encode(image).latents
            _, _, (_, _, found) = stock.quantize(z)
            assert torch.equal(found.view(1, 1, 32, 32), ours.indices(z))
            wanted = stock(image).sample
            again = quantized_of(stock)
            for made in (ours(image).sample, ours.decode_indices(found.view(1, 1, 32, 32))):
                assert (made - wanted).abs().max() < 1e-4  # layouts round differently
            assert (again(image).sample - wanted).abs().max() < 1e-4
        assert stock.config.keys().isdisjoint({"quantizer", "heads", "auto_map"})

    def test_codebook_entries_by_shape_as_stock(self):
        ours = network(KINDS["vq"])
        stock, numbers = stock_of(ours), torch.randint(16, (2, 5, 5))
        shape = (2, 5, 5, 4)
        wanted = stock.quantize.get_codebook_entry(numbers.flatten(), shape)
        assert torch.equal(ours.quantize.get_codebook_entry(numbers.flatten(), shape), wanted)

    def test_the_others_are_not(self):
        plain = {name: is_plain(network(config).config) for name, config in KINDS.items()}
        assert {name for name, yes in plain.items() if yes} == {
            "vq",
            "rotation",
            "normalized",
            "ema",
        }

    def test_hashes_tell_codebooks_apart(self):
        hashes = {name: codebook_sha256(network(config)) for name, config in KINDS.items()}
        assert hashes["vq"] == hashes["rotation"] == hashes["ema"]  # what differs is how they learn
        assert len(set(hashes.values())) == len(hashes) - 2
        other = network(KINDS["vq"])
        with torch.no_grad():
            other.quantize.codebooks[0, 3, 2] += 1e-4
        assert codebook_sha256(other) != hashes["vq"]
        assert codebook_sha256(network(FSQConfig(kind="fsq", levels=(8, 5, 3, 4)))) != hashes["fsq"]


@pytest.mark.parametrize("name", KINDS)
def test_decoding_quantises_and_loads_back(name, tmp_path):
    ours = network(KINDS[name]).eval()
    image = photograph_tensor("coffee", 64)
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "quantized.py").is_file()
    again = QuantizedAutoencoder.from_pretrained(tmp_path)
    with torch.no_grad():
        z = ours.encode(image).latents
        numbers = ours.indices(z)
        assert numbers.shape == (1, KINDS[name].codes, 32, 32)
        assert numbers.min() >= 0
        assert numbers.max() < KINDS[name].codebook_size
        torch.testing.assert_close(ours.decode_indices(numbers), ours.decode(z).sample)
        assert torch.equal(again(image).sample, ours(image).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_low_precision_are_those_of_its_latents_in_full(dtype):
    ours = network(KINDS["vq"]).eval()
    z = latents(dtype=torch.float32).to(dtype)
    numbers = ours.indices(z)
    assert torch.equal(numbers, ours.indices(z.float()))
    assert F.mse_loss(ours.quantize.entries(numbers), z.float()) > 0
