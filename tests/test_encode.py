"""Encoding data sets: sources, cuts, restart, several processes, disk."""

import errno
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import NAMES, photograph
from diffusers import AutoencoderTiny, VQModel
from PIL import Image

from latent_ae import LatentDataset, UserError, encode
from latent_ae.config import EncodingSource, Preprocessing
from latent_ae.data import CenterCrop, Variants
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.latents import BucketBatchSampler, decode, read_manifest
from latent_ae.latents.files import FolderLock, write_whole
from latent_ae.latents.spool import Spool

ROOT = Path(__file__).parents[1]
FAST = {"workers": 0, "precision": "fp32", "batch_size": 2}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_of(folder):
    files = sorted(folder.glob("index-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def dozen(tmp_path_factory):
    """Twelve photographs of three shapes."""
    root = tmp_path_factory.mktemp("dozen")
    for number in range(12):
        picture = photograph(NAMES[number % 4], 96)
        picture = picture.crop((0, 0, 96, (96, 60, 72)[number % 3]))
        picture.save(root / f"{number:02d}.png")
    return root


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A parquet file whose columns have names of their own."""
    root = tmp_path_factory.mktemp("table")
    pictures = [photograph(name, 64) for name in NAMES]
    content = {
        "thumb": [picture.resize((8, 8)) for picture in pictures],
        "picture": pictures,
        "name": ["a/ä b", "../c", "a/ä b#3", "a/ä b"],
        "kind": ["person", "cat", "cup", "person"],
        "said": [["one", "two"], ["three"], ["four"], None],
        "score": [1.5, None, 7.0, 9.0],
    }
    features = datasets.Features(
        {
            "thumb": datasets.Image(),
            "picture": datasets.Image(),
            "name": datasets.Value("string"),
            "kind": datasets.Value("string"),
            "said": datasets.List(datasets.Value("string")),
            "score": datasets.Value("float32"),
        }
    )
    datasets.Dataset.from_dict(content, features=features).to_parquet(root / "data.parquet")
    return root / "data.parquet"


COLUMNS = {
    "image_column": "picture",
    "key_column": "name",
    "label_column": "kind",
    "caption_column": "said",
    "keep": ("score",),
}


class TestSources:
    def test_columns_are_chosen_by_name_and_carried_along(self, exported, table, tmp_path):
        source = EncodingSource(source="parquet", path=str(table), **COLUMNS)
        manifest = encode(exported, source, tmp_path / "out", resolution=64, **FAST)
        rows = rows_of(tmp_path / "out")
        assert [row["label"] for row in rows] == [2, 0, 1, 2]
        assert manifest.label_names == ["cat", "cup", "person"]
        assert [row["caption"] for row in rows] == ["one", "three", "four", None]
        assert [row["score"] for row in rows] == [1.5, None, 7.0, 9.0]
        assert [row["width"] for row in rows] == [64] * 4  # not the thumbnails
        # The second of two pictures with one name is told apart, and the manifest says so.
        assert [row["key"] for row in rows] == ["a/ä b", "../c", "a/ä b#3", "a/ä b#3#3"]
        assert manifest.renamed == 1
        columns = ("key", "score")
        item = LatentDataset(tmp_path / "out", columns=columns)[2]
        assert (item["key"], item["score"]) == ("a/ä b#3", 7.0)
        decode(tmp_path / "out", tmp_path / "pictures")
        files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("pictures/**/*.png")}
        assert files == {f"pictures/{k}.png" for k in ("a/ä b", "c", "a/ä b#3", "a/ä b#3#3")}

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_filter_and_a_limit(self, exported, table, tmp_path, streaming):
        names = {k: v for k, v in COLUMNS.items() if k != "label_column"}
        source = EncodingSource(
            source="parquet",
            path=str(table),
            filter='score > 2 and kind in ("cup", "person")',
            streaming=streaming,
            **names,
        )
        encode(exported, source, tmp_path / "out", resolution=64, **FAST)
        assert [row["score"] for row in rows_of(tmp_path / "out")] == [7.0, 9.0]
        encode(exported, source, tmp_path / "one", resolution=64, limit=1, **FAST)
        assert [row["score"] for row in rows_of(tmp_path / "one")] == [7.0]

    @pytest.mark.parametrize(
        ("expression", "message"),
        [
            ("scor > 2", "names 'scor', which is no column"),
            ("score >", "cannot be read"),
            ("__import__('os').system('true')", "which is not taken"),
            ("name.upper() == 'A'", "which is not taken"),
            ("name > 2", "fails at name = 'a/ä b'"),
            ("score > 100", "no row of the data set satisfies"),
        ],
    )
    def test_wrong_filters(self, exported, table, tmp_path, expression, message):
        source = EncodingSource(
            source="parquet", path=str(table), image_column="picture", filter=expression
        )
        with pytest.raises(UserError, match=message.replace("(", r"\(")):
            encode(exported, source, tmp_path / "out", resolution=64, **FAST)

    @pytest.mark.parametrize("key", ["image_column", "key_column", "label_column", "keep"])
    def test_a_column_that_is_not_there(self, exported, table, tmp_path, key):
        named = COLUMNS | {key: ("none",) if key == "keep" else "none"}
        source = EncodingSource(source="parquet", path=str(table), **named)
        with pytest.raises(UserError, match=r"no column 'none'; its columns: thumb, picture"):
            encode(exported, source, tmp_path / "out", resolution=64, **FAST)

    def test_labels_of_any_kind(self, exported, tmp_path):
        pictures = [photograph(name, 64) for name in NAMES]
        content = {"image": pictures, "label": ["b", "a", None, "b"], "one": [1.0, 2.5, None, 3.0]}
        content |= {"big": [(1 << 63) - 1, 1, 2, 3], "width": [7, 8, 9, 10], "json": ["x"] * 4}
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.Value("string")}
            | {"one": datasets.Value("float32"), "big": datasets.Value("int64")}
            | {"width": datasets.Value("int32"), "json": datasets.Value("string")}
        )
        rows = datasets.Dataset.from_dict(content, features=features)
        rows.to_parquet(tmp_path / "x.parquet")

        def labels(out, **more):
            source = EncodingSource(source="parquet", path=str(tmp_path / "x.parquet"), **more)
            encode(exported, source, tmp_path / out, resolution=64, **FAST)
            return [row["label"] for row in rows_of(tmp_path / out)]

        assert labels("words") == [1, 0, None, 1]
        assert labels("floats", label_column="one") == [1, None, None, 3]
        assert labels("large", label_column="big", keep=("width",)) == [None, 1, 2, 3]
        (first, *_) = rows_of(tmp_path / "large")
        assert (first["width"], first["data.width"]) == (64, 7)
        with pytest.raises(UserError, match="'image' holds neither numbers nor words"):
            labels("no", label_column="image")

    def test_a_folder_inside_the_data_is_refused(self, exported, tars, tmp_path):
        shutil.copytree(tars, tmp_path / "tars")
        with pytest.raises(UserError, match="lies in the data"):
            encode(exported, tmp_path / "tars", tmp_path / "tars/out", resolution=64, **FAST)
        assert not (tmp_path / "tars/out").exists()

    def test_a_torn_tar_is_told_by_its_place(self, exported, tars, tmp_path):
        shutil.copytree(tars, tmp_path / "tars")
        file = tmp_path / "tars/1.tar"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        source = EncodingSource(source="webdataset", path=str(tmp_path / "tars"), streaming=True)
        with pytest.raises(UserError, match=r"file 1 of the stream breaks off after \d+ rows"):
            encode(exported, source, tmp_path / "out", resolution=64, **FAST)
        shutil.copy(tars / "1.tar", file)
        assert encode(exported, source, tmp_path / "out", resolution=64, **FAST).count == 10

    def test_another_columns_damage_costs_nothing(self, exported, table, tmp_path):
        rows = datasets.load_dataset("parquet", data_files=str(table), split="train")
        rows = rows.cast_column("thumb", datasets.Image(decode=False))
        rows = rows.map(lambda row: {"thumb": {"bytes": b"damaged", "path": None}})
        rows.cast_column("thumb", datasets.Image()).to_parquet(tmp_path / "x.parquet")
        source = EncodingSource(
            source="parquet", path=str(tmp_path / "x.parquet"), image_column="picture"
        )
        assert encode(exported, source, tmp_path / "out", resolution=64, **FAST).count == 4

    def test_words_are_no_labels_of_a_stream(self, exported, table, tmp_path):
        source = EncodingSource(source="parquet", path=str(table), streaming=True, **COLUMNS)
        with pytest.raises(UserError, match="labels in 'kind' are words"):
            encode(exported, source, tmp_path / "out", resolution=64, **FAST)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Three tars of 5, 0 and 2 pictures."""
    root = tmp_path_factory.mktemp("tars")
    number = 0
    for place, count in enumerate((5, 3, 2)):
        with tarfile.open(root / f"{place}.tar", "w") as tar:
            for _ in range(count):
                buffer = io.BytesIO()
                photograph(NAMES[number % 4], 64 + number).save(buffer, "PNG")
                parts = {"png": buffer.getvalue(), "cls": str(number).encode()}
                for extension, content in parts.items():
                    info = tarfile.TarInfo(f"{number:03d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                number += 1
    return root


SHARD = {"shard_bytes": 2 * 2 * 4 * 32 * 32 * 2}  # two pictures of 64² at f2 in float16


class TestStreams:
    def source(self, tars, **more):
        return EncodingSource(source="webdataset", path=str(tars), streaming=True, **more)

    def test_a_stream_gives_what_random_access_gives(self, exported, tars, tmp_path):
        encode(exported, self.source(tars), tmp_path / "stream", resolution=64, **FAST, **SHARD)
        names = {path.name for path in (tmp_path / "stream").glob("index-*")}
        units = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
        assert names == {f"index-{file:06d}-{part:06d}.parquet" for file, part in units}
        encode(exported, tars, tmp_path / "random", resolution=64, **FAST)
        stream, random = (
            {row["key"]: row for row in LatentDataset(tmp_path / name, sample=False)}
            for name in ("stream", "random")
        )
        assert stream.keys() == random.keys()
        assert len(stream) == 10
        for key, row in stream.items():
            assert row["label"] == random[key]["label"]
            torch.testing.assert_close(row["latents"], random[key]["latents"], rtol=0, atol=2e-3)

    def test_a_stopped_stream_goes_on(self, exported, tars, tmp_path, monkeypatch):
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        options = {"resolution": 64, **FAST, **SHARD}
        encode(exported, self.source(tars), whole, **options)
        stopped_after(monkeypatch, 3)
        with pytest.raises(KeyboardInterrupt):
            encode(exported, self.source(tars), cut, **options)
        monkeypatch.undo()
        assert not (cut / "manifest.json").exists()
        encode(exported, self.source(tars), cut, **options)
        assert contents(cut) == contents(whole)

    def test_a_limit_counts_across_files(self, exported, tars, tmp_path):
        out = tmp_path / "out"
        encode(exported, self.source(tars, limit=7), out, resolution=64, **FAST, **SHARD)
        assert [row["key"] for row in rows_of(out)] == [f"{n:03d}" for n in range(7)]


def stopped_after(monkeypatch, batches):
    """Lets the encoder be called so often, then ends the run as Ctrl-C does."""
    encoder, calls = FrozenAutoencoder.encode, []

    def counted(self, images):
        calls.append(len(images))
        if len(calls) > batches + 1:  # the first is the probe of the folder's network
            raise KeyboardInterrupt
        return encoder(self, images)

    monkeypatch.setattr(FrozenAutoencoder, "encode", counted)
    return calls


class TestRestart:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_nothing_is_encoded_twice(self, exported, dozen, tmp_path, monkeypatch, workers):
        options = {"resolution": 64, **FAST, "workers": workers, "shard_bytes": 5 * (1 << 14)}
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        calls = stopped_after(monkeypatch, 99)
        encode(exported, dozen, whole, **options)
        in_one = len(calls) - 1
        monkeypatch.undo()
        seen = 0
        for _ in range(in_one):
            calls = stopped_after(monkeypatch, 2)
            try:
                encode(exported, dozen, cut, **options)
            except KeyboardInterrupt:
                seen += 2
            else:
                seen += len(calls) - 1
                break
            finally:
                monkeypatch.undo()
        assert contents(cut) == contents(whole)
        assert seen == in_one

    def test_a_finished_folder_is_left_alone(self, exported, dozen, tmp_path, monkeypatch):
        first = encode(exported, dozen, tmp_path / "out", resolution=64, **FAST)
        before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
        calls = stopped_after(monkeypatch, 0)
        assert encode(exported, dozen, tmp_path / "out", resolution=64, **FAST) == first
        assert len(calls) == 1  # the probe
        assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before

    @pytest.mark.parametrize("finished", [False, True])
    @pytest.mark.parametrize(
        ("changed", "difference"),
        [
            ({"resolution": 32}, "preprocessing.resolution 64, not 32"),
            ({"dtype": "float32"}, "storage.dtype 'float16', not 'float32'"),
            ({"limit": 5}, "data.limit None, not 5"),
            ({"precision": "bf16"}, "storage.precision 'fp32', not 'bf16'"),
        ],
    )
    def test_another_way_is_refused(
        self, exported, dozen, tmp_path, monkeypatch, finished, changed, difference
    ):
        out, options = tmp_path / "out", {"resolution": 64, **FAST}
        if not finished:
            stopped_after(monkeypatch, 2)
        try:
            encode(exported, dozen, out, **options)
        except KeyboardInterrupt:
            monkeypatch.undo()
        before = contents(out)
        with pytest.raises(UserError, match=difference):
            encode(exported, dozen, out, **(options | changed))
        assert contents(out) == before

    def test_other_weights_and_other_pictures_are_refused(self, exported, dozen, tmp_path):
        from latent_ae import load_network

        encode(exported, dozen, tmp_path / "out", resolution=64, **FAST)
        network = load_network(exported)
        with torch.no_grad():
            network.encoder.conv_in.bias.add_(1)
        network.save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match=r"autoencoder\.weights_sha256"):
            encode(tmp_path / "other", dozen, tmp_path / "out", resolution=64, **FAST)
        names = tmp_path / "names"
        names.mkdir()
        for file in dozen.iterdir():
            (names / f"x{file.name}").write_bytes(file.read_bytes())
        with pytest.raises(UserError, match="other pictures"):
            encode(exported, names, tmp_path / "out", resolution=64, **FAST)
        (names / "more.png").write_bytes((names / "x00.png").read_bytes())
        with pytest.raises(UserError, match=r"data\.rows 12, not 13"):
            encode(exported, names, tmp_path / "out", resolution=64, **FAST)

    @pytest.mark.slow
    def test_a_second_run_is_told_of_the_first(self, exported, dozen, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        # Locks are between processes, so the first run has to be another one.
        hold = (
            "import sys; from pathlib import Path; from latent_ae.latents.files import FolderLock;"
            "lock = FolderLock(Path(sys.argv[1]), int(sys.argv[2])); print('held', flush=True);"
            "sys.stdin.read()"
        )
        for rank in ("0", "3"):  # also while any other process of a killed run is alive
            holder = subprocess.Popen(
                [sys.executable, "-c", hold, out, rank],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
            )
            with holder:
                assert holder.stdout.readline() == b"held\n"
                with pytest.raises(UserError, match="another run is writing into"):
                    encode(exported, dozen, out, resolution=64, **FAST)
                holder.stdin.close()
                holder.wait(30)
        encode(exported, dozen, out, resolution=64, **FAST)
        assert not (out / ".lock").exists()

    @pytest.mark.slow
    def test_the_lock_dies_with_its_process_not_with_its_workers(self, tmp_path):
        lock = FolderLock(tmp_path, 0)
        child = os.fork()
        if child == 0:  # a loader's worker inherits every open file
            threading.Event().wait(30)
            os._exit(0)
        lock.release()
        code = (
            "import sys; from pathlib import Path; from latent_ae.latents.files import FolderLock;"
        )
        try:
            take = [sys.executable, "-c", code + "FolderLock(Path(sys.argv[1]), 0)", tmp_path]
            assert subprocess.run(take, cwd=ROOT, timeout=60).returncode == 0
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)

    @pytest.mark.parametrize("what", ["shard", "index", "spool"])
    def test_a_full_disk_leaves_whole_shards(self, exported, dozen, tmp_path, monkeypatch, what):
        options = {"resolution": 64, **FAST, "shard_bytes": 4 * (1 << 14)}
        encode(exported, dozen, tmp_path / "whole", **options)
        out, real, written = tmp_path / "out", os.fsync, []

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        if what == "spool":
            real_append, calls = Spool.append, []
            monkeypatch.setattr(
                Spool,
                "append",
                lambda spool, b: full() if len(calls) > 2 else calls.append(real_append(spool, b)),
            )
        else:

            def fsync(handle):
                name = os.readlink(f"/proc/self/fd/{handle}")
                written.append(name)
                if what in name and sum(what in n for n in written) == 2:
                    full()
                real(handle)

            monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=r"the disk is full: .* make room"):
            encode(exported, dozen, out, **options)
        monkeypatch.undo()
        assert len(list(out.glob("index-*"))) == 1
        assert not list(out.glob(".*.tmp"))
        encode(exported, dozen, out, **options)
        assert contents(out) == contents(tmp_path / "whole")

    def test_a_picture_that_is_repaired_meanwhile(self, exported, dozen, tmp_path, monkeypatch):
        """The codes of an earlier run must not slip to other keys."""
        monkeypatch.setattr("latent_ae.latents.plan._spread", lambda count: [0])  # notices nothing
        data, options = tmp_path / "data", {"resolution": 64, **FAST}
        shutil.copytree(dozen, data)
        (data / "01.png").write_bytes(b"damaged")
        with monkeypatch.context() as patch:
            stopped_after(patch, 3)
            with pytest.raises(KeyboardInterrupt):
                encode(exported, data, tmp_path / "out", **options)
        shutil.copy(dozen / "01.png", data / "01.png")
        encode(exported, data, tmp_path / "out", **options)
        encode(exported, data, tmp_path / "fresh", **options)
        ignored = {"manifest.json"}  # whose hash of the first bytes is the first run's
        now, wanted = (contents(tmp_path / name) for name in ("out", "fresh"))
        assert now.keys() == wanted.keys()
        assert all(now[name] == wanted[name] for name in wanted.keys() - ignored)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_other_pictures_of_the_same_names_are_refused(self, exported, tmp_path, streaming):
        for folder, names in (("a", NAMES), ("b", NAMES[::-1])):
            pictures = [photograph(name, 64) for name in names]
            features = datasets.Features({"image": datasets.Image()})
            (tmp_path / folder).mkdir()
            rows = datasets.Dataset.from_dict({"image": pictures}, features=features)
            rows.to_parquet(tmp_path / folder / "x.parquet")
        sources = [
            EncodingSource(source="parquet", path=str(tmp_path / f), streaming=streaming)
            for f in ("a", "b")
        ]
        encode(exported, sources[0], tmp_path / "out", resolution=64, **FAST)
        with pytest.raises(UserError, match="other pictures"):
            encode(exported, sources[1], tmp_path / "out", resolution=64, **FAST)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_data_set_that_vanishes_is_no_damaged_data_set(
        self, exported, dozen, tmp_path, monkeypatch, workers
    ):
        data, options = tmp_path / "data", {"resolution": 64, **FAST, "workers": workers}
        shutil.copytree(dozen, data)
        encoder = FrozenAutoencoder.encode

        def vanishing(self, images):
            if len(images) == 2 and data.exists():
                data.rename(tmp_path / "away")
            return encoder(self, images)

        monkeypatch.setattr(FrozenAutoencoder, "encode", vanishing)
        monkeypatch.setattr("latent_ae.latents.chunks._PREFETCH", 1)
        with pytest.raises(UserError, match="is not there any more; the same command goes on"):
            encode(exported, data, tmp_path / "out", **options)
        monkeypatch.undo()
        (tmp_path / "away").rename(data)
        assert encode(exported, data, tmp_path / "out", **options).count == 12

    def test_stopped_at_any_file_it_ends_the_same(self, exported, table, tmp_path, monkeypatch):
        source = EncodingSource(source="parquet", path=str(table), **COLUMNS)
        options = {"resolution": 64, **FAST, "shard_bytes": 1 << 14}
        encode(exported, source, tmp_path / "whole", **options)
        assert read_manifest(tmp_path / "whole").renamed == 1  # so the end rewrites an index
        rename, count = Path.rename, 0
        for stop in range(99):
            out, calls = tmp_path / str(stop), []

            def stopping(path, target, calls=calls, stop=stop):
                calls.append(target)
                if len(calls) == stop + 1:
                    raise KeyboardInterrupt
                return rename(path, target)

            monkeypatch.setattr(Path, "rename", stopping)
            try:
                encode(exported, source, out, **options)
            except KeyboardInterrupt:
                count += 1
                monkeypatch.undo()
                encode(exported, source, out, **options)
            assert contents(out) == contents(tmp_path / "whole"), stop
            if len(calls) <= stop:
                break
        assert count == 1 + 2 * 4 + 1 + 1  # the plan, four shards and indices, a key, the manifest

    def test_a_torn_spool_is_read_as_far_as_it_is_whole(self, tmp_path):
        from latent_ae.latents.encoder import EncodedBatch

        file, identity = tmp_path / "spool", {"batch_size": 2}
        spool = Spool(file, identity)
        for number in range(3):
            tensors = {"mean": torch.full((2, 1, 1, 1), float(number), dtype=torch.bfloat16)}
            spool.append(EncodedBatch((8, 8), tensors, torch.ones(2, dtype=torch.bool)))
        content = file.read_bytes()
        file.write_bytes(content[:-5])
        assert [b.tensors["mean"][0].item() for b in Spool(file, identity).batches] == [0, 1]
        spoiled = bytearray(content)
        spoiled[-3] ^= 1
        file.write_bytes(spoiled)
        spool = Spool(file, identity)
        assert len(spool.batches) == 2
        spool.append(EncodedBatch((8, 8), tensors, torch.ones(2, dtype=torch.bool)))
        assert [b.tensors["mean"][0].item() for b in Spool(file, identity).batches] == [0, 1, 2]
        file.write_bytes(content + b"\xff" * 64)
        assert len(Spool(file, identity).batches) == 3
        assert file.read_bytes() == content
        assert Spool(file, {"batch_size": 4}).batches == []

    def test_whole_or_not_at_all(self, tmp_path):
        write_whole(tmp_path / "file", b"old")

        def broken(path):
            path.write_bytes(b"ne")
            raise RuntimeError("stopped")

        with pytest.raises(RuntimeError):
            write_whole(tmp_path / "file", broken)
        assert contents(tmp_path) == {"file": b"old"}


class TestCuts:
    def test_one_crop_is_the_centre_crop_of_measuring(self):
        for name in NAMES:
            picture = photograph(name)
            (variant,) = Variants(Preprocessing(resolution=96))(picture, 0)
            assert torch.equal(variant.image, CenterCrop(96)(picture))

    def test_adm_is_that_of_measuring_too(self):
        picture = photograph("coffee")
        (variant,) = Variants(Preprocessing(resolution=64, resample="adm"))(picture, 0)
        assert torch.equal(variant.image, CenterCrop(64, resize="adm")(picture))

    def test_crops_lie_where_the_index_says(self):
        config = Preprocessing(resolution=64, resize=96, crops=3, flip=True)
        picture = photograph("coffee")
        found = Variants(config)(picture, 5)
        resized = picture.resize((round(picture.width * 96 / picture.height), 96), 1)
        assert [variant.flipped for variant in found] == [False, True] * 3
        assert len({(variant.left, variant.top) for variant in found}) == 3
        for variant in found:
            box = (variant.left, variant.top, variant.left + 64, variant.top + 64)
            wanted = torch.from_numpy(np.array(resized.crop(box))).permute(2, 0, 1)
            assert torch.equal(variant.image, wanted.flip(-1) if variant.flipped else wanted)
        assert all(
            a.left == b.left for a, b in zip(found, Variants(config)(picture, 5), strict=True)
        )
        assert [v.left for v in found] != [v.left for v in Variants(config)(picture, 6)]

    def test_buckets_are_those_of_sdxl(self):
        config = Preprocessing(resolution=1024, buckets=True).for_factor(8)
        sizes = config.sizes()
        # Podell et al. 2023, appendix I, within an aspect of 2.
        for size in [(1024, 1024), (1152, 896), (896, 1152), (832, 1216), (768, 1344)]:
            assert size in sizes
        assert all(h * w <= 1024**2 and h % 64 == w % 64 == 0 for h, w in sizes)
        assert Variants(config).nearest(1500, 1000) == (832, 1216)
        assert Variants(config).nearest(9000, 10) == (768, 1344)

    def test_buckets_end_to_end(self, exported, dozen, tmp_path):
        cut = Preprocessing(resolution=64, buckets=True, crops=2, flip=True, resize=72)
        manifest = encode(exported, dozen, tmp_path / "out", preprocessing=cut, **FAST)
        assert (manifest.pictures, manifest.count) == (12, 48)
        with pytest.raises(UserError, match="several sizes"):
            _ = manifest.latent_shape
        frozen, dataset = FrozenAutoencoder(exported), LatentDataset(tmp_path / "out", sample=False)
        variants, shapes = Variants(manifest.preprocessing), set()
        for position in range(0, 48, 7):
            row = rows_of(tmp_path / "out")[position]
            picture = Image.open(dozen / row["key"]).convert("RGB")
            image = variants(picture, row["position"])[position % 4].image
            wanted, _ = frozen.encode(image[None].float() / 127.5 - 1)
            wanted = dataset.manifest.autoencoder.to_final(wanted[0])
            shapes.add(tuple(wanted.shape))
            assert dataset.size_of(position) == wanted.shape[1:]
            tolerance = 2e-3 * wanted.abs().max().item()
            found = dataset[position]["latents"]
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=tolerance)
        assert len(shapes) == 3
        sampler = BucketBatchSampler(dataset, 5, seed=3)
        batches = list(torch.utils.data.DataLoader(dataset, batch_sampler=sampler))
        assert len(batches) == len(sampler)
        assert sorted(p for batch in sampler for p in batch) == list(range(48))
        sampler.set_epoch(1)
        assert list(sampler) != list(BucketBatchSampler(dataset, 5, seed=3))
        dropped = BucketBatchSampler(dataset, 5, drop_last=True)
        assert all(len(batch) == 5 for batch in dropped)
        assert len(list(dropped)) == len(dropped)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"resolution": 63}, "resolution 63 is no multiple of the network's factor 2"),
            ({"resolution": 64, "buckets": True, "bucket_step": 5}, "bucket_step 5 is no multiple"),
        ],
    )
    def test_what_does_not_fit_the_network(self, exported, dozen, tmp_path, options, message):
        cut = Preprocessing(**options)
        with pytest.raises(UserError, match=message):
            encode(exported, dozen, tmp_path / "out", preprocessing=cut, **FAST)
        assert not (tmp_path / "out").exists()

    def test_small_pictures_can_be_left_out(self, exported, dozen, tmp_path):
        cut = Preprocessing(resolution=64, min_side=72)
        manifest = encode(exported, dozen, tmp_path / "out", preprocessing=cut, **FAST)
        assert (manifest.count, manifest.skipped) == (8, 4)
        reasons = {row["skipped"] for row in rows_of(tmp_path / "out")}
        assert reasons == {None, "96 × 60 is below 72 pixels"}


