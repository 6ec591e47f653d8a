import io
import subprocess
import sys
import tarfile

import datasets
import numpy as np
import pytest
import torch
from conftest import NAMES, photograph
from PIL import Image

from latent_ae import UserError
from latent_ae.config import DataConfig, SourceConfig
from latent_ae.data import (
    CenterCrop,
    TrainingCrop,
    TrainingStream,
    evaluation_batches,
    normalize,
    open_source,
    source_of,
    to_tensor,
    to_uint8,
)


def data(path, **keys):
    return DataConfig.model_validate(
        {"path": str(path), "resolution": 32, "batch_size": 2, "workers": 0, **keys}
    )


def batches(stream, count):
    return [next(stream) for _ in range(count)]


def test_uint8_round_trip_is_exact():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(normalize(values)), values)
    assert normalize(values).aminmax() == (-1.0, 1.0)


@pytest.mark.parametrize("size", [(451, 300), (300, 451), (64, 64), (40, 33)])
@pytest.mark.parametrize("crop", ["random", "center", "random_resized"])
def test_crops_have_the_asked_size_and_no_padding(size, crop):
    white = Image.new("RGB", size, "white")
    transform = TrainingCrop(data("x", crop=crop, resolution=64))
    for seed in range(5):
        crop_of = transform(white, np.random.default_rng(seed))
        assert crop_of.shape == (3, 64, 64)
        assert (crop_of == 255).all()


def test_center_crop_is_pillows():
    cat = photograph("chelsea")  # 451 × 300
    wanted = cat.resize((96, 64), Image.Resampling.LANCZOS).crop((16, 0, 80, 64))
    assert torch.equal(CenterCrop(64)(cat), to_tensor(wanted))


def test_random_crops_reach_every_corner_and_flips_half():
    ramp = Image.fromarray(np.arange(40, dtype=np.uint8)[None].repeat(40, 0)).convert("RGB")
    transform = TrainingCrop(data("x", resolution=32))
    firsts = [transform(ramp, np.random.default_rng(seed))[0, 0, :] for seed in range(400)]
    flipped = [row[0] > row[-1] for row in firsts]
    assert 150 < sum(map(bool, flipped)) < 250
    assert {int(row.min()) for row in firsts} == set(range(9))


def webdataset(folder, names=NAMES):
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for place, name in enumerate(names):
            buffer = io.BytesIO()
            photograph(name, 48).save(buffer, "PNG")
            for extension, content in (("png", buffer.getvalue()), ("cls", str(place).encode())):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder / "shard.tar"


def table():
    features = datasets.Features(
        {"picture": datasets.Image(), "label": datasets.ClassLabel(names=["person", "thing"])}
    )
    rows = {"picture": [photograph(n, 48) for n in NAMES], "label": [0, 1, 1, 1]}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="module")
def sources(tmp_path_factory, photos):
    """The same photographs behind every local source."""
    root = tmp_path_factory.mktemp("sources")
    table().save_to_disk(root / "saved")
    table().to_parquet(root / "rows.parquet")
    return {
        "imagefolder": photos,
        "saved": root / "saved",
        "parquet": root / "rows.parquet",
        "webdataset": webdataset(root),
    }


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["imagefolder", "saved", "parquet", "webdataset"])
def test_every_source_gives_the_same_photographs(sources, kind, streaming):
    config = SourceConfig(source=kind, path=str(sources[kind]), streaming=streaming)
    found = list(evaluation_batches(config, 48, batch_size=3))
    assert [len(batch.samples) for batch in found] == [3, 1]
    images = torch.cat([batch.images for batch in found])
    if kind != "imagefolder":
        wanted = torch.stack([to_tensor(photograph(name, 48)) for name in NAMES])
        assert torch.equal(images, wanted)
    if kind == "webdataset":
        assert [s.label for b in found for s in b.samples] == [0, 1, 2, 3]
    if kind in ("saved", "parquet"):
        assert [s.label for b in found for s in b.samples] == [0, 1, 1, 1]
        assert open_source(config).label_names == ["person", "thing"]
    if kind in ("imagefolder", "webdataset"):
        keys = {s.key.removesuffix(".png").split("/")[-1] for b in found for s in b.samples}
        assert keys == set(NAMES)
    stream = TrainingStream(data(sources[kind], source=kind, streaming=streaming))
    assert next(stream).images.shape == (2, 3, 32, 32)


def test_the_kind_of_a_path_is_guessed(sources):
    for kind, path in sources.items():
        assert source_of(path).source == kind
    with pytest.raises(UserError, match="there is no folder"):
        source_of("/nowhere/at/all")


