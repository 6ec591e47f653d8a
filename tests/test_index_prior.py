"""The prior over codes: its tokens, its loss, what it draws, that it resumes, what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photograph
from diffusers import VQModel
from latents_folders import labelled_latents, rows_of, state_of, tiny_autoencoder
from PIL import Image
from rich.console import Console
from safetensors.torch import load, save_file
from typer.testing import CliRunner

from index_prior import IndexPrior, noise_of, sample
from index_prior_config import PriorConfig, build_prior
from index_prior_folders import open_codes
from index_prior_tokens import MOST_ENTRIES, Vocabulary, cross_entropy, entropies
from index_prior_trainer import Examples, Trainer
from latent_ae import encode
from latent_ae.errors import UserError
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.latents import LatentDataset
from latent_ae.quantized import QuantizedAutoencoder
from sample_index_prior import app as sampling
from train_index_prior import app, train

PIPELINES = Path(__file__).parents[1] / "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = Console(quiet=True)
NAMES = ("astronaut", "chelsea")
TINY = {"width": 32, "depth": 2, "heads": 2, "batch_size": 4, "log_every": 2, "warmup_steps": 2}
ONE = Vocabulary(16, 1, 4, 4, 2)
TWO = Vocabulary(8, 2, 2, 3, 3)


def seeded(vocabulary, scale=0.3, **options):
    """A prior with weights large enough to have opinions."""
    torch.manual_seed(0)
    prior = build_prior(PriorConfig(**{**TINY, **options}), vocabulary).eval()
    for parameter in prior.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=scale)
    return prior


def by_hand(prior, vocabulary, labels, scale):
    """The likeliest codes, by whole sequences, without a cache, one picture at a time."""
    pictures = []
    for label in labels:
        codes = []
        for place in range(vocabulary.length):
            slot = place % vocabulary.codes
            scores = []
            for first in (vocabulary.codes * vocabulary.size + label, vocabulary.entries - 1):
                offsets = [vocabulary.size * (i % vocabulary.codes) for i in range(place)]
                sequence = [first, *(c + o for c, o in zip(codes, offsets, strict=True))]
                with torch.no_grad():
                    logits = prior(torch.tensor([sequence])).logits[0, -1]
                scores.append(logits[slot * vocabulary.size :][: vocabulary.size])
            guided = scores[1] + scale * (scores[0] - scores[1])
            codes.append(int(guided.argmax()))
        pictures.append(codes)
    grid = (-1, vocabulary.height, vocabulary.width, vocabulary.codes)
    return torch.tensor(pictures).view(grid).permute(0, 3, 1, 2)


def save_autoencoder(folder, network):
    """An untrained one of factor 4, whose codebook lies where latents of photographs do."""
    pictures = torch.cat([torch.from_numpy(np.array(photograph(n, 64)))[None] for n in NAMES])
    with torch.no_grad():
        latents = network.encode(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).latents
        vectors = latents.permute(0, 2, 3, 1).flatten(0, 2)
        some = vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))]
        if isinstance(network, QuantizedAutoencoder):
            codes, size, _ = network.quantize.codebooks.shape
            network.quantize.codebooks.copy_(some[: codes * size].unflatten(0, (codes, size)))
            network.quantize.codebooks[1:] *= 0.3
        else:
            network.quantize.embedding.weight.copy_(some[:16])
    network.save_pretrained(folder)
    return folder


SMALL = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 8),
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "latent_channels": 4,
}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "vq"
    return save_autoencoder(folder, VQModel(num_vq_embeddings=16, **SMALL))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder a class: crops of one photograph each."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in NAMES:
        (folder / name).mkdir()
        for number in range(6):
            left, top = (int(edge) for edge in rng.integers(0, 48, 2))
            crop = photograph(name, 64).crop((left, top, left + 16, top + 16))
            crop.save(folder / name / f"{number}.png")
    return folder


def encoded(autoencoder, pictures, folder, **options):
    options = {"resolution": 16, "store": "indices", "workers": 0, "console": QUIET} | options
    encode(autoencoder, pictures, folder, **options)
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory, autoencoder, pictures):
    return encoded(autoencoder, pictures, tmp_path_factory.mktemp("latents") / "crops")


@pytest.fixture(scope="module")
def constant(tmp_path_factory, autoencoder):
    """Two classes of one picture each."""
    folder = tmp_path_factory.mktemp("constant")
    for name in NAMES:
        (folder / "pictures" / name).mkdir(parents=True)
        photograph(name, 16).save(folder / "pictures" / name / "0.png")
    return encoded(autoencoder, folder / "pictures", folder / "latents")


def assert_same(first, second):
    """Two nested states, bit by bit."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same(first[name], second[name])
    elif isinstance(first, list | tuple):
        for pair in zip(first, second, strict=True):
            assert_same(*pair)
    else:
        assert torch.equal(first, second) if torch.is_tensor(first) else first == second


