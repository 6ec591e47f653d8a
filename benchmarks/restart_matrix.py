"""A run is stopped and started again by the same command: does it end bit-equal to one never so?

For each kill point × processes × accumulation × loader workers a tiny run with an adversary, on the
CPU, is stopped at the kill point, started again, and its last checkpoint and its log are compared
with those of a run that was never stopped.

    python benchmarks/restart_matrix.py --processes 1 --accumulation 2 --workers 0 --out table.md

Without options it takes the whole matrix. It prints a table, with date and versions, and exits with
1 if a cell is not bit-equal.
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
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
# Five, of which the updates take 2, 4 or 8: every checkpoint lies in the middle of an epoch.
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina")
STEPS, VALIDATED, STOPPED, STRUCK = 8, 4, 5, 6  # STRUCK: the save that some kill points hit
TIMEOUT = 180  # seconds a start may take
PATIENCE = 45  # more than torchrun gives its processes to end
FULL = 4096  # bytes that a file may still reach on the full disk: no tensor file is as small
CLOCK = ("seconds", "images_per_second", "data_wait_share")


def in_step(world: int) -> None:
    """Kills between the two optimizers: one of them has moved its weights, the other has not."""

    def strike(run: Any) -> None:
        if run.step == STOPPED:
            run.discriminator_optimizer.step = die

    before_apply(strike)


def while_saving(world: int) -> None:
    """Kills when two tensor files are there and a third one is half written."""
    from latent_ae.training import checkpoint

    original = checkpoint._save_tensors

    def save_tensors(state: Any, path: Path) -> None:
        original(state, path)
        if struck(path.parent) and path.name == "objective.safetensors":
            os.truncate(path, path.stat().st_size // 2)
            die()

    checkpoint._save_tensors = save_tensors


def before_rename(world: int) -> None:
    """Kills when all files are on the disk and the folder still has its temporary name."""
    original = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if struck(path):
            die()
        return original(path, target)

    Path.rename = rename  # pyright: ignore[reportAttributeAccessIssue]


def while_pruning(world: int) -> None:
    """Kills when a part of an old checkpoint is gone."""
    from latent_ae import run_folder

    def rmtree(path: Path) -> None:
        (path / "optimizer.pt").unlink()
        shutil.rmtree(path / "network")
        die()

    run_folder.shutil = SimpleNamespace(rmtree=rmtree)  # pyright: ignore


def in_validation(world: int) -> None:
    """Kills when pictures have been reconstructed and the network holds the averaged weights."""
    from latent_ae.training import validation

    validation.ReconstructionMetrics.update = die  # pyright: ignore


def on_signal(number: signal.Signals) -> Callable[[int], None]:
    """Sends a signal from inside an update, so that the run stops after `STOPPED` of them."""

    def arm(world: int) -> None:
        # Several processes agree on it a step later.
        last = STOPPED - 1 if world == 1 else STOPPED - 2

        def strike(run: Any) -> None:
            if run.step == last:
                os.kill(os.getpid(), number)

        before_apply(strike)

    return arm


def disk_full(world: int) -> None:
    """Lets no file grow beyond `FULL` from where a save begins: writing fails with EFBIG."""
    from latent_ae.training.checkpoint import Checkpoint

    original = Checkpoint.save

    def save(self: Any, folder: Any, progress: Any, **options: Any) -> None:
        if progress["step"] == STRUCK:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, resource.RLIM_INFINITY))
        original(self, folder, progress, **options)

    Checkpoint.save = save


class Point(NamedTuple):
    """A kill point, and what proves that the run was stopped there.

    Attributes:
        title: in the table.
        arm: patches the process that is to be stopped; called with the number of processes.
        rank: of the process that is patched: the first, the last, or None for all of them.
        code: with which it ends.
        newest: the step of the newest checkpoint that it leaves.
        leaves: what lies beside the whole checkpoints.
    """

    title: str
    arm: Callable[[int], None]
    rank: int | None
    code: int
    newest: int
    leaves: tuple[str, ...] = ()


NEW, OLD = f"step-{STRUCK:09d}.tmp", f"step-{2:09d}.removed.tmp"
POINTS = {
    "step": Point("in a step", in_step, 0, -9, 4),
    "save": Point("while a checkpoint is written", while_saving, 0, -9, 4, (NEW,)),
    "rename": Point("before the rename", before_rename, 0, -9, 4, (NEW,)),
    "prune": Point("while old checkpoints are removed", while_pruning, 0, -9, STRUCK, (OLD,)),
    "validation": Point("during validation", in_validation, 0, -9, VALIDATED),
    "sigterm": Point("SIGTERM", on_signal(signal.SIGTERM), -1, 0, STOPPED),
    "sigusr1": Point("SIGUSR1", on_signal(signal.SIGUSR1), -1, 0, STOPPED),
    "disk-full": Point("disk full", disk_full, None, 2, 4),
}


def struck(folder: Path) -> bool:
    """Whether this is the checkpoint that is being written when the kill comes."""
    return folder.name == NEW


def die(*_: Any, **__: Any) -> None:
    """Ends this process as the system does that has no memory left."""
    os.kill(os.getpid(), signal.SIGKILL)


def before_apply(strike: Callable[[Any], None]) -> None:
    """Calls this with the run when an update has its gradients and no weight has moved."""
    from latent_ae.training import step

    original = step._apply

    def apply(run: Any) -> dict[str, Any]:
        strike(run)
        return original(run)

    step._apply = apply


def child(name: str, config: str) -> None:
    """The run that is to be stopped: the command line, with its kill point armed."""
    rank, world = (int(os.environ.get(key, n)) for key, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    point = POINTS[name]
    if point.rank is None or rank == point.rank % world:
        point.arm(world)
    from latent_ae.cli import main as command_line

    sys.argv = ["latent-ae", "train", config]
    command_line()


class Setting(NamedTuple):
    """A column of the table."""

    processes: int
    accumulation: int
    workers: int

    def __str__(self) -> str:
        return " / ".join(map(str, self))


def write_config(folder: Path, setting: Setting, photos: Path) -> Path:
    """The network of the tests, with everything that has a state to lose."""
    source = {"path": str(photos)}
    content = {
        "data": source | {"resolution": 32, "batch_size": 2, "workers": setting.workers},
        "network": {
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "mid_block_add_attention": False,
        },
        "losses": {"perceptual": {"net": "alex", "weight": 0.5}, "variance": "learned"},
        "adversary": {
            "channels": 4,
            "layers": 1,
            "start": 3,
            "warmup_steps": 2,
            "ramp_steps": 2,
            "lecam": 0.01,
            "r1": 0.1,
            "r1_every": 2,
        },
        "training": {
            "steps": STEPS,
            "learning_rate": 2e-3,
            "schedule": "cosine",
            "precision": "bf16",
            "accumulation": setting.accumulation,
            "ema": 0.9,
            "log_every": 1,  # a row of several steps would be cut in two by a stop
            "checkpoint_every": 2,
            "keep_checkpoints": 2,
            "validate_every": VALIDATED,
        },
        "validation": source | {"images": 2},
        "output": str(folder / "run"),
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(content))  # JSON is YAML
    return folder / "config.yaml"


def start(config: Path, processes: int, point: str | None = None) -> tuple[set[int], str] | None:
    """Runs the command, or with a kill point the child.

    Returns:
        The exit codes of the processes that failed, or 0, and what they said; None if it hangs.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(processes)]
    run = ["-m", "latent_ae", "train"] if point is None else [__file__, "--child", point]
    home = str(config.parents[2] / "huggingface")  # no cache of the person's, no network
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HOME": home, "HF_HUB_OFFLINE": "1"}
    said = config.with_name("stopped.txt" if point else "finished.txt")
    # Into a file: a loader's worker outlives its killed parent by seconds and would hold a pipe.
    with said.open("w") as file:
        process = subprocess.Popen(
            [*command, *run, str(config)], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # lets torchrun end its processes
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return None
    text = said.read_text()
    codes = {process.returncode}
    if processes > 1 and process.returncode:  # it is torchrun's own; its report has the others'
        codes = {int(code) for code in re.findall(r"exitcode +: (-?\d+)", text)}
    return codes, text


def proof(point: Point, codes: set[int], text: str, checkpoints: Path) -> list[str]:
    """What is not as it should be when the run has been stopped."""
    wrong = []
    if point.code not in codes:
        wrong.append(f"exit code {', '.join(map(str, sorted(codes)))}, not {point.code}")
    names = {path.name for path in checkpoints.glob("*")}
    whole = {name for name in names if not name.endswith(".tmp")}
    newest = max((int(name[5:]) for name in whole), default=0)
    if newest != point.newest:
        wrong.append(f"newest checkpoint {newest}, not {point.newest}")
    if names - whole != set(point.leaves):
        wrong.append(f"beside the checkpoints lies {', '.join(sorted(names - whole)) or 'nothing'}")
    if point.code == 2:
        own = re.split(r" failed \(exitcode", text)[0]  # what follows is torchrun's
        sentences = re.findall(r"^error.*: the checkpoint .* could not be written: .*", own, re.M)
        if not sentences or "Traceback" in own:
            wrong.append("not one sentence")
    return wrong


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """A nested structure as one dict, tensors as their kind and bytes."""
    import torch

    if isinstance(value, torch.Tensor):
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {name: (value.dtype, value.shape, data)}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found: dict[str, Any] = {}
        for key, item in items:
            found |= leaves(item, f"{name}/{key}")
        return found or {name: type(value)}
    return {name: value}


def read(file: Path) -> Any:
    """The content of one of a checkpoint's files."""
    import torch
    from safetensors.torch import load_file

    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, weights_only=True) if file.suffix == ".pt" else file.read_text()


