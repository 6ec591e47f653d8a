"""Trains the denoiser of a latent diffusion model on a folder of latents.

    latent-ae encode MODEL DATA LATENTS
    accelerate launch pipelines/train_denoiser.py LATENTS OUT --denoiser dit --objective flow

One process or many. OUT becomes a saved `LatentDiffusionPipeline` (autoencoder, averaged denoiser,
scheduler), which stock diffusers loads; checkpoints and `log.jsonl` lie in `OUT-run`, and the same
command goes on where it was stopped. All that is random about a step follows from the seed, the
process and the step, so a resumed run sees what an uninterrupted one would have seen.

From Python: `train("latents", "pipeline", DenoiserConfig(seconds=60))`.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from diffusers import AutoModel
from diffusers.training_utils import EMAModel
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader

from denoisers import DenoiserConfig, Examples, build_denoiser, build_scheduler
from latent_ae.errors import UserError
from latent_ae.latents import LatentDataset, LatentsManifest, weights_sha256
from latent_ae.scaling import LatentScaling
from latent_diffusion import LatentDiffusionPipeline

__all__ = ["DenoiserConfig", "train"]

# These decide what a checkpoint's tensors mean; everything else may change between two starts.
FIXED = "denoiser channels layers attention width depth heads patch objective prediction labels"


def train(
    latents: str | Path,
    output: str | Path,
    config: DenoiserConfig | None = None,
    *,
    autoencoder: str | Path | None = None,
    run: str | Path | None = None,
    console: Console | None = None,
) -> Path:
    """Trains a denoiser, or goes on where it was stopped, and saves the pipeline.

    Args:
        latents: a latents folder.
        output: where the pipeline goes; a pipeline that is there gives way at the end.
        config: what to train; the same config resumes.
        autoencoder: the exported folder that made the latents; left out, the path they name.
        run: where checkpoints and log.jsonl go; left out, `output` with "-run" appended.
        console: where progress is shown; standard error when left out.

    Returns:
        `output`.

    Raises:
        UserError: the latents, the autoencoder, a folder or the config do not fit together.
    """
    config, output = config or DenoiserConfig(), Path(output)
    folder = Path(run) if run else output.with_name(output.name + "-run")
    data = LatentDataset(latents)
    if data.manifest.storage.kind == "indices":
        raise UserError(f"{latents} holds codebook indices, which no diffusion of numbers fits")
    autoencoder = Path(autoencoder or data.manifest.autoencoder.path)
    _check_autoencoder(autoencoder, data.manifest)
    if output.exists() and not (output / "model_index.json").is_file():
        raise UserError(f"{output} is there already and is no pipeline: choose another output")
    trainer = Trainer(config, data, folder)
    accelerator = trainer.accelerator
    loader = DataLoader(
        Examples(
            data, config, trainer.classes, (accelerator.process_index, accelerator.num_processes)
        ),
        batch_size=None,
        sampler=range(trainer.step, config.steps),
        num_workers=config.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    with Log(trainer, console or Console(stderr=True)) as log:
        for batch in loader:
            progress = trainer.progress()
            if progress >= 1:
                break
            log.add(trainer.update(batch, progress))
            if trainer.step % config.log_every == 0:
                log.write()
            if trainer.step % config.checkpoint_every == 0:
                trainer.save()
        log.write()
    trainer.save()
    if accelerator.is_main_process:
        _save_pipeline(trainer, data.manifest, autoencoder, output)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output


class Trainer:
    """The denoiser, its optimizer and its average, restored from the checkpoint in `folder`."""

    def __init__(self, config: DenoiserConfig, data: LatentDataset, folder: Path) -> None:
        self.config, self.file = config, folder / "checkpoint.pt"
        self.log_file = folder / "log.jsonl"
        self.classes = data.manifest.num_classes if config.labels else 0
        self.step, self.seconds = 0, 0.0
        self.identity = {name: getattr(config, name) for name in FIXED.split()}
        self.identity["classes"], self.identity["latents"] = (
            self.classes,
            data.manifest.latent_shape,
        )
        self.identity["autoencoder"] = data.manifest.autoencoder.weights_sha256
        torch.manual_seed(config.seed)
        self.denoiser = build_denoiser(config, data.manifest.latent_shape, self.classes)
        self.accelerator = _accelerator(config.precision)
        optimizer = torch.optim.AdamW(
            self.denoiser.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        # From here on only the wrapped forward may be called, or gradients are not shared.
        self.wrapped, self.optimizer = self.accelerator.prepare(self.denoiser, optimizer)
        self.ema = EMAModel(self.denoiser.parameters(), decay=config.ema, foreach=True)
        if self.file.is_file():
            self._restore()
        self.started = time.monotonic() - self.seconds
        folder.mkdir(parents=True, exist_ok=True)

    def progress(self) -> float:
        """The share of the training that is done, by steps or by the clock, the same everywhere."""
        steps = self.step / self.config.steps
        if self.config.seconds is None:
            return steps
        self.seconds = time.monotonic() - self.started
        done = torch.tensor(self.seconds / self.config.seconds, device=self.accelerator.device)
        broadcast(done)  # in place: all processes must stop together
        return max(steps, done.item())

    def update(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """One step; returns `loss` and `gradient_norm` on the device."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step, progress)
        device = self.accelerator.device
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        takes_labels = config.denoiser == "dit" or self.classes > 0
        prediction = self.wrapped(
            batch["noisy"],
            timestep=batch["timestep"],
            class_labels=batch["label"] if takes_labels else None,
            return_dict=False,
        )[0]
        loss = (prediction.float() - batch["target"]).square().mean()
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(
            self.denoiser.parameters(), config.clip_norm or math.inf
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.denoiser.parameters())
        self.step += 1
        return {"loss": loss.detach(), "gradient_norm": torch.as_tensor(norm).detach()}

    def save(self) -> None:
        """Writes the checkpoint beside the last one, then takes its place."""
        self.seconds = time.monotonic() - self.started
        if self.accelerator.is_main_process:
            scaler, aside = self.accelerator.scaler, self.file.with_suffix(".tmp")
            state = {
                "identity": self.identity,
                "step": self.step,
                "seconds": self.seconds,
                "denoiser": self.denoiser.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
            }
            with aside.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(self.file)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"the checkpoint {self.file} cannot be read: {error}") from error
        for name, value in self.identity.items():
            if state["identity"].get(name) != value:
                raise UserError(
                    f"{self.file.parent} holds a run with another {name}: choose another --run, or "
                    f"{name} {state['identity'].get(name)}"
                )
        self.denoiser.load_state_dict(state["denoiser"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.accelerator.device)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]


