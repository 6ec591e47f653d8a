"""One update beside the usual loop: how much faster, in how much memory, and is it the same update?

    python benchmarks/train_step.py --network tiny --resolution 64 --batch 8 --variants contiguous
    python benchmarks/train_step.py --network kl_f8 --resolution 256 --batch 8 --precision bf16 \
        --lpips vgg --lpips-path vgg16.safetensors --variants contiguous checkpointing compile fp32

`ours` is `latent_ae.training.step.update`: one forward pass of the autoencoder, one of the
discriminator over pictures and one over reconstructions, which serves both sides; fused AdamW, EMA
over all weights at once, channels_last, nothing read back from the device.

`plain` is the usual loop, as in diffusers' `train_autoencoderkl.py` and in LDM: a second forward
pass of the autoencoder for the discriminator's step (with autograd, as in the former), which judges
reconstructions anew; the adaptive weight differentiates LPIPS and the discriminator
once more, with respect to the last layer; stock `lpips`, default AdamW, EMA weight by weight,
contiguous memory, nine `.item()`. What is only wrong there is not repeated: LPIPS has gradients,
and the discriminator is frozen while the autoencoder learns. `stock` is the same without that last
mercy: as in diffusers' script, the autoencoder's step computes the discriminator's gradients too.

Both minimise L1 + LPIPS + KL + hinge PatchGAN with the adaptive weight, on the same batch; the
script stops if their first losses differ, from the same weights and noise. `--variants` adds `ours`
with one key of the config changed. Steps are timed in turn; a ratio is the median over the rounds,
so a load that slows a whole round cancels.

Memory is that of two steps in a process of its own for each row. On a GPU: the peak of torch's
allocator, weights included. On a CPU, where torch keeps no count: how far the process grows from
its first step to the peak (Linux; elsewhere give --no-memory), so without weights and EMA.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
from functools import partial
from itertools import repeat
from pathlib import Path
from unittest.mock import patch

# Before `datasets` is imported: its cache of the four photographs goes when we go.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="latent-ae-train-step-")

import torch
from diffusers.training_utils import EMAModel
from measuring import (
    cell,
    last_lines,
    output_of_child,
    peak_memory,
    ratio,
    record,
    seconds_in_turns,
    write_json,
)
from PIL import Image
from skimage import data as photographs

from latent_ae import load_config
from latent_ae.autoencoder import build_network, default_device
from latent_ae.data import TrainingStream, normalize
from latent_ae.losses import NLayerDiscriminator, load_backbone
from latent_ae.training.prepare import prepare
from latent_ae.training.step import update

ROOT = Path(__file__).parents[1]
SCRATCH = Path(os.environ["HF_HOME"])
# What a variant changes in `ours`' section `training`.
VARIANTS = {
    "contiguous": {"channels_last": False},
    "checkpointing": {"gradient_checkpointing": True},
    "compile": {"compile": True},
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "stock_layers": {"stock_layers": True},
}
COMPARED = ("l1", "lpips", "kl", "total", "adversarial", "adaptive_weight")
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}  # relative; what is left is rounding


class Ours:
    """This package's update, as `train` calls it."""

    def __init__(self, config, batch):
        self.run = prepare(config)
        self.run.stream = repeat(batch)  # decoding is not what is compared

    def step(self):
        """One update; returns its terms, still on the device."""
        return update(self.run).terms


