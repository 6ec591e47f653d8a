import math
import pickle
import urllib.error
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from conftest import NAMES, photograph
from safetensors.torch import load_file, save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torchmetrics.image.fid import FrechetInceptionDistance

import latent_ae
from latent_ae import UserError
from latent_ae.data import normalize, to_tensor
from latent_ae.evaluation import frechet
from latent_ae.evaluation.frechet import FEATURE_NETWORKS, FrechetDistance

pytestmark = pytest.mark.usefixtures("one_thread")

ALEXNET = Path(latent_ae.__file__).parent / "assets" / "lpips_alexnet.safetensors"
DIMENSIONS = 12


class Bytes(torch.nn.Module):
    """Reads a picture's bytes as float64 features: Gaussians of any moments can be fed exactly."""

    num_features = DIMENSIONS

    def forward(self, images):
        return images.flatten(1).view(torch.float64)


class Colours(torch.nn.Module):
    """Twelve features that are cheap: means and deviations of the colours of two halves."""

    num_features = DIMENSIONS

    def forward(self, images):
        halves = torch.cat(images.float().chunk(2, dim=-1), dim=1).flatten(2)
        return torch.cat([halves.mean(2), halves.std(2)], dim=1)


def as_pictures(features):
    return torch.from_numpy(np.ascontiguousarray(features)).view(torch.uint8).view(-1, 3, 4, 8)


def gaussian(generator, count, mean, root):
    """Samples whose own mean is `mean` and whose own covariance is `root @ root.T`."""
    sample = generator.normal(size=(count, DIMENSIONS))
    sample -= sample.mean(0)
    whitening = np.linalg.inv(np.linalg.cholesky(np.cov(sample, rowvar=False)))
    return sample @ whitening.T @ root.T + mean


def crops(count, size, seed=0):
    """Real photographs' crops, uint8 of shape (count, 3, size, size)."""
    generator = np.random.default_rng(seed)
    pictures = [to_tensor(photograph(name)) for name in NAMES]
    result = []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        top, left = (generator.integers(0, side - size) for side in picture.shape[1:])
        result.append(picture[:, top : top + size, left : left + size])
    return torch.stack(result)


def darker(images):
    return (images.float() * 0.8 + 10).to(torch.uint8)


def measured(network, images, other, batch=64):
    distance = FrechetDistance(network)
    for a, b in zip(images.split(batch), other.split(batch), strict=True):
        distance.update(a, {"model": b})
    return distance


class Recording(torch.nn.Module):
    """The first 64 features of AlexNet, kept: both implementations get the very same."""

    num_features = 64

    def __init__(self, network):
        super().__init__()
        self.network, self.kept = network, {}

    def forward(self, images):
        key = images.numpy().tobytes()
        if key not in self.kept:
            self.kept[key] = self.network(images)[:, : self.num_features]
        return self.kept[key]


@pytest.fixture(scope="module")
def alexnet():
    return FEATURE_NETWORKS["alexnet"](None)


@pytest.mark.parametrize("count", [120, 30])  # of 64 features: with and without full rank
def test_it_agrees_with_torch_fidelity_and_torchmetrics(count, alexnet):
    network = Recording(alexnet)
    images = crops(count, 48)
    other = darker(images)
    distance = measured(network, images, other, batch=30)
    stock = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    for a, b in zip(images.split(30), other.split(30), strict=True):
        stock.update(a, real=True)
        stock.update(b, real=False)
    features = [torch.cat([network(x) for x in y.split(30)]).double() for y in (images, other)]
    statistics = [fid_features_to_statistics(x) for x in features]
    wanted = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    result = distance.compute("model")
    assert result.distance > 0.01
    assert result.distance == pytest.approx(wanted, rel=1e-4)
    assert result.distance == pytest.approx(stock.compute().item(), rel=1e-4)
    assert (result.features, result.images) == (64, count)


def test_it_is_the_distance_of_two_gaussians():
    generator = np.random.default_rng(0)
    means = 1000 + generator.normal(size=(2, DIMENSIONS))  # far from 0, where raw sums cancel
    roots = generator.normal(size=(2, DIMENSIONS, DIMENSIONS))
    features = [gaussian(generator, 50, *moments) for moments in zip(means, roots, strict=True)]
    result = measured(Bytes(), *map(as_pictures, features), batch=7).compute("model")
    first, second = (root @ root.T for root in roots)
    middle = scipy.linalg.sqrtm(scipy.linalg.sqrtm(first) @ second @ scipy.linalg.sqrtm(first))
    wanted = np.square(means[0] - means[1]).sum() + np.trace(first + second - 2 * middle.real)
    assert result.distance == pytest.approx(wanted, rel=1e-9)


