"""How fast a data set is encoded, beside the encoder alone and beside the usual loops.

    python benchmarks/encode.py PHOTOS [--images 32] [--rounds 3] [--network kl_f8]

For a network of configs/ with random weights (the time does not depend on them), in turns within
one run, on the same pictures, with the same batch size, each timed from when model and data are
open:

- the encoder alone: pictures that are on the device already, through `FrozenAutoencoder` in bf16;
- latent-ae encode: what `latent_ae.encode` does until the folder is finished;
- the plain loop: `load_dataset`, torchvision's transforms, `vae.encode` in fp32, `torch.save`;
- the plain loop in bf16: the same with the network cast;
- `Dataset.map`: the same fp32 encoder inside a batched map, which writes Arrow.

With --storage it measures instead what each stored type costs: the PSNR of the decoded pictures.
"""

import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import datasets
import torch
import typer
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from latent_ae import load_config
from latent_ae.autoencoder import build_network
from latent_ae.config import EncodingSource, Preprocessing
from latent_ae.data import CenterCrop, normalize
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.latents.encode import Job, claim
from latent_ae.latents.progress import EncodeProgress

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(
    photos: Path,
    images: Annotated[int, typer.Option(help="Pictures a round.")] = 32,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 3,
    network: Annotated[str, typer.Option(help="A config's name.")] = "kl_f8",
    resolution: Annotated[int, typer.Option(help="Side of a crop.")] = 256,
    batch_size: Annotated[int, typer.Option(help="0: what encode takes by itself.")] = 0,
    workers: Annotated[int, typer.Option(help="Loader processes.")] = 2,
    storage: Annotated[
        Path | None, typer.Option(help="An autoencoder's folder: measure stored types instead.")
    ] = None,
) -> None:
    """Runs the contestants in turns."""
    datasets.disable_progress_bars()
    if storage is not None:
        return stored_types(storage, photos, images, resolution)
    batch_size = batch_size or (32 if DEVICE == "cuda" else 2)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build_network(load_config(ROOT / f"configs/{network}.yaml").network).save_pretrained(
            root / "vae"
        )
        (root / "photos").mkdir()
        files = sorted(p for p in photos.rglob("*.*") if p.is_file())[:images]
        for number, file in enumerate(files):  # `datasets` takes some names for splits
            (root / "photos" / f"{number:06d}{file.suffix}").write_bytes(file.read_bytes())
        compare(root, images, rounds, resolution, batch_size, workers)
    print(f"\n{network} at {resolution}², {images} pictures, batches of {batch_size}, {machine()}")
    return None


def compare(root, images, rounds, resolution, batch_size, workers):
    """Prints the table; a first, untimed round of fewer pictures warms up."""
    source = EncodingSource(path=str(root / "photos"))
    cut, options = Preprocessing(resolution=resolution), {"workers": workers, "device": DEVICE}
    job = Job.of(root / "vae", source, cut, batch_size=batch_size, precision="bf16", **options)
    frozen = job.frozen  # the same object for both, as warm for one as for the other
    files = sorted((root / "photos").iterdir())
    crop = CenterCrop(resolution)
    pixels = torch.stack([crop(Image.open(f).convert("RGB")) for f in files]).to(DEVICE)
    plain = AutoencoderKL.from_pretrained(root / "vae").eval().requires_grad_(False).to(DEVICE)
    half = AutoencoderKL.from_pretrained(root / "vae", torch_dtype=torch.bfloat16).eval()
    half = half.requires_grad_(False).to(DEVICE)
    contestants = {
        "the encoder alone": lambda: alone(frozen, pixels, batch_size),
        "**latent-ae encode**": lambda: ours(root, job),
        "plain loop, bf16": lambda: loop(half, root, resolution, batch_size),
        "plain loop, fp32": lambda: loop(plain, root, resolution, batch_size),
        "`Dataset.map`, fp32": lambda: mapped(plain, root, resolution, batch_size),
    }
    alone(frozen, pixels[: 2 * batch_size], batch_size)
    loop(plain, root, resolution, batch_size, limit=2 * batch_size)
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            seconds[name].append(work())
    print("| | images/s | to the encoder alone | to the plain loop |\n|-|-|-|-|")
    for name, times in seconds.items():
        ratios = [
            statistics.median(a / b for a, b in zip(seconds[base], times, strict=True))
            for base in ("the encoder alone", "plain loop, fp32")
        ]
        speed = images / statistics.median(times)
        print(f"| {name} | {speed:.2f} | {ratios[0]:.3f} | {ratios[1]:.2f} |")


