"""A run is stopped and started again by the same command: does it end bit-equal to one never so?

For each kill point × processes × accumulation × loader workers a tiny run with an adversary, on the
CPU, is stopped at the kill point and started again; its last checkpoint and its log are compared
with those of a run that was never stopped.

    python benchmarks/restart_matrix.py --processes 1 --accumulation 2 --workers 0 --out table.md

Without options it takes the whole matrix. It exits with 1 if a cell is not bit-equal.
"""

import argparse
import json
import os
import platform
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from string import Template
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file
from skimage import data

ROOT = Path(__file__).parents[1]
# Seven, of which an update takes 2, 4 or 8: no restart is at the beginning of an epoch.
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina")
PHOTOGRAPHS += ("hubble_deep_field", "immunohistochemistry")
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
TIMEOUT, PATIENCE = 180, 45  # seconds: for a start; for torchrun to end its processes after that
STOPPED, SAVED = 5, 6  # the step whose update is hit, and the one whose checkpoint is
NEW, OLD = f"step-{SAVED:09d}.tmp", f"step-{2:09d}.removed.tmp"
FULL = 4096  # bytes that a file may still reach on the full disk; no file of tensors is as small
READERS = {".safetensors": load_file, ".pt": torch.load, ".json": Path.read_text}
CLOCK = ("seconds", "images_per_second", "data_wait_share")
# The network of the tests, with everything that has a state to lose. A row of the log for each
# step, since one over several would be cut in two by the stop.
CONFIG = Template("""
data: {path: $photos, resolution: 32, batch_size: 2, workers: $workers}
network: {block_out_channels: [8, 16], layers_per_block: 1, latent_channels: 4, norm_num_groups: 4,
  mid_block_add_attention: false}
losses: {perceptual: {net: alex, weight: 0.5}, variance: learned}
adversary: {channels: 4, layers: 1, start: 3, warmup_steps: 2, ramp_steps: 2, lecam: 0.01, r1: 0.1,
  r1_every: 2}
training: {steps: 8, learning_rate: 2.0e-3, schedule: cosine, precision: bf16, ema: 0.9,
  accumulation: $accumulation, log_every: 1, checkpoint_every: 2, keep_checkpoints: 2,
  validate_every: 4}
validation: {path: $photos, images: 2}
output: $output
""")


def die(*_: Any, **__: Any) -> None:
    """Ends this process as the system does, without a last word."""
    os.kill(os.getpid(), signal.SIGKILL)


def before_apply(update: int, strike: Callable[[Any], None]) -> None:
    """In the update after this many, when the gradients are there and no weight has moved yet."""
    from latent_ae.training import step

    original = step._apply
    step._apply = lambda run: (run.step == update and strike(run), original(run))[1]


def in_step() -> None:
    """Kills between the two optimizers: the autoencoder has moved, the discriminator has not."""

    def strike(run: Any) -> None:
        run.discriminator_optimizer.step = die

    before_apply(STOPPED, strike)


def while_saving() -> None:
    """Kills when some files are there and another one is half written."""
    from latent_ae.training import checkpoint

    original = checkpoint._save_tensors

    def save_tensors(state: Any, path: Path) -> None:
        original(state, path)
        if path.parent.name == NEW and path.name == "objective.safetensors":
            os.truncate(path, path.stat().st_size // 2)
            die()

    checkpoint._save_tensors = save_tensors


def before_rename() -> None:
    """Kills when the disk holds all files, but under the temporary name."""
    original = Path.rename
    Path.rename = lambda path, target: die() if path.name == NEW else original(path, target)


def while_pruning() -> None:
    """Kills when a part of an old checkpoint is gone."""
    from latent_ae import run_folder

    def rmtree(path: Path, **_: Any) -> None:
        (path / "optimizer.pt").unlink()
        shutil.rmtree(path / "network")
        die()

    run_folder.shutil = SimpleNamespace(rmtree=rmtree)


def in_validation() -> None:
    """Kills when a batch is reconstructed, while the averaged weights are in the network."""
    from latent_ae.training import validation

    validation.ReconstructionMetrics.update = die


def on_signal(number: int) -> None:
    """Signals from inside an update, such that the run stops after `STOPPED` of them."""
    update = STOPPED - (1 if WORLD == 1 else 2)  # several processes agree a step later
    before_apply(update, lambda run: os.kill(os.getpid(), number))


def disk_full() -> None:
    """From where a save begins no file can grow beyond `FULL`: writing fails with EFBIG."""
    from latent_ae.training.checkpoint import Checkpoint

    original = Checkpoint.save

    def save(self: Any, folder: Any, progress: Any, **options: Any) -> None:
        if progress["step"] == SAVED:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, resource.RLIM_INFINITY))
        original(self, folder, progress, **options)

    Checkpoint.save = save


