"""The verb `encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from latent_ae.cli.app import Data, Limit, Source, Split, app, is_main_process, stderr
from latent_ae.errors import UserError

__all__ = ["encode"]

_PICTURES, _DATA, _STORED = "Pictures", "Data", "What is stored"

EncoderModel = Annotated[
    Path,
    typer.Argument(
        help="Exported folder, or any image autoencoder of diffusers' on disk.", metavar="MODEL"
    ),
]
Out = Annotated[Path, typer.Argument(help="The latents folder to make.", metavar="OUT")]


Resolution = Annotated[
    int,
    typer.Option(
        help="Side of the crop in pixels; with --buckets, of a square of equal area.",
        min=1,
        rich_help_panel=_PICTURES,
    ),
]
Resize = Annotated[
    int | None,
    typer.Option(
        help="Shorter side after the resize, where crops shall have room to move.",
        min=1,
        rich_help_panel=_PICTURES,
    ),
]
Resample = Annotated[
    Literal["lanczos", "bicubic", "adm"],
    typer.Option(help="`adm`: as guided-diffusion prepares ImageNet.", rich_help_panel=_PICTURES),
]
Crops = Annotated[
    int,
    typer.Option(
        help="Crops a picture: one is the centre, several lie at random places.",
        min=1,
        rich_help_panel=_PICTURES,
    ),
]
Flip = Annotated[bool, typer.Option("--flip", help="Mirror images too.", rich_help_panel=_PICTURES)]
Buckets = Annotated[
    bool,
    typer.Option(
        "--buckets",
        help="Keep about each picture's aspect: several sizes of one area.",
        rich_help_panel=_PICTURES,
    ),
]
BucketStep = Annotated[
    int | None,
    typer.Option(
        help="Sides of buckets are multiples of this; a sixteenth of the resolution when left out.",
        min=1,
        rich_help_panel=_PICTURES,
    ),
]
MaxAspect = Annotated[
    float,
    typer.Option(help="Of the longest bucket.", min=1, rich_help_panel=_PICTURES),
]
MinSide = Annotated[
    int,
    typer.Option(
        help="Skip pictures whose shorter side is below this; smaller ones are enlarged.",
        min=0,
        rich_help_panel=_PICTURES,
    ),
]
Seed = Annotated[int, typer.Option(help="Of the random crops.", min=0, rich_help_panel=_PICTURES)]
Streaming = Annotated[
    bool,
    typer.Option(
        "--streaming",
        help="Read file by file without indexing the data first.",
        rich_help_panel=_DATA,
    ),
]
Filter = Annotated[
    str | None,
    typer.Option(
        help="Take only rows for which this holds: 'score > 5 and label in (1, 2)'.",
        rich_help_panel=_DATA,
    ),
]
ImageColumn = Annotated[
    str | None, typer.Option(help="The pictures' column.", rich_help_panel=_DATA)
]
KeyColumn = Annotated[str | None, typer.Option(help="Their names' column.", rich_help_panel=_DATA)]
LabelColumn = Annotated[
    str | None, typer.Option(help="Their classes' column.", rich_help_panel=_DATA)
]
CaptionColumn = Annotated[
    str | None, typer.Option(help="Their texts' column.", rich_help_panel=_DATA)
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        help="Carry this column into the index too; may be repeated.", rich_help_panel=_DATA
    ),
]
Store = Annotated[
    Literal["moments", "mode", "indices"] | None,
    typer.Option(
        help="Mean and log-variance, the mean (or latents before a quantizer) alone, or indices "
        "of codes; what the autoencoder gives when left out.",
        rich_help_panel=_STORED,
    ),
]
Dtype = Annotated[
    Literal["float16", "bfloat16", "float32", "uint8", "uint16", "int32"] | None,
    typer.Option(
        help="float16, or for indices the smallest integers that hold them, when left out.",
        rich_help_panel=_STORED,
    ),
]
ShardMb = Annotated[
    int, typer.Option(help="Size of a shard, at most.", min=1, rich_help_panel=_STORED)
]
Precision = Annotated[
    Literal["bf16", "fp16", "fp32"] | None,
    typer.Option(help="Of the encoder; left out, bf16 where the device is fast in it."),
]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Codes a pass; 32 on a GPU, 2 on a CPU when left out.", min=1),
]
Workers = Annotated[
    int | None,
    typer.Option(help="Loader processes; 2 on a CPU, on a GPU its share of the cores.", min=0),
]
Ray = Annotated[
    int | None,
    typer.Option(help="Encode on a Ray cluster by this many actors (extra `ray`).", min=1),
]


@app.command()
def encode(
    model: EncoderModel,
    data: Data,
    out: Out,
    resolution: Resolution = 256,
    resize: Resize = None,
    resample: Resample = "lanczos",
    crops: Crops = 1,
    flip: Flip = False,
    buckets: Buckets = False,
    bucket_step: BucketStep = None,
    max_aspect: MaxAspect = 2.0,
    min_side: MinSide = 0,
    seed: Seed = 0,
    source: Source = None,
    split: Split = "train",
    streaming: Streaming = False,
    filter: Filter = None,
    limit: Limit = None,
    image_column: ImageColumn = None,
    key_column: KeyColumn = None,
    label_column: LabelColumn = None,
    caption_column: CaptionColumn = None,
    keep: Keep = None,
    store: Store = None,
    dtype: Dtype = None,
    shard_mb: ShardMb = 64,
    precision: Precision = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    ray: Ray = None,
) -> None:
    """Encode a data set to latents, or go on where an earlier run was stopped.

    The folder holds `manifest.json`, safetensors shards and a parquet index
    (docs/latents-format.md); `latent_ae.LatentDataset` reads it, samples and scales. Stopped or
    killed, the same command goes on. Several GPUs:
    `accelerate launch -m latent_ae encode MODEL DATA OUT`.
    """
    given = locals()
    from latent_ae.config import EncodingSource, Preprocessing
    from latent_ae.data import source_of

    # The options bear the names of the models' fields.
    cut = _validated(Preprocessing, {n: given[n] for n in Preprocessing.model_fields})
    found = source_of(data, source, split).model_dump()
    named = {n: given[n] for n in EncodingSource.model_fields if n in given and n not in found}
    named |= {"streaming": streaming, "filter": filter, "image_column": image_column}
    config = _validated(EncodingSource, found | named | {"keep": tuple(keep or ())})
    options = {n: given[n] for n in ("batch_size", "workers", "store", "dtype", "precision")}
    options |= {"preprocessing": cut, "shard_bytes": shard_mb << 20}
    _run(model, config, out, ray, options)


def _run(model: Path, config: Any, out: Path, ray: int | None, options: dict[str, Any]) -> None:
    console = stderr() if is_main_process() else None
    if ray is not None:
        from latent_ae.latents.ray_stage import encode_on_ray

        manifest = encode_on_ray(model, config, out, actors=ray, **options)
    else:
        from latent_ae.latents import encode

        try:
            manifest = encode(model, config, out, console=console, **options)
        except KeyboardInterrupt:
            if console is not None:
                console.print("stopped; the same command goes on", style="yellow")
            raise SystemExit(130) from None
    if console is None:
        return
    hint = f" (latent-ae latents info {out})" if manifest.skipped else ""
    made = f"{manifest.count} latents of {manifest.pictures} pictures in {out}"
    console.print(f"{made}; skipped: {manifest.skipped}{hint}", markup=False)
    if manifest.renamed:
        console.print(
            f"{manifest.renamed} pictures shared another's key and bear # and their place now",
            style="yellow",
        )


def _validated(kind: Any, values: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
