"""How good an autoencoder is."""

from latent_ae.evaluation.baseline import lanczos_reduction
from latent_ae.evaluation.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate", "lanczos_reduction"]
