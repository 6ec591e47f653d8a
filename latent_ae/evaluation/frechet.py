"""The Fréchet distance between pictures and their reconstructions, on any feature network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import lpips
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from latent_ae.autoencoder import full_precision
from latent_ae.channels import has_colours, shown
from latent_ae.data import normalize, to_uint8
from latent_ae.errors import UserError
from latent_ae.losses import load_backbone

__all__ = ["FEATURE_NETWORKS", "FrechetDistance", "FrechetResult"]

# Heusel et al.'s code advises at least this many; of fewer, the value depends on their number.
_ENOUGH_PICTURES = 10_000


class _Inception(nn.Module):
    """torch-fidelity's Inception: uint8 of shape (B, 3, H, W) to float32 of shape (B, 2048)."""

    num_features: int = 2048

    def __init__(self, network: FeatureExtractorInceptionV3) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


class _Backbone(nn.Module):
    """An LPIPS backbone: uint8 of shape (B, 3, H, W) to its last ReLU's means over space."""

    def __init__(self, model: lpips.LPIPS) -> None:
        super().__init__()
        # On [-1, 1], lpips' own scaling is torchvision's mean and deviation of ImageNet.
        self.scaling_layer, self.net = model.scaling_layer, model.net
        self.num_features: int = model.chns[-1]

    def forward(self, images: Tensor) -> Tensor:
        return self.net(self.scaling_layer(normalize(images)))[-1].mean((2, 3))


def _inception(weights: str | None = None) -> nn.Module:
    """The network of the literature's FID (TensorFlow's of 2015-12-05), with its own resizing."""
    state = _fetched_state() if weights is None else _state_of(weights)
    # torch-fidelity unpickles whatever its path names; it gets tensors that were read safely.
    safe = BytesIO()
    torch.save(state, safe)
    safe.seek(0)
    # The random weights that it begins with must not move the noise of a run.
    with torch.random.fork_rng(devices=[]):
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=safe
            )
        except RuntimeError as error:
            raise UserError(
                f"{weights or URL_INCEPTION_V3} holds another network than torch-fidelity's "
                f"Inception of {Path(URL_INCEPTION_V3).name}"
            ) from error
    return _Inception(network).requires_grad_(False).eval()


def _fetched_state() -> dict[str, Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
        )
    except Exception as error:  # urllib's, the hub's or the file system's
        raise UserError(
            f"the Inception of the Fréchet distance cannot be fetched from {URL_INCEPTION_V3} "
            f"({error}); where there is no network, give that file, or a safetensors "
            "file of its tensors, by `--frechet-weights` (a denoiser's: `--distance-weights`)"
        ) from error


