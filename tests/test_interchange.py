import io
import json
import pickle
import shutil
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import NAMES
from safetensors import safe_open
from safetensors.torch import save_file

from latent_ae import LatentDataset, UserError, encode
from latent_ae.config import Preprocessing
from latent_ae.latents import lightningdit, read_manifest, weights_sha256
from latent_ae.latents.interchange import FORMATS, import_edm2

A_PICTURE = 2 * 4 * 32 * 32 * 4  # bytes of mean and log-variance at 64², f2, 4 channels, float32
NAME = "00000/img-mean-std-{:08d}.npy"


def made(exported, photos, out, **cut):
    """A latents folder of the photographs."""
    cut = Preprocessing(**({"resolution": 64, "flip": True} | cut))
    encode(
        exported,
        photos,
        out,
        preprocessing=cut,
        precision="fp32",
        dtype="float32",
        workers=0,
        shard_bytes=3 * 2 * A_PICTURE,
    )
    return out


@pytest.fixture(scope="module")
def labelled(photos, tmp_path_factory):
    """The photographs in two folders, which are their classes."""
    root = tmp_path_factory.mktemp("labelled")
    for name in NAMES:
        folder = root / ("people" if name == "astronaut" else "things")
        folder.mkdir(exist_ok=True)
        shutil.copy(photos / f"{name}.png", folder)
    return root


@pytest.fixture(scope="module")
def latents(exported, labelled, tmp_path_factory):
    """With labels and mirror images, in two shards."""
    out = made(exported, labelled, tmp_path_factory.mktemp("latents") / "latents")
    assert len(read_manifest(out).shards) == 2
    return out


@pytest.fixture(scope="module")
def unlabelled(exported, photos, tmp_path_factory):
    """With neither labels nor mirror images."""
    return made(exported, photos, tmp_path_factory.mktemp("latents") / "plain", flip=False)


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def edm2_arrays(count=5, side=8):
    rng = np.random.default_rng(0)
    std = np.exp(rng.normal(-1, 1, (count, 4, side, side)))
    mean = rng.normal(2, 3, (count, 4, side, side))
    return np.concatenate([mean, std], 1).astype(np.float32)


def edm2_zip(path, arrays, labels=None):
    """An archive as EDM2 writes it; its members lie in no order."""
    names = [NAME.format(number) for number in range(len(arrays))]
    members = {name: npy(array) for name, array in zip(names, arrays, strict=True)}
    pairs = None if labels is None else list(zip(names, labels, strict=True))
    shuffled = dict(sorted(members.items(), reverse=True))
    return zipped(path, {"dataset.json": json.dumps({"labels": pairs})} | shuffled)


def read_edm2(archive):
    """What EDM2's data set sees: arrays by sorted name, and labels looked up by that name."""
    with zipfile.ZipFile(archive) as file:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in file.infolist())
        names = sorted(name for name in file.namelist() if name.endswith(".npy"))
        arrays = np.stack([np.load(io.BytesIO(file.read(name))) for name in names])
        by_name = json.loads(file.read("dataset.json"))["labels"]
    if by_name is None:
        return arrays, None
    return arrays, np.array([dict(by_name)[name] for name in names])


def dit_tensors(count=3, start=0, side=8):
    plain, mirrored = torch.randn(
        2, count, 4, side, side, generator=torch.Generator().manual_seed(start)
    )
    labels = torch.arange(start, start + count) % 4
    return {"latents": plain, "latents_flip": mirrored, "labels": labels}


def dit_folder(folder, *parts):
    folder.mkdir()
    for number, tensors in enumerate(parts):
        save_file(tensors, folder / f"latents_rank{number:02d}_shard000.safetensors")
    (folder / "latents_stats.pt").write_bytes(b"not to be read")
    return folder


def read_dit(folder):
    """What LightningDiT's data set sees: slices by file in sorted order, as many as labels."""
    rows = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = ("latents", "latents_flip", "labels")
            slices = [file.get_slice(name) for name in names]
            count = slices[2].get_shape()[0]
            assert file.metadata()["total_size"] == str(count)
            for row in range(count):
                rows.append([part[row : row + 1].squeeze(0) for part in slices])
    plain, mirrored, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    return plain, mirrored, labels


