"""LDM's first stage, written anew from its published names and formulas: a reference for tests.

The names are those of CompVis/latent-diffusion's checkpoints; nothing here comes from diffusers or
from latent_ae. `groups` and `quant` are what SD3's and FLUX's code leaves out or fixes.
"""

import torch
import torch.nn.functional as F
from torch import nn


def swish(x):
    return x / (1 + torch.exp(-x))


class Residual(nn.Module):
    def __init__(self, inside, outside, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inside, eps=1e-6)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outside, eps=1e-6)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else None

    def forward(self, x):
        update = self.conv1(swish(self.norm1(x)))
        update = self.conv2(swish(self.norm2(update)))
        return update + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """One head over all positions; its projections are 1 × 1 convolutions."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2) for part in (self.q, self.k, self.v))
        weights = torch.einsum("bci,bcj->bij", q, k).div(q.shape[1] ** 0.5).softmax(-1)
        mixed = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
        return x + self.proj_out(mixed)


class Middle(nn.Module):
    def __init__(self, channels, groups, attention):
        super().__init__()
        self.block_1 = Residual(channels, channels, groups)
        self.attn_1 = Attention(channels, groups) if attention else nn.Identity()
        self.block_2 = Residual(channels, channels, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Sampler(nn.Module):
    def __init__(self, channels, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=int(up))

    def forward(self, x):
        if self.up:
            return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # to the right and below alone


class Level(nn.Module):
    def __init__(self, inside, outside, blocks, groups, attention):
        super().__init__()
        widths = [inside] + [outside] * blocks
        self.block = nn.ModuleList(Residual(a, outside, groups) for a in widths[:-1])
        self.attn = nn.ModuleList(Attention(outside, groups) for _ in range(blocks * attention))

    def forward(self, x):
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        for name in ("downsample", "upsample"):
            x = getattr(self, name, nn.Identity())(x)
        return x


class Side(nn.Module):
    """Encoder and decoder: the same parts in opposite orders."""

    def __init__(self, decoder, inside, outside, ch, ch_mult, blocks, attention, mid, groups):
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        last = len(widths) - 1
        self.decoder = decoder
        self.conv_in = nn.Conv2d(inside, widths[-1] if decoder else ch, 3, padding=1)
        levels, width = {}, widths[-1] if decoder else ch
        for i in range(last, -1, -1) if decoder else range(last + 1):
            levels[i] = Level(width, widths[i], blocks + decoder, groups, attention[i])
            width = widths[i]
            if decoder and i > 0:
                levels[i].upsample = Sampler(width, True)
            if not decoder and i < last:
                levels[i].downsample = Sampler(width, False)
        ordered = nn.ModuleList(levels[i] for i in range(last + 1))
        setattr(self, "up" if decoder else "down", ordered)
        self.mid = Middle(widths[-1], groups, mid)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, outside, 3, padding=1)

    def forward(self, x):
        parts = [self.mid, *reversed(self.up)] if self.decoder else [*self.down, self.mid]
        x = self.conv_in(x)
        for part in parts:
            x = part(x)
        return self.conv_out(swish(self.norm_out(x)))


class FirstStage(nn.Module):
    """LDM's `AutoencoderKL` from the keys of its YAML."""

    def __init__(self, ddconfig, groups=32, quant=True):
        super().__init__()
        d = ddconfig
        sides = [d["resolution"] // 2**i for i in range(len(d["ch_mult"]))]
        attention = [side in d["attn_resolutions"] for side in sides]
        common = (d["ch"], d["ch_mult"], d["num_res_blocks"], attention)
        common += (d.get("attn_type") != "none", groups)
        z = d["z_channels"]
        self.encoder = Side(False, d["in_channels"], 2 * z, *common)
        self.decoder = Side(True, z, d["out_ch"], *common)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if quant else None
        self.post_quant_conv = nn.Conv2d(z, z, 1) if quant else None

    def encode(self, images):
        moments = self.encoder(images)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(self, latents):
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)
