"""Trains an autoregressive transformer on a latents folder of codes: a prior that generates.

    latent-ae encode MODEL DATA LATENTS --store indices
    accelerate launch pipelines/train_index_prior.py LATENTS OUT --held-out OTHER-LATENTS
    python pipelines/sample_index_prior.py OUT --class 3 --count 8 --out sheet.png

One process or many. OUT holds the prior (a stock `LlamaForCausalLM`), the autoencoder and
index_prior.json; checkpoints and `log.jsonl` lie in `OUT-run`, and the same command goes on where
it was stopped. All that is random about a step follows from the seed, the process and the step, so
a resumed run sees what an uninterrupted one would have seen.

From Python: `train("latents", "prior", PriorConfig(seconds=60))`.
"""

from __future__ import annotations

from importlib.metadata import version
from itertools import islice
from pathlib import Path

from rich.console import Console
from torch.utils.data import DataLoader

from denoiser_log import Log
from index_prior import IndexPrior
from index_prior_config import PANELS, PriorConfig
from index_prior_folders import (
    check_output,
    open_autoencoder,
    open_codes,
    require_alike,
    vocabulary_of,
)
from index_prior_trainer import Examples, Trainer
from latent_ae.latents import LatentDataset
from latent_ae.processes import from_main
from training_parts import app_of

__all__ = ["PriorConfig", "train"]


def train(
    latents: str | Path,
    output: str | Path,
    config: PriorConfig | None = None,
    *,
    held_out: str | Path | None = None,
    autoencoder: str | Path | None = None,
    run: str | Path | None = None,
    console: Console | None = None,
) -> Path:
    """Trains a prior, or goes on where it was stopped, and saves it with its autoencoder.

    Args:
        latents: a latents folder of indices.
        output: where they go; a prior that is there gives way at the end.
        config: what to train; the same config resumes.
        held_out: a latents folder of indices by the same codebook, to measure on.
        autoencoder: the exported folder that made the latents; left out, the path they name.
        run: where checkpoints and log.jsonl go; left out, `output` with "-run" appended.
        console: where progress is shown; standard error when left out.

    Returns:
        `output`.

    Raises:
        UserError: the latents, the autoencoder, a folder or the config do not fit together, or the
            training diverges.
    """
    config, output = config or PriorConfig(), Path(output)
    data = open_codes(latents)
    frozen = open_autoencoder(Path(autoencoder or data.manifest.autoencoder.path), data)
    vocabulary = vocabulary_of(data, frozen, labels=config.labels)
    others = None if held_out is None else open_codes(held_out)
    if others is not None:
        require_alike(others, data)
    check_output(output)
    folder = Path(run) if run else output.with_name(output.name + "-run")
    trainer = Trainer(config, data, vocabulary, frozen.codebook_sha256, folder)
    accelerator = trainer.accelerator
    loader = DataLoader(
        Examples(data, vocabulary, config, (accelerator.process_index, accelerator.num_processes)),
        batch_size=None,
        sampler=range(trainer.step * config.accumulation, config.steps * config.accumulation),
        num_workers=config.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    with Log(trainer, console or Console(stderr=True), "prior") as log:
        batches = iter(loader)
        while (progress := trainer.progress()) < 1:
            log.add(trainer.update(list(islice(batches, config.accumulation)), progress))
            if trainer.step % config.log_every == 0:
                log.write()
            if config.evaluate_every and trainer.step % config.evaluate_every == 0:
                _measure(trainer, others, log)
            if trainer.step % config.checkpoint_every == 0:
                trainer.save()
        log.write()
        trainer.require_sound()
        measured = _measure(trainer, others, log)
    trainer.save()
    if accelerator.is_main_process:
        names = data.manifest.label_names if vocabulary.classes else []
        facts = {
            "config": config.model_dump(),
            "steps": trainer.step,
            "pictures": len(data),
            "held_out": measured,
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }
        null_class = not vocabulary.classes or config.label_dropout > 0
        prior = IndexPrior(trainer.prior.cpu(), frozen, vocabulary, names, null_class)
        prior.save(output, facts)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output


def _measure(
    trainer: Trainer, others: LatentDataset | None, log: Log
) -> dict[str, float | int] | None:
    """Measures on the held-out codes, if there are any and this step is not yet measured."""
    if others is None:
        return None
    if from_main(lambda: (trainer.step, "held_out") in log.done):
        return from_main(lambda: log.last.get("held_out"))
    with log.paused():
        row = trainer.measure(others)
    log.record("held_out", row)
    log.tell(
        f"step {trainer.step} · held out: {row['bits_per_code']:.3f} bits a code "
        f"(order-0 entropy {row['order_0_entropy']:.3f})"
    )
    return row


app = app_of(
    train,
    PriorConfig,
    PANELS,
    "Trains a prior over the codes in LATENTS and saves it with its autoencoder to OUTPUT.",
    output="Where the prior goes.",
    paths={
        "held_out": "Latents of other pictures, by the same codebook, to measure on.",
        "autoencoder": "Default: the one the latents name.",
        "run": "Checkpoints and log. Default: OUTPUT-run.",
    },
    optional={"seconds": float},
)

if __name__ == "__main__":
    app()
