"""What onnxruntime costs on a CPU beside torch, for a network of Stable Diffusion's size.

    python benchmarks/onnx_export.py [--side 256] [--rounds 5] [--threads 2] [--opset 18 --opset 23]

Random weights: the time does not depend on them. torch runs eagerly in fp32 with channels_last,
as `latent-ae encode` does. The variants take turns within one run; prints medians, the medians of
the rounds' ratios to torch, and the largest differences that the export has measured.
"""

import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import onnxruntime
import torch
import typer

from latent_ae import export_onnx, load_config
from latent_ae.autoencoder import build_network
from latent_ae.frozen import FrozenAutoencoder

ROOT = Path(__file__).parents[1]


def main(
    side: Annotated[int, typer.Option(help="Of the one picture, in pixels.")] = 256,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    threads: Annotated[int, typer.Option(help="Of torch and of onnxruntime.")] = 2,
    opset: Annotated[list[int], typer.Option(help="One file for each.")] = (18, 23),
) -> None:
    """Measures encoder and decoder."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = build_network(load_config(ROOT / "configs/kl_f8.yaml").network)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network.save_pretrained(folder / "model")
        frozen = FrozenAutoencoder(folder / "model", "cpu")
        records = {v: export_onnx(folder / "model", folder / str(v), opset=v) for v in opset}
        image = torch.rand(1, 3, side, side) * 2 - 1
        latents = frozen.encode(image)[0]
        print("| | | seconds | to torch |\n|-|-|-|-|")
        for part, values in (("encoder", image), ("decoder", latents)):
            halves = {
                f"onnxruntime, opset {v}": runner(folder / f"{v}/vae_{part}", values, threads)
                for v in opset
            }
            work = frozen.encode if part == "encoder" else frozen.decode
            measure(part, {"torch": lambda work=work, v=values: work(v), **halves}, rounds)
    for v, record in records.items():
        for size in record["comparison"]["sizes"]:
            parts = [f"{key} {size[key]['largest']:.1e}" for key in size if key != "shape"]
            print(f"\nopset {v}, {size['shape']}: largest differences {', '.join(parts)}")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime"))
    print(
        f"\n{time.strftime('%Y-%m-%d')}, {threads} of {os.cpu_count()} cores "
        f"{platform.machine()}, {packages}; one picture of {side}², {rounds} rounds"
    )


def runner(folder, values, threads):
    """A call of one ONNX file on one input."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    entry = {session.get_inputs()[0].name: values.numpy()}
    return lambda: session.run(None, entry)


def measure(part, variants, rounds):
    """The rows of one half."""
    seconds = {title: [] for title in variants}
    for i in range(rounds + 1):
        for title, work in variants.items():
            began = time.perf_counter()
            work()
            if i:  # the first round warms up
                seconds[title].append(time.perf_counter() - began)
    for title, times in seconds.items():
        ratio = statistics.median(
            one / base for one, base in zip(times, seconds["torch"], strict=True)
        )
        print(f"| {part} | {title} | {statistics.median(times):.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
