"""A network that starts as the best linear code of the data, instead of as noise.

Block by block, the principal components of 2 × 2 neighbourhoods (a Karhunen–Loève transform, the
optimum of transform coding: Goyal 2001) are written into the encoder's downsampling convolutions,
and their least-squares synthesis into the decoder. Everything else passes signals through. Training
then begins near the quality of a good linear codec, and is spent on what such codecs cannot do.

Two devices carry a signal unchanged through parts that are not linear:

- SiLU: silu(s) − silu(−s) = s exactly, so each signal enters the last activation with its negative.
- GroupNorm: beside the signals stands a constant ±K, much larger than they are, so that the group's
  variance hardly depends on the picture, and its mean is zero.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional

from latent_ae.errors import UserError

__all__ = ["linear_code_", "zero_residual_branches_"]

Residual: TypeAlias = AutoencoderKL | VQModel

_CONSTANT = 6.0  # K, beside signals of standard deviation _SIGNAL
_SIGNAL = 0.5
_LOGVAR = -6.0  # a posterior 20 times narrower than the latents' unit variance
_ROWS = 40_000  # positions that a least-squares fit looks at
_RIDGE = 1e-4
_LATENTS = "latent_channels"


def zero_residual_branches_(network: Residual) -> None:
    """Makes each residual block the identity at the start (Goyal et al. 2017, §5.1)."""
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            _zero_(module.conv2)


@torch.no_grad()
def linear_code_(network: Residual, images: Tensor) -> None:
    """Overwrites the weights of an untrained network so that it is a linear transform codec.

    Args:
        network: of two levels or more, without attention in its middle.
        images: training crops to take the components from, of shape (B, C, H, W), in [-1, 1]; a
            hundred of 64² will do. Random positions come from torch's global generator.

    Raises:
        UserError: the network is too narrow to carry the signals, has attention, or quantises other
            channels than its latents.
    """
    if network.config["mid_block_add_attention"]:
        raise UserError("network.init linear needs network.mid_block_add_attention: false")
    if len(network.config["block_out_channels"]) < 2:
        raise UserError("network.init linear needs two block_out_channels or more")
    if images.shape[1] > network.config["block_out_channels"][0]:
        raise UserError(
            f"network.init linear: the first of block_out_channels must hold the "
            f"{images.shape[1]} channels of a picture"
        )
    if (quantised := network.config.get("vq_embed_dim")) not in (None, network.config[_LATENTS]):
        raise UserError(
            f"network.init linear: {quantised} channels are quantised, so latent_channels is "
            f"{quantised} too or left out"
        )
    zero_residual_branches_(network)
    for module in network.modules():
        if isinstance(module, ResnetBlock2D) and isinstance(module.conv_shortcut, nn.Conv2d):
            _write_(module.conv_shortcut, _eye(module.conv_shortcut), 0)
    for conv in (network.quant_conv, network.post_quant_conv):
        if conv is not None:
            _write_(conv, _eye(conv), 0)
    features = _set_encoder_(network, images)
    latents = _read_out_latents_(network, images, features[-1])
    _set_decoder_(network, images, latents, features)


def _set_encoder_(network: Residual, images: Tensor) -> list[Tensor]:
    """Writes the analysis; returns the features of each level, the image first, coarsest last."""
    encoder: nn.Module = network.encoder
    _write_(encoder.conv_in, _eye(encoder.conv_in), 0)  # pyright: ignore
    features, blocks = [images], list(encoder.down_blocks)  # pyright: ignore
    scale = torch.ones(images.shape[1])
    for block in blocks[:-1]:
        conv: nn.Conv2d = block.downsamplers[0].conv  # pyright: ignore
        weight, bias, scale = _components(features[-1], scale, conv.out_channels)
        _write_(conv, weight, bias)
        # diffusers pads the right and the lower edge only, so cell (i, j) sees rows 2i to 2i + 2.
        padded = functional.pad(features[-1], (0, 1, 0, 1))
        features.append(functional.conv2d(padded, weight, bias, stride=2))
    return features


def _read_out_latents_(network: Residual, images: Tensor, coarsest: Tensor) -> Tensor:
    """Brings the leading components through the encoder's last norm; returns the latents."""
    encoder, channels = network.encoder, network.config[_LATENTS]
    if coarsest.shape[1] < channels:
        raise UserError(
            f"network.init linear: the encoder gives {coarsest.shape[1]} components, fewer than "
            f"the {channels} latent_channels"
        )
    blocks = list(encoder.down_blocks)
    last = _entrance(blocks[-1].resnets) or blocks[-2].downsamplers[0].conv  # pyright: ignore
    _pair_(last, channels, network.config["norm_num_groups"])
    hidden = encoder.conv_in(images)
    for block in blocks:
        hidden = block(hidden)
    activated = encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(hidden)))
    weight, bias = _fit(activated, coarsest[:, :channels] / _SIGNAL, kernel=1)
    nn.init.zeros_(encoder.conv_out.weight)
    nn.init.constant_(encoder.conv_out.bias, _LOGVAR)  # pyright: ignore
    _write_(encoder.conv_out, weight, bias)
    return encoder.conv_out(activated)[:, :channels]


