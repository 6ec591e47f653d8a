"""Pictures of 1, 2, 4 and 6 channels: from files and arrays to exported folders and back."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import photograph, tiny_content
from datasets import Array2D, Array3D, Dataset, Features, Value, load_dataset
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from PIL import Image
from skimage import data as photographs
from skimage.metrics import structural_similarity

from latent_ae import Config, LatentDataset, cli, encode, evaluate, export_run, train
from latent_ae.adversary import Adversary
from latent_ae.autoencoder import build_network, load_network, reconstruct
from latent_ae.channels import as_rgb, shown
from latent_ae.config import (
    AdversaryConfig,
    DataConfig,
    DiscriminatorConfig,
    NetworkConfig,
    SourceConfig,
)
from latent_ae.config_file import dump_yaml, parse_config
from latent_ae.conversion import convert
from latent_ae.data import (
    Bands,
    CenterCrop,
    TrainingStream,
    UnreadableImage,
    decode_image,
    evaluation_batches,
    normalize,
    open_source,
    to_tensor,
    to_uint8,
)
from latent_ae.describe import describe
from latent_ae.errors import UserError
from latent_ae.evaluation.report import write_report
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.initialization import linear_code_
from latent_ae.latents.decode import decode
from latent_ae.losses import NLayerDiscriminator, load_discriminator, save_discriminator
from latent_ae.losses.perceptual import PerceptualLoss
from latent_ae.memory import training_memory
from latent_ae.metrics import ReconstructionMetrics
from latent_ae.pictures import error_map, save_sheet
from latent_ae.run_folder import RunFolder
from latent_diffusion import LatentDiffusionPipeline

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = (("astronaut", "chelsea"), ("coffee", "rocket"), ("chelsea", "coffee"))
WIDE = (48, 40)  # of the pictures, in pixels


def bands_array(place, count):
    """Two real photographs on each other: uint8 of shape (40, 48, count)."""
    parts = [np.asarray(photograph(name).resize(WIDE)) for name in PAIRS[place]]
    return np.concatenate(parts, axis=-1)[..., :count]


def cut_out(name="astronaut", size=WIDE):
    """A photograph with a real grey picture as its alpha."""
    picture = photograph(name).resize(size, Image.Resampling.LANCZOS)
    picture.putalpha(Image.fromarray(photographs.camera()).resize(size))
    return picture


def parquet_of(arrays, path, shape=None, dtype="uint8"):
    features = Features(
        {"bands": Array3D(shape or arrays[0].shape, dtype), "label": Value("int64")}
    )
    rows = {"bands": list(arrays), "label": list(range(len(arrays)))}
    Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


def write_pictures(folder, channels):
    """Three real pictures of so many channels; returns their source."""
    folder.mkdir()
    if channels == 1:
        for name in ("camera", "coins", "moon"):
            Image.fromarray(getattr(photographs, name)()).resize(WIDE).save(folder / f"{name}.png")
    elif channels == 4:
        for name in ("astronaut", "coffee", "rocket"):
            cut_out(name).save(folder / f"{name}.png")
    elif channels == 2:
        for place in range(3):
            Bands.of(bands_array(place, 2)).save(folder / f"{place}.tiff")
    else:
        arrays = [bands_array(place, channels) for place in range(3)]
        parquet_of(arrays, folder / "a.parquet")
        return "parquet"
    return "imagefolder"


def tiny_of(folder, channels, output, source):
    content = tiny_content(folder, output)
    content["network"]["in_channels"] = channels
    for section in ("data", "validation"):
        content[section]["source"] = source
    if channels not in (1, 3, 4):
        del content["losses"]
    content["training"] |= {"steps": 2, "checkpoint_every": 2, "validate_every": 2}
    content["adversary"] = {"layers": 1, "channels": 8, "start": 1, "warmup_steps": 1}
    return content


class TestDecoding:
    def test_grey_is_luminance(self):
        cat = photograph("chelsea")
        read = decode_image(cat, 1)
        assert read.mode == "L"
        assert np.array_equal(read, cat.convert("L"))
        grey = Image.fromarray(photographs.camera())
        assert np.array_equal(decode_image(grey, 1), grey)

    def test_deep_grey_keeps_its_high_bits(self):
        camera = photographs.camera()
        deep = Image.fromarray(camera.astype(np.uint16) * 257)
        assert np.array_equal(decode_image(deep, 1), camera)

    def test_alpha_is_kept_straight(self):
        clear = cut_out()
        assert np.array_equal(decode_image(clear, 4), clear)
        opaque = np.asarray(decode_image(photograph("chelsea"), 4))
        assert (opaque[..., 3] == 255).all()
        assert np.array_equal(opaque[..., :3], photograph("chelsea"))
        keyed = Image.new("RGB", (4, 4), "red")
        keyed.info["transparency"] = (255, 0, 0)
        assert (np.asarray(decode_image(keyed, 4))[..., 3] == 0).all()

    @pytest.mark.parametrize("count", [2, 4, 6])
    def test_pages_of_a_tiff_are_bands(self, count, tmp_path):
        Bands.of(bands_array(0, count)).save(tmp_path / "a.tiff")
        read = decode_image(str(tmp_path / "a.tiff"), count)
        assert np.array_equal(np.asarray(read), bands_array(0, count))

    def test_16_bit_pages_are_scaled(self, tmp_path):
        pages = [Image.fromarray(band.astype(np.uint16) * 257) for band in bands_array(0, 2).T]
        pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
        read = np.asarray(decode_image(str(tmp_path / "a.tiff"), 2))
        assert np.array_equal(read, bands_array(0, 2).transpose(1, 0, 2))

    def test_what_has_other_bands_says_so(self, tmp_path):
        with pytest.raises(UnreadableImage, match="mode RGB where 6 bands are wanted: only a TIFF"):
            decode_image(photograph("chelsea"), 6)
        Bands.of(bands_array(0, 3)).save(tmp_path / "a.tiff")
        with pytest.raises(UnreadableImage, match="TIFF of 3 pages where 6 bands are wanted"):
            decode_image(str(tmp_path / "a.tiff"), 6)
        cat = photograph("chelsea")
        cat.save(tmp_path / "b.tiff", save_all=True, append_images=[cat])
        with pytest.raises(UnreadableImage, match="page 1 is of mode RGB, not one grey band"):
            decode_image(str(tmp_path / "b.tiff"), 2)
        grey = cat.convert("L")
        grey.save(tmp_path / "c.tiff", save_all=True, append_images=[grey.resize(WIDE)])
        with pytest.raises(UnreadableImage, match="differ in size"):
            decode_image(str(tmp_path / "c.tiff"), 2)


class TestBands:
    def test_each_band_is_cut_as_pillow_cuts_it(self):
        """Three bands give what an RGB picture gives, so the crops hold for any number."""
        cat = photograph("chelsea")
        bands = Bands.of(np.asarray(cat))
        assert bands.size == cat.size
        assert torch.equal(CenterCrop(64)(bands), CenterCrop(64)(cat))
        assert torch.equal(CenterCrop(64, "adm")(bands), CenterCrop(64, "adm")(cat))
        flip = Image.Transpose.FLIP_LEFT_RIGHT
        assert torch.equal(to_tensor(bands.transpose(flip)), to_tensor(cat.transpose(flip)))
        box = {"size": (40, 30), "resample": Image.Resampling.LANCZOS, "box": (3, 4, 90, 80)}
        assert torch.equal(to_tensor(bands.resize(**box)), to_tensor(cat.resize(**box)))


class TestSources:
    @pytest.mark.parametrize(
        "streaming", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "streaming"]
    )
    def test_arrays_of_every_source_are_found_and_equal(self, streaming, tmp_path):
        arrays = [bands_array(place, 6) for place in range(3)]
        file = parquet_of(arrays, tmp_path / "a.parquet")
        load_dataset("parquet", split="train", data_files=str(file)).save_to_disk(tmp_path / "kept")
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for place, array in enumerate(arrays):
                content = io.BytesIO()
                np.save(content, array)
                for name, part in ((f"{place}.npy", content.getvalue()), (f"{place}.cls", b"7")):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(part)
                    tar.addfile(entry, io.BytesIO(part))
        paths = {"parquet": file, "saved": tmp_path / "kept", "webdataset": tmp_path / "a.tar"}
        for kind, path in paths.items():
            config = SourceConfig(source=kind, path=str(path), streaming=streaming)
            source = open_source(config, 6)
            for place, row in enumerate(source.rows):
                assert np.array_equal(np.asarray(source.picture(row)), arrays[place])
                assert source.label(row) == (7 if kind == "webdataset" else place)

    def test_uint16_is_scaled_and_one_band_may_have_no_axis(self, tmp_path):
        array = bands_array(0, 6)
        file = parquet_of([array.astype(np.uint16) * 257], tmp_path / "a.parquet", dtype="uint16")
        source = open_source(SourceConfig(source="parquet", path=str(file)), 6)
        assert np.array_equal(np.asarray(source.picture(source.rows[0])), array)
        features = Features({"image": Array2D((512, 512), "uint8")})
        flat = Dataset.from_dict({"image": [photographs.camera()]}, features=features)
        flat.to_parquet(str(tmp_path / "b.parquet"))
        source = open_source(SourceConfig(source="parquet", path=str(tmp_path / "b.parquet")), 1)
        assert np.array_equal(source.picture(source.rows[0]), photographs.camera())

    def test_rows_of_another_shape_are_skipped_by_name(self, tmp_path):
        arrays = [bands_array(0, 6), bands_array(1, 6).transpose(2, 0, 1)]
        rows = {"bands": [a.tolist() for a in arrays], "caption": ["right", "turned"]}
        features = Features({"bands": [[[Value("uint8")]]], "caption": Value("string")})
        Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
        config = SourceConfig(source="parquet", path=str(tmp_path / "a.parquet"))
        (batch,) = evaluation_batches(config, 32, channels=6)
        assert batch.images.shape == (1, 6, 32, 32)
        assert batch.samples[0].caption == "right"
        (skip,) = batch.skipped
        assert skip.key == "000000001"
        assert skip.reason == "an array of 6 × 40 × 48 where H × W × 6 is wanted"

    def test_what_cannot_be_read_is_refused_at_once(self, tmp_path):
        floats = [bands_array(0, 6).astype(np.float32) / 255]
        parquet_of(floats, tmp_path / "a.parquet", dtype="float32")
        config = SourceConfig(source="parquet", path=str(tmp_path / "a.parquet"))
        with pytest.raises(UserError, match="float32, which have no known white: scale them"):
            open_source(config, 6)
        parquet_of([bands_array(0, 6)], tmp_path / "b.parquet")
        config = SourceConfig(source="parquet", path=str(tmp_path / "b.parquet"))
        with pytest.raises(UserError, match="arrays of 40 × 48 × 6; wanted is H × W × 4 of uint8"):
            open_source(config, 4)

    def test_pictures_are_preferred_where_they_can_be(self, photos, tmp_path):
        content = {"bytes": (photos / "coffee.png").read_bytes(), "path": None}
        rows = Dataset.from_dict({"bands": [bands_array(0, 6).tolist()], "photo": [content]})
        rows = rows.cast_column("bands", Array3D((40, 48, 6), "uint8"))
        from datasets import Image as ImageFeature

        rows.cast_column("photo", ImageFeature()).to_parquet(str(tmp_path / "a.parquet"))
        config = SourceConfig(source="parquet", path=str(tmp_path / "a.parquet"))
        assert open_source(config).image_column == "photo"
        assert open_source(config, 6).image_column == "bands"

    def test_the_stream_resumes(self, tmp_path):
        file = parquet_of([bands_array(place, 6) for place in range(3)], tmp_path / "a.parquet")
        config = DataConfig(
            source="parquet", path=str(file), resolution=32, batch_size=2, workers=0
        )
        whole = TrainingStream(config, channels=6)
        seen = [next(whole).images for _ in range(3)]
        assert seen[0].shape == (2, 6, 32, 32)
        assert torch.equal(next(TrainingStream(config, channels=6, start=4)).images, seen[2])


class TestPerception:
    def test_grey_is_exactly_grey_as_rgb(self):
        metric = PerceptualLoss("alex")
        a, b = (normalize(CenterCrop(64)(p)[None]) for p in (_camera(), _camera().rotate(3)))
        wanted = metric(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1))
        assert torch.equal(metric(a, b), wanted)
        assert wanted.item() > 0.01

    def test_rgba_is_seen_over_white(self):
        picture = cut_out()
        white = Image.new("RGBA", picture.size, "white")
        over = np.asarray(Image.alpha_composite(white, picture).convert("RGB"), dtype=float)
        pixels = to_tensor(picture)
        assert np.abs(shown(pixels).permute(1, 2, 0).numpy() - over).max() <= 1
        seen = (as_rgb(normalize(pixels[None])) + 1) * 127.5
        assert np.abs(seen[0].permute(1, 2, 0).numpy() - over).max() <= 1.01
        opaque = normalize(to_tensor(photograph("chelsea").convert("RGBA"))[None])
        assert torch.equal(as_rgb(opaque), opaque[:, :3])

    def test_every_channel_hears_it(self):
        metric = PerceptualLoss("alex")
        pixels = normalize(to_tensor(cut_out())[None])
        for target in (pixels, normalize(CenterCrop(64)(_camera())[None])):
            estimate = (0.9 * target).requires_grad_()
            (gradient,) = torch.autograd.grad(metric(target, estimate).sum(), estimate)
            assert (gradient.abs().amax((0, 2, 3)) > 0).all()

    @pytest.mark.parametrize("channels", [1, 2, 4, 6])
    def test_ssim_is_scikit_images(self, channels):
        array = bands_array(0, channels)
        other = np.clip(array.astype(float) * 0.8 + 20, 0, 255).astype(np.uint8)
        a, b = (torch.from_numpy(x.copy()).permute(2, 0, 1)[None] for x in (array, other))
        found = ReconstructionMetrics(lpips=()).measure(a, b)["ssim"].item()
        wanted = structural_similarity(
            array,
            other,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        assert found == pytest.approx(wanted, abs=1e-4)

    def test_sheets_show_what_the_eye_can_see(self, tmp_path):
        for channels in (1, 2, 4, 6):
            images = torch.from_numpy(bands_array(0, channels).copy()).permute(2, 0, 1)[None]
            columns = {"input": images, "error": error_map(images, 255 - images)}
            with Image.open(save_sheet(tmp_path / "a.png", columns)) as sheet:
                pixels = np.asarray(sheet)[-46:-6, 6:54]
            rgb = shown(images)[0].permute(1, 2, 0).numpy()
            assert np.array_equal(pixels, rgb)
        assert np.array_equal(shown(images[0])[2], images[0, 2])


class TestNetworks:
    @pytest.mark.parametrize("spectral_norm", [False, True])
    def test_a_discriminator_knows_its_channels(self, spectral_norm, tmp_path):
        config = DiscriminatorConfig(layers=1, channels=8, spectral_norm=spectral_norm)
        judge = NLayerDiscriminator(config, 6)
        save_discriminator(judge, tmp_path / "d.safetensors")
        read = load_discriminator(tmp_path / "d.safetensors")
        images = normalize(torch.from_numpy(bands_array(0, 6).copy()).permute(2, 0, 1)[None])
        assert read.in_channels == 6
        assert torch.equal(read.eval()(images), judge.eval()(images))
        options = {"layers": 1, "channels": 8, "spectral_norm": spectral_norm}
        config = AdversaryConfig(**options, path=str(tmp_path / "d.safetensors"))
        Adversary(config, 6)
        with pytest.raises(UserError, match="judges pictures of 6 channels, the network makes 1"):
            Adversary(config, 1)

    @pytest.mark.parametrize("channels", [1, 6])
    def test_the_linear_start_is_a_codec(self, channels):
        """Better than the principal components of 2 × 2 blocks, at as many values."""
        torch.manual_seed(0)
        config = NetworkConfig(
            in_channels=channels,
            block_out_channels=(16, 32),
            layers_per_block=1,
            latent_channels=channels,
            norm_num_groups=1,
            mid_block_add_attention=False,
        )
        network = build_network(config).eval()
        images = normalize(torch.stack([_rotated(channels, turn) for turn in range(0, 360, 90)]))
        linear_code_(network, images)
        with torch.no_grad():
            error = (reconstruct(network, images) - images).square().mean().item()
        blocks = torch.nn.functional.unfold(images, 2, stride=2).transpose(1, 2).flatten(0, 1)
        centred = blocks.double() - blocks.double().mean(0)
        energies = torch.linalg.svdvals(centred).square()
        assert error < energies[channels:].sum().item() / centred.numel()

    def test_the_linear_start_says_where_it_ends(self):
        narrow = {"layers_per_block": 1, "norm_num_groups": 1, "mid_block_add_attention": False}
        network = build_network(NetworkConfig(in_channels=6, block_out_channels=(4, 8), **narrow))
        with pytest.raises(UserError, match="must hold the 6 channels of a picture"):
            linear_code_(network, torch.zeros(1, 6, 32, 32))

    def test_facts_count_the_channels(self, tiny):
        config = tiny(network={"in_channels": 6}, losses=None)
        facts = describe(config)
        assert facts["images"] == "6 × 32 × 32 in [-1, 1]"
        assert facts["compression"] == "6 image values a latent value"
        network = build_network(config.network)
        assert network.config["in_channels"] == network.config["out_channels"] == 6
        grey = build_network(tiny(network={"in_channels": 1}, losses=None).network)
        assert training_memory(config, network).total > training_memory(config, grey).total

    def test_a_network_that_gives_other_channels_is_refused(self, tmp_path):
        AutoencoderKL(in_channels=6, out_channels=3, block_out_channels=(32,)).save_pretrained(
            tmp_path / "odd"
        )
        with pytest.raises(UserError, match="takes 6 channels and gives 3"):
            build_network(NetworkConfig(path=str(tmp_path / "odd")))


def _camera():
    return Image.fromarray(photographs.camera())


def _rotated(channels, angle):
    bands = Bands.of(bands_array(0, channels))
    turned = Bands([band.resize((96, 96)).rotate(angle) for band in bands.bands])
    return to_tensor(turned.crop((24, 24, 72, 72)))


def _whole_way(channels, tmp_path, quiet):
    """Trains, exports, evaluates, encodes and decodes; returns the exported folder's source."""
    source = write_pictures(tmp_path / "data", channels)
    content = tiny_of(tmp_path / "data", channels, tmp_path / "run", source)
    run = train(parse_config(content), quiet)
    validation = RunFolder(run).last_validation(2)
    assert validation is not None
    assert ("lpips" in validation) == (channels in (1, 4))
    assert RunFolder(run).best("lpips") is not None
    out = export_run(run, tmp_path / "ae", images=4)
    assert f"{channels} × H × W" in (out / "README.md").read_text()
    told = json.loads((out / "latent_ae.json").read_text())["metric_protocol"]
    assert ("LPIPS" in told) == (channels in (1, 4))
    return SourceConfig(source=source, path=str(tmp_path / "data"))


