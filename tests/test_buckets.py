"""Aspect buckets and several resolutions in training: shapes, order, resume, processes."""

import io
import math
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photograph
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from latent_ae import UserError, export_run, train
from latent_ae.config import DataConfig, SourceConfig, bucket_sizes, largest_cut
from latent_ae.config_file import dump_yaml, parse_config
from latent_ae.data import (
    BucketPlan,
    TrainingCrop,
    TrainingStream,
    decode_image,
    nearest_size,
    open_source,
    picture_sizes,
    sources,
    to_tensor,
)
from latent_ae.data.decoding import upright_size
from latent_ae.describe import describe
from latent_ae.memory import training_memory
from latent_ae.run_folder import RunFolder
from latent_ae.training.prepare import prepare

ROOT = Path(__file__).parents[1]
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


def data(path="x", **keys):
    keys = {"resolution": 64, "batch_size": 2, "workers": 0, "buckets": {"multiple": 16}} | keys
    return DataConfig.model_validate({"path": str(path), **keys})


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """Eleven photographs: landscapes, portraits, squares, one panorama, two of them small."""
    folder = tmp_path_factory.mktemp("shaped")
    boxes = {
        "wide": ("chelsea", (0, 0, 240, 160)),
        "wider": ("coffee", (0, 0, 300, 170)),
        "tall": ("rocket", (200, 0, 320, 200)),
        "taller": ("astronaut", (100, 0, 240, 270)),
        "square": ("astronaut", (0, 0, 200, 200)),
        "nearly": ("coffee", (0, 0, 210, 200)),
        "panorama": ("rocket", (0, 100, 600, 200)),
        "low": ("chelsea", (100, 100, 170, 140)),
        "thin": ("coffee", (100, 100, 150, 190)),
        "wide2": ("chelsea", (40, 20, 300, 190)),
        "tall2": ("coffee", (300, 0, 440, 210)),
    }
    for name, (origin, box) in boxes.items():
        photograph(origin).crop(box).save(folder / f"{name}.png")
    return folder


def random_sizes(count, seed=0):
    return np.random.default_rng(seed).integers(40, 400, (count, 2)).astype(np.int32)


@pytest.mark.parametrize(
    ("resolution", "step", "longest"), [(256, 32, 2), (64, 16, 2), (512, 64, 3), (144, 32, 1.5)]
)
def test_shapes_are_all_that_fill_the_budget(resolution, step, longest):
    grid = range(step, 4 * resolution, step)
    within = {(h, w) for h in grid for w in grid if h * w <= resolution**2}
    full = {
        (h, w)
        for h, w in within
        if ((h, w + step) if h <= w else (h + step, w)) not in within
        and max(h, w) <= longest * min(h, w)
    }
    side = max(s for s in grid if s * s <= resolution**2)
    assert set(bucket_sizes(resolution, step, longest)) == full | {(side, side)}


def test_batches_have_as_many_pixels_at_every_resolution():
    config = data(resolution=256, batch_size=12, buckets={"resolutions": [128, 192, 256, 256, 384]})
    found = {bucket.resolution: bucket.batch_size for bucket in config.shapes()}
    assert found == {128: 48, 192: 21, 256: 12, 384: 5}
    for bucket in config.shapes():
        assert bucket.pixels <= 1.07 * 12 * 256**2
    assert data(resolution=64, buckets={"resolutions": [512]}).shapes()[0].batch_size == 1


@pytest.mark.parametrize(("resize", "crop"), [(None, "random"), (80, "random"), (None, "center")])
def test_a_picture_is_resized_by_one_scale_and_cut(shaped, resize, crop):
    """Pixel by pixel what Pillow gives for one scale, and no more cut away than is said."""
    config = data(shaped, resize=resize, crop=crop)
    shapes = [(bucket.height, bucket.width) for bucket in config.shapes()]
    room = (resize or 64) / 64
    for file in sorted(shaped.iterdir()):
        picture = decode_image(str(file))
        aspect = math.log(picture.width / picture.height)
        height, width = min(shapes, key=lambda s: abs(math.log(s[1] / s[0]) - aspect))
        scale = max(room * width / picture.width, room * height / picture.height)
        whole = (round(scale * picture.width), round(scale * picture.height))
        rng = np.random.default_rng(3)
        left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
        if crop == "random":
            left, top = rng.integers(whole[0] - width + 1), rng.integers(whole[1] - height + 1)
        resized = picture.resize(whole, Image.Resampling.LANCZOS)
        wanted = to_tensor(resized.crop((left, top, left + width, top + height)))
        wanted = wanted.flip(-1) if rng.random() < 0.5 else wanted
        found = TrainingCrop(config)(picture, np.random.default_rng(3), (height, width))
        assert torch.equal(found, wanted)
        if abs(aspect) <= math.log(2) and resize is None:
            kept = width * height / (scale * picture.width * scale * picture.height)
            assert 1 - kept <= largest_cut(shapes, 2.0) + 1e-9


