"""How a latents folder of many rows opens, and how fast it gives items.

    python benchmarks/latents_index.py [ROWS ...] [--shard-rows 4096]

The folders are simulated: valid, with keys of 30 characters, labels, captions of 60 and moments in
fp16, but of 4×2×2 values only, so that what is measured is the index and the work an item, not the
disk. Every measurement is made in a fresh process, with one thread as in a loader's worker, after
it has opened a folder of 64 rows: what a library costs once does not count. The files were
written just before and lie in the page cache (warm).
Memory is VmRSS and its peak (VmHWM, reset before opening); pages of the shards that were read are
part of it, which the system takes back when it needs them: "own" is RssAnon, without them.
"""

import hashlib
import multiprocessing
import os
import pickle
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import torch
import typer
from safetensors.torch import save

from latent_ae.config import Preprocessing, Storage
from latent_ae.latents import AutoencoderRecord, LatentDataset, LatentsManifest, LatentStream
from latent_ae.latents.format import (
    INDEX_COLUMNS,
    MANIFEST,
    DataRecord,
    ShardRecord,
    index_bytes,
)
from latent_ae.latents.plan import Unit
from latent_ae.latents.statistics import Moments, summary

SHAPE = (4, 2, 2)
FACTOR = 8
CLASSES = 1000
WORDS = ("large", "small", "red", "old", "dog", "house", "river", "street", "car", "tree")
MEGABYTE = 1e6


def main(
    rows: Annotated[list[int] | None, typer.Argument(help="Rows of each folder.")] = None,
    shard_rows: Annotated[int, typer.Option(help="Rows a shard.")] = 4096,
    items: Annotated[int, typer.Option(help="Items that are read.")] = 50_000,
    buffer: Annotated[int, typer.Option(help="Rows in the stream's buffer.")] = 10_000,
    rounds: Annotated[int, typer.Option(help="Processes a measurement; medians.")] = 3,
) -> None:
    """Measures folders of each size."""
    sizes = sorted(rows or [10**4, 10**5, 10**6])
    with tempfile.TemporaryDirectory(prefix="latents-index-") as place:
        warm = Path(place) / "warm"
        write_folder(warm, 64, 32)
        table: dict[str, list[float]] = {}
        for count in sizes:
            folder = Path(place) / str(count)
            write_folder(folder, count, shard_rows)
            for name, value in measure(folder, warm, items, buffer, rounds).items():
                table.setdefault(name, []).append(value)
    titles = " | ".join(f"{count:,} rows" for count in sizes)
    print(f"| | {titles} | × |\n|-{'|-' * (len(sizes) + 1)}|")
    for name, values in table.items():
        cells = " | ".join(f"{value:,.4g}" for value in values)
        print(f"| {name} | {cells} | {values[-1] / values[0]:.3g} |")
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "pyarrow"))
    print(
        f"\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores {platform.machine()}, Python "
        f"{platform.python_version()}, {packages}; {shard_rows} rows a shard, {items} items, "
        f"a buffer of {buffer}, page cache warm, medians of {rounds} processes"
    )


