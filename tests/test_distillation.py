"""A tiny autoencoder that learns a teacher's latents, and takes its place in a pipeline."""

import copy
import json
import shutil
import sys

import pytest
import stock_pipelines
import torch
import torch.nn.functional as F
from conftest import NAMES, photograph_tensor, tiny_content
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from safetensors.torch import load_file

from latent_ae import Autoencoder, UserError, cli, distill, export_run, train
from latent_ae.autoencoder import decode_latents, encode_mode, weights_sha256
from latent_ae.bottlenecks import NoBottleneck
from latent_ae.config import DistillationConfig, NetworkConfig
from latent_ae.config_file import load_config, parse_config
from latent_ae.data import evaluation_batches, normalize, to_uint8
from latent_ae.describe import describe
from latent_ae.distillation import RECIPE, distillation_config
from latent_ae.initialization import linear_code_
from latent_ae.metrics import ReconstructionMetrics
from latent_ae.networks import build_network
from latent_ae.objective import Objective
from latent_ae.run_folder import RunFolder
from latent_ae.training.teacher import Teacher

LEVELS = {"down": "Encoder", "up": "Decoder"}
STUDENT = [
    "network.encoder_block_out_channels=[16, 16]",
    "network.decoder_block_out_channels=[16, 16]",
    "network.num_encoder_blocks=[1, 1]",
    "network.num_decoder_blocks=[1, 1]",
    "data.resolution=32",
    "data.batch_size=4",
    "data.workers=0",
    "losses.perceptual=null",
    "training.precision=fp32",
    "training.warmup_steps=0",
    "training.ema=0.9",
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A linear transform code in an AutoencoderKL: good without training, f2 with 4 channels."""
    torch.manual_seed(0)
    network = build_network(
        NetworkConfig(
            block_out_channels=(32, 32),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=1,
            mid_block_add_attention=False,
        )
    )
    images = torch.cat([photograph_tensor(name, 64) for name in NAMES])
    linear_code_(network, images)
    with torch.no_grad():
        std = encode_mode(network, images)[0].std().item()
    network.register_to_config(scaling_factor=1 / std)
    folder = tmp_path_factory.mktemp("teacher") / "vae"
    network.save_pretrained(folder)
    return folder


def lesson(teacher, size=64, target="teacher"):
    """Photographs, the teacher's final latents of them, and its pictures."""
    images = torch.cat([photograph_tensor(name, size) for name in NAMES])
    taught = Teacher(DistillationConfig(teacher=str(teacher), target=target), CPU)(images)
    return images, taught.latents, taught.pictures


def psnr(pictures, others):
    return -10 * ((pictures - others) / 2).square().mean().log10().item()


def test_a_lesson_is_what_stock_pipelines_hand_on(teacher, tmp_path):
    """diffusers' own arithmetic, of pipelines with a scale, with a shift, and of SDXL's."""
    network = AutoencoderKL.from_pretrained(teacher)
    for numbers in (
        {"scaling_factor": 0.7},
        {"scaling_factor": 0.7, "shift_factor": 0.2},
        {"scaling_factor": 0.7, "latents_mean": [1.0] * 4, "latents_std": [2.0] * 4},
    ):
        told = copy.deepcopy(network)
        told.register_to_config(**{"shift_factor": None, **numbers})
        told.save_pretrained(tmp_path / "told")
        images, final, pictures = lesson(tmp_path / "told", 32)
        std, mean = numbers.get("latents_std", [1])[0], numbers.get("latents_mean", [0])[0]
        raw = final * std / 0.7 + mean + numbers.get("shift_factor", 0)
        with torch.no_grad():
            wanted = told.encode(images).latent_dist.mean
            torch.testing.assert_close(raw, wanted, rtol=0, atol=1e-5)
            torch.testing.assert_close(pictures, told.decode(wanted).sample.clamp(-1, 1))
        shutil.rmtree(tmp_path / "told")
    images, _, pictures = lesson(teacher, 32, target="picture")
    assert torch.equal(images, pictures)


def test_one_step_is_the_sum_of_two_independent_lessons(teacher, photos, tmp_path, quiet):
    """The decoder learns from the teacher's latents, the encoder from their distance alone."""
    config = distillation_config(
        teacher, photos, tmp_path / "run", [*STUDENT, "training.steps=1", "training.log_every=1"]
    )
    student = copy.deepcopy(build_network(config.network))
    images, latents, pictures = lesson(teacher, 32)
    objective = Objective(config.losses, config.bottleneck)
    result = Autoencoder(student, NoBottleneck())(images, taught=latents)
    result.target = pictures
    objective(images, result, 0).total.backward()
    found = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    own = student.encode(images).latents
    (F.mse_loss(own, latents) * latents[0].numel() / images[0].numel()).backward()
    F.l1_loss(student.decode(latents).sample, pictures).backward()
    for gradient, parameter in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.fixture(scope="module")
def distilled(teacher, photos, tmp_path_factory, quiet):
    """A student after sixty steps, its run, and its exported folder."""
    out = tmp_path_factory.mktemp("student") / "tiny"
    steps = ["training.steps=60", "training.checkpoint_every=30", "training.learning_rate=4e-3"]
    distill(teacher, photos, out, [*STUDENT, *steps], console=quiet)
    return out


@torch.no_grad()
def test_the_student_speaks_the_teachers_latents(teacher, distilled):
    stock = AutoencoderTiny.from_pretrained(distilled)
    images, latents, pictures = lesson(teacher)
    fresh = build_network(RunFolder(f"{distilled}-run").config().network)
    flat = pictures.mean((2, 3), keepdim=True).expand_as(pictures)
    own = psnr(decode_latents(stock, latents), pictures)
    assert own > psnr(flat, pictures) + 3
    assert own > psnr(decode_latents(fresh, latents), pictures) + 6
    error = (encode_mode(stock, images)[0] - latents).square().mean() / latents.var()
    assert error < 0.6  # of 1 for their mean
    assert stock.config["scaling_factor"] == 1
    assert stock.config["shift_factor"] == 0


def test_the_student_takes_the_teachers_place_in_stable_diffusion(teacher, distilled):
    image = photograph_tensor("coffee")
    _, latents, _ = lesson(teacher)
    latents = latents[NAMES.index("coffee")][None]
    drawn = []
    for vae in (AutoencoderKL.from_pretrained(teacher), AutoencoderTiny.from_pretrained(distilled)):
        pipe = stock_pipelines.build("StableDiffusionPipeline", vae)
        stock_pipelines.idealise(pipe, latents)
        drawn.append(stock_pipelines.run(pipe, image / 2 + 0.5))
    with torch.no_grad():
        wanted = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(drawn[1], wanted, rtol=0, atol=1e-5)
    flat = drawn[0].mean((2, 3), keepdim=True).expand_as(drawn[0])
    assert psnr(2 * drawn[1], 2 * drawn[0]) > psnr(2 * flat, 2 * drawn[0]) + 3


def test_what_is_recorded_of_a_distillation(teacher, distilled):
    record = json.loads((distilled / "latent_ae.json").read_text())
    assert record["teacher"]["weights_sha256"] == weights_sha256(teacher)
    assert record["config"]["distillation"] == {"teacher": str(teacher), "target": "teacher"}
    card = (distilled / "README.md").read_text()
    assert "final (scaled) ones of the autoencoder vae, weights sha256" in card
    assert str(teacher.parent) not in card
    rows = [row for row in RunFolder(f"{distilled}-run").log_rows() if row["group"] == "train"]
    assert rows[-1]["latents"] < rows[0]["latents"]
    facts = describe(RunFolder(f"{distilled}-run").config())
    assert facts["teacher"].endswith("the decoder makes its reconstruction of its final latents")
    assert "teacher" in facts["memory a process"]


@pytest.mark.slow
def test_a_distillation_resumes_bit_for_bit_without_its_teacher_in_it(distilled, tmp_path, quiet):
    first, again = RunFolder(f"{distilled}-run"), RunFolder(tmp_path / "again")
    shutil.copytree(first.path, again.path)
    shutil.rmtree(again.checkpoint(60))
    train(first.config().model_copy(update={"output": str(again.path)}), quiet)
    for name in ("network/diffusion_pytorch_model.safetensors", "ema.safetensors"):
        wanted, found = (load_file(run.checkpoint(60) / name) for run in (first, again))
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    files = {path.name for path in again.checkpoint(60).iterdir()}
    assert files == {
        "network",
        "ema.safetensors",
        "objective.safetensors",
        "optimizer.pt",
        "process-0.pt",
        "progress.json",
    }


@pytest.mark.slow
def test_validation_holds_the_student_against_its_teacher(teacher, photos, tmp_path, quiet):
    """It rises, and is measured here again from the exported student."""
    overrides = [
        *STUDENT,
        "training.steps=400",
        "training.learning_rate=4e-3",
        "training.validate_every=100",
        f"validation={{path: {photos}, images: 4, resolution: 64}}",
    ]
    out = distill(teacher, photos, tmp_path / "tiny", overrides, console=quiet)
    run = RunFolder(f"{out}-run")
    scores = [row["psnr"] for row in run.log_rows() if row["group"] == "validation"]
    assert scores[0] < scores[1] < scores[-1]
    assert scores[-1] > 24  # of the teacher's pictures; the flat one is near 14
    misses = [row["latents"] for row in run.log_rows() if row["group"] == "validation"]
    assert misses[0] > misses[-1] > 0
    images, latents, _ = lesson(teacher)
    student, metrics = AutoencoderTiny.from_pretrained(out), ReconstructionMetrics()
    taught = Teacher(DistillationConfig(teacher=str(teacher)), CPU)
    with torch.no_grad():
        for batch in evaluation_batches(run.config().validation, 64, batch_size=4, limit=4):
            told = taught(normalize(batch.images))
            metrics.update(to_uint8(told.pictures), student.decode(told.latents).sample)
        error = (student.encode(images).latents - latents).square().mean() / latents.var()
    assert error < 0.15
    assert metrics.compute()["psnr"] == pytest.approx(scores[-1], abs=1e-3)
    protocol = json.loads((out / "latent_ae.json").read_text())["metric_protocol"]
    assert "decoded from the teacher's latents and held against its reconstruction" in protocol


@pytest.mark.slow
@pytest.mark.parametrize("target", ["teacher", "picture"])
def test_distillation_takes_an_adversary_and_half_precision(
    teacher, photos, tmp_path, quiet, target
):
    overrides = [
        *STUDENT,
        "training.steps=3",
        "training.log_every=1",
        "training.precision=bf16",
        f"distillation.target={target}",
        "adversary={weight: 0.1, start: 1, warmup_steps: 1, layers: 1, channels: 4}",
    ]
    out = distill(teacher, photos, tmp_path / "tiny", overrides, console=quiet)
    rows = [r for r in RunFolder(f"{out}-run").log_rows() if r["group"] == "train"]
    assert rows[-1]["adaptive_weight"] > 0
    assert (out / "discriminator.safetensors").is_file()


def test_the_students_shape_follows_from_the_teachers(teacher, photos):
    config = distillation_config(teacher, photos, "run")
    assert config.network.num_encoder_blocks == (1, 3)
    assert config.network.num_decoder_blocks == (3, 1)
    assert config.network.encoder_block_out_channels == (64, 64)
    assert config.network.latent_channels == 4
    assert config.data.path == str(photos)
    plain = load_config(RECIPE)
    assert config.training == plain.training
    path = distillation_config(teacher, photos, "run", ["network={path: mine}"]).network.path
    assert path == "mine"


def test_what_cannot_be_distilled_is_one_sentence(teacher, photos, tmp_path, quiet):
    with pytest.raises(UserError, match="no exported autoencoder"):
        distill(tmp_path / "none", photos, tmp_path / "out", console=quiet)
    with pytest.raises(UserError, match="there is no folder, parquet or tar file at"):
        distill(teacher, tmp_path / "none", tmp_path / "out", console=quiet)
    deeper = [
        *STUDENT,
        *(f"network.{k}_block_out_channels=[16, 16, 16]" for k in ("encoder", "decoder")),
        *(f"network.num_{k}_blocks=[1, 1, 1]" for k in ("encoder", "decoder")),
    ]
    with pytest.raises(UserError, match=r"are f2 with 4 .* 3, those of the network f4 with 4"):
        distill(teacher, photos, tmp_path / "out", deeper, console=quiet)
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    levels = {f"{k}_block_types": (f"{k.title()}{c}Block2D",) * 2 for k, c in LEVELS.items()}
    AutoencoderKLFlux2(latent_channels=4, **shape, **levels).save_pretrained(tmp_path / "flux2")
    with pytest.raises(UserError, match="whose latents pipelines scale by a BatchNorm"):
        distill(tmp_path / "flux2", photos, tmp_path / "out", STUDENT, console=quiet)
    plain = tiny_content(photos, tmp_path / "kl")
    with pytest.raises(UserError, match="distillation is for networks without a posterior"):
        parse_config({**plain, "distillation": {"teacher": str(teacher)}})
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        distill(teacher, photos, tmp_path / "taken", console=quiet)
    assert not (tmp_path / "out").exists()


def test_another_teacher_in_the_same_run_is_refused(teacher, distilled, tmp_path, quiet):
    shutil.copytree(teacher, tmp_path / "other")
    config = RunFolder(f"{distilled}-run").config()
    other = config.distillation.model_copy(update={"teacher": str(tmp_path / "other")})
    with pytest.raises(UserError, match="holds a run with another distillation"):
        train(config.model_copy(update={"distillation": other}), quiet)
    with pytest.raises(UserError, match="a distilled network's latents are its teacher's"):
        export_run(f"{distilled}-run", tmp_path / "out", statistics="shift")


@pytest.mark.slow
def test_the_verb_trains_and_exports(teacher, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "tiny"
    arguments = ["distill", teacher, photos, out, *STUDENT, "training.steps=2"]
    monkeypatch.setattr(sys, "argv", ["latent-ae", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert f"AutoencoderTiny.from_pretrained('{out}')" in capsys.readouterr().err.replace("\n", "")
    assert AutoencoderTiny.from_pretrained(out).config["latent_channels"] == 4


def test_a_teacher_of_grey_pictures_has_a_grey_student(photos, tmp_path, quiet):
    network = build_network(
        NetworkConfig(
            in_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
        )
    )
    network.save_pretrained(tmp_path / "teacher")
    out = distill(
        tmp_path / "teacher",
        photos,
        tmp_path / "out",
        [*STUDENT, "training.steps=1"],
        console=quiet,
    )
    student = AutoencoderTiny.from_pretrained(out)
    assert student.decode(torch.zeros(1, 4, 4, 4)).sample.shape == (1, 1, 8, 8)
