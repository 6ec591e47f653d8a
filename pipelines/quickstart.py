"""The whole way in minutes, with nothing but this repository: photographs to a diffusers pipeline.

    python pipelines/quickstart.py [--output runs/quickstart] [--minutes 5]

Trains a small KL-VAE on random crops of the photographs that scikit-image ships, measures it on
photographs it has not seen, exports it, encodes crops to latents, trains a denoiser on them, saves
the pipeline and loads it again with stock diffusers. Needs no network and no GPU. `--minutes` buys
better pictures.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
START = time.perf_counter()

import numpy as np  # noqa: E402
import skimage  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = ("astronaut.png", "chelsea.png", "camera.png")
TRAIN = (
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "retina.jpg",
    "brick.png",
    "grass.png",
    "gravel.png",
    "coins.png",
    "moon.png",
)
SCALES = (1.0, 0.7, 0.5, 0.35)
TILE = 192
CROPS = 1536  # encoded for the denoiser
CROP_SIDE = 64
RESERVE = 60.0  # seconds for everything that is not training, on two slow cores
SAMPLING = 30.0  # seconds of these for the last stage
AUTOENCODER_SHARE = 0.55

console = Console()
seconds: dict[str, float] = {}


def main(
    output: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/quickstart"),
    minutes: Annotated[float, typer.Option(help="Time for the whole; more is better.", min=2)] = 5,
) -> None:
    """Photographs to a diffusers pipeline, end to end."""
    from latent_ae.errors import UserError

    if any((output / name).exists() for name in ("autoencoder", "training", "crops", "pipeline")):
        console.print(f"error: {output} holds a quickstart already; remove it or give --output")
        raise typer.Exit(2)
    try:
        run(output, 60 * minutes)
    except UserError as error:
        console.print(f"error: {error}")
        raise typer.Exit(2) from None


def run(output: Path, budget: float) -> None:
    """The stages one after another; `budget` in seconds."""
    with stage("photographs"):
        copy_photographs(output / "photographs")
    with stage("speed of this machine"):
        config = affordable_config(output, AUTOENCODER_SHARE * (budget - RESERVE))
    with stage("train the autoencoder"):
        from latent_ae import train

        train(config, console)
    with stage("export"):
        from latent_ae import export_run

        export_run(output / "training", output / "autoencoder", images=256)
    with stage("evaluate"):
        metrics = evaluate_held_out(output)
    with stage("encode crops"):
        encode_crops(output)
    with stage("train the denoiser"):
        left = budget - (time.perf_counter() - START) - SAMPLING
        train_denoiser(output, max(20.0, left), config.training.precision)
    with stage("sample with stock diffusers"):
        sample_in_another_process(output)
    write_metrics(output, metrics, config)
    tell(output, metrics)


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Announces a stage and notes how long it takes."""
    console.rule(f"[bold]{title}", align="left")
    begun = time.perf_counter()
    yield
    seconds[title] = round(time.perf_counter() - begun, 1)
    total = time.perf_counter() - START
    console.print(f"[dim]{title}: {seconds[title]:.1f} s · {total:.0f} s in all")


