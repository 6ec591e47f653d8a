"""One HTML file that shows what was measured, of one model or of several side by side."""

from latent_ae.evaluation.report.build import write_report

__all__ = ["write_report"]
