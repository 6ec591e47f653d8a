"""One test for each defect of the field's most-used training script (docs/correctness.md).

Each is named after the defect and fails when the defect is put in by hand: tests/test_defects.py
does that, line by line.
"""

import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from conftest import NAMES, photograph, photograph_tensor
from diffusers import AutoencoderKL
from PIL import Image
from rich.console import Console
from test_guard import HEARD
from test_training import rows, weights
from torch import nn

from latent_ae import UserError, export_run, train
from latent_ae.config import AdversaryConfig, DiscriminatorConfig
from latent_ae.config_file import load_config
from latent_ae.data import TrainingStream, normalize
from latent_ae.losses import NLayerDiscriminator
from latent_ae.run_folder import RunFolder
from latent_ae.training import loop, record, step
from latent_ae.training.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_thread")


def micro_step(run):
    """One micro-step; returns the autoencoder's gradients."""
    torch.manual_seed(3)
    step._accumulate(run, normalize(next(run.stream).images))
    return [p.grad.clone() for p in run.network.parameters()]


def test_defect_01_lpips_trains(tiny):
    """LPIPS under no_grad is a number in the log and no gradient."""
    loss = {"validation": None, "losses": {"perceptual": {"net": "alex", "weight": 1.0}}}
    with_lpips = micro_step(prepare(tiny(**loss)))
    without = micro_step(prepare(tiny(validation=None, losses={"perceptual": None})))
    assert all((a - b).norm() > 1e-3 * b.norm() for a, b in zip(with_lpips, without, strict=True))


