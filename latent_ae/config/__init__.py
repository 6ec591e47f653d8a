"""The keys of a run's YAML file, their defaults and what they mean."""

from latent_ae.config.adversary import AdversaryConfig, DiscriminatorConfig
from latent_ae.config.buckets import Bucket, BucketsConfig, bucket_sizes, largest_cut
from latent_ae.config.data import SMALLEST_MEASURED, DataConfig, SourceConfig, ValidationConfig
from latent_ae.config.distillation import DistillationConfig
from latent_ae.config.encoding import EncodingSource, Preprocessing, Storage
from latent_ae.config.families import DCNetworkConfig, TinyNetworkConfig
from latent_ae.config.losses import (
    AlignmentConfig,
    EquivarianceConfig,
    LossesConfig,
    PerceptualConfig,
)
from latent_ae.config.model import (
    FITTING,
    AnyBottleneck,
    AnyNetwork,
    AutoencoderConfig,
    BottleneckConfig,
    NetworkConfig,
    NoBottleneckConfig,
    misfit,
)
from latent_ae.config.protocol import PROTOCOLS, Protocol
from latent_ae.config.quantizers import (
    QUANTIZERS,
    FSQConfig,
    LFQConfig,
    VQConfig,
    VQNetworkConfig,
)
from latent_ae.config.run import Config, colourless
from latent_ae.config.section import Section
from latent_ae.config.training import TrainingConfig

__all__ = [
    "FITTING",
    "PROTOCOLS",
    "QUANTIZERS",
    "SMALLEST_MEASURED",
    "AdversaryConfig",
    "AlignmentConfig",
    "AnyBottleneck",
    "AnyNetwork",
    "AutoencoderConfig",
    "BottleneckConfig",
    "Bucket",
    "BucketsConfig",
    "Config",
    "DCNetworkConfig",
    "DataConfig",
    "DiscriminatorConfig",
    "DistillationConfig",
    "EncodingSource",
    "EquivarianceConfig",
    "FSQConfig",
    "LFQConfig",
    "LossesConfig",
    "NetworkConfig",
    "NoBottleneckConfig",
    "PerceptualConfig",
    "Preprocessing",
    "Protocol",
    "Section",
    "SourceConfig",
    "Storage",
    "TinyNetworkConfig",
    "TrainingConfig",
    "VQConfig",
    "VQNetworkConfig",
    "ValidationConfig",
    "bucket_sizes",
    "colourless",
    "largest_cut",
    "misfit",
]
