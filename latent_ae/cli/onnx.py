"""The verb for runtimes without torch: onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from latent_ae.cli.app import Model, app, say

__all__ = ["onnx"]


@app.command()
def onnx(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to make.", metavar="OUT")],
    opset: Annotated[
        int,
        typer.Option(
            help="Version of ONNX' operators; GroupNorm is one node from 21, attention from 23.",
            min=18,
            max=23,
        ),
    ] = 18,
    precision: Annotated[
        Literal["fp32", "fp16"],
        typer.Option(help="Of weights, inputs and outputs; fp16 where force_upcast is false."),
    ] = "fp32",
) -> None:
    """Write encoder and decoder as ONNX, for runtimes without torch.

    `vae_encoder/model.onnx` and `vae_decoder/model.onnx`, as Optimum's pipelines read them; latents
    are raw, batch and sides dynamic. onnxruntime runs both on photographs and is compared with
    torch before the folder appears. Needs `pip install "latent_ae[onnx]"`.
    """
    from latent_ae.onnx_export import export_onnx

    record = export_onnx(model, out, opset=opset, precision=precision)
    for size in record["comparison"]["sizes"]:
        say(_in_words(size))
    say(f"{out} is ready: opset {opset}, {precision}")


def _in_words(size: dict[str, Any]) -> str:
    """The differences on photographs of one size."""
    batch, _, height, width = size["shape"]
    parts = ", ".join(
        f"{name} {value['largest']:.2g} of a range of {value['range']:.3g}"
        for name, value in size.items()
        if name != "shape"
    )
    return f"largest difference from torch, {batch} photograph(s) of {height} × {width}: {parts}"