def stored(folder):
    """Means and log-variances of all codes of a folder of ours."""
    dataset = LatentDataset(folder)
    moments = [dataset.moments(position) for position in range(len(dataset))]
    mean, logvar = (torch.stack(column) for column in zip(*moments, strict=True))
    return mean, logvar


def test_an_edm2_archive_becomes_a_folder(exported, tmp_path):
    arrays, labels = edm2_arrays(), [3, 1, 0, 1, 2]
    archive = edm2_zip(tmp_path / "edm2.zip", arrays, labels)
    out = tmp_path / "out"
    size = 2 * arrays[0].nbytes
    manifest = import_edm2(archive, exported, out, dtype="float32", shard_bytes=size)

    assert manifest == read_manifest(out)
    assert [shard.rows for shard in manifest.shards] == [2, 2, 1]
    assert (manifest.count, manifest.pictures, manifest.num_classes) == (5, 5, 4)
    assert manifest.latent_shape == (4, 8, 8)
    assert manifest.preprocessing.resolution == 16
    assert (manifest.data.source, manifest.storage.kind) == ("edm2", "moments")
    assert manifest.autoencoder.weights_sha256 == weights_sha256(exported)
    written = {path.name for path in out.iterdir()}
    listed = {name for shard in manifest.shards for name in (shard.file, shard.index)}
    assert written == listed | {"manifest.json"}
    assert [path.name for path in tmp_path.iterdir()].count(".out.partial") == 0

    mean, std = arrays[:, :4].astype(float), arrays[:, 4:].astype(float)
    spread = np.sqrt(mean.var((0, 2, 3)) + np.square(std).mean((0, 2, 3)))
    np.testing.assert_allclose(manifest.statistics["channel_std"], spread, rtol=1e-5)
    np.testing.assert_allclose(manifest.statistics["channel_mean"], mean.mean((0, 2, 3)), rtol=1e-5)

    dataset = LatentDataset(out, scale=False, seed=0, columns=("label", "key", "flipped"))
    assert [item["label"] for item in dataset] == labels
    assert [item["key"] for item in dataset] == [NAME.format(number) for number in range(5)]
    assert not any(item["flipped"] for item in dataset)
    read_mean, logvar = stored(out)
    assert torch.equal(read_mean, torch.from_numpy(arrays[:, :4]))
    torch.testing.assert_close(torch.exp(logvar / 2), torch.from_numpy(arrays[:, 4:]))
    noise = []
    for epoch in range(30):
        dataset.set_epoch(epoch)
        noise.append((dataset[1]["latents"].numpy() - mean[1]) / std[1])
    assert abs(np.std(noise) - 1) < 0.05


