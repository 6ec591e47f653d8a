"""Class-conditional pictures from codes on Fashion-MNIST, from the raw files to a judged sheet.

    apt install dataset-fashion-mnist                      # 30 MB, MIT licence
    python pipelines/fashion_indices.py [--output runs/fashion-indices]

Trains a small VQ autoencoder, encodes the pictures to codes, trains a Llama on the training
pictures' codes and measures it on the test pictures', draws from every class at several strengths
of guidance, and judges the drawings as fashion_mnist.py does. For comparison it also draws each
code by itself, as often as training pictures have it. Writes sheets and metrics.json. Half an hour
on one CPU core; docs/index-prior.md shows what to expect. Stopped, the same command goes on: stages
that have left their result are kept, so other settings want another --output.
"""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import typer
from rich.table import Table
from torch import Tensor

from fashion_data import CLASSES, PARTS, SIDE, disjoint_halves, read_part, write_parquet
from fashion_mnist import (
    ROOT,
    console,
    evaluate_test_pictures,
    judged,
    keep_drawings,
    kept_drawings,
    reconstruction,
    rgb,
    seconds,
    stage,
    tell_sets,
    train_autoencoder,
)
from latent_ae.errors import UserError

RECIPE = ROOT / "configs/fashion_vq.yaml"
GUIDANCE = (1.0, 1.5, 2.5)
SHOWN = 1.5  # of these, on the sheet
BATCH, DRAWN = 250, 6  # pictures drawn at once, and shown of each class
PRIOR = {
    "width": 160,
    "depth": 5,
    "heads": 5,
    "batch_size": 64,
    "learning_rate": 2e-3,
    "warmup_steps": 100,
    "precision": "bf16",
    "log_every": 50,
    "checkpoint_every": 250,
    "evaluate_every": 0,
}


def main(
    data: Annotated[Path, typer.Option(help="The folder of the four gzipped idx files.")] = Path(
        "/usr/share/datasets/fashion-mnist"
    ),
    output: Annotated[Path, typer.Option(help="Where everything goes.")] = Path(
        "runs/fashion-indices"
    ),
    autoencoder_steps: Annotated[
        int | None, typer.Option(help="Updates of the autoencoder; the recipe's.", min=1)
    ] = None,
    prior_steps: Annotated[int, typer.Option(help="Updates of the prior.", min=1)] = 1500,
    classifier_epochs: Annotated[int, typer.Option(help="Of the judge.", min=1)] = 3,
    samples: Annotated[
        int, typer.Option(help="Drawn at each guidance; a multiple of ten.", min=60)
    ] = 1000,
) -> None:
    """Raw files to pictures of ten classes from codes, and how good they are."""
    try:
        run(data, output, autoencoder_steps, prior_steps, classifier_epochs, samples)
    except UserError as error:
        console.print(f"error: {error}", markup=False)
        raise typer.Exit(2) from None


def run(
    data: Path,
    output: Path,
    autoencoder_steps: int | None,
    prior_steps: int,
    classifier_epochs: int,
    samples: int,
) -> None:
    """The stages one after another; what is there already is kept."""
    pictures = {part: read_part(data, part) for part in PARTS}
    halves = disjoint_halves(pictures["test"][1], samples)
    with stage("pictures"):
        for part, (values, labels) in pictures.items():
            write_parquet(values, labels, output / f"data/{part}.parquet")
    with stage("train and export the autoencoder"):
        train_autoencoder(output, autoencoder_steps, RECIPE)
    with stage("evaluate"):
        evaluation = evaluate_test_pictures(output)
    with stage("encode"):
        encode_parts(output)
    with stage("train the prior"):
        train_prior(output, prior_steps)
    with stage("draw"):
        drawings = {
            f"drawn, guidance {scale:g}": draw(output, scale, samples) for scale in GUIDANCE
        }
        drawings["each code by itself"] = draw_by_itself(output, samples)
    with stage("judge"):
        numbers = judge(output, pictures, halves, drawings, classifier_epochs)
    write_metrics(output, evaluation, numbers, samples)
    tell(output, numbers)


def encode_parts(output: Path) -> None:
    """The codes of all pictures: `latents/train` to learn from, `latents/test` to measure on."""
    from latent_ae import encode

    for part in PARTS:
        encode(
            output / "autoencoder",
            output / f"data/{part}.parquet",
            output / f"latents/{part}",
            resolution=SIDE,
            batch_size=64,
            workers=1,
            store="indices",
            console=console,
        )


def train_prior(output: Path, steps: int) -> None:
    """Trains the class-conditional prior, or goes on, and saves it with the autoencoder."""
    from train_index_prior import PriorConfig, train

    if (output / "prior").exists():
        return
    train(
        output / "latents/train",
        output / "prior",
        PriorConfig(steps=steps, **PRIOR),
        held_out=output / "latents/test",
        run=output / "training-prior",
        console=console,
    )


