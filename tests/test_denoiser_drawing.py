"""What a denoiser's training draws: sheets and a distance that leave the training as it is."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import NAMES, photograph
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, UNet2DModel
from latents_folders import labelled_latents, rows_of, state_of, tiny_autoencoder, write_latents
from PIL import Image
from rich.console import Console

import denoiser_distance
from denoiser_examples import mix, order_of
from denoiser_folders import build_pipeline
from denoiser_samples import _titles
from denoiser_trainer import Trainer
from latent_ae.config import Preprocessing
from latent_ae.errors import UserError
from latent_ae.evaluation import FEATURE_NETWORKS
from latent_ae.latents import LatentDataset, encode
from latent_ae.pictures import title_font
from latent_diffusion import LatentDiffusionPipeline
from train_denoiser import DenoiserConfig, train

PIPELINES = Path(__file__).parents[1] / "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = Console(quiet=True)
SHAPE, NAMED = (4, 16, 16), ["cat, Felis catus", "dog"]
TINY = {"channels": (8,), "layers": 1, "attention": 0, "batch_size": 4, "learning_rate": 1e-3}
TINY |= {"warmup_steps": 2, "log_every": 2, "checkpoint_every": 4, "steps": 7, "ema": 0.8}
DRAWN = {"sample_every": 3, "distance_every": 3, "distance_samples": 12, "sampling_steps": 2}
DRAWN |= {"guidance_scale": 2.0, "sample_batch_size": 5}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return tiny_autoencoder(tmp_path_factory.mktemp("models") / "autoencoder")


@pytest.fixture(scope="module")
def latents(tmp_path_factory, autoencoder):
    """They have no variance."""
    folder = tmp_path_factory.mktemp("latents") / "labelled"
    return labelled_latents(folder, autoencoder, SHAPE, NAMED)


@pytest.fixture(scope="module")
def drawn(latents, tmp_path_factory):
    """A finished training that drew all along."""
    output = tmp_path_factory.mktemp("drawn") / "pipe"
    return train(latents, output, DenoiserConfig(**TINY, **DRAWN), console=QUIET)


def run_of(pipeline):
    return pipeline.with_name(f"{pipeline.name}-run")


def group(pipeline, name):
    return [row for row in rows_of(run_of(pipeline) / "log.jsonl") if row["group"] == name]


def saved(folder):
    """The pipeline by its parts."""
    parts = {"vae": AutoencoderKL, "denoiser": UNet2DModel}
    parts = {name: kind.from_pretrained(folder / name) for name, kind in parts.items()}
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    pipe = LatentDiffusionPipeline(**parts, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures_of(pipe, noise, **options):
    images = pipe(latents=noise, num_inference_steps=2, output_type="np", **options).images
    return np.round(255 * images)


def noise(number, of):
    """The noise of a picture: 1 for sheets, 2 for the distance."""
    generator = torch.Generator().manual_seed(mix(0, number, 0, of))
    return torch.randn(SHAPE, generator=generator)


def same_state(a, b):
    for name, value in a["denoiser"].items():
        assert torch.equal(value, b["denoiser"][name]), name
    for x, y in zip(a["ema"]["shadow_params"], b["ema"]["shadow_params"], strict=True):
        assert torch.equal(x, y)
    for place, moments in a["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, b["optimizer"]["state"][place][name])


class TestTraining:
    def test_goes_on_bit_by_bit_as_without(self, latents, drawn, tmp_path):
        quiet = {"sample_every": 0, "distance_every": 0}
        train(latents, tmp_path / "pipe", DenoiserConfig(**TINY, **quiet), console=QUIET)
        without, with_drawing = (
            state_of(folder / "checkpoint.pt") for folder in (tmp_path / "pipe-run", run_of(drawn))
        )
        same_state(without, with_drawing)
        losses = [[row["loss"] for row in group(p, "train")] for p in (tmp_path / "pipe", drawn)]
        assert losses[0] == losses[1]
        assert not (tmp_path / "pipe-run" / "samples").exists()

    def test_stopped_it_ends_as_one_never_stopped(self, latents, drawn, tmp_path, monkeypatch):
        config, update = DenoiserConfig(**TINY, **DRAWN), Trainer.update

        def killed(self, batches, progress):
            if self.step == 6:  # its sheet and its distance are there, its checkpoint is not
                raise KeyboardInterrupt
            return update(self, batches, progress)

        monkeypatch.setattr(Trainer, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            train(latents, tmp_path / "pipe", config, console=QUIET)
        monkeypatch.undo()
        assert group(tmp_path / "pipe", "distance")[-1]["step"] == 6
        assert state_of(tmp_path / "pipe-run" / "checkpoint.pt")["step"] == 4
        train(latents, tmp_path / "pipe", config, console=QUIET)
        whole, stopped = (
            state_of(run_of(pipe) / "checkpoint.pt") for pipe in (drawn, tmp_path / "pipe")
        )
        same_state(whole, stopped)
        for name in ("train", "samples", "distance"):
            a, b = (group(pipe, name) for pipe in (drawn, tmp_path / "pipe"))
            for row in (*a, *b):
                row.pop("seconds")
                row.pop("images_per_second", None)
            assert a == b
        for sheet in sorted((run_of(drawn) / "samples").iterdir()):
            again = tmp_path / "pipe-run" / "samples" / sheet.name
            assert sheet.read_bytes() == again.read_bytes()

    def test_the_same_command_after_the_end_draws_nothing(self, latents, drawn, monkeypatch):
        before = (run_of(drawn) / "log.jsonl").read_text()
        monkeypatch.setattr(LatentDiffusionPipeline, "__call__", None)
        train(latents, drawn, DenoiserConfig(**TINY, **DRAWN), console=QUIET)
        assert (run_of(drawn) / "log.jsonl").read_text() == before

    def test_tensorboard_has_the_rows_and_the_sheets(self, drawn):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(run_of(drawn) / "tensorboard")).Reload()
        assert [event.step for event in board.Scalars("train/loss")] == [2, 4, 6, 7]
        assert [event.step for event in board.Scalars("distance/frechet_distance")] == [3, 6, 7]
        assert [event.step for event in board.Images("samples/sheet")] == [3, 6, 7]


class TestSheets:
    def test_come_when_they_are_due_and_at_the_end(self, drawn):
        names = sorted(path.name for path in (run_of(drawn) / "samples").iterdir())
        assert names == [f"step-{step:09d}.png" for step in (3, 6, 7)]
        assert [row["step"] for row in group(drawn, "samples")] == [3, 6, 7]

    def test_show_what_the_saved_pipeline_draws(self, drawn):
        """A column for each class, a row for each noise, enlarged fourfold to 128 pixels."""
        with Image.open(run_of(drawn) / "samples" / "step-000000007.png") as sheet:
            pixels = np.asarray(sheet)
        rows = torch.stack([noise(i, of=1) for i in range(4)])
        head = pixels.shape[0] - 4 * (128 + 6)
        for column in range(2):
            expected = pictures_of(
                saved(drawn), rows, class_labels=[column] * 4, guidance_scale=2.0
            )
            for row in range(4):
                top, left = head + row * 134, 6 + column * 134
                found = pixels[top : top + 128 : 4, left : left + 128 : 4]
                assert np.abs(found - expected[row]).max() <= 1  # rounded from another place
                assert expected[row].std() > 1

    def test_without_labels_every_picture_has_its_own_noise(self, latents, tmp_path):
        options = {**TINY, "steps": 1, "labels": False, "sampling_steps": 1}
        pipe = train(latents, tmp_path / "pipe", DenoiserConfig(**options), console=QUIET)
        (sheet,) = (run_of(pipe) / "samples").iterdir()
        with Image.open(sheet) as picture:
            assert picture.size == (8 * 134 + 6, 4 * 134 + 6)

    def test_titles_fit_above_their_pictures(self):
        def pipeline(*names):
            return SimpleNamespace(config={"id2label": dict(enumerate(names))})

        long = 2 * "a very long name that no column is as wide as "
        for width in (128, 512):
            (title, short) = _titles(pipeline(long, "dog, Canis"), [0, 1], width)
            assert short == "dog"
            assert title.endswith("…")
            assert 0.7 * width < title_font(width).getlength(title) <= width
        assert _titles(pipeline(long + " one", long + " two"), [0, 1], 128) == ["0", "1"]


class TestDistance:
    def test_is_the_formula_of_the_features(self, latents, autoencoder, drawn):
        row = group(drawn, "distance")[-1]
        assert (row["samples"], row["pictures"], row["features"]) == (12, 10, "alexnet")
        pipe, data = saved(drawn), LatentDataset(latents)
        order = order_of(10, 0, 0).tolist()
        assert sorted(order) == list(range(10))
        labels = [data[order[i % 10]]["label"] for i in range(12)]
        images = []
        for i, label in enumerate(labels):
            asked = {"class_labels": [label], "guidance_scale": 2.0} if label >= 0 else {}
            images.append(pictures_of(pipe, noise(i, of=2)[None], **asked)[0])
        mean = [LatentDataset(latents, sample=False, scale=False)[i]["latents"] for i in range(10)]
        with torch.no_grad():
            decoded = AutoencoderKL.from_pretrained(autoencoder).decode(torch.stack(mean)).sample
        real = np.round((decoded.permute(0, 2, 3, 1).numpy().clip(-1, 1) + 1) * 127.5)
        assert row["frechet_distance"] == pytest.approx(frechet(real, np.stack(images)), rel=0.01)

    @pytest.mark.slow
    def test_does_not_depend_on_the_batch(self, latents, tmp_path):
        found = []
        for size in (3, 16):
            options = {**TINY, **DRAWN, "steps": 1, "sample_every": 0, "sample_batch_size": size}
            pipe = train(latents, tmp_path / str(size), DenoiserConfig(**options), console=QUIET)
            found.append(group(pipe, "distance")[0]["frechet_distance"])
        assert found[0] == pytest.approx(found[1], rel=1e-3)

    def test_keeps_what_it_compares_with(self, latents, autoencoder, tmp_path, monkeypatch):
        decoded = []
        read = denoiser_distance.Distance._decoded
        monkeypatch.setattr(
            denoiser_distance.Distance,
            "_decoded",
            lambda self, numbers: decoded.extend(numbers) or read(self, numbers),
        )
        options = {**TINY, **DRAWN, "steps": 1, "sample_every": 0, "sampling_steps": 1}
        options["distance_samples"] = 10
        run = {"run": tmp_path / "run", "console": QUIET}
        train(latents, tmp_path / "pipe", DenoiserConfig(**options), **run)
        assert len(decoded) == 10
        more = {**options, "steps": 2}
        train(latents, tmp_path / "pipe", DenoiserConfig(**more), **run)
        assert len(decoded) == 10
        others = torch.ones((10, *SHAPE))
        changed = write_latents(tmp_path / "changed", autoencoder, others, [0] * 10, names=NAMED)
        train(changed, tmp_path / "pipe", DenoiserConfig(**{**more, "steps": 3}), **run)
        assert len(decoded) == 20

    @pytest.mark.slow
    def test_latents_of_several_sizes(self, autoencoder, tmp_path):
        for number, size in enumerate([(48, 32)] * 3 + [(32, 48)] * 2):
            picture = photograph(NAMES[number % 4]).resize(size)
            (tmp_path / "photos").mkdir(exist_ok=True)
            picture.save(tmp_path / "photos" / f"{number}.png")
        cut = Preprocessing(resolution=40, buckets=True, bucket_step=8)
        folder = tmp_path / "latents"
        encode(autoencoder, tmp_path / "photos", folder, preprocessing=cut, workers=0)
        options = {**TINY, **DRAWN, "steps": 2, "guidance_scale": 1.0}
        pipe = train(folder, tmp_path / "pipe", DenoiserConfig(**options), console=QUIET)
        assert group(pipe, "distance")[0]["pictures"] == 5
        assert len(list((run_of(pipe) / "samples").iterdir())) == 1

    def test_refusals(self, autoencoder, tmp_path):
        small = write_latents(tmp_path / "small", autoencoder, torch.zeros(2, 4, 8, 8))
        one = write_latents(tmp_path / "one", autoencoder, torch.zeros(1, *SHAPE))
        config = DenoiserConfig(**TINY, **{**DRAWN, "guidance_scale": 1.0})
        with pytest.raises(UserError, match=r"pictures of 16 × 16 are too small for .* alexnet"):
            train(small, tmp_path / "pipe", config)
        with pytest.raises(UserError, match="holds one latent; a Fréchet distance takes two"):
            train(one, tmp_path / "other", config)

    def test_memory_that_is_short_is_no_small_picture(self, latents, tmp_path, monkeypatch):
        def starved(_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        config = DenoiserConfig(**TINY, **DRAWN)
        network = FEATURE_NETWORKS["alexnet"](None)
        monkeypatch.setattr(network, "forward", starved)
        monkeypatch.setitem(FEATURE_NETWORKS, "alexnet", lambda _: network)
        with pytest.raises(torch.OutOfMemoryError):
            train(latents, tmp_path / "pipe", config, console=QUIET)

    def test_labels_are_read_without_their_latents(
        self, latents, autoencoder, tmp_path, monkeypatch
    ):
        config, data = DenoiserConfig(**TINY, **DRAWN), LatentDataset(latents)
        trainer, vae = Trainer(config, data, tmp_path), AutoencoderKL.from_pretrained(autoencoder)
        pipeline = build_pipeline(trainer, data.manifest, vae)
        distance = denoiser_distance.Distance(trainer, pipeline, data)
        monkeypatch.setattr(LatentDataset, "__getitem__", None)
        asked = []
        monkeypatch.setattr(
            denoiser_distance, "draw", lambda *arguments: asked.extend(arguments[3].tolist()) or []
        )
        list(distance._drawn(list(range(10))))
        labels = [0, 1] * 4 + [1, -1]
        assert asked == [labels[place] for place in order_of(10, 0, 0)]

    @pytest.mark.slow
    def test_two_processes_share_it(self, latents, tmp_path):
        options = {**TINY, **DRAWN, "channels": "8", "accumulation": 2}
        arguments = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        script = [str(PIPELINES / "train_denoiser.py"), str(latents), str(tmp_path / "pipe")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        environment["PYTHONPATH"] = str(PIPELINES.parent)
        subprocess.run([*launch, *script, *arguments], env=environment, check=True)
        two = group(tmp_path / "pipe", "distance")
        assert [row["step"] for row in two] == [3, 6, 7]
        # One process that starts from the trained weights finds the same.
        (run_of(tmp_path / "pipe") / "log.jsonl").unlink()
        config = DenoiserConfig(**{**options, "accumulation": 2})
        train(latents, tmp_path / "pipe", config, console=QUIET)
        (one,) = group(tmp_path / "pipe", "distance")
        assert one["frechet_distance"] == pytest.approx(two[-1]["frechet_distance"], rel=1e-3)


def frechet(real, drawn):
    """Heusel et al.'s formula by scipy, on pictures (B, H, W, 3)."""
    network = FEATURE_NETWORKS["alexnet"](None)
    gaussians = []
    for pictures in (real, drawn):
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.uint8)
        features = network(images).double().numpy()
        gaussians.append((features.mean(0), np.cov(features.T)))
    (m1, c1), (m2, c2) = gaussians
    # Of matrices without full rank; tr (C1 C2)^½ is the sum of the roots of its eigenvalues.
    roots = np.sqrt(np.maximum(scipy.linalg.eigvals(c1 @ c2).real, 0)).sum()
    return np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2 * roots
