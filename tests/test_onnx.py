"""The ONNX files, run by onnxruntime on real photographs, against stock diffusers."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import diffusers
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import photograph, photograph_tensor
from diffusers import AutoencoderKL

from latent_ae import UserError, cli, export_onnx, onnx_check
from latent_ae.autoencoder import weights_sha256

LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "norm_num_groups": 4,
    "force_upcast": False,
}
WITH_CONVS = {**LEVELS, "shift_factor": 0.1}
WITHOUT_CONVS = {**LEVELS, "use_quant_conv": False, "use_post_quant_conv": False}
SIZES = ((1, 64, 64), (2, 32, 96), (3, 80, 48))  # the tracing knows none of them
TOLERANCE = 1e-3  # of the range of what torch gives


def saved(folder, options, name="AutoencoderKL"):
    torch.manual_seed(0)
    getattr(diffusers, name)(**options).eval().save_pretrained(folder)
    return folder


def session(folder, part):
    return onnxruntime.InferenceSession(folder / f"vae_{part}/model.onnx")


def pictures(batch, height, width):
    names = ("astronaut", "chelsea", "coffee")[:batch]
    return torch.cat([photograph_tensor(name, 128)[..., :height, :width] for name in names])


def assert_near(got, wanted, part=TOLERANCE):
    assert got.shape == wanted.shape
    assert np.ptp(wanted) > 0.1
    assert np.abs(got - wanted).max() < part * np.ptp(wanted)


def psnr(images, decoded):
    error = (images.numpy() - np.clip(decoded, -1, 1)) / 2
    return -10 * np.log10(np.square(error).mean())


def require_same_as_diffusers(folder, network, sizes=SIZES):
    """Moments, pictures and the PSNR of the way through."""
    encoder, decoder = session(folder, "encoder"), session(folder, "decoder")
    for size in sizes:
        images = pictures(*size)
        with torch.no_grad():
            posterior = network.encode(images).latent_dist
            decoded = network.decode(posterior.mean).sample.numpy()
        (moments,) = encoder.run(["latent_parameters"], {"sample": images.numpy()})
        assert_near(moments, posterior.parameters.numpy())
        mean = posterior.mean.numpy()
        (found,) = decoder.run(["sample"], {"latent_sample": mean})
        assert_near(found, decoded)
        own = moments[:, : mean.shape[1]]
        (through,) = decoder.run(None, {"latent_sample": own})
        assert psnr(images, through) == pytest.approx(psnr(images, decoded), abs=0.01)


@pytest.fixture(scope="module")
def written(exported, tmp_path_factory):
    """What the command line makes of the tiny run."""
    out = tmp_path_factory.mktemp("onnx") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["latent-ae", "onnx", str(exported), str(out)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0
    return out


def test_onnxruntime_gives_what_diffusers_gives(written, exported):
    require_same_as_diffusers(written, AutoencoderKL.from_pretrained(exported))


def test_names_sizes_and_facts_stand_in_the_files(written, exported):
    network = AutoencoderKL.from_pretrained(exported)
    for part, shapes in {
        "encoder": {
            "sample": ["batch", 3, "height", "width"],
            "latent_parameters": ["batch", 8, "height / 2", "width / 2"],
        },
        "decoder": {
            "latent_sample": ["batch", 4, "latent_height", "latent_width"],
            "sample": ["batch", 3, "latent_height * 2", "latent_width * 2"],
        },
    }.items():
        file = written / f"vae_{part}/model.onnx"
        onnx.checker.check_model(str(file), full_check=True)
        proto = onnx.load(file)
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]
        run = session(written, part)
        assert {v.name: v.shape for v in [*run.get_inputs(), *run.get_outputs()]} == shapes
        facts = {entry.key: entry.value for entry in proto.metadata_props}
        assert facts["latent_ae.weights_sha256"] == weights_sha256(exported)
        assert float(facts["latent_ae.scaling_factor"]) == network.config["scaling_factor"]
        assert not any(node.metadata_props for node in proto.graph.node)
        assert str(exported).encode() not in file.read_bytes()
        assert b"site-packages" not in file.read_bytes()
        config = json.loads((file.parent / "config.json").read_text())
        assert config["scaling_factor"] == network.config["scaling_factor"]
        assert config["_class_name"] == "AutoencoderKL"
        assert "_name_or_path" not in config
    assert sorted(path.name for path in written.iterdir()) == [
        "latent_ae_onnx.json",
        "vae_decoder",
        "vae_encoder",
    ]
    record = json.loads((written / "latent_ae_onnx.json").read_text())
    assert record["opset"] == 18
    assert record["files"]["encoder"]["input"]["shape"] == ["batch", 3, "height", "width"]
    first, second = record["comparison"]["sizes"]
    assert (first["shape"], second["shape"]) == ([1, 3, 64, 64], [2, 3, 48, 80])
    for size in (first, second):
        for name in ("latents", "logvar", "decoded", "reconstruction"):
            assert 0 < size[name]["relative"] < 1e-4, name


def test_sides_that_the_factor_does_not_divide_lose_their_last_pixels(written):
    images = pictures(1, 65, 47).numpy()
    encode = session(written, "encoder")
    (found,) = encode.run(None, {"sample": images})
    assert found.shape == (1, 8, 32, 23)
    (cut,) = encode.run(None, {"sample": images[..., :64, :46]})
    assert np.abs(found - cut)[..., :28, :19].max() < 0.05 * np.ptp(cut)  # GroupNorm sees them


def test_more_pictures_than_torch_was_shown(written, exported):
    latents = torch.randn(65, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = AutoencoderKL.from_pretrained(exported).decode(latents).sample.numpy()
    (found,) = session(written, "decoder").run(None, {"latent_sample": latents.numpy()})
    assert_near(found, wanted)


def test_a_difference_is_refused(written, exported, tmp_path):
    """The files of one network beside another's weights."""
    network = AutoencoderKL.from_pretrained(exported)
    with torch.no_grad():
        network.decoder.conv_out.bias.add_(0.01)
    network.save_pretrained(tmp_path)
    other = onnx_check.FrozenAutoencoder(tmp_path, "cpu")
    with pytest.raises(UserError, match=r"torch differ: decoded of \(1, 3, 64, 64\) by up to 0.01"):
        onnx_check.compare_with_torch(other, written)
    with torch.no_grad():
        network.encoder.conv_out.bias.fill_(float("nan"))
    network.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"latents of .* by up to nan"):
        onnx_check.compare_with_torch(onnx_check.FrozenAutoencoder(tmp_path, "cpu"), written)


