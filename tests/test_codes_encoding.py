"""Quantised latents in a latents folder: numbers of codes, what they stand for, whose they are."""

import io
import json
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, VQModel
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from torchvision.transforms.functional import center_crop, pil_to_tensor

from latent_ae.config import Preprocessing
from latent_ae.errors import UserError
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.latents import LatentDataset, LatentStream, decode, encode, read_manifest
from latent_ae.latents.describe import describe
from latent_ae.latents.encoder import BatchEncoder
from latent_ae.latents.format import AutoencoderRecord
from latent_ae.latents.merge import merge, split
from latent_ae.latents.verify import verify
from latent_ae.network_folders import weights_sha256
from latent_ae.quantized import QuantizedAutoencoder
from train_denoiser import DenoiserConfig, train

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"workers": 0, "precision": "fp32", "batch_size": 2}
SIDE = 32
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "scaling_factor": 0.5,
}
# Class and keys; then the type its numbers are stored in, and how many codes a position has.
KINDS = {
    "vq": (VQModel, {"latent_channels": 4, "num_vq_embeddings": 40}, "uint8", 1),
    "vq300": (VQModel, {"latent_channels": 4, "num_vq_embeddings": 300}, "uint16", 1),
    "residual": (
        QuantizedAutoencoder,
        {"latent_channels": 4, "num_vq_embeddings": 256, "heads": 2, "depth": 2},
        "uint8",
        4,
    ),
    "fsq": (
        QuantizedAutoencoder,
        {"latent_channels": 3, "quantizer": "fsq", "levels": (8, 7, 5)},
        "uint16",
        1,
    ),
    "lfq": (QuantizedAutoencoder, {"latent_channels": 17, "quantizer": "lfq"}, "int32", 1),
}


def build(kind, seed=0):
    """An untrained network whose entries lie where the latents of photographs do."""
    network_class, keys, *_ = KINDS[kind]
    torch.manual_seed(seed)
    network = network_class(**BLOCKS, **keys).eval()
    books = getattr(network.quantize, "embedding", None)
    books = getattr(network.quantize, "codebooks", None) if books is None else books.weight
    if books is not None:
        torch.nn.init.normal_(books, std=0.3)
    return network


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        build(kind).save_pretrained(root / kind)
    return root


@pytest.fixture(scope="module")
def folders(models, photos, tmp_path_factory):
    root = tmp_path_factory.mktemp("indices")
    for kind in KINDS:
        encode(models / kind, photos, root / kind, resolution=SIDE, **FAST)
    return root


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def image_of(photos, key):
    picture = Image.open(photos / key).convert("RGB")
    picture.thumbnail((10**6, 10**6))
    scale = SIDE / min(picture.size)
    size = tuple(round(side * scale) for side in picture.size)
    picture = center_crop(picture.resize(size, Image.Resampling.LANCZOS), [SIDE, SIDE])
    return pil_to_tensor(picture)[None].float() / 127.5 - 1


def received(network, latents):
    """What the decoder gets when `decode` is given latents: caught on its way, not computed."""
    caught = []
    hook = network.post_quant_conv.register_forward_pre_hook(lambda _, given: caught.append(*given))
    with torch.no_grad():
        pictures = network.decode(latents).sample
    hook.remove()
    return caught[0], pictures


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def rewrite(folder, content):
    (folder / "manifest.json").write_text(json.dumps(content))


