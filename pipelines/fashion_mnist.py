"""Class-conditional latent diffusion on Fashion-MNIST, from the raw files to guided samples.

    apt install dataset-fashion-mnist                      # 30 MB, MIT licence
    python pipelines/fashion_mnist.py [--output runs/fashion]

Writes the 70,000 pictures as parquet with named classes, trains a small KL-VAE on them, exports and
measures it, encodes the training pictures, trains a denoiser on the latents, and draws from every
class by stock diffusers at three strengths of guidance. Then it judges the drawings by a classifier
taught on real pictures and by Fréchet distances (fashion_judge.py), and writes sheets and
metrics.json. Half an hour on one or two CPU cores; docs/fashion-mnist.md shows what to expect, and
the same steps by the command line. Stopped, the same command goes on: stages that have left their
result are kept, so other settings want another --output.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fashion_data import CLASSES, PARTS, SIDE, disjoint_halves, padded, read_part, write_parquet
from latent_ae.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs/fashion_mnist.yaml"
GUIDANCE = (1.0, 2.0, 4.0)
SAMPLING_STEPS, BATCH = 25, 250
DENOISER = {
    "channels": (64, 96, 128),
    "layers": 1,
    "attention": 2,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "warmup_steps": 100,
    "precision": "bf16",
    "ema": 0.998,
    "log_every": 100,
    "checkpoint_every": 500,
}

console = Console()
seconds: dict[str, float] = {}


def main(
    data: Annotated[Path, typer.Option(help="The folder of the four gzipped idx files.")] = Path(
        "/usr/share/datasets/fashion-mnist"
    ),
    output: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/fashion"),
    autoencoder_steps: Annotated[
        int | None, typer.Option(help="Updates of the autoencoder; the recipe's.", min=1)
    ] = None,
    denoiser_steps: Annotated[int, typer.Option(help="Updates of the denoiser.", min=1)] = 2500,
    classifier_epochs: Annotated[int, typer.Option(help="Of the judge.", min=1)] = 3,
    samples: Annotated[
        int, typer.Option(help="Drawn at each guidance; a multiple of ten.", min=40)
    ] = 1000,
) -> None:
    """Raw files to guided samples of ten classes, and how good they are."""
    try:
        run(data, output, autoencoder_steps, denoiser_steps, classifier_epochs, samples)
    except UserError as error:
        console.print(f"error: {error}", markup=False)
        raise typer.Exit(2) from None


def run(
    data: Path,
    output: Path,
    autoencoder_steps: int | None,
    denoiser_steps: int,
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
        train_autoencoder(output, autoencoder_steps)
    with stage("evaluate"):
        evaluation = evaluate_test_pictures(output)
    with stage("encode"):
        from latent_ae import encode

        source = output / "data/train.parquet"
        options = {"resolution": SIDE, "batch_size": 64, "workers": 1, "console": console}
        encode(output / "autoencoder", source, output / "latents", **options)
    with stage("train the denoiser"):
        train_denoiser(output, denoiser_steps)
    with stage("sample with stock diffusers"):
        drawings = {scale: draw(output, scale, samples) for scale in GUIDANCE}
    with stage("judge"):
        numbers = judge(output, pictures, halves, drawings, classifier_epochs)
    write_metrics(output, evaluation, numbers, samples)
    tell(output, numbers, samples)


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Announces a stage and notes how long it takes."""
    console.rule(f"[bold]{title}", align="left")
    begun = time.perf_counter()
    yield
    seconds[title] = round(time.perf_counter() - begun, 1)
    console.print(f"[dim]{title}: {seconds[title]:.1f} s")


def train_autoencoder(output: Path, steps: int | None, recipe: Path = RECIPE) -> None:
    """Trains by a recipe, or goes on, and exports."""
    from latent_ae import export_run, load_config, train

    if (output / "autoencoder").exists():
        return
    overrides = [
        f"data.path={output / 'data/train.parquet'}",
        f"validation.path={output / 'data/test.parquet'}",
        f"output={output / 'training'}",
    ]
    if steps is not None:
        overrides.append(f"training.steps={steps}")
    train(load_config(recipe, overrides), console)
    export_run(output / "training", output / "autoencoder", license_name="MIT")


