"""Training on Accelerate: one process or many, resumed by the same command."""

from latent_ae.training.dry_run import DryRun, dry_run
from latent_ae.training.loop import train
from latent_ae.training.schedule import learning_rate

__all__ = ["DryRun", "dry_run", "learning_rate", "train"]