def _set_decoder_(
    network: Residual, images: Tensor, latents: Tensor, features: list[Tensor]
) -> None:
    """Writes the synthesis, level by level, each fitted to what the levels before it give."""
    decoder, levels = network.decoder, list(features)
    target = levels.pop()[:, : decoder.conv_in.out_channels]
    _write_(decoder.conv_in, *_fit(latents, target, kernel=3))
    hidden = decoder.mid_block(decoder.conv_in(latents))
    blocks = list(decoder.up_blocks)
    coarse = hidden
    for block in blocks[:-1]:
        for resnet in block.resnets:  # pyright: ignore
            hidden = resnet(hidden, None)
        coarse = hidden
        conv = block.upsamplers[0].conv  # pyright: ignore
        target = levels.pop()[:, : conv.out_channels]
        enlarged = functional.interpolate(hidden, scale_factor=2.0, mode="nearest")
        _write_(conv, *_fit(enlarged, target, kernel=3))
        hidden = block.upsamplers[0](hidden)  # pyright: ignore
    last = _entrance(blocks[-1].resnets) or blocks[-2].upsamplers[0].conv  # pyright: ignore
    _pair_(last, images.shape[1], network.config["norm_num_groups"])
    if last is blocks[-2].upsamplers[0].conv:  # pyright: ignore  # else nothing before has changed
        hidden = blocks[-2].upsamplers[0](coarse)  # pyright: ignore
    activated = decoder.conv_act(decoder.conv_norm_out(blocks[-1](hidden)))
    _write_(decoder.conv_out, *_fit(activated, images, kernel=1))