def test_what_is_cut_away_at_most_is_reached_and_not_exceeded():
    shapes = bucket_sizes(256, 32, 2.0)
    aspects = np.exp(np.linspace(-math.log(2), math.log(2), 100_001))
    near = np.array(shapes)[nearest_size(shapes, aspects, np.ones_like(aspects))]
    ratio = near[:, 1] / near[:, 0] / aspects
    assert (1 - np.minimum(ratio, 1 / ratio)).max() == pytest.approx(largest_cut(shapes, 2.0), 1e-3)


def seen(plan, batches):
    return Counter(t.index for batch in islice(plan.batches(), batches) for t in batch)


def test_every_picture_comes_once_an_epoch():
    config = data(buckets={"multiple": 16, "max_aspect": 3}, batch_size=4)
    plan = BucketPlan(config, random_sizes(203))
    rare = {i for i in range(203) if plan.counts[0, plan.bucket_of(0)[i]] < 4}
    tickets = [t for batch in islice(plan.batches(), 5000) for t in batch]
    epochs = Counter(ticket.epoch for ticket in tickets)
    assert all(epochs[epoch] == 203 for epoch in range(60))  # each epoch is complete in the end
    for count in (1, 7, 60):  # and meanwhile nearly so, whatever the bucket
        until = round(count * plan.batches_per_epoch)
        found = seen(plan, until)
        off = {i: abs(found[i] - count) for i in range(203)}
        assert max(off[i] for i in off if i not in rare) <= 1
        assert max(off.values()) <= 4  # a bucket of one picture waits for four of its epochs
    assert len({tuple(t.index for t in tickets[203 * e : 203 * e + 20]) for e in range(9)}) == 9


def test_a_picture_goes_through_the_resolutions_in_turn():
    config = data(resolution=64, buckets={"multiple": 16, "resolutions": [32, 64, 64]})
    large = np.full((60, 2), 300, np.int32)
    large[::2, 0] = 200
    plan = BucketPlan(config, large)
    at = [[plan.buckets[b].resolution for b in plan.bucket_of(epoch)] for epoch in range(6)]
    for picture in zip(*at, strict=True):
        assert sorted(picture[:3]) == [32, 64, 64]
        assert picture[:3] == picture[3:]
    for epoch in at:  # not all pictures at one of them
        assert Counter(epoch) == {32: 20, 64: 40}
    pixels = Counter()
    for batch in islice(plan.batches(), round(30 * plan.batches_per_epoch)):
        bucket = plan.buckets[batch[0].bucket]
        assert len(batch) == bucket.batch_size == {32: 8, 64: 2}[bucket.resolution]
        pixels[bucket.resolution] += len(batch)
    assert pixels[64] / pixels[32] == pytest.approx(2, rel=0.05)


def test_a_small_picture_is_taken_at_the_largest_resolution_that_it_fills():
    config = data(buckets={"multiple": 16, "resolutions": [64, 128, 256]})
    plan = BucketPlan(config, np.array([[300, 300], [130, 130], [127, 128], [40, 30]], np.int32))
    found = [set() for _ in range(4)]
    for epoch in range(3):
        for picture, bucket in enumerate(plan.bucket_of(epoch)):
            found[picture].add(plan.buckets[bucket].resolution)
    assert found == [{64, 128, 256}, {64, 128}, {64}, {64}]