def _state_of(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UserError(f"there is no file {path} with the weights of Inception")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if all(isinstance(tensor, Tensor) for tensor in state.values()):
            return dict(state)
    except Exception as error:  # pickle's, zip's or safetensors' own; its advice is to trust
        raise UserError(
            f"{path} is neither a safetensors file nor a torch file of plain tensors; no other is "
            "read, since it could run code"
        ) from error
    raise UserError(f"{path} holds something else than a state dict of plain tensors")


def _alexnet(weights: str | None = None) -> nn.Module:
    """The AlexNet that ships with this package: 256 features, comparable with no published FID."""
    return _Backbone(load_backbone("alex", weights)).eval()


def _vgg16(weights: str | None = None) -> nn.Module:
    """VGG16 as torchvision trained it: 512 features, comparable with no published FID."""
    try:
        return _Backbone(load_backbone("vgg", weights)).eval()
    except UserError as error:
        if weights is not None:
            raise
        raise UserError(
            f"the VGG16 of the Fréchet distance cannot be fetched by torchvision "
            f"({error.__cause__}); where there is no network, give a safetensors file of "
            "torchvision's weights by `--frechet-weights` (a denoiser's: `--distance-weights`)"
        ) from error


# Each takes a file of weights (safetensors of torchvision's tensors; Inception's, torch-fidelity's,
# also as a torch file) or None for its own, and raises UserError where they are missing or another
# network's. The network maps uint8 (B, 3, H, W), any size, to float32 (B, num_features).
FEATURE_NETWORKS: dict[str, Callable[[str | None], nn.Module]] = {
    "inception": _inception,
    "alexnet": _alexnet,
    "vgg16": _vgg16,
}


class _Moments:
    """The count, mean and scatter about the mean of features, in float64.

    Batches are merged about their own means (Chan, Golub & LeVeque 1983): sums of raw products
    would lose what is small beside the mean.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(features, features, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Takes in float64 features of shape (B, d)."""
        mean = features.mean(0)
        rows = torch.cat([features - mean, self._move(mean, len(features))])
        self.scatter.addmm_(rows.T, rows)

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Takes in another's state."""
        self.scatter += state["scatter"].to(self.scatter)
        row = self._move(state["mean"].to(self.mean), int(state["count"]))
        self.scatter.addmm_(row.T, row)

    def _move(self, mean: Tensor, count: int) -> Tensor:
        """Takes in a mean; returns, of shape (1, d), what the step between the means scatters."""
        total = max(1, self.count + count)
        step = mean - self.mean
        self.mean = self.mean + step * (count / total)
        row = step * (self.count * count / total) ** 0.5
        self.count += count
        return row[None]

    def state(self) -> dict[str, Tensor]:
        count = torch.tensor(self.count)
        scatter = self.scatter.to("cpu", copy=True)  # it grows in place, the mean does not
        return {"count": count, "mean": self.mean.cpu(), "scatter": scatter}

    def statistics(self) -> dict[str, Any]:
        """As torch-fidelity takes them."""
        sigma = self.scatter / (self.count - 1)
        return {"mu": self.mean.cpu().numpy(), "sigma": sigma.cpu().numpy()}


@dataclass(frozen=True)
class FrechetResult:
    """A Fréchet distance and what it rests on.

    Attributes:
        distance: in the squared unit of the features, at least 0; None of fewer than two pictures.
        features: how many a picture has.
        images: how many pictures were compared.
        note: why it is biased or missing; None where there are pictures enough.
    """

    distance: float | None
    features: int
    images: int
    note: str | None


class FrechetDistance:
    """Collects features of pictures and of several reconstructions of them, and compares them.

    The Fréchet distance of two Gaussians (Dowson & Landau 1982) with the features' means and
    covariances, `|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½)`, as Heusel et al. 2017 take it: of
    reconstructions, rFID. Features are computed in fp32 and gathered in float64.
    """

    def __init__(
        self, network: nn.Module, device: torch.device | str = "cpu", name: str = "features"
    ) -> None:
        self.network, self.name = network.to(device), name
        self.device = torch.device(device)
        self.num_features = int(self.network.num_features)  # pyright: ignore
        self._real = self._empty()
        self._reconstructions: dict[str, _Moments] = {}

    @torch.no_grad()
    def update(self, images: Tensor, reconstructions: Mapping[str, Tensor]) -> None:
        """Adds a batch; the features of the pictures are computed once for all reconstructions.

        Args:
            images: uint8 of shape (B, C, H, W); with C of 1 or 4 the network gets what `shown`
                makes of them, with more what they are.
            reconstructions: by name, the same names each time; uint8, or floats in [-1, 1], which
                are clamped and rounded to 8 bits, of the same shape.

        Raises:
            UserError: features that are not finite.
            ValueError: other names than before, or another shape.
        """
        self._require_same(reconstructions)
        if any(other.shape != images.shape for other in reconstructions.values()):
            raise ValueError(f"each reconstruction must have the shape {tuple(images.shape)}")
        if not len(images):
            return
        features = {name: self._features(name, x) for name, x in reconstructions.items()}
        self._real.add(self._features("the pictures", images))
        for name, batch in features.items():
            self._reconstructions.setdefault(name, self._empty()).add(batch)

    def state(self) -> dict[str, Any]:
        """What was counted, as tensors on the CPU in plain dicts, for another's `merge`."""
        others = {name: moments.state() for name, moments in self._reconstructions.items()}
        return {"real": self._real.state(), "reconstructions": others}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Adds another process' `state()`, of the same network and names, on other pictures.

        Raises:
            ValueError: other names than here.
        """
        if not state["real"]["count"]:
            return
        self._require_same(state["reconstructions"])
        self._real.merge(state["real"])
        for name, moments in state["reconstructions"].items():
            self._reconstructions.setdefault(name, self._empty()).merge(moments)

    def compute(self, name: str) -> FrechetResult:
        """The distance between the pictures and the reconstructions of a name so far.

        Raises:
            KeyError: there were pictures, but no reconstructions of this name.
        """
        images, features = self._real.count, self.num_features
        if images and name not in self._reconstructions:
            raise KeyError(name)
        if images < 2:
            note = f"a covariance takes two pictures, and there are {images}"
            return FrechetResult(None, features, images, note)
        pair = self._real.statistics(), self._reconstructions[name].statistics()
        # Of a rank-deficient covariance, torch-fidelity's eigenvalues round to about 1e-5 of the
        # distance, and of equal sets to just below 0.
        distance = max(0.0, fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID])
        return FrechetResult(distance, features, images, _note(images, features))

    def _require_same(self, names: Mapping[str, Any]) -> None:
        if self._real.count and names.keys() != self._reconstructions.keys():
            raise ValueError(f"the reconstructions were {', '.join(self._reconstructions)} before")

    def _empty(self) -> _Moments:
        # MPS has no float64.
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        return _Moments(self.num_features, device)

    def _features(self, name: str, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            images = to_uint8(images)
        images = shown(images) if has_colours(images.shape[1]) else images
        with full_precision():
            features = self.network(images.to(self.device))
        # This waits for the GPU; one bad batch found at the end would cost the whole measurement.
        if not features.isfinite().all():
            raise UserError(f"features of {name} are not finite: the network's weights are broken")
        return features.to(self._real.mean.device).double()


def _note(images: int, features: int) -> str | None:
    if images <= features:
        why = f"{images} pictures for {features} features make a rank-deficient covariance"
    elif images < _ENOUGH_PICTURES:
        why = f"{images} pictures are fewer than {_ENOUGH_PICTURES}"
    else:
        return None
    return f"{why}: the value is biased; compare it only at the same number of pictures"