def draw(output: Path, guidance: float, samples: int) -> Tensor:
    """Drawings of the saved prior, uint8 of shape (samples, 3, 32, 32), sorted by class.

    Each guidance starts from the same noise, so that pictures in the same place can be compared.
    """
    from index_prior import IndexPrior

    file = output / f"samples-{guidance:g}.npz"
    if (known := kept_drawings(file, samples)) is not None:
        return known
    prior = IndexPrior.from_pretrained(output / "prior")
    labels = [label for label in range(len(CLASSES)) for _ in range(samples // len(CLASSES))]
    return keep_drawings(file, prior(labels, batch_size=BATCH, guidance_scale=guidance))


def draw_by_itself(output: Path, samples: int) -> Tensor:
    """Pictures of codes drawn one by one, as often as the training pictures have each.

    What the autoencoder makes of codes that no prior has brought together, uint8 of shape
    (samples, 3, 32, 32).
    """
    from index_prior import IndexPrior
    from latent_ae.latents import LatentDataset

    data = LatentDataset(output / "latents/train", columns=())
    some = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:5000]
    codes = torch.stack([data[int(place)]["indices"] for place in some]).flatten()
    prior = IndexPrior.from_pretrained(output / "prior")
    shape = (samples, 1, prior.vocabulary.height, prior.vocabulary.width)
    drawn = codes[torch.randint(len(codes), shape, generator=torch.Generator().manual_seed(0))]
    return torch.cat([prior.decode(part) for part in drawn.split(BATCH)])


def judge(
    output: Path,
    pictures: dict[str, tuple[np.ndarray, np.ndarray]],
    halves: list[Tensor],
    drawings: dict[str, Tensor],
    epochs: int,
) -> dict[str, Any]:
    """Writes the sheets; returns the judge's accuracy and the numbers of each set of pictures."""
    others = rgb(pictures["test"][0])[halves[1]]
    decoded = reconstruction(output, others)
    save_sheets(output, others, decoded, drawings)
    return judged(output, pictures, halves, decoded, drawings, epochs)


def save_sheets(output: Path, images: Tensor, decoded: Tensor, drawings: dict[str, Tensor]) -> None:
    """Sheets with a column for each class: two pictures, each above its reconstruction; drawings.

    Args:
        output: where `samples.png` goes, and a sheet of each other guidance.
        images: test pictures, sorted by class.
        decoded: their reconstructions.
        drawings: by name, sorted likewise.
    """
    from latent_ae.pictures import save_sheet

    each = len(images) // len(CLASSES)

    def of_class(pictures: Tensor, place: int, count: int) -> Tensor:
        return pictures[place * each :][:count]

    for title, drawn in drawings.items():
        columns = {}
        for place, name in enumerate(CLASSES):
            pairs = torch.stack([of_class(images, place, 2), of_class(decoded, place, 2)], 1)
            column = torch.cat([pairs.flatten(0, 1), of_class(drawn, place, DRAWN)])
            columns[name] = column.repeat_interleave(2, 2).repeat_interleave(2, 3)
        stem = title.replace(",", "").replace(" ", "-")
        is_shown = title.endswith(f" {SHOWN:g}")
        save_sheet(output / ("samples.png" if is_shown else f"{stem}.png"), columns)


def write_metrics(
    output: Path, evaluation: dict[str, float], numbers: dict[str, Any], samples: int
) -> None:
    """Everything that another machine's numbers must be compared with."""
    record = json.loads((output / "prior/index_prior.json").read_text())
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        "versions": {
            name: version(name) for name in ("latent_ae", "torch", "diffusers", "transformers")
        },
        "seconds": seconds,  # of this start; a stage that was there already took none
        "samples": samples,
        "autoencoder": evaluation,
        "prior": {name: record[name] for name in ("config", "vocabulary", "steps", "held_out")},
        **numbers,
    }
    (output / "metrics.json").write_text(json.dumps(content, indent=2) + "\n")


def tell(output: Path, numbers: dict[str, Any]) -> None:
    """The tables, and what to look at."""
    held_out = json.loads((output / "prior/index_prior.json").read_text())["held_out"]
    table = Table(title="test pictures' codes, bits a code", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("bits", justify="right")
    names = {
        "order_0_entropy": "entropy of single codes",
        "bits_per_code_without_class": "the prior",
        "bits_per_code": "the prior, given the class",
    }
    for key, name in names.items():
        table.add_row(name, f"{held_out[key]:.3f}")
    console.print(table)
    tell_sets(numbers, "pictures", f"{output}/samples.png")


if __name__ == "__main__":
    typer.run(main)