@pytest.mark.parametrize("world", [1, 2])
def test_the_plan_goes_on_from_any_batch(world):
    config = data(batch_size=3, buckets={"multiple": 16, "resolutions": [32, 64]})
    plan = BucketPlan(config, random_sizes(40), seed=5, world=world)
    whole = list(islice(plan.batches(), 60))
    before = np.cumsum([0, *map(len, whole)])
    assert before[-1] > 3 * 40
    for place in range(1, 55):
        again = BucketPlan(config, random_sizes(40), seed=5, world=world)
        assert list(islice(again.batches(int(before[place])), 4)) == whole[place : place + 4]
    # Another number of processes: from the first batch that begins there or later.
    assert next(plan.batches(int(before[20]) - 1)) == whole[20]
    assert BucketPlan(config, random_sizes(40), seed=6).batches() is not None
    other = BucketPlan(config, random_sizes(40), seed=6, world=world)
    assert list(islice(other.batches(), 4)) != whole[:4]


def test_the_first_batch_is_the_largest():
    config = data(batch_size=3, buckets={"multiple": 16, "resolutions": [32, 64, 96]})
    for seed in range(5):
        plan = BucketPlan(config, random_sizes(300), seed=seed)
        batches = list(islice(plan.batches(), round(plan.batches_per_epoch)))
        pixels = [plan.buckets[batch[0].bucket].pixels for batch in batches]
        assert pixels[0] == max(pixels)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stream_goes_on_with_the_same_pixels(shaped, workers):
    """In the middle of an epoch and across its end, whatever the number of workers."""
    config = data(shaped, buckets={"multiple": 16, "resolutions": [48, 64]})
    stream = TrainingStream(config, seed=3)
    whole = [next(stream) for _ in range(12)]
    assert len({batch.images.shape for batch in whole}) >= 4
    places = (1, 4, 9) if workers == 0 else (4,)
    for place in places:
        start = sum(len(batch.images) for batch in whole[:place])
        changed = config.model_copy(update={"workers": workers})
        rest = TrainingStream(changed, seed=3, start=start)
        for batch in whole[place:]:
            assert torch.equal(batch.images, next(rest).images)
        rest.close()


def test_two_processes_see_what_one_would_in_one_shape(shaped):
    keys = {"buckets": {"multiple": 16, "resolutions": [32, 64]}}
    one = TrainingStream(data(shaped, batch_size=4, **keys))
    ranks = [TrainingStream(data(shaped, **keys), rank=rank, world=2) for rank in (0, 1)]
    for _ in range(10):
        shares = [next(rank).images for rank in ranks]
        assert shares[0].shape == shares[1].shape
        assert torch.equal(next(one).images, torch.cat(shares))


def test_an_unreadable_picture_is_replaced_by_one_of_its_bucket(shaped, tmp_path):
    for file in shaped.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    half = (tmp_path / "wide.png").read_bytes()
    (tmp_path / "wide.png").write_bytes(half[: len(half) // 2])  # its header is whole
    (tmp_path / "none.png").write_bytes(b"no picture")
    stream = TrainingStream(data(tmp_path))
    found = [next(stream) for _ in range(40)]
    skipped = Counter((skip.key, skip.reason.split(":")[0]) for b in found for skip in b.skipped)
    assert skipped["none.png", "UnidentifiedImageError"] == 1  # never drawn
    assert skipped["wide.png", "OSError"] > 5
    for batch in found:
        for skip in batch.skipped:
            if skip.key == "wide.png":
                keys = {sample.key for sample in batch.samples}
                assert keys <= {f"{name}.png" for name in ("wide2", "wider", "low", "panorama")}
    # Where the bucket has no other, any picture is cut to its shape.
    for name in ("wide2", "wider", "low", "panorama"):
        (tmp_path / f"{name}.png").unlink()
    stream = TrainingStream(data(tmp_path))
    replaced = [b for b in (next(stream) for _ in range(30)) if "wide.png" in str(b.skipped)]
    assert replaced
    assert {batch.images.shape[2:] for batch in replaced} == {(48, 80)}


@pytest.mark.parametrize("kind", FORMATS)
def test_sizes_from_headers_are_those_of_the_decoded_pictures(kind):
    picture = photograph("chelsea").resize((40, 30))
    for orientation in range(1, 9):
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        picture.save(file, kind, exif=exif)
        size = upright_size({"bytes": file.getvalue()})
        assert size == decode_image(file.getvalue()).size == ((40, 30), (30, 40))[orientation > 4]


def test_sizes_are_read_once(shaped, tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for file in sorted(shaped.iterdir())[:3]:
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "zero.png").write_bytes(b"no picture")
    found, skipped = picture_sizes(open_source(SourceConfig(path=str(folder))))
    wanted = [decode_image(str(file)).size for file in sorted(shaped.iterdir())[:3]]
    assert found.tolist() == [*map(list, wanted), [0, 0]]
    assert [skip.key for skip in skipped] == ["zero.png"]
    read = []
    monkeypatch.setattr(sources, "upright_size", lambda value: read.append(value["path"]) or (7, 7))
    again, _ = picture_sizes(open_source(SourceConfig(path=str(folder))))
    assert [Path(path).name for path in read] == ["zero.png"]  # it may be whole by now
    assert again[:3].tolist() == found[:3].tolist()
    photograph("chelsea", 50).save(folder / "another.png")
    picture_sizes(open_source(SourceConfig(path=str(folder))))
    assert len(read) == 1 + 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"streaming": True}}, "buckets need random access"),
        ({"data": {"crop": "random_resized"}}, "random_resized cuts squares"),
        ({"data": {"buckets": {"multiple": 3}}}, "data.buckets.multiple 3 is no multiple of the"),
        ({"data": {"buckets": {"resolutions": [16]}}}, "resolution 16 is below buckets.multiple"),
        (
            {"data": {"buckets": {"multiple": 16, "max_aspect": 4}}},
            "have a side of 16, which is too small for LPIPS",
        ),
        ({"data": {"buckets": {"max_aspect": 0.5}}}, "greater than or equal to 1"),
    ],
)
def test_buckets_that_cannot_be_are_refused(tiny, changes, words):
    changes["data"] = {"resolution": 32, "buckets": {"multiple": 32}} | changes["data"]
    with pytest.raises(UserError, match=words):
        tiny(**changes)


