"""A column and two cells of the restart matrix; docs/training.md has the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "cells",
    [
        ["--processes", "1", "--accumulation", "2", "--workers", "2"],
        [
            "--processes",
            "2",
            "--accumulation",
            "1",
            "--workers",
            "2",
            "--points",
            "save",
            "disk-full",
        ],
    ],
    ids=["one process", "two processes"],
)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(cells):
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/restart_matrix.py"), *cells],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "bit-equal" in result.stdout