def evaluate_test_pictures(output: Path) -> dict[str, float]:
    """Measures the exported folder on all test pictures."""
    from latent_ae import Evaluation, evaluate
    from latent_ae.config_file import load_protocol

    folder = output / "evaluation"
    if (folder / "evaluation.json").exists():
        result = Evaluation.load(folder)
    else:
        result = evaluate(
            output / "autoencoder",
            output / "data/test.parquet",
            load_protocol("photos256", [f"resolution={SIDE}"]),
            out=folder,
            quick=True,
            references=(),  # they count three colours, and these pictures are grey
            batch_size=50,
            console=console,
        )
    return result.metrics


def train_denoiser(output: Path, steps: int) -> None:
    """Trains the class-conditional denoiser, or goes on, and saves the pipeline."""
    from train_denoiser import DenoiserConfig, train

    if (output / "pipeline").exists():
        return
    train(
        output / "latents",
        output / "pipeline",
        DenoiserConfig(steps=steps, **DENOISER),
        run=output / "training-denoiser",
        console=console,
    )


def draw(output: Path, guidance: float, samples: int) -> Tensor:
    """Drawings of the saved pipeline, uint8 of shape (samples, 3, 32, 32), sorted by class.

    Each guidance starts from the same noise, so that pictures in the same place can be compared.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    file = output / f"samples-{guidance:g}.npz"
    if (known := kept_drawings(file, samples)) is not None:
        return known
    pipe: Any = DiffusionPipeline.from_pretrained(output / "pipeline", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    labels = [name for name in CLASSES for _ in range(samples // len(CLASSES))]
    parts = []
    for first in range(0, samples, BATCH):
        images = pipe(
            class_labels=labels[first : first + BATCH],
            guidance_scale=guidance,
            num_inference_steps=SAMPLING_STEPS,
            generator=torch.Generator().manual_seed(first),
            output_type="pt",
        ).images
        parts.append((255 * images).round().to(torch.uint8))
    return keep_drawings(file, torch.cat(parts))


def kept_drawings(file: Path, samples: int) -> Tensor | None:
    """The drawings of an earlier start, where there are as many."""
    if file.exists():
        with np.load(file) as content:
            if len(content["images"]) == samples:
                return torch.from_numpy(content["images"])
    return None


def keep_drawings(file: Path, drawings: Tensor) -> Tensor:
    """Writes drawings whole or not at all; returns them."""
    aside = file.with_suffix(".tmp.npz")
    np.savez(aside, images=drawings.numpy())
    aside.rename(file)
    return drawings


def judge(
    output: Path,
    pictures: dict[str, tuple[np.ndarray, np.ndarray]],
    halves: list[Tensor],
    drawings: dict[float, Tensor],
    epochs: int,
) -> dict[str, Any]:
    """Writes the sheets; returns the judge's accuracy and the numbers of each set of pictures."""
    others = rgb(pictures["test"][0])[halves[1]]
    decoded = reconstruction(output, others)
    save_sheets(output, others, decoded, drawings)
    named = {f"drawn, guidance {scale:g}": drawn for scale, drawn in drawings.items()}
    return judged(output, pictures, halves, decoded, named, epochs)


def judged(
    output: Path,
    pictures: dict[str, tuple[np.ndarray, np.ndarray]],
    halves: list[Tensor],
    decoded: Tensor,
    drawings: dict[str, Tensor],
    epochs: int,
) -> dict[str, Any]:
    """The judge's accuracy and the numbers of each set of pictures.

    Args:
        output: where the judge is kept.
        pictures: by part, with their labels.
        halves: rows of two sets of test pictures, to compare with and to be compared.
        decoded: the reconstructions of the second, uint8 of shape (N, 3, 32, 32).
        drawings: by name, likewise, sorted by class.
        epochs: the judge learns.
    """
    from fashion_judge import measure, taught_classifier

    images = {part: rgb(values) for part, (values, _) in pictures.items()}
    labels = {
        part: torch.from_numpy(part_labels).long() for part, (_, part_labels) in pictures.items()
    }
    known = (images["train"], labels["train"])
    classifier = taught_classifier(output / "classifier.safetensors", *known, len(CLASSES), epochs)
    reference, others = (images["test"][rows] for rows in halves)
    sets = {"other test pictures": others, "their reconstructions": decoded} | drawings
    numbers = measure(sets, labels["test"][halves[1]], reference, images["train"], classifier)
    right = classifier.classify(images["test"]) == labels["test"]
    return {"classifier_accuracy": right.float().mean().item(), "sets": numbers}