class TestTokens:
    @pytest.mark.parametrize("vocabulary", [ONE, TWO], ids=["one", "two"])
    def test_there_and_back(self, vocabulary):
        shape = (5, vocabulary.codes, vocabulary.height, vocabulary.width)
        indices = torch.randint(vocabulary.size, shape)
        tokens = vocabulary.tokens(indices)
        assert tokens.shape == (5, vocabulary.length)
        assert torch.equal(vocabulary.indices(tokens), indices)

    def test_raster_order_position_by_position_slot_by_slot(self):
        indices = torch.arange(8).view(1, 2, 2, 2)  # code 1 of a position is 4 above its code 0
        found = Vocabulary(8, 2, 2, 2).tokens(indices)
        assert found.tolist() == [[0, 8 + 4, 1, 8 + 5, 2, 8 + 6, 3, 8 + 7]]

    def test_one_code_needs_no_axis_of_its_own(self):
        indices = torch.randint(16, (3, 4, 4))
        assert torch.equal(ONE.tokens(indices), ONE.tokens(indices[:, None]))
        assert torch.equal(ONE.tokens(indices.to(torch.uint8)), ONE.tokens(indices))

    def test_classes_come_after_the_codes_and_last_the_null_class(self):
        labels = torch.tensor([0, 2, -1, 3])
        assert TWO.class_tokens(labels).flatten().tolist() == [16, 18, 19, 19]
        assert TWO.entries == 20

    @pytest.mark.parametrize("number", [-1, 16])
    def test_a_number_outside_the_codebook_is_refused(self, number):
        with pytest.raises(UserError, match="do not fit a codebook of 16"):
            ONE.tokens(torch.full((1, 4, 4), number))

    def test_too_many_codes_are_refused(self):
        Vocabulary(MOST_ENTRIES, 1, 4, 4)
        with pytest.raises(UserError, match="262144 codes would need an embedding"):
            Vocabulary(2**18, 1, 4, 4)
        with pytest.raises(UserError, match="4 × 65536 codes"):
            Vocabulary(2**16, 4, 4, 4)


@pytest.mark.parametrize("vocabulary", [ONE, TWO], ids=["one", "two"])
def test_the_loss_is_the_cross_entropy_computed_by_hand(vocabulary):
    shape = (3, vocabulary.codes, vocabulary.height, vocabulary.width)
    indices = torch.randint(vocabulary.size, shape)
    logits = torch.randn(3, vocabulary.length, vocabulary.entries)
    found = cross_entropy(vocabulary, logits, vocabulary.tokens(indices))
    values, numbers = logits.double().numpy(), indices.numpy()
    for picture in range(3):
        for place in range(vocabulary.length):
            position, slot = divmod(place, vocabulary.codes)
            code = numbers[picture, slot].flatten()[position]
            scores = values[picture, place, slot * vocabulary.size :][: vocabulary.size]
            nats = np.log(np.exp(scores).sum()) - scores[code]
            assert found[picture, place].item() == pytest.approx(nats, rel=1e-5)


