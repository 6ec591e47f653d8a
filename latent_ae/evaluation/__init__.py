"""How good an autoencoder is, and how to look at it."""

from latent_ae.evaluation.compare import compare, require_comparable
from latent_ae.evaluation.evaluate import evaluate
from latent_ae.evaluation.frechet import FEATURE_NETWORKS, FrechetDistance
from latent_ae.evaluation.measurement import REFERENCES
from latent_ae.evaluation.references import lanczos_reduction
from latent_ae.evaluation.result import Evaluation

__all__ = [
    "FEATURE_NETWORKS",
    "REFERENCES",
    "Evaluation",
    "FrechetDistance",
    "compare",
    "evaluate",
    "lanczos_reduction",
    "require_comparable",
]