def _stock(folder, images):
    network = AutoencoderKL.from_pretrained(folder).eval()
    with torch.no_grad():
        return network.decode(network.encode(images).latent_dist.mode()).sample


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_the_whole_way(channels, tmp_path, quiet):
    config = _whole_way(channels, tmp_path, quiet)
    (batch,) = evaluation_batches(config, 64, channels=channels)
    images = normalize(batch.images)
    ours = FrozenAutoencoder(tmp_path / "ae", "cpu")
    assert ours.image_channels == channels
    wanted = _stock(tmp_path / "ae", images)
    assert torch.allclose(ours.decode(ours.encode(images)[0]), wanted, atol=1e-4)
    measured = evaluate(
        tmp_path / "ae",
        config,
        "photos256",
        out=tmp_path / "measured",
        quick=True,
        device="cpu",
    )
    assert ("lpips" in measured.metrics) == (channels in (1, 4))
    assert (measured.content["frechet"] is not None) == (channels in (1, 4))
    assert measured.reference("Lanczos")["psnr"] > measured.metrics["psnr"]
    assert measured.reference("JPEG") == {}
    note = measured.content["data"]["note"]
    assert note.startswith(f"pictures of {channels} channel")
    page = write_report([tmp_path / "measured"], tmp_path / "report.html").read_text()
    assert note in page

    options = {"device": "cpu", "workers": 0, "dtype": "float32", "precision": "fp32"}
    encode(tmp_path / "ae", config, tmp_path / "latents", resolution=64, **options)
    assert len(LatentDataset(tmp_path / "latents")) == 3
    decode(tmp_path / "latents", tmp_path / "decoded", device="cpu")
    files = sorted((tmp_path / "decoded").iterdir())
    modes = {1: "L", 4: "RGBA"}
    for file, expected in zip(files, to_uint8(wanted), strict=True):
        picture = decode_image(str(file), channels)
        if channels in modes:
            with Image.open(file) as stored:
                assert stored.mode == modes[channels]
        difference = to_tensor(picture).int() - expected.int()
        assert difference.abs().max() <= 1