def test_the_entropy_of_counts():
    assert entropies(Vocabulary(4, 1, 1, 1), torch.tensor([2, 1, 1, 0])) == pytest.approx(1.5)
    both = torch.tensor([1, 1, 1, 1, 4, 4, 0, 0])
    assert entropies(Vocabulary(4, 2, 1, 1), both) == pytest.approx((2 + 1) / 2)


class TestSampling:
    @pytest.mark.parametrize("scale", [1.0, 2.5])
    @pytest.mark.parametrize("vocabulary", [ONE, TWO], ids=["one", "two"])
    def test_the_likeliest_codes_are_those_of_whole_sequences(self, vocabulary, scale):
        """`generate` has a cache for either branch of guidance; here there is none."""
        prior, labels = seeded(vocabulary), torch.tensor([0, 1, 1])
        noise = noise_of(vocabulary, 3)
        found = sample(prior, vocabulary, labels, noise, temperature=0, guidance_scale=scale)
        assert torch.equal(found, by_hand(prior, vocabulary, labels.tolist(), scale))
        assert len(found.unique()) > 2

    def test_guidance_of_one_is_none_and_more_is_some(self):
        prior, labels, noise = seeded(ONE), torch.tensor([0, 1] * 4), noise_of(ONE, 8)
        plain = sample(prior, ONE, labels, noise)
        assert torch.equal(plain, sample(prior, ONE, labels, noise, guidance_scale=1.0))
        near = sample(prior, ONE, labels, noise, guidance_scale=1 + 1e-6)
        assert torch.equal(plain, near)  # the guided way, too
        assert not torch.equal(plain, sample(prior, ONE, labels, noise, guidance_scale=4.0))
        # The null class' own guidance leads nowhere.
        null = torch.full((8,), -1)
        unguided = sample(prior, ONE, null, noise)
        assert torch.equal(unguided, sample(prior, ONE, null, noise, guidance_scale=4.0))

    def test_codes_come_as_often_as_the_prior_says(self):
        vocabulary = Vocabulary(5, 1, 1, 1)
        prior, count = seeded(vocabulary, 0.2), 4000
        null = torch.full((count,), -1)
        found = sample(prior, vocabulary, null, noise_of(vocabulary, count)).flatten()
        with torch.no_grad():
            logits = prior(torch.tensor([[vocabulary.null]])).logits[0, -1, :5]
        expected = logits.softmax(-1)
        assert count * expected.min() > 5
        chi = (found.bincount(minlength=5) - count * expected).square() / (count * expected)
        assert chi.sum() < 18.5  # of 4 degrees of freedom: one seed in a thousand

    def test_top_k_top_p_and_temperature_narrow_the_choice(self):
        vocabulary = Vocabulary(8, 1, 1, 1)
        prior, count = seeded(vocabulary, 0.2), 500
        noise, null = noise_of(vocabulary, count), torch.full((count,), -1)

        def drawn(**options):
            return sample(prior, vocabulary, null, noise, **options).flatten().unique().tolist()

        with torch.no_grad():
            chances = prior(torch.tensor([[vocabulary.null]])).logits[0, -1, :8].softmax(-1)
        order = chances.argsort(descending=True)
        assert len(drawn()) > 3
        assert drawn(top_k=3) == sorted(order[:3].tolist())
        assert drawn(top_k=1000) == drawn()
        just_two = float(chances[order[:2]].sum()) - 1e-3
        assert drawn(top_p=just_two) == sorted(order[:2].tolist())
        assert drawn(temperature=0) == drawn(temperature=1e-4) == [int(order[0])]

    def test_a_picture_does_not_depend_on_its_batch(self, autoencoder):
        prior = IndexPrior(seeded(ONE), FrozenAutoencoder(autoencoder, "cpu"), ONE, NAMES)
        labels = [0, 1, -1, 1, 0]
        together = prior.codes(labels, seed=3, guidance_scale=2.0)
        assert torch.equal(together, prior.codes(labels, seed=3, guidance_scale=2.0, batch_size=2))
        assert not torch.equal(together, prior.codes(labels, seed=4, guidance_scale=2.0))
        before = torch.get_rng_state()
        found = prior(labels[:2], seed=3, guidance_scale=2.0)
        assert torch.equal(before, torch.get_rng_state())
        assert found.shape == (2, 3, 16, 16)
        assert found.dtype == torch.uint8


