"""A denoiser's training step from latents on disk, beside the same step that encodes pictures.

    python benchmarks/denoiser_online.py PHOTOS [--autoencoder FOLDER] [--batch 4] [--steps 3]

The same denoiser, batch size, optimizer and pictures: once read from a latents folder by
`LatentDataset`, once decoded and cut by loader workers and encoded by the same `FrozenAutoencoder`
(bf16, no gradients), then sampled and scaled. Both draw pictures at random, with as many workers.
Rounds take turns, and the first step of a round is not timed: it starts the loader. A step lasts
from asking for the batch to the end of the update; its time is the mean over a round, because a
loader that is too slow gives batches in bursts. Prints medians over the rounds, also of the ratio.
Memory is the peak of two steps in a fresh process for each: of torch's allocator on a GPU; on a CPU
how far the process grows (Linux), weights and optimizer included.
On a GPU take more steps a round than the loaders hold ready (two batches a worker): --steps 100.
Without --autoencoder it is a network of configs/kl_f8.yaml (the size of Stable Diffusion's) with
random weights, on which no time depends.
"""

import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from latent_ae import load_config
from latent_ae.autoencoder import build_network, default_device
from latent_ae.config import Preprocessing
from latent_ae.data import Variants, decode_image, normalize
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.latents import LatentDataset, encode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "pipelines"))

from denoisers import DenoiserConfig, build_denoiser  # noqa: E402


@dataclass
class Setting:
    """What both ways of training share; a child process can be given it."""

    photos: Path
    autoencoder: Path
    latents: Path
    denoiser: DenoiserConfig
    batch: int
    workers: int
    resolution: int


def main(
    photos: Path,
    autoencoder: Annotated[Path | None, typer.Option(help="An exported folder.")] = None,
    resolution: Annotated[int, typer.Option(help="Side of the pictures.")] = 256,
    width: Annotated[int, typer.Option(help="Of the DiT; 64 a head.")] = 384,
    depth: Annotated[int, typer.Option(help="Of the DiT.")] = 12,
    precision: Annotated[str, typer.Option(help="Of the DiT's autocast: bf16, fp32.")] = "bf16",
    pictures: Annotated[int, typer.Option(help="How many are encoded and trained on.")] = 32,
    batch: Annotated[int, typer.Option(help="Pictures a step.")] = 4,
    workers: Annotated[int, typer.Option(help="Loader processes.")] = 2,
    steps: Annotated[int, typer.Option(help="Timed steps a round.")] = 3,
    rounds: Annotated[int, typer.Option(help="Rounds of both.")] = 5,
) -> None:
    """Measures both ways."""
    config = DenoiserConfig(
        denoiser="dit", width=width, depth=depth, heads=width // 64, precision=precision
    )
    with tempfile.TemporaryDirectory(prefix="denoiser-online-") as folder:
        place = Path(folder)
        autoencoder = autoencoder or random_autoencoder(place / "autoencoder")
        latents = place / "latents"
        began = time.perf_counter()
        manifest = encode(autoencoder, photos, latents, resolution=resolution, limit=pictures)
        once = (time.perf_counter() - began) / manifest.count
        setting = Setting(photos, autoencoder, latents, config, batch, workers, resolution)
        parameters = compare(setting, steps, rounds)
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers"))
    device = default_device()
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(
        f"\n{manifest.autoencoder.class_name} and a DiT of {parameters / 1e6:.1f} million "
        f"parameters (width {width}, depth {depth}, autocast {precision}), AdamW; {manifest.count} "
        f"pictures of {resolution}², latents {manifest.latent_shape}; writing the latents took "
        f"{once:.2f} s a picture, with all starts."
        f"\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores {where}, {packages}; batches of "
        f"{batch}, {workers} workers, {rounds} rounds of {steps} steps"
    )


def random_autoencoder(folder: Path) -> Path:
    build_network(load_config(ROOT / "configs/kl_f8.yaml").network).save_pretrained(folder)
    return folder


