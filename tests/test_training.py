import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import NAMES, photograph
from rich.console import Console
from safetensors.torch import load_file

from latent_ae import UserError, train
from latent_ae.config import NetworkConfig, TrainingConfig
from latent_ae.data import evaluation_batches, normalize
from latent_ae.metrics import ReconstructionMetrics
from latent_ae.run_folder import RunFolder
from latent_ae.training import learning_rate

ROOT = Path(__file__).parents[1]


def weights(run, step, name="network/diffusion_pytorch_model.safetensors"):
    return load_file(RunFolder(run).checkpoint(step) / name)


def assert_equal(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}))


def rows(run, group):
    lines = (json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["group"] == group]


def untimed(run):
    """The log's training rows without what a clock says."""
    clock = ("seconds", "images_per_second", "data_wait_share")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows(run, "train")]


def test_learning_rate_rises_holds_and_falls():
    def rates(schedule):
        config = TrainingConfig(steps=10, learning_rate=1.0, warmup_steps=2, schedule=schedule)
        return [learning_rate(config, step) for step in range(11)]

    for schedule in ("constant", "linear", "cosine"):
        assert rates(schedule)[:3] == [0.5, 1.0, 1.0]
    assert rates("constant")[-1] == 1.0
    assert rates("linear")[6] == pytest.approx(0.5)
    assert rates("cosine")[6] == pytest.approx(0.5)
    assert rates("linear")[10] == rates("cosine")[10] == 0


def test_a_run_leaves_what_it_promises(run_folder):
    folder = RunFolder(run_folder)
    assert [path.name for path in folder.all_checkpoints()] == ["step-000000002", "step-000000004"]
    assert {row["step"] for row in rows(run_folder, "train")} == {2, 4}
    (validation,) = rows(run_folder, "validation")
    assert {"psnr", "ssim", "lpips"} <= validation.keys()
    assert folder.sheet(4).is_file()
    assert list((run_folder / "tensorboard").iterdir())
    assert {"l1", "lpips", "kl", "total", "gradient_norm", "images_per_second"} <= rows(
        run_folder, "train"
    )[0].keys()


def test_training_learns_a_photograph(tiny, quiet, tmp_path):
    (tmp_path / "one").mkdir()
    photograph("coffee", 32).save(tmp_path / "one" / "coffee.png")
    config = tiny(
        data={"path": str(tmp_path / "one"), "flip": False},
        losses={"perceptual": None},
        training={"steps": 120, "learning_rate": 5e-3, "log_every": 10, "checkpoint_every": 120},
        validation=None,
    )
    run = train(config, quiet)
    losses = [row["l1"] for row in rows(run, "train")]
    assert losses[-1] < 0.35 * losses[0]


def test_ema_is_the_average_it_says(tiny, quiet):
    """Replays the average from the checkpoints of every step."""
    training = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 9, "ema": 0.5}
    run = train(tiny(training=training, validation=None), quiet)
    averaged = weights(run, 1, "ema.safetensors")
    for step in range(2, 5):
        # diffusers' warm-up of the decay: min(decay, (1 + n) / (10 + n)) after n earlier updates.
        n = step - 1
        decay = min(0.5, (1 + n) / (10 + n))
        now = weights(run, step)
        averaged = {k: decay * averaged[k] + (1 - decay) * now[k] for k in averaged}
        saved = weights(run, step, "ema.safetensors")
        assert_equal(saved, averaged, rtol=1e-4, atol=1e-6)
    assert_equal(dict(RunFolder(run).trained_network()[0].state_dict()), saved)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_ends_bit_equal(tiny, quiet, workers):
    """Stopped after 3 of 6 steps, in the middle of an epoch, with accumulation and bf16."""
    training = {
        "steps": 6,
        "checkpoint_every": 3,
        "accumulation": 2,
        "precision": "bf16",
        "schedule": "cosine",
    }
    config = tiny(training=training, data={"workers": workers}, losses={"variance": "learned"})
    run = train(config, quiet)
    whole = [
        weights(run, 6, name)
        for name in (
            "network/diffusion_pytorch_model.safetensors",
            "ema.safetensors",
            "objective.safetensors",
        )
    ]
    log = untimed(run)
    shutil.rmtree(RunFolder(run).checkpoint(6))
    # What a kill during a save leaves behind must not matter.
    (RunFolder(run).checkpoints / "step-000000006.tmp").mkdir()
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "gro')
    train(config, quiet)
    again = [
        weights(run, 6, name)
        for name in (
            "network/diffusion_pytorch_model.safetensors",
            "ema.safetensors",
            "objective.safetensors",
        )
    ]
    for a, b in zip(whole, again, strict=True):
        assert_equal(a, b)
    resumed = untimed(run)
    assert [row["step"] for row in resumed] == [row["step"] for row in log]
    assert resumed[-1] == log[-1]


def test_a_finished_run_does_nothing_more_and_more_steps_go_on(tiny, quiet):
    run = train(tiny(validation=None), quiet)
    before = weights(run, 4)
    train(tiny(validation=None), quiet)
    assert_equal(weights(run, 4), before)
    train(tiny(validation=None, training={"steps": 6}), quiet)
    assert weights(run, 6)


