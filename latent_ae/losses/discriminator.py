"""The PatchGAN discriminator, in LDM's layout, safe under several processes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.utils import parametrizations

from latent_ae.config import DiscriminatorConfig
from latent_ae.errors import UserError

__all__ = ["NLayerDiscriminator", "load_discriminator", "save_discriminator"]

_METADATA = "latent_ae.discriminator"


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the pictures of all processes, on any device.

    torch's `SyncBatchNorm` does the same but refuses a CPU; the state is that of `BatchNorm2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x of shape (B, C, H, W) over B, H, W and the processes."""
        if not self.training:
            return super().forward(x)
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        mean = _over_processes(x.float().mean((0, 2, 3))) / world
        centred = x.float() - mean[:, None, None]
        variance = _over_processes(centred.square().mean((0, 2, 3))) / world
        with torch.no_grad():
            count = world * x.numel() / x.shape[1]
            # What is no number belongs to an update that is skipped, and is not remembered.
            finite = mean.isfinite() & variance.isfinite()
            share = finite * self.momentum  # pyright: ignore[reportOperatorIssue]
            unbiased = variance * count / (count - 1)
            self.running_mean.lerp_(torch.where(finite, mean, 0), share)  # pyright: ignore
            self.running_var.lerp_(torch.where(finite, unbiased, 0), share)  # pyright: ignore
            self.num_batches_tracked += 1  # pyright: ignore[reportOperatorIssue]
        gain = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * gain[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def _over_processes(values: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return values
    from torch.distributed.nn.functional import all_reduce  # differentiable

    return all_reduce(values)


class NLayerDiscriminator(nn.Module):
    """A convolutional network with one verdict a patch (PatchGAN; Isola et al. 2017).

    Layer by layer the network of `taming/modules/discriminator/model.py`, which LDM uses, under the
    same parameter names, so that its weights load with `norm: batch`. GroupNorm, the default here,
    keeps every picture's verdict independent of its batch and of the number of processes.

    Args:
        config: depth, width and normalisation.
        in_channels: of the pictures.
    """

    def __init__(self, config: DiscriminatorConfig, in_channels: int = 3) -> None:
        super().__init__()
        self.config, self.in_channels = config, in_channels
        widths = [config.channels * min(2**n, 8) for n in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, 2, 1), _activation()]
        for n in range(1, config.layers + 1):
            stride = 2 if n < config.layers else 1
            bias = config.norm != "batch"  # the batch's mean would take it away
            layers.append(nn.Conv2d(widths[n - 1], widths[n], 4, stride, 1, bias=bias))
            layers += [*_norm(config.norm, widths[n]), _activation()]
        layers.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)
        self._initialize()

    def _initialize(self) -> None:
        for module in list(self.main):
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if self.config.spectral_norm:
                    parametrizations.spectral_norm(module)
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Verdicts, higher for real, of shape (B, 1, h, w), in fp32.

        Args:
            images: of shape (B, C, H, W), in [-1, 1].
        """
        return self.main(images).float()

    @property
    def smallest_side(self) -> int:
        """The smallest picture, in pixels, for which there is a verdict."""
        side = 1
        for module in reversed(list(self.main)):
            if isinstance(module, nn.Conv2d):
                side = (side - 1) * module.stride[0] + 4 - 2  # kernel 4, padding 1
        return side

    @property
    def receptive_field(self) -> int:
        """How many pixels a side one verdict sees."""
        side = 1
        for module in reversed(list(self.main)):
            if isinstance(module, nn.Conv2d):
                side = (side - 1) * module.stride[0] + 4
        return side


def _activation() -> nn.Module:
    return nn.LeakyReLU(0.2, inplace=True)


def _norm(name: str, channels: int) -> list[nn.Module]:
    if name == "group":  # at least 4 channels a group, at most 32 groups
        return [nn.GroupNorm(max(1, math.gcd(128, channels) // 4), channels)]
    return [GlobalBatchNorm(channels)] if name == "batch" else []


def save_discriminator(discriminator: NLayerDiscriminator, path: Path) -> None:
    """Writes the weights as safetensors, with the layout in the file's metadata."""
    layout = json.dumps({name: getattr(discriminator.config, name) for name in _layout_keys()})
    state = {name: value.contiguous() for name, value in discriminator.state_dict().items()}
    save_file(state, path, {_METADATA: layout})


def load_discriminator(
    path: str | Path, layout: DiscriminatorConfig | None = None
) -> NLayerDiscriminator:
    """Reads what `save_discriminator` wrote, or LDM's `loss.discriminator.main.*`.

    Args:
        path: a safetensors file.
        layout: of a file that does not tell its own, as LDM's does not.

    Raises:
        UserError: there is no such file, or it is of another kind.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no discriminator at {path}")
    try:
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get(_METADATA)
            names = [name for name in file.keys() if "main." in name]  # noqa: SIM118
            state = {name[name.index("main.") :]: file.get_tensor(name) for name in names}
        if told is not None:
            layout = DiscriminatorConfig(**json.loads(told))
        # The first convolution tells the channels, whatever spectral_norm calls its weight.
        first = next(value for name, value in state.items() if value.ndim == 4 and ".0." in name)
        discriminator = NLayerDiscriminator(layout or DiscriminatorConfig(), first.shape[1])
        discriminator.load_state_dict(state)
    except Exception as error:  # safetensors', json's, pydantic's and torch's
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} holds no such discriminator: {reason}") from error
    return discriminator


def _layout_keys() -> list[str]:
    return list(DiscriminatorConfig.model_fields)
