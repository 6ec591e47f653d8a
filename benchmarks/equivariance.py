"""What EQ-VAE's regulariser buys and costs: equivariance, reconstruction, and a denoiser's loss.

Trains the quickstart's network (f4, 8 channels) with and without `losses.equivariance`, on the same
pictures for the same steps from the same seed, measures both on held-out photographs, then trains
the same small denoiser on the latents of the same crops for the same steps and draws from it.

    python benchmarks/equivariance.py TRAIN_PHOTOS HELD_OUT_PHOTOS --runs runs/equivariance

Every stage that has been done is kept, so the command goes on where it was stopped. Prints the
table of docs/results.md and writes results.json.
"""

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from kl_weights import cut_crops, drawn, explained, train_denoiser
from small_runs import train_autoencoder

VARIANTS = {"off": "null", "on": "{}"}  # the paper's values are the defaults
PACKAGES = ("torch", "diffusers", "accelerate", "lpips")
PROBED = 32  # held-out photographs whose transforms are looked at


def main(
    photos: Path,
    held_out: Path,
    steps: Annotated[int, typer.Option(help="Updates of each autoencoder.")] = 2000,
    denoiser_steps: Annotated[int, typer.Option(help="Updates of each denoiser.")] = 3000,
    runs: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/equivariance"),
    draws: Annotated[bool, typer.Option(help="Also draw 1,000 pictures from each.")] = True,
) -> None:
    """Trains, measures, tells."""
    for name, folder, seed in (("crops", photos, 0), ("held_out_crops", held_out, 1)):
        cut_crops(folder, runs / name, seed)
    for variant in VARIANTS:
        settings = [f"losses.equivariance={VARIANTS[variant]}"]
        train_autoencoder(runs / variant, photos, steps, settings)
        train_denoiser(runs / variant, runs / "crops", denoiser_steps)
    rows = {variant: measure(runs / variant, held_out, runs, draws) for variant in VARIANTS}
    python = platform.python_version()
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores {platform.machine()}, Python {python}",
        "versions": {name: version(name) for name in PACKAGES},
        "steps": steps,
        "denoiser_steps": denoiser_steps,
        "rows": rows,
    }
    (runs / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    tell(result)


def measure(run, held_out, runs, draws):
    """One autoencoder's column: reconstruction and equivariance, then its denoiser."""
    from latent_ae import Evaluation, evaluate
    from latent_ae.run_folder import RunFolder

    kept = run / "row.json"
    row = json.loads(kept.read_text()) if kept.exists() else {}
    if "explained" not in row:
        folder = run / "evaluation"
        if (folder / "evaluation.json").exists():
            result = Evaluation.load(folder)
        else:
            result = evaluate(
                run / "autoencoder",
                held_out,
                out=folder,
                name=run.name,
                references=(),
                probes=PROBED,
                pictures=0,
            )
        latents, probes = result.content["latents"], result.content["probes"]
        row = {
            **result.metrics,
            "psnr_interval": result.intervals["psnr"],
            "training_seconds": RunFolder(run / "training").log_rows()[-1]["seconds"],
            "equivariance": {one["transform"]: one for one in probes["equivariance"]},
            "kl_bits_per_value": latents["kl_bits_per_value"],
            "high_share": latents["spectrum"]["high_share"],
            "noise_psnr": {str(one["noise"]): one["psnr"] for one in probes["sensitivity"]},
            "explained": explained(run, runs / "held_out_crops"),
        }
        kept.write_text(json.dumps(row, indent=2) + "\n")
    if draws and "frechet draws" not in row:
        row |= drawn(run, runs / "crops")
        kept.write_text(json.dumps(row, indent=2) + "\n")
    return row


def tell(result):
    """The table of both, in markdown."""
    rows = result["rows"]
    lines = {
        "PSNR (dB)": lambda r: f"{r['psnr']:.2f}",
        "SSIM": lambda r: f"{r['ssim']:.3f}",
        "LPIPS": lambda r: f"{r['lpips']:.3f}",
        "KL, bits a latent value": lambda r: f"{r['kl_bits_per_value']:.2f}",
        "power above half Nyquist": lambda r: f"{100 * r['high_share']:.0f} %",
        "PSNR with noise of .1 standard deviations": lambda r: f"{r['noise_psnr']['0.1']:.2f}",
        "denoiser's loss on unseen crops, a share of the flow's variance": lambda r: (
            f"{1 - r['explained']:.3f}"
        ),
        "training, seconds": lambda r: f"{r['training_seconds']:.0f}",
    }
    print(f"| {result['steps']} steps, {result['denoiser_steps']} of the denoiser | ", end="")
    print(" | ".join(f"equivariance {variant}" for variant in rows), "|")
    print("|-" * (len(rows) + 1) + "|")
    for transform in next(iter(rows.values()))["equivariance"]:
        cells = (row["equivariance"][transform] for row in rows.values())
        cells = (f"{cell['latents']:.3f} ({cell['psnr']:.2f} dB)" for cell in cells)
        print(f"| {transform}: error of latents (PSNR of decoding them) | {' | '.join(cells)} |")
    if all("frechet draws" in row for row in rows.values()):
        lines["Fréchet distance of 1,000 draws"] = lambda r: f"{r['frechet draws']:.2f}"
    for title, cell in lines.items():
        print(f"| {title} | {' | '.join(cell(row) for row in rows.values())} |")
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    print(f"\n{result['date']}, {result['machine']}, {packages}")


if __name__ == "__main__":
    typer.run(main)