def test_accumulation_equals_the_larger_batch(tiny, quiet):
    plain = {"validation": None, "bottleneck": {"weight": 0}, "losses": {"perceptual": None}}
    one = train(tiny(data={"batch_size": 4}, output=str(tiny().output) + "-1", **plain), quiet)
    two = train(
        tiny(training={"accumulation": 2}, output=str(tiny().output) + "-2", **plain), quiet
    )
    assert_equal(weights(one, 4), weights(two, 4), rtol=1e-3, atol=2e-5)


def test_validation_uses_the_average_and_leaves_the_training_alone(tiny, quiet):
    often = tiny(training={"validate_every": 1, "ema": 0.99}, output=f"{tiny().output}-a")
    never = tiny(training={"ema": 0.99}, validation=None, output=f"{tiny().output}-b")
    raw = tiny(training={"validate_every": 1, "ema": 0.0}, output=f"{tiny().output}-c")
    runs = [train(config, quiet) for config in (often, never, raw)]
    assert_equal(weights(runs[0], 4), weights(runs[1], 4))
    assert_equal(weights(runs[0], 4), weights(runs[2], 4))
    averaged, current = (rows(runs[i], "validation")[-1]["psnr"] for i in (0, 2))
    assert averaged != current
    # What was logged is what stock diffusers makes of the averaged weights.
    network, _ = RunFolder(runs[0]).trained_network()
    metrics = ReconstructionMetrics()
    for batch in evaluation_batches(often.validation, 64):
        with torch.no_grad():
            decoded = network(normalize(batch.images), sample_posterior=False).sample
        metrics.update(batch.images, decoded)
    assert averaged == pytest.approx(metrics.compute()["psnr"], abs=1e-3)


def test_pictures_are_counted_through_a_change_of_batch(tiny, quiet):
    """The stream goes on where it was, whatever the batch was before."""
    output = tiny().output
    run = train(tiny(validation=None, training={"steps": 2}), quiet)
    train(tiny(validation=None, data={"batch_size": 4}, training={"steps": 4}), quiet)
    train(tiny(validation=None, training={"steps": 6}), quiet)
    progress = json.loads((RunFolder(run).checkpoint(6) / "progress.json").read_text())
    assert progress["images"] == 2 * 2 + 2 * 4 + 2 * 2
    assert str(run) == output


def test_a_wrong_validation_path_is_told_before_the_first_step(tiny, quiet):
    config = tiny(validation={"path": "/nowhere/at/all"})
    with pytest.raises(UserError, match="there is no folder /nowhere"):
        train(config, quiet)
    assert not (Path(config.output) / "log.jsonl").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tiny, quiet):
    run = train(tiny(validation=None), quiet)
    before = weights(run, 4)
    wild = tiny(validation=None, training={"steps": 40, "learning_rate": 1e30, "clip_norm": 0})
    with pytest.raises(UserError, match=r"after 3 returns .* step-000000004"):
        train(wild, quiet)
    assert_equal(weights(run, 4), before)


def test_unreadable_pictures_do_not_stop_training(tiny, quiet, tmp_path):
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for name in NAMES[:2]:
        photograph(name, 48).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    console = Console(record=True, width=200, file=io.StringIO())
    run = train(tiny(data={"path": str(folder)}, validation=None), console)
    assert weights(run, 4)
    told = console.export_text()
    assert "skipped broken.png" in told
    assert "1 unreadable pictures were skipped" in told


def test_another_network_in_the_same_folder_is_refused(tiny, quiet):
    train(tiny(validation=None), quiet)
    with pytest.raises(UserError, match="another network"):
        train(tiny(validation=None, network={"latent_channels": 8}), quiet)
    with pytest.raises(UserError, match=r"another training\.ema"):
        train(tiny(validation=None, training={"ema": 0.0}), quiet)


def test_a_damaged_checkpoint_is_one_sentence(tiny, quiet):
    run = train(tiny(validation=None), quiet)
    (RunFolder(run).checkpoint(4) / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"step-000000004 cannot be restored"):
        train(tiny(validation=None, training={"steps": 6}), quiet)


def test_fp16_without_a_gpu_is_refused(tiny, quiet):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"training\.precision fp16"):
        train(tiny(training={"precision": "fp16"}), quiet)


def test_resolution_must_suit_a_loaded_network(tiny, quiet, exported):
    config = tiny(network=None, data={"resolution": 40}, validation=None)
    data = config.data.model_copy(update={"resolution": 33})
    network = NetworkConfig(path=str(exported))
    config = config.model_copy(update={"network": network, "data": data})
    with pytest.raises(UserError, match=r"data\.resolution 33"):
        train(config, quiet)


def test_fine_tuning_starts_from_the_folder(tiny, quiet, exported):
    config = tiny(network=None, training={"steps": 1, "learning_rate": 1e-9, "ema": 0.0})
    config = config.model_copy(update={"network": NetworkConfig(path=str(exported))})
    run = train(config, quiet)
    assert_equal(
        weights(run, 1),
        load_file(exported / "diffusion_pytorch_model.safetensors"),
        rtol=0,
        atol=1e-7,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp16_on_a_gpu_trains_and_resumes(tiny, quiet):
    training = {"steps": 8, "checkpoint_every": 4, "precision": "fp16"}
    run = train(tiny(training=training, validation=None), quiet)
    shutil.rmtree(RunFolder(run).checkpoint(8))
    train(tiny(training=training, validation=None), quiet)
    assert all(torch.isfinite(value).all() for value in weights(run, 8).values())
