"""What a denoiser learns from: noise levels and loss weights, beside diffusers' own."""

import math
import re

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from latents_folders import rows_of, state_of, tiny_autoencoder, write_latents
from PIL import Image
from pydantic import ValidationError
from rich.console import Console
from typer.testing import CliRunner

from denoiser_examples import Examples, ddpm_weight, flow_weight
from denoiser_trainer import Trainer, usual_shape
from denoisers import build_scheduler
from latent_ae.config import Preprocessing
from latent_ae.errors import UserError
from latent_ae.latents import LatentDataset, encode
from train_denoiser import DenoiserConfig, app, train

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = Console(quiet=True)
TINY = {"channels": (8, 16), "layers": 1, "attention": 1, "learning_rate": 1e-3}
TINY |= {"warmup_steps": 2, "log_every": 2, "sample_every": 0}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return tiny_autoencoder(tmp_path_factory.mktemp("models") / "autoencoder")


@pytest.fixture(scope="module")
def latents(tmp_path_factory, autoencoder):
    mean = torch.randn((12, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    return write_latents(tmp_path_factory.mktemp("latents") / "plain", autoencoder, mean)


@pytest.fixture(scope="module")
def buckets(tmp_path_factory, autoencoder):
    """Nine wide, four square and one tall picture, encoded by aspect."""
    folder = tmp_path_factory.mktemp("buckets")
    for number, size in enumerate([(32, 16)] * 9 + [(24, 24)] * 4 + [(16, 32)]):
        colour = (20 * number, 90, 200)
        (folder / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", size, colour).save(folder / "pictures" / f"{number:02}.png")
    cut = Preprocessing(resolution=16, buckets=True, bucket_step=4)
    encode(autoencoder, folder / "pictures", folder / "latents", preprocessing=cut, workers=0)
    return folder / "latents"


class TestWeights:
    @pytest.mark.parametrize("name", ["none", "cosmap", "sigma_sqrt"])
    def test_flow_weights_are_diffusers(self, name):
        sigma = torch.linspace(0.001, 1, 200)
        expected = compute_loss_weighting_for_sd3(name, sigma)
        weight = flow_weight(DenoiserConfig(weighting=name), sigma)
        torch.testing.assert_close(weight, expected)

    def test_no_flow_weight_is_infinite(self):
        for name in ("none", "cosmap", "sigma_sqrt"):
            weight = flow_weight(DenoiserConfig(weighting=name), torch.tensor([0.0, 1.0]))
            assert weight.isfinite().all()

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    def test_min_snr_is_its_formula(self, prediction):
        config = DenoiserConfig(
            objective="ddpm", prediction=prediction, weighting="min_snr", snr_gamma=4.0
        )
        scheduler = build_scheduler(config)
        steps = torch.arange(999)  # at the last the formula's own division fails
        snr = compute_snr(scheduler, steps).double()
        divisor = snr if prediction == "epsilon" else snr + 1
        weight = ddpm_weight(config, scheduler.alphas_cumprod[steps])
        torch.testing.assert_close(weight.double(), snr.clamp(max=4) / divisor, rtol=1e-3, atol=0)

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    def test_min_snr_weighs_the_error_of_the_data(self, prediction):
        """Whatever is predicted, an error of the data it implies costs min(SNR, gamma)."""
        config = DenoiserConfig(objective="ddpm", prediction=prediction, weighting="min_snr")
        scheduler = build_scheduler(config)
        steps = torch.tensor([1, 200, 500, 900])
        ac = scheduler.alphas_cumprod[steps].double()
        a, s = ac.sqrt(), (1 - ac).sqrt()
        # x0 = (x - s eps) / a, and x0 = a x - s v: what an error of 1 in the target does to x0.
        error = s / a if prediction == "epsilon" else s
        cost = ddpm_weight(config, ac) / error.square()
        torch.testing.assert_close(cost, (ac / (1 - ac)).clamp(max=5))

    def test_min_snr_stays_finite_where_there_is_no_signal(self):
        config = DenoiserConfig(objective="ddpm", weighting="min_snr")
        last = build_scheduler(config).alphas_cumprod[-1:]
        assert last == 0
        assert ddpm_weight(config, last) == 0
        other = DenoiserConfig(objective="ddpm", prediction="epsilon", weighting="min_snr")
        assert ddpm_weight(other, last) == 1

    def test_the_loss_is_weighted(self, latents, tmp_path):
        data = LatentDataset(latents)
        config = DenoiserConfig(**TINY, objective="ddpm", weighting="min_snr", batch_size=6)
        batch = Examples(data, config)[0]
        assert batch["weight"].unique().numel() > 3
        trainer = Trainer(config, data, tmp_path / "run")
        with torch.no_grad():
            noisy, timestep = batch["noisy"], batch["timestep"]
            output = trainer.denoiser(noisy, timestep=timestep).sample
        errors = [(a - b).square().mean() for a, b in zip(output, batch["target"], strict=True)]
        expected = sum(w * e for w, e in zip(batch["weight"], errors, strict=True)) / 6
        torch.testing.assert_close(trainer.update([batch], 0.0)["loss"], expected)


class TestNoiseLevels:
    def test_logit_mean_std_and_shift(self, latents):
        config = DenoiserConfig(batch_size=64, logit_mean=0.5, logit_std=0.7, shift=3.0)
        examples = Examples(LatentDataset(latents), config)
        sigma = torch.cat([examples[i]["timestep"] for i in range(20)]) / 1000
        # A shift adds its logarithm to the logit.
        logits = torch.logit(sigma)
        assert logits.mean() == pytest.approx(0.5 + math.log(3), abs=0.02)
        assert logits.std() == pytest.approx(0.7, abs=0.03)

    def test_the_saved_scheduler_shifts_once(self):
        scheduler = build_scheduler(DenoiserConfig(shift=3.0))
        scheduler.set_timesteps(1000)
        even = torch.linspace(1, float(scheduler.sigma_min), 1000)
        shifted = 3 * even / (1 + 2 * even)
        torch.testing.assert_close(scheduler.sigmas[:-1], shifted, atol=1e-5, rtol=0)


class TestCombinations:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"weighting": "min_snr"}, "weighting min_snr is not for objective flow"),
            (
                {"weighting": "cosmap", "objective": "ddpm"},
                "weighting cosmap is not for objective ddpm, which takes none, min_snr",
            ),
            ({"shift": 3.0, "objective": "ddpm"}, "shift is for objective flow"),
            ({"logit_mean": 1.0, "sigmas": "uniform"}, "logit_mean is for objective flow"),
            ({"prediction": "epsilon"}, "prediction is for objective ddpm; elsewhere"),
            ({"snr_gamma": 3.0}, "snr_gamma is for weighting min_snr"),
            ({"width": 10}, "width is for denoiser dit"),
            ({"denoiser": "dit", "layers": 1}, "layers is for denoiser unet"),
            ({"labels": False, "label_dropout": 0.9}, "label_dropout is for training with labels"),
            ({"sigmas": "uniform", "objective": "ddpm"}, "sigmas is for objective flow"),
            ({"distance_samples": 20}, "distance_samples is for distances (distance_every)"),
            ({"sample_every": 0, "sampling_steps": 9}, "sampling_steps is for sheets"),
            ({"attention": 9}, "attention 9 is more than the 3 channels"),
            ({"guidance_scale": 3.0, "label_dropout": 0.0}, "guidance_scale above 1 takes a label"),
        ],
    )
    def test_wrong_ones_are_refused(self, options, sentence):
        with pytest.raises(ValidationError, match=re.escape(sentence)):
            DenoiserConfig(**options)
        arguments = [f"--{k.replace('_', '-')}={v}" for k, v in options.items() if k != "labels"]
        arguments += ["--no-labels"] * ("labels" in options)
        result = CliRunner().invoke(app, ["nowhere", "out", *arguments])
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {sentence}")
        assert len(result.stderr.splitlines()) == 1