class Point(NamedTuple):
    """A kill point, and what proves that the run was stopped there and nowhere else."""

    title: str
    arm: Callable[[], None]  # patches a process
    rank: int | None  # of the process to patch: the first, the last, or all of them
    code: int  # with which it ends
    newest: int  # the step of the newest checkpoint that it leaves
    beside: str | None = None  # what lies beside the whole checkpoints


POINTS = {
    "step": Point("in a step", in_step, 0, -9, 4),
    "save": Point("while a checkpoint is written", while_saving, 0, -9, 4, NEW),
    "rename": Point("before the rename", before_rename, 0, -9, 4, NEW),
    "prune": Point("while old checkpoints are removed", while_pruning, 0, -9, SAVED, OLD),
    "validation": Point("during validation", in_validation, 0, -9, 4),
    "sigterm": Point("SIGTERM", partial(on_signal, signal.SIGTERM), -1, 0, STOPPED),
    "sigusr1": Point("SIGUSR1", partial(on_signal, signal.SIGUSR1), -1, 0, STOPPED),
    "disk-full": Point("disk full", disk_full, None, 2, 4),
}


def child(name: str, config: str) -> None:
    """The run that is to be stopped: the command line, with its kill point armed."""
    sys.path.insert(0, str(ROOT))  # the same package as the plain command's
    point = POINTS[name]
    if point.rank is None or point.rank % WORLD == RANK:
        point.arm()
    sys.argv = ["latent-ae", "train", config]
    runpy.run_module("latent_ae", run_name="__main__", alter_sys=True)


def start(folder: Path, processes: int, point: str | None = None) -> tuple[set[int], str] | None:
    """Runs the plain command, or the child: exit codes and what it said; None if it hangs."""
    command = [sys.executable]
    if processes > 1:
        command += f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    command += [__file__, "--child", point] if point else ["-m", "latent_ae", "train"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    # No cache of the person's, no network.
    environment |= {"HF_HOME": str(folder.parents[1] / "huggingface"), "HF_HUB_OFFLINE": "1"}
    said = folder / ("stopped.txt" if point else "finished.txt")
    command.append(str(folder / "config.yaml"))
    with said.open("w") as out:  # no pipe: a killed run's loaders would hold it for seconds
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun passes it on, and kills who does not listen
            time.sleep(PATIENCE)
            process.kill()
            return None
    text, codes = said.read_text(), {process.returncode}
    if processes > 1 and process.returncode:  # torchrun's own; its report has the processes'
        codes = {int(code) for code in re.findall(r"exitcode +: (-?\d+)", text)}
    return codes, text


def misplaced(point: Point, codes: set[int], text: str, checkpoints: Path) -> list[str]:
    """What is not as it should be after the stop."""
    wrong = []
    if point.code not in codes:
        wrong.append(f"exit code {', '.join(map(str, sorted(codes)))}, not {point.code}")
    newest = max((path.name for path in checkpoints.glob("step-*[0-9]")), default="none")
    if newest != f"step-{point.newest:09d}":
        wrong.append(f"newest checkpoint {newest}, not that of step {point.newest}")
    beside = [path.name for path in checkpoints.glob("*.tmp")]
    if beside != [point.beside] * bool(point.beside):
        wrong.append(f"beside the checkpoints: {', '.join(beside) or 'nothing'}")
    if point.code == 2:
        own = text.split(" failed (exitcode")[0]  # what follows is torchrun's
        sentences = [line for line in own.splitlines() if line.startswith("error: ")]
        if len(sentences) != 1 or " could not be written: " not in own or "Traceback" in own:
            wrong.append("not one sentence about the checkpoint")
    return wrong


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """A nested structure as one dict; tensors as their kind and bytes, so that NaN equals NaN."""
    if isinstance(value, torch.Tensor):
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {name: (value.dtype, value.shape, content)}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, item in value.items() for k, v in leaves(item, f"{name}/{key}").items()}


