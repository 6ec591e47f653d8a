"""Encoding and decoding beside stock diffusers: how much faster, in what memory, how far off?

    python benchmarks/inference.py --device cpu --resolution 256 --precision fp32 bf16
    python benchmarks/inference.py --device cuda --resolution 1024 --batch 4 --precision bf16 \
        --compile --json inference.json

The same `AutoencoderKL` with the same weights: as diffusers builds it (`stock`: contiguous), with
channels_last weights, and through `latent_ae.acceleration`, in each precision asked for. Ratios are
to `stock` in fp32, in the same process and run: every round times each row once, in turns, after
one call that is not timed with them: its seconds are a column, which a start is made of. Weights
are random with a fixed seed, unless --model names a folder.

`error` is the largest difference from what `stock` gives in fp32 (without TF32 on a GPU): of the
posterior's moments where pictures are encoded, of pixel values in [-1, 1] where latents are decoded
(the same latents in every row). `error_to_deviation` is the same over the standard deviation of
what `stock` gives: random weights make small numbers.

Memory is that of one call, in a process of its own for each row, which has encoded and decoded a
picture of 64² before; at the full size where something was compiled. On a GPU: the peak of torch's
allocator above the weights. On a CPU: how far the process grows (Linux; elsewhere give
--no-memory).

The file of --json holds `rows`, and as `encode` and `decode` the fastest row of ours.
"""

import argparse
import json
import math
import statistics
from functools import partial

import torch
from contestants import KINDS, OURS, STOCK, build, decode, encode, photograph_batch, source
from measuring import (
    cell,
    last_lines,
    output_of_child,
    peak_memory,
    ratio,
    record,
    seconds_in_turns,
    seconds_of,
    write_json,
)

from latent_ae.autoencoder import full_precision

WORK = {"encode": encode, "decode": decode}
SMALL = 64  # pixels: a side that every network here divides


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--resolution", type=int, default=256, help="side of the pictures")
    add("--batch", type=int, default=1)
    add("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    add("--rounds", type=int, default=5)
    add("--compile", action="store_true", help="a row of ours with torch.compile too")
    add("--memory", type=int, help="ours: bytes beyond which it works strip by strip")
    add("--network", choices=["kl_f8", "tiny"], default="kl_f8", help="that of configs/")
    add("--model", help="a folder of diffusers' instead, with its weights")
    add("--threads", type=int, help="of torch on the CPU")
    add("--no-memory", action="store_true", help="leave out those columns")
    add("--json", help="write the figures there too")
    add("--only", help="of a child: the row to measure, as KIND/PRECISION")
    return parser.parse_args()


def rows_of(args):
    """Every row as (kind, precision); the one that the others are compared with is the first."""
    kinds = [kind for kind in KINDS if args.compile or kind != "ours, compiled"]
    precisions = dict.fromkeys(["fp32", *args.precision])
    asked = [(kind, precision) for precision in precisions for kind in kinds]
    return [row for row in asked if row == (STOCK, "fp32") or row[1] in args.precision]


def options_of(args):
    """What `accelerate_autoencoder` is told."""
    return {} if args.memory is None else {"memory": args.memory}


def differences(found, exact):
    """The largest, and the same over the standard deviation of the exact values.

    Infinite where anything is no number.
    """
    largest = (found.float() - exact).abs().max().item()
    largest = largest if math.isfinite(largest) else math.inf
    return {"error": largest, "error_to_deviation": largest / exact.std().item()}


def measure(args, part, networks, values, exact, device):
    """A dict for each row of one part, without memory.

    Args:
        args: the command line.
        part: of `WORK`.
        networks: by row.
        values: what goes in, fp32.
        exact: what the stock network makes of it.
        device: a torch.device.
    """
    works = {row: partial(WORK[part], network, values) for row, network in networks.items()}
    first = {row: seconds_of(work, device) for row, work in works.items()}
    errors = {row: differences(work(), exact) for row, work in works.items()}
    seconds = seconds_in_turns(works, args.rounds, device)
    base = (STOCK, "fp32")
    return [
        {
            "part": part,
            "row": row[0],
            "precision": row[1],
            "seconds": statistics.median(seconds[row]),
            "speedup": ratio(seconds, base, row),
            **errors[row],
            "first_call": first[row],
        }
        for row in works
    ]


def add_memory(args, measured):
    """Adds the bytes of every row and their ratio to the stock network's in fp32."""
    names = dict.fromkeys(f"{row['row']}/{row['precision']}" for row in measured)
    peaks = {name: dict.fromkeys(WORK) for name in names}
    if not args.no_memory:
        peaks = {name: json.loads(output_of_child(__file__, "--only", name)) for name in names}
    for row in measured:
        part = row["part"]
        peak, base = peaks[f"{row['row']}/{row['precision']}"][part], peaks[f"{STOCK}/fp32"][part]
        row["peak_memory"] = peak
        row["peak_memory_ratio"] = peak / base if base else None


def peaks_of(args, device):
    """Bytes of one call of each part in one row."""
    kind, precision = args.only.split("/")
    stock = source(args.network, args.model)
    network = build(stock, kind, precision, device, **options_of(args))
    del stock
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    images = photograph_batch(args.batch, args.resolution).to(device)
    warm = images if kind == "ours, compiled" else photograph_batch(1, SMALL).to(device)
    decode(network, encode(network, warm).chunk(2, 1)[0])  # libraries are loaded, code is compiled
    factor = 2 ** (len(network.config.block_out_channels) - 1)
    side = args.resolution // factor
    latents = torch.randn(args.batch, network.config.latent_channels, side, side, device=device)
    values = {"encode": images, "decode": latents}
    return {
        part: peak_memory(partial(work, network, values[part]), device, before)
        for part, work in WORK.items()
    }


def show(measured):
    """Prints the table."""
    titles = ("", "precision", "seconds", "faster", "error", "error / deviation")
    titles += ("first call (s)", "peak (bytes)", "to stock fp32")
    keys = ("seconds", "speedup", "error", "error_to_deviation", "first_call")
    keys += ("peak_memory", "peak_memory_ratio")
    forms = (".3g", ".2f", ".1e", ".1e", ".2f", ",", ".2f")
    print("| " + " | ".join(titles) + " |\n" + "|-" * len(titles) + "|")
    for row in measured:
        cells = [f"{row['part']}, {row['row']}", row["precision"]]
        cells += [cell(row[key], form) for key, form in zip(keys, forms, strict=True)]
        print("| " + " | ".join(cells) + " |")


def main():
    args = arguments()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.only:
        print(json.dumps(peaks_of(args, device)))
        return
    stock = source(args.network, args.model)
    images = photograph_batch(args.batch, args.resolution).to(device)
    networks = {row: build(stock, *row, device, **options_of(args)) for row in rows_of(args)}
    base = networks[STOCK, "fp32"]
    with full_precision():
        moments = encode(base, images)
        latents = moments.chunk(2, 1)[0].contiguous()
        exact = {"encode": moments, "decode": decode(base, latents)}
    values = {"encode": images, "decode": latents}
    measured = []
    for part in WORK:
        measured += measure(args, part, networks, values[part], exact[part], device)
    del networks, base  # the children need the room
    torch.cuda.empty_cache()
    add_memory(args, measured)
    show(measured)
    run = record(device)
    print(last_lines(run))
    ours = [row for row in measured if row["row"] in OURS]
    best = {p: max((r for r in ours if r["part"] == p), key=lambda r: r["speedup"]) for p in WORK}
    write_json(args.json, run | best | {"rows": measured})


if __name__ == "__main__":
    main()
