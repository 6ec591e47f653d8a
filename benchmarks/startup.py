"""How long a command needs before it does what it was asked for.

    python benchmarks/startup.py [--rounds 5] [--other CHECKOUT] [--json startup.json]

Seconds and processor seconds (of all threads) of fresh processes, up to what a person waits for:

- `latent-ae --help`: its end;
- `latent-ae train configs/tiny.yaml`: the first row of the run's log.jsonl, one step;
- `latent-ae encode`: the first shard, of four photographs, with a tiny network.

The last two are killed there. --other does the same with the package of another checkout and that
checkout's config; both take turns, and ratios are medians over the rounds. A first round does not
count without --cold: Python writes its bytecode there, and `datasets` reads the photographs' folder
into its cache, which lies in a temporary folder as everything here does. Nothing is fetched. Needs
a POSIX system.
"""

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Before `datasets` and the hub's client are imported, here and in the children.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="latent-ae-startup-")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from contestants import PHOTOGRAPHS, source
from measuring import cell, last_lines, ratio, record, write_json
from PIL import Image
from skimage import data as photographs

ROOT = Path(__file__).parents[1]
SCRATCH = Path(os.environ["HF_HOME"])
POLL = 0.005  # seconds
LONGEST = 600  # seconds that a command may take


def help_command(checkout, out):
    """Prints what there is."""
    return ["--help"], None


def train_command(checkout, out):
    """One step of a run, which is told at once."""
    settings = {
        "data.path": SCRATCH / "photographs",
        "data.workers": 0,  # a worker's processor seconds would not count
        "network.init": "default",  # the linear fit is work, not waiting
        "validation": "null",
        "training.log_every": 1,
        "output": out,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    log = out / "log.jsonl"
    return (
        ["train", str(checkout / "configs/tiny.yaml"), *overrides],
        lambda: log.exists() and '"group": "train"' in log.read_text(),
    )


def encode_command(checkout, out):
    """The latents of the photographs."""
    command = ["encode", str(SCRATCH / "network"), str(SCRATCH / "photographs"), str(out)]
    return [*command, "--resolution", "64", "--workers", "0"], lambda: any(
        out.rglob("*.safetensors")
    )


COMMANDS = {
    "latent-ae --help": help_command,
    "latent-ae train, first step": train_command,
    "latent-ae encode, first shard": encode_command,
}


def environment(checkout):
    """That of a child, which imports the package of this checkout."""
    # Where Python may write no bytecode, every start would compile the package anew.
    kept = {key: v for key, v in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPATH": str(checkout)}


def start(build, checkout):
    """Seconds and processor seconds of one process, until its answer is there.

    Args:
        build: of `COMMANDS`.
        checkout: a folder that holds `latent_ae` and `configs`.

    Raises:
        SystemExit: it has ended without an answer, or took longer than `LONGEST` seconds.
    """
    folder = Path(tempfile.mkdtemp(dir=SCRATCH))
    words, answered = build(checkout, folder / "out")
    errors = (folder / "errors.txt").open("w+")
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "latent_ae", *words],
        env=environment(checkout),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=errors,
    )
    ended, status, used = os.wait4(child.pid, os.WNOHANG)
    while not ended and not (answered and answered()):
        if time.perf_counter() - began > LONGEST:
            child.kill()
        time.sleep(POLL)
        ended, status, used = os.wait4(child.pid, os.WNOHANG)
    seconds = time.perf_counter() - began
    if not ended:
        os.kill(child.pid, signal.SIGKILL)
        _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)  # `Popen` has not seen it end
    found = child.returncode == 0 if answered is None else answered()
    with errors:
        errors.seek(0)
        if not found:
            raise SystemExit(f"latent_ae {' '.join(words)} gave no answer:\n{errors.read()}")
    shutil.rmtree(folder)
    return {"wall": seconds, "processor": used.ru_utime + used.ru_stime}


def measure(checkouts, rounds, cold):
    """The dicts of `start` of every round, by command and checkout; the first only if `cold`."""
    taken = {(command, name): [] for command in COMMANDS for name in checkouts}
    for number in range(rounds + (not cold)):
        for command, build in COMMANDS.items():
            for name, checkout in checkouts.items():
                one = start(build, checkout)
                if number or cold:
                    taken[command, name].append(one)
    return taken


def figures(taken):
    """A dict for each command and checkout: medians, and the ratios of `this` to `other`."""
    rows = []
    for (command, name), times in taken.items():
        row = {"command": command, "checkout": name}
        for kind in ("wall", "processor"):
            values = {key: [one[kind] for one in v] for key, v in taken.items()}
            row[kind] = statistics.median(one[kind] for one in times)
            row[f"{kind}_to_other"] = ratio(values, (command, name), (command, "other"))
        rows.append(row)
    return rows


def show(rows):
    """Prints the table."""
    print("| | checkout | seconds | to other | processor seconds | to other |\n|-|-|-|-|-|-|")
    for row in rows:
        cells = [row["command"], row["checkout"]]
        for kind in ("wall", "processor"):
            cells += [f"{row[kind]:.2f}", cell(row[f"{kind}_to_other"])]
        print("| " + " | ".join(cells) + " |")


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="after one that does not count")
    add("--cold", action="store_true", help="count the first round too")
    add("--other", type=Path, help="another checkout, measured in turns")
    add("--json", help="write the figures there too")
    return parser.parse_args()


def main():
    args = arguments()
    checkouts = {"this": ROOT.resolve()}
    if args.other is not None:
        if not (args.other / "latent_ae").is_dir():
            raise SystemExit(f"{args.other} holds no package latent_ae")
        checkouts["other"] = args.other.resolve()
    (folder := SCRATCH / "photographs").mkdir()
    for name in PHOTOGRAPHS:
        Image.fromarray(getattr(photographs, name)()).save(folder / f"{name}.png")
    source("tiny").save_pretrained(SCRATCH / "network")
    rows = figures(measure(checkouts, args.rounds, args.cold))
    show(rows)
    run = record(torch.device("cpu"))
    print(last_lines(run))
    write_json(args.json, run | {"rows": rows})


if __name__ == "__main__":
    try:
        main()
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