def write_folder(folder: Path, rows: int, shard_rows: int) -> None:
    """Writes a finished latents folder."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    starts = range(0, rows, shard_rows)
    shards = [
        write_shard(folder, Unit(number), start, min(shard_rows, rows - start), rng)
        for number, start in enumerate(starts)
    ]
    manifest = LatentsManifest(
        autoencoder=AutoencoderRecord(
            path="simulated",
            weights_sha256="0" * 64,
            class_name="AutoencoderKL",
            downsampling=FACTOR,
            channels=SHAPE[0],
            scaling_factor=0.18215,
        ),
        data=DataRecord(rows=rows),
        preprocessing=Preprocessing(resolution=FACTOR * SHAPE[1]),
        storage=Storage(shard_rows=shard_rows),
        latent_shapes=[SHAPE],
        count=rows,
        pictures=rows,
        num_classes=CLASSES,
        shards=shards,
        statistics=summary([shard.moments for shard in shards if shard.moments]),
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")


def write_shard(
    folder: Path, unit: Unit, start: int, count: int, rng: np.random.Generator
) -> ShardRecord:
    """Writes the shard whose first picture is number `start`, and its index."""
    mean, logvar = (
        torch.from_numpy(rng.standard_normal((count, *SHAPE), np.float32)).half() for _ in range(2)
    )
    content = save({"mean": mean, "logvar": logvar - 6})
    record = ShardRecord(
        file=unit.shard,
        index=unit.index,
        rows=count,
        sha256=hashlib.sha256(content).hexdigest(),
        pictures=count,
        highest_label=CLASSES - 1,
        moments=Moments.of([mean], [logvar - 6]),
    )
    index = index_bytes(index_table(start, count, rng), record)
    record.index_sha256 = hashlib.sha256(index).hexdigest()
    (folder / record.file).write_bytes(content)
    (folder / record.index).write_bytes(index)
    return record


def index_table(start: int, count: int, rng: np.random.Generator) -> pa.Table:
    """The index of a shard whose first picture is number `start`."""
    words = rng.choice(WORDS, (count, 12))
    labels = rng.integers(CLASSES, size=count)
    columns = {
        "key": [f"train/n{label:08d}/{start + i:010d}.JPEG" for i, label in enumerate(labels)],
        "position": np.arange(start, start + count),
        "label": labels,
        "caption": [" ".join(row) for row in words],
        "width": np.full(count, 500),
        "height": np.full(count, 375),
        "crop_left": np.zeros(count, int),
        "crop_top": np.zeros(count, int),
        "flipped": np.zeros(count, bool),
        "latent_height": np.full(count, SHAPE[1]),
        "latent_width": np.full(count, SHAPE[2]),
        "row": np.arange(count),
        "skipped": [None] * count,
    }
    return pa.table({name: pa.array(columns[name], kind) for name, kind in INDEX_COLUMNS.items()})


def measure(folder: Path, warm: Path, items: int, buffer: int, rounds: int) -> dict[str, float]:
    """The rows of one folder."""
    found: dict[str, list[float]] = {}
    tasks = [
        (opening, ("label", "key")),
        (opening, ("label",)),
        (random_access, items),
        (streaming, (items, buffer)),
    ]
    for task, options in tasks:
        for _ in range(rounds):
            for name, value in in_fresh_process(task, folder, warm, options).items():
                found.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in found.items()}
    bytes_by_kind = {
        kind: sum(file.stat().st_size for file in folder.glob(pattern)) / MEGABYTE
        for kind, pattern in (
            ("shards", "*.safetensors"),
            ("indices", "*.parquet"),
            ("manifest", MANIFEST),
        )
    }
    return medians | {f"on disk: {kind}, MB": size for kind, size in bytes_by_kind.items()}


def in_fresh_process(task, folder, warm, options):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(prepared, (task, folder, warm, options))


def prepared(task, folder, warm, options):
    torch.set_num_threads(1)
    LatentDataset(warm)[0]
    return task(folder, options)


def opening(folder: Path, columns: tuple[str, ...]) -> dict[str, float]:
    """Time and memory of a dataset with these columns."""
    before, began = memory(), time.perf_counter()
    dataset = LatentDataset(folder, columns=columns)
    seconds, after = time.perf_counter() - began, memory()
    what = f"columns {', '.join(columns)}"
    return {
        f"open, {what}: seconds": seconds,
        f"open, {what}: memory, MB": after["VmRSS"] - before["VmRSS"],
        f"open, {what}: peak, MB": after["VmHWM"] - before["VmRSS"],
        f"open, {what}: pickled, MB": len(pickle.dumps(dataset)) / MEGABYTE,
    }


def random_access(folder: Path, items: int) -> dict[str, float]:
    """Reads random positions."""
    before = memory()
    dataset = LatentDataset(folder)
    positions = np.random.default_rng(0).integers(len(dataset), size=items).tolist()
    began = time.perf_counter()
    for position in positions:
        dataset[position]
    seconds, after = time.perf_counter() - began, memory()
    return {
        "random access: items/s": items / seconds,
        "random access: peak, MB": after["VmHWM"] - before["VmRSS"],
        "random access: own, MB": after["RssAnon"] - before["RssAnon"],
    }


def streaming(folder: Path, options: tuple[int, int]) -> dict[str, float]:
    """Reads a stream, small folders several times; then goes on in the middle of an epoch."""
    items, buffer = options
    before = memory()
    stream = LatentStream(folder, buffer=buffer)
    began = time.perf_counter()
    next(iter(stream))
    first = time.perf_counter() - began
    began, given, epoch = time.perf_counter(), 0, 0
    while given < items:
        stream.set_epoch(epoch := epoch + 1)
        given += sum(1 for _ in zip(range(items - given), stream, strict=False))
    seconds, after = time.perf_counter() - began, memory()
    stream.load_state_dict({"epoch": 1, "given": len(stream) // 2})
    began = time.perf_counter()
    next(iter(stream))
    resumed = time.perf_counter() - began
    return {
        "stream: seconds to the first item": first,
        "stream: items/s": items / seconds,
        "stream: seconds to resume at half an epoch": resumed,
        "stream: peak, MB": after["VmHWM"] - before["VmRSS"],
        "stream: own, MB": after["RssAnon"] - before["RssAnon"],
    }


def memory() -> dict[str, float]:
    """This process's, in MB (Linux); the first call also begins the peak anew."""
    if not hasattr(memory, "begun"):
        memory.begun = True
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = ("VmRSS", "VmHWM", "RssAnon")
    return {name: int(fields[name].split()[0]) * 1024 / MEGABYTE for name in names}


if __name__ == "__main__":
    typer.run(main)
