"""Latents folders of a denoiser's tests, written by hand."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from latent_ae.config import Preprocessing, Storage
from latent_ae.latents import AutoencoderRecord, LatentsManifest, weights_sha256
from latent_ae.latents.format import INDEX_COLUMNS, ShardRecord
from latent_ae.scaling import LatentScaling


def tiny_autoencoder(folder):
    """An untrained autoencoder of factor 2 with every number that scales latents."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.5,
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 2.0, 0.5, 1.0],
    )
    vae.save_pretrained(folder)
    return folder


def write_latents(folder, autoencoder, mean, labels=None, logvar=-60.0, names=()):
    """A latents folder; the default log-variance is that of no variance at all."""
    folder.mkdir()
    tensors = {"mean": mean, "logvar": torch.full_like(mean, logvar)}
    save_file(tensors, folder / "shard-000000.safetensors")
    labels = labels or [None] * len(mean)
    rows = [
        {"key": str(row), "position": row, "label": label, "row": row}
        for row, label in enumerate(labels)
    ]
    index = pa.Table.from_pylist(rows, schema=pa.schema(INDEX_COLUMNS))
    pyarrow.parquet.write_table(index, folder / "index-000000.parquet")
    names_of_files = {"file": "shard-000000.safetensors", "index": "index-000000.parquet"}
    sha256 = hashlib.sha256((folder / names_of_files["file"]).read_bytes()).hexdigest()
    shard = ShardRecord(**names_of_files, rows=len(rows), sha256=sha256)
    manifest = LatentsManifest(
        autoencoder=AutoencoderRecord(
            path=str(autoencoder),
            weights_sha256=weights_sha256(autoencoder),
            class_name="AutoencoderKL",
            **LatentScaling.of(AutoencoderKL.from_pretrained(autoencoder)).model_dump(),
        ),
        preprocessing=Preprocessing(resolution=16),
        storage=Storage(dtype="float32"),
        latent_shapes=[tuple(mean.shape[1:])],
        count=len(mean),
        num_classes=len(names),
        label_names=list(names),
        shards=[shard],
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return folder


def labelled_latents(folder, autoencoder, shape, names, logvar=-60.0):
    """Ten latents of two classes; the last without a label."""
    mean = torch.randn((10, *shape), generator=torch.Generator().manual_seed(0))
    labels = [0, 1] * 4 + [1, None]
    return write_latents(folder, autoencoder, mean, labels, logvar=logvar, names=names)


def rows_of(log):
    return [json.loads(row) for row in log.read_text().splitlines()]


def state_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)
