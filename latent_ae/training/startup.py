"""What a run is, told before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from latent_ae.data import BucketPlan
from latent_ae.describe import describe

if TYPE_CHECKING:
    from latent_ae.training.run import Run

__all__ = ["show_facts", "show_startup"]


def show_startup(run: Run, console: Console) -> None:
    """Prints the run's facts as a table; on the main process."""
    if not run.accelerator.is_main_process:
        return
    facts = describe(run.config, run.accelerator.num_processes, run.network)
    facts["device"] = f"{run.accelerator.device}, {run.config.training.precision}"
    count = run.stream.epoch
    if count is not None and run.stream.batches is not None:
        steps = run.stream.batches / run.config.training.accumulation
        facts["epoch"] = f"{count:,} images, {steps:,.1f} steps"
    if run.stream.plan is not None:
        facts["pictures"] = _shares(run.stream.plan)
    show_facts(facts, console)


def _shares(plan: BucketPlan) -> str:
    """How many pictures an epoch has of each shape that occurs, on average."""
    counts = plan.counts.mean(axis=0)
    order = sorted(range(len(counts)), key=lambda bucket: -counts[bucket])
    return ", ".join(
        f"{plan.buckets[b].width} × {plan.buckets[b].height}: {counts[b]:,.0f}"
        for b in order
        if counts[b]
    )


def show_facts(facts: dict[str, str], console: Console) -> None:
    """Prints titles and facts as two columns."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in facts.items():
        table.add_row(*row)
    console.print(table)
