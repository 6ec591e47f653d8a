"""The README's first command, as a stranger would run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "pipelines/quickstart.py"

STRANGER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "latent_ae":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocked())
from diffusers import AutoencoderKL, DiffusionPipeline

vae = AutoencoderKL.from_pretrained(sys.argv[1] + "/autoencoder")
assert vae.config.scaling_factor != 0.18215
pipe = DiffusionPipeline.from_pretrained(sys.argv[1] + "/pipeline", trust_remote_code=True)
(image,) = pipe(class_labels="coffee", num_inference_steps=4).images
assert image.size == (64, 64)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_keeps_its_promises(tmp_path):
    output = tmp_path / "quickstart"
    command = [sys.executable, str(SCRIPT), "--minutes", "3", "--output", str(output)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    for name in ("autoencoder", "latents", "pipeline"):
        assert (output / name).is_dir()
    for name in ("reconstructions.png", "samples.png", "prior.png"):
        with Image.open(output / name) as sheet:
            assert min(sheet.size) > 64
    content = json.loads((output / "metrics.json").read_text())
    # The untrained linear code has 27 dB; two slow cores reach 30 in this time.
    assert content["metrics"]["psnr"] > 28.5
    assert content["metrics"]["lpips"] < 0.5 * content["lanczos"]["lpips"]
    assert content["protocol"]["name"] == "photos256"
    subprocess.run([sys.executable, "-c", STRANGER, str(output)], check=True, timeout=200)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert "holds a quickstart already" in again.stdout + again.stderr


def test_its_config_is_the_recipe_it_says():
    text = SCRIPT.read_text()
    assert "configs/quickstart.yaml" in text
    assert not set(_names(text, "HELD_OUT")) & set(_names(text, "TRAIN"))


def _names(text, constant):
    import ast

    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == constant:
            return ast.literal_eval(node.value)
    raise AssertionError(constant)