def bucketed(tiny, shaped, **sections):
    keys = {"path": str(shaped), "resolution": 64, "resize": 72}
    keys["buckets"] = {"multiple": 16, "resolutions": [48, 64, 80]}
    sections["data"] = keys | sections.get("data", {})
    sections = {"losses": {"perceptual": None}, "validation": None} | sections
    return tiny(**sections)


def test_the_table_shows_shapes_and_batches_and_the_memory_of_the_largest(tiny, shaped):
    config = bucketed(tiny, shaped, data={"batch_size": 4})
    network = prepare(config).network
    facts = describe(config, 2, network)
    told = facts["buckets at 48²"]
    assert told.startswith("7 a process, 33% of the pictures, cut by up to")
    assert told.endswith("2 to 1: 32 × 64, 48 × 48, 64 × 32")
    assert facts["effective batch"].startswith("8 at 64² = 4 a process")
    assert facts["training"] == "4 steps, about 33 images"  # 8 · 3 / (1/7 + 1/4 + 1/3)
    assert config.data.largest_shapes()[0][:3] == (80, 80, 80)
    square = {"resolution": 80, "resize": 80, "batch_size": 3, "buckets": None}
    wanted = training_memory(bucketed(tiny, shaped, data=square), network)
    assert training_memory(config, network) == wanted


def test_a_run_goes_on_with_the_same_batches_and_ends_the_same(tiny, shaped, tmp_path):
    """Stopped in an epoch, with accumulation: every weight of the end is the same."""

    def run(name, steps):
        training = {"steps": steps, "accumulation": 2, "log_every": 1, "checkpoint_every": 3}
        told = Console(record=True, width=300, file=io.StringIO())
        config = bucketed(tiny, shaped, training=training, output=str(tmp_path / name))
        folder = RunFolder(train(config, told))
        return folder, told.export_text()

    run("stopped", 3)
    stopped, told = run("stopped", 7)
    whole, _ = run("whole", 7)
    assert "going on from step 3" in told
    assert "waited for data" in told
    rows = [[r["images"] for r in f.log_rows() if "images" in r] for f in (stopped, whole)]
    assert rows[0] == rows[1]
    assert len(set(np.diff(rows[0]))) > 1  # updates of several sizes
    for name in ("network/diffusion_pytorch_model.safetensors", "ema.safetensors"):
        ends = [load_file(folder.latest() / name) for folder in (stopped, whole)]
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    # And its latents can be measured on pictures of several shapes.
    exported = export_run(stopped.path, tmp_path / "exported", images=8)
    assert (exported / "config.json").is_file()


