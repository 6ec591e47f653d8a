"""One update beside the usual loop: how much faster, in how much memory, and is it the same update?

    python benchmarks/train_step.py --network tiny --resolution 64 --batch 8 --variants contiguous
    python benchmarks/train_step.py --network kl_f8 --resolution 256 --batch 8 --precision bf16 \
        --lpips vgg --lpips-path vgg16.safetensors --variants contiguous checkpointing compile fp32

`ours` is `latent_ae.training.step.update`: one forward pass of the autoencoder, one of the
discriminator over pictures and reconstructions together, one backward pass through each; fused
AdamW, EMA over all weights at once, channels_last, nothing read back from the device.

`plain` is the usual loop, as in diffusers' `train_autoencoderkl.py` and in LDM: the discriminator
has a step of its own with a forward pass of the autoencoder of its own (autograd on), and passes of
its own over pictures and over reconstructions; the adaptive weight differentiates LPIPS and the
discriminator once more with respect to the last layer; stock `lpips`, default AdamW, EMA weight by
weight, contiguous memory, nine `.item()`. What is only wrong there is not repeated: LPIPS has
gradients, and the discriminator is frozen while the autoencoder learns.

Both do the same mathematics: L1 + LPIPS + KL + hinge PatchGAN with the adaptive weight, the same
batch, weights and noise. Before anything is timed their first losses are compared; the script stops
where they differ. `--variants` adds `ours` with one key of the config changed. Steps are timed in
turn (ours, plain, …, ours, plain, …), with the device idle at either end of each; a ratio is the
median over the rounds, so a load that slows a whole round cancels.

Memory is measured over two steps in a process of its own for each row. On a GPU it is the peak of
torch's allocator, weights included. On a CPU, where that keeps no count, it is the growth of the
process from just before its first step to the peak (Linux only), so without weights and EMA.
"""

import argparse
import gc
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

# Before `datasets` is imported: its cache of the four photographs goes when we go.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="latent-ae-train-step-")

import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from skimage import data as photographs

from latent_ae import load_config
from latent_ae.autoencoder import build_network, default_device
from latent_ae.data import TrainingStream, normalize
from latent_ae.losses import NLayerDiscriminator, load_backbone
from latent_ae.training.run import prepare
from latent_ae.training.step import update

ROOT = Path(__file__).parents[1]
SCRATCH = Path(os.environ["HF_HOME"])
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
# What a variant changes in `ours`' section `training`.
VARIANTS = {
    "contiguous": {"channels_last": False},
    "checkpointing": {"gradient_checkpointing": True},
    "compile": {"compile": True},
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
}
COMPARED = ("l1", "lpips", "kl", "total", "adversarial", "adaptive_weight")
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # relative; what is left is rounding
MEASURED_STEPS = 2  # Adam's moments exist from the first on, beside activations in the second
# Freed blocks go back to the system at once: otherwise a process keeps its peak, and what
# fragmentation adds to it.
TIDY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_THRESHOLD_": "65536",
}


class Same:
    """A stream that has one batch: decoding is not what is compared."""

    def __init__(self, batch):
        self.batch = batch

    def __next__(self):
        return self.batch


class Ours:
    """This package's update, as `train` calls it."""

    def __init__(self, config, batch):
        self.run = prepare(config)
        self.run.stream = Same(batch)

    def step(self):
        terms = update(self.run).terms
        self.run.step += 1
        return terms


class Plain:
    """The usual loop: a step of the autoencoder, then one of the discriminator."""

    def __init__(self, config, batch, device):
        self.config, self.batch, self.device = config, batch, device
        self.network = build_network(config.network).to(device).train()
        self.judge = NLayerDiscriminator(config.adversary).to(device).train()
        perceptual = config.losses.perceptual
        self.lpips = load_backbone(perceptual.net, perceptual.path).to(device)
        rate = config.training.learning_rate
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), rate, config.training.betas, weight_decay=0
        )
        self.judge_optimizer = torch.optim.AdamW(
            self.judge.parameters(), rate, config.adversary.betas, weight_decay=0
        )
        self.ema = EMAModel(self.network.parameters(), decay=config.training.ema)

    def load(self, run):
        """Begins with the weights of one of our runs."""
        self.network.load_state_dict(run.network.state_dict())
        self.judge.load_state_dict(run.rule.discriminator.state_dict())

    def autocast(self):
        on = self.config.training.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def step(self):
        images = normalize(self.batch.images.to(self.device, non_blocking=True))
        return self._learn(images) | self._learn_to_judge(images)

    def _learn(self, images):
        config, elements = self.config, images[0].numel()
        self.judge.requires_grad_(False)
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
        # LDM's losses are sums over an image, ours means: its bounds apply to the former.
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
        with self.autocast():
            decoded = self.network.decode(self.network.encode(images).latent_dist.sample()).sample
            real, fake = self.judge(images), self.judge(decoded.detach())
        on_real, on_fake = torch.relu(1 - real).mean(), torch.relu(1 + fake).mean()
        loss = 0.5 * (on_real + on_fake)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=["tiny", "kl_f8"], default="tiny")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=list(TOLERANCE), default="fp32")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each row")
    parser.add_argument("--warmup", type=int, default=1, help="untimed ones after the comparison")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=[])
    parser.add_argument("--lpips", choices=["alex", "vgg"], default="alex")
    parser.add_argument("--lpips-path", help="safetensors of torchvision's backbone")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--no-memory", action="store_true", help="leave out that column")
    parser.add_argument("--only", choices=["ours", "plain", *VARIANTS], help="one row alone")
    parser.add_argument(
        "--measure-memory", action="store_true", help="with --only: print its bytes, time nothing"
    )
    args = parser.parse_args()
    if args.measure_memory and args.only is None:
        parser.error("--measure-memory needs --only")
    return args


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