def rows(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The log's rows of numbers by group and step, without what a clock says."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        (line["group"], line["step"]): {k: v for k, v in line.items() if k not in CLOCK}
        for line in lines
        if line["group"] in ("train", "validation")
    }


def compare(whole: Path, again: Path) -> tuple[list[str], list[str]]:
    """What differs between two runs' last checkpoints and logs, and which rows one run lacks."""
    last = f"checkpoints/step-{STEPS:09d}"
    differs = []
    files = [
        {str(path.relative_to(run / last)) for path in (run / last).rglob("*") if path.is_file()}
        for run in (whole, again)
    ]
    differs += [f"only one has {name}" for name in sorted(files[0] ^ files[1])]
    for name in sorted(files[0] & files[1]):
        a, b = (leaves(read(run / last / name)) for run in (whole, again))
        unequal = [key for key in a.keys() | b.keys() if key not in a or a[key] != b.get(key)]
        if unequal:
            differs.append(f"{name} ({len(unequal)} of {len(a)} differ)")
    before, after = rows(whole), rows(again)
    differs += [
        f"{group} row {step}"
        for group, step in sorted(before.keys() & after.keys())
        if before[group, step] != after[group, step]
    ]
    return differs, [f"{group} row {step}" for group, step in sorted(before.keys() ^ after.keys())]


