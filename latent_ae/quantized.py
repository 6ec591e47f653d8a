"""Quantisers, and diffusers' `VQModel` with any of them.

This file needs torch and diffusers alone. A folder whose quantiser `VQModel` does not know carries
a copy of it: `diffusers.AutoModel.from_pretrained(FOLDER, trust_remote_code=True)` loads it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import VQModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

__all__ = [
    "FiniteScalarQuantizer",
    "LookupFreeQuantizer",
    "QuantizedAutoencoder",
    "Quantizer",
    "VectorQuantizer",
    "nearest",
]

_FILE = "quantized.py"  # its name in a saved folder
_DISTANCES = {"cpu": 2**20}  # computed at once: what stays in the processor's cache
_MOST_DISTANCES = 2**25  # on other devices


def _exact(values: Tensor) -> Tensor:
    """In fp32, or in float64 where they are: in 16 bits many entries would be equally near."""
    return values if values.dtype == torch.float64 else values.float()


@torch.no_grad()
def nearest(vectors: Tensor, entries: Tensor) -> Tensor:
    """The number of the entry, of shape (K, d), nearest to each vector, of shape (N, d).

    By the distances that diffusers' `VectorQuantizer` computes, so that both round alike. Of two
    equally near it is the first.
    """
    if torch.compiler.is_compiling():  # N is no number there
        return torch.cdist(vectors, entries).argmin(1)
    rows = max(64, _DISTANCES.get(vectors.device.type, _MOST_DISTANCES) // len(entries))
    return torch.cat([torch.cdist(some, entries).argmin(1) for some in vectors.split(rows)])


class Quantizer(nn.Module):
    """From latents to numbers of codes and back, without gradients of its own.

    Attributes:
        size: how many different numbers a code can have.
        codes: how many codes a position has.
    """

    size: int
    codes: int = 1

    def bounded(self, latents: Tensor) -> Tensor:
        """The latents where the codes lie, of the same shape (B, c, h, w), in fp32 or more."""
        return _exact(latents)

    def indices(self, latents: Tensor) -> Tensor:
        """The numbers of the codes, int64 of shape (B, codes, h, w).

        Args:
            latents: as the encoder gives them, of shape (B, c, h, w).
        """
        raise NotImplementedError

    def entries(self, indices: Tensor) -> Tensor:
        """What the decoder receives for numbers of shape (B, codes, h, w): (B, c, h, w)."""
        raise NotImplementedError

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """What diffusers' `VectorQuantizer` returns: entries, a loss of 0, and the numbers."""
        found = self.indices(latents)
        return self.entries(found).to(latents.dtype), latents.new_zeros(()), (None, None, found)

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Entries as diffusers' `VectorQuantizer` gives them.

        Args:
            indices: in the order (B, h, w, codes), of any shape.
            shape: (B, h, w, c) of the result before it becomes (B, c, h, w); left out where
                `indices` has shape (B, codes, h, w).
        """
        if shape is not None:
            indices = indices.reshape(*shape[:3], self.codes).permute(0, 3, 1, 2)
        return self.entries(indices)


class VectorQuantizer(Quantizer):
    """The nearest entries of codebooks (van den Oord et al. 2017, arXiv:1711.00937).

    Channels are cut into `heads` parts with codebooks of their own. With a `depth` above 1, each
    further codebook quantises what those before have left (Lee et al. 2022, arXiv:2203.01941). Code
    number `level · heads + head` of a position is that of a level's head.

    Args:
        size: entries a codebook.
        channels: c of the latents.
        heads: divides the channels.
        depth: levels of residual quantisation.
        normalized: latents and entries have length 1 (Yu et al. 2021, arXiv:2110.04627).
    """

    def __init__(
        self, size: int, channels: int, heads: int = 1, depth: int = 1, normalized: bool = False
    ) -> None:
        super().__init__()
        self.size, self.heads, self.depth, self.codes = size, heads, depth, heads * depth
        self.normalized = normalized
        codebooks = torch.empty(self.codes, size, channels // heads).uniform_(-1 / size, 1 / size)
        self.codebooks = nn.Parameter(codebooks)

    def bounded(self, latents: Tensor) -> Tensor:
        """The latents; of length 1 in each head where the entries are."""
        latents = _exact(latents)
        if not self.normalized:
            return latents
        return F.normalize(latents.unflatten(1, (self.heads, -1)), dim=2).flatten(1, 2)

    def codebook(self, code: int) -> Tensor:
        """The entries of a code, of shape (size, c / heads), in fp32 or more."""
        entries = _exact(self.codebooks[code])
        return F.normalize(entries, dim=-1) if self.normalized else entries

    def nearest(self, residual: Tensor, level: int) -> Tensor:
        """The numbers of a level, of shape (B, heads, h, w), as `nearest` has them.

        Args:
            residual: bounded latents without what the levels before have given.
            level: from 0.
        """
        found = []
        for head, part in enumerate(residual.chunk(self.heads, 1)):
            entries = self.codebook(level * self.heads + head)
            vectors = part.permute(0, 2, 3, 1).reshape(-1, entries.shape[-1])
            # Not `len`, which torch.export takes for a fixed number.
            found.append(nearest(vectors, entries).view(part.shape[0], *part.shape[2:]))
        return torch.stack(found, 1)

    def look_up(self, numbers: Tensor, level: int) -> Tensor:
        """The entries of a level, of shape (B, c, h, w), for numbers of shape (B, heads, h, w)."""
        parts = [
            F.embedding(some, _exact(self.codebooks[level * self.heads + head]))
            for head, some in enumerate(numbers.unbind(1))
        ]
        if self.normalized:  # after the lookup: a few rows of many
            parts = [F.normalize(part, dim=-1) for part in parts]
        return torch.cat(parts, -1).permute(0, 3, 1, 2)

    @torch.no_grad()
    def indices(self, latents: Tensor) -> Tensor:
        """As of any `Quantizer`."""
        residual, found = self.bounded(latents).to(_exact(self.codebooks).dtype), []
        for level in range(self.depth):
            found.append(self.nearest(residual, level))
            if level + 1 < self.depth:
                residual = residual - self.look_up(found[-1], level)
        return torch.cat(found, 1)

    def entries(self, indices: Tensor) -> Tensor:
        """As of any `Quantizer`."""
        levels = indices.chunk(self.depth, 1)
        parts = [self.look_up(numbers, level) for level, numbers in enumerate(levels)]
        return sum(parts[1:], parts[0])


class FiniteScalarQuantizer(Quantizer):
    """Each channel rounded to one of a few levels (Mentzer et al. 2023, arXiv:2309.15505).

    Latents are squeezed by tanh into the levels' range, as in the paper's appendix A; entries lie
    in [-1, 1]. The first channel is the lowest digit of a code's number.

    Args:
        levels: of each channel.
    """

    _EDGE: ClassVar[float] = 1e-3  # how far tanh can go beyond the outer levels, relatively

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels, self.size = tuple(levels), math.prod(levels)

    def _column(self, values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)

    def bounded(self, latents: Tensor) -> Tensor:
        """Latents on the levels' scale: whole numbers are levels, about 0."""
        half = [(n - 1) * (1 + self._EDGE) / 2 for n in self.levels]
        # An even number of levels has none in the middle: it lies half a level off.
        offset = [0.5 * (n % 2 == 0) for n in self.levels]
        shift = [math.atanh(o / h) for o, h in zip(offset, half, strict=True)]
        latents = _exact(latents)
        moved = (latents + self._column(shift, latents)).tanh()
        return moved * self._column(half, latents) - self._column(offset, latents)

    def scaled(self, bounded: Tensor) -> Tensor:
        """From the levels' scale to [-1, 1], as the decoder receives them."""
        return bounded / self._column([n // 2 for n in self.levels], bounded)

    @torch.no_grad()
    def indices(self, latents: Tensor) -> Tensor:
        """As of any `Quantizer`."""
        return self.number(self.bounded(latents).round())

    def number(self, rounded: Tensor) -> Tensor:
        """The numbers of rounded latents, int64 of shape (B, 1, h, w)."""
        basis = [math.prod(self.levels[:i]) for i in range(len(self.levels))]
        half = self._column([n // 2 for n in self.levels], rounded)
        digits = (rounded + half).long()
        return (digits * self._column(basis, digits)).sum(1, keepdim=True)

    def entries(self, indices: Tensor) -> Tensor:
        """As of any `Quantizer`."""
        digits, rest = [], indices
        for n in self.levels:
            digits.append(rest % n - n // 2)
            rest = rest // n
        return self.scaled(torch.cat(digits, 1).float())


class LookupFreeQuantizer(Quantizer):
    """The signs of the channels, 0 as −1 (Yu et al. 2023, arXiv:2310.05737), lowest bit first.

    Args:
        bits: channels c of the latents.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.size = bits, 2**bits

    @torch.no_grad()
    def indices(self, latents: Tensor) -> Tensor:
        """As of any `Quantizer`."""
        place = torch.arange(self.bits, device=latents.device).view(1, -1, 1, 1)
        return ((latents > 0).long() << place).sum(1, keepdim=True)

    def entries(self, indices: Tensor) -> Tensor:
        """As of any `Quantizer`."""
        place = torch.arange(self.bits, device=indices.device).view(1, -1, 1, 1)
        return ((indices >> place) & 1).float() * 2 - 1


class QuantizedAutoencoder(VQModel):
    """diffusers' `VQModel` with a quantiser of this file in place of its own.

    All arguments but the last five are those of `VQModel`. `encode` gives latents before the
    quantiser, `decode` quantises them.

    Args:
        quantizer: `vq`, `fsq` or `lfq`; of the last `vq_embed_dim` is the number of bits.
        heads: of vq.
        depth: of vq.
        normalized: of vq.
        levels: of fsq, one for each of `vq_embed_dim` channels.
        auto_map: where `diffusers.AutoModel` finds this class; for the saved config alone.
    """

    _supports_gradient_checkpointing = True  # encoder and decoder do, `VQModel` does not say so

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
        quantizer: str = "vq",
        heads: int = 1,
        depth: int = 1,
        normalized: bool = False,
        levels: Sequence[int] | None = None,
        auto_map: Any = None,
    ) -> None:
        channels = vq_embed_dim or latent_channels
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            sample_size=sample_size,
            num_vq_embeddings=1,  # of a codebook that is replaced below
            norm_num_groups=norm_num_groups,
            vq_embed_dim=channels,
            scaling_factor=scaling_factor,
            norm_type=norm_type,
            mid_block_add_attention=mid_block_add_attention,
            lookup_from_codebook=lookup_from_codebook,
            force_upcast=force_upcast,
        )
        if quantizer == "fsq":
            found: Quantizer = FiniteScalarQuantizer(levels or ())
        elif quantizer == "lfq":
            found = LookupFreeQuantizer(channels)
        else:
            found = VectorQuantizer(num_vq_embeddings, channels, heads, depth, normalized)
        self.quantize: Any = found
        place = {"AutoModel": f"{_FILE.removesuffix('.py')}.{type(self).__name__}"}
        self.register_to_config(
            num_vq_embeddings=found.size, vq_embed_dim=channels, auto_map=auto_map or place
        )

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **options: Any) -> None:
        """Writes config.json, and before it this file, which alone can read it."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        Path(save_directory, _FILE).write_bytes(Path(__file__).read_bytes())
        super().save_config(save_directory, push_to_hub, **options)

    def indices(self, latents: Tensor) -> Tensor:
        """The numbers of the codes, (B, codes, h, w), of what `encode` gives, (B, c, h, w)."""
        return self.quantize.indices(latents)

    def decode_entries(self, entries: Tensor) -> Tensor:
        """Pictures of shape (B, C, H, W), nominally in [-1, 1].

        Args:
            entries: quantised latents, of shape (B, c, h, w).
        """
        hidden = self.post_quant_conv(entries)
        return self.decoder(hidden, entries if self.config["norm_type"] == "spatial" else None)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Pictures of shape (B, C, H, W), from numbers of shape (B, codes, h, w)."""
        entries = self.quantize.entries(indices)
        return self.decode_entries(entries.to(self.post_quant_conv.weight.dtype))
