import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import photograph_tensor
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from latent_ae import UserError, export_run, train
from latent_ae.bottlenecks import split_moments
from latent_ae.config import NetworkConfig
from latent_ae.data import TrainingStream, normalize
from latent_ae.export import IGNORED_BY
from latent_ae.run_folder import RunFolder
from latent_ae.scaling import LatentScaling, LatentStatistics


def test_the_averaged_weights_are_exported_bit_for_bit(run_folder, exported):
    averaged = load_file(RunFolder(run_folder).checkpoint(4) / "ema.safetensors")
    written = load_file(exported / "diffusion_pytorch_model.safetensors")
    assert averaged.keys() == written.keys()
    assert all(torch.equal(averaged[name], written[name]) for name in averaged)


def test_stock_diffusers_loads_it_where_latent_ae_cannot_be_imported(exported, tmp_path):
    script = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "latent_ae":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
import torch
from diffusers import AutoencoderKL
vae = AutoencoderKL.from_pretrained({str(exported)!r})
images = torch.load({str(tmp_path / "images.pt")!r}, weights_only=True)
with torch.no_grad():
    torch.save(vae(images).sample, {str(tmp_path / "out.pt")!r})
assert "latent_ae" not in sys.modules
"""
    images = photograph_tensor("coffee")
    torch.save(images, tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    ours = AutoencoderKL.from_pretrained(exported)
    with torch.no_grad():
        wanted = ours(images).sample
    torch.testing.assert_close(torch.load(tmp_path / "out.pt", weights_only=True), wanted)


def test_scale_makes_the_latents_unit_variance(run_folder, exported):
    """Measured again from samples, by numpy-like arithmetic and not the exporter's formula."""
    network = AutoencoderKL.from_pretrained(exported)
    config = RunFolder(run_folder).config()
    stream = TrainingStream(config.data)
    torch.manual_seed(0)
    with torch.no_grad():
        crops = [normalize(next(stream).images) for _ in range(4)]
        samples = torch.cat([network.encode(c).latent_dist.sample() for c in crops])
    final = LatentScaling.of(network).to_final(samples)
    assert final.std().item() == pytest.approx(1, rel=0.02)


def test_files_and_record(exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "README.md",
        "latent_ae.json",
    }
    record = json.loads((exported / "latent_ae.json").read_text())
    assert record["trained"] == {"steps": 4, "images": 8}
    assert record["metrics"].keys() == {"step", "psnr", "ssim", "lpips"}
    assert record["latents"]["images"] >= 8
    assert "_name_or_path" not in json.loads((exported / "config.json").read_text())
    card = (exported / "README.md").read_text()
    for word in ("scaling_factor", "psnr", "licen", "AutoencoderKL"):
        assert word in card


@pytest.mark.parametrize("statistics", ["shift", "channels"])
def test_other_statistics_give_unit_variance_too(run_folder, tmp_path, statistics):
    out = export_run(run_folder, tmp_path / "out", statistics=statistics, images=8)
    network = AutoencoderKL.from_pretrained(out)
    scaling = LatentScaling.of(network)
    stream = TrainingStream(RunFolder(run_folder).config().data)
    torch.manual_seed(0)
    with torch.no_grad():
        crops = [normalize(next(stream).images) for _ in range(4)]
        raw = torch.cat([network.encode(c).latent_dist.sample() for c in crops])
    final = scaling.to_final(raw)
    assert abs(final.mean().item()) < 0.1
    assert final.std().item() == pytest.approx(1, rel=0.05)
    torch.testing.assert_close(scaling.to_raw(final), raw, rtol=1e-4, atol=1e-5)
    if statistics == "channels":
        assert final.std((0, 2, 3)) == pytest.approx(torch.ones(4), rel=0.05)
        # diffusers' own arithmetic, as StableDiffusionXLPipeline decodes:
        std, mean = (
            torch.tensor(network.config[k]).view(1, -1, 1, 1)
            for k in ("latents_std", "latents_mean")
        )
        by_diffusers = final * std / network.config["scaling_factor"] + mean
        torch.testing.assert_close(by_diffusers, raw, rtol=1e-4, atol=1e-5)


def test_statistics_are_exact_in_any_batching():
    torch.manual_seed(0)
    moments = torch.randn(12, 8, 5, 5)
    whole, parts = LatentStatistics(), LatentStatistics()
    whole.update(*split_moments(moments))
    for piece in moments.split([1, 4, 7]):
        parts.update(*split_moments(piece))
    for name, value in whole.summary().items():
        assert parts.summary()[name] == pytest.approx(value, rel=1e-12, abs=1e-12)
    mean, logvar = split_moments(moments.double())
    draws = mean + (0.5 * logvar).exp() * torch.randn(2000, *mean.shape)
    assert whole.std == pytest.approx(draws.std().item(), rel=2e-3)
    wanted = draws.std((0, 1, 3, 4)).tolist()
    assert whole.channel_std == pytest.approx(wanted, rel=5e-3)


def test_a_plain_autoencoder_is_exported_without_noise(tiny, quiet, tmp_path):
    """Its log-variances were never trained: whoever samples must get the mean."""
    run = train(tiny(bottleneck={"weight": 0}, validation=None), quiet)
    out = export_run(run, tmp_path / "out", images=4)
    network, trained = AutoencoderKL.from_pretrained(out), RunFolder(run).trained_network()[0]
    images = photograph_tensor("coffee")
    with torch.no_grad():
        posterior = network.encode(images).latent_dist
        assert torch.equal(posterior.mean, trained.encode(images).latent_dist.mean)
        torch.testing.assert_close(posterior.sample(), posterior.mean, rtol=0, atol=1e-5)
    spread = json.loads((out / "latent_ae.json").read_text())["latents"]["std"]
    assert network.config["scaling_factor"] == pytest.approx(1 / spread)
    assert spread < 0.7  # the untrained log-variances alone would give about 1


def test_a_fine_tuned_run_records_its_origin(tiny, quiet, exported, tmp_path):
    config = tiny(network=None, training={"steps": 1}, validation=None)
    config = config.model_copy(update={"network": NetworkConfig(path=str(exported))})
    out = export_run(train(config, quiet), tmp_path / "out", images=4)
    assert json.loads((out / "latent_ae.json").read_text())["config"]["network"] == {
        "path": str(exported)
    }


def test_nothing_is_overwritten_and_failures_leave_nothing(run_folder, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export_run(run_folder, taken)
    assert (taken / "mine.txt").read_text() == "mine"
    with pytest.raises(UserError, match="statistics 'none' is unknown; valid: scale"):
        export_run(run_folder, tmp_path / "out", statistics="none", images=2)
    with pytest.raises(UserError, match="no training run"):
        export_run(tmp_path / "nowhere", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


@pytest.mark.parametrize("key", IGNORED_BY)
def test_the_named_pipelines_do_ignore_it(key):
    """Read as text: to import them would need transformers."""
    files = (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py")
    sources = [file.read_text() for file in files]
    for name in IGNORED_BY[key]:
        (source,) = [text for text in sources if f"class {name}(" in text]
        assert "scaling_factor" in source
        assert key not in source, f"{name} has learned {key}"
