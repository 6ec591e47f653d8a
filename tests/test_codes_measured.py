"""How codes are counted and coded: against closed forms, scipy, and the stream itself."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import NAMES
from PIL import Image
from test_report import Page

from latent_ae import Evaluation, compare, evaluate
from latent_ae.config import Protocol, SourceConfig
from latent_ae.data import evaluation_batches, normalize
from latent_ae.evaluation import code_usage
from latent_ae.evaluation.code_stream import read_codes, write_codes
from latent_ae.evaluation.code_usage import CodeUsage, expected_usage
from latent_ae.evaluation.report import write_report
from latent_ae.evaluation.report.numbers import fixed, percent
from latent_ae.evaluation.tables import codes_table, warnings_of
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.quantized import QuantizedAutoencoder
from latent_ae.stock_vq import stock_of

SMALL = Protocol(name="small", resolution=64)
KINDS = {
    "vq": {"num_vq_embeddings": 32},
    "directions": {"num_vq_embeddings": 32, "normalized": True},
    "heads": {"num_vq_embeddings": 16, "heads": 2},
    "residual": {"num_vq_embeddings": 16, "heads": 2, "depth": 2},
    "fsq": {"quantizer": "fsq", "levels": (8, 5, 5, 5)},
    "lfq": {"quantizer": "lfq", "latent_channels": 18},
}
STOCK = ("vq", "directions")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A folder of each kind; two of them diffusers' own `VQModel`."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("quantised")
    for kind, said in KINDS.items():
        network = QuantizedAutoencoder(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            mid_block_add_attention=False,
            **{"latent_channels": 4, **said},
        )
        if said.get("quantizer", "vq") == "vq":
            torch.nn.init.normal_(network.quantize.codebooks, std=0.3)
        (stock_of(network) if kind in STOCK else network).save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


def usage_of(rows, size, heads=1):
    """What one picture of numbers, a row a slot, is worth."""
    found = CodeUsage(size, heads)
    found.update(torch.tensor(np.array(rows))[None, :, None], pixels=64, positions=[0])
    return found.summary()


def test_numbers_all_alike():
    rng = np.random.default_rng(0)
    summary = usage_of([rng.permutation(np.arange(4096) % 64)], 64)
    assert summary["usage"] == 1
    assert summary["dead"] == 0
    assert summary["perplexity"] == pytest.approx(64)
    assert summary["entropy_bits"] == pytest.approx(6)
    assert summary["bits_per_pixel"]["fixed_length"] == 6 * 4096 / 64
    assert summary["bits_per_pixel"]["entropy"] == pytest.approx(6 * 4096 / 64)
    # What is left above it is what the coder has to learn: about ½ log₂ N bits an entry.
    assert 0 < summary["bits_per_image"]["coded"] - 6 * 4096 < 64 * 0.5 * math.log2(4096) * 2
    assert [y for _, y in summary["slots"][0]["curve"]] == pytest.approx([1] * 64)


def test_one_number_alone():
    summary = usage_of([np.full(4096, 5)], 1024)
    assert summary["usage"] == 1 / 1024
    assert summary["dead"] == 1023
    assert summary["perplexity"] == pytest.approx(1)
    assert summary["entropy_bits"] == pytest.approx(0, abs=1e-12)
    assert summary["bits_per_pixel"]["fixed_length"] == 10 * 4096 / 64
    assert summary["bits_per_image"]["coded"] < 500  # of 40,960
    assert summary["slots"][0]["largest_share"] == 1
    assert summary["slots"][0]["curve"] == [[1 / 1024, 1024]]


@pytest.mark.parametrize("size", [1024, 2**18, 2**31])
def test_a_known_histogram_is_scipys(size):
    rng = np.random.default_rng(1)
    rows = [rng.choice(size, 40, replace=False)[rng.zipf(1.6, 3000) % 40] for _ in range(4)]
    summary = usage_of(rows, size, heads=2)
    for row, slot in zip(rows, summary["slots"], strict=True):
        counts = np.unique(row, return_counts=True)[1]
        assert slot["entropy_bits"] == pytest.approx(scipy.stats.entropy(counts, base=2))
        assert slot["perplexity"] == pytest.approx(np.exp(scipy.stats.entropy(counts)))
        assert slot["usage"] == len(counts) / size
        assert slot["dead"] == size - len(counts)
        ranks, heights = np.array(slot["curve"]).T
        assert ranks[-1] == len(counts) / size
        np.testing.assert_allclose(heights, np.sort(counts)[::-1] * size / 3000)
    assert [(slot["level"], slot["head"]) for slot in summary["slots"]] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert summary["positions"] == 3000
    assert summary["per_position"] == 4
    assert summary["dead"] == sum(slot["dead"] for slot in summary["slots"])
    mean = np.mean([slot["entropy_bits"] for slot in summary["slots"]])
    assert summary["bits_per_image"]["entropy"] == pytest.approx(4 * 3000 * mean)
    assert summary["perplexity"] == pytest.approx(2**mean)


def test_expected_usage_is_that_of_draws():
    rng = np.random.default_rng(2)
    met = [len(np.unique(rng.integers(300, size=200))) / 300 for _ in range(400)]
    assert expected_usage(300, 200) == pytest.approx(np.mean(met), abs=4 * np.std(met) / 20)
    assert expected_usage(2**31, 1000) == pytest.approx(1000 / 2**31, rel=1e-5)
    assert expected_usage(1, 10) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 2**16, 2**16 + 1, 2**18, 2**31])
@pytest.mark.parametrize("length", [0, 1, 31, 33, 2000])
def test_a_stream_gives_its_numbers_back(size, length):
    rng = np.random.default_rng(size + length)
    even = rng.integers(size, size=length)
    skewed = (rng.zipf(1.3, length) - 1) % size
    numbers = np.stack([even, skewed, np.full(length, size - 1)])
    stream = write_codes(numbers, size)
    assert stream.dtype == np.uint32
    np.testing.assert_array_equal(read_codes(stream, numbers.shape, size), numbers)


def test_entries_beyond_those_that_have_a_probability(monkeypatch):
    monkeypatch.setattr("latent_ae.evaluation.code_stream._MOST_KNOWN", 10)
    numbers = (np.random.default_rng(3).zipf(1.3, (2, 3000)) - 1) % 500
    np.testing.assert_array_equal(read_codes(write_codes(numbers, 500), (2, 3000), 500), numbers)


def test_a_stream_is_near_what_theory_allows():
    """Against the entropy of the source, and, of few draws from many, their fixed length."""
    rng = np.random.default_rng(4)
    shares = 1 / np.arange(1, 257)
    shares /= shares.sum()
    numbers = rng.permutation(256)[rng.choice(256, (1, 200_000), p=shares)]
    bits = 8 * write_codes(numbers, 256).nbytes / numbers.size
    entropy = scipy.stats.entropy(shares, base=2)
    assert entropy - 0.02 < bits < 1.02 * entropy
    # Pictures that differ cost no more: half of them use one half of the codebook.
    halves = np.concatenate([rng.integers(32, size=20_000), rng.integers(32, 64, size=20_000)])
    assert 8 * write_codes(halves[None], 64).nbytes / 40_000 == pytest.approx(6, abs=0.03)
    sparse = rng.integers(2**18, size=(1, 5000))
    assert 8 * write_codes(sparse, 2**18).nbytes / 5000 == pytest.approx(18, abs=0.1)


def test_a_stream_that_lies_is_noticed(monkeypatch):
    def wrong(*asked):
        return read_codes(*asked)[:, ::-1]

    monkeypatch.setattr(code_usage, "read_codes", wrong)
    with pytest.raises(RuntimeError, match="does not give the codes back"):
        usage_of([np.arange(50)], 64)


def test_shares_of_processes_add_up_to_the_whole():
    indices = torch.randint(2**18, (6, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    whole, first, second = (CodeUsage(2**18, 2) for _ in range(3))
    whole.update(indices, 64, range(6))
    second.update(indices[1::2], 64, [1, 3, 5])
    first.update(indices[::2], 64, [0, 2, 4])
    second.merge(first)
    second.merge(CodeUsage(2**18, 2))  # a process without a picture
    assert second.summary() == whole.summary()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_measured(quantised, photos, kind):
    """By codes that are taken anew, with stock diffusers where it can."""
    result = evaluate(quantised[kind], photos, SMALL, quick=True, references=("JPEG",))
    codes, frozen = result.content["codes"], FrozenAutoencoder(quantised[kind])
    taken = []
    for batch in evaluation_batches(SourceConfig(path=str(photos)), 64):
        images = normalize(batch.images)
        latents = frozen.encode(images)[0]
        taken.append(frozen.indices(latents).transpose(0, 1).flatten(1))
        if kind in STOCK:
            import diffusers

            stock = diffusers.VQModel.from_pretrained(quantised[kind])
            with torch.no_grad():
                found = stock.quantize(stock.encode(images).latents)[2][2]
            assert torch.equal(found.flatten(), taken[-1].flatten())
    numbers = torch.cat(taken, 1).numpy()
    assert codes["size"] == frozen.codebook_size
    assert codes["per_position"] == frozen.codes == len(numbers)
    assert codes["positions"] == numbers.shape[1] == 4 * 32 * 32
    for row, slot in zip(numbers, codes["slots"], strict=True):
        counts = np.unique(row, return_counts=True)[1]
        assert slot["entropy_bits"] == pytest.approx(scipy.stats.entropy(counts, base=2))
    assert codes["bits_per_pixel"]["fixed_length"] == pytest.approx(
        math.log2(frozen.codebook_size) * numbers.size / (4 * 64 * 64)
    )
    model = result.content["model"]
    assert codes["bits_per_image"]["fixed_length"] == pytest.approx(model["bits_per_image"])
    assert result.content["references"][0]["bits_per_image"] <= model["bits_per_image"]
    assert codes["bits_per_image"]["coded"] == 8 * write_codes(
        numbers, frozen.codebook_size
    ).nbytes / len(NAMES)
    told = [one for one in warnings_of([result]) if "fixed length" in one]
    bits = codes["bits_per_image"]
    assert len(told) == (bits["coded"] < 0.9 * bits["fixed_length"])
    json.dumps(result.to_json(), allow_nan=False)


def test_pictures_at_their_own_size(quantised, photos):
    """Bits of all over pixels of all, also where the factor does not divide a side."""
    native = Protocol(resolution=None, resize="none", lpips=(), frechet=None)
    result = evaluate(quantised["vq"], photos, native, quick=True, references=())
    codes, positions, pixels = result.content["codes"], 0, 0
    for file in photos.iterdir():
        with Image.open(file) as picture:
            width, height = picture.size
        positions += -(-width // 2) * -(-height // 2)
        pixels += width * height
    assert codes["positions"] == positions
    assert codes["bits_per_pixel"]["fixed_length"] == pytest.approx(5 * positions / pixels)


def test_a_posterior_has_no_codes(exported, photos):
    result = evaluate(exported, photos, SMALL, quick=True, references=())
    assert result.content["codes"] is None


def test_the_report_and_the_table_put_codes_side_by_side(quantised, exported, photos, tmp_path):
    models = [quantised["residual"], quantised["lfq"], exported]
    out = tmp_path / "out"
    options = {"references": (), "probes": 2, "pictures": 1}
    results, folders = compare(
        models, photos, Protocol(resolution=64, images=2), out=out, **options
    )
    text = write_report(folders, out / "report.html").read_text()
    page = Page(text)
    assert "codes" in page.ids
    assert "#codes" in page.links
    assert f"{folders[2].name}: its latents are not quantised." in page.text
    for result in results[:2]:
        codes = result.content["codes"]
        for key in ("fixed_length", "entropy", "coded"):
            assert fixed(codes["bits_per_pixel"][key], 4) in page.text
            assert fixed(codes["bits_per_image"][key], 0) in page.text
        assert fixed(codes["dead"], 0) in page.text
        assert percent(codes["usage_uniform"], 1) in page.text
        titles = [one["title"] for one in result.content["pictures"]["prior"]]
        assert titles == ["codes, all equally likely", "codes, as likely as they occur"]
    for level in range(2):
        for head in range(2):
            assert f"level {level}, head {head}" in page.text
    assert page.text.count("How often each entry occurs") >= 2
    columns = [list(column.cells) for column in codes_table(results).columns]
    assert len(columns) == 4
    assert set(columns[3]) == {"–"}
    assert f"{100 * results[1].content['codes']['usage']:.1f} %" in columns[2]
    plain = write_report(folders[2:], out / "plain.html").read_text()
    assert 'id="codes"' not in plain


def test_a_result_without_the_key_is_still_read(quantised, photos, tmp_path):
    out = tmp_path / "old"
    evaluate(quantised["vq"], photos, SMALL, out=out, quick=True, references=(), pictures=0)
    content = json.loads((out / "evaluation.json").read_text())
    del content["codes"]
    (out / "evaluation.json").write_text(json.dumps(content))
    (old,), folders = compare([out])
    assert old.content.get("codes") is None
    assert 'id="codes"' not in write_report(folders, out / "report.html").read_text()


@pytest.mark.slow
def test_two_processes_count_what_one_does(quantised, photos, tmp_path):
    one = evaluate(quantised["residual"], photos, SMALL, quick=True, references=(), batch_size=1)
    (tmp_path / "small.yaml").write_text("{name: small, resolution: 64}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "latent_ae", "evaluate"]
    command += [str(quantised["residual"]), str(photos), "--protocol", str(tmp_path / "small.yaml")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--batch-size", "1", "--quick"],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("coded stream") == 1
    two = Evaluation.load(tmp_path / "out")
    assert two.content["processes"] == 2
    assert two.content["codes"] == one.to_json()["codes"]
