"""Latents for a denoiser: read memory-mapped, sampled and scaled when read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from latent_ae.errors import UserError
from latent_ae.latents.format import read_manifest

__all__ = ["LatentDataset"]


class LatentDataset(Dataset):
    """A latents folder as a map-style data set.

    Args:
        folder: what `encode` wrote.
        sample: draw z = μ + σ·ε anew at each reading (torch's global generator); else the mode μ.
        scale: give final latents, scaled as the autoencoder's config says; else raw ones.

    Raises:
        UserError: the folder is unfinished, damaged, or of another format.
    """

    def __init__(self, folder: str | Path, *, sample: bool = True, scale: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.sample, self.scale = sample, scale
        parts = []
        for shard in self.manifest.shards:
            for name in (shard.file, shard.index):
                if not (self.folder / name).is_file():
                    raise UserError(f"{folder} is damaged: {name} is missing")
            try:
                parts.append(pyarrow.parquet.read_table(self.folder / shard.index))
                with safe_open(self.folder / shard.file, framework="pt"):
                    pass
            except Exception as error:
                raise UserError(f"{folder} is damaged: {shard.file}: {error}") from error
        self.index: pa.Table = pa.concat_tables(parts)
        self._place = [self.index[name].to_numpy() for name in ("shard", "row")]
        self._shards: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """A row: `latents` (float32, shape (c, h, w)), `label` (−1 for none), `key`."""
        mean, logvar = self.moments(position)
        latents = mean
        if self.sample:
            latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        if self.scale:
            latents = self.manifest.autoencoder.to_final(latents)
        label = self.index["label"][position].as_py()
        key = self.index["key"][position].as_py()
        return {"latents": latents, "label": -1 if label is None else label, "key": key}

    def moments(self, position: int) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of a row, raw, float32, each of shape (c, h, w)."""
        shard, row = (int(column[position]) for column in self._place)
        if shard not in self._shards:
            file = self.folder / self.manifest.shards[shard].file
            self._shards[shard] = safe_open(file, framework="pt")
        opened = self._shards[shard]
        mean, logvar = (opened.get_slice(name)[row : row + 1][0] for name in ("mean", "logvar"))
        return mean.float(), logvar.float()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # a loader's worker maps the files itself
