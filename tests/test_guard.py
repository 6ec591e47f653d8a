"""A run that meets numbers which are none, a full disk, or an adversary that wins."""

import errno
import io
import json
import os
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_training import assert_equal, rows, untimed, weights

from latent_ae import UserError, train
from latent_ae.config import AdversaryConfig, BottleneckConfig
from latent_ae.objective import Objective
from latent_ae.run_folder import RunFolder
from latent_ae.training import checkpoint, loop, record
from latent_ae.training.guard import Alarms, poison

HEARD = {"start": 2, "warmup_steps": 1, "channels": 4, "layers": 2, "lecam": 0.1}


@pytest.fixture
def told():
    return Console(record=True, width=200, file=io.StringIO())


def test_poison_spoils_the_gradient_of_a_loss_that_is_no_number():
    for value, spoiled in ((2.0, False), (torch.inf, True), (torch.nan, True)):
        weight = torch.ones((), requires_grad=True)
        # An infinite loss whose gradient is finite: the other processes would not notice it.
        poison(weight + value).backward()
        assert weight.grad.isnan().item() == spoiled
        assert spoiled or weight.grad == 1


def spoil_losses(monkeypatch, when):
    """Losses are NaN while `when(call number)`."""
    forward, calls = Objective.forward, []

    def spoiled(self, images, reconstruction, step):
        losses = forward(self, images, reconstruction, step)
        if type(images) is torch.Tensor:  # not when the memory is counted
            calls.append(step)
        if when(len(calls)):
            losses.total = losses.total * torch.nan
        return losses

    monkeypatch.setattr(Objective, "forward", spoiled)


def test_one_bad_update_is_skipped_and_counted(tiny, quiet, monkeypatch):
    spoil_losses(monkeypatch, lambda call: call == 3)
    run = train(tiny(validation=None, training={"ema": 0.0, "checkpoint_every": 1}), quiet)
    assert [row["skipped_steps"] for row in rows(run, "train")][-1] == 1
    # The checkpoint of the third step waited for an update that succeeded.
    assert [path.name[-1] for path in RunFolder(run).all_checkpoints()] == ["2", "4"]
    assert all(torch.isfinite(value).all() for value in weights(run, 4).values())


def test_many_bad_updates_send_the_run_back_with_a_lower_rate(tiny, told, monkeypatch):
    spoil_losses(monkeypatch, lambda call: 5 <= call < 10)
    training = {"steps": 8, "patience": 3, "rollback_rate": 0.25, "checkpoint_every": 2}
    run = train(tiny(validation=None, training=training | {"log_every": 1}), told)
    text = told.export_text()
    assert "back to step 4, learning rates × 0.25 from here" in text
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 9))
    rates = [row["learning_rate"] for row in rows(run, "train")]
    assert rates[3:5] == pytest.approx([2e-3, 5e-4])
    assert len(rows(run, "rollback")) == 1
    assert RunFolder(run).progress(RunFolder(run).latest())["rollbacks"] == 1
    # A resumed run keeps the lower rate.
    train(tiny(validation=None, training=training | {"steps": 9, "log_every": 1}), told)
    assert rows(run, "train")[-1]["learning_rate"] == pytest.approx(5e-4)


def test_a_run_without_a_checkpoint_stops_with_a_sentence(tiny, quiet, monkeypatch):
    spoil_losses(monkeypatch, lambda call: True)
    with pytest.raises(UserError, match=r"near step 2; there is no checkpoint yet: lower"):
        train(tiny(validation=None, training={"steps": 9, "patience": 2}), quiet)


def test_weights_that_are_no_numbers_never_become_a_checkpoint(tiny, quiet, monkeypatch):
    """However they came to be: here by hand, after a step with finite gradients."""
    update, spoil = loop.update, []

    def spoiled(run):
        result = update(run)
        if run.step == 4 and not spoil:
            spoil.append(run.step)
            with torch.no_grad():
                run.network.decoder.conv_out.bias.fill_(torch.nan)
        return result

    monkeypatch.setattr(loop, "update", spoiled)
    run = train(tiny(validation=None, training={"steps": 6, "checkpoint_every": 1}), quiet)
    assert len(rows(run, "rollback")) == 1
    assert all(torch.isfinite(value).all() for value in weights(run, 6).values())


