"""The evaluation as a whole: against stock diffusers, in other shapes, in several processes."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import NAMES, photograph, photograph_tensor
from PIL import Image

from latent_ae import Evaluation, UserError, compare, evaluate, load_network
from latent_ae.autoencoder import decode_latents
from latent_ae.bottlenecks import split_moments
from latent_ae.config import Protocol, SourceConfig
from latent_ae.data import CenterCrop, evaluation_batches, normalize, to_uint8
from latent_ae.evaluation import lanczos_reduction
from latent_ae.evaluation.result import intervals_of
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.metrics import ReconstructionMetrics

SMALL = Protocol(name="small", resolution=64)


@pytest.fixture(scope="module")
def result_folder(exported, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "tiny"
    evaluate(exported, photos, SMALL, out=out, name="tiny", batch_size=3, probes=4, pictures=3)
    return out


@pytest.fixture(scope="module")
def result(result_folder):
    return Evaluation.load(result_folder)


def test_it_is_the_reconstruction_of_stock_diffusers(result, exported, photos):
    network, wanted = load_network(exported), ReconstructionMetrics()
    for batch in evaluation_batches(SourceConfig(path=str(photos)), 64):
        with torch.no_grad():
            decoded = network(normalize(batch.images), sample_posterior=False).sample
        wanted.update(batch.images, decoded)
    assert result.metrics == pytest.approx(wanted.compute(), rel=1e-4)
    assert result.content["data"]["images"] == 4
    assert result.content["model"]["values_per_image"] == 4 * 32 * 32
    assert result.reference("Lanczos")["psnr"] > 20
    assert result.content["protocol"] == SMALL.model_dump(mode="json")
    assert (
        evaluate(
            exported, photos, Protocol(resolution=64, images=2), quick=True, references=()
        ).content["data"]["images"]
        == 2
    )


def test_the_folder_holds_what_the_evaluation_says(result, result_folder):
    table = pyarrow.parquet.read_table(result_folder / "per_image.parquet").to_pylist()
    assert [row["key"] for row in table] == [f"{name}.png" for name in NAMES]
    for name, mean in result.metrics.items():
        assert mean == pytest.approx(np.mean([row[name] for row in table]))
    assert table[0]["width"] == 144
    content = result.content
    assert "ms_ssim" not in result.metrics  # 64 pixels are too few for it
    for name in ("model", "latents", "probes", "precision", "frechet", "references"):
        assert content[name], name
    files = [*content["pictures"]["map"]]
    for shown in (*content["pictures"]["shown"], *content["pictures"]["worst"]):
        files += [shown["input"], shown["reconstruction"]]
    for rows in (content["pictures"]["prior"], content["pictures"]["interpolations"]):
        files += [file for row in rows for file in row["files"]]
    assert len(content["pictures"]["shown"]) == 3
    assert {f"pictures/{path.name}" for path in (result_folder / "pictures").iterdir()} == set(
        files
    )
    worst = [shown["metrics"]["lpips"] for shown in content["pictures"]["worst"]]
    assert worst == sorted((row["lpips"] for row in table), reverse=True)[:3]
    json.dumps(content, allow_nan=False)


def test_latents_are_those_of_the_network(result, exported, photos):
    network, means, variances = load_network(exported), [], []
    for batch in evaluation_batches(SourceConfig(path=str(photos)), 64):
        with torch.no_grad():
            posterior = network.encode(normalize(batch.images)).latent_dist
        means.append(posterior.mean.double())
        variances.append(posterior.var.double())
    mean, variance = torch.cat(means), torch.cat(variances)
    std = (mean.var((0, 2, 3), correction=0) + variance.mean((0, 2, 3))).sqrt()
    channels = result.content["latents"]["channels"]
    assert [c["mean"] for c in channels] == pytest.approx(mean.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert [c["std"] for c in channels] == pytest.approx(std.tolist(), rel=1e-4)


def test_a_draw_is_seeded_by_picture_and_scored_worse(exported, photos):
    """Against posteriors drawn by hand, and whatever the batches are."""
    options = {"quick": True, "references": ()}
    drawn = Protocol(resolution=64, code="sample", seed=3)
    a, b = (evaluate(exported, photos, drawn, batch_size=n, **options).per_image for n in (1, 3))
    for name in ("psnr", "ssim", "lpips"):
        np.testing.assert_allclose(a[name].to_numpy(), b[name].to_numpy(), rtol=1e-4)
    network = load_network(exported)
    image = CenterCrop(64)(Image.open(photos / "astronaut.png").convert("RGB"))[None]
    with torch.no_grad():
        mean, logvar = split_moments(network.encode(normalize(image)).latent_dist.parameters)
        noise = torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(3 << 32))
        decoded = to_uint8(decode_latents(network, mean + (0.5 * logvar).exp() * noise))
    wanted = ReconstructionMetrics(lpips=()).measure(image, decoded)["psnr"].item()
    assert a["psnr"][0].as_py() == pytest.approx(wanted, abs=1e-3)
    mode = evaluate(exported, photos, Protocol(resolution=64), **options).per_image
    assert mode["psnr"][0].as_py() != pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_sizes_that_the_factor_does_not_divide(exported, photos, fit):
    protocol = Protocol(resolution=65, fit=fit)
    result = evaluate(exported, photos, protocol, quick=True, references=())
    network = load_network(exported)
    image = CenterCrop(65)(Image.open(photos / "astronaut.png").convert("RGB"))[None]
    if fit == "crop":
        image = image[..., :64, :64]
    padded = torch.nn.functional.pad(normalize(image), (0, 1, 0, 1), mode="replicate")
    with torch.no_grad():
        decoded = network(padded if fit == "pad" else normalize(image)).sample
    decoded = to_uint8(decoded[..., : image.shape[-2], : image.shape[-1]])
    wanted = ReconstructionMetrics(lpips=()).measure(image, decoded)["psnr"].item()
    assert result.per_image["psnr"][0].as_py() == pytest.approx(wanted, abs=1e-3)


def test_pictures_at_their_own_size(exported, photos, tmp_path):
    protocol = Protocol(name="native", resolution=None, resize="none")
    mixed = tmp_path / "mixed"
    shutil.copytree(photos, mixed)
    photograph("coffee").resize((200, 24)).save(mixed / "z-icon.png")  # no metric fits into it
    result = evaluate(exported, mixed, protocol, out=tmp_path / "out", probes=2)
    sizes = {(row["width"], row["height"]) for row in result.per_image.to_pylist()}
    assert len(sizes) > 1
    assert math.isfinite(result.metrics["psnr"])
    assert result.content["latents"]["active_units"] is None  # units of other sizes are other units
    assert [skip["key"] for skip in result.content["data"]["skipped"]] == ["z-icon.png"]
    shown = result.content["pictures"]["shown"][0]
    with Image.open(tmp_path / "out" / shown["input"]) as picture:
        assert picture.size == (144, 144)


def test_reconstructions_without_numbers_are_named_and_in_no_mean(
    exported, photos, monkeypatch, result
):
    def decode(self, latents, size=None, *, stock=FrozenAutoencoder.decode):
        pictures = stock(self, latents, size)
        if len(pictures) == 4:
            pictures[1, 0, 5, 5] = math.nan
        return pictures

    monkeypatch.setattr(FrozenAutoencoder, "decode", decode)
    broken = evaluate(exported, photos, SMALL, batch_size=4, probes=2)
    assert broken.content["data"]["not_finite"] == ["chelsea.png"]
    rows = result.per_image.to_pylist()
    wanted = np.mean([row["psnr"] for row in rows if row["key"] != "chelsea.png"])
    assert broken.metrics["psnr"] == pytest.approx(wanted, rel=1e-4)
    assert broken.content["frechet"]["images"] == 3
    assert broken.per_image.to_pylist()[1]["psnr"] is None
    assert broken.content["latents"]["images"] == 3


def test_a_network_without_numbers_is_one_sentence(exported, photos, tmp_path):
    network = load_network(exported)
    with torch.no_grad():
        network.decoder.conv_out.bias.fill_(math.nan)
    network.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match=r"every picture by .*broken in fp32 holds NaN"):
        evaluate(tmp_path / "broken", photos, SMALL)


def test_few_pictures_are_marked(result):
    frechet = result.content["frechet"]
    assert frechet["images"] == 4
    assert "4 pictures for 256 features" in frechet["note"]


def test_one_picture_has_no_interval_and_no_distance(exported, photos):
    one = evaluate(exported, photos, Protocol(resolution=64, images=1), probes=1)
    assert one.content["frechet"]["distance"] is None
    assert one.intervals == {}
    json.dumps(one.to_json(), allow_nan=False)


def test_intervals_are_those_of_the_normal_theory():
    values = np.random.default_rng(0).normal(30, 2, 400)
    low, high = intervals_of([{"psnr": value, "key": "a"} for value in values])["psnr"]
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_lanczos_keeps_as_many_numbers_as_it_may():
    images = to_uint8(photograph_tensor("coffee", 64))
    assert torch.equal(lanczos_reduction(images, 3 * 64 * 64), images)
    errors = [
        (lanczos_reduction(images, values).float() - images.float()).square().mean().item()
        for values in (3 * 32 * 32, 3 * 16 * 16, 3)
    ]
    assert errors == sorted(errors)
    flat = lanczos_reduction(images, 3)[0]
    assert flat.flatten(1).float().std(1).max() == 0


def test_only_what_was_measured_alike_is_compared(result_folder, exported, photos, tmp_path):
    results, folders = compare(
        [result_folder, exported], photos, SMALL, out=tmp_path / "out", quick=True, references=()
    )
    assert [r.name for r in results] == ["tiny", exported.name]
    assert results[0].metrics == pytest.approx(results[1].metrics, rel=1e-4)
    assert folders == [result_folder, tmp_path / "out" / exported.name]
    drawn = Protocol(name="small", resolution=64, code="sample")
    with pytest.raises(UserError, match=r"differ in code \(mode and sample\)"):
        compare([result_folder, exported], photos, drawn, quick=True)
    (tmp_path / "one").mkdir()
    photograph("coffee").save(tmp_path / "one/coffee.png")
    with pytest.raises(UserError, match=r"the pixels .*4 and 1 pictures"):
        compare([result_folder, exported], tmp_path / "one", SMALL, quick=True)
    with pytest.raises(UserError, match="give --data"):
        compare([result_folder, exported])


def test_a_stored_result_is_not_measured_again(exported, photos, tmp_path, monkeypatch):
    options = {"out": tmp_path / "out", "quick": True, "references": ()}
    (first,), _ = compare([exported], photos, SMALL, **options)

    def fail(*_, **__):
        raise AssertionError("measured again")

    module = importlib.import_module("latent_ae.evaluation.compare")  # `compare` hides it
    monkeypatch.setattr(module, "evaluate", fail)
    (again,), _ = compare([exported], photos, SMALL, **options)
    assert again.metrics == first.metrics
    with pytest.raises(AssertionError, match="measured again"):
        compare([exported], photos, Protocol(resolution=72), **options)


def test_a_stored_result_of_other_questions_is_not_taken(exported, photos, tmp_path):
    options = {"out": tmp_path / "out", "quick": True, "references": ()}
    compare([exported], photos, SMALL, **options)
    with pytest.raises(UserError, match="holds a result already"):
        compare([exported], photos, SMALL, **{**options, "references": ("Lanczos",)})
    other = SourceConfig(path=str(photos), split="validation")
    with pytest.raises(UserError, match="holds a result already"):
        compare([exported], other, SMALL, **options)


def test_any_module_gives_features_and_is_named(exported, photos, result_folder):
    class Colours(torch.nn.Module):
        num_features = 3

        def forward(self, images):
            return images.float().mean((2, 3))

    own = {"feature_network": Colours(), "quick": True, "references": ()}
    frechet = evaluate(exported, photos, SMALL, **own).content["frechet"]
    assert (frechet["network"], frechet["features"]) == ("Colours", 3)
    with pytest.raises(UserError, match="networks or weights"):
        compare([result_folder, exported], photos, SMALL, **own)


def test_names_and_order_of_pictures_do_not_matter_to_the_hash(exported, photos, tmp_path, result):
    for i, name in enumerate(reversed(NAMES)):
        (tmp_path / f"{i}.png").write_bytes((photos / f"{name}.png").read_bytes())
    other = evaluate(exported, tmp_path, SMALL, quick=True, references=())
    assert other.content["data"]["pixels_sha256"] == result.content["data"]["pixels_sha256"]


def test_nothing_measured_is_overwritten(exported, photos, result_folder):
    before = {path: path.read_bytes() for path in result_folder.rglob("*.*")}
    with pytest.raises(UserError, match="holds a result already"):
        evaluate(exported, photos, SMALL, out=result_folder)
    assert {path: path.read_bytes() for path in result_folder.rglob("*.*")} == before


def test_wrong_input(exported, photos, tmp_path):
    with pytest.raises(UserError, match="no exported autoencoder"):
        evaluate(tmp_path, photos)
    with pytest.raises(UserError, match="there is no folder"):
        evaluate(exported, tmp_path / "none")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"other files \(notes.txt\)"):
        evaluate(exported, photos, out=tmp_path)
    with pytest.raises(UserError, match="no result of an evaluation"):
        Evaluation.load(tmp_path)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        Evaluation.load(tmp_path)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(result, exported, photos, tmp_path):
    (tmp_path / "small.yaml").write_text("{name: small, resolution: 64}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "latent_ae", "evaluate", str(exported), str(photos)]
    command += ["--protocol", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--batch-size", "1", "--name", "tiny"],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PSNR ↑") == 1
    two = Evaluation.load(tmp_path / "out")
    assert two.content["processes"] == 2
    assert two.metrics == pytest.approx(result.metrics, rel=1e-5)
    assert two.intervals["psnr"] == pytest.approx(result.intervals["psnr"], rel=1e-5)
    assert two.content["frechet"]["distance"] == pytest.approx(
        result.content["frechet"]["distance"], rel=1e-3
    )
    assert two.content["data"] == {**result.content["data"], "path": str(photos)}
    one, other = (r.content["latents"] for r in (result, two))
    assert other["aggregate"] == pytest.approx(one["aggregate"], rel=1e-4)
    assert other["spectrum"]["latents"] == pytest.approx(one["spectrum"]["latents"], rel=1e-4)
    shown = two.content["pictures"]["shown"]
    assert [row["key"] for row in shown] == [f"{name}.png" for name in NAMES]
