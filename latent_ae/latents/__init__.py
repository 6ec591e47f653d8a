"""Data sets as latents: written once, read by every epoch of a denoiser."""

from latent_ae.autoencoder import weights_sha256
from latent_ae.latents.buckets import BucketBatchSampler
from latent_ae.latents.dataset import LatentDataset
from latent_ae.latents.decode import decode
from latent_ae.latents.encode import encode
from latent_ae.latents.format import AutoencoderRecord, LatentsManifest, read_manifest
from latent_ae.latents.stream import LatentStream

__all__ = [
    "AutoencoderRecord",
    "BucketBatchSampler",
    "LatentDataset",
    "LatentStream",
    "LatentsManifest",
    "decode",
    "encode",
    "read_manifest",
    "weights_sha256",
]
