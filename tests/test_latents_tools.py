"""Finished latents folders: checked, joined, divided, described."""

import errno
import hashlib
import io
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import NAMES, photograph
from diffusers import VQModel
from rich.console import Console
from safetensors.torch import load_file, save_file

from latent_ae import LatentDataset, UserError, encode
from latent_ae.config import EncodingSource, Preprocessing
from latent_ae.latents import read_manifest
from latent_ae.latents.describe import describe
from latent_ae.latents.merge import merge, split
from latent_ae.latents.statistics import summary
from latent_ae.latents.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = {"workers": 0, "precision": "fp32", "batch_size": 2}
CUT = Preprocessing(resolution=32, resize=40, crops=2, flip=True)
A_PICTURE = 4 * 2 * 4 * 16 * 16 * 2  # bytes: variants, moments, channels, sides, float16
FIRST, INDEX = "shard-000000.safetensors", "index-000000.parquet"


def pictures(folder, count, start=0):
    """Pictures in two folders, which are their labels, and one broken."""
    for number in range(start, start + count):
        kind = folder / ("odd" if number % 2 else "even")
        kind.mkdir(parents=True, exist_ok=True)
        picture = photograph(NAMES[number % 4], 48 + number)
        picture.crop((0, 0, picture.width, picture.height - 4 * (number % 3))).save(
            kind / f"{number:02d}.png"
        )
    (folder / "even/broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data"), 8)


@pytest.fixture(scope="module")
def latents(exported, data, tmp_path_factory):
    """Nine pictures, one of them broken, each of four codes, in shards of three."""
    out = tmp_path_factory.mktemp("latents") / "first"
    encode(exported, data, out, preprocessing=CUT, shard_bytes=3 * A_PICTURE, **FAST)
    return out


@pytest.fixture(scope="module")
def second(exported, tmp_path_factory):
    """Four other pictures and one of a name that the first folder has too."""
    root = pictures(tmp_path_factory.mktemp("data"), 4, start=20)
    photograph("coffee", 60).save(root / "even/00.png")
    out = tmp_path_factory.mktemp("latents") / "second"
    encode(exported, root, out, preprocessing=CUT, shard_bytes=2 * A_PICTURE, **FAST)
    return out


