"""What the benchmarks share: times, memory, ratios over rounds, and what they ran on."""

import gc
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = [
    "cell",
    "last_lines",
    "machine",
    "output_of_child",
    "peak_memory",
    "ratio",
    "record",
    "resident",
    "seconds_of",
    "seconds_in_turns",
    "write_json",
]

# glibc gives freed blocks back at once: gaps in its heap would count as the step's otherwise.
_TIDY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "9999", "MALLOC_TRIM_THRESHOLD_": "0"}


def seconds_of(work, device):
    """Seconds of one call, with the device idle before and after."""
    _wait_for(device)
    began = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - began


def seconds_in_turns(works, rounds, device):
    """Seconds of every round by name: in a round each is called once, one after the other."""
    turns = [
        {name: seconds_of(work, device) for name, work in works.items()} for _ in range(rounds)
    ]
    return {name: [turn[name] for turn in turns] for name in works}


def ratio(values, name, other):
    """The median over rounds of one row's value to another's; None without either row.

    A load that slows a whole round cancels.
    """
    if name not in values or other not in values:
        return None
    pairs = zip(values[name], values[other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def cell(value, form=".2f"):
    """A number as a cell of a table; a dash for None."""
    return "–" if value is None else f"{value:{form}}"


def resident(field):
    """Bytes of this process: `VmRSS` now, `VmHWM` at most (Linux)."""
    # Not getrusage's: a child's ru_maxrss begins with its parent's.
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def peak_memory(work, device, before=None):
    """Bytes at the peak of a call.

    On CUDA of torch's allocator, above `before`, or in all. On a CPU, where torch keeps no count:
    how far the process grows from here.

    Args:
        work: what is called.
        device: a torch.device.
        before: bytes of torch's allocator that do not count; 0 when left out.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - (before or 0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of building is forgotten
    began = resident("VmRSS")
    work()
    return resident("VmHWM") - began


def output_of_child(script, *more):
    """The last line that the script prints in a fresh process, called as this one and with more.

    Nothing else has left its traces there, and its allocator keeps nothing.
    """
    command = [sys.executable, script, *sys.argv[1:], *more]
    return subprocess.check_output(command, env=os.environ | _TIDY, text=True).splitlines()[-1]


def machine(device):
    """The processor's name, and how much of it is used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    return (
        f"{found[1] if found else platform.processor()}, torch threads: {torch.get_num_threads()}"
    )


def record(device, packages=("torch", "diffusers")):
    """Date, machine, versions and command of this run."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(device),
        "versions": {name: version(name) for name in packages},
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}",
    }


def last_lines(run):
    """The same as the lines that end a benchmark's output."""
    packages = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return f"\n{run['date']}, {run['machine']}, {packages}\n`{run['command']}`"


def write_json(file, content):
    """Writes what was measured; does nothing without a file's name."""
    if file is not None:
        Path(file).write_text(json.dumps(content, indent=1) + "\n")


def _wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
