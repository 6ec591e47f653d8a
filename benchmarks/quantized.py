"""What do codes cost? An autoencoder, a VAE, VQ-VAEs, a VQGAN and FSQ, alike in all else.

    python benchmarks/quantized.py TRAIN_PHOTOS HELD_OUT_PHOTOS [--steps 2000] [--runs FOLDER]
        [--only vq fsq] [--sheet docs/quantized.jpg]

Trains configs/photos_vq_f8.yaml once for each of:

    ae          no bottleneck but 4 channels: 16 bits a value
    vae         a KL term whose weight leaves about 10 bits a position
    vq          1,024 entries, started by k-means and revived
    vq-plain    the same, started at random and never revived
    vqgan       vq with a discriminator that is heard in the second half
    fsq         8 × 5 × 5 × 5 = 1,000 levels

and measures them on the held-out photographs: PSNR, SSIM, LPIPS, sharpness (of fine structure, the
power in the reconstruction over that in the picture, as in benchmarks/adversary.py); how many of
the codes are used, their perplexity, bits a pixel by fixed length, by order-0 entropy and as really
coded. A seventh row rounds the latents of `ae` to 1,024 entries that k-means finds after training:
the same bits as vq without having trained for them. A VAE's bits are what bits-back coding would
send. What is trained already is not trained again: the processes of --only can share the work.
"""

import argparse
import math
from pathlib import Path

import torch
from adversary import sharpness, sheet
from small_runs import ROOT, provenance

from latent_ae import evaluate, export_run, load_config, load_network, train
from latent_ae.autoencoder import decode_latents, encode_mode
from latent_ae.bottlenecks.kmeans import kmeans
from latent_ae.config import Protocol
from latent_ae.data import TrainingStream, evaluation_batches, normalize, source_of
from latent_ae.metrics import ReconstructionMetrics

RECIPE = ROOT / "configs/photos_vq_f8.yaml"
CODES, SIDE, FACTOR = 1024, 256, 8
VAE_WEIGHT = 0.42
TITLES = {
    "ae": "autoencoder",
    "ae-rounded": "autoencoder, rounded afterwards",
    "vae": "KL-VAE",
    "vq-plain": "VQ-VAE, random start, no revival",
    "vq": "VQ-VAE",
    "vqgan": "VQGAN",
    "fsq": "FSQ",
}


def settings_of(name, steps):
    """What of the recipe a contestant changes."""
    network = load_config(RECIPE).network.model_dump(exclude={"kind", "vq_embed_dim"})
    network |= {"kind": "kl", "block_out_channels": list(network["block_out_channels"])}
    half = steps // 2
    adversary = f"{{weight: 0.3, start: {half}, warmup_steps: {steps // 10}, channels: 32}}"
    return {
        "ae": [f"network={network}", "bottleneck={kind: kl, weight: 0}"],
        "vae": [f"network={network}", f"bottleneck={{kind: kl, weight: {VAE_WEIGHT}}}"],
        "vq": [],
        "vq-plain": ["bottleneck.kmeans=false", "bottleneck.revive_after=0"],
        "vqgan": [f"adversary={adversary}"],
        "fsq": ["bottleneck={kind: fsq, levels: [8, 5, 5, 5]}"],
    }[name]


def trained(name, args):
    """The exported folder of a contestant, trained where it is not there yet."""
    folder = args.runs / f"{name}-exported"
    if not folder.exists():
        changes = [f"data.path={args.photos}", f"training.steps={args.steps}", "validation=null"]
        changes += [f"output={args.runs / name}", *settings_of(name, args.steps)]
        if args.network:
            changes.append(f"network.block_out_channels={args.network}")
        train(load_config(RECIPE, changes))
        export_run(args.runs / name, folder, images=args.images)
    return folder