def test_defect_02_training_enters_by_the_wrapped_forward(tiny):
    """`unwrap_model(vae).encode` under DDP leaves every rank its own gradients."""
    run = prepare(tiny(adversary=HEARD | {"start": 0}, validation=None))
    entered = []
    for name in ("autoencoder", "objective", "adversary"):
        part = getattr(run, name)
        wrapper = nn.Module()  # stands for DDP, whose __call__ is what prepares the reduction
        wrapper.module = part
        wrapper.forward = lambda *args, part=part, name=name: (entered.append(name), part(*args))[1]
        setattr(run, name, wrapper)
    step._accumulate(run, normalize(next(run.stream).images))
    assert entered == ["autoencoder", "adversary", "objective"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_defect_03_every_weight_moves_at_a_small_rate(tiny, quiet, precision):
    """Weights in bf16 do not move by 4.5e-6: 97 % of them stayed in 100 steps."""
    training = {"steps": 8, "precision": precision, "learning_rate": 4.5e-6, "clip_norm": 0}
    run = RunFolder(train(tiny(validation=None, training=training), quiet))
    before, after = (weights(run.path, step) for step in (6, 8))
    assert all(value.dtype == torch.float32 for value in after.values())
    moved = sum((before[name] != after[name]).sum().item() for name in after)
    assert moved > 0.95 * sum(value.numel() for value in after.values())


def test_defect_04_the_average_moves_in_fp32(tiny, quiet):
    training = {"steps": 8, "precision": "bf16", "learning_rate": 4.5e-6, "ema": 0.9999}
    run = RunFolder(train(tiny(validation=None, training=training), quiet))
    before, after = (weights(run.path, step, "ema.safetensors") for step in (6, 8))
    assert all(value.dtype == torch.float32 for value in after.values())
    moved = sum((before[name] != after[name]).sum().item() for name in after)
    assert moved > 0.8 * sum(value.numel() for value in after.values())


def heard(tiny, **sections):
    sections = {"validation": None} | sections
    return prepare(tiny(adversary=HEARD | {"start": 0, "lecam": 0.0}, **sections))


def test_defect_05_the_generators_loss_leaves_the_discriminator_alone(tiny):
    """Not frozen, it was pushed the wrong way: cosine −.90 between its step and its loss."""
    run = heard(tiny)
    images = normalize(next(run.stream).images)
    torch.manual_seed(3)
    step._accumulate(run, images)
    ours = torch.cat([p.grad.flatten() for p in run.adversary.parameters()])
    torch.manual_seed(3)
    fake = run.autoencoder(images).images.detach()
    loss = run.rule(images, fake, 0).discriminator
    alone = torch.autograd.grad(loss, list(run.adversary.parameters()))
    alone = torch.cat([g.flatten() for g in alone])
    assert nn.functional.cosine_similarity(ours, alone, dim=0).item() == pytest.approx(1, abs=1e-5)


def test_defect_06_the_discriminators_loss_leaves_the_autoencoder_alone(tiny, monkeypatch):
    run = heard(tiny)
    monkeypatch.setattr(type(run.rule), "weight", lambda self, step: 0.0)  # it only listens
    listened = micro_step(run)
    alone = micro_step(prepare(tiny(validation=None)))
    assert all(torch.equal(a, b) for a, b in zip(listened, alone, strict=True))


# 07, a resume that fails: test_training.py, test_guard.py and the restart matrix.


class _Strict(GeneralTracker):
    """Takes what TensorBoard's hparams take, and remembers it."""

    name, requires_logging_directory, seen = "strict", False, []

    def __init__(self, run_name, **options):
        super().__init__()
        self.seen.clear()

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        assert all(isinstance(value, bool | int | float | str) for value in values.values())
        self.seen.append(values)

    def log(self, values, step=None, **options):
        self.seen.append((step, values))

    def log_images(self, values, step=None, **options):
        self.seen.append((step, values))


def test_defect_08_trackers_get_a_config_they_can_take(tiny, quiet, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", _Strict)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    train(tiny(training={"trackers": ["wandb"]}), quiet)
    config, *logged = _Strict.seen
    assert config["network.block_out_channels"] == "[8, 16]"
    assert config["training.learning_rate"] == 2e-3
    assert {"train/total", "train/images_per_second"} <= logged[0][1].keys()
    (sheet,) = [values["validation/sheet"] for _, values in logged if "validation/sheet" in values]
    assert sheet.dtype == np.uint8
    assert sheet.ndim == 4


def test_a_tracker_that_fails_is_left_out(tiny, monkeypatch):
    class Failing(_Strict):
        def log(self, values, step=None, **options):
            raise ConnectionError("no route")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Failing)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    console = Console(record=True, width=200, file=io.StringIO())
    run = train(tiny(training={"trackers": ["wandb"]}, validation=None), console)
    assert weights(run, 4)
    assert console.export_text().count("has failed and is left out from here: no route") == 1


def test_a_tracker_that_is_not_installed_is_told(tiny, quiet):
    with pytest.raises(UserError, match="clearml is not installed"):
        train(tiny(training={"trackers": ["clearml"]}), quiet)


def test_defect_09_no_validation_is_no_error(tiny, quiet):
    assert weights(train(tiny(validation=None, training={"validate_every": 1}), quiet), 4)


def test_defect_10_the_sheet_reaches_tensorboard_as_it_was_saved(run_folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder / "tensorboard"), {"images": 0})
    events.Reload()
    (event,) = events.Images("validation/sheet")
    with Image.open(RunFolder(run_folder).sheet(4)) as sheet:
        logged = Image.open(io.BytesIO(event.encoded_image_string))
        assert event.step == 4
        assert np.array_equal(np.asarray(logged), np.asarray(sheet))
    assert {"train/total", "validation/psnr"} <= set(events.Tags()["scalars"])


# 11, push_to_hub after training: there is none; export is a verb of its own.
# 12, the state of the main process only: test_processes.py compares both processes' files.


def test_defect_13_both_networks_step_on_every_batch(tiny, quiet):
    training = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 9}
    adversary = HEARD | {"start": 0}
    run = train(tiny(adversary=adversary, validation=None, training=training), quiet)
    for name in ("network/diffusion_pytorch_model.safetensors", "discriminator.safetensors"):
        states = [weights(run, step, name) for step in range(1, 5)]
        for before, after in itertools.pairwise(states):
            assert any(not torch.equal(before[key], after[key]) for key in after)
    state = torch.load(RunFolder(run).checkpoint(4) / "optimizer.pt", weights_only=True)
    for key in ("optimizer", "discriminator_optimizer"):
        assert state[key]["state"][0]["step"] == 4


