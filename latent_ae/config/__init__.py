"""The keys of a run's YAML file, their defaults and what they mean."""

from latent_ae.config.adversary import AdversaryConfig, DiscriminatorConfig
from latent_ae.config.buckets import Bucket, BucketsConfig, bucket_sizes, largest_cut
from latent_ae.config.data import SMALLEST_MEASURED, DataConfig, SourceConfig, ValidationConfig
from latent_ae.config.encoding import EncodingSource, Preprocessing, Storage
from latent_ae.config.losses import (
    AlignmentConfig,
    EquivarianceConfig,
    LossesConfig,
    PerceptualConfig,
)
from latent_ae.config.model import AutoencoderConfig, BottleneckConfig, NetworkConfig
from latent_ae.config.protocol import PROTOCOLS, Protocol
from latent_ae.config.run import Config, colourless
from latent_ae.config.section import Section
from latent_ae.config.training import TrainingConfig

__all__ = [
    "PROTOCOLS",
    "SMALLEST_MEASURED",
    "AdversaryConfig",
    "AlignmentConfig",
    "AutoencoderConfig",
    "BottleneckConfig",
    "Bucket",
    "BucketsConfig",
    "Config",
    "DataConfig",
    "DiscriminatorConfig",
    "EncodingSource",
    "EquivarianceConfig",
    "LossesConfig",
    "NetworkConfig",
    "PerceptualConfig",
    "Preprocessing",
    "Protocol",
    "Section",
    "SourceConfig",
    "Storage",
    "TrainingConfig",
    "ValidationConfig",
    "bucket_sizes",
    "colourless",
    "largest_cut",
]