def test_a_folder_comes_back_from_edm2(exported, latents, tmp_path):
    read, write = FORMATS["edm2"]
    archive = tmp_path / "new" / "edm2.zip"
    assert write(latents, archive) == 8
    mean, logvar = stored(latents)
    arrays, labels = read_edm2(archive)
    assert arrays.dtype == np.float32
    np.testing.assert_array_equal(arrays[:, :4], mean.numpy())
    np.testing.assert_allclose(arrays[:, 4:], np.exp(logvar.numpy() / 2), rtol=1e-6)
    assert labels.tolist() == [item["label"] for item in LatentDataset(latents)]

    read(archive, exported, tmp_path / "back", dtype="float32")
    back, back_logvar = stored(tmp_path / "back")
    assert torch.equal(back, mean)
    torch.testing.assert_close(back_logvar, logvar, rtol=1e-6, atol=1e-5)
    before, after = (read_manifest(path).statistics for path in (latents, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name] == pytest.approx(value, rel=1e-5)
    with pytest.raises(UserError, match="already"):
        write(latents, archive)


def test_edm2_without_labels(exported, unlabelled, tmp_path):
    read, write = FORMATS["edm2"]
    assert write(unlabelled, tmp_path / "edm2.zip") == 4
    assert read_edm2(tmp_path / "edm2.zip")[1] is None
    manifest = read(tmp_path / "edm2.zip", exported, tmp_path / "back")
    assert manifest.storage.dtype == "float16"
    assert manifest.num_classes == 0
    assert [item["label"] for item in LatentDataset(tmp_path / "back")] == [-1] * 4


def test_no_standard_deviation_is_the_least_one(exported, tmp_path):
    arrays = edm2_arrays(2)
    arrays[1, 4:] = 0
    import_edm2(edm2_zip(tmp_path / "edm2.zip", arrays), exported, tmp_path / "out")
    assert (stored(tmp_path / "out")[1][1] == -30).all()


def rubbish(kind):
    """The second member's content, damaged in one way."""
    array = edm2_arrays(1)[0]
    if kind == "nan":
        array[0, 0, 0] = np.nan
    elif kind == "infinite std":
        array[4, 0, 0] = np.inf
    elif kind == "negative std":
        array[4, 0, 0] = -1
    elif kind == "too large":
        array[0, 0, 0] = 1e5  # for float16
    elif kind == "shape":
        array = array[:, :4]
    elif kind == "integers":
        array = array.astype(np.int32)
    elif kind == "pickle":
        return npy(np.array([{"a": 1}], dtype=object))
    elif kind == "bare pickle":
        return pickle.dumps(array)
    return npy(array)[: -4 if kind == "truncated" else None]


@pytest.mark.parametrize(
    "kind",
    [
        "nan",
        "infinite std",
        "negative std",
        "too large",
        "shape",
        "integers",
        "pickle",
        "bare pickle",
        "truncated",
    ],
)
def test_damaged_members_are_named(exported, tmp_path, kind):
    first = {NAME.format(0): npy(edm2_arrays(1)[0])}
    archive = zipped(tmp_path / "edm2.zip", first | {NAME.format(1): rubbish(kind)})
    with pytest.raises(UserError, match=NAME.format(1)):
        import_edm2(archive, exported, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["edm2.zip"]  # and nothing half-made


def test_damaged_archives_are_refused(exported, tmp_path):
    whole = edm2_zip(tmp_path / "edm2.zip", edm2_arrays(2)).read_bytes()
    path = tmp_path / "other.zip"
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"other\.zip"):
        import_edm2(path, exported, tmp_path / "out")
    place = whole.index(edm2_arrays(2)[1].tobytes())
    path.write_bytes(whole[:place] + b"\0\1\2\3" + whole[place + 4 :])  # its checksum tells
    with pytest.raises(UserError, match=NAME.format(1)):
        import_edm2(path, exported, tmp_path / "out")
    zipped(path, {"picture.png": b""})
    with pytest.raises(UserError, match="no latents"):
        import_edm2(path, exported, tmp_path / "out")
    with pytest.raises(UserError, match="missing"):
        import_edm2(tmp_path / "missing.zip", exported, tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"labels": [3]}',
        '{"labels": []}',
        '{"labels": [["%s", -1]]}',
        '{"labels": [["%s", true]]}',
        '{"labels": [["%s", [0.5, 1]]]}',
    ],
)
def test_labels_that_are_no_classes_are_refused(exported, tmp_path, content):
    name = NAME.format(0)
    members = {name: npy(edm2_arrays(1)[0]), "dataset.json": content.replace("%s", name)}
    archive = zipped(tmp_path / "edm2.zip", members)
    with pytest.raises(UserError, match=r"dataset\.json"):
        import_edm2(archive, exported, tmp_path / "out")


def test_what_does_not_fit_is_refused(exported, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="2 channels"):
        import_edm2(edm2_zip(tmp_path / "a.zip", edm2_arrays(1)[:, :4]), exported, out)
    with pytest.raises(UserError, match="8 × 4"):
        import_edm2(edm2_zip(tmp_path / "b.zip", edm2_arrays(1)[..., :4]), exported, out)
    good = edm2_zip(tmp_path / "c.zip", edm2_arrays(1))
    with pytest.raises(UserError, match="int8"):
        import_edm2(good, exported, out, dtype="int8")
    out.mkdir()
    import_edm2(good, exported, out)  # an empty folder is as good as none
    with pytest.raises(UserError, match="not empty"):
        import_edm2(good, exported, out)
    (tmp_path / ".next.partial").mkdir()
    with pytest.raises(UserError, match="remove it"):
        import_edm2(good, exported, tmp_path / "next")