def _run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["latent-ae", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, " ".join(capsys.readouterr().err.split())


class TestRefusals:
    """Each through the command line: exit code 2 and one sentence."""

    def train(self, capsys, monkeypatch, tmp_path, content, *changes):
        file = tmp_path / "run.yaml"
        file.write_text(dump_yaml(Config.model_validate(content)))
        code, told = _run(capsys, monkeypatch, "train", file, *changes)
        assert code == 2
        assert "Traceback" not in told
        return told

    def test_perception_of_six_bands(self, capsys, monkeypatch, tmp_path, photos):
        content = tiny_content(photos, tmp_path / "run")
        change = "network.in_channels=6"
        told = self.train(capsys, monkeypatch, tmp_path, content, change)
        assert "losses.perceptual looks at pictures of 1, 3 or 4 channels" in told
        assert "have 6; leave it out" in told

    def test_perception_of_a_folders_six_bands(self, capsys, monkeypatch, tmp_path, photos):
        shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, "in_channels": 6}
        build_network(NetworkConfig(**shape)).save_pretrained(tmp_path / "ae")
        content = tiny_content(photos, tmp_path / "run")
        content["network"] = {"path": str(tmp_path / "ae")}
        told = self.train(capsys, monkeypatch, tmp_path, content)
        assert "1, 3 or 4 channels and the network's have 6; leave it out" in told

    def test_photographs_as_six_bands(self, capsys, monkeypatch, tmp_path, photos):
        content = tiny_of(photos, 6, tmp_path / "run", "imagefolder")
        del content["validation"]
        told = self.train(capsys, monkeypatch, tmp_path, content)
        assert "none of the 4 pictures" in told
        assert "mode RGB where 6 bands are wanted: only a TIFF of 6 pages or an array" in told

    def test_floats(self, capsys, monkeypatch, tmp_path):
        floats = [bands_array(0, 6).astype(np.float32)]
        file = parquet_of(floats, tmp_path / "a.parquet", dtype="float32")
        content = tiny_of(file, 6, tmp_path / "run", "parquet")
        told = self.train(capsys, monkeypatch, tmp_path, content)
        assert "'bands' holds arrays of float32, which have no known white" in told

    def test_evaluation_on_other_channels(self, capsys, monkeypatch, tmp_path):
        shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, "in_channels": 4}
        build_network(NetworkConfig(**shape)).save_pretrained(tmp_path / "ae")
        file = parquet_of([bands_array(0, 6)], tmp_path / "a.parquet")
        code, told = _run(capsys, monkeypatch, "evaluate", tmp_path / "ae", file)
        assert code == 2
        assert "holds arrays of 40 × 48 × 6; wanted is H × W × 4 of uint8 or uint16" in told


