"""How far from what the machine can do: an autoencoder's least time beside the time it takes.

    python benchmarks/roofline.py [--network kl_f8] [--device cpu] [--measure 256] [--rounds 5]

The first table counts, for one picture, on tensors without data: the operations of every layer (two
a multiply-add, as the network defines it: convolutions, linear layers, the products of attention;
by torch's FlopCounterMode), and the fewest bytes that move if layers run one after the other. A
layer is a convolution, or an attention with its four linear layers, with the normalisation and
activation before it, the upsampling or padding before it and the addition after it in one pass: it
reads its input once and its weights once, and writes its output once. The second input of an
addition and the scores of attention do not count.

The floor is the sum over layers of the larger of operations / matrix rate and bytes / bandwidth.
Both are measured here: the best of several large `torch.matmul` and 1 × 1 convolutions, which a CPU
may give to different libraries, and of several large copies (read and written bytes). On CUDA, fp32
multiplies in TF32 where convolutions do. It is a floor for direct convolutions of layers one by
one, and no law: Winograd's algorithm, an upsampling that is folded
into the convolution after it, and several layers in one pass, piece by piece, go below.

The second table has the times of `stock` (fp32, contiguous, and the other precision that the device
computes in) and `ours` at the sides of --measure, over the floor of their precision, and the share
of the matrix rate that they reach (operations of the first table / seconds / rate).
"""

import argparse
import statistics
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from contestants import STOCK, build, decode, encode, photograph_batch, source
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from measuring import last_lines, ratio, record, seconds_in_turns, seconds_of, write_json
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latent_ae.frozen import PRECISIONS, fast_precision

SIDES = (256, 512, 1024, 2048)
LAYERS = (nn.Conv2d, Attention, Downsample2D, Upsample2D)
WORK = {"encoder": encode, "decoder": decode}


@dataclass(frozen=True)
class Layer:
    """What a layer does to one batch; `elements` is read, weights included, and written."""

    name: str
    operations: int
    elements: int

    def floor(self, rate, bandwidth, size):
        """The least seconds.

        Args:
            rate: operations a second.
            bandwidth: bytes a second.
            size: bytes of an element.
        """
        return max(self.operations / rate, self.elements * size / bandwidth)


def layers_of(module, *shape):
    """The `Layer`s of a module in the order in which they run.

    Args:
        module: any with convolutions and diffusers' blocks, on the meta device, in eval mode.
        shape: of its input.
    """
    outer = {name: part for name, part in module.named_modules() if isinstance(part, LAYERS)}
    # A block's own convolution is no second layer.
    outer = {
        name: part
        for name, part in outer.items()
        if not any(name.startswith(f"{other}.") for other in outer)
    }
    found = []

    def note(name, part, given, made):
        weights = sum(p.numel() for p in part.parameters())
        found.append((name, given[0].numel() + weights + made.numel()))

    hooks = [part.register_forward_hook(partial(note, name)) for name, part in outer.items()]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.empty(*shape, device="meta"))
    for hook in hooks:
        hook.remove()
    counts, root = counter.get_flop_counts(), type(module).__name__
    return [Layer(n, sum(counts.get(f"{root}.{n}", {}).values()), size) for n, size in found]


class Half(nn.Module):
    """The encoder or the decoder with the 1 × 1 convolution between it and the latents."""

    def __init__(self, network, part):
        super().__init__()
        halves = {
            "encoder": (network.encoder, network.quant_conv),
            "decoder": (network.post_quant_conv, network.decoder),
        }
        self.steps = nn.Sequential(*(step for step in halves[part] if step is not None))

    def forward(self, values):
        """Moments of pictures, or pictures of latents."""
        return self.steps(values)


def layers_at(network, side):
    """The layers of both halves of a network on the meta device, for one picture of this side."""
    factor = 2 ** (len(network.config.block_out_channels) - 1)
    latents = (1, network.config.latent_channels, side // factor, side // factor)
    return {
        "encoder": layers_of(Half(network, "encoder"), 1, network.config.in_channels, side, side),
        "decoder": layers_of(Half(network, "decoder"), *latents),
    }


def floor(layers, rate, bandwidth, size):
    """The least seconds of layers that run one after the other."""
    return sum(layer.floor(rate, bandwidth, size) for layer in layers)


def matrix_rate(precision, device, rounds):
    """Operations a second of the best of several large matrix products, two ways."""
    best = 0.0
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        torch.set_float32_matmul_precision("high")
    for side in (1024, 2048) if device.type == "cpu" else (4096, 8192, 16384):
        a, b = torch.randn(2, side, side, device=device).to(PRECISIONS[precision])
        out = torch.empty_like(a)
        picture = torch.randn(1, side, side // 32, 32, device=device).to(a.dtype)
        picture = picture.contiguous(memory_format=torch.channels_last)
        kernel = b.view(side, side, 1, 1)
        for work in (partial(torch.matmul, a, b, out=out), partial(F.conv2d, picture, kernel)):
            work()
            seconds = min(seconds_of(work, device) for _ in range(rounds))
            best = max(best, 2 * side**3 / seconds)
    torch.set_float32_matmul_precision(before)
    return best


def copy_bandwidth(device, rounds):
    """Bytes a second, read and written, of the best of several large copies."""
    size = (1 if device.type == "cpu" else 8) << 28  # far more than caches hold
    taken = torch.zeros(size, dtype=torch.uint8, device=device)
    given = taken.clone()  # its pages are there before they are timed
    return 2 * size / min(seconds_of(lambda: given.copy_(taken), device) for _ in range(rounds))


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--network", choices=["kl_f8", "tiny"], default="kl_f8", help="that of configs/")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--measure", type=int, nargs="*", default=[], help="sides of pictures to time")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, help="of torch on the CPU")
    add("--json", help="write the figures there too")
    return parser.parse_args()


