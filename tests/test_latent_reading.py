"""Reading latents: draws, epochs, variants, streams, other worlds."""

import json
import multiprocessing
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import NAMES, photograph
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from latent_ae import LatentDataset, LatentStream, UserError, encode
from latent_ae.config import Preprocessing
from latent_ae.latents import BucketBatchSampler
from latent_ae.latents.shards import MappedShard


@pytest.fixture(scope="module")
def folder(exported, tmp_path_factory):
    """Twenty pictures of two crops and their mirror images, in shards of four pictures."""
    data = tmp_path_factory.mktemp("data")
    for number in range(20):
        photograph(NAMES[number % 4], 40 + number).save(data / f"{number:02d}.png")
    out = tmp_path_factory.mktemp("latents") / "latents"
    cut = Preprocessing(resolution=32, resize=40, crops=2, flip=True)
    a_picture = 4 * 2 * 4 * 16 * 16 * 2
    encode(exported, data, out, preprocessing=cut, workers=0, shard_bytes=4 * a_picture)
    return out


def same(a, b):
    return torch.equal(a["latents"], b["latents"])


class TestDraws:
    def test_a_seed_makes_them_a_function_of_epoch_and_position(self, folder):
        one, two = LatentDataset(folder, seed=1), LatentDataset(folder, seed=1)
        torch.manual_seed(7)
        assert same(one[5], two[5])
        assert same(one[-1], one[len(one) - 1])
        assert not same(one[5], LatentDataset(folder, seed=2)[5])
        one.set_epoch(1)
        assert not same(one[5], two[5])
        two.set_epoch(1)
        assert same(one[5], two[5])

    def test_without_a_seed_every_reading_differs(self, folder):
        dataset = LatentDataset(folder)
        assert not same(dataset[5], dataset[5])
        mode = LatentDataset(folder, sample=False)
        assert same(mode[5], mode[5])

    @pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
    def test_workers_that_outlive_an_epoch_see_the_next(self, folder, context):
        dataset = LatentDataset(folder, seed=1, columns=())
        options = {"num_workers": 1, "persistent_workers": True}
        loader = DataLoader(dataset, 80, multiprocessing_context=context, **options)
        first = next(iter(loader))["latents"]
        dataset.set_epoch(1)
        second = next(iter(loader))["latents"]
        assert not torch.equal(first, second)
        assert torch.equal(second, torch.stack([item["latents"] for item in dataset]))
        del loader

    def test_a_picture_draws_one_of_its_variants(self, folder):
        every = LatentDataset(folder, sample=False, columns=("position", "flipped", "crop_left"))
        drawn = LatentDataset(folder, sample=False, variants="draw", seed=0, columns=("position",))
        assert (len(every), len(drawn)) == (80, 20)
        seen = set()
        for epoch in range(40):
            drawn.set_epoch(epoch)
            item = drawn[3]
            assert item["position"] == 3
            seen |= {place for place in range(12, 16) if same(every[place], item)}
        assert seen == {12, 13, 14, 15}
        left, mirrored = every[12], every[13]
        assert (left["flipped"], mirrored["flipped"]) == (False, True)
        # Not the same as the mirrored latents: that is why they are stored.
        assert not torch.allclose(left["latents"].flip(-1), mirrored["latents"], atol=1e-3)

    def test_wrong_arguments(self, folder):
        with pytest.raises(UserError, match="no column 'captions'; it has key, position"):
            LatentDataset(folder, columns=("captions",))
        with pytest.raises(UserError, match="variants 'some' is unknown"):
            LatentDataset(folder, variants="some")
        with pytest.raises(IndexError):
            LatentDataset(folder)[80]


class TestMappedShard:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32", "uint16"])
    def test_it_reads_what_the_library_reads(self, tmp_path, dtype):
        dtype = getattr(torch, dtype)
        tensors = {
            "a": (torch.randn(5, 2, 3) * 100).abs().to(dtype),
            "b": torch.zeros(0, 2).to(dtype),
        }
        save_file(tensors, tmp_path / "x.safetensors", metadata={"a": "b"})
        shard, wanted = (
            MappedShard(tmp_path / "x.safetensors"),
            load_file(tmp_path / "x.safetensors"),
        )
        for row in range(5):
            assert torch.equal(shard.rows("a", row), wanted["a"][row])
        rows = np.array([4, 0])
        assert torch.equal(shard.rows("a", rows).float(), wanted["a"].float()[[4, 0]])
        assert shard.shape("b") == (0, 2)

    def test_more_shards_than_open_files(self, tmp_path):
        import resource

        save_file({"a": torch.arange(4, dtype=torch.float32)}, tmp_path / "x.safetensors")
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
        try:
            shards = [MappedShard(tmp_path / "x.safetensors") for _ in range(300)]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert all(shard.rows("a", 3) == 3 for shard in shards)

    def test_damage(self, tmp_path):
        file = tmp_path / "x.safetensors"
        save_file({"a": torch.randn(5, 2)}, file)
        whole = file.read_bytes()
        for content in (whole[:-4], whole[:20], b"", b"\xff" * 100):
            file.write_bytes(content)
            with pytest.raises(UserError, match=r"is damaged: x\.safetensors"):
                MappedShard(file)