def test_bad_input_is_one_sentence_and_leaves_nothing(exported, written, tmp_path):
    upcast = saved(tmp_path / "upcast", {**LEVELS, "force_upcast": True})
    before = (written / "latent_ae_onnx.json").read_bytes()
    out = tmp_path / "out"
    with pytest.raises(UserError, match="exists already"):
        export_onnx(exported, written)
    with pytest.raises(UserError, match="no exported autoencoder"):
        export_onnx(tmp_path / "nothing", out)
    with pytest.raises(UserError, match="opset 17 is not one of 18 to 23"):
        export_onnx(exported, out, opset=17)
    with pytest.raises(UserError, match="says force_upcast"):
        export_onnx(upcast, out, precision="fp16")
    assert (written / "latent_ae_onnx.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["upcast"]


def test_a_failure_on_the_way_leaves_nothing(exported, tmp_path, monkeypatch):
    def fail(half, example, *arguments):
        raise RuntimeError("no such operator\nand forty lines more")

    monkeypatch.setattr("latent_ae.onnx_export._trace", fail)
    with pytest.raises(UserError, match=r"encoder of AutoencoderKL as ONNX: no such operator$"):
        export_onnx(exported, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(exported, tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "onnxscript" else real(name)
    )
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["latent-ae", "onnx", str(exported), str(out)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ONNX needs onnxscript")
    assert "pip install 'latent_ae[onnx]'" in line
    assert not out.exists()


def test_the_example_of_the_docs_runs(written, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "OUT").symlink_to(written)
    photograph("coffee").save("photo.jpg")
    page = (Path(__file__).parents[1] / "docs/onnx.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(compile(code, "docs/onnx.md", "exec"), names)
    pixels = np.asarray(photograph("coffee").resize((256, 256)), np.float32) / 127.5 - 1
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    network = AutoencoderKL.from_pretrained(exported)
    with torch.no_grad():
        wanted = network.decode(network.encode(images).latent_dist.mode()).sample.numpy()
    assert np.abs(names["decoded"] - wanted).mean() < 0.05  # JPEG in between


@pytest.mark.slow
@pytest.mark.parametrize(("options", "opset"), [(WITH_CONVS, 18), (WITHOUT_CONVS, 23)])
def test_attention_in_the_middle(options, opset, tmp_path):
    folder = saved(tmp_path / "model", options)
    export_onnx(folder, tmp_path / "out", opset=opset)
    require_same_as_diffusers(tmp_path / "out", AutoencoderKL.from_pretrained(folder))
    proto = onnx.load(tmp_path / "out/vae_decoder/model.onnx")
    assert proto.opset_import[0].version == opset
    assert ("Attention" in {node.op_type for node in proto.graph.node}) == (opset == 23)


@pytest.mark.slow
def test_fp16_halves_the_file_and_is_near(tmp_path):
    folder = saved(tmp_path / "model", WITH_CONVS)
    network = AutoencoderKL.from_pretrained(folder)
    record = export_onnx(folder, tmp_path / "fp16", precision="fp16")
    weights = sum(4 * p.numel() for p in network.decoder.parameters())
    assert record["files"]["decoder"]["bytes"] < 0.8 * weights
    images = pictures(2, 64, 48)
    with torch.no_grad():
        wanted = network.encode(images).latent_dist.parameters
    encoder = session(tmp_path / "fp16", "encoder")
    (found,) = encoder.run(None, {"sample": images.numpy().astype(np.float16)})
    assert found.dtype == np.float16
    assert_near(found.astype(np.float32), wanted.numpy(), 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AutoencoderTiny", "AutoencoderDC", "VQModel"])
def test_other_classes_give_latents_alone(name, tmp_path):
    from test_frozen import KINDS

    options, factor, channels, _ = KINDS[name]
    folder = saved(tmp_path / "model", options, name)
    record = export_onnx(folder, tmp_path / "out")
    assert record["files"]["encoder"]["output"] == {
        "name": "latent_sample",
        "shape": ["batch", channels, f"height / {factor}", f"width / {factor}"],
    }
    images = pictures(2, 96, 64)
    network = getattr(diffusers, name).from_pretrained(folder)
    with torch.no_grad():
        latents = network.encode(images)[0]
        decoded = network.decode(latents).sample.numpy()
    (found,) = session(tmp_path / "out", "encoder").run(None, {"sample": images.numpy()})
    assert_near(found, latents.numpy())
    (found,) = session(tmp_path / "out", "decoder").run(None, {"latent_sample": latents.numpy()})
    assert_near(found, decoded)


@pytest.mark.slow
@pytest.mark.timeout(900)  # it took 206 to 277 seconds on a core that others used too
def test_the_size_of_stable_diffusion(tmp_path):
    options = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    folder = saved(tmp_path / "model", options)
    record = export_onnx(folder, tmp_path / "out")
    assert [size["shape"][2:] for size in record["comparison"]["sizes"]] == [
        [256, 256],
        [192, 320],
    ]
    network = AutoencoderKL.from_pretrained(folder)
    sizes = ((1, 64, 96),)  # the larger ones were just compared
    require_same_as_diffusers(tmp_path / "out", network, sizes)