class TestDamage:
    def test_one_picture_costs_one_picture(self, exported, tmp_path):
        root = tmp_path / "data"
        root.mkdir()
        for number in range(100):
            photograph(NAMES[number % 4], 32).save(root / f"{number:03d}.jpg")
        file = root / "050.jpg"
        file.write_bytes(file.read_bytes()[:300])
        manifest = encode(exported, root, tmp_path / "out", resolution=32, **FAST)
        assert (manifest.count, manifest.skipped) == (99, 1)
        assert [row["key"] for row in rows_of(tmp_path / "out") if row["skipped"]] == ["050.jpg"]

    def test_a_decompression_bomb_is_reported(self, exported, dozen, tmp_path, monkeypatch):
        # 4 × 4 pixels on the disk would do as well: Pillow looks at the size in the header.
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 72 // 2 - 1)
        manifest = encode(exported, dozen, tmp_path / "out", resolution=32, **FAST)
        assert (manifest.count, manifest.skipped) == (4, 8)
        reasons = [row["skipped"] for row in rows_of(tmp_path / "out") if row["skipped"]]
        assert all("decompression bomb" in reason for reason in reasons)

    def test_a_data_set_without_a_readable_picture(self, exported, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data/a.png").write_bytes(b"none")
        with pytest.raises(UserError, match=r"not one picture could be encoded: a\.png: Unident"):
            encode(exported, tmp_path / "data", tmp_path / "out", resolution=32, **FAST)
        assert not (tmp_path / "out/manifest.json").exists()


class TestKinds:
    def test_a_codebook_gives_indices(self, dozen, tmp_path):
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2}
        blocks["up_block_types"] = ("UpDecoderBlock2D",) * 2
        network = VQModel(
            **blocks, block_out_channels=(8, 8), norm_num_groups=4, num_vq_embeddings=64
        ).eval()
        network.save_pretrained(tmp_path / "vq")
        manifest = encode(tmp_path / "vq", dozen, tmp_path / "out", resolution=32, **FAST)
        assert (manifest.storage.kind, manifest.storage.dtype) == ("indices", "uint8")
        item = LatentDataset(tmp_path / "out")[3]
        assert item["indices"].shape == (16, 16)
        assert item["indices"].dtype == torch.int64
        picture = Image.open(dozen / item["key"]).convert("RGB")
        image = CenterCrop(32)(picture)[None].float() / 127.5 - 1
        with torch.no_grad():
            latents = network.encode(image).latents
            _, _, (_, _, wanted) = network.quantize(latents)
            stock = network.decode(latents).sample  # quantizes on its own
        assert torch.equal(item["indices"].flatten(), wanted.flatten())
        decode(tmp_path / "out", tmp_path / "pictures")
        found = np.array(Image.open(tmp_path / f"pictures/{item['key']}.png"), np.int16)
        stock = ((stock[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
        assert np.abs(found - stock).max() <= 1
        with pytest.raises(UserError, match="no posterior"):
            encode(tmp_path / "vq", dozen, tmp_path / "no", resolution=32, store="moments", **FAST)

    def test_an_autoencoder_without_posterior_gives_the_mode(self, dozen, tmp_path):
        AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).save_pretrained(tmp_path / "tiny")
        manifest = encode(tmp_path / "tiny", dozen, tmp_path / "out", resolution=32, **FAST)
        assert manifest.storage.kind == "mode"
        dataset = LatentDataset(tmp_path / "out")
        assert torch.equal(dataset[0]["latents"], dataset[0]["latents"])
        with pytest.raises(UserError, match="holds mode, no moments"):
            dataset.moments(0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"store": "indices"}, "has no codebook"),
            ({"dtype": "int32"}, "moments cannot be stored as int32"),
            ({"dtype": "int8"}, "dtype 'int8' is unknown"),
            ({"precision": "fp8"}, "precision 'fp8' is unknown"),
        ],
    )
    def test_what_cannot_be_stored(self, exported, dozen, tmp_path, options, message):
        with pytest.raises(UserError, match=message):
            encode(exported, dozen, tmp_path / "out", resolution=64, **(FAST | options))
        assert not (tmp_path / "out").exists()

    def test_the_mode_alone_is_half_as_large(self, exported, dozen, tmp_path):
        encode(exported, dozen, tmp_path / "both", resolution=64, **FAST)
        encode(exported, dozen, tmp_path / "mode", resolution=64, store="mode", **FAST)
        both, mode = (LatentDataset(tmp_path / name, sample=False) for name in ("both", "mode"))
        assert torch.equal(both[4]["latents"], mode[4]["latents"])
        sizes = [
            sum(f.stat().st_size for f in (tmp_path / n).glob("shard*")) for n in ("both", "mode")
        ]
        assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.01)