class TestStream:
    def test_an_epoch_gives_each_item_once(self, folder):
        stream = LatentStream(folder, buffer=7, columns=("position", "key"))
        first = [item["latents"] for item in stream]
        assert len(first) == len(stream) == 80
        again = [item["latents"] for item in stream]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        order = list(stream.order(0))
        assert sorted(order) == list(range(80))
        assert order != sorted(order)
        assert list(stream.order(1)) != order
        disk = LatentStream(folder, buffer=1)
        runs = np.diff(list(disk.order(0)))
        assert (runs == 1).sum() >= 80 - 2 * 5 - 1  # whole shards in a row

    def test_consumers_share_it_evenly(self, folder):
        parts = [
            list(LatentStream(folder, buffer=5, rank=rank, world=3).order(2)) for rank in range(3)
        ]
        assert [len(part) for part in parts] == [26, 26, 26]
        assert len({position for part in parts for position in part}) == 78
        others = [
            position
            for rank in range(3)
            for position in LatentStream(folder, buffer=5, rank=rank, world=3).order(3)
        ]
        left_out = set(range(80)) - {p for part in parts for p in part}
        assert left_out != set(range(80)) - set(others)
        with pytest.raises(UserError, match="80 items cannot be divided among 99"):
            list(LatentStream(folder, rank=0, world=99))

    @pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11
    @pytest.mark.parametrize("workers", [0, 2])
    def test_it_goes_on_where_it_was(self, folder, workers):
        def loader():
            stream = LatentStream(folder, buffer=9, seed=4, columns=("key",))
            stream.set_epoch(3)
            return StatefulDataLoader(stream, batch_size=5, num_workers=workers)

        whole = [batch["latents"] for batch in loader()]
        first, found = loader(), []
        for batch in first:
            found.append(batch["latents"])
            if len(found) == 6:
                state = (
                    json.loads(json.dumps(first.state_dict(), default=str)) and first.state_dict()
                )
                break
        second = loader()
        second.load_state_dict(state)
        found += [batch["latents"] for batch in second]
        assert len(found) == len(whole) == 16
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))

    def test_draws_and_variants(self, folder):
        stream = LatentStream(folder, buffer=4, variants="draw", columns=("position",))
        assert sorted(item["position"] for item in stream) == list(range(20))
        with pytest.raises(UserError, match="rank 3 of 2 is no way to read"):
            LatentStream(folder, rank=3, world=2)


class TestOtherWorlds:
    def test_as_a_dataset_of_datasets(self, folder):
        mine = LatentDataset(folder, seed=0, columns=("label", "key", "flipped"))
        theirs = mine.to_datasets()
        assert len(theirs) == 80
        assert theirs.column_names == ["label", "key", "flipped", "__position__"]
        row = theirs[7]
        assert torch.equal(row["latents"], mine[7]["latents"])
        assert row["key"] == mine[7]["key"]
        few = theirs.filter(lambda flipped: flipped, input_columns="flipped", keep_in_memory=True)
        assert len(few) == 40
        assert torch.equal(few[3]["latents"], mine[7]["latents"])

    def test_version_1_is_read(self, folder, tmp_path):
        """As the release before this one wrote it."""
        old = tmp_path / "old"
        old.mkdir()
        tensors = {name: torch.randn(3, 4, 16, 16) for name in ("mean", "logvar")}
        save_file(tensors, old / "shard-00000.safetensors")
        rows = [
            {
                "key": str(n),
                "label": n,
                "caption": None,
                "width": 9,
                "height": 9,
                "shard": 0,
                "row": n,
            }
            for n in range(3)
        ]
        pq.write_table(pa.Table.from_pylist(rows), old / "index-00000.parquet")
        now = json.loads((folder / "manifest.json").read_text())
        shard = {"file": "shard-00000.safetensors", "index": "index-00000.parquet"}
        record = {
            k: v for k, v in now["autoencoder"].items() if k not in ("downsampling", "channels")
        }
        manifest = {
            "format": "latent_ae/latents",
            "version": 1,
            "autoencoder": record,
            "preprocessing": {
                "resolution": 32,
                "resize": "shorter side, Lanczos",
                "crop": "center",
            },
            "latent_shape": [4, 16, 16],
            "dtype": "float32",
            "count": 3,
            "label_names": [],
            "num_classes": 3,
            "shards": [shard | {"rows": 3, "sha256": ""}],
            "skipped": [{"key": "x", "reason": "y"}],
            "statistics": {},
            "versions": {},
        }
        (old / "manifest.json").write_text(json.dumps(manifest))
        dataset = LatentDataset(old, sample=False, scale=False)
        assert [item["label"] for item in dataset] == [0, 1, 2]
        assert torch.equal(dataset[2]["latents"], tensors["mean"][2])
        assert dataset.manifest.skipped == 1
        assert len(list(BucketBatchSampler(dataset, 2))) == 2

    @pytest.mark.slow
    def test_a_process_of_its_own_reads_it(self, folder):
        dataset = LatentDataset(folder, seed=3)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.map(dataset.__getitem__, [2])[0]
            pool.close()
            pool.join()
        assert same(found, dataset[2])

    def test_an_index_that_contradicts_the_manifest(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "latents")
        index = tmp_path / "latents/index-000001.parquet"
        pq.write_table(pq.read_table(index).slice(1), index)
        with pytest.raises(
            UserError, match=r"index-000001\.parquet has 15 codes, the manifest says 16"
        ):
            LatentDataset(tmp_path / "latents")