def test_names_that_look_like_splits_hide_nothing(tmp_path):
    # Left to itself, `datasets` takes 000_val_1.png for a validation split and drops the others.
    for name in ("ADE_val_0001", "train_2", "holiday", "test-3"):
        photograph("chelsea", 32).save(tmp_path / f"{name}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    source = open_source(SourceConfig(path=str(tmp_path)))
    assert len(source.rows) == 4


def test_a_folder_with_signs_of_a_pattern_in_its_name(tmp_path):
    folder = tmp_path / "photos [2024] *"
    folder.mkdir()
    photograph("chelsea", 32).save(folder / "a.png")
    assert len(open_source(SourceConfig(path=str(folder))).rows) == 1


def test_subfolders_become_labels(tmp_path):
    for label in ("cats", "dogs"):
        (tmp_path / label).mkdir()
        photograph("chelsea", 32).save(tmp_path / label / "one.png")
    (batch,) = evaluation_batches(SourceConfig(path=str(tmp_path)), 32)
    assert [(s.key, s.label) for s in batch.samples] == [("cats/one.png", 0), ("dogs/one.png", 1)]


def test_order_is_complete_and_shuffled_each_epoch(photos):
    stream = TrainingStream(data(photos, batch_size=4))
    epochs = [[sample.key for sample in next(stream).samples] for _ in range(6)]
    assert all(len(set(epoch)) == 4 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(photos, workers):
    plain = batches(TrainingStream(data(photos), seed=3), 5)
    other = batches(TrainingStream(data(photos, workers=workers), seed=3), 5)
    for a, b in zip(plain, other, strict=True):
        assert torch.equal(a.images, b.images)


def test_two_processes_see_what_one_would(photos):
    one = batches(TrainingStream(data(photos, batch_size=4)), 3)
    ranks = [TrainingStream(data(photos), rank=rank, world=2) for rank in (0, 1)]
    for batch in one:
        halves = torch.cat([next(rank).images for rank in ranks])
        assert torch.equal(batch.images, halves)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_in_the_middle_of_an_epoch(photos, workers):
    config = data(photos, workers=workers, batch_size=3)
    whole = batches(TrainingStream(config), 5)
    rest = TrainingStream(config, start=6)
    for batch in whole[2:]:
        assert torch.equal(batch.images, next(rest).images)


def test_a_stream_resumes_where_it_was(sources):
    config = data(sources["parquet"], source="parquet", streaming=True, shuffle_buffer=1)
    stream = TrainingStream(config)
    next(stream)
    state = stream.state_dict()
    following = batches(stream, 4)
    resumed = TrainingStream(config, state=state)
    for batch in following:
        assert torch.equal(batch.images, next(resumed).images)


def test_streams_of_two_processes_are_disjoint(tmp_path):
    for shard in range(2):
        rows = {
            "image": [photograph(name, 32) for name in NAMES],
            "__key__": [f"{shard}-{name}" for name in NAMES],
        }
        features = {"image": datasets.Image(), "__key__": datasets.Value("string")}
        written = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        written.to_parquet(tmp_path / f"{shard}.parquet")
    config = data(tmp_path, source="parquet", streaming=True, workers=1)
    seen = []
    for rank in (0, 1):
        stream = TrainingStream(config, rank=rank, world=2)
        seen.append({sample.key for _ in range(2) for sample in next(stream).samples})
    assert all(len(keys) == 4 for keys in seen)
    assert not seen[0] & seen[1]


@pytest.fixture
def spoiled(tmp_path):
    """Three good photographs, one cut short, one that is no picture."""
    for name in NAMES[:3]:
        photograph(name, 48).save(tmp_path / f"{name}.jpg")
    whole = (tmp_path / "coffee.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "fake.png").write_bytes(b"no picture")
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
def test_unreadable_pictures_are_named_and_replaced(spoiled, streaming):
    stream = TrainingStream(data(spoiled, streaming=streaming))
    found = batches(stream, 10)
    assert all(batch.images.shape == (2, 3, 32, 32) for batch in found)
    assert {s.key for b in found for s in b.samples} == {f"{name}.jpg" for name in NAMES[:3]}
    skipped = {skip.key: skip.reason for batch in found for skip in batch.skipped}
    assert set(skipped) == {"cut.jpg", "fake.png"}
    assert "truncated" in skipped["cut.jpg"]


def test_evaluation_skips_and_counts(spoiled):
    found = list(evaluation_batches(SourceConfig(path=str(spoiled)), 32, batch_size=2))
    assert sum(len(batch.samples) for batch in found) == 3
    assert sum(len(batch.skipped) for batch in found) == 2


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the 1 pictures"):
        TrainingStream(data(tmp_path))
    with pytest.raises(UserError, match="no picture"):
        list(evaluation_batches(SourceConfig(path=str(tmp_path)), 32))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty"):
        TrainingStream(data(empty))
    with pytest.raises(UserError, match="there is no folder"):
        TrainingStream(data(tmp_path / "none"))


def test_wrong_columns_and_splits_are_named(sources):
    with pytest.raises(UserError, match=r"no column 'photo'.*picture, label"):
        open_source(
            SourceConfig(source="parquet", path=str(sources["parquet"]), image_column="photo")
        )
    datasets.DatasetDict(small=table()).save_to_disk(sources["saved"].parent / "splits")
    with pytest.raises(UserError, match="no split 'train'; it has: small"):
        open_source(SourceConfig(source="saved", path=str(sources["saved"].parent / "splits")))


def test_a_hub_name_offline_is_one_sentence():
    with pytest.raises(UserError, match="the source hub at nobody/nothing cannot be opened"):
        open_source(SourceConfig(source="hub", path="nobody/nothing"))


def test_a_stream_that_nobody_closes_does_not_keep_the_process(photos):
    """Its workers ignore the signal with which Python's exit would end them, and wait forever."""
    code = (
        "from latent_ae.config import DataConfig\n"
        "from latent_ae.data import TrainingStream\n"
        f"stream = TrainingStream(DataConfig(path={str(photos)!r}, resolution=32, workers=2))\n"
        "next(stream)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
