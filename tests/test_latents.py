import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import NAMES, photograph
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from latent_ae import LatentDataset, UserError, decode, encode, load_network
from latent_ae.autoencoder import decode_latents, encode_moments
from latent_ae.data import CenterCrop, normalize, to_uint8
from latent_ae.latents import read_manifest, weights_sha256

A_CODE = 2 * 4 * 32 * 32 * 4  # bytes of mean and log-variance of 64², f2, 4 channels, float32


CUT = {"resolution": 64, "precision": "fp32"}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Four photographs in two folders, which are their labels, and a broken one."""
    root = tmp_path_factory.mktemp("labelled")
    for name in NAMES:
        folder = root / ("people" if name == "astronaut" else "things")
        folder.mkdir(exist_ok=True)
        photograph(name, 80).save(folder / f"{name}.png")
    (root / "things" / "broken.png").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def latents(exported, labelled, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "latents"
    encode(
        exported,
        labelled,
        out,
        resolution=64,
        batch_size=2,
        workers=0,
        dtype="float32",
        precision="fp32",
        shard_bytes=3 * A_CODE,
    )
    return out


def test_the_folder_is_what_its_manifest_says(latents, exported):
    manifest = read_manifest(latents)
    assert manifest.count == manifest.pictures == 4
    assert manifest.latent_shape == (4, 32, 32)
    assert manifest.label_names == ["people", "things"]
    assert manifest.num_classes == 2
    assert manifest.skipped == 1
    assert manifest.autoencoder.weights_sha256 == weights_sha256(exported)
    assert [shard.rows for shard in manifest.shards] == [2, 2]  # the broken one is in the first
    written = {path.name for path in latents.iterdir()}
    listed = {name for shard in manifest.shards for name in (shard.file, shard.index)}
    assert written == listed | {"manifest.json"}
    index = pyarrow.parquet.read_table(latents / manifest.shards[0].index).to_pylist()
    assert index[0] == {
        "key": "people/astronaut.png",
        "position": 0,
        "label": 0,
        "caption": None,
        "width": 80,
        "height": 80,
        "crop_left": 0,
        "crop_top": 0,
        "flipped": False,
        "latent_height": 32,
        "latent_width": 32,
        "row": 0,
        "skipped": None,
    }
    broken = next(row for row in index if row["skipped"])
    assert (broken["key"], broken["row"]) == ("things/broken.png", None)
    assert "Unidentified" in broken["skipped"]


def test_moments_are_those_of_the_encoder(latents, exported, labelled):
    network, dataset = load_network(exported), LatentDataset(latents, sample=False, scale=False)
    for position in range(len(dataset)):
        row = dataset[position]
        picture = Image.open(labelled / row["key"])
        image = normalize(CenterCrop(64)(picture.convert("RGB")))[None]
        with torch.no_grad():
            wanted = encode_moments(network, image)[0]
        mean, logvar = dataset.moments(position)
        torch.testing.assert_close(torch.cat([mean, logvar]), wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(row["latents"], mean)


def test_samples_are_drawn_anew_and_scaled(latents):
    dataset = LatentDataset(latents)
    torch.manual_seed(0)
    draws = torch.stack([dataset[1]["latents"] for _ in range(300)])
    mean, logvar = dataset.moments(1)
    scaling = dataset.manifest.autoencoder
    torch.testing.assert_close(draws.mean(0), scaling.to_final(mean), rtol=0, atol=0.35)
    ratio = draws.std(0) / ((0.5 * logvar).exp() * scaling.scaling_factor)
    assert ratio.mean().item() == pytest.approx(1, abs=0.01)
    everything = torch.stack([row["latents"] for row in dataset])
    assert everything.std().item() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_reads_it_in_any_process(latents, workers):
    dataset = LatentDataset(latents, sample=False)
    dataset[0]  # opens a shard, which must not travel to the workers
    pickle.loads(pickle.dumps(dataset))[0]
    (batch,) = DataLoader(dataset, batch_size=4, num_workers=workers)
    assert batch["latents"].shape == (4, 4, 32, 32)
    assert batch["label"].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_types_lose_little(exported, labelled, latents, tmp_path, dtype):
    encode(
        exported,
        labelled,
        tmp_path / "out",
        resolution=64,
        workers=2,
        dtype=dtype,
        precision="fp32",
    )
    assert load_file(tmp_path / "out" / "shard-000000.safetensors")["mean"].dtype == getattr(
        torch, dtype
    )
    small, exact = (LatentDataset(f, sample=False) for f in (tmp_path / "out", latents))
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3}[dtype]
    for a, b in zip(small, exact, strict=True):
        scale = b["latents"].abs().max().item()
        torch.testing.assert_close(a["latents"], b["latents"], rtol=0, atol=tolerance * scale)


def test_decode_gives_the_reconstruction_back(latents, exported, tmp_path):
    assert decode(latents, tmp_path / "out", batch_size=3) == 4
    dataset, network = LatentDataset(latents, sample=False, scale=False), load_network(exported)
    for row in dataset:
        file = tmp_path / "out" / f"{row['key']}.png"
        with torch.no_grad():
            wanted = to_uint8(decode_latents(network, row["latents"][None]))[0]
        written = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        assert (written.int() - wanted.int()).abs().max() <= 1


def test_keys_cannot_leave_the_folder(latents, exported, tmp_path):
    folder = tmp_path / "latents"
    folder.mkdir()
    for file in latents.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    table = pyarrow.parquet.read_table(folder / "index-000001.parquet")
    evil = pyarrow.array(["../../evil", "/tmp/../evil"], pyarrow.string())
    table = table.set_column(0, "key", evil)
    pyarrow.parquet.write_table(table, folder / "index-000001.parquet")
    decode(folder, tmp_path / "out", model=exported)
    assert (tmp_path / "out" / "evil.png").is_file()
    assert not list(tmp_path.parent.glob("evil*"))


def test_another_autoencoder_is_refused(latents, exported, tmp_path):
    network = load_network(exported)
    with torch.no_grad():
        network.decoder.conv_out.bias.add_(1)
    network.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another autoencoder"):
        decode(latents, tmp_path / "out", model=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_nothing_of_somebodys_is_overwritten(exported, labelled, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        encode(exported, labelled, tmp_path, resolution=64, workers=0)


def test_somebodys_shards_are_not_taken_for_ours(exported, labelled, tmp_path):
    tar = tmp_path / "shard-00000.tar"  # a common name of webdataset's
    tar.write_bytes(b"a data set")
    with pytest.raises(UserError, match=r"other files \(shard-00000\.tar\)"):
        encode(exported, labelled, tmp_path, resolution=64, workers=0)
    assert tar.read_bytes() == b"a data set"


def test_another_variant_of_the_weights_changes_no_hash(exported, tmp_path):
    network = load_network(exported)
    network.save_pretrained(tmp_path / "vae")
    before = weights_sha256(tmp_path / "vae")
    network.half().save_pretrained(tmp_path / "vae", variant="fp16")
    assert weights_sha256(tmp_path / "vae") == before
    network.save_pretrained(tmp_path / "split", max_shard_size="5KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    assert len(weights_sha256(tmp_path / "split")) == 64


def test_webdataset_labels_and_captions_come_along(exported, tmp_path):
    import io
    import tarfile

    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/a.tar", "w") as tar:
        for place, name in enumerate(NAMES):
            buffer = io.BytesIO()
            photograph(name, 64).save(buffer, "PNG")
            parts = {"png": buffer.getvalue(), "cls": str(place).encode(), "txt": name.encode()}
            for extension, content in parts.items():
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    manifest = encode(exported, tmp_path / "tars", tmp_path / "out", resolution=64, workers=0)
    assert manifest.num_classes == 4
    index = LatentDataset(tmp_path / "out", columns=("label", "caption")).index.table
    assert index["label"].to_pylist() == [0, 1, 2, 3]
    assert index["caption"].to_pylist() == list(NAMES)


def test_damage_is_named(latents, tmp_path):
    folder = tmp_path / "latents"
    folder.mkdir()
    manifest = json.loads((latents / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"index-000000\.parquet is missing"):
        LatentDataset(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        LatentDataset(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        LatentDataset(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for file in latents.iterdir():
        if file.name != "manifest.json":
            (folder / file.name).write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"is damaged: (shard|index)-000000"):
        LatentDataset(folder)


def spoiled(exported, folder, value):
    network = load_network(exported)
    with torch.no_grad():
        network.quant_conv.bias[0] = value
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_an_encoder_that_is_never_finite_is_refused(exported, labelled, tmp_path, value):
    model = spoiled(exported, tmp_path / "vae", value)
    options = {"resolution": 64, "workers": 0, "precision": "fp32"}
    with pytest.raises(UserError, match="no code of 4 is finite, people/astronaut"):
        encode(model, labelled, tmp_path / "out", **options)
    assert not (tmp_path / "out/manifest.json").exists()


def test_one_code_that_overflows_is_skipped(exported, labelled, tmp_path, monkeypatch):
    from latent_ae.frozen import FrozenAutoencoder

    encoder, calls = FrozenAutoencoder.encode, []

    def overflowing(self, images):
        mean, logvar = encoder(self, images)
        if len(images) == 2:  # not the probe of one picture
            calls.append(images)
            mean[1] = 1e6 if len(calls) == 1 else mean[1]
        return mean, logvar

    monkeypatch.setattr(FrozenAutoencoder, "encode", overflowing)
    manifest = encode(exported, labelled, tmp_path / "out", resolution=64, workers=0, batch_size=2)
    assert (manifest.count, manifest.skipped) == (3, 2)
    rows = pyarrow.parquet.read_table(tmp_path / "out/index-000000.parquet").to_pylist()
    reasons = {row["key"]: row["skipped"] for row in rows if row["skipped"]}
    assert "not finite in float16" in reasons["things/chelsea.png"]
    assert [row["row"] for row in rows if row["row"] is not None] == [0, 1, 2]
    dataset = LatentDataset(tmp_path / "out", sample=False)
    assert [row["key"] for row in dataset] == [
        k for r in rows if not r["skipped"] for k in [r["key"]]
    ]
    assert all(row["latents"].isfinite().all() for row in dataset)


def test_wrong_arguments(exported, labelled, tmp_path):
    with pytest.raises(UserError, match="no multiple of the network's factor 2"):
        encode(exported, labelled, tmp_path / "out", resolution=63)
    with pytest.raises(UserError, match="dtype 'int8' is unknown"):
        encode(exported, labelled, tmp_path / "out", dtype="int8")
    assert not Path(tmp_path / "out").exists()