class Plain:
    """The usual loop: a step of the autoencoder, then one of the discriminator."""

    def __init__(self, config, batch, device, freeze=True):
        self.config, self.batch, self.device, self.freeze = config, batch, device, freeze
        half = config.training.precision == "bf16"
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=half)
        self.network = build_network(config.network).to(device).train()
        self.judge = NLayerDiscriminator(config.adversary).to(device).train()
        perceptual = config.losses.perceptual
        self.lpips = load_backbone(perceptual.net, perceptual.path).to(device)
        self.optimizer = self._adam(self.network, config.training.betas)
        self.judge_optimizer = self._adam(self.judge, config.adversary.betas)
        self.ema = EMAModel(self.network.parameters(), decay=config.training.ema)

    def _adam(self, module, betas):
        rate = self.config.training.learning_rate
        return torch.optim.AdamW(module.parameters(), rate, betas, weight_decay=0)

    def load(self, run):
        """Begins with the weights of one of our runs."""
        self.network.load_state_dict(run.network.state_dict())
        self.judge.load_state_dict(run.rule.discriminator.state_dict())

    def step(self):
        """One update of both networks; returns its terms, read back."""
        images = normalize(self.batch.images.to(self.device, non_blocking=True))
        return self._learn(images) | self._learn_to_judge(images)

    def _learn(self, images):
        config, elements = self.config, images[0].numel()
        self.judge.requires_grad_(not self.freeze)
        with self.autocast():
            posterior = self.network.encode(images).latent_dist
            decoded = self.network.decode(posterior.sample()).sample
            terms = {
                "l1": (images - decoded).abs().mean(),
                "lpips": self.lpips(images, decoded).mean(),
                "kl": posterior.kl().mean() / elements,
                "adversarial": -self.judge(decoded).mean(),
            }
        seen = terms["l1"] + config.losses.perceptual.weight * terms["lpips"]
        last = self.network.decoder.conv_out.weight
        (g_rec,) = torch.autograd.grad(seen, last, retain_graph=True)
        (g_adv,) = torch.autograd.grad(terms["adversarial"], last, retain_graph=True)
        # In the units of LDM, whose losses are sums over an image; here they are means.
        adaptive = elements * g_rec.norm() / (g_adv.norm() + 1e-4)
        terms["adaptive_weight"] = adaptive.clamp(0, config.adversary.adaptive_max).detach()
        terms["total"] = seen + config.bottleneck.weight * terms["kl"]
        share = config.adversary.weight * terms["adaptive_weight"] / elements
        (terms["total"] + share * terms["adversarial"]).backward()
        self._move(self.optimizer, self.network)
        self.ema.step(self.network.parameters())
        return {name: term.item() for name, term in terms.items()}

    def _learn_to_judge(self, images):
        self.judge.requires_grad_(True)
        self.judge_optimizer.zero_grad()
        with self.autocast():
            decoded = self.network.decode(self.network.encode(images).latent_dist.sample()).sample
            real, fake = self.judge(images), self.judge(decoded.detach())
        loss = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
        loss.backward()
        self._move(self.judge_optimizer, self.judge)
        terms = {"d_loss": loss, "d_real": real.mean(), "d_fake": fake.mean()}
        return {name: term.item() for name, term in terms.items()}

    def _move(self, optimizer, module):
        torch.nn.utils.clip_grad_norm_(module.parameters(), self.config.training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--network", choices=["tiny", "kl_f8"], default="tiny", help="that of configs/")
    add("--resolution", type=int, default=64)
    add("--batch", type=int, default=8)
    add("--precision", choices=list(TOLERANCE), default="fp32")
    add("--steps", type=int, default=5, help="timed steps of each row, after two untimed")
    add("--variants", nargs="*", choices=list(VARIANTS), default=[], help="more rows of ours")
    add("--lpips", choices=["alex", "vgg"], default="alex")
    add("--lpips-path", help="safetensors of torchvision's backbone")
    add("--threads", type=int, help="of torch on the CPU")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--no-memory", action="store_true", help="leave out those columns")
    add("--json", help="write the figures there too")
    add("--only", choices=["ours", "plain", "stock", *VARIANTS], help="this row alone")
    add("--measure-memory", action="store_true", help="print the bytes of that row, time nothing")
    return parser.parse_args()


def config_of(args, name):
    """The config of a row; `plain` reads the same one as `ours`."""
    perceptual = {"net": args.lpips, "path": args.lpips_path, "weight": 1.0}
    settings = {
        "data.path": str(SCRATCH / "photographs"),
        "data.resolution": args.resolution,
        "data.resize": args.resolution,
        "data.batch_size": args.batch,
        "data.workers": 0,
        "network.init": "default",  # the start costs minutes and changes no step's time
        "bottleneck.weight": 1e-6,
        "losses": {"pixel": "l1", "perceptual": perceptual},
        "adversary": {"start": 0, "warmup_steps": 0, "weight": 0.5},
        "training.precision": args.precision,
        "training.learning_rate": 1e-4,
        "training.warmup_steps": 0,
        "training.schedule": "constant",
        "validation": None,
        "output": str(SCRATCH / name),
    }
    settings |= {f"training.{key}": value for key, value in VARIANTS.get(name, {}).items()}
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return load_config(ROOT / f"configs/{args.network}.yaml", overrides)


def photograph_batch(args):
    """Four photographs as files, and the batch that everything trains on."""
    (folder := SCRATCH / "photographs").mkdir()
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(photographs, name)()).save(folder / f"{name}.png")
    return next(TrainingStream(config_of(args, "ours").data))