def compare(setting: Setting, steps: int, rounds: int) -> int:
    """Prints the table; returns how many parameters the denoiser has."""
    peaks = {kind.title: in_fresh_process(peak, kind, setting) for kind in (Stored, Online)}
    trainer = Trainer(setting)
    sources = [Stored(setting), Online(setting)]
    times: dict[str, list[tuple[float, float]]] = {source.title: [] for source in sources}
    for number in range(rounds + 1):
        for source in sources:
            timed = trainer.round(source, steps if number else 1)
            if number:  # the first round warms up
                times[source.title].append(timed)
    base = times[Stored.title]
    print("| batches | seconds a step | of it for the batch | ratio | peak memory, GB |")
    print("|-|-|-|-|-|")
    for title, found in times.items():
        whole, batch = (statistics.median(one[i] for one in found) for i in range(2))
        ratio = statistics.median(a[0] / b[0] for a, b in zip(found, base, strict=True))
        print(f"| {title} | {whole:.3f} | {batch:.4f} | {ratio:.2f} | {peaks[title]:.2f} |")
    return sum(p.numel() for p in trainer.network.parameters())


class Stored:
    """Batches from the latents folder."""

    title = "from latents"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.data = LatentDataset(setting.latents, columns=("label",))

    def batches(self, count: int) -> Iterator[Tensor]:
        """Final latents on the device, each of shape (B, c, h, w)."""
        for items in load(self.data, self.setting, count):
            yield items["latents"].to(default_device(), non_blocking=True)


class Online:
    """Batches from the pictures, encoded now."""

    title = "encoded online"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.frozen = FrozenAutoencoder(setting.autoencoder, precision="bf16")
        self.data = Pictures(setting)

    @torch.no_grad()
    def batches(self, count: int) -> Iterator[Tensor]:
        """As `Stored.batches`."""
        for images in load(self.data, self.setting, count):
            images = images.to(default_device(), non_blocking=True)
            latents, logvar = self.frozen.encode(normalize(images))
            if logvar is not None:
                latents = latents + torch.exp(0.5 * logvar) * torch.randn_like(latents)
            yield self.frozen.scaling.to_final(latents)


class Pictures(Dataset[Tensor]):
    """The pictures of the latents folder, cut as it cuts them, uint8 of shape (3, H, W)."""

    def __init__(self, setting: Setting) -> None:
        keys = LatentDataset(setting.latents, columns=("key",)).index.table["key"].to_pylist()
        self.files = [setting.photos / key for key in keys]
        self.variants = Variants(Preprocessing(resolution=setting.resolution))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> Tensor:
        return self.variants(decode_image(self.files[position]), position)[0].image


def load(data: Dataset, setting: Setting, count: int) -> DataLoader:
    """`count` batches of random items."""
    return DataLoader(
        data,
        setting.batch,
        sampler=RandomSampler(data, replacement=True, num_samples=count * setting.batch),
        num_workers=setting.workers,
        pin_memory=torch.cuda.is_available(),
    )


class Trainer:
    """The denoiser and its optimizer: rectified flow, without labels."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.device = setting, default_device()
        shape = LatentDataset(setting.latents, columns=()).manifest.latent_shape
        torch.manual_seed(0)
        self.network = build_denoiser(setting.denoiser, shape, 0).to(self.device)
        parameters = self.network.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)

    def round(self, source: Stored | Online, steps: int) -> tuple[float, float]:
        """Mean seconds of `steps` steps after a first one: of all, and of waiting for the batch."""
        batches, waiting, began = source.batches(steps + 1), 0.0, 0.0
        for number in range(steps + 1):
            asked = time.perf_counter()
            latents = next(batches)
            self.wait()
            waiting += time.perf_counter() - asked
            self.update(latents)
            self.wait()
            if not number:
                waiting, began = 0.0, time.perf_counter()
        return (time.perf_counter() - began) / steps, waiting / steps

    def update(self, latents: Tensor) -> None:
        """One update."""
        noise = torch.randn_like(latents)
        sigma = torch.randn(len(latents), 1, 1, 1, device=self.device).sigmoid()
        noisy = (1 - sigma) * latents + sigma * noise
        half = self.setting.denoiser.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            prediction = self.network(
                noisy,
                timestep=1000 * sigma.flatten(),
                class_labels=torch.zeros(len(latents), dtype=torch.int64, device=self.device),
                return_dict=False,
            )[0]
        (prediction.float() - (noise - latents)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def in_fresh_process(work, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def peak(kind: type[Stored | Online], setting: Setting) -> float:
    """Gigabytes at the worst moment; without workers, which a pool's process may not have."""
    setting = replace(setting, workers=0)
    on_cpu = default_device().type == "cpu"
    before = memory("VmRSS") if on_cpu else 0.0
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    Trainer(setting).round(kind(setting), 1)
    return memory("VmHWM") - before if on_cpu else torch.cuda.max_memory_allocated() / 1e9


def memory(name: str) -> float:
    """A line of this process's status, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e9


if __name__ == "__main__":
    typer.run(main)