@torch.no_grad()
def rounded_afterwards(folder, args):
    """The metrics of an autoencoder whose latents become entries that were found after training."""
    network = load_network(folder).eval()
    data = load_config(RECIPE, [f"data.path={args.photos}"]).data
    stream, found = TrainingStream(data, seed=1), []
    while sum(len(part) for part in found) < 16 * CODES:
        found.append(vectors_of(encode_mode(network, normalize(next(stream).images))[0]))
    entries = kmeans(torch.cat(found), CODES, torch.Generator().manual_seed(0))
    metrics = ReconstructionMetrics(torch.device("cpu"), ("alex",))
    held_out = source_of(args.held_out)
    for batch in evaluation_batches(held_out, SIDE, batch_size=8, limit=args.limit):
        latents = encode_mode(network, normalize(batch.images))[0]
        nearest = torch.cdist(vectors_of(latents), entries).argmin(1)
        chosen = entries[nearest].view(len(latents), *latents.shape[2:], -1).permute(0, 3, 1, 2)
        metrics.update(batch.images, decode_latents(network, chosen))
    return metrics.compute()


def vectors_of(latents):
    """Latents of shape (B, c, h, w) as (B h w, c)."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


def measured(name, args):
    """A line of the table."""
    if name == "ae-rounded":
        metrics = rounded_afterwards(args.runs / "ae-exported", args)
        sharp, fixed, codes = None, math.log2(CODES) / FACTOR**2, None
    else:
        folder, protocol = args.runs / f"{name}-exported", Protocol(resolution=SIDE)
        if args.limit:
            protocol = protocol.model_copy(update={"images": args.limit})
        result = evaluate(folder, args.held_out, protocol, quick=True, references=())
        metrics, codes = result.metrics, result.content["codes"]
        fixed = result.content["model"]["bits_per_image"] / SIDE**2
        sharp = sharpness(load_network(folder).eval(), args.held_out, SIDE)
    cells = [f"{metrics['psnr']:.2f}", f"{metrics['ssim']:.3f}", f"{metrics['lpips']:.3f}"]
    cells += ["–" if sharp is None else f"{sharp:.2f}", f"{fixed:.3f}"]
    if codes is None:
        return [*cells, *4 * ["–"]]
    cells += [f"{codes['bits_per_pixel'][name]:.3f}" for name in ("entropy", "coded")]
    return [*cells, f"{codes['usage']:.1%}", f"{codes['perplexity']:,.0f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", help="pictures to train on")
    parser.add_argument("held_out", help="pictures to measure on")
    parser.add_argument("--runs", type=Path, default=Path("runs/quantized"))
    parser.add_argument("--steps", type=int, default=2000, help="updates of each")
    parser.add_argument("--only", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--train-only", action="store_true", help="measure nothing")
    parser.add_argument("--network", help="other widths of the network's levels")
    parser.add_argument("--images", type=int, default=256, help="that export measures on")
    parser.add_argument("--limit", type=int, help="of the held-out pictures")
    parser.add_argument("--sheet", type=Path, help="where to draw crops")
    args = parser.parse_args()
    for name in args.only:
        if name != "ae-rounded":
            trained(name, args)
    if args.train_only:
        return
    heads = [
        "PSNR (dB)",
        "SSIM",
        "LPIPS",
        "sharpness",
        "bits a pixel",
        "entropy",
        "coded",
        "used",
        "perplexity",
    ]
    print(f"| | {' | '.join(heads)} |\n|{'-|' * (len(heads) + 1)}")
    for name in args.only:
        print(f"| {TITLES[name]} | {' | '.join(measured(name, args))} |", flush=True)
    print(f"\n{args.steps:,} steps each; {provenance()}")
    if args.sheet:
        shown = [name for name in ("ae", "vae", "vq", "vqgan", "fsq") if name in args.only]
        networks = {n: load_network(args.runs / f"{n}-exported").eval() for n in shown}
        sheet({TITLES[name]: network for name, network in networks.items()}, args.sheet, 192)


if __name__ == "__main__":
    main()
