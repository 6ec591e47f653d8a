"""Shared fixtures: real photographs from scikit-image, a tiny trained run, its exported folder."""

import os
import sys
import tempfile
from pathlib import Path

# Before `datasets` and `huggingface_hub` are imported: no cache of the person's, no network.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="latent-ae-hf-")
os.environ["HF_HUB_OFFLINE"] = "1"
# Two workers on two cores (pytest-xdist): a thread each, whatever they inherit from the process
# that starts them, which has read this file too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from skimage import data as photographs

from latent_ae import Config, export_run, train
from latent_ae.config_file import parse_config

# `datasets` waits five seconds whenever a parquet stream ends; nothing here lives that long.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))

NAMES = ("astronaut", "chelsea", "coffee", "rocket")


def photograph(name, size=None):
    """A real photograph as a PIL picture."""
    picture = Image.fromarray(getattr(photographs, name)())
    return picture if size is None else picture.resize((size, size), Image.Resampling.LANCZOS)


def photograph_tensor(name, size=64):
    """A real photograph in [-1, 1], of shape (1, 3, size, size)."""
    array = np.asarray(photograph(name, size))
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of four photographs, shorter side about 96 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    for name in NAMES:
        picture = photograph(name)
        picture.thumbnail((144, 144), Image.Resampling.LANCZOS)
        picture.save(folder / f"{name}.png")
    return folder


def tiny_content(photos, output):
    """The plain dict of a run that takes about a second."""
    return {
        "data": {
            "path": str(photos),
            "resolution": 32,
            "batch_size": 2,
            "workers": 0,
        },
        "network": {
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "mid_block_add_attention": False,
        },
        "losses": {"perceptual": {"net": "alex", "weight": 0.5}},
        "training": {
            "steps": 4,
            "learning_rate": 2e-3,
            "log_every": 2,
            "checkpoint_every": 2,
            "validate_every": 4,
            "ema": 0.9,
        },
        "validation": {"path": str(photos), "images": 4, "resolution": 64},
        "output": str(output),
    }


@pytest.fixture
def tiny(photos, tmp_path):
    """Builds a tiny config; keyword arguments replace keys of a section."""

    def build(**sections) -> Config:
        content = tiny_content(photos, tmp_path / "run")
        for section, values in sections.items():
            if isinstance(values, dict):
                content[section] = {**content.get(section, {}), **values}
            else:
                content[section] = values
        return parse_config({k: v for k, v in content.items() if v is not None})

    return build


@pytest.fixture(scope="session")
def quiet():
    """A console that shows nothing."""
    return Console(quiet=True)


@pytest.fixture(scope="session")
def run_folder(photos, tmp_path_factory, quiet):
    """A finished tiny run."""
    content = tiny_content(photos, tmp_path_factory.mktemp("runs") / "tiny")
    return train(parse_config(content), quiet)


@pytest.fixture(scope="session")
def exported(run_folder, tmp_path_factory):
    """The tiny run's exported folder."""
    return export_run(run_folder, tmp_path_factory.mktemp("exported") / "autoencoder", images=8)


@pytest.fixture(scope="module")
def one_thread():
    """Networks this small lose more to waiting threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