class TestTraining:
    def test_two_constant_classes_are_learned_by_heart(self, constant, autoencoder, tmp_path):
        config = PriorConfig(**{**TINY, "steps": 150, "learning_rate": 1e-2, "seed": 1})
        output = train(constant, tmp_path / "prior", config, held_out=constant, console=QUIET)
        prior = IndexPrior.from_pretrained(output, "cpu")
        data = LatentDataset(constant)
        stored = torch.stack([data[i]["indices"].reshape(1, 4, 4) for i in range(2)])
        assert not torch.equal(stored[0], stored[1])
        assert len(stored.unique()) > 3
        for scale in (1.0, 1.5):
            codes = prior.codes([0, 1, 0], temperature=0, guidance_scale=scale)
            assert torch.equal(codes, stored[[0, 1, 0]])
        # What is drawn is what the autoencoder makes of the codes.
        frozen = FrozenAutoencoder(autoencoder, "cpu")
        decoded = (frozen.decode_indices(stored).clamp(-1, 1) + 1) * 127.5
        drawn = prior([0, 1], temperature=0)
        assert (drawn - decoded).abs().max() <= 0.51
        held_out = json.loads((output / "index_prior.json").read_text())["held_out"]
        assert held_out["bits_per_code"] < 0.1
        # Without its class, the first code that differs cannot be known: a bit for each picture.
        assert 1 / 16 < held_out["bits_per_code_without_class"] < held_out["order_0_entropy"]
        p = stored.flatten().bincount(minlength=16) / stored.numel()
        assert held_out["order_0_entropy"] == pytest.approx(
            -torch.special.xlogy(p, p).sum().item() / np.log(2), rel=1e-5
        )
        assert prior.label_names == list(NAMES)

    def test_the_measure_is_that_of_each_picture_alone(self, latents, tmp_path):
        data = open_codes(latents)
        trainer = Trainer(PriorConfig(**TINY), data, ONE, "", tmp_path)
        found, nats, without = trainer.measure(data), 0.0, 0.0
        prior = trainer.prior.eval()
        for item in data:
            tokens = item["indices"].flatten()
            for first, add in ((16 + item["label"], True), (18, False)):
                sequence = torch.cat([torch.tensor([first]), tokens])[None]
                with torch.no_grad():
                    logits = prior(sequence[:, :-1]).logits[0, :, :16].double()
                cost = -logits.log_softmax(-1).gather(1, tokens[:, None]).sum().item()
                nats, without = (nats + cost, without) if add else (nats, without + cost)
        per = np.log(2) * len(data) * 16
        assert found["bits_per_code"] == pytest.approx(nats / per, rel=1e-5)
        assert found["bits_per_code_without_class"] == pytest.approx(without / per, rel=1e-5)
        assert found["pictures"] == len(data) == 12

    def test_an_epoch_shows_each_picture_once_with_its_class(self, latents):
        data = open_codes(latents)
        config = PriorConfig(**{**TINY, "label_dropout": 0.0, "batch_size": 3})
        found = torch.cat(
            [Examples(data, ONE, config, (r, 2))[n] for n in range(2) for r in (0, 1)]
        )
        wanted = [[16 + i["label"], *i["indices"].flatten().tolist()] for i in data]
        assert sorted(found.tolist()) == sorted(wanted)
        assert not torch.equal(Examples(data, ONE, config)[0], Examples(data, ONE, config)[1])

    def test_classes_are_dropped_as_often_as_said(self, latents):
        data = open_codes(latents)
        config = PriorConfig(**{**TINY, "label_dropout": 0.3, "batch_size": 500})
        firsts = Examples(data, ONE, config)[0][:, 0]
        assert 0.24 < (firsts == 18).float().mean() < 0.36
        assert torch.equal(firsts, Examples(data, ONE, config)[0][:, 0])
        bare = Vocabulary(16, 1, 4, 4, 0)
        assert (Examples(data, bare, PriorConfig(**TINY, labels=False))[0][:, 0] == 16).all()

    @pytest.mark.parametrize("dropout", [0.0, 0.2])
    def test_a_resumed_run_ends_bit_equal(self, latents, tmp_path, dropout):
        config = PriorConfig(**{**TINY, "steps": 6, "checkpoint_every": 2, "dropout": dropout})
        options = {"held_out": latents, "console": QUIET}
        whole = train(latents, tmp_path / "whole", config, **options)

        class Stop(Exception):
            pass

        update = Trainer.update

        def stopping(self, *arguments):
            if self.step == 5:
                raise Stop
            return update(self, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "update", stopping)
            with pytest.raises(Stop):
                train(latents, tmp_path / "cut", config, **options)
        torch.rand(7)  # the global generator must not matter
        cut = train(latents, tmp_path / "cut", config, **options)
        first, second = (
            state_of(tmp_path / f"{name}-run/checkpoint.pt") for name in ("whole", "cut")
        )
        for part in ("prior", "optimizer"):
            assert_same(first[part], second[part])
        weights = "prior/model.safetensors"
        assert (whole / weights).read_bytes() == (cut / weights).read_bytes()
        rows = [rows_of(tmp_path / f"{n}-run/log.jsonl") for n in ("whole", "cut")]
        kept = [[(r["step"], r["group"], r["bits_per_code"]) for r in some] for some in rows]
        assert kept[0] == kept[1]
        # Once more, with nothing to do: what was measured is still said.
        again = json.loads(
            (train(latents, cut, config, **options) / "index_prior.json").read_text()
        )
        assert again["held_out"]["bits_per_code"] == rows[0][-1]["bits_per_code"]

    def test_latents_without_classes_and_classes_left_out(self, autoencoder, pictures, tmp_path):
        plain = encoded(autoencoder, pictures / NAMES[0], tmp_path / "latents")
        config = PriorConfig(**TINY, steps=2)
        output = train(plain, tmp_path / "prior", config, held_out=plain, console=QUIET)
        prior = IndexPrior.from_pretrained(output, "cpu")
        assert prior.vocabulary.classes == 0
        assert prior([-1, -1]).shape == (2, 3, 16, 16)
        with pytest.raises(UserError, match="class 0: there is no such class"):
            prior([0])
        with pytest.raises(UserError, match="takes classes"):
            prior([-1], guidance_scale=2.0)

    def test_without_dropped_classes_nothing_guides(self, latents, tmp_path):
        config = PriorConfig(**TINY, steps=1, label_dropout=0.0)
        output = train(latents, tmp_path / "prior", config, console=QUIET)
        prior = IndexPrior.from_pretrained(output, "cpu")
        assert prior([0, 1]).shape == (2, 3, 16, 16)
        for labels, scale in (([0], 2.0), ([0, -1], 1.0)):
            with pytest.raises(UserError, match="--label-dropout above 0"):
                prior(labels, guidance_scale=scale)


