"""What a person is told before a run begins."""

import io
import json

import pytest
import torch
from rich.console import Console
from test_guard import HEARD
from typer.testing import CliRunner

from latent_ae import UserError, train
from latent_ae.cli import app
from latent_ae.config_file import dump_yaml, load_config
from latent_ae.data import normalize
from latent_ae.describe import describe
from latent_ae.memory import count_saved_bytes, training_memory
from latent_ae.training import dry_run
from latent_ae.training.prepare import prepare


@pytest.fixture
def told():
    return Console(record=True, width=300, file=io.StringIO())


def test_dry_run_speaks_of_the_real_run_and_leaves_nothing(tiny, told, tmp_path):
    config = tiny(adversary=HEARD | {"start": 5000}, training={"steps": 1000})
    result = dry_run(config, told)
    text = told.export_text()
    assert "going on from step 2 of 4" in text  # it has resumed
    assert "is heard from 5,000" in text  # the table is the real run's
    assert "d_accuracy" in text  # and the adversary was heard
    assert result.seconds == pytest.approx(1000 * 2 / result.images_per_second)
    assert result.peak_memory > result.checkpoint > 100_000
    assert list(tmp_path.iterdir()) == []


def test_dry_run_tells_what_would_not_work(tiny, told, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no folder /nowhere"):
        dry_run(tiny(data={"path": "/nowhere"}), told)
    with pytest.raises(UserError, match="too small for a discriminator of 6 layers"):
        dry_run(tiny(adversary={"layers": 6}), told)
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Full)
    with pytest.raises(UserError, match=r"the checkpoints need .*: lower training\.keep"):
        dry_run(tiny(validation=None), told)
    assert list(tmp_path.iterdir()) == []


class _Full:
    free = 1000


def test_dry_run_refuses_what_the_folder_would_refuse(tiny, told, quiet):
    train(tiny(validation=None, training={"steps": 1}), quiet)
    with pytest.raises(UserError, match="another network"):
        dry_run(tiny(network={"latent_channels": 8}), told)


def test_dry_run_by_the_command_line(tiny, tmp_path):
    (tmp_path / "run.yaml").write_text(dump_yaml(tiny(validation=None)))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "it works:" in result.output
    assert "next: latent-ae export" not in result.output


def test_the_startup_table_has_what_one_asks_first(tiny, told):
    config = tiny(adversary=HEARD, training={"steps": 1, "accumulation": 3}, validation=None)
    train(config, told)
    text = told.export_text()
    for words in (
        "parameters",
        "mean l1 + 0.5 · LPIPS (alex) + λ · KL / (C·H·W), per image element",
        "effective batch   6 = 2 a process × 3 micro-steps × 1 process",
        "4 images, 0.7 steps",
        "0.002, 0.000333 a picture of the batch",
        "hinge, 3,085 parameters, sees 34 pixels; learns from step 1, is heard from 2",
        " MiB (weights and EMA ",
    ):
        assert words in text, words


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_autograd_saves(tiny, checkpointing):
    """The count on tensors without storage against the same count on a real step."""
    config = tiny(
        adversary=HEARD,
        validation=None,
        training={"gradient_checkpointing": checkpointing, "channels_last": False},
    )
    run = prepare(config)
    run.autoencoder.train()
    images = normalize(next(run.stream).images)
    real = count_saved_bytes(run.autoencoder, run.objective, run.rule, images, config)
    memory = training_memory(config, run.network)
    assert memory["activations"] == pytest.approx(real, rel=0.02)
    weights = sum(p.numel() * 4 for p in run.network.parameters())
    assert memory["weights and EMA"] == 2 * weights
    assert memory["gradients and optimizer"] == 3 * weights


def test_memory_shrinks_with_checkpointing_precision_and_shards():
    def gib(*overrides, processes=1):
        config = load_config("configs/kl_f8.yaml", ["data.path=x", *overrides])
        with torch.device("meta"):
            from latent_ae.autoencoder import build_network

            network = build_network(config.network)
        return training_memory(config, network, processes)

    usual = gib()
    assert gib("training.precision=fp32")["activations"] > 1.5 * usual["activations"]
    assert gib("training.gradient_checkpointing=true")["activations"] < usual["activations"] / 2
    shard = gib("training.shard=true", processes=8)
    assert shard["gradients and optimizer"] == usual["gradients and optimizer"] // 24 * 3
    assert json.dumps(usual)


def test_describe_reaches_the_config_verb():
    facts = describe(load_config("configs/kl_f8.yaml", ["data.path=x"]))
    assert {"adversary", "memory a process", "learning rate"} <= facts.keys()