def build(args, name, batch, device):
    """What makes the steps of a row."""
    config = config_of(args, name)
    if name in ("plain", "stock"):
        return Plain(config, batch, device, freeze=name == "plain")
    return Ours(config, batch)


def compare(ours, plain, precision):
    """Takes the first step of both and stops unless the losses agree: same weights, same noise."""
    plain.load(ours.run)
    draw = torch.randn

    def noise(*shape, dtype=torch.float32, **options):
        return draw(*shape, **options).to(dtype)  # bf16 has random numbers of its own

    with patch("torch.randn", noise):  # diffusers draws in the encoder's precision, we in fp32
        torch.manual_seed(0)
        mine = ours.step()
        torch.manual_seed(0)
        theirs = plain.step()
    print("First step, from the same weights and noise:\n\n| | ours | plain | apart |\n|-|-|-|-|")
    agree = True
    for name in COMPARED:
        a, b = float(mine[name]), theirs[name]
        apart = abs(a - b) / max(abs(b), 1e-12)
        agree = agree and apart <= TOLERANCE[precision]  # NaN is no agreement either
        print(f"| {name} | {a:.6g} | {b:.6g} | {apart:.1e} |")
    if not agree:
        raise SystemExit("ours and plain do not compute the same losses: nothing to compare")


def seconds(args, names, batch, device):
    """Seconds of every timed step by row, taken in turn."""
    actors = {name: build(args, name, batch, device) for name in names}
    if "ours" in actors and "plain" in actors:
        compare(actors["ours"], actors["plain"], args.precision)
    steps = {name: actor.step for name, actor in actors.items()}
    seconds_in_turns(steps, 2, device)  # for nothing: compilers and allocators settle
    return seconds_in_turns(steps, args.steps, device)


def two_steps(actor):
    """In the second, Adam's moments lie beside the activations."""
    actor.step()
    actor.step()


def figures(args, taken, peaks):
    """A dict for each row: images/s, bytes, and the ratios of both to `plain` and `ours`."""
    speeds = {name: [args.batch / one for one in times] for name, times in taken.items()}
    memory = {name: [peak] for name, peak in peaks.items()}
    return [
        {
            "row": f"ours, {name}" if name in VARIANTS else name,
            "images_per_second": statistics.median(values),
            "speed_to_plain": ratio(speeds, name, "plain"),
            "speed_to_ours": ratio(speeds, name, "ours"),
            "peak_memory": peaks.get(name),
            "memory_to_plain": ratio(memory, name, "plain"),
            "memory_to_ours": ratio(memory, name, "ours"),
        }
        for name, values in speeds.items()
    ]


def show(rows):
    """Prints the table."""
    print("\n| step | images/s | to plain | to ours | peak (bytes) | to plain | to ours |")
    print("|-|-|-|-|-|-|-|")
    forms = ("", ".3g", ".2f", ".2f", ",", ".2f", ".2f")
    for row in rows:
        cells = [cell(value, form) for value, form in zip(row.values(), forms, strict=True)]
        print("| " + " | ".join(cells) + " |")


def main():
    args = arguments()
    device = default_device() if args.device == "auto" else torch.device(args.device)
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(args.threads or torch.get_num_threads())
    batch = photograph_batch(args)
    if args.measure_memory:
        actor = build(args, args.only or "ours", batch, device)
        print(peak_memory(lambda: two_steps(actor), device))
        return
    names = [args.only] if args.only else ["ours", "plain", "stock", *args.variants]
    # First, while this process holds nothing on the device yet.
    again = ("--measure-memory", "--only")
    peaks = {} if args.no_memory else {n: int(output_of_child(__file__, *again, n)) for n in names}
    rows = figures(args, seconds(args, names, batch, device), peaks)
    show(rows)
    run = record(device)
    print(last_lines(run))
    write_json(args.json, run | {"rows": rows})


if __name__ == "__main__":
    try:
        main()
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