def rgb(pictures: np.ndarray) -> Tensor:
    """Padded pictures as uint8 of shape (N, 3, 32, 32)."""
    return torch.from_numpy(padded(pictures))[:, None].expand(-1, 3, -1, -1)


def reconstruction(output: Path, images: Tensor) -> Tensor:
    """What the exported autoencoder makes of pictures; both uint8 of shape (N, 3, 32, 32)."""
    from latent_ae.data import normalize, to_uint8
    from latent_ae.frozen import FrozenAutoencoder

    frozen = FrozenAutoencoder(output / "autoencoder")
    parts = (frozen.decode(frozen.encode(normalize(part))[0]) for part in images.split(BATCH))
    return torch.cat([to_uint8(part) for part in parts])


def save_sheets(
    output: Path, images: Tensor, decoded: Tensor, drawings: dict[float, Tensor]
) -> None:
    """Sheets with a column for each class: pictures above their reconstructions, and drawings."""
    from latent_ae.pictures import save_sheet

    def columns(pictures: Tensor) -> dict[str, Tensor]:
        larger = pictures.repeat_interleave(2, 2).repeat_interleave(2, 3)
        height = len(pictures) // len(CLASSES)
        return {name: larger[i * height :][:4] for i, name in enumerate(CLASSES)}

    pairs = torch.stack([images, decoded], 1).flatten(0, 1)
    save_sheet(output / "reconstructions.png", columns(pairs))
    for scale, drawn in drawings.items():
        save_sheet(output / f"samples-{scale:g}.png", columns(drawn))


def write_metrics(
    output: Path, evaluation: dict[str, float], numbers: dict[str, Any], samples: int
) -> None:
    """Everything that another machine's numbers must be compared with."""
    last_rows = {
        name: (output / name / "log.jsonl").read_text().splitlines()[-1]
        for name in ("training", "training-denoiser")
    }
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        "versions": {name: version(name) for name in ("latent_ae", "torch", "diffusers")},
        "seconds": seconds,  # of this start; a stage that was there already took none
        "steps": {name: json.loads(row)["step"] for name, row in last_rows.items()},
        "sampling_steps": SAMPLING_STEPS,
        "samples": samples,
        "autoencoder": evaluation,
        **numbers,
    }
    (output / "metrics.json").write_text(json.dumps(content, indent=2) + "\n")


def tell(output: Path, numbers: dict[str, Any], samples: int) -> None:
    """The table, and what to look at."""
    sheets = f"{output}/reconstructions.png and {output}/samples-*.png"
    tell_sets(numbers, f"{samples} pictures each", sheets)


def tell_sets(numbers: dict[str, Any], title: str, sheets: str) -> None:
    """The numbers of each set of pictures as a table, the judge's own, and what to look at."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for head in ("recognised", "Fréchet, AlexNet", "Fréchet, classifier", "nearest known"):
        table.add_column(head, justify="right")
    for name, row in numbers["sets"].items():
        table.add_row(
            name,
            f"{100 * row['recognised']:.1f} %",
            f"{row['frechet_alexnet']:.2f}",
            f"{row['frechet_classifier']:.2f}",
            f"{row['nearest']:.1f}",
        )
    console.print(table)
    console.print(
        f"the judge is right on {100 * numbers['classifier_accuracy']:.1f} % of all test pictures\n"
        f"look at {sheets}",
        markup=False,
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(main)