def test_lightningdit_files_become_a_folder(exported, tmp_path):
    parts = [dit_tensors(3), dit_tensors(2, start=3)]
    source = dit_folder(tmp_path / "dit", *parts)
    out = tmp_path / "out"
    read = FORMATS["lightningdit"][0]
    size = 2 * 2 * parts[0]["latents"][0].nbytes  # two pictures: a shard spans two files
    manifest = read(source, exported, out, dtype="float32", shard_bytes=size)

    assert [(shard.pictures, shard.rows) for shard in manifest.shards] == [(2, 4), (2, 4), (1, 2)]
    assert (manifest.count, manifest.pictures, manifest.num_classes) == (10, 5, 4)
    assert (manifest.storage.kind, manifest.data.source) == ("mode", "lightningdit")
    assert manifest.preprocessing == Preprocessing(resolution=16, flip=True)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    dataset = LatentDataset(out, scale=False, columns=("label", "key", "flipped", "position"))
    read_back = torch.stack([item["latents"] for item in dataset])
    assert torch.equal(read_back[0::2], whole["latents"])
    assert torch.equal(read_back[1::2], whole["latents_flip"])
    assert [item["flipped"] for item in dataset] == [False, True] * 5
    assert [item["label"] for item in dataset] == whole["labels"].repeat_interleave(2).tolist()
    assert dataset[6]["key"] == dataset[7]["key"] == "latents_rank01_shard000.safetensors:0"
    both = read_back.double()
    assert manifest.statistics["channel_mean"] == pytest.approx(both.mean((0, 2, 3)).tolist())
    drawn = LatentDataset(out, scale=False, variants="draw", seed=0)
    assert len(drawn) == 5
    assert [item["label"] for item in drawn] == whole["labels"].tolist()


def test_a_folder_comes_back_from_lightningdit(exported, latents, tmp_path, monkeypatch):
    read, write = FORMATS["lightningdit"]
    monkeypatch.setattr(lightningdit, "_FILE_ROWS", 3)
    out = tmp_path / "dit"
    assert write(latents, out) == 4
    assert sorted(path.name for path in out.iterdir()) == [
        "latents_rank00_shard000.safetensors",
        "latents_rank00_shard001.safetensors",
        "latents_stats.pt",
    ]
    plain, mirrored, labels = read_dit(out)
    dataset = LatentDataset(latents)
    assert (plain.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.tolist() == [item["label"] for item in dataset][0::2]
    mean, logvar = stored(latents)
    for drawn, first in ((plain, 0), (mirrored, 1)):
        noise = (drawn - mean[first::2]) / torch.exp(logvar[first::2] / 2)
        assert abs(noise.std() - 1) < 0.05
        assert abs(noise.mean()) < 0.05
    statistics = torch.load(out / "latents_stats.pt", weights_only=True)
    torch.testing.assert_close(statistics["mean"], plain.mean((0, 2, 3), keepdim=True))
    torch.testing.assert_close(statistics["std"], plain.std((0, 2, 3), keepdim=True))

    read(out, exported, tmp_path / "back", dtype="float32")
    back = LatentDataset(tmp_path / "back", scale=False)
    both = torch.stack([item["latents"] for item in back])
    assert torch.equal(both[0::2], plain)
    assert torch.equal(both[1::2], mirrored)
    write(tmp_path / "back", tmp_path / "again", seed=9)  # no posterior, so no draw
    for before, after in zip((plain, mirrored, labels), read_dit(tmp_path / "again"), strict=True):
        assert torch.equal(before, after)


def test_draws_for_lightningdit_follow_their_seed(latents, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        FORMATS["lightningdit"][1](latents, tmp_path / name, seed=seed)
    first, same, other = (read_dit(tmp_path / name)[0] for name in "abc")
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"latents_flip": None}, "latents_flip"),
        ({"labels": None}, "labels"),
        ({"labels": torch.zeros(3)}, "no floats, or labels"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels \(2,\)"),
        ({"labels": torch.tensor([0, -1, 0])}, "row 1 has the label -1"),
        ({"latents": torch.zeros(3, 4, 8, 8, dtype=torch.int32)}, "no floats"),
        ({"latents": torch.zeros(3, 4, 4, 4)}, "latents_flip"),
        ({"latents_flip": torch.full((3, 4, 8, 8), torch.nan)}, "row 0 of latents_flip"),
        ({"latents": torch.full((3, 4, 8, 8), 1e5)}, "safetensors:0: its mean is too large"),
        (dit_tensors(side=4), "those before it"),
    ],
)
def test_damaged_lightningdit_files_are_named(exported, tmp_path, change, match):
    bad = {name: t for name, t in (dit_tensors() | change).items() if t is not None}
    source = dit_folder(tmp_path / "dit", dit_tensors(), bad)
    with pytest.raises(UserError, match=match) as caught:
        FORMATS["lightningdit"][0](source, exported, tmp_path / "out")
    assert "latents_rank01_shard000.safetensors" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dit"]


