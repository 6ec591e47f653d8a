"""What the autoencoder keeps for the backward pass, layer by layer: stock layers and ours.

    python benchmarks/training_memory.py --resolution 256 --batch 1 --precision bf16

The network's forward pass runs on tensors without storage (torch's FakeTensorMode): nothing is
computed, and what autograd would save is added up, once for each storage, weights left out. A
storage counts for the layer in which it is saved first. `checkpointing` is
`enable_gradient_checkpointing` of ours: between its blocks, and in the largest of them when its
turn comes in the backward pass.
"""

import argparse
from contextlib import contextmanager

import torch
from contestants import source
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from measuring import last_lines, record, write_json
from torch._subclasses.fake_tensor import FakeTensorMode

from latent_ae.acceleration import accelerate_autoencoder

LAYERS = (ResnetBlock2D, Attention, Downsample2D, Upsample2D)
OUTER = "outer layers"


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--network", choices=["tiny", "kl_f8"], default="kl_f8", help="that of configs/")
    add("--resolution", type=int, default=256)
    add("--batch", type=int, default=1)
    add("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    add("--layers", action="store_true", help="a table of all layers too")
    add("--json", help="a file for the numbers")
    return parser.parse_args()


class Saved:
    """What autograd saves, by the layer that runs."""

    def __init__(self, network):
        self.bytes = {name: 0 for name, m in network.named_modules() if isinstance(m, LAYERS)}
        self.bytes[OUTER] = 0
        self.running = OUTER
        self.seen = {p.untyped_storage()._cdata for p in network.parameters()}
        self.alive = []
        for name, module in network.named_modules():
            if isinstance(module, LAYERS):
                module.register_forward_pre_hook(lambda *_, name=name: self.enter(name))
                module.register_forward_hook(lambda *_: self.enter(OUTER))

    def enter(self, name):
        """From here on this layer saves."""
        self.running = name

    def pack(self, tensor):
        """Counts a tensor that is saved."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(storage)  # or its address would be given away again
            self.bytes[self.running] += storage.nbytes()
        return tensor

    @property
    def total(self):
        """Bytes of all layers."""
        return sum(self.bytes.values())


@contextmanager
def precision(name):
    """Autocast, as the trainer has it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
        yield


def count(network, images, name):
    """What a forward pass of encoder and decoder saves."""
    saved = Saved(network)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
    with hooks, precision(name):
        network.decode(network.encode(images).latent_dist.mean)
    return saved


def checkpointed(network, images, name, whole):
    """What stays between the blocks, and the largest block's own on top of it."""
    network.enable_gradient_checkpointing()
    between = count(network, images, name).total
    blocks = {}
    for layer, size in whole.bytes.items():
        parts = layer.split(".")[: 3 if "_blocks" in layer else 2]
        blocks.setdefault(".".join(parts), []).append(size)
    blocks.pop(OUTER)
    return between + max(map(sum, blocks.values()))


def measure(args, name):
    """Bytes by row, and by layer of stock and ours."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        stock = network_of(args)
        ours = accelerate_autoencoder(network_of(args), channels_last=False)
        images = torch.empty(args.batch, 3, args.resolution, args.resolution)
        theirs = count(stock, images, name)
        mine = count(ours, images, name)
        again = accelerate_autoencoder(network_of(args), channels_last=False)
        least = checkpointed(again, images, name, mine)
    totals = {"stock": theirs.total, "ours": mine.total, "ours, checkpointing": least}
    return totals, {layer: (size, mine.bytes[layer]) for layer, size in theirs.bytes.items()}


def network_of(args):
    """The network in training, without storage."""
    return source(args.network).requires_grad_(True).train()


def show(args, found):
    """Prints the tables."""
    print(
        f"| {args.network}, {args.resolution}², batch {args.batch} | GB kept | to stock |\n|-|-|-|"
    )
    for name, (totals, _) in found.items():
        for row, size in totals.items():
            print(f"| {row}, {name} | {size / 1e9:.3f} | {size / totals['stock']:.2f} |")
    if args.layers:
        for name, (_, layers) in found.items():
            print(f"\n| layer, {name} | stock, MB | ours, MB |\n|-|-|-|")
            for layer, (theirs, mine) in layers.items():
                print(f"| {layer} | {theirs / 1e6:.1f} | {mine / 1e6:.1f} |")


def main():
    args = arguments()
    found = {name: measure(args, name) for name in args.precision}
    show(args, found)
    run = record(torch.device("cpu"))
    print(last_lines(run))
    rows = {name: {"totals": t, "layers": layers} for name, (t, layers) in found.items()}
    write_json(args.json, {"rows": rows, "run": run})


if __name__ == "__main__":
    main()
