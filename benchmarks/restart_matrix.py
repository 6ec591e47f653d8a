"""A run is stopped and started again by the same command: does it end bit-equal to one never so?

For each kill point × processes × accumulation × loader workers a tiny run with an adversary, on the
CPU, is stopped at the kill point and started again; its last checkpoint and its log are compared
with those of a run that was never stopped.

    python benchmarks/restart_matrix.py --processes 1 --accumulation 2 --workers 0 --out table.md

Without options it takes the whole matrix. It prints a table, with date, versions and command, and
exits with 1 if a cell is not bit-equal.
"""

import argparse
import json
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
# Five, of which an update takes 2, 4 or 8: every checkpoint but none of the epochs ends at step 4.
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina")
TIMEOUT, PATIENCE = 180, 45  # seconds: for a start; for torchrun to end its processes after that
STOPPED, SAVED = 5, 6  # the step whose update is hit, and the one whose checkpoint is
NEW, OLD = f"step-{SAVED:09d}.tmp", f"step-{2:09d}.removed.tmp"
FULL = 4096  # bytes that a file may still reach on the full disk; no file of tensors is as small
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


def before_apply(strike: Callable[[Any], None]) -> None:
    """Calls this with the run whenever the gradients are there and no weight has moved yet."""
    from latent_ae.training import step

    original = step._apply
    step._apply = lambda run: (strike(run), original(run))[1]


def in_step(world: int) -> None:
    """Kills between the two optimizers: the autoencoder has moved, the discriminator has not."""

    def strike(run: Any) -> None:
        if run.step == STOPPED:
            run.discriminator_optimizer.step = die

    before_apply(strike)


def while_saving(world: int) -> None:
    """Kills when some files are there and another one is half written."""
    from latent_ae.training import checkpoint

    original = checkpoint._save_tensors

    def save_tensors(state: Any, path: Path) -> None:
        original(state, path)
        if path.parent.name == NEW and path.name == "objective.safetensors":
            os.truncate(path, path.stat().st_size // 2)
            die()

    checkpoint._save_tensors = save_tensors


def before_rename(world: int) -> None:
    """Kills when the disk holds all files, but under the temporary name."""
    original = Path.rename
    Path.rename = lambda path, target: die() if path.name == NEW else original(path, target)


def while_pruning(world: int) -> None:
    """Kills when a part of an old checkpoint is gone."""
    from latent_ae import run_folder

    def rmtree(path: Path) -> None:
        (path / "optimizer.pt").unlink()
        shutil.rmtree(path / "network")
        die()

    run_folder.shutil = SimpleNamespace(rmtree=rmtree)


def in_validation(world: int) -> None:
    """Kills when a batch is reconstructed, while the averaged weights are in the network."""
    from latent_ae.training import validation

    validation.ReconstructionMetrics.update = die


def on_signal(number: int) -> Callable[[int], None]:
    """Signals from inside an update, such that the run stops after `STOPPED` of them."""

    def arm(world: int) -> None:
        update = STOPPED - (1 if world == 1 else 2)  # several processes agree a step later
        before_apply(lambda run: os.kill(os.getpid(), number) if run.step == update else None)

    return arm


def disk_full(world: int) -> None:
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
    arm: Callable[[int], None]  # patches a process; takes the number of processes
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
    "sigterm": Point("SIGTERM", on_signal(signal.SIGTERM), -1, 0, STOPPED),
    "sigusr1": Point("SIGUSR1", on_signal(signal.SIGUSR1), -1, 0, STOPPED),
    "disk-full": Point("disk full", disk_full, None, 2, 4),
}


class Setting(NamedTuple):
    """A column of the table."""

    processes: int
    accumulation: int
    workers: int

    def __str__(self) -> str:
        return " / ".join(map(str, self))