def test_defect_14_the_average_steps_once_an_update(tiny, quiet):
    adversary = HEARD | {"start": 0}
    run = train(tiny(adversary=adversary, validation=None, training={"accumulation": 2}), quiet)
    state = torch.load(RunFolder(run).checkpoint(4) / "optimizer.pt", weights_only=True)
    assert state["ema_step"] == 4


def forward_counts(run, steps):
    """How often each part ran forward, step by step."""
    counts = {"network": 0, "discriminator": 0, "lpips": 0}
    parts = {
        "network": run.network.encoder,
        "discriminator": run.rule.discriminator,
        "lpips": run.objective.perceptual.lpips.net,
    }
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, n=name: counts.update({n: counts[n] + 1}))
    seen = []
    for _ in range(steps):
        before = dict(counts)
        loop.update(run)
        run.step += 1
        seen.append(tuple(counts[name] - before[name] for name in counts))
    return seen


def test_defect_15_an_adversary_costs_nothing_before_its_time(tiny):
    """And afterwards a step is one forward pass of each network over what it has to see."""
    adversary = HEARD | {"start": 3, "warmup_steps": 1}
    run = prepare(tiny(adversary=adversary, validation=None))
    assert forward_counts(run, 5) == [(1, 0, 2), (1, 0, 2), (1, 2, 2), (1, 2, 2), (1, 2, 2)]


def test_defect_16_the_discriminator_has_learnt_before_it_speaks(tiny, quiet):
    adversary = {"channels": 16, "layers": 2, "start": 30, "warmup_steps": 30}
    adversary |= {"learning_rate": 2e-3}
    training = {"steps": 30, "log_every": 10, "checkpoint_every": 30, "learning_rate": 1e-5}
    config = tiny(adversary=adversary, validation=None, training=training, data={"batch_size": 4})
    log = rows(train(config, quiet), "train")
    assert log[-1]["d_accuracy"] > 0.9 > log[0]["d_accuracy"]
    assert "adaptive_weight" not in log[-1]
    assert AdversaryConfig().warmup_steps > 0


def test_defect_17_losses_and_gradients_do_not_grow_with_the_picture(tiny):
    """Summed over a picture and divided by B, then clipped at 1, a loss is nothing but its sign."""
    norms = []
    for side in (32, 64):
        run = prepare(tiny(data={"resolution": side, "crop": "center"}, validation=None))
        gradient = torch.cat([g.flatten() for g in micro_step(run)])
        norms.append(gradient.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.5)  # a sum would give four times as much


def test_defect_18_validation_is_fp32_and_its_pictures_are_eight_bits(tiny, quiet, monkeypatch):
    seen = []
    convolve = nn.Conv2d.forward

    def watch(self, x):
        out = convolve(self, x)
        if not torch.is_grad_enabled():
            seen.append(out.dtype)
        return out

    def measured(run):
        monkeypatch.setattr(nn.Conv2d, "forward", watch)
        result = validate(run)
        monkeypatch.setattr(nn.Conv2d, "forward", convolve)
        return result

    validate = record.validate
    monkeypatch.setattr(record, "validate", measured)
    run = RunFolder(train(tiny(training={"precision": "bf16"}), quiet))
    assert set(seen) == {torch.float32}
    # The sheet's first column is the pictures themselves, where [-1, 1] would be nearly black.
    with Image.open(run.sheet(4)) as picture:
        sheet = np.asarray(picture)
    first = sheet[-6 - 64 : -6, 6 : 6 + 64].astype(float)
    shown = [np.asarray(picture, float) for picture in held_out()]
    assert min(np.abs(first - picture).mean() for picture in shown) < 20


