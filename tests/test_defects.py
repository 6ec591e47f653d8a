"""Puts each defect of docs/correctness.md into a copy of the package: its test must fail."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-m", "")  # slow tests too


@dataclass(frozen=True)
class Defect:
    """A defect, the lines that put it in (file, what stands there, what will), and its test."""

    number: int
    edits: tuple[tuple[str, str, str], ...]
    test: str


def one(number, file, old, new, test):
    return Defect(number, ((file, old, new),), test)


STEP, RUN, CHECKPOINT = "training/step.py", "training/run.py", "training/checkpoint.py"
PREPARE = "training/prepare.py"
HERE = "tests/test_correctness.py::test_defect_"
WISH = "(wish,) = torch.autograd.grad(verdict.autoencoder, fake, retain_graph=True)"
_LEAK = "loss.backward(retain_graph=True)"
DEFECTS = [
    one(
        1,
        "objective.py",
        "self.perceptual(target, reconstruction.images)",
        "self.perceptual(target, reconstruction.images.detach())",
        HERE + "01_lpips_trains",
    ),
    one(
        2,
        STEP,
        "run.autoencoder(images, draw)",
        'getattr(run.autoencoder, "module", run.autoencoder)(images, draw)',
        HERE + "02_training_enters_by_the_wrapped_forward",
    ),
    one(
        3,
        PREPARE,
        "model = Autoencoder.from_config(config)",
        "model = Autoencoder.from_config(config).to(torch.bfloat16)",
        HERE + "03_every_weight_moves_at_a_small_rate[bf16]",
    ),
    one(
        4,
        PREPARE,
        "decay=config.training.ema, foreach=True)",
        "decay=config.training.ema, foreach=True)\n        ema.to(dtype=torch.bfloat16)",
        HERE + "04_the_average_moves_in_fp32",
    ),
    one(
        5,
        STEP,
        WISH,
        f"verdict.autoencoder.backward(retain_graph=True)\n        {WISH}",
        HERE + "05_the_generators_loss_leaves_the_discriminator_alone",
    ),
    Defect(
        6,
        (
            (STEP, "reconstructed.detach().requires_grad_(weight > 0)", "reconstructed"),
            (STEP, "loss.backward(inputs=list(run.adversary.parameters()))", _LEAK),
        ),
        HERE + "06_the_discriminators_loss_leaves_the_autoencoder_alone",
    ),
    one(
        7,
        CHECKPOINT,
        '_load_moments(judge, state["discriminator_optimizer"])',
        "pass",
        "tests/test_guard.py::test_a_signal_in_a_step_lets_it_finish_and_the_end_is_the_same",
    ),
    one(
        8,
        "training/trackers.py",
        "{key: _simple(value) for",
        "{key: value for",
        HERE + "08_trackers_get_a_config_they_can_take",
    ),
    one(
        9,
        "training/record.py",
        "if run.config.validation and self._due",
        "if self._due",
        HERE + "09_no_validation_is_no_error",
    ),
    one(
        10,
        "training/trackers.py",
        "pixels, step, dataformats",
        "pixels // 2, step, dataformats",
        HERE + "10_the_sheet_reaches_tensorboard_as_it_was_saved",
    ),
    one(
        12,
        CHECKPOINT,
        "rank = self.accelerator.process_index",
        "rank = 0",
        "tests/test_processes.py::test_two_processes_equal_one_with_the_same_global_batch[ddp]",
    ),
    one(
        13,
        STEP,
        "run.discriminator_optimizer if rule and rule.learns(run.step) else None",
        "run.discriminator_optimizer if rule and run.step % 2 else None",
        HERE + "13_both_networks_step_on_every_batch",
    ),
    one(
        14,
        STEP,
        "        _average(run.ema, run.network)",
        "        _average(run.ema, run.network)\n" * 2,
        HERE + "14_the_average_steps_once_an_update",
    ),
    one(
        15,
        STEP,
        "if rule is not None and rule.learns(run.step):",
        "if rule is not None:",
        HERE + "15_an_adversary_costs_nothing_before_its_time",
    ),
    one(
        16,
        "adversary.py",
        "step >= self.config.start - self.config.warmup_steps",
        "step >= self.config.start",
        HERE + "16_the_discriminator_has_learnt_before_it_speaks",
    ),
    one(
        17,
        "objective.py",
        "terms = {self.pixel_name: errors.mean()}",
        "terms = {self.pixel_name: errors.sum() / len(images)}",
        HERE + "17_losses_and_gradients_do_not_grow_with_the_picture",
    ),
    one(
        18,
        "training/validation.py",
        "with full_precision():",
        'with full_precision(), torch.autocast("cpu", torch.bfloat16):',
        HERE + "18_validation_is_fp32_and_its_pictures_are_eight_bits",
    ),
    one(
        18,
        "training/validation.py",
        "kept.append((images.cpu(), rounded.cpu()))",
        "kept.append((normalize(images).byte().cpu(), rounded.cpu()))",
        HERE + "18_validation_is_fp32_and_its_pictures_are_eight_bits",
    ),
    one(
        19,
        STEP,
        '"gradient_norm": norm.detach()',
        '"gradient_norm": torch.tensor(norm.item())',
        "tests/test_step.py::test_an_update_never_waits_for_the_device",
    ),
    one(
        20,
        "data/transforms.py",
        'random = rng if config.crop == "random" else None',
        "random = None",
        HERE + "20_crops_are_random_and_sources_may_stream",
    ),
    one(
        21,
        RUN,
        'start=progress["images"],',
        "start=0,",
        HERE + "21_a_resumed_run_goes_on_with_the_next_pictures",
    ),
    one(
        22,
        "export/statistics.py",
        "return LatentScaling(scaling_factor=factor)",
        "return LatentScaling(scaling_factor=0.18215)",
        HERE + "22_the_scale_is_measured",
    ),
    one(
        23,
        "config/adversary.py",
        'loss: Literal["hinge", "vanilla", "non_saturating"]',
        "loss: str",
        HERE + "23_names_are_checked_and_nothing_is_fetched",
    ),
    one(
        24,
        CHECKPOINT,
        'save_discriminator(self.adversary.discriminator, aside / "discriminator.safetensors")',
        'torch.save(self.adversary.discriminator, aside / "discriminator.pt")',
        HERE + "24_the_discriminator_is_safetensors_beside_the_model",
    ),
    one(
        0,
        "losses/discriminator.py",
        "return self.main(images).float()",
        "return self.main(images).float().sigmoid()",
        HERE + "elsewhere_verdicts_have_no_sigmoid",
    ),
    one(
        0,
        "data/loader.py",
        "position = self.start + self.rank * self.batch_size",
        "position = self.start",
        HERE + "elsewhere_processes_see_different_pictures",
    ),
    one(
        0,
        STEP,
        "run.optimizer.optimizer.found_inf = skip",
        "pass",
        "tests/test_step.py::test_an_update_without_numbers_moves_nothing[autoencoder]",
    ),
]


each_defect = pytest.mark.parametrize(
    "defect", DEFECTS, ids=lambda d: f"{d.number:02}-{d.test[-30:]}"
)


@each_defect
def test_the_lines_and_the_test_of_a_defect_stand(defect):
    """Cheap, so that moving a file or renaming a test is noticed before the slow tests run."""
    for file, old, _ in defect.edits:
        assert (ROOT / "latent_ae" / file).read_text().count(old) == 1, f"{file}: {old!r}"
    module, name = defect.test.split("::")
    name = name.partition("[")[0]
    assert f"def {name}(" in (ROOT / module).read_text()


@pytest.mark.slow
@each_defect
def test_the_defect_is_found(defect, tmp_path):
    for name in ("latent_ae", "tests", "configs", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    for file, old, new in defect.edits:
        path = tmp_path / "latent_ae" / file
        path.write_text(path.read_text().replace(old, new))
    result = subprocess.run(
        [sys.executable, *PYTEST, defect.test],
        cwd=tmp_path,  # where `python -m` looks for the package first
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 1, result.stdout[-2000:]
    assert "1 failed" in result.stdout
    assert "ImportError" not in result.stdout