def child(name: str, config: str) -> None:
    """The run that is to be stopped: the command line, with its kill point armed."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    point = POINTS[name]
    if point.rank is None or rank == point.rank % world:
        point.arm(world)
    from latent_ae.cli import main as command_line

    sys.argv = ["latent-ae", "train", config]
    command_line()


def start(folder: Path, processes: int, point: str | None = None) -> tuple[set[int], str] | None:
    """Runs the plain command, or the child with its kill point.

    Returns:
        The exit codes of the processes that failed, or 0, and what they said; None if it hangs.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
    command += [__file__, "--child", point] if point else ["-m", "latent_ae", "train"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    # No cache of the person's, no network.
    environment |= {"HF_HOME": str(folder.parents[1] / "huggingface"), "HF_HUB_OFFLINE": "1"}
    said = folder / ("stopped.txt" if point else "finished.txt")
    with said.open("w") as file:  # a killed run's loaders live on for seconds: they'd hold a pipe
        process = subprocess.Popen(
            [*command, str(folder / "config.yaml")],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
        )
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun passes it on, and kills who does not listen
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
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
    names = {path.name for path in checkpoints.glob("*")}
    whole = {name for name in names if not name.endswith(".tmp")}
    newest = max((int(name[5:]) for name in whole), default=0)
    if newest != point.newest:
        wrong.append(f"newest checkpoint {newest}, not {point.newest}")
    if names - whole != ({point.beside} if point.beside else set()):
        wrong.append(f"beside the checkpoints: {', '.join(sorted(names - whole)) or 'nothing'}")
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


def read(file: Path) -> dict[str, Any]:
    """A file of a checkpoint as a flat dict."""
    if file.suffix == ".safetensors":
        return leaves(load_file(file))
    return leaves(
        torch.load(file, weights_only=True)
        if file.suffix == ".pt"
        else json.loads(file.read_text())
    )


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
    differs, files = [], []
    for folder in (run / "checkpoints/step-000000008" for run in (whole, again)):
        files.append({str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()})
    for name in sorted(files[0].keys() | files[1].keys()):
        a, b = (read(found[name]) if name in found else {} for found in files)
        unequal = [key for key in a.keys() | b.keys() if key not in a or a[key] != b.get(key)]
        if unequal:
            differs.append(f"{name}: {len(unequal)} of {len(a)} differ")
    before, after = rows(whole), rows(again)
    shared = sorted(before.keys() & after.keys())
    differs += [name for name in shared if before[name] != after[name]]
    return differs, sorted(before.keys() ^ after.keys())


def cell(name: str, setting: Setting, folder: Path, reference: Path) -> str:
    """Stops a run, starts it again, and tells how it compares."""
    stopped = start(folder, setting.processes, name)
    if stopped is None:
        return "hangs before the restart"
    wrong = misplaced(POINTS[name], *stopped, folder / "run/checkpoints")
    finished = start(folder, setting.processes)
    if finished is None:
        return "; ".join([*wrong, "hangs after the restart"])
    if finished[0] != {0}:
        return "; ".join([*wrong, f"exit code {sorted(finished[0])} after the restart"])
    differs, lacks = compare(reference / "run", folder / "run")
    if wrong or differs:
        return "; ".join([*wrong, *differs])
    return "bit-equal" + (f" (without {', '.join(lacks)})" if lacks else "")


def measure(points: list[str], settings: list[Setting], work: Path) -> dict[tuple, str]:
    """Fills the table, and tells each cell as it comes."""

    def prepared(folder: Path, setting: Setting) -> Path:
        folder.mkdir(parents=True)
        values = setting._asdict() | {"photos": work / "photos", "output": folder / "run"}
        (folder / "config.yaml").write_text(CONFIG.substitute(values))
        return folder

    (work / "photos").mkdir()
    for name in PHOTOGRAPHS:
        picture = Image.fromarray(getattr(data, name)())
        picture.thumbnail((144, 144), Image.Resampling.LANCZOS)
        picture.save(work / "photos" / f"{name}.png")
    cells = {}
    for column, setting in enumerate(settings):
        reference = prepared(work / str(column) / "reference", setting)
        whole = start(reference, setting.processes)
        if whole is None or whole[0] != {0}:
            sys.exit(f"the run that nobody stops fails: {whole[1] if whole else 'it hangs'}")
        for name in points:
            began = time.monotonic()
            folder = prepared(work / str(column) / name, setting)
            text = cells[name, setting] = cell(name, setting, folder, reference)
            print(f"{name}, {setting}: {text} ({time.monotonic() - began:.0f} s)", file=sys.stderr)
            for file in [] if text.startswith("bit-equal") else sorted(folder.glob("*.txt")):
                print(f"--- {file.name}\n{file.read_text()[-3000:]}", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)
    return cells


def table(points: list[str], settings: list[Setting], cells: dict[tuple, str]) -> str:
    """The table in markdown, with what it was measured by."""
    lines = [f"| stopped | {' | '.join(map(str, settings))} |", "|-" * (1 + len(settings)) + "|"]
    for name in points:
        row = [POINTS[name].title, *(cells[name, setting] for setting in settings)]
        lines.append(f"| {' | '.join(row)} |")
    packages = ("torch", "accelerate", "diffusers", "safetensors")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    lines += [
        "\nColumns: processes / accumulation / loader workers. "
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores {platform.machine()}, "
        f"Python {platform.python_version()}, {versions}. "
        f"`{shlex.join(['python', 'benchmarks/restart_matrix.py', *sys.argv[1:]])}`\n"
    ]
    return "\n".join(lines)


def main() -> None:
    """Reads the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--out", type=Path, help="a markdown file for the table")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child)
    wanted = product(options.processes, options.accumulation, options.workers)
    settings = [Setting(*values) for values in wanted]
    with tempfile.TemporaryDirectory() as work:
        cells = measure(options.points, settings, Path(work))
    text = table(options.points, settings, cells)
    print(text)
    if options.out:
        options.out.write_text(text)
    sys.exit(any(not cell.startswith("bit-equal") for cell in cells.values()))


if __name__ == "__main__":
    main()
