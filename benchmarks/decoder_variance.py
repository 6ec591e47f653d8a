"""How exact should the decoder claim to be? Fixed λ, a learned s, one a channel, the closed form.

Trains the quickstart's network (f4, 8 channels, linear start) with L2 alone on the same pictures
for the same steps, and measures on held-out photographs where each ends.

    python benchmarks/decoder_variance.py TRAIN HELD_OUT --runs runs/variance

Every stage that has been done is kept, so the command goes on where it was stopped. Prints the
table of docs/decoder-variance.md and writes results.json.
"""

import json
import math
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from small_runs import mean, provenance, train_autoencoder

# Name: losses' and bottleneck's keys. λ = 2 is the exact bound, exp(-5) the linear start's error.
FIXED = "losses={pixel: l2}"
VARIANTS = {
    "fixed 1e-6": [FIXED, "bottleneck.weight=1e-6"],
    "fixed 1e-4": [FIXED, "bottleneck.weight=1e-4"],
    "fixed 1e-2": [FIXED, "bottleneck.weight=1e-2"],
    "learned from 0": ["losses={pixel: l2, variance: learned}", "bottleneck.weight=2"],
    "learned from -5": [
        "losses={pixel: l2, variance: learned, logvar_init: -5}",
        "bottleneck.weight=2",
    ],
    "per channel from -5": [
        "losses={pixel: l2, variance: per_channel, logvar_init: -5}",
        "bottleneck.weight=2",
    ],
    "optimal": ["losses={pixel: l2, variance: optimal}", "bottleneck.weight=2"],
    "optimal unclipped": [
        "losses={pixel: l2, variance: optimal}",
        "bottleneck.weight=2",
        "training.clip_norm=0",
    ],
}
ROW, ROWS = 20, 5  # steps of a row of the log, and rows that count as the run's end
LEVEL = 2 / 255  # of 8 bits, in [-1, 1]