def rows(run: Path) -> dict[str, dict[str, Any]]:
    """The log's rows of numbers, without what a clock says."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        f"{line['group']} row {line['step']}": {k: v for k, v in line.items() if k not in CLOCK}
        for line in lines
        if line["group"] in ("train", "validation")
    }


def compare(whole: Path, again: Path) -> tuple[list[str], list[str]]:
    """What differs in two runs' last checkpoints and logs, and which rows only one log has."""
    files: list[dict[str, Path]] = []
    for folder in (run / "checkpoints/step-000000008" for run in (whole, again)):
        files.append({str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()})
    differs = [] if files[0] else ["there is no last checkpoint"]
    for name in sorted(files[0].keys() | files[1].keys()):
        read = READERS[Path(name).suffix]
        a, b = (leaves(read(found[name])) if name in found else {} for found in files)
        unequal = [key for key in a.keys() | b.keys() if key not in a or a[key] != b.get(key)]
        if unequal:
            differs.append(f"{name}: {len(unequal)} of {len(a)} differ")
    before, after = rows(whole), rows(again)
    shared = sorted(before.keys() & after.keys())
    differs += [name for name in shared if before[name] != after[name]]
    return differs, sorted(before.keys() ^ after.keys())


def cell(name: str, processes: int, folder: Path, reference: Path) -> str:
    """Stops a run, starts it again, and tells how it compares."""
    stopped = start(folder, processes, name)
    if stopped is None:
        return "hangs before the restart"
    wrong = misplaced(POINTS[name], *stopped, folder / "run/checkpoints")
    finished = start(folder, processes)
    if finished is None or finished[0] != {0}:
        how = f"ends with {sorted(finished[0])}" if finished else "hangs"
        return "; ".join([*wrong, f"the restart {how}"])
    differs, lacks = compare(reference / "run", folder / "run")
    equal = "bit-equal" + (f" (without {', '.join(lacks)})" if lacks else "")
    return "; ".join([*wrong, *differs]) or equal


def measure(points: list[str], setting: tuple[int, int, int], work: Path) -> list[str]:
    """A column of the table; tells each cell as it comes."""
    title, (processes, accumulation, workers) = " / ".join(map(str, setting)), setting
    values = {"accumulation": accumulation, "workers": workers, "photos": work / "photos"}

    def prepared(name: str) -> Path:
        (folder := work / title.replace(" / ", "-") / name).mkdir(parents=True)
        (folder / "config.yaml").write_text(CONFIG.substitute(values, output=folder / "run"))
        return folder

    reference, column = prepared("reference"), [title]
    whole = start(reference, processes)
    if whole is None or whole[0] != {0}:
        sys.exit(f"the run that nobody stops fails: {whole[1] if whole else 'it hangs'}")
    for name in points:
        began, folder = time.monotonic(), prepared(name)
        text = cell(name, processes, folder, reference)
        print(f"{title}, {name}: {text} ({time.monotonic() - began:.0f} s)", file=sys.stderr)
        for file in [] if text.startswith("bit-equal") else sorted(folder.glob("*.txt")):
            print(f"--- {file.name}\n{file.read_text()[-3000:]}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        column.append(text)
    return column


def table(columns: list[list[str]]) -> str:
    """The table in markdown, with what it was measured by."""
    heads, *lines = (f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
    packages = ("torch", "accelerate", "diffusers", "safetensors")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return "\n".join([heads, "|-" * len(columns) + "|", *lines]) + (
        "\n\nColumns: processes / accumulation / loader workers. "
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores {platform.machine()}, "
        f"Python {platform.python_version()}, {versions}. "
        f"`{shlex.join(['python', 'benchmarks/restart_matrix.py', *sys.argv[1:]])}`\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--out", type=Path, help="a markdown file for the table")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child)
    columns = [["stopped", *(POINTS[name].title for name in options.points)]]
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "photos").mkdir()
        for name in PHOTOGRAPHS:
            picture = Image.fromarray(getattr(data, name)())
            picture.thumbnail((144, 144), Image.Resampling.LANCZOS)
            picture.save(Path(work) / "photos" / f"{name}.png")
        for setting in product(options.processes, options.accumulation, options.workers):
            columns.append(measure(options.points, setting, Path(work)))
    print(text := table(columns))
    if options.out:
        options.out.write_text(text)
    sys.exit(not all(text.startswith("bit-equal") for column in columns[1:] for text in column[1:]))


if __name__ == "__main__":
    main()