def test_a_full_disk_stops_the_run_and_harms_nothing(tiny, quiet, monkeypatch):
    config = tiny(adversary=HEARD, validation=None, training={"steps": 6})
    whole = train(config.model_copy(update={"output": config.output + "-whole"}), quiet)

    def full(state, path, metadata):
        if "000000004" in str(path) and path.name == "ema.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, path, metadata)

    save = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"step-000000004 could not be written: .* No space left"):
        train(config, quiet)
    folder = RunFolder(config.output)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-000000002"]
    monkeypatch.setattr(checkpoint, "save_file", save)
    train(config, quiet)
    assert_equal(weights(config.output, 6), weights(whole, 6))


@pytest.mark.slow
def test_a_signal_in_a_step_lets_it_finish_and_the_end_is_the_same(tiny, told, monkeypatch):
    """With the adversary, LeCam's averages, workers, accumulation, in the middle of an epoch."""
    sections = {
        "adversary": HEARD | {"r1": 0.1, "r1_every": 2},
        "data": {"workers": 2},
        "losses": {"variance": "learned"},
        "training": {"steps": 6, "accumulation": 3, "precision": "bf16", "schedule": "cosine"},
    }
    config = tiny(**sections)
    whole = train(config.model_copy(update={"output": config.output + "-whole"}), told)
    update = loop.update

    def signalled(run):
        result = update(run)
        if run.step == 2:  # the third step
            os.kill(os.getpid(), signal.SIGUSR1)
        return result

    monkeypatch.setattr(loop, "update", signalled)
    before = signal.getsignal(signal.SIGUSR1)
    train(config, told)
    assert signal.getsignal(signal.SIGUSR1) == before
    text = told.export_text()
    assert "stopped by SIGUSR1 at step 3 of 6; the same command goes on from step-000000003" in text
    folder = RunFolder(config.output)
    assert folder.latest().name == "step-000000003"
    monkeypatch.setattr(loop, "update", update)
    train(config, told)
    for name in (
        "network/diffusion_pytorch_model.safetensors",
        "ema.safetensors",
        "objective.safetensors",
        "discriminator.safetensors",
    ):
        assert_equal(weights(whole, 6, name), weights(config.output, 6, name))
    states = [
        torch.load(RunFolder(run).checkpoint(6) / "optimizer.pt", weights_only=True)
        for run in (whole, config.output)
    ]
    assert str(states[0]) == str(states[1])
    assert untimed(whole)[-1] == untimed(config.output)[-1]


def test_the_best_checkpoint_stays(tiny, quiet, monkeypatch):
    scores = {1: 0.5, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.6, 6: 0.7}

    def measured(run):
        run.folder.sheet(run.step).parent.mkdir(exist_ok=True)
        (run.folder.sheet(1)).exists() or _sheet(run)
        _sheet(run)
        return {"psnr": 20.0, "ssim": 0.5, "lpips": scores[run.step]}

    monkeypatch.setattr(record, "validate", measured)
    # Steps 2 and 3 are no multiples of checkpoint_every: the best is saved where it is found.
    training = {"steps": 6, "validate_every": 1, "checkpoint_every": 4, "keep_checkpoints": 1}
    run = RunFolder(train(tiny(training=training), quiet))
    assert [path.name for path in run.all_checkpoints()] == ["step-000000002", "step-000000006"]
    assert run.best("lpips") == run.chosen("best") == run.chosen("2") == run.checkpoint(2)
    assert run.chosen("last") == run.checkpoint(6)
    with pytest.raises(UserError, match=r"no checkpoint '5'; its steps: 2, 6"):
        run.chosen("5")
    assert run.trained_network("best")[1]["validation"]["lpips"] == 0.2


def _sheet(run):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(run.folder.sheet(run.step))


def test_a_validation_that_was_cut_short_is_made_up(tiny, quiet, monkeypatch):
    """Killed after the checkpoint, before its validation: as if nothing had been validated."""
    run = RunFolder(train(tiny(), quiet))
    whole = run.last_validation(4)
    progress = run.progress(run.checkpoint(4))
    del progress["validation"]
    (run.checkpoint(4) / "progress.json").write_text(json.dumps(progress))
    run.log_file.write_text("")
    train(tiny(), quiet)
    assert run.last_validation(4) == whole
    assert run.best("lpips") == run.checkpoint(4)
    train(tiny(), quiet)
    assert len(rows(run.path, "validation")) == 1  # and not once more