def test_everything_of_a_step_takes_what_is_not_square(tiny, shaped, quiet):
    """LPIPS, the discriminator with R1, the adaptive weight."""
    heard = {"start": 1, "warmup_steps": 1, "channels": 4, "layers": 1, "r1": 0.1, "r1_every": 1}
    buckets = {"multiple": 32, "resolutions": [64, 96]}
    config = bucketed(
        tiny,
        shaped,
        data={"buckets": buckets},
        adversary=heard,
        losses={"perceptual": {"net": "alex"}},
        training={"steps": 3, "log_every": 1, "checkpoint_every": 10},
    )
    rows = [row for row in RunFolder(train(config, quiet)).log_rows() if row["group"] == "train"]
    assert len(rows) == 3
    for row in rows:
        assert all(math.isfinite(row[name]) for name in ("total", "lpips", "d_loss"))
        assert 0 <= row["data_wait_share"] < 1
    assert rows[-1]["adaptive_weight"] > 0


@pytest.mark.slow
def test_a_linear_start_looks_at_squares(tiny, shaped, quiet):
    config = bucketed(
        tiny,
        shaped,
        network={"init": "linear", "norm_num_groups": 1},
        training={"steps": 1, "log_every": 1},
    )
    (row, *_) = RunFolder(train(config, quiet)).log_rows()
    plain = bucketed(tiny, shaped, network={"norm_num_groups": 1}, training={"steps": 1})
    plain = plain.model_copy(update={"output": config.output + "-plain"})
    (other, *_) = RunFolder(train(plain, quiet)).log_rows()
    assert row["l1"] < 0.5 * other["l1"]


@pytest.mark.slow
def test_two_processes_train_as_one(tiny, shaped, quiet, tmp_path):
    """The code deterministic, as noise is local; the batches of four are those of two twos."""

    def config(name, batch_size):
        return bucketed(
            tiny,
            shaped,
            data={"batch_size": batch_size, "buckets": {"multiple": 16, "resolutions": [32, 64]}},
            bottleneck={"weight": 0},
            training={"steps": 5, "log_every": 1, "checkpoint_every": 5},
            output=str(tmp_path / name),
        )

    one = RunFolder(train(config("one", 4), quiet))
    two = config("two", 2)
    (tmp_path / "two.yaml").write_text(dump_yaml(two))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "latent_ae", "train", str(tmp_path / "two.yaml")]
    result = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    folder = RunFolder(two.output)
    images = [[r["images"] for r in f.log_rows() if "images" in r] for f in (one, folder)]
    assert images[0] == images[1]
    name = "network/diffusion_pytorch_model.safetensors"
    ends = [load_file(f.latest() / name) for f in (one, folder)]
    for key in ends[0]:
        torch.testing.assert_close(ends[0][key], ends[1][key], rtol=1e-3, atol=1e-4)
    # And one process goes on with what two have begun.
    content = parse_config(
        two.model_dump() | {"training": two.training.model_dump() | {"steps": 6}}
    )
    assert RunFolder(train(content, quiet)).latest().name == "step-000000006"


def test_a_second_restart_after_a_change_of_processes_repeats_nothing():
    """A run of four processes goes on with one, which is stopped and started again."""
    sizes = np.random.default_rng(0).integers(200, 900, (600, 2))
    config = DataConfig(
        path="x", resolution=64, batch_size=6, buckets={"resolutions": [64, 96, 128]}
    )
    four, one = (BucketPlan(config, sizes, 0, world) for world in (4, 1))
    ends = np.cumsum([len(batch) for batch in islice(four.batches(), 40)])
    beside = 0
    for start in map(int, ends):
        first = one.begins(start)
        beside += first > start
        whole = list(islice(one.batches(start), 12))
        for taken in (1, 5, 11):
            seen = first + sum(map(len, whole[:taken]))
            again = list(islice(one.batches(one.begins(seen)), 12 - taken))
            assert again == whole[taken:]
    assert beside  # or nothing was asked


def test_the_first_batches_are_the_largest_of_each_resolution():
    sizes = np.random.default_rng(0).integers(200, 900, (600, 2))
    config = DataConfig(
        path="x", resolution=64, batch_size=6, buckets={"resolutions": [64, 96, 128]}
    )
    plan = BucketPlan(config, sizes, 0, 1)
    first = [plan.buckets[batch[0].bucket] for batch in islice(plan.batches(), 3)]
    assert {bucket.resolution for bucket in first} == {64, 96, 128}
    for found in first:
        same = [b for b in plan.buckets if b.resolution == found.resolution]
        assert found.pixels == max(b.pixels for b in same)