def test_truncated_or_missing_lightningdit_files_are_refused(exported, tmp_path):
    source = dit_folder(tmp_path / "dit", dit_tensors())
    read = FORMATS["lightningdit"][0]
    file = next(source.glob("*.safetensors"))
    whole = file.read_bytes()
    for content in (whole[:-4], whole[:20], b"", b"\xff" * 64):
        file.write_bytes(content)
        with pytest.raises(UserError, match=file.name):
            read(source, exported, tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match="no latents"):
        read(source, exported, tmp_path / "out")


def test_folders_that_the_layouts_cannot_hold_are_refused(
    exported, photos, labelled, latents, unlabelled, tmp_path
):
    to_edm2, to_dit = FORMATS["edm2"][1], FORMATS["lightningdit"][1]
    buckets = made(exported, labelled, tmp_path / "buckets", buckets=True)
    with pytest.raises(UserError, match="buckets"):
        to_edm2(buckets, tmp_path / "out.zip")
    with pytest.raises(UserError, match="buckets"):
        to_dit(buckets, tmp_path / "out")
    with pytest.raises(UserError, match="encode with flip"):
        to_dit(unlabelled, tmp_path / "out")
    with pytest.raises(UserError, match="4 pictures without a label"):
        to_dit(made(exported, photos, tmp_path / "flipped"), tmp_path / "out")
    with pytest.raises(UserError, match=r"end in \.zip"):
        to_edm2(latents, tmp_path / "out")
    modes = dit_folder(tmp_path / "dit", dit_tensors())
    FORMATS["lightningdit"][0](modes, exported, tmp_path / "modes")
    with pytest.raises(UserError, match="holds mode; EDM2 needs moments"):
        to_edm2(tmp_path / "modes", tmp_path / "out.zip")
    with pytest.raises(UserError, match="not empty"):
        to_dit(latents, modes)
    assert not list(tmp_path.glob("*out*"))


def test_a_picture_without_its_mirror_image_is_refused(latents, tmp_path):
    folder = tmp_path / "latents"
    shutil.copytree(latents, folder)
    file = next(folder.glob("index-*.parquet"))
    table = pyarrow.parquet.read_table(file)
    flags = pyarrow.array([False] * len(table))
    place = table.schema.get_field_index("flipped")
    pyarrow.parquet.write_table(table.set_column(place, "flipped", flags), file)
    with pytest.raises(UserError, match="without its mirror image"):
        FORMATS["lightningdit"][1](folder, tmp_path / "out")


def test_crops_become_images_of_their_own(exported, labelled, tmp_path):
    cropped = made(exported, labelled, tmp_path / "crops", resize=72, crops=2)
    assert FORMATS["edm2"][1](cropped, tmp_path / "edm2.zip") == 16
    assert FORMATS["lightningdit"][1](cropped, tmp_path / "dit") == 8
    assert read_dit(tmp_path / "dit")[2].tolist() == [0, 0] + [1, 1] * 3