class TestEncoding:
    def test_type_and_shape(self, kind, models, folders):
        *_, dtype, codes = KINDS[kind]
        manifest = read_manifest(folders / kind)
        assert (manifest.storage.kind, manifest.storage.dtype) == ("indices", dtype)
        shape = (16, 16) if codes == 1 else (codes, 16, 16)
        assert manifest.latent_shape == shape
        stored = load_file(folders / kind / manifest.shards[0].file)["indices"]
        assert (stored.dtype, stored.shape) == (getattr(torch, dtype), (4, *shape))
        item = LatentDataset(folders / kind)[0]
        assert (item["indices"].dtype, item["indices"].shape) == (torch.int64, shape)
        assert verify(folders / kind) == []

    def test_the_numbers_are_the_networks(self, kind, models, folders, photos):
        network = build(kind)
        for item in LatentDataset(folders / kind):
            with torch.no_grad():
                latents = network.encode(image_of(photos, item["key"])).latents
                wanted = network.quantize(latents)[2][2]
            assert torch.equal(item["indices"].flatten(), wanted.flatten())
        assert len(item["indices"].unique()) > 3

    def test_the_record_tells_whose_numbers_they_are(self, kind, models, folders):
        record = read_manifest(folders / kind).autoencoder
        frozen = FrozenAutoencoder(models / kind)
        sizes = {"vq": 40, "vq300": 300, "residual": 256, "fsq": 280, "lfq": 2**17}
        assert (record.codebook_size, record.codes) == (sizes[kind], KINDS[kind][3])
        assert record.codebook_sha256 == frozen.codebook_sha256
        assert len(record.codebook_sha256) == 64

    def test_the_codebook_is_the_same_in_16_bits(self, models, photos, tmp_path):
        frozen = FrozenAutoencoder(models / "residual", precision="bf16")
        assert frozen.network.encoder.conv_in.weight.dtype == torch.bfloat16
        assert frozen.codebook_sha256 == FrozenAutoencoder(models / "residual").codebook_sha256
        latents = torch.randn(2, 4, 8, 8)
        assert torch.equal(frozen.indices(latents), build("residual").indices(latents))
        options = FAST | {"precision": "bf16"}
        encode(models / "residual", photos, tmp_path / "out", resolution=SIDE, **options)
        item = LatentDataset(tmp_path / "out", entries_of=models / "residual")[0]
        assert item["latents"].shape == (4, 16, 16)

    def test_a_larger_type_may_be_chosen_but_no_smaller(self, models, photos, tmp_path):
        options = {"resolution": SIDE, **FAST}
        manifest = encode(models / "vq", photos, tmp_path / "a", dtype="int32", **options)
        assert manifest.storage.dtype == "int32"
        wanted = "indices cannot be stored as uint8; choose uint16 or int32"
        with pytest.raises(UserError, match=wanted):
            encode(models / "vq300", photos, tmp_path / "b", dtype="uint8", **options)
        with pytest.raises(UserError, match="indices cannot be stored as float16"):
            encode(models / "vq300", photos, tmp_path / "b", dtype="float16", **options)

    @pytest.mark.parametrize("kind", ["vq300", "residual"])
    def test_stopped_it_ends_in_the_same_bytes(self, kind, models, photos, tmp_path, monkeypatch):
        options = {"resolution": SIDE, **FAST, "batch_size": 1}
        encode(models / kind, photos, tmp_path / "whole", **options)
        encoder, calls = BatchEncoder.__call__, []

        def stopping(self, images, checks):
            calls.append(checks)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return encoder(self, images, checks)

        monkeypatch.setattr(BatchEncoder, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            encode(models / kind, photos, tmp_path / "out", **options)
        encode(models / kind, photos, tmp_path / "out", **options)
        assert len(calls) == 5  # two of four were there
        for file in (tmp_path / "whole").iterdir():
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()

    @pytest.mark.parametrize("kind", ["vq300", "residual", "lfq"])
    def test_a_picture_without_a_finite_code_is_left_out(
        self, kind, models, photos, tmp_path, monkeypatch
    ):
        whole = FrozenAutoencoder.encode

        def broken(self, images):
            mean, logvar = whole(self, images)
            if len(mean) == 4:  # no probe
                mean[2, 0, 3, 3] = torch.nan
            return mean, logvar

        monkeypatch.setattr(FrozenAutoencoder, "encode", broken)
        options = {"resolution": SIDE, **FAST, "batch_size": 4}
        manifest = encode(models / kind, photos, tmp_path / "out", **options)
        assert (manifest.count, manifest.skipped) == (3, 1)
        assert verify(tmp_path / "out") == []

    def test_latents_before_the_quantizer(self, kind, models, photos, tmp_path):
        out = tmp_path / "out"
        encode(models / kind, photos, out, resolution=SIDE, store="mode", **FAST, dtype="float32")
        manifest, network = read_manifest(out), build(kind)
        assert manifest.latent_shape == (KINDS[kind][1]["latent_channels"], 16, 16)
        assert len(manifest.statistics["channel_mean"]) == manifest.latent_shape[0]
        item = LatentDataset(out)[1]
        with torch.no_grad():
            latents = network.encode(image_of(photos, item["key"])).latents[0]
        torch.testing.assert_close(item["latents"], 0.5 * latents, atol=1e-5, rtol=1e-5)
        with pytest.raises(UserError, match="holds mode: there are no entries to look up"):
            LatentDataset(out, entries_of=models / kind)


class TestReading:
    def test_entries_are_what_the_decoder_receives(self, kind, models, folders, photos):
        network = build(kind)
        raw = LatentDataset(folders / kind, scale=False, entries_of=models / kind)
        final = LatentDataset(folders / kind, entries_of=models / kind)
        for position, item in enumerate(raw):
            with torch.no_grad():
                latents = network.encode(image_of(photos, item["key"])).latents
            wanted, _ = received(network, latents)
            assert "indices" not in item
            assert item["latents"].dtype == torch.float32
            torch.testing.assert_close(item["latents"], wanted[0], atol=1e-6, rtol=1e-6)
            assert torch.equal(final[position]["latents"], item["latents"] * 0.5)
        assert len(raw) == 4

    @pytest.mark.parametrize("kind", ["vq300", "residual"])
    def test_every_way_to_read(self, kind, models, folders):
        plain, data = (
            LatentDataset(folders / kind, entries_of=where) for where in (None, models / kind)
        )
        stream = LatentStream(folders / kind, entries_of=models / kind)
        by_key = {item["key"]: item["latents"] for item in stream}
        assert len(by_key) == 4
        for item in data:
            assert torch.equal(by_key[item["key"]], item["latents"])
        batch = next(iter(DataLoader(plain, 4)))
        assert batch["indices"].shape == (4, *plain.manifest.latent_shape)
        embedded = torch.nn.Embedding(300, 2)(batch["indices"])
        assert embedded.shape == (*batch["indices"].shape, 2)
        again = pickle.loads(pickle.dumps(data))  # as a worker gets it
        assert torch.equal(again[2]["latents"], data[2]["latents"])
        table = plain.to_datasets()
        assert torch.equal(table[3]["indices"], plain[3]["indices"])
        assert data.to_datasets()[3]["latents"].shape == (4, 16, 16)

    def test_pictures_from_indices(self, kind, models, folders, photos, tmp_path):
        network = build(kind)
        assert decode(folders / kind, tmp_path / "out", batch_size=3) == 4
        for item in LatentDataset(folders / kind):
            with torch.no_grad():
                latents = network.encode(image_of(photos, item["key"])).latents
            _, wanted = received(network, latents)
            wanted = ((wanted[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
            found = np.array(Image.open(tmp_path / f"out/{item['key']}.png"), np.int16)
            assert np.abs(found - wanted).max() <= 1

    @pytest.mark.parametrize("kind", ["vq300", "residual"])
    def test_described(self, kind, folders):
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(describe(folders / kind))
        text = "\n".join(line.rstrip() for line in console.export_text().splitlines())
        manifest = read_manifest(folders / kind)
        told = {"vq300": "a code of 300 values", "residual": "4 codes of 256 values"}
        assert f"{manifest.autoencoder.codebook_sha256[:12]}, {told[kind]}" in text
        shape = re.search(r"^shape +(.*)$", text, re.MULTILINE)
        assert shape is not None
        assert shape[1] == {"vq300": "16 × 16", "residual": "4 × 16 × 16"}[kind]

    @pytest.mark.parametrize("kind", ["vq300", "residual"])
    def test_several_sizes_divided_and_joined(self, kind, models, photos, tmp_path):
        cut = Preprocessing(resolution=SIDE, buckets=True, bucket_step=8, crops=2)
        encode(models / kind, photos, tmp_path / "all", preprocessing=cut, **FAST)
        assert verify(tmp_path / "all") == []
        shapes = read_manifest(tmp_path / "all").latent_shapes
        assert len(shapes) > 2
        assert {len(shape) for shape in shapes} == {2 if kind == "vq300" else 3}
        shares = {str(tmp_path / name): 0.5 for name in ("a", "b")}
        split(tmp_path / "all", shares, seed=1)
        merge([*shares], tmp_path / "again")
        assert verify(tmp_path / "again") == []

        def codes(name):
            data = LatentDataset(tmp_path / name)
            return sorted((item["key"], item["indices"].tolist()) for item in data)

        assert codes("again") == codes("all")
        first, last = (read_manifest(tmp_path / name).autoencoder for name in ("all", "again"))
        assert first == last


class TestWhoseNumbers:
    def test_of_other_levels_but_the_same_weights(self, models, photos, folders, tmp_path):
        """Nothing but the codebook's hash tells them apart."""
        shutil.copytree(models / "fsq", tmp_path / "other")
        config = json.loads((tmp_path / "other/config.json").read_text())
        config["levels"] = [5, 7, 8]
        (tmp_path / "other/config.json").write_text(json.dumps(config))
        assert weights_sha256(tmp_path / "other") == weights_sha256(models / "fsq")
        out = shutil.copytree(folders / "fsq", tmp_path / "out")
        with pytest.raises(UserError, match=r"codebook_sha256 '\w+', not '\w+'"):
            encode(tmp_path / "other", photos, out, resolution=SIDE, **FAST)
        wanted = "holds the numbers of another codebook's entries than that of"
        with pytest.raises(UserError, match=wanted):
            LatentDataset(out, entries_of=tmp_path / "other")
        with pytest.raises(UserError, match=wanted):
            decode(out, tmp_path / "pictures", model=tmp_path / "other")
        encode(tmp_path / "other", photos, tmp_path / "new", resolution=SIDE, **FAST)
        with pytest.raises(
            UserError, match=r"cannot be merged .*: autoencoder\.codebook_sha256 is"
        ):
            merge([out, tmp_path / "new"], tmp_path / "both")
        assert not (tmp_path / "pictures").exists()

    def test_of_another_codebook(self, models, photos, folders, tmp_path):
        build("vq", seed=1).save_pretrained(tmp_path / "other")
        out = shutil.copytree(folders / "vq", tmp_path / "out")
        with pytest.raises(UserError, match="another codebook"):
            LatentDataset(out, entries_of=tmp_path / "other")
        with pytest.raises(UserError, match="was encoded by another autoencoder"):
            decode(out, tmp_path / "pictures", model=tmp_path / "other")
        with pytest.raises(UserError, match="holds finished latents of another kind"):
            encode(tmp_path / "other", photos, out, resolution=SIDE, **FAST)
        encode(tmp_path / "other", photos, tmp_path / "new", resolution=SIDE, **FAST)
        with pytest.raises(UserError, match="cannot be merged"):
            merge([out, tmp_path / "new"], tmp_path / "both")

    def test_of_an_autoencoder_without_one(self, exported, folders):
        with pytest.raises(UserError, match="holds a AutoencoderKL, which has no codebook"):
            LatentDataset(folders / "vq", entries_of=exported)

    def test_a_decoder_trained_alone_reads_them(self, models, folders, tmp_path):
        tuned = build("vq")
        torch.nn.init.constant_(tuned.decoder.conv_out.bias, 0.25)
        record = {"latents_of": [weights_sha256(models / "vq")]}
        tuned.save_pretrained(tmp_path / "tuned")
        (tmp_path / "tuned/latent_ae.json").write_text(json.dumps(record))
        decode(folders / "vq", tmp_path / "before")
        decode(folders / "vq", tmp_path / "after", model=tmp_path / "tuned")
        name = "coffee.png.png"
        before, after = (np.array(Image.open(tmp_path / n / name)) for n in ("before", "after"))
        assert (after.astype(int) - before).mean() > 10
        item, again = (
            LatentDataset(folders / "vq", entries_of=m)[0]["latents"]
            for m in (models / "vq", tmp_path / "tuned")
        )
        assert torch.equal(item, again)
        torch.nn.init.normal_(tuned.quantize.embedding.weight)  # and the codebook did move
        tuned.save_pretrained(tmp_path / "tuned")
        with pytest.raises(UserError, match="another codebook's entries"):
            decode(folders / "vq", tmp_path / "never", model=tmp_path / "tuned")

    def test_a_number_that_no_entry_has(self, folders, tmp_path):
        folder = shutil.copytree(folders / "vq", tmp_path / "out")
        tensors = load_file(folder / "shard-000000.safetensors")
        tensors["indices"][1, 2, 3] = 40
        save_file(tensors, folder / "shard-000000.safetensors")
        key = LatentDataset(folders / "vq")[1]["key"]
        assert any(f"{key!r} has values above 39" in fault for fault in verify(folder))


class TestVersion2:
    """As it was written before codebooks were noted: shapes of latents, one code a position."""

    @pytest.fixture
    def old(self, folders, tmp_path):
        folder = shutil.copytree(folders / "vq", tmp_path / "old")
        content = manifest_of(folder) | {"version": 2, "latent_shapes": [[4, 16, 16]]}
        for name in ("codebook_size", "codes", "codebook_sha256"):
            del content["autoencoder"][name]
        rewrite(folder, content)
        return folder

    def test_is_read(self, old, models, folders, tmp_path):
        assert verify(old) == []
        data, now = LatentDataset(old), LatentDataset(folders / "vq")
        assert data.manifest.latent_shape == (16, 16)
        assert torch.equal(data[2]["indices"], now[2]["indices"])
        entries = LatentDataset(old, entries_of=models / "vq")[2]["latents"]
        assert entries.shape == (4, 16, 16)
        assert decode(old, tmp_path / "pictures") == 4

    def test_is_that_of_its_weights_alone(self, old, tmp_path):
        build("vq", seed=1).save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match="another codebook"):
            LatentDataset(old, entries_of=tmp_path / "other")

    def test_is_the_finished_work_of_the_same_command(self, old, models, photos):
        assert encode(models / "vq", photos, old, resolution=SIDE, **FAST).version == 2

    @pytest.mark.parametrize("order", [1, -1])
    def test_is_merged_with_version_3(self, old, folders, tmp_path, order):
        both = [old, folders / "vq"][::order]
        manifest = merge(both, tmp_path / "both")
        assert verify(tmp_path / "both") == []
        record = AutoencoderRecord.of(FrozenAutoencoder(read_manifest(old).autoencoder.path))
        assert (manifest.version, manifest.autoencoder) == (3, record)


STRANGER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("latent_ae", "latent_diffusion", "quantized"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import numpy as np, torch
from diffusers import DiffusionPipeline

source, again, output = sys.argv[1:]
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
pipe.save_pretrained(again)
pictures = []
for folder in (source, again):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    noise = torch.Generator().manual_seed(0)
    pictures.append(pipe(num_inference_steps=2, output_type="np", generator=noise).images)
np.save(output, np.stack(pictures))
"""


class TestDenoiser:
    """Of the latents before the quantizer, as Rombach et al. 2022 train theirs on VQ-f4."""

    @pytest.fixture(params=["vq", "residual", "fsq"])
    def trained(self, request, models, photos, tmp_path):
        kind = request.param
        encode(models / kind, photos, tmp_path / "mode", resolution=SIDE, store="mode", **FAST)
        options = {"channels": (8, 16), "layers": 1, "attention": 1, "batch_size": 2}
        config = DenoiserConfig(**options, steps=2, log_every=1, sample_every=0)
        train(tmp_path / "mode", tmp_path / "pipe", config, console=Console(quiet=True))
        return kind, tmp_path / "pipe"

    def test_a_pipeline_that_quantises_its_samples(self, trained, models, tmp_path, monkeypatch):
        kind, folder = trained
        cache = str(tmp_path / "modules")
        monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)
        monkeypatch.setattr(sys, "path", [*sys.path])
        index = json.loads((folder / "model_index.json").read_text())
        own = KINDS[kind][0] is QuantizedAutoencoder
        home = ["quantized", "QuantizedAutoencoder"] if own else ["diffusers", "VQModel"]
        assert index["vae"] == home
        assert (folder / "vae/quantized.py").is_file() == own
        assert weights_sha256(folder / "vae") == weights_sha256(models / kind)
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "height": SIDE, "width": SIDE}
        final, found = (
            pipe(generator=torch.Generator().manual_seed(0), output_type=how, **options).images
            for how in ("latent", "pt")
        )
        network = build(kind)
        entries, wanted = received(network, final / 0.5)
        assert not torch.allclose(entries, final / 0.5, atol=0.01)
        torch.testing.assert_close(found, (wanted / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)

    @pytest.mark.slow
    @pytest.mark.parametrize("trained", ["residual"], indirect=True)
    def test_stock_diffusers_alone_loads_and_saves_it_again(self, trained, tmp_path):
        _, folder = trained
        (tmp_path / "stranger.py").write_text(STRANGER)
        environment = {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
        arguments = [folder, tmp_path / "again", tmp_path / "out.npy"]
        command = [sys.executable, "-I", tmp_path / "stranger.py", *arguments]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        first, second = np.load(tmp_path / "out.npy")
        assert first.shape[-1] == 3
        assert np.array_equal(first, second)

    def test_indices_are_refused(self, folders, tmp_path):
        with pytest.raises(UserError, match="encode again with --store mode"):
            train(folders / "vq", tmp_path / "pipe", console=Console(quiet=True))
