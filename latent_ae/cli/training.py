"""The verbs around a training run: train, distill, export, config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from latent_ae.cli.app import (
    ConfigFile,
    Data,
    Overrides,
    Source,
    Split,
    app,
    is_main_process,
    say,
    stderr,
)
from latent_ae.errors import UserError

if TYPE_CHECKING:
    from latent_ae.training import DryRun

__all__ = ["config", "distill", "export", "train"]


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
    console = stderr()
    main = is_main_process()
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
def distill(
    teacher: Annotated[
        Path,
        typer.Argument(
            help="Folder of an AutoencoderKL, AutoencoderDC or AutoencoderTiny.", metavar="TEACHER"
        ),
    ],
    data: Data,
    out: Annotated[Path, typer.Argument(help="The folder to make.", metavar="OUT")],
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(help="Another recipe than the package's, a YAML file.")
    ] = None,
    source: Source = None,
    split: Split = "train",
    license: Annotated[str, typer.Option(help="For the model card.")] = "unknown",
) -> None:
    """Teach a tiny autoencoder a large one's latents, for previews; exported as AutoencoderTiny.

    OUT takes the teacher's place: `pipeline.vae = AutoencoderTiny.from_pretrained(OUT)`. It is
    trained in OUT-run; the same command goes on where a run was stopped. Overrides are those of
    `train`, such as `training.steps=5000 data.resolution=128 distillation.target=picture
    validation.path=HELD_OUT`; `latent-ae config OUT-run/config.yaml` shows all keys.
    """
    from latent_ae.distillation import RECIPE
    from latent_ae.distillation import distill as run
    from latent_ae.export import loading_call

    made = run(
        teacher,
        data,
        out,
        overrides or (),
        source=source,
        split=split,
        recipe=config or RECIPE,
        license_name=license,
        console=stderr(),
    )
    if made is not None:
        name = json.loads((out / "config.json").read_text())["_class_name"]
        say(f"{out} is ready: {loading_call(name, str(out))[1]}")


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
        Literal["scale", "shift", "channels", "folded", "kept"] | None,
        typer.Option(
            help="Which statistics of the latents to write: `scale` (scaling_factor, which every "
            "pipeline uses), `shift` (and shift_factor), `channels` (and latents_mean and _std); "
            "`folded` puts the channels' statistics into the weights: right in every pipeline; "
            "`kept` leaves those of the network that was fine-tuned, as is done unasked where its "
            "encoder was frozen.",
            show_default="scale",
        ),
    ] = None,
    images: Annotated[int, typer.Option(help="Training crops to measure them on.", min=1)] = 256,
    data: Annotated[Path | None, typer.Option(help="Measure on these pictures instead.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="`fp16` or `bf16` weights beside fp32, for from_pretrained(variant=…); repeatable."
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Split larger weights into files of this size, such as 2GB.")
    ] = "10GB",
    license: Annotated[str, typer.Option(help="For the model card.")] = "unknown",
) -> None:
    """Write a run's weights as a folder that stock diffusers loads.

    The averaged (EMA) weights, with the scale measured on the data's own latents; loaded again and
    compared before the folder appears.
    """
    from latent_ae.export import caveats, export_run, loading_call

    export_run(
        run,
        out,
        checkpoint=checkpoint,
        statistics=statistics,
        images=images,
        data=data,
        variants=variant or (),
        max_shard_size=max_shard_size,
        license_name=license,
    )
    settings = json.loads((out / "config.json").read_text())
    for caveat in caveats(settings):
        say(f"note: {caveat}")
    say(f"{out} is ready: {loading_call(settings['_class_name'], str(out))[1]}")


@app.command()
def config(
    config: Annotated[Path | None, typer.Argument(help="YAML file.", metavar="CONFIG")] = None,
    overrides: Overrides = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema that editors complete from.")
    ] = False,
) -> None:
    """Print a config resolved, with what it means: sizes, compression, loss, batch.

    Nothing is trained; of a vision model on the hub only its config is fetched. The first line of
    each file in configs/ points editors to the schema.
    """
    from latent_ae.config import Config
    from latent_ae.config_file import dump_yaml, load_config

    if schema:
        print(json.dumps(Config.model_json_schema(), indent=2))
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
    stderr().print(
        f"it works: {result.images_per_second:.1f} images/s · {hours:.1f} hours for all steps · "
        f"peak memory {result.peak_memory / gib:.2f} GiB a process · checkpoints of "
        f"{result.checkpoint / gib:.3f} GiB, {result.free / gib:.0f} GiB free",
        highlight=False,
    )