def device_of(args):
    """Where it runs; Accelerate learns of it through its own variable."""
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return default_device() if args.device == "auto" else torch.device(args.device)


def photograph_batch(args):
    """Four photographs as files, and the batch that everything trains on."""
    folder = SCRATCH / "photographs"
    folder.mkdir()
    for name in PHOTOGRAPHS:
        Image.fromarray(getattr(photographs, name)()).save(folder / f"{name}.png")
    return next(TrainingStream(config_of(args, "ours").data))


def build(args, name, batch, device):
    """What makes the steps of a row."""
    if name == "plain":
        return Plain(config_of(args, name), batch, device)
    return Ours(config_of(args, name), batch)


def compare(ours, plain, precision):
    """Takes the first step of both and stops unless the losses agree: same weights, same noise."""
    plain.load(ours.run)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def noise(like):
        # diffusers draws in the encoder's own precision, and in the order of contiguous memory.
        return torch.randn(like.shape, device=like.device, dtype=dtype).to(like.dtype)

    torch.manual_seed(0)
    with patch("torch.randn_like", noise):
        mine = ours.step()
    torch.manual_seed(0)
    theirs = plain.step()
    print("First step, from the same weights and noise:\n\n| | ours | plain | apart |\n|-|-|-|-|")
    worst = 0.0
    for name in COMPARED:
        a, b = float(mine[name]), theirs[name]
        apart = abs(a - b) / max(abs(b), 1e-12)
        worst = max(worst, apart)
        print(f"| {name} | {a:.6g} | {b:.6g} | {apart:.1e} |")
    if not worst <= TOLERANCE[precision]:  # NaN is no agreement either
        raise SystemExit("ours and plain do not compute the same losses: nothing to compare")


def timed(actor, device):
    """Seconds of one step, with the device idle before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else gc.isenabled
    wait()
    began = time.perf_counter()
    actor.step()
    wait()
    return time.perf_counter() - began


def seconds(args, names, batch, device):
    """Seconds of every timed step by row, taken in turn."""
    actors = {name: build(args, name, batch, device) for name in names}
    if "ours" in actors and "plain" in actors:
        compare(actors["ours"], actors["plain"], args.precision)
    for actor in actors.values():
        for _ in range(args.warmup):
            actor.step()
    taken = {name: [] for name in names}
    for _ in range(args.steps):
        for name, actor in actors.items():
            taken[name].append(timed(actor, device))
    return taken


def resident(field):
    """Bytes of this process: `VmRSS` now, `VmHWM` at most.

    Not getrusage's: a child's ru_maxrss begins with its parent's.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_memory(actor, device):
    """Bytes at the peak of the first steps of this process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of building is forgotten
        before = resident("VmRSS")
    for _ in range(MEASURED_STEPS):
        actor.step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM") - before


def peak_in_child(name):
    """The same in a fresh process, in which nothing else has left its traces."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--measure-memory"]
    done = subprocess.run(
        command, env=os.environ | TIDY, stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def ratio(values, name, other):
    """The median over rounds of one row's value to another's, as a cell."""
    if name not in values or other not in values:
        return "–"
    pairs = zip(values[name], values[other], strict=True)
    return f"{statistics.median(a / b for a, b in pairs):.2f}"


def show(args, names, taken, peaks):
    """Prints the table."""
    speeds = {name: [args.batch / one for one in taken[name]] for name in names}
    memory = {name: [peak] for name, peak in peaks.items()}
    print("\n| step | images/s | to plain | to ours | peak (bytes) | to plain | to ours |")
    print("|-|-|-|-|-|-|-|")
    for name in names:
        cells = [f"ours, {name}" if name in VARIANTS else name]
        cells += [f"{statistics.median(speeds[name]):.3g}"]
        cells += [ratio(speeds, name, other) for other in ("plain", "ours")]
        cells += [f"{peaks[name]:,}" if name in peaks else "–"]
        cells += [ratio(memory, name, other) for other in ("plain", "ours")]
        print("| " + " | ".join(cells) + " |")


def machine(device):
    """The processor's name, and how much of it is used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, torch threads: {torch.get_num_threads()}"


def main():
    args = arguments()
    device = device_of(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    batch = photograph_batch(args)
    if args.measure_memory:
        print(peak_memory(build(args, args.only, batch, device), device))
        return
    names = [args.only] if args.only else ["ours", "plain", *args.variants]
    countable = device.type == "cuda" or Path("/proc/self/clear_refs").exists()
    # First, while this process holds nothing on the device yet.
    peaks = {} if args.no_memory or not countable else {n: peak_in_child(n) for n in names}
    show(args, names, seconds(args, names, batch, device), peaks)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    print(f"\n{time.strftime('%Y-%m-%d')}, {machine(device)}, {packages}")
    print(f"`python benchmarks/train_step.py {shlex.join(sys.argv[1:])}`")


if __name__ == "__main__":
    try:
        main()
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
