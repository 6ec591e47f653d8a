"""What the KL weight buys and costs: reconstruction, prior gap, and what a denoiser makes of it.

Trains the quickstart's network (f4, 8 channels) with L2 at four weights over two decades on the
same pictures for the same steps, measures each on held-out photographs, then trains the same small
denoiser on the latents of the same crops for the same steps and draws from it.

    python benchmarks/kl_weights.py TRAIN_PHOTOS HELD_OUT_PHOTOS --runs runs/kl_weights

Every stage that has been done is kept, so the command goes on where it was stopped. Prints the
table of docs/latents.md, writes results.json, docs/kl-weights-samples.jpg (drawn by the denoisers)
and docs/kl-weights-prior.jpg (draws from N(0, I), decoded).
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from small_runs import ROOT, mean, provenance, train_autoencoder

sys.path.insert(0, str(ROOT / "pipelines"))

WEIGHTS = (1e-4, 4.6e-4, 2.2e-3, 1e-2)
SIDE, PER_PHOTO = 64, 4  # crops for the denoiser, from photographs whose shorter side is 128
DRAWS, SAMPLING_STEPS, BATCH = 1000, 25, 100


def main(
    photos: Path,
    held_out: Path,
    steps: Annotated[int, typer.Option(help="Updates of each autoencoder.")] = 2000,
    denoiser_steps: Annotated[int, typer.Option(help="Updates of each denoiser.")] = 3000,
    runs: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/kl_weights"),
    only_train: Annotated[bool, typer.Option(help="Stop before anything is measured.")] = False,
) -> None:
    """Trains, measures, tells."""
    for name, folder, seed in (("crops", photos, 0), ("held_out_crops", held_out, 1)):
        cut_crops(folder, runs / name, seed)
    for weight in WEIGHTS:
        # With L2 the weight is twice the decoder's variance.
        settings = [f"bottleneck.weight={weight}", "losses={pixel: l2}"]
        train_autoencoder(runs / f"{weight:g}", photos, steps, settings)
        train_denoiser(runs / f"{weight:g}", runs / "crops", denoiser_steps)
    if only_train:
        return
    rows = [measure(runs / f"{weight:g}", weight, held_out, runs) for weight in WEIGHTS]
    (runs / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    tell(rows, steps, denoiser_steps)
    sheets(runs)


def cut_crops(photos, out, seed):
    """The same 64² crops for every autoencoder: four of each photograph."""
    from latent_ae.data import resize_shorter_side

    if out.exists():
        return
    aside = out.with_name(f".{out.name}.tmp")
    aside.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for file in sorted(photos.rglob("*.*")):
        picture = resize_shorter_side(Image.open(file).convert("RGB"), 2 * SIDE)
        for i in range(PER_PHOTO):
            left, top = (int(rng.integers(0, edge - SIDE + 1)) for edge in picture.size)
            crop = picture.crop((left, top, left + SIDE, top + SIDE))
            crop.save(aside / f"{file.stem}-{i}.png")
    aside.rename(out)


def train_denoiser(run, crops, steps):
    from denoisers import DenoiserConfig
    from latent_ae import encode
    from train_denoiser import train

    if (run / "pipeline").exists():
        return
    if not (run / "latents/manifest.json").exists():
        encode(
            run / "autoencoder", crops, run / "latents", resolution=SIDE, batch_size=64, workers=0
        )
    config = DenoiserConfig(
        channels=(32, 64, 64),
        layers=1,
        attention=1,
        steps=steps,
        batch_size=32,
        learning_rate=1e-3,
        warmup_steps=100,
        precision="bf16",
        ema=0.998,
        log_every=200,
    )
    train(run / "latents", run / "pipeline", config)


def measure(run, weight, held_out, runs):
    """One autoencoder's column: reconstruction and latent space, then its denoiser."""
    from latent_ae import Evaluation, evaluate

    kept = run / "row.json"
    if kept.exists():
        return json.loads(kept.read_text())
    folder, name = run / "evaluation", f"{weight:g}"
    if (folder / "evaluation.json").exists():
        result = Evaluation.load(folder)
    else:
        result = evaluate(run / "autoencoder", held_out, out=folder, name=name, pictures=0)
    latents, probes = result.content["latents"], result.content["probes"]
    scaled = latents["aggregate"]["scaled_sliced_wasserstein_patch"]
    row = {
        "weight": weight,
        **result.metrics,
        "psnr_interval": result.intervals["psnr"],
        "kl_bits_per_value": latents["kl_bits_per_value"],
        "std": latents["std"],
        "posterior_std": mean(channel["posterior_std"][1] for channel in latents["channels"]),
        "prior_kl": latents["aggregate"]["prior_kl"],
        "sliced_wasserstein": latents["aggregate"]["sliced_wasserstein_patch"],
        "scaled_sliced_wasserstein": scaled,
        "high_share": latents["spectrum"]["high_share"],
        "noise_psnr": {str(one["noise"]): one["psnr"] for one in probes["sensitivity"]},
        "explained": explained(run, runs / "held_out_crops"),
        **drawn(run, runs / "crops"),
    }
    kept.write_text(json.dumps(row, indent=2) + "\n")
    return row