class TestStatistics:
    def test_they_are_those_of_what_is_stored_whatever_the_shards(self, exported, dozen, tmp_path):
        options = {"resolution": 64, **FAST, "batch_size": 1}
        many = encode(exported, dozen, tmp_path / "many", **options, shard_bytes=1 << 14)
        one = encode(exported, dozen, tmp_path / "one", **options)
        assert (len(many.shards), len(one.shards)) == (12, 1)
        dataset = LatentDataset(tmp_path / "many")
        mean, logvar = (
            torch.stack(p).double() for p in zip(*map(dataset.moments, range(12)), strict=True)
        )
        variance = mean.var((0, 2, 3), correction=0) + logvar.exp().mean((0, 2, 3))
        for manifest in (one, many):
            found = manifest.statistics
            np.testing.assert_allclose(found["channel_mean"], mean.mean((0, 2, 3)), rtol=1e-12)
            np.testing.assert_allclose(found["channel_std"], variance.sqrt(), rtol=1e-12)
            whole = (mean - mean.mean()).square().mean() + logvar.exp().mean()
            assert found["std"] == pytest.approx(whole.sqrt().item(), rel=1e-12)
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum().item() / 12
            assert found["kl_nats_per_code"] == pytest.approx(kl, rel=1e-12)

    def test_the_order_of_parts_changes_no_bit_and_a_far_mean_no_digit(self):
        from latent_ae.latents.statistics import Moments, summary

        generator = torch.Generator().manual_seed(0)
        codes = torch.randn((64, 2, 4, 4), generator=generator, dtype=torch.float32) + 1000
        parts = [Moments.of([codes[i : i + n]], []) for i, n in ((0, 1), (1, 40), (41, 23))]
        first = summary(parts)
        assert first == summary(parts[::-1]) == summary([parts[1], parts[2], parts[0]])
        wanted = codes.double().var((0, 2, 3), correction=0).sqrt()
        np.testing.assert_allclose(first["channel_std"], wanted, rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes_write_what_one_does(exported, dozen, tars, tmp_path, streaming):
    data = tars if streaming else dozen
    options = ["--resolution=64", "--shard-mb=1", "--batch-size=2", "--precision=fp32"]
    if streaming:
        options.append("--streaming")
    for processes in (1, 2):
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += [f"--nproc-per-node={processes}", "-m", "latent_ae", "encode", str(exported)]
        done = subprocess.run(
            [*start, str(data), str(tmp_path / str(processes)), *options],
            cwd=ROOT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("latents of") == 1
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert read_manifest(tmp_path / "2").count == (10 if streaming else 12)


@pytest.mark.slow
def test_ray_writes_what_one_process_does(exported, dozen, tmp_path):
    options = ["--resolution=64", "--batch-size=2", "--precision=fp32", "--workers=1"]
    # Ray's workers are told to use one thread; a convolution's bits depend on it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "latent_ae", "encode", str(exported), str(dozen)]

    def run(out, *more, code=0):
        done = subprocess.run(
            [*command, str(tmp_path / out), *options, *more],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == code, done.stderr
        return done.stderr

    source = {"shard_bytes": 3 * (1 << 14)}  # below what --shard-mb can say
    script = (
        "import sys; from latent_ae.config import Preprocessing;"
        "from latent_ae.latents.ray_stage import encode_on_ray; from latent_ae import encode;"
        "cut = Preprocessing(resolution=64);"
        "options = dict(preprocessing=cut, batch_size=2, precision='fp32', workers=1, "
        f"shard_bytes={source['shard_bytes']});"
        "model, data, ray, plain = sys.argv[1:];"
        "encode(model, data, plain, **options);"
        "made = encode_on_ray(model, data, ray, actors=2, **options);"
        "assert encode_on_ray(model, data, ray, actors=2, **options) == made;"
        "assert len(made.shards) == 4"
    )
    places = [str(tmp_path / "ray"), str(tmp_path / "plain")]
    done = subprocess.run(
        [sys.executable, "-c", script, str(exported), str(dozen), *places],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "ray") == contents(tmp_path / "plain")
    assert "12 latents of 12 pictures" in run("line", "--ray=1")
    assert "leave out streaming" in run("stream", "--ray=1", "--streaming", code=2)
