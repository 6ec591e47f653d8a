"""Pictures of any size within a given memory: is it the same picture, in how much time and memory?

    python benchmarks/bounded_memory.py --resolution 768 --memory 1
    python benchmarks/bounded_memory.py --resolution 4096 --memory 8 --rows strips

The network of configs/kl_f8.yaml with random weights decodes latents (or, with `--encode`, encodes
a picture) of one square picture in fp32. `whole` is stock diffusers in one pass, `tiling` its own
`enable_tiling`, `accelerated` ours in one pass, `strips` ours within `--memory` GB. Each row runs
in a process of its own, one after the other. Error: the largest |difference| from `whole`, over the
standard deviation of its result; its rows beside a seam of the tiling are among it.

Memory of a row on a CPU is the largest resident size of its process (Linux), weights, libraries and
result included; what `strips` gets for activations is `--memory` less the `--apart` GB that these
take. Pages of its files that the system caches belong to no process, and go when memory is wanted.
On a GPU it is the peak of torch's allocator.

`--count` prints, without running anything, what `strips` would hold and move at a size.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from contestants import source
from measuring import last_lines, record, resident, seconds_of, write_json

from latent_ae import load_config
from latent_ae.acceleration import accelerate_autoencoder
from latent_ae.acceleration.counting import strip_memory
from latent_ae.autoencoder import build_network, downsampling

ROOT = Path(__file__).parents[1]
ROWS = ("whole", "tiling", "accelerated", "strips")


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--resolution", type=int, default=512)
    add("--memory", type=float, default=8, help="GB that `strips` may take in all")
    add("--apart", type=float, default=1.5, help="GB of it for weights, libraries and the result")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    add("--encode", action="store_true", help="encode instead of decode")
    add("--network", choices=["tiny", "kl_f8"], default="kl_f8", help="that of configs/")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--spill", help="folder for activations that a CPU has no memory for")
    add("--count", action="store_true", help="count alone")
    add("--json", help="a file for the numbers")
    add("--child", nargs=2, help=argparse.SUPPRESS)  # a row, and where its result goes
    return parser.parse_args()


def activations(args):
    """Bytes that `strips` is given for activations."""
    return max(args.memory - args.apart, 0.01) * 1e9


def run_row(args, row, target):
    """One row in this process: writes its result, prints its seconds and bytes."""
    network = source(args.network).to(args.device)
    if row == "tiling":
        network.enable_tiling()
    elif row == "accelerated":
        accelerate_autoencoder(network)
    elif row == "strips":
        accelerate_autoencoder(network, memory=activations(args), spill=args.spill)
    side = args.resolution
    channels = network.config["in_channels" if args.encode else "latent_channels"]
    side = side if args.encode else side // downsampling(network)
    x = torch.randn(1, channels, side, side).to(args.device)
    results = []

    def work():
        with torch.no_grad():
            found = network.encode(x).latent_dist.mean if args.encode else network.decode(x).sample
        results.append(found)

    seconds = seconds_of(work, torch.device(args.device))
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else resident("VmHWM")
    torch.save(results[0].cpu(), target)
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def measure(args, folder):
    """Every row in turn; returns its numbers."""
    found, exact = {}, None
    for row in args.rows:
        target = Path(folder) / f"{row}.pt"
        command = [sys.executable, __file__, *sys.argv[1:], "--child", row, str(target)]
        output = subprocess.check_output(command, text=True)
        found[row] = json.loads(output.splitlines()[-1])
        result = torch.load(target, weights_only=True)
        if not result.isfinite().all():
            raise SystemExit(f"{row} gives numbers that are not finite")
        if row == "whole":
            exact = result
        elif exact is not None:
            found[row]["error"] = ((result - exact).abs().max() / exact.std()).item()
    return found


def show(args, found):
    """Prints the table."""
    first = found[args.rows[0]]
    print(f"| {args.resolution}² | seconds | to {args.rows[0]} | peak, GB | to it | error |")
    print("|-|-|-|-|-|-|")
    for row, numbers in found.items():
        seconds, peak = numbers["seconds"], numbers["peak_bytes"]
        error = f"{numbers['error']:.1e}" if "error" in numbers else "–"
        print(
            f"| {row} | {seconds:.1f} | {seconds / first['seconds']:.2f} | {peak / 1e9:.2f} "
            f"| {peak / first['peak_bytes']:.2f} | {error} |"
        )


def count(args):
    """What strips hold and move, from shapes alone."""
    with torch.device("meta"):
        network = build_network(load_config(ROOT / f"configs/{args.network}.yaml").network)
    coder = network.encoder if args.encode else network.decoder
    side = args.resolution if args.encode else args.resolution // downsampling(network)
    found = asdict(strip_memory(coder, side, side))
    found["in files"] = max(0, found["activations"] - 0.8 * activations(args))
    print(f"| {args.resolution}² within {args.memory:g} GB | GB |\n|-|-|")
    for name, size in found.items():
        print(f"| {name} | {size / 1e9:.2f} |")
    return found


def main():
    args = arguments()
    if args.child:
        run_row(args, *args.child)
        return
    if args.count:
        found = count(args)
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(args, folder)
        show(args, found)
    run = record(torch.device(args.device))
    print(last_lines(run))
    write_json(args.json, {"rows": found, "run": run})


if __name__ == "__main__":
    main()