def test_several_codes_a_position_are_learned_by_heart(tmp_path):
    torch.manual_seed(0)
    network = QuantizedAutoencoder(num_vq_embeddings=8, depth=3, **SMALL)
    model = save_autoencoder(tmp_path / "rq", network)
    for name in NAMES:
        (tmp_path / "pictures" / name).mkdir(parents=True)
        photograph(name, 16).save(tmp_path / "pictures" / name / "0.png")
    latents = encoded(model, tmp_path / "pictures", tmp_path / "latents")
    config = PriorConfig(**{**TINY, "steps": 150, "learning_rate": 1e-2})
    prior = IndexPrior.from_pretrained(
        train(latents, tmp_path / "prior", config, console=QUIET), "cpu"
    )
    assert prior.vocabulary == Vocabulary(8, 3, 4, 4, 2)
    stored = torch.stack([item["indices"] for item in LatentDataset(latents)])
    assert stored.shape == (2, 3, 4, 4)
    assert torch.equal(prior.codes([0, 1], temperature=0), stored)


class TestRefusals:
    def refuse(self, latents, output, words, **options):
        config = PriorConfig(**TINY, steps=1)
        with pytest.raises(UserError, match=words):
            train(latents, output, config, console=QUIET, **options)
        run = output.with_name(output.name + "-run")
        assert not run.exists(), "refused too late"

    def test_latents_that_are_no_codes(self, tmp_path):
        model = tiny_autoencoder(tmp_path / "kl")
        folder = labelled_latents(tmp_path / "latents", model, (4, 8, 8), NAMES)
        self.refuse(folder, tmp_path / "prior", "holds moments.*--store indices")

    def test_another_codebook(self, latents, tmp_path):
        torch.manual_seed(1)
        VQModel(num_vq_embeddings=16, **SMALL).save_pretrained(tmp_path / "other")
        other = tmp_path / "other"
        self.refuse(latents, tmp_path / "prior", "of another codebook's", autoencoder=other)
        kl = tiny_autoencoder(tmp_path / "kl")
        self.refuse(latents, tmp_path / "prior", "AutoencoderKL, which has no", autoencoder=kl)
        gone = tmp_path / "gone"
        self.refuse(latents, tmp_path / "prior", "say where by --autoencoder", autoencoder=gone)

    def test_held_out_codes_that_cannot_be_compared(self, latents, autoencoder, pictures, tmp_path):
        plain = encoded(autoencoder, pictures / NAMES[0], tmp_path / "plain")
        self.refuse(latents, tmp_path / "prior", "another set of classes", held_out=plain)
        larger = encoded(autoencoder, pictures, tmp_path / "larger", resolution=32)
        self.refuse(latents, tmp_path / "prior", "another size", held_out=larger)

    def test_an_output_that_is_something_else(self, latents, tmp_path):
        (tmp_path / "prior").mkdir()
        self.refuse(latents, tmp_path / "prior", "is no prior over codes")

    def test_a_run_of_another_network(self, latents, tmp_path):
        train(latents, tmp_path / "prior", PriorConfig(**TINY, steps=1), console=QUIET)
        wider = PriorConfig(**{**TINY, "width": 64}, steps=2)
        with pytest.raises(UserError, match=r"another width.*or width 32"):
            train(latents, tmp_path / "prior", wider, console=QUIET)

    def test_a_folder_whose_parts_do_not_belong_together(self, latents, tmp_path):
        output = train(latents, tmp_path / "prior", PriorConfig(**TINY, steps=1), console=QUIET)
        record = json.loads((output / "index_prior.json").read_text())

        def refuse(words, **changes):
            (output / "index_prior.json").write_text(json.dumps(record | changes))
            with pytest.raises(UserError, match=words):
                IndexPrior.from_pretrained(output, "cpu")

        refuse("another codebook", codebook_sha256="0")
        refuse("has 19 tokens", vocabulary=record["vocabulary"] | {"classes": 3})
        refuse("has the format 'x'", format="x")
        refuse("is damaged", vocabulary=3)
        with pytest.raises(UserError, match="holds no prior over codes"):
            IndexPrior.from_pretrained(tmp_path, "cpu")

    def test_weights_that_are_cut_short_or_missing(self, latents, tmp_path):
        output = train(latents, tmp_path / "prior", PriorConfig(**TINY, steps=1), console=QUIET)
        file = output / "prior/model.safetensors"
        whole = file.read_bytes()
        weights = load(whole)  # not from the file, which is mapped where it is read
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="cannot load"):
            IndexPrior.from_pretrained(output, "cpu")
        name = next(name for name in weights if "q_proj" in name)
        save_file({k: v for k, v in weights.items() if k != name}, file, {"format": "pt"})
        with pytest.raises(UserError, match=f"is damaged: it has no {name}"):
            IndexPrior.from_pretrained(output, "cpu")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--heads", "5"], "heads 5 does not divide width 384"),
            (
                ["--no-labels", "--label-dropout", "0.5"],
                "label_dropout is for training with labels",
            ),
            (["--batch-size", "0"], "--batch-size"),
        ],
    )
    def test_the_command_says_it_in_a_sentence(self, latents, tmp_path, options, words):
        result = CliRunner().invoke(app, [str(latents), str(tmp_path / "prior"), *options])
        assert result.exit_code == 2
        assert words in result.output

    def test_the_sampler_says_it_in_a_sentence(self, latents, tmp_path):
        output = train(latents, tmp_path / "prior", PriorConfig(**TINY, steps=1), console=QUIET)

        def refuse(words, *options, folder=output):
            result = CliRunner().invoke(sampling, [str(folder), *options])
            assert result.exit_code == 2
            assert words in result.output

        sheet = ["--out", str(tmp_path / "sheet.png")]
        refuse("class 'dog' is unknown: astronaut, chelsea", *sheet, "--class", "dog")
        refuse("class 2: there is no such class (0 to 1)", *sheet, "--class", "2")
        refuse("name one by --class", *sheet, "--guidance-scale", "2")
        refuse("a sheet is a .png", "--out", str(tmp_path / "sheet.jpg"))
        refuse("holds no prior", *sheet, folder=tmp_path)