def count(network, rates, bandwidth):
    """A dict for each side and half of a network on the meta device, with the floor's seconds."""
    rows = []
    for side in SIDES:
        for part, layers in layers_at(network, side).items():
            row = {"side": side, "part": part, "operations": sum(x.operations for x in layers)}
            for precision, rate in rates.items():
                size = PRECISIONS[precision].itemsize
                row[f"bytes_{precision}"] = size * sum(x.elements for x in layers)
                row[f"floor_{precision}"] = floor(layers, rate, bandwidth, size)
            rows.append(row)
    return rows


def measure(args, network, side, rates, bandwidth, device):
    """A dict for each row and half of one side: seconds, and how they compare with the floor."""
    kinds = [(kind, precision) for precision in rates for kind in (STOCK, "ours")]
    networks = {row: build(network, *row, device) for row in kinds}
    layers = layers_at(deepcopy(network).to("meta"), side)
    images = photograph_batch(1, side).to(device)
    latents = encode(networks[STOCK, "fp32"], images).chunk(2, 1)[0].contiguous()
    measured = []
    for part, values in (("encoder", images), ("decoder", latents)):
        works = {row: partial(WORK[part], one, values) for row, one in networks.items()}
        seconds_in_turns(works, 1, device)  # for nothing: allocators settle
        seconds = seconds_in_turns(works, args.rounds, device)
        operations = sum(layer.operations for layer in layers[part])
        for (kind, precision), times in seconds.items():
            taken, rate = statistics.median(times), rates[precision]
            least = floor(layers[part], rate, bandwidth, PRECISIONS[precision].itemsize)
            row = {"side": side, "part": part, "row": kind, "precision": precision}
            row |= {"seconds": taken, "floor": least, "to_floor": taken / least}
            row |= {"share_of_rate": operations / taken / rate}
            row |= {"speedup": ratio(seconds, (STOCK, "fp32"), (kind, precision))}
            measured.append(row)
    return measured


def show(counted, measured, rates):
    """Prints both tables."""
    titles = ["", "operations (1e9)"]
    for precision in rates:
        titles += [f"{precision}: bytes (1e6)", "floor (s)"]
    print("| " + " | ".join(titles) + " |\n" + "|-" * len(titles) + "|")
    for row in counted:
        cells = [f"{row['part']}, {row['side']}²", f"{row['operations'] / 1e9:,.1f}"]
        for precision in rates:
            cells += [f"{row[f'bytes_{precision}'] / 1e6:,.1f}", f"{row[f'floor_{precision}']:.3g}"]
        print("| " + " | ".join(cells) + " |")
    if measured:
        print("\n| | precision | seconds | over the floor | of the matrix rate | to stock fp32 |")
        print("|-|-|-|-|-|-|")
    for row in measured:
        cells = [f"{row['part']}, {row['side']}², {row['row']}", row["precision"]]
        cells += [f"{row['seconds']:.3g}", f"{row['to_floor']:.2f}", f"{row['share_of_rate']:.0%}"]
        print("| " + " | ".join([*cells, f"{row['speedup']:.2f}"]) + " |")


def main():
    args = arguments()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    precisions = dict.fromkeys(("fp32", fast_precision(device)))
    rates = {precision: matrix_rate(precision, device, args.rounds) for precision in precisions}
    bandwidth = copy_bandwidth(device, args.rounds)
    network = source(args.network)
    counted = count(deepcopy(network).to("meta"), rates, bandwidth)
    measured = []
    for side in args.measure:
        measured += measure(args, network, side, rates, bandwidth, device)
    show(counted, measured, rates)
    found = [f"{precision} {rate / 1e9:,.0f}e9 operations/s" for precision, rate in rates.items()]
    print(f"\nMatrix rate: {', '.join(found)}; copies: {bandwidth / 1e9:,.1f}e9 bytes/s")
    run = record(device)
    print(last_lines(run))
    rest = {"matrix_rate": rates, "copy_bandwidth": bandwidth}
    write_json(args.json, run | rest | {"counted": counted, "measured": measured})


if __name__ == "__main__":
    main()
