import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import photograph_tensor
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from latent_ae import UserError, export_run, load_network, train
from latent_ae.autoencoder import build_network, only_variant, weights_sha256
from latent_ae.bottlenecks import split_moments
from latent_ae.config import NetworkConfig
from latent_ae.data import TrainingStream, normalize
from latent_ae.export import caveats
from latent_ae.export.folding import fold_statistics
from latent_ae.frozen import FrozenAutoencoder
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
    for word in ("scaling_factor", "PSNR", "licen", "AutoencoderKL"):
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
        "path": str(exported),
        "freeze": "nothing",
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


def test_folded_statistics_are_in_the_weights(run_folder, exported, tmp_path):
    """Unit variance channel by channel, the same pictures, and nothing left in the config."""
    folded = AutoencoderKL.from_pretrained(
        export_run(run_folder, tmp_path / "out", statistics="folded", images=8)
    )
    assert folded.config["scaling_factor"] == 1
    assert folded.config["latents_mean"] is None
    plain, images = AutoencoderKL.from_pretrained(exported), photograph_tensor("coffee")
    stream = TrainingStream(RunFolder(run_folder).config().data)
    with torch.no_grad():
        torch.testing.assert_close(folded(images).sample, plain(images).sample, atol=1e-5, rtol=0)
        torch.manual_seed(0)
        crops = [normalize(next(stream).images) for _ in range(4)]
        samples = torch.cat([folded.encode(c).latent_dist.sample() for c in crops])
        kl = (folded.encode(images).latent_dist.var, plain.encode(images).latent_dist.var)
    assert samples.mean((0, 2, 3)).tolist() == pytest.approx([0] * 4, abs=0.1)
    assert samples.std((0, 2, 3)).tolist() == pytest.approx([1] * 4, rel=0.05)
    ratio = kl[0] / kl[1]  # one number a channel
    torch.testing.assert_close(ratio, ratio.mean((0, 2, 3), keepdim=True).expand_as(ratio))


def test_statistics_fold_into_a_network_without_quant_convs(tiny):
    """float64, so that what is compared is the algebra and not its rounding."""
    torch.manual_seed(0)
    network = build_network(tiny(network={"use_quant_conv": False}).network).double()
    folded, (mean, std) = copy.deepcopy(network), ([0.3, -2.0, 1.0, 0.1], [0.2, 3.0, 1.0, 0.7])
    fold_statistics(folded, mean, std)
    images = photograph_tensor("chelsea").double()
    with torch.no_grad():
        before, after = (n.encode(images).latent_dist for n in (network, folded))
        offset, factor = (torch.tensor(v).double().view(1, -1, 1, 1) for v in (mean, std))
        torch.testing.assert_close(after.mean, (before.mean - offset) / factor)
        torch.testing.assert_close(after.std, before.std / factor)
        restored = folded.decode(after.mean).sample
        torch.testing.assert_close(restored, network.decode(before.mean).sample)
    assert folded.config["use_quant_conv"]
    assert folded.config["use_post_quant_conv"]


def test_variants_and_shards_load_in_stock_diffusers(run_folder, exported, tmp_path):
    out = export_run(
        run_folder, tmp_path / "out", images=4, variants=["fp16", "bf16"], max_shard_size="60KB"
    )
    assert len(list(out.glob("diffusion_pytorch_model-0*.safetensors"))) > 1
    plain = AutoencoderKL.from_pretrained(exported).state_dict()
    for variant, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        network = AutoencoderKL.from_pretrained(out, variant=variant, torch_dtype=dtype)
        found = network.state_dict()
        assert all(torch.equal(found[name], plain[name].to(dtype)) for name in plain)
    assert all(torch.equal(load_network(out).state_dict()[name], plain[name]) for name in plain)
    digest = weights_sha256(out)
    for file in (*out.glob("*model-0*"), out / "diffusion_pytorch_model.safetensors.index.json"):
        file.unlink()
    assert only_variant(out) == "fp16"  # what is left, as a download of one variant would be
    rounded = FrozenAutoencoder(out).network.state_dict()
    assert all(torch.equal(rounded[name], plain[name].half().float()) for name in plain)
    assert weights_sha256(out) != digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ["fp8"]}, "variant 'fp8' is unknown; valid: fp16, bf16"),
        ({"max_shard_size": "2 apples"}, "a shard's size is a whole number of KB"),
        ({"max_shard_size": "0GB"}, "a shard's size is a whole"),
        ({"max_shard_size": ""}, "a shard's size is a whole"),
    ],
)
def test_bad_variants_are_told_before_anything_is_read(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        export_run(tmp_path / "no run", tmp_path / "out", **options)


def test_caveats_name_the_pipelines_and_the_way_out(exported):
    config = json.loads((exported / "config.json").read_text())
    assert caveats(config) == []
    assert config["shift_factor"] == 0  # None would stop StableDiffusion3Pipeline and FluxPipeline
    (shift,) = caveats(config | {"shift_factor": 0.1})
    assert "DiTPipeline ignore it" in shift
    assert "StableDiffusion3InpaintPipeline uses it in encoding" in shift
    assert "`folded`" in shift
    (channels,) = caveats(config | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4})
    assert "FluxPipeline" in channels
    many = config | {"latent_channels": 16, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    assert "fail with 16" in caveats(many)[1]
    (upcast,) = caveats(config | {"force_upcast": True})
    assert "StableDiffusionPipeline" in upcast