@pytest.mark.slow
def test_the_commands_from_codes_to_a_sheet(latents, tmp_path):
    def run(script, *arguments):
        command = [sys.executable, str(PIPELINES / script), *map(str, arguments)]
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 250}
        result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return result.stdout

    shape = ["--width", 32, "--depth", 2, "--heads", 2, "--batch-size", 4, "--warmup-steps", 2]
    run("train_index_prior.py", latents, "prior", *shape, "--steps", 4, "--held-out", latents)
    assert rows_of(tmp_path / "prior-run/log.jsonl")[-1]["group"] == "held_out"
    classes = ["--class", "chelsea", "--class", 0]
    options = ["--count", 3, "--out", "sheet.png", "--guidance-scale", 1.5, "--top-k", 8]
    assert "6 pictures" in run("sample_index_prior.py", "prior", *classes, *options)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 128
        assert sheet.height > 3 * 128


@pytest.mark.slow
def test_two_processes_learn_and_measure_what_one_does(latents, tmp_path):
    options = {**TINY, "steps": 6, "learning_rate": 1e-3}
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    # `accelerate launch --cpu` starts one process whatever it is told, unless by mpirun.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    script = [str(PIPELINES / "train_index_prior.py"), str(latents), str(tmp_path / "prior")]
    script += ["--held-out", str(latents)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    environment["PYTHONPATH"] = str(PIPELINES.parent)
    subprocess.run([*launch, *script, *arguments], env=environment, check=True, timeout=250)
    state = state_of(tmp_path / "prior-run/checkpoint.pt")
    assert state["step"] == 6

    # The same by hand: the mean of both processes' gradients at each step.
    data, config = open_codes(latents), PriorConfig(**options)
    trainer = Trainer(config, data, ONE, "", tmp_path / "one")
    halves = [Examples(data, ONE, config, (rank, 2)) for rank in range(2)]
    for step in range(6):
        trainer.update([torch.cat([half[step] for half in halves])], trainer.progress())
    for name, value in trainer.prior.state_dict().items():
        torch.testing.assert_close(state["prior"][name], value, atol=2e-4, rtol=1e-3)
    found = rows_of(tmp_path / "prior-run/log.jsonl")[-1]
    for name, value in trainer.measure(data).items():
        assert found[name] == pytest.approx(value, rel=1e-4)