def held_out():
    for name in NAMES:
        picture = photograph(name)
        picture.thumbnail((144, 144), Image.Resampling.LANCZOS)
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        square = picture.crop((left, top, left + side, top + side))
        yield square.resize((64, 64), Image.Resampling.LANCZOS)


# 19, nine reads of the device a micro-step: test_step.py counts them.


def test_defect_20_crops_are_random_and_sources_may_stream(tiny, photos):
    config = tiny(data={"flip": False}).data
    stream = TrainingStream(config)
    first, second = (torch.cat([next(stream).images for _ in range(2)]) for _ in range(2))
    assert not torch.equal(first.sort(0)[0], second.sort(0)[0])  # two epochs, other crops
    streamed = TrainingStream(config.model_copy(update={"streaming": True}))
    assert next(streamed).images.shape == (2, 3, 32, 32)


def test_defect_21_a_resumed_run_goes_on_with_the_next_pictures(tiny, quiet, monkeypatch):
    seen = []
    normal = step.normalize
    monkeypatch.setattr(step, "normalize", lambda images: (seen.append(images), normal(images))[1])
    config = tiny(validation=None, training={"steps": 6, "checkpoint_every": 3})
    train(config.model_copy(update={"output": config.output + "-whole"}), quiet)
    whole, seen[:] = list(seen), []
    train(tiny(validation=None, training={"steps": 3, "checkpoint_every": 3}), quiet)
    train(config, quiet)
    assert all(torch.equal(a, b) for a, b in zip(whole, seen, strict=True))


def test_defect_22_the_scale_is_measured(run_folder, exported):
    vae = AutoencoderKL.from_pretrained(exported)
    record = json.loads((exported / "latent_ae.json").read_text())
    assert vae.config.scaling_factor == pytest.approx(1 / record["latents"]["std"])
    assert vae.config.scaling_factor not in (1.0, 0.18215)


def test_defect_23_names_are_checked_and_nothing_is_fetched(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {path: x}\nlosses: {pixel: l3}\noutput: y\n")
    with pytest.raises(UserError, match=r"losses\.pixel: 'l3' is unknown; valid: 'l1', 'l2'"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"adversary\.loss: 'wgan' is unknown; valid: 'hinge'"):
        load_config(tmp_path / "a.yaml", ["losses.pixel=l1", "adversary={loss: wgan}"])


def test_defect_24_the_discriminator_is_safetensors_beside_the_model(tiny, quiet, tmp_path):
    run = train(tiny(adversary=HEARD, validation=None), quiet)
    out = export_run(run, tmp_path / "out", images=4)
    assert (out / "discriminator.safetensors").is_file()
    assert not [file.name for file in out.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]
    AutoencoderKL.from_pretrained(out)  # which the file beside it does not disturb
    card = (out / "README.md").read_text()
    assert "0.5 PatchGAN (hinge, from step 2)" in card


def test_defect_elsewhere_verdicts_have_no_sigmoid():
    """vqgan's script ends the discriminator in a sigmoid and takes hinge: margins out of reach."""
    discriminator = NLayerDiscriminator(DiscriminatorConfig(channels=4, layers=1))
    with torch.no_grad():
        discriminator.main[-1].bias.fill_(5.0)
    assert discriminator(photograph_tensor("coffee")).mean() > 1


def test_defect_elsewhere_processes_see_different_pictures(tiny):
    """Its loader is not sharded either: every GPU trained on the same batches."""
    config = tiny().data
    batches = [next(TrainingStream(config, rank=rank, world=2)).samples for rank in (0, 1)]
    keys = [{sample.key for sample in batch} for batch in batches]
    assert keys[0].isdisjoint(keys[1])


def test_every_defect_of_the_table_has_its_test():
    root = Path(__file__).parents[1]
    table = (root / "docs/correctness.md").read_text()
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", table):
        assert f"def {name}(" in (root / file).read_text(), name
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]
    assert numbers == list(range(1, 25))
