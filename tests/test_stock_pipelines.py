"""An exported folder as `vae=` of diffusers' stock pipelines, run end to end.

Each pipeline runs with an ideal scheduler, whose every step says at once what the picture's latents
are. What then comes out is the autoencoder's own reconstruction, or the pipeline scales wrongly.
"""

from pathlib import Path

import diffusers
import pytest
import stock_pipelines
import torch
from conftest import photograph_tensor, tiny_content
from diffusers import AutoencoderKL

from latent_ae import export_run, train
from latent_ae.config_file import parse_config
from latent_ae.export import IGNORED_BY
from latent_ae.scaling import LatentScaling

QUICK = ("StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "DiTPipeline")
KINDS = [
    pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow)
    for kind in stock_pipelines.BUILDERS
]


@pytest.fixture(scope="module")
def folders(run_folder, photos, quiet, tmp_path_factory):
    """Plain and folded exports of 4 channels, and of 16, by channels and statistics."""
    folder = tmp_path_factory.mktemp("stock")
    content = tiny_content(photos, folder / "run")
    content["network"]["latent_channels"] = 16
    content["validation"] = None
    runs = {4: run_folder, 16: train(parse_config(content), quiet)}
    return {
        (channels, name): export_run(
            run, folder / f"{channels}-{name}", statistics=name, images=4, license_name="mit"
        )
        for channels, run in runs.items()
        for name in ("scale", "folded")
    }


def autoencoder(folders, kind, statistics):
    """The autoencoder for that pipeline, with a posterior too narrow for its sample to differ.

    The weights are an exported folder's. The numbers of the config are not near 0 and 1, as those
    of so short a training may be: nothing depends on their being the best.
    """
    channels = 16 if "StableDiffusion3" in kind or "Flux" in kind else 4
    name = "folded" if statistics == "folded" else "scale"
    vae = AutoencoderKL.from_pretrained(folders[channels, name]).eval()
    return stock_pipelines.told(vae, statistics)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_reconstruction_comes_out_or_the_table_says_why_not(folders, kind):
    for statistics in stock_pipelines.STATISTICS:
        vae, image = autoencoder(folders, kind, statistics), photograph_tensor("astronaut", 64)
        decoding, encoding = stock_pipelines.differences(kind, vae, image)
        way = IGNORED_BY.get(statistics, {}).get(kind, "")
        assert (decoding < 1e-4) == (way in ("", "uses it in decoding, not in encoding")), way
        if "Img2Img" in kind or "Inpaint" in kind:
            wanted = way in ("", "uses it in encoding, not in decoding")
            assert (encoding < 1e-3) == wanted, way


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_with_its_own_denoiser_the_picture_is_that_of_its_latents(folders, kind):
    """Nothing replaced: the picture is what `decode` makes of the last latents."""
    vae = autoencoder(folders, kind, "scale")
    pipe = stock_pipelines.build(kind, vae)
    image = photograph_tensor("coffee", 64) / 2 + 0.5
    latents, picture = (
        stock_pipelines.run(pipe, image, output_type=output_type)
        for output_type in ("latent", "pt")
    )
    if kind == "DiTPipeline":  # knows no "latent"
        assert picture.shape == (1, 3, 64, 64)
        return
    if "Flux" in kind:
        latents = pipe._unpack_latents(latents, 64, 64, pipe.vae_scale_factor)
    raw = LatentScaling.of(vae).to_raw(latents)
    wanted = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(picture, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # Kolors'
@torch.no_grad()
@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_auto_pipelines_find_their_classes_with_it(folders, kind, tmp_path):
    """A saved pipeline through `AutoPipelineFor…`, with the exported autoencoder as `vae=`."""
    vae = autoencoder(folders, kind, "scale")
    stock_pipelines.build(kind, vae).save_pretrained(tmp_path / "pipeline")
    image = photograph_tensor("coffee", 64) / 2 + 0.5
    for task, part in (("Text2Image", ""), ("Image2Image", "Img2Img"), ("Inpainting", "Inpaint")):
        auto = getattr(diffusers, f"AutoPipelineFor{task}")
        pipe = auto.from_pretrained(tmp_path / "pipeline", vae=vae)
        pipe.set_progress_bar_config(disable=True)
        wanted = stock_pipelines.build(kind.replace("Pipeline", f"{part}Pipeline"), vae)
        assert type(pipe) is type(wanted)
        found = stock_pipelines.run(pipe, image)
        torch.testing.assert_close(found, stock_pipelines.run(wanted, image))


@pytest.mark.parametrize("kind", IGNORED_BY["force_upcast"])
def test_pipelines_said_to_ignore_force_upcast_do(kind):
    """Read as text: on a CPU no fp16 pipeline overflows."""
    files = (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py")
    (source,) = [text for text in map(Path.read_text, files) if f"class {kind}(" in text]
    assert "vae.decode" in source
    assert "force_upcast" not in source