def test_fine_tuning_takes_the_folders_channels(tmp_path, quiet):
    source = write_pictures(tmp_path / "data", 6)
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, "mid_block_add_attention": False}
    build_network(NetworkConfig(**shape, in_channels=6)).save_pretrained(tmp_path / "ae")
    content = tiny_of(tmp_path / "data", 6, tmp_path / "run", source)
    content["network"] = {"path": str(tmp_path / "ae")}
    run = RunFolder(train(parse_config(content), quiet))
    assert load_network(run.latest() / "network").config["in_channels"] == 6
    assert load_discriminator(run.latest() / "discriminator.safetensors").in_channels == 6
    validation = run.last_validation(2)
    assert validation is not None
    assert validation.keys() == {"step", "psnr", "ssim"}
    assert run.best("lpips") == run.latest()
    assert run.best_score("lpips") == validation["psnr"]


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_a_pipeline_gives_pictures_of_so_many_channels(channels):
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 8}
    vae = build_network(NetworkConfig(**shape, in_channels=channels, layers_per_block=1))
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        add_attention=False,
        **blocks,
    )
    pipe = LatentDiffusionPipeline(vae, unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    arrays = pipe(num_inference_steps=1, output_type="np").images
    assert arrays.shape == (1, 16, 16, channels)
    if channels > 4:
        with pytest.raises(ValueError, match="one of np, pt, latent"):
            pipe(num_inference_steps=1)
        return
    given = cut_out(size=(16, 16)) if channels == 4 else photograph("chelsea", 16).convert("L")
    options = {} if channels == 2 else {"image": given, "strength": 0.5}
    (picture,) = pipe(num_inference_steps=2, **options).images
    assert picture.mode == {1: "L", 2: "LA", 4: "RGBA"}[channels]


@pytest.mark.slow
def test_other_layouts_take_any_channels(tmp_path):
    shape = {"block_out_channels": (32, 64), "layers_per_block": 1, "in_channels": 4}
    network = build_network(NetworkConfig(**shape, mid_block_add_attention=False))
    network.save_pretrained(tmp_path / "ae")
    convert(tmp_path / "ae", tmp_path / "ldm.safetensors")
    convert(tmp_path / "ldm.safetensors", tmp_path / "back")
    back = load_network(tmp_path / "back")
    assert back.config["in_channels"] == back.config["out_channels"] == 4
    images = normalize(to_tensor(cut_out(size=(32, 32)))[None])
    with torch.no_grad():
        assert torch.equal(reconstruct(back, images), reconstruct(network, images))
