"""The command line. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latent_ae.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from latent_ae.training import DryRun

__all__ = ["app", "main"]

app = typer.Typer(
    name="latent-ae",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Train, measure, export and use the autoencoder of a latent diffusion model.\n\n"
    "The usual way: `train` a config, `export` the run, `evaluate` the exported folder, `encode` a "
    "data set with it. Every verb that takes MODEL takes any folder of diffusers' `AutoencoderKL`.",
)

ConfigFile = Annotated[
    Path, typer.Argument(help="YAML file, such as configs/kl_f8.yaml.", metavar="CONFIG")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Dotted keys over the file's: training.steps=100", metavar="[KEY=VALUE]..."
    ),
]
Model = Annotated[
    Path, typer.Argument(help="Exported folder, or any AutoencoderKL folder.", metavar="MODEL")
]
Data = Annotated[
    str,
    typer.Argument(
        help="Folder of images, saved data set, parquet file(s), webdataset tar(s) or, with "
        "--source hub, a name on the hub.",
        metavar="DATA",
    ),
]
Resolution = Annotated[
    int,
    typer.Option(help="Shorter side after the Lanczos resize, and side of the centre crop.", min=1),
]
Limit = Annotated[int | None, typer.Option(help="Take only the first N pictures.", min=1)]
Source = Annotated[
    Literal["imagefolder", "saved", "parquet", "webdataset", "hub"] | None,
    typer.Option(help="What DATA is; guessed from the path when left out."),
]
Split = Annotated[str, typer.Option(help="Which split, where DATA has several.")]
BatchSize = Annotated[int, typer.Option(help="Pictures a pass.", min=1)]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Do two steps, a validation, a save and a resume in a folder beside `output`, say "
            "what the run will take or what would not work, and leave nothing behind.",
        ),
    ] = False,
) -> None:
    """Train an autoencoder; the same command resumes a run that was stopped.

    One process: `latent-ae train configs/tiny.yaml data.path=photos`. Several GPUs or machines:
    `accelerate launch -m latent_ae train configs/kl_f8.yaml`. Checkpoints, `log.jsonl`, TensorBoard
    rows and validation pictures go to the folder that the config calls `output`. SIGTERM and
    SIGUSR1 end it after the running step, with a checkpoint and exit code 0.
    """
    from latent_ae import training
    from latent_ae.config_file import load_config
    from latent_ae.run_folder import RunFolder

    settings = load_config(config, overrides)
    console = _console()
    main = os.environ.get("RANK", "0") == "0"
    if dry_run:
        result = training.dry_run(settings, console)
        if main:
            _print_dry_run(result)
        return
    folder = RunFolder(training.train(settings, console))
    kept = folder.all_checkpoints()
    if main and kept and folder.progress(kept[-1])["step"] >= settings.training.steps:
        console.print(f"done; next: latent-ae export {folder.path} OUT", markup=False)


@app.command()
def export(
    run: Annotated[
        Path, typer.Argument(help="The run's folder: `output` of its config.", metavar="RUN")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.", metavar="OUT")],
    checkpoint: Annotated[
        str, typer.Option(help="`last`, `best` by its validation, or a step's number.")
    ] = "last",
    statistics: Annotated[
        Literal["scale", "shift", "channels"],
        typer.Option(
            help="Which statistics of the latents to write: `scale` (scaling_factor, which every "
            "pipeline uses), `shift` (and shift_factor), `channels` (and latents_mean and _std)."
        ),
    ] = "scale",
    images: Annotated[int, typer.Option(help="Training crops to measure them on.", min=1)] = 256,
    data: Annotated[Path | None, typer.Option(help="Measure on these pictures instead.")] = None,
    license: Annotated[str, typer.Option(help="For the model card.")] = "unknown",
) -> None:
    """Write a run's weights as a folder that stock diffusers loads.

    The averaged (EMA) weights, with the scale measured on the data's own latents; loaded again and
    compared before the folder appears.
    """
    from latent_ae.export import IGNORED_BY, export_run

    export_run(
        run,
        out,
        checkpoint=checkpoint,
        statistics=statistics,
        images=images,
        data=data,
        license_name=license,
    )
    console = _console()
    key = {"shift": "shift_factor", "channels": "latents_mean"}.get(statistics)
    if key:
        console.print(
            f"note: these pipelines ignore {key} and scale by scaling_factor alone: "
            f"{', '.join(IGNORED_BY[key])}"
        )
    console.print(f"{out} is ready: AutoencoderKL.from_pretrained({str(out)!r})", markup=False)


@app.command()
def evaluate(
    model: Model,
    data: Data,
    resolution: Resolution = 256,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    source: Source = None,
    split: Split = "train",
    json: Annotated[Path | None, typer.Option(help="Write the result and protocol here.")] = None,
) -> None:
    """Measure PSNR, SSIM and LPIPS of the reconstruction.

    Shorter side resized by Lanczos, centre crop, posterior mode, fp32, rounded to 8 bits; LPIPS
    v0.1 with AlexNet. Beside it the same for the picture reduced by Lanczos to as many numbers as
    its latents have.
    """
    from json import dumps

    from latent_ae.data import source_of
    from latent_ae.evaluation import evaluate

    if json is not None:  # what cannot be written is better known before the work
        json.parent.mkdir(parents=True, exist_ok=True)
        if json.is_dir() or not os.access(json.parent, os.W_OK):
            raise UserError(f"{json} cannot be written")
    pictures = source_of(data, source, split)
    result = evaluate(model, pictures, resolution=resolution, limit=limit, batch_size=batch_size)
    if json is not None:
        json.write_text(dumps(result.to_json(), indent=2) + "\n")
    _print_metrics({"autoencoder": result.metrics, "Lanczos": result.lanczos})
    protocol = result.protocol
    _console().print(
        f"{protocol['images']} pictures · {protocol['preprocessing']} · posterior mode · "
        f"{protocol['values_per_image']} values a picture",
        style="dim",
    )
    if result.skipped:
        _console().print(f"{len(result.skipped)} unreadable pictures were skipped")


@app.command()
def encode(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Argument(help="The latents folder to make.", metavar="OUT")],
    resolution: Resolution = 256,
    batch_size: BatchSize = 8,
    workers: Annotated[int, typer.Option(help="Loader processes.", min=0)] = 2,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"], typer.Option(help="Of the stored moments.")
    ] = "float16",
    limit: Limit = None,
    source: Source = None,
    split: Split = "train",
) -> None:
    """Encode a data set to latents: mean and log-variance of every picture.

    The folder holds `manifest.json`, safetensors shards and a parquet index;
    `latent_ae.LatentDataset` reads it, samples and scales. Without a manifest a folder is
    unfinished: the same command begins it again.
    """
    from latent_ae.data import source_of
    from latent_ae.latents import encode

    console = _console()
    manifest = encode(
        model,
        source_of(data, source, split),
        out,
        resolution=resolution,
        batch_size=batch_size,
        workers=workers,
        dtype=dtype,
        limit=limit,
        console=console,
    )
    for skip in manifest.skipped:
        console.print(f"skipped {skip.key}: {skip.reason}", style="yellow", markup=False)
    shape = " × ".join(map(str, manifest.latent_shape))
    console.print(f"{manifest.count} latents of {shape} in {out}")


@app.command()
def decode(
    latents: Annotated[Path, typer.Argument(help="What `encode` wrote.", metavar="LATENTS")],
    out: Annotated[Path, typer.Argument(help="The folder for the pictures.", metavar="OUT")],
    model: Annotated[
        Path | None, typer.Option(help="The autoencoder, if it has moved since.")
    ] = None,
    batch_size: BatchSize = 8,
    limit: Limit = None,
) -> None:
    """Decode a latents folder back to PNG files, named by their keys."""
    from latent_ae.latents import decode

    console = _console()
    options: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "console": console}
    count = decode(latents, out, model=model, **options)
    console.print(f"{count} pictures in {out}")


@app.command()
def config(
    config: Annotated[Path | None, typer.Argument(help="YAML file.", metavar="CONFIG")] = None,
    overrides: Overrides = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema that editors complete from.")
    ] = False,
) -> None:
    """Print a config resolved, with what it means: sizes, compression, loss, batch.

    Nothing is trained or downloaded. The first line of each file in configs/ points editors to the
    schema.
    """
    from json import dumps

    from latent_ae.config import Config
    from latent_ae.config_file import dump_yaml, load_config

    if schema:
        print(dumps(Config.model_json_schema(), indent=2))
        return
    if config is None:
        raise UserError("give a YAML file, or --schema")
    settings = load_config(config, overrides)
    from latent_ae.describe import describe

    facts = describe(settings)
    print(dump_yaml(settings), end="")
    width = max(map(len, facts))
    print("\n" + "\n".join(f"# {title:<{width}}  {fact}" for title, fact in facts.items()))


def _print_dry_run(result: DryRun) -> None:
    gib, hours = 2**30, result.seconds / 3600
    _console().print(
        f"it works: {result.images_per_second:.1f} images/s · {hours:.1f} hours for all steps · "
        f"peak memory {result.peak_memory / gib:.2f} GiB a process · checkpoints of "
        f"{result.checkpoint / gib:.3f} GiB, {result.free / gib:.0f} GiB free",
        highlight=False,
    )


def _print_metrics(rows: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for title in ("", "PSNR (dB)", "SSIM", "LPIPS"):
        table.add_column(title, justify="left" if not title else "right")
    for name, row in rows.items():
        table.add_row(name, f"{row['psnr']:.2f}", f"{row['ssim']:.3f}", f"{row['lpips']:.3f}")
    Console().print(table)


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def main() -> None:
    """Runs the command line: bad input becomes one sentence and exit code 2."""
    try:
        app()
    except (UserError, OSError) as error:  # OSError: no permission, no space, a file for a folder
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (process {rank})'}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        # Not by its class: the verbs that need no torch must not import it.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(
            "error: the GPU's memory is too small for this; lower data.batch_size (and raise "
            "training.accumulation), or set training.gradient_checkpointing=true: "
            f"{str(error).splitlines()[0]}",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