def _components(features: Tensor, scale: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading principal components of 2 × 2 neighbourhoods as a convolution of stride 2.

    Args:
        features: of shape (B, C, H, W).
        scale: what each of them was multiplied by, of shape (C,). The components are those of the
            features before that, whose energies are the picture's; they are ordered by energy.
        count: at most this many components; there are 4·C.

    Returns:
        A weight of shape (n, C, 3, 3), whose third row and column are zero, a bias of shape (n,),
        so that the outputs have mean 0 and standard deviation `_SIGNAL`, and their scale.
    """
    patches = functional.unfold(features, 2, stride=2).transpose(1, 2).flatten(0, 1).double()
    scales = scale.double().repeat_interleave(4)
    mean = patches.mean(0)
    variance, vectors = torch.linalg.eigh(torch.cov((patches / scales).T))
    order = torch.arange(len(variance) - 1, -1, -1)[:count]
    gain = _SIGNAL / variance[order].clamp(min=1e-8).sqrt()
    analysis = (vectors[:, order] * gain).T / scales
    weight = torch.zeros(len(order), features.shape[1], 3, 3)
    weight[:, :, :2, :2] = analysis.float().unflatten(1, (-1, 2, 2))
    return weight, -(analysis @ mean).float(), gain.float()


def _pair_(conv: nn.Conv2d, signals: int, groups: int) -> None:
    """Rearranges a convolution's outputs for the norm and SiLU that follow.

    In each group of channels: pairs (s, −s) of its first `signals` outputs, as many as fit, and
    (K, −K) at the end. Outputs that belong to no pair keep their weights.
    """
    size = conv.out_channels // groups
    fit = (size - 2) // 2
    if fit < 1 or fit * groups < signals:
        raise UserError(
            f"network.init linear: {conv.out_channels} channels in {groups} groups cannot carry "
            f"{signals} signals; take fewer norm_num_groups or more block_out_channels"
        )
    bias = conv.bias
    assert bias is not None
    weight_of, bias_of = conv.weight[:signals].clone(), bias[:signals].clone()
    spare = [conv.weight[signals:].clone(), bias[signals:].clone()]
    taken = []
    for signal in range(signals):
        group, place = signal % groups, signal // groups
        for channel, sign in ((0, 1.0), (1, -1.0)):
            row = group * size + 2 * place + channel
            conv.weight[row], bias[row] = sign * weight_of[signal], sign * bias_of[signal]
            taken.append(row)
    for group in range(groups):
        for row, sign in ((size - 2, 1.0), (size - 1, -1.0)):
            conv.weight[group * size + row] = 0
            bias[group * size + row] = sign * _CONSTANT
            taken.append(group * size + row)
    free = [row for row in range(conv.out_channels) if row not in taken]
    conv.weight[free], bias[free] = spare[0][: len(free)], spare[1][: len(free)]


def _fit(inputs: Tensor, target: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """Ridge regression of `target` on the neighbourhoods of `inputs`, as a convolution.

    Args:
        inputs: of shape (B, C, h, w).
        target: of shape (B, D, h, w).
        kernel: 1 or 3, the side of the neighbourhood.

    Returns:
        A weight of shape (D, C, 3, 3) and a bias of shape (D,).
    """
    reach = kernel // 2
    patches = inputs.unfold(2, kernel, 1).unfold(3, kernel, 1)  # a view: (B, C, h′, w′, k, k)
    count, _, height, width = patches.shape[:4]
    # Only what the fit looks at is copied; all the neighbourhoods take gigabytes.
    rows = torch.randperm(count * height * width)[:_ROWS]
    image, top, left = rows // (height * width), rows // width % height, rows % width
    x = patches[image, :, top, left].flatten(1).double()
    y = target[image, :, top + reach, left + reach].double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    normal = x.T @ x
    normal.diagonal().add_(_RIDGE * normal.diagonal().mean())
    solution = torch.linalg.solve(normal, x.T @ y).T
    weight = torch.zeros(len(solution), inputs.shape[1], 3, 3)
    window = slice(1 - reach, 2 + reach)
    weight[:, :, window, window] = solution.float().unflatten(1, (-1, kernel, kernel))
    return weight, (y_mean - solution @ x_mean).float()


def _entrance(resnets: nn.ModuleList | None) -> nn.Conv2d | None:
    """The 1 × 1 convolution by which a block changes the number of channels, if it does."""
    if not resnets:
        return None
    shortcut = resnets[0].conv_shortcut
    return shortcut if isinstance(shortcut, nn.Conv2d) else None


def _eye(conv: nn.Conv2d) -> Tensor:
    """The weight that passes as many channels as there are on both sides."""
    count = min(conv.in_channels, conv.out_channels)
    weight = torch.zeros(count, conv.in_channels, *conv.kernel_size)
    middle = conv.kernel_size[0] // 2
    weight[range(count), range(count), middle, middle] = 1
    return weight


def _write_(conv: nn.Conv2d, weight: Tensor, bias: Tensor | float) -> None:
    """Replaces the first rows of a convolution; inputs that `weight` lacks count for nothing."""
    rows, inputs = weight.shape[:2]
    conv.weight[:rows] = 0
    conv.weight[:rows, :inputs] = weight
    if conv.bias is not None:
        conv.bias[:rows] = bias


def _zero_(conv: nn.Conv2d) -> None:
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
