"""Training on portraits and landscapes at three resolutions: what is cut, who waits, what repeats.

A small autoencoder is trained with `data.buckets` on one process and on two (gloo), each run once
without a stop and once stopped and started again; and on two processes that draw their shapes each
for itself, which is what agreeing on them saves.

    python benchmarks/mixed_resolution.py TRAIN_PHOTOS --sheet docs/mixed-resolution.jpg

Prints the tables of docs/mixed-resolution.md. Exits with 1 if a batch after a restart is another.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
RESOLUTIONS, MULTIPLE, RESOLUTION, BATCH = (96, 128, 192), 16, 128, 4
CHECKPOINT, DIES = 0.4, 0.65  # where in the run
SETTLED = 20  # steps that are not counted: loaders fill, memory is taken
CONFIG = {
    "data": {
        "resolution": RESOLUTION,
        "batch_size": BATCH,
        "workers": 1,
        "buckets": {"multiple": MULTIPLE, "resolutions": RESOLUTIONS},
    },
    "network": {
        "block_out_channels": [8, 16, 16],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
    "losses": {"perceptual": None},
    "bottleneck": {"weight": 1e-4},
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("train", type=Path, help="a folder of photographs")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", type=Path, default=Path("runs/mixed_resolution"))
    parser.add_argument("--sheet", type=Path, help="where the pictures of a batch of each shape go")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    shutil.rmtree(args.runs, ignore_errors=True)
    config = config_of(args, args.runs / "plan")
    tell_shapes(config, args.sheet)
    same = tell_runs(args)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "pillow"))
    print(
        f"\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores of {cpu()}, "
        f"Python {platform.python_version()}, {packages}. {args.steps} steps a run."
    )
    sys.exit(not same)


def config_of(args, output):
    from latent_ae.config_file import parse_config

    data = CONFIG["data"] | {"path": str(args.train)}
    every = round(CHECKPOINT * args.steps)
    training = {"steps": args.steps, "learning_rate": 1e-3, "checkpoint_every": every}
    return parse_config(CONFIG | {"data": data, "training": training, "output": str(output)})


class Stopped(Exception):
    """What ends a run in the middle, with steps that no checkpoint has."""


def work(args):
    """One process: a run without a stop, one that is stopped and goes on, one of shapes apart."""
    from latent_ae.training import loop, run

    own, stream = loop.update, run.TrainingStream
    rank, world = (int(os.environ.get(name, "1")) for name in ("RANK", "WORLD_SIZE"))
    rank = rank if world > 1 else 0

    def train(name, dies=-1):
        folder = args.runs / f"{name}-{world}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"process-{rank}.jsonl").open("a", buffering=1) as file:
            loop.update = noted(own, file, dies)
            with suppress(Stopped):
                loop.train(config_of(args, folder / "run"), announce=False)

    train("whole")
    train("stopped", dies=round(DIES * args.steps))
    train("stopped")
    if world > 1:
        run.TrainingStream = lambda config, *, seed, rank, **options: stream(
            config, seed=seed + 1 + rank, rank=rank, **options
        )
        train("apart")


def noted(update, file, dies):
    """An update that notes its batch and its times."""
    times = {}

    def wrapped(state):
        if state.step == dies:
            raise Stopped
        if not times:  # the last gradient of the backward pass, before others are waited for
            first = state.network.encoder.conv_in.weight
            first.register_post_accumulate_grad_hook(
                lambda _: times.update(ready=time.perf_counter())
            )
        times["began"] = time.perf_counter()
        done = update(state)
        (batch,) = done.batches
        words = "".join(sample.key for sample in batch.samples).encode()
        row = {
            "step": state.step,
            "shape": batch.images.shape[2:],
            "hash": hashlib.sha256(words + batch.images.numpy().tobytes()).hexdigest(),
            "images": len(batch.images),
            "waited": done.waited,
            "ended": time.perf_counter(),
        }
        file.write(json.dumps(row | times) + "\n")
        return done

    return wrapped


def tell_shapes(config, sheet):
    """A row for each shape: its pictures and batches of an epoch, and what is cut away."""
    from latent_ae.data import TrainingStream, open_source, picture_sizes
    from latent_ae.data.transforms import cover

    began = time.perf_counter()
    source = open_source(config.data)
    opened = time.perf_counter()
    sizes, _ = picture_sizes(source)
    print(
        f"{len(sizes):,} photographs: opened in {opened - began:.2f} s, the sizes read from the "
        f"headers in {time.perf_counter() - opened:.2f} s\n"
    )
    plan = TrainingStream(config.data.model_copy(update={"workers": 0})).plan
    cuts, scales = {}, []
    blanks = [Image.new("L", tuple(size)) for size in sizes.tolist()]
    for epoch in range(len(RESOLUTIONS)):
        for picture, bucket in zip(blanks, plan.bucket_of(epoch), strict=True):
            _, height, width, _ = plan.buckets[bucket]
            whole = cover(picture, (height, width))
            scales.append((whole.width / picture.width, whole.height / picture.height))
            kept = height * width / (whole.width * whole.height)
            cuts.setdefault(int(bucket), []).append(1 - kept)
    print(
        "| shape | a batch | pictures | batches an epoch | cut away, mean | most |\n|-|-|-|-|-|-|"
    )
    for number, bucket in enumerate(plan.buckets):
        found = cuts.get(number, [])
        if found:
            share = len(found) / len(scales)
            print(
                f"| {bucket.width} × {bucket.height} | {bucket.batch_size} | {share:.1%} | "
                f"{len(found) / len(RESOLUTIONS) / bucket.batch_size:.1f} | "
                f"{np.mean(found):.1%} | {max(found):.1%} |"
            )
    every = [cut for found in cuts.values() for cut in found]
    square = [1 - min(w, h) / max(w, h) for w, h in sizes.tolist()]
    ratio = np.array(scales)
    print(
        f"| all | | 100% | | {np.mean(every):.1%} | {max(every):.1%} |\n\n"
        f"A square crop would cut away {np.mean(square):.1%}. Largest distortion, horizontal to "
        f"vertical scale: {abs(ratio[:, 0] / ratio[:, 1] - 1).max():.2%} (rounding to pixels)."
    )
    if sheet:
        save_sheet(config, sheet)


def save_sheet(config, path, most=4):
    """A row for each shape, the first pictures of its first batch in it."""
    from latent_ae.data import TrainingStream

    stream, rows = TrainingStream(config.data.model_copy(update={"workers": 0})), {}
    for _ in range(round(stream.batches)):
        images = next(stream).images
        rows.setdefault(tuple(images.shape[2:]), images[:most])
    ordered = [rows[size] for size in sorted(rows, key=lambda s: (s[0] * s[1] // 4000, s))]
    gap = 4
    width = max(len(images) * (images.shape[3] + gap) for images in ordered) + gap
    page = Image.new("RGB", (width, sum(i.shape[2] + gap for i in ordered) + gap), "white")
    top = gap
    for images in ordered:
        for place, image in enumerate(images):
            left = gap + place * (image.shape[2] + gap)
            page.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (left, top))
        top += images.shape[2] + gap
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, quality=80)


def tell_runs(args):
    """Runs all of them; returns whether every batch came again after a restart."""
    print(
        "\n| processes | shapes | images/s | waits for data | waits for the other, mean | 95 % "
        "| most | the same batches after a stop |\n|-|-|-|-|-|-|-|-|",
        flush=True,
    )
    equal = True
    for processes in sorted({1, args.processes}):
        launch(args, processes)
        whole, stopped = notes(args, "whole", processes), notes(args, "stopped", processes)
        same = all(hashes(a) == hashes(b) for a, b in zip(whole, stopped, strict=True))
        again = min(len(rows) for rows in stopped) - args.steps
        equal &= same and again > 0
        tell(whole, "agreed", f"{'yes' if same else 'NO'} ({args.steps} compared, {again} twice)")
        if processes > 1:
            tell(notes(args, "apart", processes), "each its own", "")
    return equal


def launch(args, processes):
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words += [__file__, str(args.train.resolve()), "--runs", str(args.runs.resolve())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = str(ROOT)
    words += ["--steps", str(args.steps), "--worker"]
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr[-4000:])


def notes(args, name, processes):
    """The rows of each process."""
    files = sorted((args.runs / f"{name}-{processes}").glob("process-*.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def hashes(rows):
    """The batch of each step; a step that came twice must have had the same."""
    found = {}
    for row in rows:
        if found.setdefault(row["step"], row["hash"]) != row["hash"]:
            return {}
    return found


def tell(processes, shapes, same):
    settled = [rows[SETTLED:] for rows in processes]
    elapsed = [rows[-1]["ended"] - rows[0]["began"] for rows in settled]
    images = sum(row["images"] for rows in settled for row in rows)
    waits = [
        sum(row["waited"] for row in rows) / t for rows, t in zip(settled, elapsed, strict=True)
    ]
    ready = np.array([[row["ready"] for row in rows] for rows in settled])
    spread = 1000 * (ready.max(0) - ready.min(0))
    step = 1000 * np.mean(elapsed) / len(settled[0])
    times = "– | – | –"
    if len(settled) > 1:
        times = (
            f"{spread.mean():.0f} ms of {step:.0f} ({spread.mean() / step:.0%}) | "
            f"{np.quantile(spread, 0.95):.0f} ms | {spread.max():.0f} ms"
        )
    print(
        f"| {len(settled)} | {shapes} | {images / max(elapsed):.1f} | "
        f"{', '.join(f'{share:.1%}' for share in waits)} | {times} | {same} |",
        flush=True,
    )


def cpu():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
