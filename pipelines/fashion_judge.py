"""What the Fashion-MNIST example is judged by, with means that no part of it was trained for.

A small classifier, taught on real training pictures alone, tells whether a drawing is of the class
that it was asked for; Fréchet distances, on AlexNet's features and on the classifier's, tell how
far a set of drawings lies from real pictures; the nearest training picture tells copies apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from latent_ae.evaluation import FEATURE_NETWORKS, FrechetDistance

__all__ = ["Classifier", "measure", "taught_classifier"]

BATCH = 250


class Classifier(nn.Module):
    """A convolutional network of 0.12 M weights on 32² pictures; its `forward` gives features.

    Args:
        classes: how many.
    """

    num_features = 64

    def __init__(self, classes: int) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

        layers = [*block(1, 32), *block(32, 64), *block(64, 64), nn.Flatten()]
        layers += [nn.LazyLinear(self.num_features), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(self.num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features of shape (B, 64) of uint8 pictures (B, 3, H, W), whose colours are averaged."""
        grey = images.float().mean(1, keepdim=True) / 127.5 - 1
        return self.features(grey)

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """The likeliest class of each picture (uint8, shape (B, 3, H, W)), int64 of shape (B,)."""
        return torch.cat([self.head(self(part)).argmax(1) for part in images.split(BATCH)])


def taught_classifier(
    file: Path, images: Tensor, labels: Tensor, classes: int, epochs: int
) -> Classifier:
    """The classifier of `file`, or one taught now and written there.

    Args:
        file: a safetensors file.
        images: uint8 of shape (N, 3, H, W).
        labels: int64 of shape (N,).
        classes: how many.
        epochs: passes over the pictures.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(classes)
        model(images[:2])  # gives the lazy layer its size
        if file.exists():
            model.load_state_dict(load_file(file))
        else:
            _teach(model.train(), images, labels, epochs)
            aside = file.with_suffix(".tmp")
            save_file(model.state_dict(), aside)
            aside.rename(file)
    return model.eval().requires_grad_(False)


def _teach(model: Classifier, images: Tensor, labels: Tensor, epochs: int) -> None:
    batch = min(128, len(images))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(2, steps))
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            if len(rows) < batch:
                continue
            loss = functional.cross_entropy(model.head(model(images[rows])), labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def measure(
    sets: Mapping[str, Tensor],
    labels: Tensor,
    reference: Tensor,
    train: Tensor,
    classifier: Classifier,
) -> dict[str, dict[str, Any]]:
    """The numbers of each set of pictures.

    Args:
        sets: by name, uint8 of shape (N, 3, H, W), all of the same classes in the same order.
        labels: those classes, int64 of shape (N,).
        reference: as many real pictures, of which `sets` holds none.
        train: the real pictures that everything was trained on.
        classifier: taught on `train`.

    Returns:
        By name: `recognised`, the share whose class the classifier says; `frechet_alexnet` and
        `frechet_classifier`, the distances to `reference`; `nearest`, the median over pictures of
        the root mean square difference to the nearest of `train`, in grey levels.
    """
    networks = {"alexnet": FEATURE_NETWORKS["alexnet"](None), "classifier": classifier}
    distances = {name: FrechetDistance(network, name=name) for name, network in networks.items()}
    for rows in torch.arange(len(labels)).split(BATCH):
        batch = {name: pictures[rows] for name, pictures in sets.items()}
        for distance in distances.values():
            distance.update(reference[rows], batch)
    numbers: dict[str, dict[str, Any]] = {}
    for name, pictures in sets.items():
        right = classifier.classify(pictures) == labels
        numbers[name] = {"recognised": right.float().mean().item()}
        for kind, distance in distances.items():
            numbers[name][f"frechet_{kind}"] = distance.compute(name).distance
        numbers[name]["nearest"] = _nearest(pictures, train).median().item()
    return numbers


def _nearest(pictures: Tensor, train: Tensor) -> Tensor:
    """Root mean square difference to the nearest training picture, in grey levels, shape (N,)."""
    known = train.float().mean(1).flatten(1)
    found = [
        torch.cdist(part.float().mean(1).flatten(1), known).amin(1)
        for part in pictures.split(BATCH)
    ]
    return torch.cat(found) / math.sqrt(known.shape[1])