def copy_photographs(folder: Path) -> None:
    """Puts scikit-image's photographs into `held_out/`, and tiles of them into `train/`.

    Tiles, because a crop of 64 pixels would otherwise decode two million; at several scales,
    because the held-out photographs are reduced to 256 pixels, which makes them sharp.
    """
    source = Path(skimage.__file__).parent / "data"
    for part in ("train", "held_out"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name in HELD_OUT:
        with Image.open(source / name) as picture:
            picture.convert("RGB").save(folder / "held_out" / f"{Path(name).stem}.png")
    tiles = 0
    for name in TRAIN:
        with Image.open(source / name) as picture:
            picture = picture.convert("RGB")
        for scale in SCALES:
            reduced = picture.resize(
                (round(picture.width * scale), round(picture.height * scale)),
                Image.Resampling.LANCZOS,
            )
            for box in tile_boxes(*reduced.size):
                stem = f"{Path(name).stem}-{tiles:04d}"
                reduced.crop(box).save(folder / "train" / f"{stem}.png", compress_level=1)
                tiles += 1
    console.print(
        f"{len(TRAIN)} to train on ({tiles} tiles), {len(HELD_OUT)} to measure on, in {folder}"
    )


def tile_boxes(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of at most `TILE` pixels a side that cover a picture evenly."""
    columns, rows = -(-width // TILE), -(-height // TILE)
    for row in range(rows):
        for column in range(columns):
            left, right = (round(width * (column + i) / columns) for i in (0, 1))
            top, bottom = (round(height * (row + i) / rows) for i in (0, 1))
            yield left, top, right, bottom


def affordable_config(output: Path, budget: float) -> Any:
    """The quickstart's config with the faster precision and as many steps as the time allows."""
    from latent_ae import load_config, train

    speeds, settings = (
        {},
        [
            f"data.path={output / 'photographs/train'}",
            f"validation.path={output / 'photographs/held_out'}",
        ],
    )
    for precision in ("bf16", "fp32"):
        folder = output / f"probe-{precision}"
        probe = [
            f"training.precision={precision}",
            f"output={folder}",
            "training.steps=24",
            "training.log_every=8",
            "validation=null",
        ]
        config = load_config(ROOT / "configs/quickstart.yaml", settings + probe)
        train(config, Console(quiet=True))
        last = (folder / "log.jsonl").read_text().splitlines()[-1]
        speeds[precision] = json.loads(last)["images_per_second"]
        shutil.rmtree(folder)
    precision = max(speeds, key=lambda name: speeds[name])
    steps = int(budget * speeds[precision] / config.data.batch_size)
    console.print(f"{speeds[precision]:.0f} images/s in {precision}: {steps} steps")
    overrides = [f"training.precision={precision}", f"training.steps={steps}"]
    overrides.append(f"output={output / 'training'}")
    return load_config(ROOT / "configs/quickstart.yaml", settings + overrides)


def evaluate_held_out(output: Path) -> dict[str, Any]:
    """Measures the exported folder on the photographs it has not seen; writes their sheet."""
    from latent_ae import evaluate, load_network
    from latent_ae.autoencoder import decode_latents, reconstruct
    from latent_ae.data import evaluation_batches, normalize, source_of, to_uint8
    from latent_ae.evaluation import lanczos_reduction
    from latent_ae.pictures import error_map, save_grid, save_sheet

    held_out = output / "photographs/held_out"
    result = evaluate(output / "autoencoder", held_out, quick=True, references=("Lanczos",))
    network = load_network(output / "autoencoder")
    (batch,) = evaluation_batches(source_of(held_out), 256)
    with torch.no_grad():
        decoded = to_uint8(reconstruct(network, normalize(batch.images)))
        channels = network.config["latent_channels"]
        noise = torch.randn(8, channels, 32, 32, generator=torch.manual_seed(0))
        prior = to_uint8(decode_latents(network, noise))
    values = int(result.content["model"]["values_per_image"])
    lanczos = lanczos_reduction(batch.images, values)
    columns = {
        "input": batch.images,
        "reconstruction": decoded,
        "Lanczos, as many values": lanczos,
        "error of ours (4x)": error_map(batch.images, decoded),
    }
    save_sheet(output / "reconstructions.png", columns)
    save_grid(output / "prior.png", prior, columns=4)
    content = result.to_json()
    kept = {name: content[name] for name in ("metrics", "protocol", "model")}
    return {**kept, "lanczos": result.reference("Lanczos")}


def encode_crops(output: Path) -> None:
    """Cuts random crops from the training photographs, one folder a photograph, and encodes them.

    The folders become class labels, so the denoiser learns to make the texture one asks for.
    """
    from latent_ae import encode

    rng, crops = np.random.default_rng(0), output / "crops"
    source = Path(skimage.__file__).parent / "data"
    for name in TRAIN:
        path = source / name
        (crops / path.stem).mkdir(parents=True)
        picture = Image.open(path).convert("RGB")
        for number in range(CROPS // len(TRAIN)):
            side = int(rng.integers(CROP_SIDE, 2 * CROP_SIDE + 1))
            left, top = (int(rng.integers(0, edge - side + 1)) for edge in picture.size)
            crop = picture.resize(
                (CROP_SIDE, CROP_SIDE),
                Image.Resampling.LANCZOS,
                box=(left, top, left + side, top + side),
            )
            crop.save(crops / path.stem / f"{number:04d}.png", compress_level=1)
    encode(
        output / "autoencoder",
        crops,
        output / "latents",
        resolution=CROP_SIDE,
        batch_size=32,
        workers=0,
        console=console,
    )
    shutil.rmtree(crops)


def train_denoiser(output: Path, budget: float, precision: Any) -> None:
    """Trains a small class-conditional denoiser for `budget` seconds and saves the pipeline."""
    sys.path.insert(0, str(ROOT / "pipelines"))
    from train_denoiser import DenoiserConfig, train

    config = DenoiserConfig(
        denoiser="unet",
        channels=(32, 64, 96),
        layers=1,
        attention=0,
        batch_size=16,
        learning_rate=4e-3,
        warmup_steps=30,
        ema=0.99,
        precision=precision,
        seconds=budget,
        log_every=50,
        sample_every=0,  # the last stage draws
    )
    train(
        output / "latents",
        output / "pipeline",
        config,
        run=output / "training-denoiser",
        console=console,
    )


SAMPLER = """
import sys
import numpy as np

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "latent_ae":
            raise ImportError("stock diffusers must do without latent_ae")

sys.meta_path.insert(0, Blocked())
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
labels = [label for label in pipe.labels for _ in range(4)]
generator = torch.Generator().manual_seed(0)
images = pipe(
    class_labels=labels, guidance_scale=2.0, num_inference_steps=25, generator=generator,
    output_type="np",
).images
np.savez(sys.argv[2], images=(255 * images).round().astype(np.uint8), labels=labels[::4])
"""


def sample_in_another_process(output: Path) -> None:
    """Loads the saved pipeline where latent_ae cannot be imported, and draws from every class."""
    from latent_ae.pictures import save_sheet

    file = output / "samples.npz"
    subprocess.run([sys.executable, "-c", SAMPLER, str(output / "pipeline"), str(file)], check=True)
    with np.load(file) as content:
        images = torch.from_numpy(content["images"]).permute(0, 3, 1, 2)
        labels = [str(label) for label in content["labels"]]
    file.unlink()
    larger = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    columns = {label: larger[4 * i : 4 * i + 4] for i, label in enumerate(labels)}
    save_sheet(output / "samples.png", columns)


def write_metrics(output: Path, metrics: dict[str, Any], config: Any) -> None:
    """Everything that another machine's numbers must be compared with."""
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "seconds": {**seconds, "all": round(time.perf_counter() - START, 1)},
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
        },
        "versions": {name: version(name) for name in ("latent_ae", "torch", "diffusers")},
        "steps": config.training.steps,
        "precision": config.training.precision,
        **metrics,
    }
    (output / "metrics.json").write_text(json.dumps(content, indent=2) + "\n")


def tell(output: Path, metrics: dict[str, Any]) -> None:
    """The table, what to look at, what to try next."""
    table = Table(title="photographs it has not seen, 256 × 256", title_justify="left")
    for title in ("", "PSNR (dB)", "SSIM", "LPIPS"):
        table.add_column(title, justify="right" if title else "left")
    names = {"metrics": "autoencoder", "lanczos": "Lanczos, as many values"}
    for key, name in names.items():
        row = metrics[key]
        table.add_row(name, f"{row['psnr']:.2f}", f"{row['ssim']:.3f}", f"{row['lpips']:.3f}")
    console.rule(f"[bold]{time.perf_counter() - START:.0f} s in all", align="left")
    console.print(table)
    console.print(
        f"""look at
  {output}/reconstructions.png   input beside reconstruction
  {output}/samples.png           drawn by the pipeline, a column for each photograph it learned from
  {output}/prior.png             what N(0, I) decodes to without a denoiser

try next
  latent-ae evaluate {output}/autoencoder YOUR_PHOTOS
  latent-ae encode {output}/autoencoder YOUR_PHOTOS latents
  latent-ae train configs/quickstart.yaml data.path=YOUR_PHOTOS output=runs/mine
  python pipelines/quickstart.py --minutes 30 --output runs/longer""",
        markup=False,
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(main)
