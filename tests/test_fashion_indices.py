"""The example of codes on Fashion-MNIST: the whole way in miniature."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_fashion_mnist import write_folder

SCRIPT = Path(__file__).parents[1] / "pipelines/fashion_indices.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_way_in_miniature(tmp_path):
    data = write_folder(tmp_path / "data", 160, 120)
    output = tmp_path / "indices"
    command = [sys.executable, str(SCRIPT), "--data", str(data), "--output", str(output)]
    command += ["--autoencoder-steps", "8", "--prior-steps", "10", "--samples", "60"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 550}
    options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    content = json.loads((output / "metrics.json").read_text())
    prior = content["prior"]
    assert prior["steps"] == 10
    assert prior["vocabulary"] == {"size": 512, "codes": 1, "height": 8, "width": 8, "classes": 10}
    assert prior["held_out"]["pictures"] == 120
    assert 0 < prior["held_out"]["order_0_entropy"] <= 9
    rows = content["sets"]
    assert list(rows) == [
        "other test pictures",
        "their reconstructions",
        *(f"drawn, guidance {scale}" for scale in (1, 1.5, 2.5)),
        "each code by itself",
    ]
    # Real pictures lie nearer to real ones than the drawings of ten steps do.
    real = rows["other test pictures"]["frechet_classifier"]
    assert all(rows[name]["frechet_classifier"] > real for name in list(rows)[2:])
    with Image.open(output / "samples.png") as sheet:
        assert sheet.width > 10 * 64
        assert sheet.height > 10 * 64  # two pictures, two reconstructions, six drawings
    wrong = subprocess.run([*command[:-1], "75"], **options)
    assert wrong.returncode == 2
    assert "multiple of 10 up to 60" in " ".join((wrong.stdout + wrong.stderr).split())