def alone(frozen, pixels, batch_size):
    """The limit: nothing but the encoder."""
    began = time.perf_counter()
    for part in pixels.split(batch_size):
        frozen.encode(normalize(part))
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ours(root, job):
    """What encode does, without opening the model and the data."""
    out = Path(tempfile.mkdtemp(dir=root))
    began = time.perf_counter()
    folder, _ = claim(out, job.plan)
    with EncodeProgress(None, None) as progress:
        job.run(out, job.plan.units(), progress)
    folder.finish()
    return time.perf_counter() - began


def transform_of(resolution):
    """What scripts do to a picture."""
    return transforms.Compose(
        [
            transforms.Resize(resolution, transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(resolution),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )


@torch.no_grad()
def loop(vae, root, resolution, batch_size, limit=None):
    """The loop that every project writes."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(root / "photos"), split="train")
    transform = transform_of(resolution)
    rows = rows.with_transform(
        lambda batch: {"pixels": [transform(p.convert("RGB")) for p in batch["image"]]}
    )
    if limit:
        rows = rows.select(range(limit))
    found, began = [], time.perf_counter()
    for batch in DataLoader(rows, batch_size):
        images = batch["pixels"].to(DEVICE, vae.dtype)
        found.append(vae.encode(images).latent_dist.parameters.cpu())
    torch.save(torch.cat(found), root / "loop.pt")
    return time.perf_counter() - began


@torch.no_grad()
def mapped(vae, root, resolution, batch_size):
    """The way of `datasets`' own documentation."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(root / "photos"), split="train")
    transform = transform_of(resolution)

    def encode(batch):
        images = torch.stack([transform(p.convert("RGB")) for p in batch["image"]]).to(DEVICE)
        return {"moments": vae.encode(images).latent_dist.parameters.cpu().numpy()}

    began = time.perf_counter()
    rows.map(
        encode,
        batched=True,
        batch_size=batch_size,
        remove_columns=rows.column_names,
        load_from_cache_file=False,
        cache_file_name=str(root / "map.arrow"),
        new_fingerprint=str(time.monotonic_ns()),
    )
    return time.perf_counter() - began


def stored_types(folder, photos, images, resolution):
    """PSNR of pictures decoded (fp32) from the mean as each type, and precision, keeps it.

    Without rounding to 8 bits, which would drown the differences.
    """
    files = sorted(p for p in photos.rglob("*.*") if p.is_file())[:images]
    cut = CenterCrop(resolution)
    pixels = torch.stack([cut(Image.open(f).convert("RGB")) for f in files])
    exact = FrozenAutoencoder(folder)
    codes = {"fp32": [], "bf16": []}
    encoders = {"fp32": exact, "bf16": FrozenAutoencoder(folder, precision="bf16")}
    for part in pixels.split(2):
        for name, frozen in encoders.items():
            codes[name].append(frozen.encode(normalize(part))[0])
    print("| encoder | stored as | PSNR, dB | cost, dB |\n|-|-|-|-|")
    best = None
    for name, parts in codes.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            found = []
            for part, mean in zip(pixels.split(2), parts, strict=True):
                decoded = exact.decode(mean.to(dtype).float())
                error = (decoded.clamp(-1, 1) - normalize(part.to(exact.device))) / 2
                found += (-10 * error.square().flatten(1).mean(1).log10()).tolist()
            value = statistics.fmean(found)
            best = value if best is None else best
            kind = str(dtype).removeprefix("torch.")
            print(f"| {name} | {kind} | {value:.4f} | {best - value:+.4f} |")
    print(f"\n{folder.name}, {len(pixels)} pictures of {resolution}², {machine()}")


def machine():
    """Where and with what this ran."""
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{os.cpu_count()} cores"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "datasets"))
    return f"{time.strftime('%Y-%m-%d')}, {where}, {platform.machine()}, {packages}"


if __name__ == "__main__":
    typer.run(main)
