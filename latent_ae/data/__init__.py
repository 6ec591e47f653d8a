"""Pictures in: sources, decoding, crops, batches."""

from latent_ae.data.bands import Bands
from latent_ae.data.buckets import BucketPlan, nearest_size
from latent_ae.data.decoding import UnreadableFile, UnreadableImage, decode_image, to_rgb
from latent_ae.data.filters import RowFilter
from latent_ae.data.in_order import evaluation_batches
from latent_ae.data.loader import TrainingStream, require_one_readable
from latent_ae.data.samples import Batch, Sample, Skipped
from latent_ae.data.sizes import picture_sizes
from latent_ae.data.sources import SOURCES, Source, open_source, source_of
from latent_ae.data.transforms import (
    RESIZES,
    CenterCrop,
    TrainingCrop,
    normalize,
    resize_shorter_side,
    to_tensor,
    to_uint8,
)
from latent_ae.data.variants import Variant, Variants

__all__ = [
    "RESIZES",
    "SOURCES",
    "Bands",
    "Batch",
    "BucketPlan",
    "RowFilter",
    "CenterCrop",
    "Sample",
    "Skipped",
    "Source",
    "TrainingCrop",
    "TrainingStream",
    "UnreadableFile",
    "UnreadableImage",
    "Variant",
    "Variants",
    "decode_image",
    "evaluation_batches",
    "nearest_size",
    "normalize",
    "open_source",
    "picture_sizes",
    "require_one_readable",
    "resize_shorter_side",
    "source_of",
    "to_rgb",
    "to_tensor",
    "to_uint8",
]
