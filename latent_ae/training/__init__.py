"""Training on Accelerate: one process or many, resumed by the same command."""

from latent_ae.training.loop import train
from latent_ae.training.schedule import learning_rate

__all__ = ["learning_rate", "train"]
