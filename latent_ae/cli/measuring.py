"""The verbs that measure: evaluate, compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latent_ae.cli.app import (
    BatchSize,
    Data,
    Model,
    Source,
    Split,
    Workers,
    app,
    is_main_process,
    require_writable,
    stderr,
)
from latent_ae.errors import UserError

if TYPE_CHECKING:
    from latent_ae.evaluation import Evaluation

__all__ = ["compare", "evaluate"]

ProtocolName = Annotated[
    str,
    typer.Option(
        "--protocol",
        help="How to measure: `photos256`, `native` (each picture at its own size), "
        "`imagenet256-val50k`, `coco2017-val5k`, or a YAML file of the keys.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for evaluation.json, per_image.parquet, pictures, report.html."),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Reconstruction only: no latent space, no low precision.")
]
References = Annotated[
    bool,
    typer.Option(help="Measure Lanczos, JPEG and WebP at as many values or bits beside it."),
]
Probes = Annotated[int, typer.Option(help="Pictures for what takes more passes.", min=1)]
Pictures = Annotated[
    int, typer.Option(help="How many of the first and of the worst to keep in --out.", min=0)
]
FrechetWeights = Annotated[
    str | None, typer.Option(help="File with the weights of the Fréchet distance's network.")
]
LpipsWeights = Annotated[
    str | None, typer.Option(help="safetensors file with torchvision's VGG16, for LPIPS.")
]


@app.command()
def evaluate(
    model: Model,
    data: Data,
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            help="Changes to the protocol, such as images=500 resolution=512 precision=bf16 "
            "code=sample 'lpips=[alex, vgg]' frechet=inception.",
            metavar="[KEY=VALUE]...",
        ),
    ] = None,
    protocol: ProtocolName = "photos256",
    out: Out = None,
    quick: Quick = False,
    references: References = True,
    probes: Probes = 8,
    pictures: Pictures = 8,
    batch_size: BatchSize = 8,
    workers: Workers = 0,
    source: Source = None,
    split: Split = "train",
    name: Annotated[str | None, typer.Option(help="A short title; MODEL's folder name.")] = None,
    frechet_weights: FrechetWeights = None,
    lpips_weights: LpipsWeights = None,
    json: Annotated[Path | None, typer.Option(help="Write evaluation.json here.")] = None,
) -> None:
    """Measure an autoencoder: reconstruction, latent space, low precision.

    MODEL is any image autoencoder of diffusers'. PSNR, SSIM, MS-SSIM, LPIPS and a Fréchet distance
    with 95 % intervals, beside classical codecs at as many values or bits; of quantised latents,
    how the codes are used and what they take once coded. Several processes share the pictures:
    `accelerate launch -m latent_ae evaluate ...`.
    """
    from json import dumps

    from latent_ae.config_file import load_protocol
    from latent_ae.data import source_of
    from latent_ae.evaluation import REFERENCES
    from latent_ae.evaluation import evaluate as run

    if json is not None:
        require_writable(json)
    result = run(
        model,
        source_of(data, source, split),
        load_protocol(protocol, changes),
        out=out,
        name=name,
        quick=quick,
        references=REFERENCES if references else (),
        probes=probes,
        pictures=pictures,
        batch_size=batch_size,
        workers=workers,
        frechet_weights=frechet_weights,
        lpips_weights=lpips_weights,
        console=stderr(),
    )
    if not is_main_process():
        return
    if json is not None:
        json.write_text(dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
    _tell([result])
    if out is not None:
        _report([out], out)


@app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders that `evaluate --out` wrote, and, with --data, autoencoders to measure; "
            "then KEY=VALUE changes to the protocol.",
            metavar="A B... [KEY=VALUE]...",
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="Pictures to measure autoencoders on.", metavar="DATA")
    ] = None,
    protocol: ProtocolName = "photos256",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for report.html and a result folder of each autoencoder."),
    ] = None,
    quick: Quick = False,
    references: References = True,
    probes: Probes = 8,
    pictures: Pictures = 8,
    batch_size: BatchSize = 8,
    workers: Workers = 0,
    source: Source = None,
    split: Split = "train",
    frechet_weights: FrechetWeights = None,
    lpips_weights: LpipsWeights = None,
) -> None:
    """Measure or read several autoencoders and put them into one table and one report.

    Refused unless all were measured by the same protocol on the same pixels, told by a hash of
    them. Results that lie in --out already are not measured again if model, protocol, data's path
    and options match; pictures that changed in place are not noticed.
    """
    from latent_ae.config_file import load_protocol
    from latent_ae.data import source_of
    from latent_ae.evaluation import REFERENCES
    from latent_ae.evaluation import compare as run

    folders = [item for item in models if "=" not in item or Path(item).exists()]
    changes = [item for item in models if item not in folders]
    options: dict[str, Any] = {
        "quick": quick,
        "references": REFERENCES if references else (),
        "probes": probes,
        "pictures": pictures,
        "batch_size": batch_size,
        "workers": workers,
        "frechet_weights": frechet_weights,
        "lpips_weights": lpips_weights,
        "console": stderr(),
    }
    where = None if data is None else source_of(data, source, split)
    rule = load_protocol(protocol, changes)
    if folders and data is None and rule != load_protocol("photos256"):
        raise UserError("a protocol is for measuring: give --data, or leave it out")
    results, made = run(folders, where, rule, out=out, **options)
    if not is_main_process():
        return
    _tell(results)
    if out is not None:
        _report(made, out)


def _report(folders: list[Path], out: Path) -> None:
    from latent_ae.evaluation.report import write_report

    stderr().print(f"report: {write_report(folders, out / 'report.html')}", markup=False)


def _tell(results: list[Evaluation]) -> None:
    from rich.console import Console

    from latent_ae.evaluation.tables import (
        codes_table,
        latents_table,
        reconstruction_table,
        warnings_of,
    )

    console = Console()
    console.print(reconstruction_table(results))
    if any(result.content.get("codes") for result in results):
        console.print(codes_table(results))
    if any(result.content["latents"] for result in results):
        console.print(latents_table(results))
    first, data = results[0], results[0].content["data"]
    stderr().print(
        f"{data['images']} pictures · protocol {first.protocol.name}: "
        f"{first.protocol.in_words()} · pixels {data['pixels_sha256'][:12]}",
        style="dim",
        markup=False,
        highlight=False,
    )
    for warning in warnings_of(results):
        stderr().print(warning, style="yellow", markup=False, highlight=False)