class TestAccumulation:
    def test_is_one_step_on_the_mean_of_all_batches(self, latents, tmp_path):
        data = LatentDataset(latents)
        several = DenoiserConfig(**TINY, batch_size=2, accumulation=3, steps=3)
        train(latents, tmp_path / "several", several, console=QUIET)
        found = state_of(tmp_path / "several-run" / "checkpoint.pt")
        assert found["step"] == 3

        config = DenoiserConfig(**TINY, batch_size=6, steps=3)
        trainer, examples = Trainer(config, data, tmp_path / "one"), Examples(data, several)
        for step in range(3):
            batches = [examples[3 * step + i] for i in range(3)]
            joined = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
            trainer.update([joined], trainer.progress())
        for name, value in trainer.denoiser.state_dict().items():
            torch.testing.assert_close(found["denoiser"][name], value, atol=1e-5, rtol=1e-3)


class TestBuckets:
    def test_a_batch_has_one_size_and_an_epoch_every_latent(self, buckets):
        data, config = LatentDataset(buckets), DenoiserConfig(batch_size=4)
        assert len(data.index.sizes) == 3
        assert usual_shape(data) == (4, *data.size_of(0))
        examples = Examples(data, config)
        epoch = [examples._positions(number) for number in range(5)]  # 9 in 3, 4 in 1, 1 in 1
        assert {position for batch in epoch for position in batch} == set(range(14))
        for number, batch in enumerate(epoch):
            assert len(batch) == 4
            assert len({data.size_of(position) for position in batch}) == 1
            assert examples[number]["noisy"].shape[-2:] == data.size_of(batch[0])
        assert epoch != [examples._positions(number) for number in range(5, 10)]

    def test_a_unet_learns_from_them(self, buckets, tmp_path):
        config = DenoiserConfig(**TINY, batch_size=4, steps=5)
        train(buckets, tmp_path / "pipe", config, console=QUIET)
        rows = rows_of(tmp_path / "pipe-run" / "log.jsonl")
        assert [row["step"] for row in rows] == [2, 4, 5]

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"denoiser": "dit"}, "a DiT wants latents of one size, not of 3: try unet"),
            ({"channels": (8, 8, 8, 8)}, "cannot be halved 3 times: give at most"),
        ],
    )
    def test_refusals(self, buckets, tmp_path, options, sentence):
        with pytest.raises(UserError, match=sentence):
            train(buckets, tmp_path / "pipe", DenoiserConfig(**options))
