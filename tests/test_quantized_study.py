"""benchmarks/quantized.py in miniature: every row of its table, and its sheet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_table_has_a_row_of_each_kind(photos, tmp_path):
    result = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks/quantized.py"), str(photos), str(photos),
            "--runs", str(tmp_path / "runs"), "--steps", "4", "--images", "8", "--limit", "2",
            "--network", "[32, 32, 32, 32]", "--sheet", str(tmp_path / "sheet.jpg"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    rows = {cells[0].strip("| "): cells[1:] for cells in lines[1:]}
    assert len(rows) == 7
    for name, cells in rows.items():
        quality = float(cells[0])
        assert 5 < quality < 40, name
    assert rows["VQ-VAE"][4] == rows["autoencoder, rounded afterwards"][4] == "0.156"
    assert float(rows["autoencoder"][4]) == 1.0  # 16 bits a value, 4 values for 64 pixels
    assert rows["FSQ"][7].endswith("%")
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.width > 5 * 192
