"""The benchmarks of speed: what they count is right, and each of them runs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # behind the others: one is called `evaluate`

import measuring  # noqa: E402
import roofline  # noqa: E402


def small_network():
    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        ).eval()


def hand_count(layers):
    """Operations, and elements read and written, of (kernel, in, out, side in, side out)."""
    operations = sum(2 * k * k * a * b * after**2 for k, a, b, _, after in layers)
    elements = sum(
        a * before**2 + k * k * a * b + b + b * after**2 for k, a, b, before, after in layers
    )
    return operations, elements


def attention_count(channels, side):
    positions = side**2
    linear = 4 * 2 * channels**2 * positions  # queries, keys, values, and what comes out
    products = 2 * 2 * channels * positions**2
    weights = 4 * (channels**2 + channels) + 2 * channels  # and the normalisation's
    return linear + products, 2 * channels * positions + weights


# (kernel, channels in and out, side in and out), written out from diffusers' classes.
ENCODER = (
    (3, 3, 8, 32, 32),
    (3, 8, 8, 32, 32),
    (3, 8, 8, 32, 32),
    (3, 8, 8, 32, 16),
    (3, 8, 16, 16, 16),
    (3, 16, 16, 16, 16),
    (1, 8, 16, 16, 16),
    *[(3, 16, 16, 16, 16)] * 4,
    (3, 16, 8, 16, 16),
    (1, 8, 8, 16, 16),
)
DECODER = (
    (1, 4, 4, 16, 16),
    (3, 4, 16, 16, 16),
    *[(3, 16, 16, 16, 16)] * 4,
    *[(3, 16, 16, 16, 16)] * 4,
    (3, 16, 16, 16, 32),
    (3, 16, 8, 32, 32),
    (3, 8, 8, 32, 32),
    (1, 16, 8, 32, 32),
    *[(3, 8, 8, 32, 32)] * 2,
    (3, 8, 3, 32, 32),
)


class TestCounts:
    @pytest.mark.parametrize(("part", "layers"), [("encoder", ENCODER), ("decoder", DECODER)])
    def test_of_a_network_are_those_by_hand(self, part, layers):
        counted = roofline.layers_at(small_network(), 32)[part]
        operations, elements = hand_count(layers)
        more, read = attention_count(16, 16)
        assert len(counted) == len(layers) + 1
        assert sum(layer.operations for layer in counted) == operations + more
        assert sum(layer.elements for layer in counted) == elements + read

    def test_are_told_by_layer(self):
        with torch.device("meta"):
            layers = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 2, 1))
        first, second = roofline.layers_of(layers, 1, 4, 6, 6)
        assert first == roofline.Layer("0", *hand_count([(3, 4, 8, 6, 6)]))
        assert second == roofline.Layer("2", *hand_count([(1, 8, 2, 6, 6)]))

    def test_grow_with_the_square_of_attention_alone(self):
        network = small_network()
        one, two = (roofline.layers_at(network, side)["encoder"] for side in (32, 64))
        parts = network.encoder.named_modules()
        names = {f"steps.0.{name}" for name, part in parts if isinstance(part, Attention)}
        for small, large in zip(one, two, strict=True):
            assert (large.operations > 4 * small.operations) == (small.name in names)
        assert names

    def test_the_floor_is_the_slower_of_both_for_each_layer(self):
        layers = [roofline.Layer("a", 1000, 10), roofline.Layer("b", 10, 1000)]
        # 1000 operations at 100/s take 10 s; 1000 elements of 4 bytes at 200 bytes/s take 20 s.
        assert roofline.floor(layers, rate=100, bandwidth=200, size=4) == pytest.approx(10 + 20)
        assert roofline.floor(layers, rate=100, bandwidth=200, size=2) == pytest.approx(10 + 10)


class TestRatio:
    def test_is_the_median_of_the_rounds_ratios(self):
        # A load slowed the whole of the second round.
        values = {"a": [2.0, 30.0, 2.0], "b": [1.0, 10.0, 1.0]}
        assert measuring.ratio(values, "a", "b") == 2.0
        assert measuring.ratio(values, "b", "a") == 0.5

    def test_is_none_without_one_of_both(self):
        assert measuring.ratio({"a": [1.0]}, "a", "b") is None
        assert measuring.cell(None) == "–"


def result_of(script, tmp_path, *options):
    """What a benchmark writes as JSON, and what it prints."""
    file = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / f"benchmarks/{script}.py"), *options, "--json", str(file)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


class TestTrainingMemory:
    def test_is_counted_by_layer(self, tmp_path):
        options = ("--network", "tiny", "--resolution", "64", "--precision", "fp32")
        found, printed = result_of("training_memory", tmp_path, *options)
        rows = found["rows"]["fp32"]
        totals = rows["totals"]
        assert totals["ours, checkpointing"] < totals["ours"] < 0.5 * totals["stock"]
        for i, name in enumerate(("stock", "ours")):
            assert sum(sizes[i] for sizes in rows["layers"].values()) == totals[name]
        assert f"`{found['run']['command']}`" in printed


@pytest.mark.slow
class TestMiniatures:
    def test_bounded_memory(self, tmp_path):
        options = ("--network", "tiny", "--resolution", "256", "--memory", "1.51", "--spill", ".")
        found, _ = result_of("bounded_memory", tmp_path, *options)
        rows = found["rows"]
        assert list(rows) == ["whole", "tiling", "accelerated", "strips"]
        assert "error" not in rows["whole"]
        assert rows["accelerated"]["error"] < 1e-3
        assert rows["strips"]["error"] < 1e-3 < rows["tiling"]["error"]
        assert all(0 < row["peak_bytes"] < math.inf for row in rows.values())

    def test_bounded_memory_is_counted(self, tmp_path):
        small, large = (
            result_of("bounded_memory", tmp_path, "--count", "--resolution", side)[0]["rows"]
            for side in ("4096", "8192")
        )
        assert large["activations"] == 4 * small["activations"]
        assert large["attention"] == 4 * small["attention"]
        assert small["result"] == 3 * 4096**2 * 4

    def test_inference(self, tmp_path):
        # Larger than the 64² picture that warms up a process, or its memory would not grow.
        options = ("--network", "tiny", "--resolution", "256", "--rounds", "1")
        found, printed = result_of("inference", tmp_path, *options)
        assert len(found["rows"]) == 6
        for part in ("encode", "decode"):
            best = found[part]
            assert best["row"] == "ours"
            assert 0 < best["speedup"] < math.inf
            assert 0 <= best["error"] < 1e-4
            assert 0 <= best["error_to_deviation"] < 1e-3
            assert 0 < best["peak_memory_ratio"] < math.inf
            stock = next(r for r in found["rows"] if (r["part"], r["row"]) == (part, "stock"))
            assert (stock["speedup"], stock["error"], stock["peak_memory_ratio"]) == (1, 0, 1)
        assert f"`{found['command']}`" in printed

    def test_inference_in_bf16_beside_stock_fp32(self, tmp_path):
        options = ("--network", "tiny", "--resolution", "64", "--rounds", "1", "--no-memory")
        found, _ = result_of("inference", tmp_path, *options, "--precision", "bf16")
        rows = {(r["part"], r["row"], r["precision"]): r for r in found["rows"]}
        assert len(rows) == 2 * 4
        for part in ("encode", "decode"):
            assert found[part]["precision"] == "bf16"
            assert rows[part, "stock", "fp32"]["error"] == 0
            assert 0 < rows[part, "stock", "bf16"]["error_to_deviation"] < 0.5
            assert 0 < rows[part, "ours", "bf16"]["error_to_deviation"] < 0.5

    def test_roofline(self, tmp_path):
        options = ("--network", "tiny", "--measure", "64", "--rounds", "1")
        found, _ = result_of("roofline", tmp_path, *options)
        sides = [(row["side"], row["part"]) for row in found["counted"]]
        assert sides == [(s, p) for s in (256, 512, 1024, 2048) for p in ("encoder", "decoder")]
        for row in found["counted"]:
            rate, bandwidth = found["matrix_rate"]["fp32"], found["copy_bandwidth"]
            alone = max(row["operations"] / rate, row["bytes_fp32"] / bandwidth)
            assert alone <= row["floor_fp32"] * (1 + 1e-9)
        kinds = {(r["part"], r["row"]) for r in found["measured"] if r["precision"] == "fp32"}
        assert kinds == {(p, k) for p in ("encoder", "decoder") for k in ("stock", "ours")}
        for row in found["measured"]:
            assert 0 < row["to_floor"] < math.inf
            assert 0 < row["share_of_rate"] < math.inf

    def test_startup(self, tmp_path):
        found, _ = result_of("startup", tmp_path, "--rounds", "1", "--cold")
        assert [row["command"].split(",")[0] for row in found["rows"]] == [
            "latent-ae --help",
            "latent-ae train",
            "latent-ae encode",
        ]
        for row in found["rows"]:
            assert row["checkout"] == "this"
            assert row["wall_to_other"] is None
            assert 0 < row["processor"] < math.inf
            assert 0 < row["wall"] < math.inf
