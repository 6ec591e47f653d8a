"""A run that is killed again and again ends in the bytes of one that was not."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import NAMES, photograph

ROOT = Path(__file__).parents[1]
PICTURES, KILLS = 2000, 20


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """2,000 crops of four photographs; twenty are damaged."""
    root, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    sources = [photograph(name) for name in NAMES]
    for number in range(PICTURES):
        source = sources[number % len(sources)]
        left, top = (int(rng.integers(edge - 64)) for edge in source.size)
        file = root / f"{number % 7}" / f"{number:04d}.png"
        file.parent.mkdir(exist_ok=True)
        source.crop((left, top, left + 64, top + 64)).save(file)
        if number % 100 == 50:
            file.write_bytes(file.read_bytes()[:1000])
    return root


def command(exported, many, out, processes=1):
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    options = ["--resolution=96", "--shard-mb=1", "--batch-size=1", "--workers=1"]
    return [*start, "latent_ae", "encode", str(exported), str(many), str(out), *options]


def started(arguments):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, start_new_session=True, **pipes)


@pytest.fixture(scope="module")
def whole(exported, many, tmp_path_factory):
    """The folder of one run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "latents"
    run = started(command(exported, many, out))
    assert run.wait(200) == 0, run.stderr.read()
    run.stderr.close()
    return out


def bytes_so_far(folder):
    """Of shards and spools: what grows while a run encodes."""
    total = 0
    for path in folder.glob("s*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # renamed or finished just now
            continue
    return total


def kill_somebody(run, rng):
    """One process of the run, drawn at random, or all at once; then none is left."""
    family = [run.pid, *(child.pid for child in psutil.Process(run.pid).children())]
    if rng.random() < 0.5:
        os.kill(int(rng.choice(family)), signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(0.2)
    for pid in family:  # torchrun gives its processes sessions of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.wait(60)
    run.stderr.close()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) and alive(pid) for pid in family):
        assert time.monotonic() < deadline, "a process of the run does not die"
        time.sleep(0.05)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_change_no_byte(exported, many, whole, tmp_path, processes):
    out, rng, kills, grown = tmp_path / "latents", np.random.default_rng(processes), 0, 0
    arguments = command(exported, many, out, processes)
    while kills < KILLS:
        before = bytes_so_far(out) if out.exists() else 0
        run = started(arguments)
        while run.poll() is None and (bytes_so_far(out) if out.exists() else 0) <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.25))
        assert run.poll() is None, f"it was faster than {kills} kills: {run.stderr.read()}"
        kill_somebody(run, rng)
        kills += 1
        assert not (out / "manifest.json").exists()
        grown += bytes_so_far(out) > before  # what a life has encoded outlives it
    assert grown >= KILLS * 3 // 4
    run = started(arguments)
    assert run.wait(300) == 0, run.stderr.read()
    run.stderr.close()
    assert contents(out) == contents(whole)
