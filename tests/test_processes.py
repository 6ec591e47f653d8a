"""Several processes over gloo, and signals: what a scheduler does to a run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_content
from safetensors.torch import load_file

from latent_ae import train
from latent_ae.config_file import dump_yaml, parse_config
from latent_ae.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
WEIGHTS = (
    "network/diffusion_pytorch_model.safetensors",
    "objective.safetensors",
    "discriminator.safetensors",
)
HEARD = {
    "start": 1,
    "warmup_steps": 1,
    "channels": 4,
    "layers": 2,
    "norm": "batch",
    "lecam": 0.1,
    "r1": 0.1,
    "r1_every": 2,
}


def assert_same_weights(one, two, step, files, **tolerance):
    for name in files:
        a, b = (load_file(RunFolder(run).checkpoint(step) / name) for run in (one, two))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], **(tolerance or {"rtol": 0, "atol": 0}))


def command(config, path, processes):
    """Several processes start with torchrun; `accelerate launch --cpu` starts one, without MPI."""
    path.write_text(dump_yaml(config))
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        words += ["--signals-to-handle", "SIGTERM,SIGUSR1"]
    return [*words, "-m", "latent_ae", "train", str(path)]


def launch(config, path, processes=2):
    result = subprocess.run(
        command(config, path, processes),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


def environment():
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory, quiet):
    """One process, batches of 4: what two of 2 must come to. Returns its folder and its config."""

    def config(name, batch_size, **training):
        content = tiny_content(photos, tmp_path_factory.mktemp("processes") / name)
        content |= {"adversary": HEARD, "bottleneck": {"weight": 0}}
        content["losses"]["variance"] = "learned"
        content["data"]["batch_size"] = batch_size
        content["training"] |= {"learning_rate": 5e-4, "ema": 0.5, "accumulation": 2, **training}
        content["validation"]["images"] = 2
        return parse_config(content)

    return train(config("one", 4), quiet), config


@pytest.mark.parametrize(
    "training",
    [
        pytest.param({}, id="ddp"),
        pytest.param({"shard": True}, id="fsdp2", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one_with_the_same_global_batch(alone, quiet, tmp_path, training):
    """The code deterministic, as noise is local; everything else as in a run that matters.

    Batch statistics, LeCam's averages, the adaptive weight and the gradients are those of all four
    pictures. What differs is the order of sums, which Adam's first steps enlarge.
    """
    one, build = alone
    config = build("two", 2, **training)
    launch(config, tmp_path / "two.yaml")
    two = Path(config.output)
    assert_same_weights(one, two, 4, WEIGHTS, rtol=1e-3, atol=1e-4)
    folder = RunFolder(two)
    states = [
        torch.load(folder.checkpoint(4) / f"process-{rank}.pt", weights_only=True)
        for rank in (0, 1)
    ]
    assert not torch.equal(states[0]["rng"]["torch"], states[1]["rng"]["torch"])
    metrics = [RunFolder(run).last_validation(4) for run in (one, two)]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-3)
    progress = folder.progress(folder.checkpoint(4))
    assert (progress["images"], progress["processes"]) == (32, 2)
    assert [row["step"] for row in folder.log_rows() if row["group"] == "train"] == [2, 4]
    # A sharded run's checkpoint is like any other: it goes on alone.
    train(build("two", 4, steps=6).model_copy(update={"output": config.output}), quiet)
    assert folder.latest().name == "step-000000006"


@pytest.mark.slow
def test_the_optimal_variance_is_that_of_all_processes(alone, quiet, tmp_path):
    """Two processes with two pictures each divide by the distance of all four."""
    _, build = alone
    runs = []
    for name, batch_size in (("optimal-one", 4), ("optimal-two", 2)):
        config = build(name, batch_size)
        losses = config.losses.model_copy(update={"variance": "optimal", "pixel": "l2"})
        runs.append(config.model_copy(update={"losses": losses}))
    train(runs[0], quiet)
    launch(runs[1], tmp_path / "two.yaml")
    one, two = (run.output for run in runs)
    assert_same_weights(one, two, 4, (WEIGHTS[0], WEIGHTS[2]), rtol=1e-3, atol=1e-4)
    logvars = [
        [row["logvar"] for row in RunFolder(run).log_rows() if row["group"] == "train"]
        for run in (one, two)
    ]
    assert logvars[1] == pytest.approx(logvars[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("receiver", ["a process", "the launcher"])
def test_a_signal_to_one_process_stops_all_of_them(tiny, quiet, tmp_path, receiver):
    config = tiny(training={"steps": 100_000, "checkpoint_every": 10**6}, validation=None)
    started = subprocess.Popen(
        command(config, tmp_path / "run.yaml", 2), cwd=ROOT, env=environment(), text=True
    )
    folder = RunFolder(config.output)
    wait_for(lambda: len(folder.log_rows()) > 1, started)
    if receiver == "a process":
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGUSR1)
        assert started.wait(timeout=60) == 0
    else:  # which hands it on, waits for its processes, and reports the signal as its own end
        started.send_signal(signal.SIGUSR1)
        started.wait(timeout=60)
    stopped = folder.progress(folder.latest())
    assert stopped["step"] > 2
    assert stopped["processes"] == 2


def test_sigterm_finishes_the_step_saves_and_exits_with_zero(tiny, tmp_path):
    config = tiny(training={"steps": 100_000, "checkpoint_every": 10**6}, validation=None)
    path = tmp_path / "run.yaml"
    started = subprocess.Popen(
        command(config, path, 1), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    folder = RunFolder(config.output)
    wait_for(lambda: len(folder.log_rows()) > 1, started)
    started.terminate()
    _, told = started.communicate(timeout=60)
    assert started.returncode == 0, told
    step = folder.progress(folder.latest())["step"]
    assert f"stopped by SIGTERM at step {step} of 100000; the same command goes on" in told
    assert "next: latent-ae export" not in told


def wait_for(condition, process):
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < until, "the run did not begin"
        time.sleep(0.1)
