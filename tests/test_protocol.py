import numpy as np
import pytest
import torch
from conftest import photograph
from PIL import Image

from latent_ae import UserError
from latent_ae.config import PROTOCOLS, Protocol
from latent_ae.config_file import load_protocol
from latent_ae.data import CenterCrop


def test_published_protocols_are_there_by_name():
    imagenet, coco = PROTOCOLS["imagenet256-val50k"], PROTOCOLS["coco2017-val5k"]
    assert (imagenet.images, imagenet.resize, imagenet.frechet) == (50_000, "adm", "inception")
    assert (coco.images, coco.resolution, coco.lpips) == (5_000, 256, ("alex", "vgg"))
    for name in PROTOCOLS:
        assert load_protocol(name) == PROTOCOLS[name]
        assert len(PROTOCOLS[name].in_words().split()) > 5


def test_a_change_is_named():
    changed = load_protocol("photos256", ["resolution=512", "lpips=[vgg]"])
    assert changed.resolution == 512
    assert changed.lpips == ("vgg",)
    assert changed.name == "photos256, changed"
    assert load_protocol("photos256", ["resolution=256", "lpips=[alex]"]).name == "photos256"
    assert load_protocol("photos256", ["resolution=null"]).resize == "none"


def test_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nresolution: 128\ncode: sample\n")
    assert load_protocol(file) == Protocol(name="mine", resolution=128, code="sample")
    file.write_text("resolution: 128\n")
    assert load_protocol(file).name == "mine"
    assert Protocol(resolution=128).name == "custom"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("photo256", [], "valid: photos256, native"),
        ("none.yaml", [], "there is no config file"),
        ("photos256", ["reslution=1"], "did you mean 'resolution'"),
        ("photos256", ["resolution=16"], "greater than or equal to 32"),
        ("photos256", ["lpips=[alex, alex]"], "each backbone once"),
        ("photos256", ["frechet=clip"], "valid: 'alexnet'"),
        ("native", ["resize=lanczos"], "nothing is resized"),
        ("photos256", ["resolution"], "not of the form key=value"),
    ],
)
def test_wrong_protocols(name, changes, words):
    with pytest.raises(UserError, match=words):
        load_protocol(name, changes)


def test_adm_is_guided_diffusions_rule():
    """Written out once more: halves by box while twice too large, then bicubic."""
    picture = photograph("astronaut")  # 512 × 512
    small = picture.resize((256, 256), Image.Resampling.BOX).resize(
        (128, 128), Image.Resampling.BOX
    )
    wanted = np.asarray(small.resize((96, 96), Image.Resampling.BICUBIC))
    found = CenterCrop(96, "adm")(picture)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), wanted)


def test_the_other_resizes():
    picture = photograph("coffee")  # 600 × 400
    wide = picture.resize((144, 96), Image.Resampling.BICUBIC).crop((24, 0, 120, 96))
    assert np.array_equal(CenterCrop(96, "bicubic")(picture).permute(1, 2, 0), np.asarray(wide))
    middle = picture.crop((252, 152, 348, 248))
    assert np.array_equal(CenterCrop(96, "none")(picture).permute(1, 2, 0), np.asarray(middle))
    whole = CenterCrop(None, "none")(picture)
    assert whole.shape == (3, 400, 600)
    cut = CenterCrop(None, "none", multiple=64)(picture)
    assert torch.equal(cut, whole[:, 8:392, 12:588])