def test_optimizer_options_may_change_between_two_starts(tiny, quiet):
    run = train(tiny(validation=None, adversary=HEARD), quiet)
    changed = {"steps": 5, "betas": [0.5, 0.8], "weight_decay": 0.1}
    adversary = HEARD | {"betas": [0.1, 0.2]}
    train(tiny(validation=None, adversary=adversary, training=changed), quiet)
    state = torch.load(RunFolder(run).checkpoint(5) / "optimizer.pt", weights_only=True)
    (group,) = state["optimizer"]["param_groups"]
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.8), 0.1)
    assert state["discriminator_optimizer"]["param_groups"][0]["betas"] == (0.1, 0.2)
    assert state["optimizer"]["state"][0]["step"] == 5  # the moments went on


def test_another_rate_begins_anew_with_its_returns(tiny, quiet, monkeypatch):
    spoil_losses(monkeypatch, lambda call: 5 <= call < 9)
    training = {"steps": 6, "patience": 2, "checkpoint_every": 2}
    run = RunFolder(train(tiny(validation=None, training=training), quiet))
    assert run.progress(run.latest())["rollbacks"] == 2
    train(tiny(validation=None, training=training | {"steps": 8}), quiet)
    assert run.progress(run.latest())["rollbacks"] == 2
    train(tiny(validation=None, training=training | {"steps": 9, "learning_rate": 1e-3}), quiet)
    assert run.progress(run.latest())["rollbacks"] == 0


def test_a_damaged_file_is_told_with_the_way_out(tiny, quiet):
    run = RunFolder(train(tiny(validation=None), quiet))
    (run.checkpoint(4) / "ema.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"step-000000004 cannot be restored: .* remove the folder"):
        train(tiny(validation=None, training={"steps": 6}), quiet)


def test_a_stop_after_a_skipped_update_still_saves(tiny, told, monkeypatch):
    spoil_losses(monkeypatch, lambda call: call == 3)
    update = loop.update

    def signalled(run):
        result = update(run)
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(loop, "update", signalled)
    run = train(tiny(validation=None, training={"steps": 9, "checkpoint_every": 100}), told)
    assert "the same command goes on from step-000000003" in told.export_text()
    assert RunFolder(run).latest().name == "step-000000003"


def test_a_run_can_take_up_an_adversary_and_put_it_down(tiny, quiet):
    run = train(tiny(validation=None, training={"steps": 2}), quiet)
    train(tiny(validation=None, adversary=HEARD, training={"steps": 4}), quiet)
    judged = RunFolder(run).checkpoint(4) / "discriminator.safetensors"
    assert judged.is_file()
    with pytest.raises(UserError, match=r"another adversary\.channels"):
        train(tiny(validation=None, adversary=HEARD | {"channels": 8}), quiet)
    released = HEARD | {"path": str(judged), "start": 99, "warmup_steps": 0}
    start = tiny(
        adversary=released, validation=None, training={"steps": 1}, output=str(run) + "-next"
    )
    begun = train(start, quiet)
    again = load_file(RunFolder(begun).checkpoint(1) / "discriminator.safetensors")
    assert_equal(again, load_file(judged))
    train(tiny(validation=None, training={"steps": 5}), quiet)
    assert not (RunFolder(run).checkpoint(5) / "discriminator.safetensors").exists()


def test_alarms_come_once_after_three_rows_and_again_after_a_good_one():
    alarms = Alarms(AdversaryConfig(adaptive_max=1e4, start=5), BottleneckConfig())
    bad = {"d_accuracy": 0.99, "adaptive_weight": 1e4}
    # While it learns alone it may be as right as it likes.
    assert [alarms.check(bad, 5) for _ in range(5)] == [[]] * 5
    told = [len(alarms.check(bad, 10)) for _ in range(5)]
    assert told == [0, 0, 2, 0, 0]
    assert alarms.check({"d_accuracy": 0.8, "adaptive_weight": 300.0}, 10) == []
    assert [len(alarms.check(bad, 10)) for _ in range(3)] == [0, 0, 2]
    low = Alarms(AdversaryConfig(start=5), BottleneckConfig())
    sentences = [low.check({"d_accuracy": 0.2, "adaptive_weight": 1e-3}, 9) for _ in range(3)][-1]
    assert "worse than guessing" in sentences[0]
    assert "far steeper" in sentences[1]
    assert Alarms(None, BottleneckConfig()).check(bad, 10) == []


def test_alarms_reach_the_log_and_the_person(tiny, told):
    adversary = HEARD | {"start": 0, "warmup_steps": 0, "adaptive_max": 1e-6, "weight": 1e-6}
    run = train(
        tiny(adversary=adversary, validation=None, training={"log_every": 1, "steps": 4}), told
    )
    assert "stands at its maximum" in told.export_text()
    assert "stands at its maximum" in json.dumps(rows(run, "alarm"))
