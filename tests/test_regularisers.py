"""Both regularisers of the latents in whole runs: stopped and resumed, and over two processes."""

import shutil
from pathlib import Path

import pytest
from conftest import tiny_content
from safetensors.torch import load_file
from test_alignment import save_vision_model
from test_processes import WEIGHTS, assert_same_weights, launch
from test_training import rows, untimed

from latent_ae import train
from latent_ae.config_file import parse_config
from latent_ae.run_folder import RunFolder
from latent_ae.training import dry_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

FILES = ("network/diffusion_pytorch_model.safetensors", "ema.safetensors", "objective.safetensors")


@pytest.fixture(scope="module")
def build(photos, tmp_path_factory):
    """Builds a config with both, an adversary that is heard, and accumulation."""
    vision = save_vision_model(tmp_path_factory.mktemp("vision") / "dinov2", "dinov2")

    def config(name, batch_size=2, weight=1e-3, **training):
        content = tiny_content(photos, tmp_path_factory.mktemp("runs") / name)
        content["losses"] = {
            "equivariance": {"probability": 0.6, "low_resolution": 0.5, "anisotropic": True},
            "alignment": {"model": str(vision), "cosine_margin": 0.1},
        }
        content |= {"bottleneck": {"weight": weight}, "validation": None}
        content["adversary"] = {"start": 1, "warmup_steps": 1, "channels": 4, "layers": 2}
        content["data"]["batch_size"] = batch_size
        content["training"] |= {"learning_rate": 5e-4, "ema": 0.5, "accumulation": 2, **training}
        return parse_config(content)

    return config


def test_a_resumed_run_ends_bit_equal(build, quiet):
    """Stopped after 3 of 6 steps: the draws go on as they would have."""
    config = build("whole", steps=6, checkpoint_every=3)
    run = RunFolder(train(config, quiet))
    log = untimed(run.path)
    assert any("l1_transformed" in row for row in log)
    assert any(row.get("share_small") for row in log)
    assert all(row["alignment_weight"] > 0 for row in log)
    again = build("again").model_copy(update={"training": config.training})
    shutil.copytree(run.checkpoint(3), RunFolder(again.output).checkpoint(3))
    for name in ("config.yaml", "log.jsonl"):
        shutil.copy(run.path / name, again.output)
    train(again, quiet)
    assert_same_weights(run.path, again.output, 6, FILES)
    assert untimed(again.output) == log


@pytest.fixture(scope="module")
def alone(build, quiet):
    """One process, batches of 4, the code deterministic: what two of 2 must come to."""
    return train(build("one", batch_size=4, weight=0), quiet)


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(build, alone, tmp_path, shard):
    """The share's lengths are those of the whole batch, the draws those of all processes."""
    one, config = alone, build("two", batch_size=2, weight=0, shard=shard)
    launch(config, tmp_path / "two.yaml")
    assert_same_weights(one, Path(config.output), 4, WEIGHTS, rtol=1e-3, atol=1e-4)
    for a, b in zip(rows(one, "train"), rows(config.output, "train"), strict=True):
        assert a["alignment_weight"] == pytest.approx(b["alignment_weight"], rel=1e-2)
        assert a["share_transformed"] == b["share_transformed"]


def test_a_run_takes_them_up_when_it_is_resumed(build, quiet):
    config = build("later")
    none = {"equivariance": None, "alignment": None}
    plain = config.model_copy(update={"losses": config.losses.model_copy(update=none)})
    half = plain.training.model_copy(update={"steps": 2})
    run = RunFolder(train(plain.model_copy(update={"training": half}), quiet))
    train(config, quiet)
    assert "alignment_weight" in rows(run.path, "train")[-1]
    assert load_file(run.checkpoint(4) / "objective.safetensors")
    more = plain.training.model_copy(update={"steps": 6})
    train(plain.model_copy(update={"training": more}), quiet)
    assert not load_file(run.checkpoint(6) / "objective.safetensors")  # and puts them down again


def test_a_dry_run_with_both(build, quiet):
    assert dry_run(build("dry"), quiet).checkpoint > 0


def test_in_half_precision_too(build, quiet):
    run = train(build("half", precision="bf16"), quiet)
    last = rows(run, "train")[-1]
    assert last["skipped_steps"] == 0
    assert last["alignment_weight"] > 0