def main(
    photos: Path,
    held_out: Path,
    steps: Annotated[int, typer.Option(help="Updates of each autoencoder.")] = 2000,
    runs: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/variance"),
    only: Annotated[list[str] | None, typer.Option(help="These alone; give it again.")] = None,
) -> None:
    """Trains, measures, tells."""
    rows = []
    for name in only or VARIANTS:
        run = runs / name.replace(" ", "-")
        train_autoencoder(run, photos, steps, [*VARIANTS[name], f"training.log_every={ROW}"])
        rows.append(measure(run, name, held_out))
    results = {"steps": steps, "made": provenance(), "rows": rows}
    (runs / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    tell(rows)
    print(f"\n{steps} steps. {results['made']}")


def measure(run, name, held_out):
    """One autoencoder's column."""
    from latent_ae import Evaluation, evaluate

    kept = run / "row.json"
    if kept.exists():
        return json.loads(kept.read_text())
    folder = run / "evaluation"
    if (folder / "evaluation.json").exists():
        result = Evaluation.load(folder)
    else:
        options = {"pictures": 0, "probes": 0, "references": ()}
        result = evaluate(run / "autoencoder", held_out, out=folder, name=name, **options)
    latents = result.content["latents"]
    row = {
        "name": name,
        **result.metrics,
        "kl_bits_per_value": latents["kl_bits_per_value"],
        "std": latents["std"],
        "prior_kl": latents["aggregate"]["prior_kl"],
        "sliced_wasserstein": latents["aggregate"]["sliced_wasserstein_patch"],
        **claimed(run),
    }
    row |= bound(run / "autoencoder", held_out, row["logvar"])
    kept.write_text(json.dumps(row, indent=2) + "\n")
    return row


def claimed(run):
    """What the run says of its decoder's variance, at its end, and of its gradient."""
    from latent_ae.run_folder import RunFolder

    folder = RunFolder(run / "training")
    weight = folder.config().bottleneck.weight
    rows = [row for row in folder.log_rows() if row["group"] == "train"]
    last = {name: mean(row[name] for row in rows[-ROWS:]) for name in rows[-1] if name != "group"}
    by_channel = [last[name] for name in sorted(last) if name.startswith("logvar_")]
    return {
        "weight": weight,
        "implied_weight": last.get("implied_weight", weight),
        "logvar": by_channel or [last.get("logvar", math.log(weight / 2))],
        "logvar_course": [(row["step"], row["logvar"]) for row in rows if "logvar" in row],
        "gradient_norm": median(row["gradient_norm"] for row in rows),
        "gradient_norms": [(row["step"], row["gradient_norm"]) for row in rows],
    }


@torch.no_grad()
def bound(autoencoder, held_out, logvar):
    """The negative ELBO of held-out photographs, in bits an image value of 8 bits.

    A sample of the posterior is decoded, not its mean. A picture counts as uniformly dequantised,
    so the bound is one on the probability of its 8-bit values (Theis et al. 2016).

    Args:
        autoencoder: the exported folder.
        held_out: the photographs.
        logvar: that the run claims, of each channel or of all.
    """
    from latent_ae.bottlenecks import gaussian_kl
    from latent_ae.data import CenterCrop, evaluation_batches, normalize, source_of
    from latent_ae.frozen import FrozenAutoencoder

    frozen = FrozenAutoencoder(autoencoder)
    generator = torch.Generator().manual_seed(0)
    errors, kls = [], []
    for batch in evaluation_batches(source_of(held_out), CenterCrop(256), batch_size=4):
        images = normalize(batch.images)
        mean_, logvar_ = frozen.encode(images)
        noise = torch.randn(mean_.shape, generator=generator)
        decoded = frozen.decode(mean_ + (0.5 * logvar_).exp() * noise)
        errors += list((decoded - images).double().square().mean((2, 3)))
        kls += list(gaussian_kl(mean_, logvar_).flatten(1).sum(1).double() / images[0].numel())
    error = torch.stack(errors).mean(0) + LEVEL**2 / 12
    kl = torch.stack(kls).mean().item()
    claims = torch.tensor(logvar, dtype=torch.float64).exp()

    def bits(variance):
        nats = 0.5 * (error / variance + (2 * math.pi * variance).log()).mean().item() + kl
        return (nats - math.log(LEVEL)) / math.log(2)

    return {
        "kl_bits_per_image_value": kl / math.log(2),
        "errors": error.tolist(),
        "bound_as_claimed": bits(claims),
        "bound_as_made": bits(error.mean()),
        "bound_as_made_by_channel": bits(error),
    }


def levels(variance):
    """The deviation in 8-bit levels."""
    return math.sqrt(variance) / LEVEL


def tell(rows):
    """The table."""
    lines = {
        "λ": lambda r: f"{r['weight']:g}",
        "λ in fixed units": lambda r: f"{r['implied_weight']:.2g}",
        "σ claimed, 8-bit levels": lambda r: " / ".join(
            f"{levels(math.exp(s)):.2g}" for s in r["logvar"]
        ),
        "σ made on held-out photographs": lambda r: f"{levels(mean(r['errors'])):.2g}",
        "PSNR (dB)": lambda r: f"{r['psnr']:.2f}",
        "SSIM": lambda r: f"{r['ssim']:.3f}",
        "LPIPS": lambda r: f"{r['lpips']:.3f}",
        "KL, bits an image value": lambda r: f"{r['kl_bits_per_image_value']:.2f}",
        "KL, bits a latent value": lambda r: f"{r['kl_bits_per_value']:.2f}",
        "latents' standard deviation": lambda r: f"{r['std']:.2f}",
        "one value's KL from N(0, 1)": lambda r: f"{r['prior_kl']:.3f}",
        "4 × 4 patches' sliced W₂ from N(0, I)": lambda r: f"{r['sliced_wasserstein']:.3f}",
        "−ELBO at the σ claimed, bits an image value": lambda r: f"{r['bound_as_claimed']:.2f}",
        "−ELBO at the σ made": lambda r: f"{r['bound_as_made']:.2f}",
        "−ELBO at the σ made of each channel": lambda r: f"{r['bound_as_made_by_channel']:.2f}",
        "length of the gradient, median": lambda r: f"{r['gradient_norm']:.2g}",
    }
    print(f"| | {' | '.join(row['name'] for row in rows)} |")
    print("|-" * (len(rows) + 1) + "|")
    for title, cell in lines.items():
        print(f"| {title} | {' | '.join(cell(row) for row in rows)} |")


if __name__ == "__main__":
    typer.run(main)
