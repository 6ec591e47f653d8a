"""LPIPS with gradients where they belong, and with weights that need no download."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from latent_ae.channels import as_rgb
from latent_ae.errors import UserError

if TYPE_CHECKING:
    import lpips

__all__ = ["PerceptualLoss", "load_backbone"]

_NORM_EPSILON = 1e-10  # lpips.normalize_tensor's
_DRAWS = {
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    # These come as a whole, before the calls of a tensor's that they make.
    nn.init.kaiming_normal_,
    nn.init.kaiming_uniform_,
    nn.init.normal_,
    nn.init.uniform_,
}


class _Undrawn(TorchFunctionMode):
    """Within it, parameters keep what lay in their memory, and the random state stays.

    For modules whose every parameter is loaded thereafter. Buffers are drawn as ever: those that no
    file holds must be what the module makes them.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **kwargs)


def load_backbone(net: str, path: str | None = None, *, untrained: bool = False) -> lpips.LPIPS:
    """A frozen `lpips.LPIPS` v0.1 in eval mode.

    Args:
        net: `alex` (the ImageNet backbone ships with this package, in fp16) or `vgg`.
        path: a safetensors file of torchvision's ImageNet weights under torchvision's names
            (`features.0.weight`, …) to use instead.
        untrained: take random weights, where only shapes matter.

    Raises:
        UserError: the file lacks weights of this backbone, or VGG16 is neither given nor fetched.
    """
    import lpips  # here, because most verbs have no such distance and need not load its parts

    if untrained:
        path = None
    elif path is None and net == "alex":
        path = str(files("latent_ae") / "assets" / "lpips_alexnet.safetensors")
    # The random weights that lpips begins with must not move the posterior noise of a run.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # lpips 0.1.4 asks torchvision in the deprecated way.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        try:
            random = untrained or path is not None
            # Drawing AlexNet's sixty million weights would take longer than all else here.
            with nullcontext() if untrained else _Undrawn():
                model = lpips.LPIPS(
                    net=net, pnet_rand=random, pretrained=not untrained, verbose=False
                )
        except Exception as error:  # urllib's, the hub's or the file system's
            raise UserError(
                f"the {net} backbone of LPIPS cannot be fetched by torchvision ({error}); where "
                "there is no network, give a safetensors file of torchvision's weights as "
                "`losses.perceptual.path`"
            ) from error
    if path is not None:
        _load_features(model, path, net)
    # lpips leaves the linear layers trainable; a metric must not move.
    return model.requires_grad_(False).eval()


def _load_features(model: lpips.LPIPS, path: str, net: str) -> None:
    if not Path(path).is_file():
        raise UserError(f"there is no file {path} with the {net} backbone of LPIPS")
    try:
        features = load_file(path)
    except Exception as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error
    state = {}
    for name in model.net.state_dict():  # slice1.0.weight ← features.0.weight
        wanted = "features." + name.split(".", 1)[1]
        if wanted not in features:
            raise UserError(f"{path} has no {wanted}: it is no {net} backbone of torchvision's")
        state[name] = features[wanted].float()
    try:
        model.net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} holds another network than torchvision's {net}") from error


class PerceptualLoss(nn.Module):
    """The learned perceptual distance LPIPS v0.1 (Zhang et al. 2018).

    The modules are lpips' own. The forward pass is ours: the target's features build no graph, and
    features are normalised and compared in fp32, where lpips' ε of 1e-10 is not lost (in fp16 it is
    0, and a flat image gives NaN).
    """

    def __init__(
        self, net: str = "alex", path: str | None = None, *, untrained: bool = False
    ) -> None:
        super().__init__()
        self.lpips = load_backbone(net, path, untrained=untrained)

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stays in eval mode: lpips' dropout has no place in a loss."""
        return super().train(False)

    def forward(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        """The distance of each pair of images; returns (B,).

        Args:
            target: of shape (B, C, H, W), in [-1, 1]; C is 1 (seen as grey RGB), 3, or 4 (seen over
                white: `channels.as_rgb`).
            reconstruction: likewise.
        """
        with torch.no_grad():
            wanted = self._features(target)
        distance = torch.zeros(len(target), device=target.device)
        for layer, (a, b) in zip(
            self.lpips.lins, zip(wanted, self._features(reconstruction), strict=True), strict=True
        ):
            with torch.autocast(target.device.type, enabled=False):
                difference = (_unit(a.float()) - _unit(b.float())).square()
                distance = distance + layer(difference).mean(dim=(1, 2, 3))
        return distance

    def _features(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.lpips.net(self.lpips.scaling_layer(as_rgb(images)))


def _unit(features: Tensor) -> Tensor:
    # vector_norm's gradient at 0 is 0, where sqrt(sum(x²))'s is NaN.
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (norm + _NORM_EPSILON)
