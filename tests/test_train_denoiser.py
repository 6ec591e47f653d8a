"""The denoiser's training: what it learns from, that it learns, resumes, and leaves a pipeline."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from latents_folders import labelled_latents, rows_of, state_of, tiny_autoencoder, write_latents
from rich.console import Console
from typer.testing import CliRunner

from denoiser_examples import Examples
from denoiser_trainer import Trainer
from denoisers import build_denoiser, build_scheduler
from latent_ae.errors import UserError
from latent_ae.latents import LatentDataset, weights_sha256
from latent_diffusion import LatentDiffusionPipeline, scale_latents
from train_denoiser import DenoiserConfig, app, train
from training_parts import learning_rate

PIPELINES = Path(__file__).parents[1] / "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (4, 8, 8)
UNET = {"denoiser": "unet", "channels": (8, 16), "layers": 1, "attention": 1}
DIT = {"denoiser": "dit", "width": 16, "depth": 2, "heads": 2}
SHORT = {"batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 2, "log_every": 2}
SHORT["sample_every"] = 0
TINY = {**UNET, **SHORT}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return tiny_autoencoder(tmp_path_factory.mktemp("models") / "autoencoder")


@pytest.fixture(scope="module")
def latents(tmp_path_factory, autoencoder):
    """They have some variance."""
    folder = tmp_path_factory.mktemp("latents") / "labelled"
    return labelled_latents(folder, autoencoder, SHAPE, ["cat", "dog"], logvar=-2.0)


@pytest.fixture(scope="module")
def point(tmp_path_factory, autoencoder):
    """A data set of one latent that has no variance and one value a channel."""
    folder = tmp_path_factory.mktemp("latents") / "point"
    mean = torch.tensor([2.1, -5.8, 0.8, 4.4]).view(1, 4, 1, 1).expand(1, *SHAPE).contiguous()
    return write_latents(folder, autoencoder, mean)


def load(folder):
    """The saved pipeline, by its parts: how stock diffusers loads it is the pipeline's own test."""
    index = json.loads((folder / "model_index.json").read_text())
    parts = {name: getattr(diffusers, index[name][1]) for name in ("vae", "denoiser", "scheduler")}
    parts = {name: kind.from_pretrained(folder / name) for name, kind in parts.items()}
    pipe = LatentDiffusionPipeline(**parts, id2label=index["id2label"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestExamples:
    @pytest.mark.parametrize("sigmas", ["uniform", "logit_normal"])
    def test_flow_follows_its_formula(self, point, sigmas):
        config = DenoiserConfig(batch_size=64, sigmas=sigmas)
        x0 = LatentDataset(point)[0]["latents"]
        batch = Examples(LatentDataset(point), config)[0]
        sigma = batch["timestep"].view(-1, 1, 1, 1) / 1000
        noise = batch["target"] + x0
        torch.testing.assert_close(batch["noisy"], (1 - sigma) * x0 + sigma * noise)
        assert noise.mean().abs() < 0.03
        assert (noise.std() - 1).abs() < 0.03
        logits = torch.logit(sigma) if sigmas == "logit_normal" else sigma * 12**0.5
        assert 0.95 < logits.std() < 1.05
        assert (sigma.mean() - 0.5).abs() < 0.02

    @pytest.mark.parametrize(
        "options",
        [
            {"objective": "flow"},
            {"objective": "flow", "shift": 3.0},
            {"objective": "ddpm", "prediction": "epsilon"},
            {"objective": "ddpm", "prediction": "v_prediction"},
        ],
        ids=["flow", "shift", "epsilon", "v"],
    )
    def test_the_saved_scheduler_undoes_what_training_did(self, point, options):
        """One step of the sampler with the true target leads to the data: no convention differs."""
        config = DenoiserConfig(batch_size=16, **options)
        batch = Examples(LatentDataset(point), config)[3]
        x0 = LatentDataset(point)[0]["latents"]
        scheduler = build_scheduler(config)
        for noisy, timestep, target in zip(
            batch["noisy"], batch["timestep"], batch["target"], strict=True
        ):
            if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
                unshifted = float(timestep) / (3000 - 2 * float(timestep))
                sigma = unshifted if config.shift == 3 else float(timestep) / 1000
                scheduler.set_timesteps(sigmas=[sigma])
                assert float(scheduler.timesteps[0]) == pytest.approx(float(timestep), rel=1e-5)
                timestep = scheduler.timesteps[0]
                found = scheduler.step(target, timestep, noisy).prev_sample
            else:
                scheduler.set_timesteps(1000)
                found = scheduler.step(target, int(timestep), noisy).pred_original_sample
            torch.testing.assert_close(found, x0, atol=1e-4, rtol=0)

    def test_ddpm_samples_from_where_training_ends(self):
        scheduler = build_scheduler(DenoiserConfig(objective="ddpm"))
        assert isinstance(scheduler, DDIMScheduler)
        scheduler.set_timesteps(10)
        assert scheduler.timesteps[0] == 999
        assert scheduler.alphas_cumprod[999] == 0

    def test_the_denoiser_sees_what_the_pipeline_unscales(self, latents, autoencoder):
        raw = LatentDataset(latents, sample=False, scale=False)[2]["latents"]
        final = LatentDataset(latents, sample=False)[2]["latents"]
        config = AutoencoderKL.load_config(autoencoder)
        torch.testing.assert_close(final[None], scale_latents(raw[None], config))

    def test_a_batch_depends_on_seed_process_and_step_alone(self, latents):
        data = LatentDataset(latents)

        def noisy(step, process=(0, 1), **options):
            torch.rand(1)  # the global generator must not matter
            return Examples(data, DenoiserConfig(**options), 2, process)[step]["noisy"]

        first = noisy(5)
        torch.testing.assert_close(first, noisy(5), atol=0, rtol=0)
        for other in (noisy(6), noisy(5, process=(1, 2)), noisy(5, seed=1)):
            assert not torch.equal(first, other)
        torch.manual_seed(0)
        before = torch.get_rng_state()
        Examples(data, DenoiserConfig())[0]
        assert torch.equal(before, torch.get_rng_state())

    def test_an_epoch_shows_each_latent_once_whoever_reads_it(self, latents, monkeypatch):
        data, config = LatentDataset(latents), DenoiserConfig(batch_size=2)
        seen = []
        read = data.__getitem__
        monkeypatch.setattr(LatentDataset, "__getitem__", lambda _, i: seen.append(i) or read(i))
        for step in range(5):
            for rank in range(2):
                Examples(data, config, process=(rank, 2))[step]
        assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
        assert seen[:10] != seen[10:]

    def test_labels(self, latents):
        data = LatentDataset(latents)
        kept = Examples(data, DenoiserConfig(batch_size=10, label_dropout=0.0), 2)[0]["label"]
        assert sorted(kept.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]
        dropped = Examples(data, DenoiserConfig(label_dropout=1.0), 2)[0]["label"]
        assert set(dropped.tolist()) == {2}
        some = Examples(data, DenoiserConfig(batch_size=2000, label_dropout=0.25), 2)[0]["label"]
        assert 0.29 < (some == 2).float().mean() < 0.36  # a tenth has none, a quarter of the rest


class TestNetworks:
    @pytest.mark.parametrize("options", [UNET, DIT], ids=["unet", "dit"])
    def test_starts_at_zero_and_trains_everywhere(self, options):
        denoiser = build_denoiser(DenoiserConfig(**options), SHAPE, classes=2)
        inputs, t, label = torch.randn(3, *SHAPE), torch.rand(3) * 1000, torch.tensor([0, 1, 2])
        output = denoiser(inputs, timestep=t, class_labels=label, return_dict=False)[0]
        assert output.shape == inputs.shape
        assert output.abs().max() < 0.2
        optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
        for _ in range(4):  # zeroed layers open one after the other
            output = denoiser(inputs, timestep=t, class_labels=label, return_dict=False)[0]
            optimizer.zero_grad()
            (output - inputs).square().mean().backward()
            optimizer.step()
        for name, parameter in denoiser.named_parameters():
            assert parameter.grad is not None, name
            # A key's bias shifts all scores of a query alike, which softmax cannot see.
            assert parameter.grad.abs().max() > 0 or "to_k.bias" in name, name

    def test_a_dit_drops_no_label_by_itself(self):
        dit = build_denoiser(DenoiserConfig(**DIT), SHAPE, classes=2).train()
        torch.nn.init.normal_(dit.proj_out_2.weight)
        torch.nn.init.normal_(dit.proj_out_1.weight)
        inputs = {"timestep": torch.full((64,), 5.0), "class_labels": torch.zeros(64).long()}
        output = dit(torch.ones(64, *SHAPE), **inputs, return_dict=False)[0]
        torch.testing.assert_close(output, output[:1].expand_as(output))

    @pytest.mark.parametrize(
        ("options", "shape", "message"),
        [
            ({"channels": (8, 8, 8)}, (4, 6, 8), "halved 2 times: give at most 2 --channels"),
            ({**DIT, "heads": 3}, SHAPE, "heads 3 does not divide width 16"),
            (DIT, (4, 8, 6), "wants square latents"),
            ({**DIT, "patch": 3}, SHAPE, "that `patch` divides"),
        ],
    )
    def test_refuses_latents_that_it_does_not_fit(self, options, shape, message):
        with pytest.raises(UserError, match=message):
            build_denoiser(DenoiserConfig(**options), shape, 0)


class TestTrain:
    @pytest.mark.parametrize(
        ("options", "tolerance"),
        [
            ({"objective": "flow"}, 0.15),
            pytest.param(
                {"objective": "flow", "weighting": "cosmap", "shift": 3.0},
                0.15,
                marks=pytest.mark.slow,
            ),
            ({"objective": "ddpm", "prediction": "v_prediction"}, 0.15),
            ({"objective": "ddpm", "weighting": "min_snr"}, 0.15),
            # Where there is next to no signal, the data is 15 times the error of epsilon away.
            ({"objective": "ddpm", "prediction": "epsilon"}, 0.7),
            ({"denoiser": "unet", "channels": (32,), "layers": 1, "attention": 0}, 0.25),
        ],
        ids=["flow", "flow-weighted", "v", "v-min-snr", "epsilon", "unet"],
    )
    def test_samples_of_one_point_are_this_point(self, point, tmp_path, options, tolerance):
        if "denoiser" not in options:
            options = {"denoiser": "dit", "width": 32, "depth": 2, "heads": 2, "patch": 1} | options
        config = DenoiserConfig(
            **options,
            steps=80,
            batch_size=8,
            learning_rate=1e-2,
            warmup_steps=10,
            log_every=20,
            sample_every=0,
        )
        train(point, tmp_path / "pipe", config, console=QUIET)
        rows = rows_of(tmp_path / "pipe-run" / "log.jsonl")
        losses = [row["loss"] for row in rows if row["group"] == "train"]
        assert losses[-1] < 0.2 * losses[0]
        pipe = load(tmp_path / "pipe")
        options = {"num_inference_steps": 10, "generator": torch.Generator().manual_seed(0)}
        samples = pipe(batch_size=8, output_type="latent", **options).images
        expected = LatentDataset(point)[0]["latents"]
        error = (samples - expected).square().mean().sqrt()
        assert error < tolerance * expected.square().mean().sqrt()

    def test_leaves_a_conditional_pipeline(self, latents, autoencoder, tmp_path):
        output = train(latents, tmp_path / "pipe", DenoiserConfig(**TINY, steps=4), console=QUIET)
        assert output == tmp_path / "pipe"
        names = {file.name for file in output.iterdir()}
        assert names == {"vae", "denoiser", "scheduler", "model_index.json", "latent_diffusion.py"}
        pipe = load(output)
        assert pipe.labels == {"cat": 0, "dog": 1}
        assert pipe.num_classes == 2
        images = pipe(class_labels=["cat", "dog"], guidance_scale=2.0, num_inference_steps=2)
        assert len(images.images) == 2
        assert weights_sha256(output / "vae") == weights_sha256(autoencoder)
        rows = rows_of(tmp_path / "pipe-run" / "log.jsonl")
        assert [row["step"] for row in rows] == [2, 4]
        assert {"loss", "gradient_norm", "learning_rate", "images_per_second"} <= set(rows[0])

    @pytest.mark.parametrize("options", [UNET, DIT], ids=["unet", "dit"])
    def test_labels_can_be_left_out(self, latents, tmp_path, options):
        config = DenoiserConfig(**SHORT, **options, steps=2, labels=False)
        pipe = load(train(latents, tmp_path / "pipe", config, console=QUIET))
        assert pipe.num_classes == 0
        assert len(pipe(num_inference_steps=2).images) == 1

    def test_saves_the_averaged_weights(self, latents, tmp_path):
        config = DenoiserConfig(**TINY, steps=6, ema=0.5)
        pipe = load(train(latents, tmp_path / "pipe", config, console=QUIET))
        state = state_of(tmp_path / "pipe-run" / "checkpoint.pt")
        averaged = dict(zip(state["denoiser"], state["ema"]["shadow_params"], strict=True))
        saved = pipe.denoiser.state_dict()
        for name, value in averaged.items():
            assert torch.equal(saved[name], value)
            assert value.dtype == torch.float32
        assert not torch.equal(saved["conv_in.weight"], state["denoiser"]["conv_in.weight"])

    @pytest.mark.parametrize("options", [UNET, DIT], ids=["unet", "dit"])
    def test_a_stopped_run_ends_as_one_never_stopped(self, latents, tmp_path, options, monkeypatch):
        config = DenoiserConfig(**SHORT, **options, steps=9, checkpoint_every=4)
        train(latents, tmp_path / "whole", config, console=QUIET)

        update = Trainer.update

        def killed(self, batches, progress):
            if self.step == 7:
                raise KeyboardInterrupt
            return update(self, batches, progress)

        monkeypatch.setattr(Trainer, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            train(latents, tmp_path / "stopped", config, console=QUIET)
        monkeypatch.undo()
        assert state_of(tmp_path / "stopped-run" / "checkpoint.pt")["step"] == 4
        assert not (tmp_path / "stopped").exists()
        torch.rand(3)
        train(latents, tmp_path / "stopped", config, console=QUIET)

        whole, stopped = (
            state_of(tmp_path / f"{name}-run" / "checkpoint.pt") for name in ("whole", "stopped")
        )
        for name, value in whole["denoiser"].items():
            assert torch.equal(value, stopped["denoiser"][name]), name
        for a, b in zip(
            whole["ema"]["shadow_params"], stopped["ema"]["shadow_params"], strict=True
        ):
            assert torch.equal(a, b)
        logs = [rows_of(tmp_path / f"{name}-run" / "log.jsonl") for name in ("whole", "stopped")]
        assert [row["step"] for row in logs[1]] == [2, 4, 6, 8, 9]
        assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]

    def test_the_same_command_after_the_end_changes_nothing(self, latents, tmp_path):
        config = DenoiserConfig(**TINY, steps=2)
        train(latents, tmp_path / "pipe", config, console=QUIET)
        files = sorted(file for file in (tmp_path / "pipe").rglob("*") if file.is_file())
        before = [file.read_bytes() for file in files]
        train(latents, tmp_path / "pipe", config, console=QUIET)
        assert [file.read_bytes() for file in files] == before
        assert len(rows_of(tmp_path / "pipe-run" / "log.jsonl")) == 1
        assert {path.name for path in tmp_path.iterdir()} == {"pipe", "pipe-run"}

    def test_a_budget_of_seconds_ends_the_schedule(self, latents, tmp_path):
        config = DenoiserConfig(**TINY, seconds=1.0)
        train(latents, tmp_path / "pipe", config, console=QUIET)
        rows = rows_of(tmp_path / "pipe-run" / "log.jsonl")
        assert rows[0]["step"] == 2
        assert 0.9 < rows[-1]["seconds"] < 3
        assert rows[-1]["learning_rate"] < 0.1 * TINY["learning_rate"]
        assert max(row["learning_rate"] for row in rows) > 0.5 * TINY["learning_rate"]

    def test_precision_may_differ_from_an_earlier_training(self, latents, tmp_path):
        for precision in ("bf16", "fp32"):
            config = DenoiserConfig(**TINY, steps=2, precision=precision)
            train(latents, tmp_path / precision, config, console=QUIET)
            assert load(tmp_path / precision).dtype == torch.float32

    def test_learning_rate(self):
        config = DenoiserConfig(learning_rate=1.0, warmup_steps=4)
        assert learning_rate(config, 0, 0.0) == 0.25
        assert learning_rate(config, 4, 0.0) == 1.0
        assert learning_rate(config, 50, 0.5) == pytest.approx(0.5)
        assert learning_rate(config, 100, 1.0) == pytest.approx(0.0)


class TestDivergence:
    def test_it_ends_in_a_sentence_and_keeps_what_was_there(self, latents, tmp_path):
        run = {"run": tmp_path / "run", "console": QUIET}
        train(latents, tmp_path / "pipe", DenoiserConfig(**TINY, steps=2), **run)
        kept = [tmp_path / "run" / "checkpoint.pt", tmp_path / "pipe" / "model_index.json"]
        kept += (tmp_path / "pipe" / "denoiser").iterdir()
        before = [file.read_bytes() for file in kept]
        config = DenoiserConfig(**{**TINY, "learning_rate": 1e30}, steps=8)
        with pytest.raises(UserError, match=r"diverged: at step 8 its losses are not finite, so"):
            train(latents, tmp_path / "pipe", config, **run)
        assert [file.read_bytes() for file in kept] == before
        text = (tmp_path / "run" / "log.jsonl").read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
        assert [row["loss"] for row in rows_of(tmp_path / "run" / "log.jsonl")][-1] is None

    def test_weights_that_are_not_finite_are_not_saved(self, latents, tmp_path):
        trainer = Trainer(DenoiserConfig(**TINY), LatentDataset(latents), tmp_path)
        trainer.save()
        before = trainer.file.read_bytes()
        trainer.ema.shadow_params[-1].fill_(math.inf)
        with pytest.raises(UserError, match="at step 0 its weights are not finite"):
            trainer.save()
        assert trainer.file.read_bytes() == before

    @pytest.mark.parametrize("clip_norm", [0.0, 1.0])
    def test_a_bad_batch_moves_nothing(self, latents, tmp_path, clip_norm):
        config = DenoiserConfig(**TINY, clip_norm=clip_norm)
        data = LatentDataset(latents)
        trainer, batches = Trainer(config, data, tmp_path), Examples(data, config, 2)
        trainer.update([batches[0]], 0.0)
        tensors = [*trainer.denoiser.parameters(), *trainer.ema.shadow_params]
        moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
        before = [tensor.clone() for tensor in [*tensors[: len(tensors) // 2], *moments]]
        bad = batches[1]
        bad["target"][0, 0, 0, 0] = math.nan
        assert not trainer.update([bad], 0.1)["gradient_norm"].isfinite()
        after = [*tensors[: len(tensors) // 2], *moments]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert trainer.update([batches[2]], 0.2)["gradient_norm"].isfinite()
        assert not torch.equal(before[0], tensors[0])
        trainer.save()  # one bad batch is no divergence

    @pytest.mark.parametrize(
        "option", ["--logit-mean=nan", "--learning-rate=inf", "--shift=inf", "--clip-norm=nan"]
    )
    def test_options_are_finite(self, option):
        result = CliRunner().invoke(app, ["nowhere", "out", option])
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {option.split('=')[0]}: ")


class TestRefusals:
    def test_another_autoencoder(self, latents, autoencoder, tmp_path):
        vae = AutoencoderKL.from_pretrained(autoencoder)
        with torch.no_grad():
            vae.decoder.conv_out.bias.add_(1e-3)
        vae.save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match=r"made by other weights than those in .*other"):
            train(latents, tmp_path / "pipe", autoencoder=tmp_path / "other")
        assert not (tmp_path / "pipe-run").exists()

    def test_another_scale(self, latents, autoencoder, tmp_path):
        vae = AutoencoderKL.from_pretrained(autoencoder)
        vae.register_to_config(scaling_factor=0.25)
        vae.save_pretrained(tmp_path / "other")
        message = r"scaling_factor in .* is 0.25 but was 0.5 when the latents were made"
        with pytest.raises(UserError, match=message):
            train(latents, tmp_path / "pipe", autoencoder=tmp_path / "other")

    def test_no_autoencoder(self, latents, tmp_path):
        with pytest.raises(UserError, match=r"the latents' autoencoder is not at .*nowhere"):
            train(latents, tmp_path / "pipe", autoencoder=tmp_path / "nowhere")

    def test_an_output_that_is_something_else(self, latents, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(UserError, match="is there already and is no pipeline"):
            train(latents, tmp_path)

    def test_an_output_with_another_autoencoder(self, latents, autoencoder, tmp_path):
        vae = AutoencoderKL.from_pretrained(autoencoder)
        with torch.no_grad():
            vae.decoder.conv_out.bias.add_(1e-3)
        vae.save_pretrained(tmp_path / "pipe" / "vae")
        (tmp_path / "pipe" / "model_index.json").write_text("{}")
        with pytest.raises(UserError, match="pipe holds a pipeline with another autoencoder"):
            train(latents, tmp_path / "pipe", DenoiserConfig(**TINY, steps=1))

    def test_an_output_whose_autoencoder_is_gone(self, latents, tmp_path):
        (tmp_path / "pipe").mkdir()
        (tmp_path / "pipe" / "model_index.json").write_text("{}")
        with pytest.raises(UserError, match=r"pipe/vae cannot be read.* choose another output, or"):
            train(latents, tmp_path / "pipe", DenoiserConfig(**TINY, steps=1))

    def test_a_run_with_another_autoencoder(self, latents, autoencoder, tmp_path):
        run = {"run": tmp_path / "run", "console": QUIET}
        train(latents, tmp_path / "pipe", DenoiserConfig(**TINY, steps=1), **run)
        vae = AutoencoderKL.from_pretrained(autoencoder)
        with torch.no_grad():
            vae.decoder.conv_out.bias.add_(1e-3)
        vae.save_pretrained(tmp_path / "other")
        mean, names = torch.zeros((2, *SHAPE)), ["cat", "dog"]
        others = write_latents(
            tmp_path / "others", tmp_path / "other", mean, labels=[0, 1], names=names
        )
        sentence = "run holds a run with another autoencoder: choose another --run$"
        with pytest.raises(UserError, match=sentence):
            train(others, tmp_path / "pipe2", DenoiserConfig(**TINY, steps=2), **run)

    def test_guidance_without_labels(self, point, tmp_path):
        with pytest.raises(UserError, match="--guidance-scale takes labels"):
            train(point, tmp_path / "pipe", DenoiserConfig(guidance_scale=2.0))

    def test_a_run_of_another_denoiser(self, latents, tmp_path):
        train(latents, tmp_path / "pipe", DenoiserConfig(**TINY, steps=1), console=QUIET)
        other = DenoiserConfig(**{**TINY, "channels": (8, 8)}, steps=2)
        with pytest.raises(UserError, match="holds a run with another channels"):
            train(latents, tmp_path / "pipe", other, console=QUIET)

    def test_latents_of_another_size(self, latents, autoencoder, tmp_path):
        train(latents, tmp_path / "pipe", DenoiserConfig(**TINY, steps=1), console=QUIET)
        wider = write_latents(tmp_path / "wider", autoencoder, torch.zeros(2, 4, 8, 16))
        config = DenoiserConfig(**TINY, steps=2, labels=False)
        with pytest.raises(UserError, match="holds a run with another l"):
            train(wider, tmp_path / "pipe", config, console=QUIET)

    @pytest.mark.parametrize("change", ["scaling_factor", "label_names"])
    def test_a_run_on_latents_of_another_meaning(self, latents, tmp_path, change):
        """The same weights at another scale, or the same classes in another order."""
        run = {"run": tmp_path / "run", "console": QUIET}
        train(latents, tmp_path / "pipe", DenoiserConfig(**TINY, steps=1), **run)
        others, vae = tmp_path / "others", tmp_path / "vae"
        shutil.copytree(latents, others)
        manifest = json.loads((others / "manifest.json").read_text())
        shutil.copytree(manifest["autoencoder"]["path"], vae)
        if change == "scaling_factor":
            manifest["autoencoder"]["scaling_factor"] = 5.0
            config = json.loads((vae / "config.json").read_text()) | {"scaling_factor": 5.0}
            (vae / "config.json").write_text(json.dumps(config))
        else:
            manifest["label_names"] = ["dog", "cat"]
        (others / "manifest.json").write_text(json.dumps(manifest))
        config = DenoiserConfig(**TINY, steps=2)
        with pytest.raises(UserError, match=f"run holds a run with another {change}: choose"):
            train(others, tmp_path / "other", config, autoencoder=vae, **run)
        assert not (tmp_path / "other").exists()

    def test_a_checkpoint_of_something_else(self, latents, tmp_path):
        (tmp_path / "pipe-run").mkdir()
        torch.save({"model": torch.zeros(1)}, tmp_path / "pipe-run" / "checkpoint.pt")
        with pytest.raises(UserError, match="cannot be read: it has no 'identity'"):
            train(latents, tmp_path / "pipe", DenoiserConfig(**TINY, steps=1), console=QUIET)

    def test_a_run_that_is_a_file(self, latents, tmp_path):
        (tmp_path / "run").write_text("mine")
        config = DenoiserConfig(**TINY, steps=1)
        with pytest.raises(UserError, match=r"the run folder .*run cannot be made: File exists"):
            train(latents, tmp_path / "pipe", config, run=tmp_path / "run", console=QUIET)
        assert (tmp_path / "run").read_text() == "mine"

    def test_an_output_where_nothing_can_be_written(self, latents, tmp_path):
        (tmp_path / "file").write_text("mine")
        config, output = DenoiserConfig(**TINY, steps=1), tmp_path / "file" / "pipe"
        with pytest.raises(UserError, match="file, in which nothing can be made"):
            train(latents, output, config, run=tmp_path / "run", console=QUIET)
        assert not (tmp_path / "run").exists()

    def test_a_damaged_line_of_the_log_is_dropped(self, latents, tmp_path):
        train(latents, tmp_path / "pipe", DenoiserConfig(**TINY, steps=2), console=QUIET)
        log = tmp_path / "pipe-run" / "log.jsonl"
        log.write_bytes(log.read_bytes() + b'{"step": 2, "lo}\n[1]\n\xff}\n{"group": "train"}\n')
        train(latents, tmp_path / "pipe", DenoiserConfig(**TINY, steps=4), console=QUIET)
        assert [row["step"] for row in rows_of(log)] == [2, 4]

    def test_a_damaged_checkpoint(self, latents, tmp_path):
        (tmp_path / "pipe-run").mkdir()
        (tmp_path / "pipe-run" / "checkpoint.pt").write_bytes(b"not a checkpoint")
        with pytest.raises(UserError, match="cannot be read"):
            train(latents, tmp_path / "pipe", DenoiserConfig(**TINY, steps=1), console=QUIET)


class TestCommand:
    def test_every_key_is_an_option(self):
        result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}, color=False)
        assert result.exit_code == 0
        for name in DenoiserConfig.model_fields:
            assert f"--{name.replace('_', '-')}" in result.output
        assert "128,256,256" in result.output

    def test_every_option_is_in_the_documentation(self):
        page = (PIPELINES.parent / "docs" / "denoiser.md").read_text()
        named = set(re.findall(r"`--([a-z-]+)", page)) - {"autoencoder", "run", "help"}
        assert named == {name.replace("_", "-") for name in DenoiserConfig.model_fields}

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["nowhere", "out"], "error: nowhere is no finished latents folder"),
            (["nowhere", "out", "--batch-size", "0"], "error: --batch-size: "),
            (["nowhere", "out", "--channels", "8,x"], "error: --channels: "),
            (["nowhere", "out", "--objective", "gan"], "objective"),
        ],
    )
    def test_bad_input_is_one_sentence_and_code_2(self, arguments, sentence):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert sentence in result.stderr
        if sentence.startswith("error"):
            assert len(result.stderr.splitlines()) == 1

    def test_options_reach_the_training(self, latents, tmp_path):
        options = (
            "--channels 8,16 --layers 1 --steps 2 --batch-size 2 --no-labels --sample-every 0 --run"
        )
        arguments = [str(latents), str(tmp_path / "pipe"), *options.split(), str(tmp_path / "run")]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        assert load(tmp_path / "pipe").denoiser.config.block_out_channels == [8, 16]
        assert (tmp_path / "run" / "checkpoint.pt").is_file()

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [UNET, DIT], ids=["unet", "dit"])
    def test_two_processes(self, latents, tmp_path, options):
        options = {**SHORT, **options, "steps": 6, "checkpoint_every": 4}
        if "channels" in options:
            options["channels"] = "8,16"
        arguments = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
        # `accelerate launch --cpu` starts one process whatever it is told, unless by mpirun.
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        script = [str(PIPELINES / "train_denoiser.py"), str(latents), str(tmp_path / "pipe")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        environment["PYTHONPATH"] = str(PIPELINES.parent)
        subprocess.run([*launch, *script, *arguments], env=environment, check=True)
        state = state_of(tmp_path / "pipe-run" / "checkpoint.pt")
        assert state["step"] == 6

        # The same by hand: the mean of both processes' gradients at each step.
        expected = both_processes_in_one(latents, DenoiserConfig(**options), tmp_path / "one")
        for name, value in state["denoiser"].items():
            torch.testing.assert_close(value, expected[name], atol=2e-4, rtol=1e-3)


def both_processes_in_one(latents, config, folder):
    """The weights after training on the joined batches of two processes."""
    data = LatentDataset(latents)
    trainer = Trainer(config, data, folder)
    halves = [Examples(data, config, trainer.classes, (rank, 2)) for rank in range(2)]
    for step in range(config.steps):
        batches = [half[step] for half in halves]
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        trainer.update([joined], trainer.progress())
    return trainer.denoiser.state_dict()