def test_covariances_that_commute_have_a_closed_form():
    generator = np.random.default_rng(1)
    axes = np.linalg.qr(generator.normal(size=(DIMENSIONS, DIMENSIONS)))[0]
    deviations = generator.uniform(0.1, 3, size=(2, DIMENSIONS))
    features = [
        gaussian(generator, 40, m, axes * d) for m, d in zip((0, 2), deviations, strict=True)
    ]
    result = measured(Bytes(), *map(as_pictures, features)).compute("model")
    wanted = 4 * DIMENSIONS + np.square(deviations[0] - deviations[1]).sum()
    assert result.distance == pytest.approx(wanted, rel=1e-9)


def test_equal_pictures_have_no_distance(alexnet):
    images = crops(12, 48)
    other = measured(Recording(alexnet), images, darker(images)).compute("model").distance
    assert (
        0 <= measured(Recording(alexnet), images, images).compute("model").distance < 1e-5 * other
    )


def test_processes_add_up():
    images = crops(50, 32)
    whole = measured(Colours(), images, darker(images), batch=50)
    parts = [measured(Colours(), x, darker(x), batch=8) for x in images.split((13, 30, 7))]
    idle = FrechetDistance(Colours())
    total = FrechetDistance(Colours())
    for part in (idle, *parts, idle):
        total.merge(pickle.loads(pickle.dumps(part.state())))
    wanted, state = whole.state(), total.state()
    for a, b in (
        (wanted["real"], state["real"]),
        (wanted["reconstructions"]["model"], state["reconstructions"]["model"]),
    ):
        assert a["count"] == b["count"] == 50
        torch.testing.assert_close(a["mean"], b["mean"], rtol=1e-12, atol=0)
        torch.testing.assert_close(a["scatter"], b["scatter"], rtol=1e-9, atol=1e-9)
    assert total.compute("model").distance == pytest.approx(
        whole.compute("model").distance, rel=1e-9
    )
    before = parts[0].state()["real"]["scatter"].clone()
    kept = parts[0].state()
    parts[0].merge(parts[1].state())
    assert torch.equal(kept["real"]["scatter"], before)  # a state does not change afterwards


def test_the_pictures_are_seen_once_whatever_the_number_of_reconstructions():
    seen = []

    class Counting(Colours):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    images = crops(6, 32)
    distance = FrechetDistance(Counting())
    distance.update(images, {"a": darker(images), "b": images, "c": normalize(images)})
    assert seen == [6] * 4
    # Floats in [-1, 1] are rounded to the 8 bits they came from.
    assert distance.compute("b").distance == distance.compute("c").distance


def test_the_note_says_what_a_value_is_worth():
    images = crops(13, 32)
    distance = FrechetDistance(Colours())
    assert distance.compute("model").distance is None
    distance.update(images[:1], {"model": images[:1]})
    result = distance.compute("model")
    assert result.distance is None
    assert "takes two pictures, and there are 1" in result.note
    distance.update(images[1:12], {"model": images[1:12]})
    assert "12 pictures for 12 features" in distance.compute("model").note
    assert "rank-deficient" in distance.compute("model").note
    distance.update(images[12:], {"model": images[12:]})
    assert "13 pictures are fewer than 10000" in distance.compute("model").note
    many = torch.randint(0, 256, (10_000, 3, 2, 4), dtype=torch.uint8)
    assert measured(Colours(), many, many, batch=5000).compute("model").note is None


def test_wrong_input():
    images = crops(4, 32)
    distance = FrechetDistance(Colours())
    distance.update(images, {"model": images})
    with pytest.raises(ValueError, match="were model before"):
        distance.update(images, {"model": images, "other": images})
    with pytest.raises(ValueError, match="were model before"):
        distance.merge({**distance.state(), "reconstructions": {}})
    with pytest.raises(ValueError, match="must have the shape"):
        distance.update(images, {"model": images[:2]})
    with pytest.raises(KeyError):
        distance.compute("modle")
    broken = torch.full((1, DIMENSIONS), math.inf, dtype=torch.float64)
    fine = as_pictures(np.zeros((1, DIMENSIONS)))
    for pictures, other, name in (
        (fine, as_pictures(broken.numpy()), "model"),
        (as_pictures(broken.numpy()), fine, "the pictures"),
    ):
        with pytest.raises(UserError, match=f"features of {name} are not finite"):
            FrechetDistance(Bytes()).update(pictures, {"model": other})


