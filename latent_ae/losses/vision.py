"""A frozen vision model of `transformers`: pictures in, a map of features out."""

from __future__ import annotations

import inspect
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from latent_ae.errors import UserError

__all__ = ["VisionModel"]

_KEY = "losses.alignment.model"


class VisionModel(nn.Module):
    """A map of features from any vision backbone that gives one.

    Taken are models whose last hidden state is a map (ConvNeXt, ResNet) or a row of patches
    (ViT, DINOv2, CLIP, SigLIP, Swin): class and register tokens, which stand before the patches,
    are left out. The picture is squeezed to a square of the model's size and normalised as its
    image processor does. Nothing here is trained or saved.

    Args:
        name: a folder or a hub name.
        resolution: side in pixels of that square; the image processor's when left out.
        untrained: take random weights, where only shapes matter.

    Attributes:
        channels: of the features.
        grid: side of the map of features.

    Raises:
        UserError: `transformers` is missing, or the model cannot be loaded or gives no such map.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, resolution: int | None = None, *, untrained: bool = False
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # random weights must not move the run's draws
            self.model, processor = _load(name, untrained)
        if self.model.main_input_name != "pixel_values":
            raise UserError(f"{_KEY} {name} is a {type(self.model).__name__}, no vision model")
        self.name, self.resolution = name, resolution or _side(processor, self.model.config)
        self._options: dict[str, Any] = {}
        if "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:
            self._options["interpolate_pos_encoding"] = True
        mean, std = [0.0], [1.0]
        if processor.do_normalize:
            mean, std = processor.image_mean, processor.image_std
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.requires_grad_(False).eval()
        self.grid, self.prefix = 0, 0
        self.channels = self._probe(untrained)

    def train(self, mode: bool = True) -> VisionModel:
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of shape (B, D, grid, grid), of images of shape (B, 3, H, W) in [-1, 1]."""
        hidden = self._hidden(images)
        if hidden.dim() == 4:
            return hidden
        patches = hidden[:, self.prefix :].transpose(1, 2)
        return patches.unflatten(2, (self.grid, self.grid))

    def _hidden(self, images: Tensor) -> Tensor:
        sides = (self.resolution, self.resolution)
        if images.shape[-2:] != sides:
            images = F.interpolate(images, sides, mode="bicubic", antialias=True)
        pixels = (images.clamp(-1, 1) / 2 + 0.5 - self.mean) / self.std
        answer = self.model(pixels, **self._options)
        return answer.last_hidden_state.float()

    @torch.no_grad()
    def _probe(self, untrained: bool) -> int:
        """Looks at what the model gives: sets the layout of its features, returns D."""
        side = self.resolution
        picture = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)
        try:
            hidden = self._hidden(picture)
            # Masked autoencoders drop and shuffle patches at random, in eval mode too.
            steady = untrained or torch.equal(hidden, self._hidden(picture))
        except Exception as error:  # the model's own kinds
            raise self._refusal(f"takes no picture of {side} pixels ({_first(error)})") from error
        if not steady:
            raise self._refusal("answers the same picture differently each time")
        if hidden.dim() == 4:
            self.grid = hidden.shape[-1]
            if self.grid == 1:
                raise self._refusal(f"answers a picture of {side} pixels with a single feature")
            return hidden.shape[1]
        if hidden.dim() != 3:
            raise self._refusal(f"answers with shape {tuple(hidden.shape)}")
        tokens, patch = hidden.shape[1], getattr(self.model.config, "patch_size", None)
        patch = patch if isinstance(patch, int) else max(patch or (side,))
        self.grid = side // patch
        if not 1 < self.grid**2 <= tokens:  # it pools its patches, as Swin does
            self.grid = math.isqrt(tokens)
            if self.grid**2 != tokens:
                raise self._refusal(f"answers with {tokens} tokens that fill no square")
        self.prefix = tokens - self.grid**2
        return hidden.shape[2]

    def _refusal(self, what: str) -> UserError:
        kind = type(self.model).__name__
        return UserError(
            f"{_KEY} {self.name} ({kind}) gives no map of features: it {what}; name a vision "
            "backbone such as DINOv2, ViT, CLIP or ConvNeXt"
        )


def _load(name: str, untrained: bool) -> tuple[Any, Any]:
    """The model, of a model of pictures and text its eye, and the image processor."""
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel
        from transformers.initialization import no_init_weights
    except ImportError as error:
        raise UserError(
            "losses.alignment needs the package transformers: pip install 'latent_ae[alignment]'"
        ) from error
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        if untrained:
            # Some models read numbers while they are built, which a count of memory has none of.
            # Their weights are never written, so they take no memory in earnest.
            with unset_fake_temporarily(), no_init_weights():
                model: Any = AutoModel.from_config(AutoConfig.from_pretrained(name))
        else:
            # In fp32, whatever the file's type: the run's precision is autocast's. Never a pickle.
            model = AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
    except Exception as error:  # transformers', the hub's and the file system's
        needed = "config.json, model.safetensors and preprocessor_config.json"
        if Path(name).is_dir():
            message = f"{_KEY} {name} cannot be loaded ({_first(error)}): it needs {needed}"
        else:
            offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}
            why = "HF_HUB_OFFLINE is set" if offline else _first(error)
            message = (
                f"{_KEY} {name} is no folder, and cannot be taken from the hub ({why}): give a "
                f"folder with {needed}, or a name on the hub"
            )
        raise UserError(message) from error
    return getattr(model, "vision_model", model), processor


def _side(processor: Any, config: Any) -> int:
    """The side of the square that an image processor makes, in pixels."""
    sizes = [processor.crop_size] if getattr(processor, "do_center_crop", False) else []
    for size in (*sizes, processor.size):
        for key in ("height", "shortest_edge"):
            value = getattr(size, key, None) or (size.get(key) if isinstance(size, dict) else None)
            if value:
                return int(value)
    return int(getattr(config, "image_size", 224))


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