def cell(name: str, setting: Setting, folder: Path, photos: Path, reference: Path) -> str:
    """Stops a run, starts it again, and tells how it compares."""
    config, point = write_config(folder, setting, photos), POINTS[name]
    stopped = start(config, setting.processes, name)
    if stopped is None:
        return "hangs before the restart"
    wrong = proof(point, *stopped, folder / "run/checkpoints")
    finished = start(config, setting.processes)
    if finished is None:
        return "; ".join([*wrong, "hangs after the restart"])
    if finished[0] != {0}:
        return "; ".join([*wrong, f"the restart ends with {sorted(finished[0])}"])
    differs, lacks = compare(reference, folder / "run")
    if wrong or differs:
        return "; ".join([*wrong, *differs])
    return "bit-equal" + (f" (without {', '.join(lacks)})" if lacks else "")


def measure(points: list[str], settings: list[Setting], work: Path) -> dict[tuple, str]:
    """Fills the table; tells each cell as it comes."""
    from PIL import Image
    from skimage import data

    photos, cells = work / "photos", {}
    photos.mkdir()
    for name in PHOTOGRAPHS:
        picture = Image.fromarray(getattr(data, name)())
        picture.thumbnail((144, 144), Image.Resampling.LANCZOS)
        picture.save(photos / f"{name}.png")
    for column, setting in enumerate(settings):
        reference = work / str(column) / "reference"
        whole = start(write_config(reference, setting, photos), setting.processes)
        if whole is None or whole[0] != {0}:
            sys.exit(f"the run that nobody stops fails: {whole[1] if whole else 'it hangs'}")
        for name in points:
            began, folder = time.monotonic(), work / str(column) / name
            text = cell(name, setting, folder, photos, reference / "run")
            cells[name, setting] = text
            print(f"{name}, {setting}: {text} ({time.monotonic() - began:.0f} s)", file=sys.stderr)
            if not text.startswith("bit-equal"):
                for file in sorted(folder.glob("*.txt")):
                    print(f"--- {file.name}\n{file.read_text()[-3000:]}", file=sys.stderr)
            shutil.rmtree(folder)
    return cells


def table(points: list[str], settings: list[Setting], cells: dict[tuple, str]) -> str:
    """The markdown that goes to the file."""
    lines = ["| stopped | " + " | ".join(map(str, settings)) + " |"]
    lines.append("|-" * (1 + len(settings)) + "|")
    for name in points:
        row = [cells[name, setting].replace("|", "\\|") for setting in settings]
        lines.append(f"| {POINTS[name].title} | " + " | ".join(row) + " |")
    packages = ("torch", "accelerate", "diffusers", "safetensors", "torchdata")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    command = shlex.join(["python", "benchmarks/restart_matrix.py", *sys.argv[1:]])
    lines += [
        "\nColumns: processes / accumulation / loader workers. "
        f"{time.strftime('%Y-%m-%d')}, CPU {platform.machine()}, "
        f"Python {platform.python_version()}, {versions}; `{command}`"
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the options and measures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--out", type=Path, help="a markdown file for the table")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child)
    settings = [
        Setting(*values)
        for values in product(options.processes, options.accumulation, options.workers)
    ]
    with tempfile.TemporaryDirectory() as work:
        cells = measure(options.points, settings, Path(work))
    text = table(options.points, settings, cells)
    print(text, end="")
    if options.out:
        options.out.write_text(text)
    sys.exit(any(not cell.startswith("bit-equal") for cell in cells.values()))


if __name__ == "__main__":
    main()