@pytest.mark.parametrize(("name", "features"), [("alexnet", 256), ("vgg16", 512)])
def test_backbones_are_torchvisions(name, features, tmp_path):
    model = getattr(torchvision.models, name)(weights=None).features.eval()
    path = None
    if name == "alexnet":  # the weights that ship with the package
        state = {key.removeprefix("features."): x.float() for key, x in load_file(ALEXNET).items()}
        model.load_state_dict(state)
    else:
        path = str(tmp_path / "vgg16.safetensors")
        save_file({f"features.{key}": x for key, x in model.state_dict().items()}, path)
    network = FEATURE_NETWORKS[name](path)
    images = crops(2, 80)[..., :72]
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        wanted = model[:-1]((images / 255 - mean) / deviation).mean((2, 3))
        result = network(images)
    assert result.shape == (2, features)
    assert network.num_features == features
    assert result.dtype == torch.float32
    assert wanted.abs().max() > 0
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-6 * wanted.abs().max().item())
    assert_frozen(network)


def assert_frozen(network):
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.fixture(scope="module")
def inception_state():
    """Random weights, scaled so that the features do not die out."""

    class Empty(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            return None

    nothing = BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Empty("random", ["2048"], feature_extractor_weights_path=nothing)
    state = network.state_dict()
    return {key: x * 6**0.5 if key.endswith("conv.weight") else x for key, x in state.items()}


def test_inception_is_torch_fidelitys_from_either_file(inception_state, tmp_path):
    torch.save(inception_state, tmp_path / "inception.pth")
    save_file(inception_state, tmp_path / "inception.safetensors")
    images = crops(2, 96)
    stock = FeatureExtractorInceptionV3(
        "stock", ["2048"], feature_extractor_weights_path=tmp_path / "inception.pth"
    )
    (wanted,) = stock(images)
    assert wanted.std(0).max() > 1e-3
    before = torch.get_rng_state()
    for file in ("inception.pth", "inception.safetensors"):
        network = FEATURE_NETWORKS["inception"](str(tmp_path / file))
        assert torch.equal(network(images), wanted)
        assert wanted.shape == (2, network.num_features)
        assert_frozen(network)
    assert torch.equal(torch.get_rng_state(), before)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("make", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_pickle_that_runs_code_is_refused(make, tmp_path):
    trap = Malicious()
    trap.path = str(tmp_path / "executed")
    make({"fc.weight": trap}, tmp_path / "inception.pth")
    with pytest.raises(UserError, match="neither a safetensors file nor a torch file of plain"):
        FEATURE_NETWORKS["inception"](str(tmp_path / "inception.pth"))
    assert not (tmp_path / "executed").exists()


def test_wrong_files_of_inception(inception_state, tmp_path):
    path = tmp_path / "wrong.safetensors"
    build = FEATURE_NETWORKS["inception"]
    with pytest.raises(UserError, match="there is no file"):
        build(str(path))
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="neither a safetensors file"):
        build(str(path))
    torch.save({"epoch": 3}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match="something else than a state dict"):
        build(str(tmp_path / "wrong.pth"))
    key = "Conv2d_1a_3x3.conv.weight"
    for state in ({key: inception_state[key]}, {**inception_state, key: torch.zeros(32, 3, 5, 5)}):
        save_file(state, path)
        with pytest.raises(UserError, match="holds another network than torch-fidelity's"):
            build(str(path))


@pytest.mark.parametrize(("name", "file"), [("inception", "6726825d"), ("vgg16", "torchvision")])
def test_without_network_the_error_says_both_ways(name, file, monkeypatch, tmp_path):
    def offline(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as raised:
        FEATURE_NETWORKS[name](None)
    message = str(raised.value)
    assert "cannot be fetched" in message
    assert "--frechet-weights" in message
    assert "--distance-weights" in message
    assert file in message
    assert "no network" in message
    assert "\n" not in message


def test_what_is_fetched_is_checked_and_not_unpickled(inception_state, monkeypatch):
    asked = {}

    def fetch(url, **options):
        asked.update(options, url=url)
        return inception_state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    network = FEATURE_NETWORKS["inception"](None)
    assert torch.equal(network.state_dict()["network.fc.weight"], inception_state["fc.weight"])
    assert asked["url"] == frechet.URL_INCEPTION_V3
    assert asked["weights_only"] is True
    assert asked["check_hash"] is True