def learning_rate(config: DenoiserConfig, step: int, progress: float) -> float:
    """The rate of the update after `step` finished ones, at `progress` in [0, 1]."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.learning_rate * warm * (1 + math.cos(math.pi * progress)) / 2


def _accelerator(precision: str) -> Accelerator:
    mixed = {"fp32": "no"}.get(precision, precision)
    state = AcceleratorState._shared_state
    # A process that has trained something else before (as the quickstart has) would be bound to its
    # precision for good; Accelerate has no public way to say that this training is over.
    if state and state.get("_mixed_precision") != mixed:
        AcceleratorState._reset_state()
    try:
        return Accelerator(mixed_precision=mixed)
    except ValueError as error:  # such as fp16 without a GPU
        raise UserError(f"precision {precision}: {error}") from error


class Log:
    """A moving bar on a terminal, lines elsewhere; a row of log.jsonl every `log_every` steps."""

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self.trainer, self.console = trainer, console
        self.terms: list[dict[str, Tensor]] = []
        self.since = time.monotonic()
        self.main = trainer.accelerator.is_main_process
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(24),
            TaskProgressColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[row]}"),
            console=console,
            disable=not (self.main and console.is_terminal),
        )
        if self.main and trainer.log_file.is_file():  # a killed run's last rows come again
            rows = trainer.log_file.read_text().splitlines()
            rows = [
                row for row in rows if row.endswith("}") and json.loads(row)["step"] <= trainer.step
            ]
            aside = trainer.log_file.with_suffix(".tmp")
            aside.write_text("".join(f"{row}\n" for row in rows))
            aside.replace(trainer.log_file)

    def __enter__(self) -> Log:
        self.bar.start()
        self.task = self.bar.add_task("denoiser", total=1.0, row="")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def add(self, terms: dict[str, Tensor]) -> None:
        """Notes the terms of a step; nothing is read back from the device."""
        self.terms.append(terms)
        trainer = self.trainer
        done = trainer.step / trainer.config.steps
        if trainer.config.seconds:
            done = max(done, trainer.seconds / trainer.config.seconds)
        self.bar.update(self.task, completed=done)

    def write(self) -> None:
        """Writes the row of the steps since the last one."""
        if not self.terms:
            return
        trainer, config = self.trainer, self.trainer.config
        terms = {k: torch.stack([row[k] for row in self.terms]).mean() for k in self.terms[0]}
        # The only point where the host waits for the device.
        means = trainer.accelerator.reduce(terms, reduction="mean")
        now, count = time.monotonic(), len(self.terms)
        speed = count * config.batch_size * trainer.accelerator.num_processes / (now - self.since)
        row = {"step": trainer.step, "seconds": round(now - trainer.started, 3)}
        row |= {name: float(value) for name, value in means.items()}  # pyright: ignore
        row |= {
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
            "images_per_second": speed,
        }
        self.terms, self.since = [], now
        if not self.main:
            return
        with trainer.log_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        text = f"step {trainer.step} · loss {row['loss']:.4f} · {speed:.0f} images/s"
        self.bar.update(self.task, row=text)
        if not self.console.is_terminal:
            self.console.print(text, style="dim")


def _check_autoencoder(folder: Path, manifest: LatentsManifest) -> None:
    """Refuses any autoencoder but the one that made the latents, scaled as it was then."""
    if not (folder / "config.json").is_file():
        raise UserError(f"the latents' autoencoder is not at {folder}: say where by --autoencoder")
    if weights_sha256(folder) != manifest.autoencoder.weights_sha256:
        raise UserError(
            f"the latents were made by other weights than those in {folder}: name the autoencoder "
            "that made them by --autoencoder, or encode again"
        )
    now = LatentScaling.of(_load_autoencoder(folder)).model_dump()
    for name, value in now.items():
        then = getattr(manifest.autoencoder, name)
        if value != then:
            raise UserError(
                f"{name} in {folder / 'config.json'} is {value} but was {then} when the latents "
                "were made: encode again"
            )


def _load_autoencoder(folder: Path) -> Any:
    try:
        return AutoModel.from_pretrained(str(folder), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"diffusers cannot load the autoencoder in {folder}: {error}") from error


def _save_pipeline(
    trainer: Trainer, manifest: LatentsManifest, autoencoder: Path, output: Path
) -> None:
    """Saves the averaged denoiser with its autoencoder beside `output`, then takes its place."""
    denoiser = trainer.denoiser
    trainer.ema.copy_to(denoiser.parameters())
    names = dict(enumerate(manifest.label_names)) if trainer.classes else {}
    pipe = LatentDiffusionPipeline(
        _load_autoencoder(autoencoder),
        denoiser.cpu().eval(),
        build_scheduler(trainer.config),
        names or None,
    )
    output = output.absolute()
    aside, old = (output.with_name(f".{output.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    pipe.save_pretrained(aside)
    # Byte for byte the weights that the latents name, however an older diffusers wrote them.
    weights = "diffusion_pytorch_model*"
    for file in (aside / "vae").glob(weights):
        file.unlink()
    for file in autoencoder.glob(weights):
        shutil.copyfile(file, aside / "vae" / file.name)
    if output.exists():
        output.rename(old)
    aside.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _command() -> Callable[..., None]:
    """The script's command; its options are the keys of `DenoiserConfig`."""

    def command(
        latents: Path, output: Path, autoencoder: Path | None, run: Path | None, **options: Any
    ) -> None:
        try:
            train(latents, output, DenoiserConfig(**options), autoencoder=autoencoder, run=run)
        except (UserError, ValidationError) as error:
            if os.environ.get("RANK", "0") == "0":
                typer.echo(f"error: {_sentence(error)}", err=True)
            raise typer.Exit(2) from None

    def parameter(name: str, kind: type, info: Any, default: Any) -> inspect.Parameter:
        annotation = Annotated[kind, info]
        by_name = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, by_name, default=default, annotation=annotation)

    where, empty = typer.Option, inspect.Parameter.empty
    parameters = [
        parameter("latents", Path, typer.Argument(help="A latents folder."), empty),
        parameter("output", Path, typer.Argument(help="Where the pipeline goes."), empty),
        parameter("autoencoder", Path, where(help="Default: the one the latents name."), None),
        parameter("run", Path, where(help="Checkpoints and log. Default: OUTPUT-run."), None),
    ]
    for name, field in DenoiserConfig.model_fields.items():
        is_list = isinstance(field.default, tuple)
        default = ",".join(map(str, field.default)) if is_list else field.default
        kind: Any = str if is_list else float if name == "seconds" else field.annotation
        parameters.append(parameter(name, kind, where(help=field.description), default))
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore
    command.__doc__ = "Trains a denoiser on LATENTS and saves a diffusers pipeline to OUTPUT."
    return command


def _sentence(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(
        f"--{str(item['loc'][0]).replace('_', '-')}: {item['msg']}, not {item['input']!r}"
        for item in error.errors()
    )


app = typer.Typer(add_completion=False)
app.command()(_command())

if __name__ == "__main__":
    app()