@pytest.fixture(scope="module")
def buckets(exported, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "buckets"
    cut = Preprocessing(resolution=32, buckets=True, bucket_step=4)
    encode(exported, data, out, preprocessing=cut, shard_bytes=A_PICTURE, **FAST)
    assert len(read_manifest(out).shards) > 1
    return out


@pytest.fixture(scope="module")
def indices(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("vq")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    blocks["up_block_types"] = ("UpDecoderBlock2D",) * 2
    VQModel(
        **blocks,
        block_out_channels=(8, 8),
        latent_channels=4,
        num_vq_embeddings=32,
        norm_num_groups=4,
    ).save_pretrained(root / "model")
    encode(root / "model", data, root / "out", resolution=32, shard_bytes=2048, **FAST)
    return root / "out"


@pytest.fixture
def version_1(latents, tmp_path):
    """As the first release wrote it: no positions, no moments, one size."""
    old = tmp_path / "old"
    old.mkdir()
    shards = []
    for number, rows in enumerate((3, 2)):
        tensors = {name: torch.randn(rows, 4, 16, 16).half() for name in ("mean", "logvar")}
        shard = {"file": f"shard-0000{number}.safetensors", "index": f"index-0000{number}.parquet"}
        save_file(tensors, old / shard["file"])
        digest = hashlib.sha256((old / shard["file"]).read_bytes()).hexdigest()
        table = {"key": [f"{number}/{row}" for row in range(rows)], "label": list(range(rows))}
        table |= {"caption": pa.nulls(rows, pa.string()), "width": pa.array([9] * rows, pa.int32())}
        table |= {"height": pa.array([9] * rows, pa.int32()), "shard": [number] * rows}
        table["row"] = pa.array(range(rows), pa.int32())
        pq.write_table(pa.table(table), old / shard["index"])
        shards.append(shard | {"rows": rows, "sha256": digest})
    now = json.loads((latents / "manifest.json").read_text())
    names = ("path", "weights_sha256", "class_name", "scaling_factor", "shift_factor")
    names += ("latents_mean", "latents_std")
    manifest = {
        "format": "latent_ae/latents",
        "version": 1,
        "autoencoder": {name: now["autoencoder"][name] for name in names},
        "preprocessing": {"resolution": 32, "resize": "shorter side, Lanczos", "crop": "center"},
        "latent_shape": [4, 16, 16],
        "dtype": "float16",
        "count": 5,
        "label_names": ["even", "odd"],
        "num_classes": 3,
        "shards": shards,
        "skipped": [{"key": "x", "reason": "y"}],
        "statistics": {"images": 5, "channel_mean": [0.0] * 4, "channel_std": [1.0] * 4},
        "versions": {"torch": "2.0"},
    }
    (old / "manifest.json").write_text(json.dumps(manifest))
    return old


@pytest.fixture
def copy(latents, tmp_path):
    return shutil.copytree(latents, tmp_path / "copy")


def change_manifest(folder, change):
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def rehash(folder, number=0):
    """Makes the manifest's hashes those of the files: the fault is deeper."""

    def change(content):
        shard = content["shards"][number]
        for name, digest in (("file", "sha256"), ("index", "index_sha256")):
            content_of = (folder / shard[name]).read_bytes()
            shard[digest] = hashlib.sha256(content_of).hexdigest()
        metadata = pq.read_schema(folder / shard["index"]).metadata[b"latent_ae"]
        record = json.loads(metadata) | {"sha256": shard["sha256"]}
        table = pq.read_table(folder / shard["index"])
        table = table.replace_schema_metadata({"latent_ae": json.dumps(record)})
        pq.write_table(table, folder / shard["index"])
        index = (folder / shard["index"]).read_bytes()
        shard["index_sha256"] = hashlib.sha256(index).hexdigest()

    change_manifest(folder, change)


def change_tensors(folder, change):
    tensors = load_file(folder / FIRST)
    save_file(change(tensors) or tensors, folder / FIRST)
    rehash(folder)


def change_column(folder, name, change, file=INDEX):
    table = pq.read_table(folder / file)
    values = change(table[name].to_pylist())
    place = table.schema.get_field_index(name)
    table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    pq.write_table(table, folder / file)
    rehash(folder, int(file[6:12]))


def codes_of(folder):
    """Moments (or mode, or indices) of each variant of each picture, in order."""
    dataset = LatentDataset(folder, sample=False, scale=False, columns=("key", "label"))
    found = {}
    for place, item in enumerate(dataset):
        if "indices" in item:
            code = item["indices"]
        elif dataset.manifest.storage.kind == "mode":
            code = item["latents"]
        else:
            code = torch.cat(dataset.moments(place))
        found.setdefault(item["key"], []).append((item["label"], code))
    return found


def same(a, b):
    return len(a) == len(b) and all(
        x[0] == y[0] and torch.equal(x[1], y[1]) for x, y in zip(a, b, strict=True)
    )


def text_of(folder, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(describe(folder))
    return console.file.getvalue()


class TestVerify:
    @pytest.mark.parametrize("which", ["latents", "buckets", "indices", "version_1"])
    def test_what_encode_writes_is_sound(self, which, request, quiet):
        assert verify(request.getfixturevalue(which), console=quiet) == []

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_other_types_are_sound(self, exported, data, tmp_path, dtype):
        encode(exported, data, tmp_path / "out", resolution=32, store="mode", dtype=dtype, **FAST)
        assert verify(tmp_path / "out") == []

    def test_no_manifest(self, copy):
        (copy / "manifest.json").unlink()
        with pytest.raises(UserError, match="no finished latents folder"):
            verify(copy)

    @pytest.mark.parametrize("name", [FIRST, INDEX, "shard-000002.safetensors"])
    def test_one_flipped_bit(self, copy, name):
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        found = verify(copy)
        assert found
        assert found[0].startswith(f"{name}: its sha256 is ")
        assert all(fault.startswith(f"{name}: ") for fault in found)

    @pytest.mark.parametrize("name", [FIRST, INDEX])
    @pytest.mark.parametrize("size", [0, 5, 100])
    def test_cut_off(self, copy, name, size):
        (copy / name).write_bytes((copy / name).read_bytes()[:size])
        found = verify(copy)
        assert len(found) == 2
        assert found[1].startswith(f"{name}: cannot be read")

    @pytest.mark.parametrize("name", [FIRST, INDEX, "index-000001.parquet"])
    def test_a_missing_file(self, copy, name):
        (copy / name).unlink()
        assert verify(copy) == [f"{name}: the file is missing"]

    def test_a_file_too_many(self, copy):
        (copy / "notes.txt").write_text("mine")
        assert verify(copy) == ["notes.txt: the manifest does not name it"]

    @pytest.mark.parametrize(
        ("name", "value", "fault"),
        [
            ("mean", float("nan"), "has values that are not finite"),
            ("logvar", float("inf"), "has values that are not finite"),
            ("logvar", -31.0, r"has values outside [-30, 20]"),
            ("logvar", 21.0, r"has values outside [-30, 20]"),
        ],
    )
    def test_a_wrong_value(self, copy, name, value, fault):
        def change(tensors):
            tensors[name][5, 0, 1, 2] = value

        change_tensors(copy, change)
        key = codes_of(copy).keys()  # of four codes each
        assert verify(copy) == [f"{FIRST}: {name} of {list(key)[1]!r} {fault}"]

    def test_the_bounds_themselves_are_right(self, copy):
        def change(tensors):
            tensors["logvar"][0] = -30
            tensors["logvar"][1] = 20

        change_tensors(copy, change)
        found = verify(copy)
        assert {fault.split()[-7] for fault in found} == {"moments.variance", "moments.kl"}

    def test_values_that_are_not_those_of_the_statistics(self, copy):
        def change(tensors):
            tensors["mean"][0, 2, 0, 0] += 1

        change_tensors(copy, change)
        assert f"{FIRST}: the manifest's moments.mean is not that of its codes" in verify(copy)

    @pytest.mark.parametrize(
        ("change", "fault"),
        [
            (lambda t: {"mean": t["mean"]}, "tensor 'logvar' is missing"),
            (lambda t: t | {"more": t["mean"].clone()}, "tensor 'more' does not belong here"),
            (lambda t: {n: v.float() for n, v in t.items()}, "tensor 'mean' is float32, the"),
            (lambda t: {n: v[1:].clone() for n, v in t.items()}, "tensor 'mean' is 11 × 4 × 16"),
            (lambda t: {n: v[..., 1:].clone() for n, v in t.items()}, "× 15, not 12 × 4 × 16 × 16"),
        ],
    )
    def test_other_tensors(self, copy, change, fault):
        change_tensors(copy, change)
        assert any(fault in found and found.startswith(FIRST) for found in verify(copy))

    def test_negative_indices(self, indices, tmp_path):
        folder = shutil.copytree(indices, tmp_path / "copy")
        change_manifest(folder, lambda m: m["storage"].update(dtype="int32"))
        change_tensors(folder, lambda t: {"indices": t["indices"].int() - 31})
        found = [fault for fault in verify(folder) if fault.startswith(FIRST)]
        assert len(found) == 1
        assert found[0].endswith("has negative values")

    def test_one_key_for_two_pictures(self, copy):
        key = pq.read_table(copy / INDEX)["key"][0].as_py()
        other = "index-000002.parquet"
        change_column(copy, "key", lambda keys: [key] * 4 + keys[4:], other)
        assert verify(copy) == [f"{other}: key {key!r} is that of another picture in {INDEX} too"]

    def test_one_position_for_two_pictures(self, copy):
        change_column(copy, "position", lambda positions: [0] * len(positions))
        found = verify(copy)
        assert any("have one position, as if they were one picture" in fault for fault in found)

    def test_rows_out_of_order(self, copy):
        def swap(rows):
            first, second = (place for place, row in enumerate(rows) if row in (2, 3))
            rows[first], rows[second] = rows[second], rows[first]
            return rows

        change_column(copy, "row", swap)
        (found,) = verify(copy)
        assert found.startswith(INDEX)
        assert found.endswith("is row 3 of 16 × 16, not 2")

    def test_a_code_that_is_said_to_be_skipped(self, copy):
        change_column(copy, "skipped", lambda values: ["why?", *values[1:]])
        (found,) = verify(copy)
        assert found.endswith("has both a row and a reason to be skipped, or neither")

    def test_a_row_less(self, copy):
        table = pq.read_table(copy / INDEX)
        pq.write_table(table.slice(0, len(table) - 4), copy / INDEX)
        rehash(copy)
        found = verify(copy)
        assert any(fault.startswith(f"{INDEX}: pictures is") for fault in found)
        assert any(fault.startswith(f"{FIRST}: tensor") for fault in found)

    def test_a_column_less(self, copy):
        table = pq.read_table(copy / INDEX)
        pq.write_table(table.drop_columns(["label"]), copy / INDEX)
        rehash(copy)
        assert verify(copy) == [f"{INDEX}: column 'label' is missing"]

    @pytest.mark.parametrize("name", ["count", "pictures", "skipped", "num_classes"])
    def test_a_manifest_that_does_not_add_up(self, copy, name):
        change_manifest(copy, lambda content: content.update({name: content[name] - 1}))
        (found,) = verify(copy)
        assert found.startswith(f"manifest.json: {name} is ")

    def test_statistics_that_do_not_add_up(self, copy):
        change_manifest(copy, lambda content: content["statistics"].update(std=1.0))
        assert verify(copy) == [
            "manifest.json: statistics.std is not what the shards add up to",
        ]

    def test_a_record_that_differs(self, copy):
        change_manifest(copy, lambda content: content["shards"][1].update(last=True))
        (found,) = verify(copy)
        assert found.startswith("index-000001.parquet: its record")

    def test_it_goes_on_after_a_fault(self, copy):
        (copy / FIRST).unlink()
        (copy / "index-000001.parquet").write_bytes(b"nothing")
        (copy / "more").mkdir()
        change_manifest(copy, lambda content: content.update(count=1))
        names = [fault.partition(":")[0] for fault in verify(copy)]
        assert names == [FIRST, *["index-000001.parquet"] * 2, "manifest.json", "more"]

    def test_sizes_that_no_manifest_knows(self, buckets, tmp_path):
        folder = shutil.copytree(buckets, tmp_path / "copy")
        change_column(folder, "latent_height", lambda values: [v and 99 for v in values])
        assert any("has latents of 99 × " in fault for fault in verify(folder))

    def test_version_1_with_a_wrong_value(self, version_1):
        file = version_1 / "shard-00001.safetensors"
        tensors = load_file(file)
        tensors["mean"][1] = float("nan")
        save_file(tensors, file)
        found = verify(version_1)
        assert found[0].startswith("shard-00001.safetensors: its sha256 is ")
        assert found[1:] == [
            "shard-00001.safetensors: mean of '1/1' has values that are not finite"
        ]


class TestMerge:
    def test_all_codes_under_keys_of_their_own(self, latents, second, tmp_path):
        manifest = merge([latents, second], tmp_path / "out")
        assert verify(tmp_path / "out") == []
        first, other, both = (codes_of(f) for f in (latents, second, tmp_path / "out"))
        shared = first.keys() & other.keys()
        assert shared == {"even/00.png"}
        assert len(both) == len(first) + len(other)
        for name, own in (("first", first), ("second", other)):
            for key, codes in own.items():
                assert same(both[f"{name}/{key}" if key in shared else key], codes)
        # The broken pictures bear one name as well.
        assert manifest.renamed == 4
        parts = [read_manifest(folder) for folder in (latents, second)]
        assert manifest.count == sum(part.count for part in parts) == 4 * 13
        assert (manifest.pictures, manifest.skipped) == (13, 2)
        assert manifest.statistics == summary([s.moments for p in parts for s in p.shards])
        assert (manifest.data.source, manifest.data.rows) == ("merged", 15)

    def test_each_picture_is_one(self, latents, second, tmp_path):
        merge([latents, second], tmp_path / "out")
        drawn = LatentDataset(tmp_path / "out", variants="draw", columns=("key", "position"))
        keys = [item["key"] for item in drawn]
        assert len(keys) == len(set(keys)) == 13
        positions = [item["position"] for item in drawn]
        assert positions == sorted(set(positions))

    def test_shards_are_links_and_the_sources_stay(self, latents, second, tmp_path):
        before = {path: path.read_bytes() for path in (*latents.iterdir(), *second.iterdir())}
        manifest = merge([latents, second], tmp_path / "out")
        assert (tmp_path / "out" / FIRST).samefile(latents / FIRST)
        assert len({shard.file for shard in manifest.shards}) == 6
        assert {path: path.read_bytes() for path in before} == before

    def test_where_links_cannot_be(self, latents, second, tmp_path, monkeypatch):
        def no_link(*args, **options):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", no_link)
        merge([latents, second], tmp_path / "out")
        assert not (tmp_path / "out" / FIRST).samefile(latents / FIRST)
        assert verify(tmp_path / "out") == []

    def test_folders_of_one_name(self, latents, tmp_path):
        for place in ("a", "b"):
            shutil.copytree(latents, tmp_path / place / "latents")
        manifest = merge([tmp_path / "a/latents", tmp_path / "b/latents"], tmp_path / "out")
        assert verify(tmp_path / "out") == []
        assert manifest.renamed == 2 * 9
        keys = codes_of(tmp_path / "out")
        assert keys.keys() >= {"latents/even/00.png", "latents/even/00.png#9"}
        assert same(keys["latents/even/00.png"], keys["latents/even/00.png#9"])

    @pytest.mark.parametrize("which", ["buckets", "indices"])
    def test_other_kinds(self, which, request, tmp_path):
        folder = request.getfixturevalue(which)
        twin = shutil.copytree(folder, tmp_path / "twin")
        merge([folder, twin], tmp_path / "out")
        assert verify(tmp_path / "out") == []
        both = codes_of(tmp_path / "out")
        for key, codes in codes_of(folder).items():
            assert same(both[f"twin/{key}"], codes)

    def test_with_version_1(self, version_1, exported, data, tmp_path):
        assert verify(version_1) == []
        encode(exported, data, tmp_path / "new", resolution=32, **FAST)
        manifest = merge([version_1, tmp_path / "new"], tmp_path / "out")
        assert verify(tmp_path / "out") == []
        assert (manifest.version, manifest.autoencoder.downsampling) == (3, 2)
        assert manifest.statistics["codes"] == manifest.count == 13
        assert manifest.num_classes == 3
        both = codes_of(tmp_path / "out")
        for folder in (version_1, tmp_path / "new"):
            for key, codes in codes_of(folder).items():
                assert same(both[key], codes)

    @pytest.mark.parametrize(
        ("part", "name", "value"),
        [
            ("autoencoder", "weights_sha256", "0" * 64),
            ("autoencoder", "scaling_factor", 3.0),
            ("preprocessing", "resample", "bicubic"),
            ("preprocessing", "flip", False),
            ("storage", "precision", "bf16"),
            ("storage", "dtype", "bfloat16"),
            ("storage", "kind", "mode"),
        ],
    )
    def test_differences_are_refused_by_name(self, latents, second, tmp_path, part, name, value):
        other = shutil.copytree(second, tmp_path / "other")
        change_manifest(other, lambda content: content[part].update({name: value}))
        with pytest.raises(
            UserError, match=rf"other cannot be merged.*{part}\.{name} is {value!r}"
        ):
            merge([latents, other], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_other_labels_and_columns_are_refused(self, latents, second, tmp_path):
        other = shutil.copytree(second, tmp_path / "other")
        change_manifest(other, lambda content: content.update(label_names=["odd", "even"]))
        with pytest.raises(UserError, match="label_names is"):
            merge([latents, other], tmp_path / "out")
        other = shutil.copytree(second, tmp_path / "another")
        table = pq.read_table(other / INDEX)
        pq.write_table(table.append_column("score", pa.nulls(len(table), pa.int8())), other / INDEX)
        rehash(other)
        with pytest.raises(UserError, match=r"kept columns is \{'score': 'int8'\}, not \{\}"):
            merge([latents, other], tmp_path / "out")

    def test_seeds_may_differ(self, latents, second, tmp_path):
        other = shutil.copytree(second, tmp_path / "other")
        change_manifest(other, lambda content: content["preprocessing"].update(seed=7))
        merge([latents, other], tmp_path / "out")

    def test_places_that_are_taken(self, latents, second, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(UserError, match="not empty"):
            merge([latents, second], tmp_path)
        with pytest.raises(UserError, match="lies in"):
            merge([latents, second], latents / "out")
        with pytest.raises(UserError, match="two or more"):
            merge([latents], tmp_path / "out")
        with pytest.raises(UserError, match="each of them once"):
            merge([latents, second, latents], tmp_path / "out")

    def test_nothing_is_left_of_a_failure(self, latents, second, copy, tmp_path):
        (copy / "shard-000002.safetensors").unlink()
        with pytest.raises(UserError, match=r"shard-000002\.safetensors is missing"):
            merge([copy, second], tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["copy"]

    def test_a_changed_index_gets_no_new_hash(self, second, copy, tmp_path):
        table = pq.read_table(copy / INDEX)
        pq.write_table(table.set_column(2, "label", table["position"]), copy / INDEX)
        with pytest.raises(UserError, match=f"sha256 of {INDEX} is not the manifest's"):
            merge([copy, second], tmp_path / "out")


class TestSplit:
    @pytest.mark.parametrize("which", ["latents", "buckets", "indices", "version_1"])
    def test_every_picture_is_in_one_part(self, which, request, tmp_path):
        folder = request.getfixturevalue(which)
        shares = {str(tmp_path / "parts" / name): 0.5 for name in ("train", "val")}
        manifests = split(folder, shares, seed=1)
        whole, parts = codes_of(folder), [codes_of(out) for out in shares]
        assert not parts[0].keys() & parts[1].keys()
        for part, out in zip(parts, shares, strict=True):
            assert verify(out) == []
            for key, codes in part.items():
                assert same(whole.pop(key), codes)
            rows = read_manifest(folder).storage.shard_rows
            assert all(s.pictures + s.skipped <= rows for s in manifests[out].shards)
        assert not whole
        before = read_manifest(folder)
        for name in ("count", "pictures"):
            assert sum(getattr(m, name) for m in manifests.values()) == getattr(before, name)
        assert {m.num_classes for m in manifests.values()} == {before.num_classes}
        record = manifests[str(tmp_path / "parts/val")].data
        assert (record.source, record.split) == ("split", "val")

    def test_a_place_depends_on_seed_and_key_alone(self, latents, second, exported, data, tmp_path):
        """Found again in other shards, other order and other company."""
        encode(exported, data, tmp_path / "again", preprocessing=CUT, shard_bytes=1, **FAST)
        places = []
        for run, (folder, seed) in enumerate([(latents, 1), (tmp_path / "again", 1), (latents, 2)]):
            shares = {str(tmp_path / f"{run}" / name): 0.5 for name in ("train", "val")}
            split(folder, shares, seed=seed)
            places.append({key: out for out in shares for key in codes_of(out)})
        names = [{key: out[-3:] for key, out in found.items()} for found in places]
        assert names[0] == names[1]
        assert names[0] != names[2]

    def test_shares_are_kept(self):
        from latent_ae.latents.merge import _place

        places = np.array([_place(3, f"picture {n}") for n in range(4000)])
        assert (places < 0.95).mean() == pytest.approx(0.95, abs=0.015)
        assert places.min() >= 0
        assert places.max() < 1

    def test_what_was_split_can_be_joined(self, latents, tmp_path):
        shares = {str(tmp_path / name): share for name, share in (("a", 0.5), ("b", 0.5))}
        split(latents, shares, seed=1)
        manifest = merge(list(shares), tmp_path / "out")
        assert verify(tmp_path / "out") == []
        before, after = codes_of(latents), codes_of(tmp_path / "out")
        assert before.keys() == after.keys()
        assert all(same(before[key], after[key]) for key in before)
        assert manifest.renamed == 0
        assert manifest.statistics["std"] == pytest.approx(read_manifest(latents).statistics["std"])

    def test_kept_columns_come_along(self, exported, tmp_path):
        content = {"score": [float(n) for n in range(6)], "image": []}
        for name in (*NAMES, *NAMES[:2]):
            buffer = io.BytesIO()
            photograph(name, 40).save(buffer, "PNG")
            content["image"].append(buffer.getvalue())
        pq.write_table(pa.table(content), tmp_path / "data.parquet")
        source = EncodingSource(
            source="parquet",
            path=str(tmp_path / "data.parquet"),
            image_column="image",
            keep=("score",),
        )
        encode(exported, source, tmp_path / "all", resolution=32, **FAST)
        shares = {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5}
        split(tmp_path / "all", shares)
        found = {}
        for out in shares:
            for item in LatentDataset(out, columns=("key", "score")):
                found[int(item["key"])] = item["score"]
        assert found == {n: float(n) for n in range(6)}

    @pytest.mark.parametrize(
        ("shares", "message"),
        [
            ({"a": 0.5, "b": 0.4}, "add up to 0.9"),
            ({"a": 0.7, "b": 0.7}, "add up to 1.4"),
            ({"a": 1.0, "b": 0.0}, "a share above 0"),
            ({"a": 1.5, "b": -0.5}, "a share above 0"),
            ({"a": float("nan"), "b": 0.5}, "a share above 0"),
            ({}, "a share above 0"),
            ({"a": 0.5, "a/": 0.5}, "the same folder"),
            ({"a": 0.5, "a/b": 0.5}, "lies in"),
            ({"a": 1 - 1e-12, "b": 1e-12}, "b would get no latents"),
        ],
    )
    def test_wrong_shares(self, latents, tmp_path, shares, message):
        with pytest.raises(UserError, match=message):
            split(latents, {f"{tmp_path}/{name}": share for name, share in shares.items()})
        assert not list(tmp_path.iterdir())

    def test_places_that_are_taken(self, latents, tmp_path):
        (tmp_path / "b").mkdir()
        (tmp_path / "b/notes.txt").write_text("mine")
        with pytest.raises(UserError, match="not empty"):
            split(latents, {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5})
        with pytest.raises(UserError, match="lies in"):
            split(latents, {str(latents / "a"): 1.0})
        assert [path.name for path in tmp_path.iterdir()] == ["b"]

    def test_nothing_is_left_of_a_failure(self, copy, tmp_path):
        change_tensors(copy, lambda t: {"mean": t["mean"]})
        with pytest.raises(UserError, match="disagree about logvar"):
            split(copy, {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5})
        assert [path.name for path in tmp_path.iterdir()] == ["copy"]

    def test_a_changed_shard_gets_no_new_hash(self, copy, tmp_path):
        content = (copy / FIRST).read_bytes()
        (copy / FIRST).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=f"sha256 of {FIRST} is not the manifest's"):
            split(copy, {str(tmp_path / "a"): 1.0})


class TestDescribe:
    def test_what_is_said(self, latents):
        text = text_of(latents)
        manifest = read_manifest(latents)
        assert max(map(len, text.splitlines())) <= 100
        for words in (
            f"AutoencoderKL {manifest.autoencoder.weights_sha256[:12]}",
            "f2 with 4 channels",
            "shorter side to 40 (Lanczos), 2 random crops (seed 0), 32 × 32 pixels, each mirrored",
            "mean and log-variance (moments) as float16",
            "4 × 16 × 16",
            "32 of 8 pictures; 1 skipped",
            "even/broken.png",
            f"{manifest.statistics['channel_mean'][3]:.4f}",
            f"latent_ae {manifest.versions['latent_ae']}",
        ):
            assert words in text, words
        rows = [line.split() for line in text.splitlines()]
        assert ["0", "even", "16", "50.0%"] in rows

    @pytest.mark.parametrize("which", ["buckets", "indices", "version_1"])
    def test_other_kinds(self, which, request):
        text = text_of(request.getfixturevalue(which))
        assert max(map(len, text.splitlines())) <= 100
        wanted = {"buckets": "16 × 16", "indices": "codebook", "version_1": "float16"}[which]
        assert wanted in text

    def test_buckets_are_counted(self, buckets):
        counts = [
            int(line.split()[6])
            for line in text_of(buckets).splitlines()
            if line.rstrip().endswith("%") and line.count("×") == 2
        ]
        assert sum(counts) == read_manifest(buckets).count

    def test_names_are_no_markup(self, copy):
        def change(content):
            content["label_names"] = ["[red]x[/]", "[/b]"]
            content["data"]["filter"] = "[i]y > 1"

        change_manifest(copy, change)
        assert "[red]x[/]" in text_of(copy)
        assert "where [i]y > 1" in text_of(copy)

    def test_a_missing_file(self, copy):
        (copy / FIRST).unlink()
        with pytest.raises(UserError, match=f"{FIRST} is missing"):
            describe(copy)
