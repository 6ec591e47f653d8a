"""The Fashion-MNIST example: its reader, its judge, and the whole way in miniature."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, photograph
from PIL import Image

from fashion_data import CLASSES, SIDE, disjoint_halves, padded, read_idx, read_part, write_parquet
from fashion_judge import measure, taught_classifier
from latent_ae.data import decode_image, open_source, source_of
from latent_ae.errors import UserError

SCRIPT = Path(__file__).parents[1] / "pipelines/fashion_mnist.py"
pytestmark = pytest.mark.usefixtures("one_thread")

# Two pictures of 2 × 3, as the format's description has it, byte by byte.
HEAD = b"\x00\x00\x08\x03\x00\x00\x00\x02\x00\x00\x00\x02\x00\x00\x00\x03"
VALUES = bytes(range(12))


def crops(count, seed):
    """Grey crops of photographs, uint8 of shape (count, 28, 28): its class is the photograph's."""
    rng = np.random.default_rng(seed)
    greys = [np.asarray(photograph(name, 96).convert("L")) for name in NAMES]
    labels = np.arange(count, dtype=np.uint8) % len(CLASSES)
    places = rng.integers(0, 96 - 28, (count, 2))
    pictures = [
        greys[label % len(greys)][y : y + 28, x : x + 28]
        for label, (y, x) in zip(labels, places, strict=True)
    ]
    return np.stack(pictures), labels


def write_idx(file, array):
    shape = np.array(array.shape, ">u4").tobytes()
    file.write_bytes(gzip.compress(bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()))


def write_folder(folder, train, test):
    folder.mkdir()
    for stem, count, seed in (("train", train, 0), ("t10k", test, 1)):
        pictures, labels = crops(count, seed)
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", pictures)
        write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", labels)
    return folder


def test_an_idx_file_is_read_as_its_format_says(tmp_path):
    file = tmp_path / "a.gz"
    file.write_bytes(gzip.compress(HEAD + VALUES))
    assert read_idx(file).tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "apt install dataset-fashion-mnist"),
        (HEAD + VALUES, "no whole gzip file"),
        (gzip.compress(HEAD + VALUES, mtime=0)[:-9], "no whole gzip file"),
        (gzip.compress(HEAD + VALUES[:-1], mtime=0), "2 × 2 × 3 values but has 11"),
        (gzip.compress(HEAD + VALUES + b"\x00", mtime=0), "2 × 2 × 3 values but has 13"),
        (gzip.compress(HEAD[:7], mtime=0), "ends within its head"),
        (
            gzip.compress(b"\x00\x00\x0d" + HEAD[3:] + VALUES, mtime=0),
            "no idx file of unsigned bytes",
        ),
        (gzip.compress(b"", mtime=0), "no idx file of unsigned bytes"),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence(tmp_path, content, words):
    file = tmp_path / "a.gz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=words) as refusal:
        read_idx(file)
    assert str(file) in str(refusal.value)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    folder = write_folder(tmp_path / "data", 20, 20)
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(19, np.uint8))
    with pytest.raises(UserError, match="do not belong together"):
        read_part(folder, "train")
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.full(20, 10, np.uint8))
    with pytest.raises(UserError, match="labels of t10k"):
        read_part(folder, "test")


def test_the_table_holds_the_pictures_and_the_names(tmp_path):
    pictures, labels = crops(20, 0)
    file = tmp_path / "data/train.parquet"
    write_parquet(pictures, labels, file)
    assert [path.name for path in file.parent.iterdir()] == ["train.parquet"]
    source = open_source(source_of(file))
    assert source.label_names == list(CLASSES)
    for place, row in enumerate(source.rows):
        assert source.label(row) == labels[place]
        array = np.asarray(decode_image(row["image"]))
        assert array.shape == (SIDE, SIDE, 3)
        assert (array[2:30, 2:30] == pictures[place][..., None]).all()
        assert array.sum() == 3 * pictures[place].sum()  # the margin is black


def test_the_halves_share_no_picture_and_have_as_many_of_each_class():
    labels = np.random.default_rng(0).permutation(np.arange(100) % 10)
    first, second = disjoint_halves(labels, 40)
    assert not set(first.tolist()) & set(second.tolist())
    for half in (first, second):
        assert labels[half].tolist() == [place for place in range(10) for _ in range(4)]
    for wrong in (45, 60):
        with pytest.raises(UserError, match="multiple of 10 up to 50"):
            disjoint_halves(labels, wrong)


def test_the_judge_knows_classes_and_distances(tmp_path):
    pictures, labels = crops(80, 0)
    pictures[labels % 2 == 1] //= 4  # the second class is the dim one
    images = torch.from_numpy(padded(pictures))[:, None].expand(-1, 3, -1, -1)
    labels = torch.from_numpy(labels).long() % 2
    file = tmp_path / "classifier.safetensors"
    classifier = taught_classifier(file, images, labels, 2, epochs=20)
    again = taught_classifier(file, images, labels, 2, epochs=0)
    assert torch.equal(classifier.classify(images), again.classify(images))
    sets = {"same": images, "black": torch.zeros_like(images)}
    numbers = measure(sets, labels, images, images, classifier)
    assert numbers["same"]["recognised"] > 0.9
    assert numbers["same"]["nearest"] < 0.05  # cdist rounds
    for kind in ("frechet_alexnet", "frechet_classifier"):
        assert numbers["same"][kind] < 1e-2 * numbers["black"][kind]
    # By hand: the nearest of one black picture is the darkest, at its root mean square.
    energies = images[:, 0].double().square().mean((1, 2))
    assert numbers["black"]["nearest"] == pytest.approx(energies.min().sqrt().item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_way_in_miniature(tmp_path):
    data = write_folder(tmp_path / "data", 160, 100)
    output = tmp_path / "fashion"
    command = [sys.executable, str(SCRIPT), "--data", str(data), "--output", str(output)]
    command += ["--autoencoder-steps", "8", "--denoiser-steps", "10", "--samples", "40"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 550}
    options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    content = json.loads((output / "metrics.json").read_text())
    assert content["steps"] == {"training": 8, "training-denoiser": 10}
    rows = content["sets"]
    assert list(rows) == [
        "other test pictures",
        "their reconstructions",
        *(f"drawn, guidance {scale}" for scale in (1, 2, 4)),
    ]
    assert all(set(row) == set(rows["other test pictures"]) for row in rows.values())
    # Real pictures lie nearer to real ones than the drawings of ten steps do.
    real = rows["other test pictures"]["frechet_classifier"]
    assert all(rows[name]["frechet_classifier"] > real for name in list(rows)[2:])
    for name in ("reconstructions.png", "samples-1.png", "samples-2.png", "samples-4.png"):
        with Image.open(output / name) as sheet:
            assert sheet.width > 10 * 64
    index = json.loads((output / "pipeline/model_index.json").read_text())
    assert list(index["id2label"].values()) == list(CLASSES)
    wrong = subprocess.run([*command[:-1], "45"], **options)
    assert wrong.returncode == 2
    assert "multiple of 10 up to 50" in " ".join((wrong.stdout + wrong.stderr).split())