@torch.no_grad()
def explained(run, crops):
    """The share of the flow's variance that the denoiser predicts on crops it has not seen.

    1 - E|v - v'|² / E|v|², the mean over 20 noise levels: 0 for a denoiser that says nothing.
    """
    from diffusers import DiffusionPipeline

    from latent_ae import LatentDataset, encode

    folder = run / "held_out_latents"
    if not (folder / "manifest.json").exists():
        encode(run / "autoencoder", crops, folder, resolution=SIDE, batch_size=64, workers=0)
    torch.manual_seed(0)
    latents = torch.stack([row["latents"] for row in LatentDataset(folder)])
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline", trust_remote_code=True)
    denoiser, shares = pipeline.denoiser.eval(), []
    for sigma in (torch.arange(20) + 0.5) / 20:
        noise = torch.randn_like(latents)
        velocity = noise - latents
        noisy = (1 - sigma) * latents + sigma * noise
        guess = torch.cat(
            [denoiser(part, (1000 * sigma).expand(len(part))).sample for part in noisy.split(BATCH)]
        )
        shares.append((1 - (guess - velocity).square().mean() / velocity.square().mean()).item())
    return mean(shares)


@torch.no_grad()
def drawn(run, crops):
    """Fréchet distances (AlexNet) to 1,000 of the crops that the denoiser has learned.

    Of 1,000 draws, of the crops' reconstructions, and of 1,000 other crops of the same photographs.
    """
    from diffusers import DiffusionPipeline

    from latent_ae.data import evaluation_batches, normalize, source_of, to_uint8
    from latent_ae.evaluation import FEATURE_NETWORKS, FrechetDistance
    from latent_ae.frozen import FrozenAutoencoder

    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    frozen = FrozenAutoencoder(run / "autoencoder")
    distance = FrechetDistance(FEATURE_NETWORKS["alexnet"](None))
    batches = evaluation_batches(source_of(crops), SIDE, batch_size=BATCH)
    pixels = torch.cat([batch.images for batch in batches])
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(pixels)))
    kept = []
    for i, places in enumerate(order[:DRAWS].split(BATCH)):
        images, others = pixels[places], pixels[order[DRAWS + i * BATCH :][:BATCH]]
        generator = torch.Generator().manual_seed(i)
        drawings = pipeline(
            batch_size=BATCH,
            num_inference_steps=SAMPLING_STEPS,
            generator=generator,
            output_type="pt",
        ).images
        drawings = to_uint8(2 * drawings - 1)
        reconstruction = to_uint8(frozen.decode(frozen.encode(normalize(images))[0]))
        named = {"draws": drawings, "reconstruction": reconstruction, "other crops": others}
        distance.update(images, named)
        kept.append(drawings)
    np.save(run / "draws.npy", torch.cat(kept)[:64].numpy())
    return {f"frechet {name}": distance.compute(name).distance for name in named}


def tell(rows, steps, denoiser_steps):
    """The table, and the two sheets."""
    lines = {
        "PSNR (dB)": lambda r: f"{r['psnr']:.2f}",
        "SSIM": lambda r: f"{r['ssim']:.3f}",
        "LPIPS": lambda r: f"{r['lpips']:.3f}",
        "Fréchet distance of reconstructed crops": lambda r: f"{r['frechet reconstruction']:.2f}",
        "KL, bits a latent value": lambda r: f"{r['kl_bits_per_value']:.2f}",
        "posterior's standard deviation": lambda r: f"{r['posterior_std']:.3f}",
        "latents' standard deviation": lambda r: f"{r['std']:.2f}",
        "one value's KL from N(0, 1)": lambda r: f"{r['prior_kl']:.3f}",
        "4 × 4 patches' sliced W₂ from N(0, I)": lambda r: f"{r['sliced_wasserstein']:.3f}",
        "the same of scaled latents": lambda r: f"{r['scaled_sliced_wasserstein']:.3f}",
        "power above half Nyquist": lambda r: f"{100 * r['high_share']:.0f} %",
        "PSNR with noise of .1 standard deviations": lambda r: f"{r['noise_psnr']['0.1']:.2f}",
        "PSNR with noise of .4 standard deviations": lambda r: f"{r['noise_psnr']['0.4']:.2f}",
        "flow explained on unseen crops": lambda r: f"{100 * r['explained']:.1f} %",
        "**Fréchet distance of 1,000 draws**": lambda r: f"**{r['frechet draws']:.2f}**",
    }
    print(f"| {steps} steps, {denoiser_steps} of the denoiser | ", end="")
    print(" | ".join(f"λ = {row['weight']:g}" for row in rows), "|")
    print("|-" * (len(rows) + 1) + "|")
    for title, cell in lines.items():
        print(f"| {title} | {' | '.join(cell(row) for row in rows)} |")
    print(f"\nother crops of the same photographs: {rows[0]['frechet other crops']:.2f}")
    print(provenance())


def sheets(runs):
    """A row of pictures for each weight, the lightest first."""
    from latent_ae.data import to_uint8
    from latent_ae.frozen import FrozenAutoencoder

    draws, priors = [], []
    for weight in WEIGHTS:
        run = runs / f"{weight:g}"
        draws += list(torch.from_numpy(np.load(run / "draws.npy"))[:16])
        frozen = FrozenAutoencoder(run / "autoencoder")
        noise = torch.randn(16, frozen.channels, 16, 16, generator=torch.manual_seed(0))
        priors += list(to_uint8(frozen.decode(noise)))
    for name, pictures in (("samples", draws), ("prior", priors)):
        grid = torch.stack(pictures).view(len(WEIGHTS), 16, 3, SIDE, SIDE)
        wide = grid.permute(0, 3, 1, 4, 2).reshape(len(WEIGHTS) * SIDE, 16 * SIDE, 3)
        Image.fromarray(wide.numpy()).save(ROOT / f"docs/kl-weights-{name}.jpg", quality=92)


if __name__ == "__main__":
    typer.run(main)
