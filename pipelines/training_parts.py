"""What the trainings of pipelines/ share: processes, learning rate, checkpoints, command."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast
from pydantic import BaseModel, ValidationError
from torch import Tensor

from latent_ae.errors import UserError
from latent_ae.training.guard import Guard

__all__ = [
    "accelerator_of",
    "app_of",
    "check_parent",
    "learning_rate",
    "move_weights",
    "require_sound",
    "share_done",
    "write_checkpoint",
]


class _Rate(Protocol):
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...


def learning_rate(config: _Rate, step: int, progress: float) -> float:
    """The rate of the update after `step` finished ones, at `progress` in [0, 1]."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.learning_rate * warm * (1 + math.cos(math.pi * progress)) / 2


def accelerator_of(precision: str, accumulation: int) -> Accelerator:
    """An `Accelerator` of a training of its own.

    Raises:
        UserError: the device cannot compute in this precision.
    """
    mixed = {"fp32": "no"}.get(precision, precision)
    # The config decides the number of batches a step, not the launcher's environment.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    state = AcceleratorState._shared_state
    # A process that has trained something else before (as the quickstart has) would be bound to its
    # precision for good; Accelerate has no public way to say that this training is over.
    if state and state.get("_mixed_precision") != mixed:
        AcceleratorState._reset_state()
    try:
        return Accelerator(
            mixed_precision=mixed,
            gradient_accumulation_steps=accumulation,
            # The others wait while the main process draws and saves; half an hour is no hang.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
    except ValueError as error:  # such as fp16 without a GPU
        raise UserError(f"precision {precision}: {error}") from error


def share_done(accelerator: Accelerator, by_steps: float, by_clock: float | None) -> float:
    """The larger share of a training that is done; a collective where the clock counts.

    Args:
        accelerator: of the training.
        by_steps: in [0, 1].
        by_clock: the same of this process's clock; None where no time is set.
    """
    if by_clock is None:
        return by_steps
    done = torch.tensor(by_clock, device=accelerator.device)
    broadcast(done)  # in place: all processes must stop together
    return max(by_steps, done.item())


def move_weights(
    accelerator: Accelerator, optimizer: Any, weights: Iterable[Tensor], clip_norm: float
) -> Tensor:
    """One optimizer step; returns the gradients' norm before it was clipped, on the device.

    Gradients that are not finite move no weight; the host does not wait to learn of it.
    """
    norm = accelerator.clip_grad_norm_(weights, clip_norm or math.inf)
    norm = torch.as_tensor(norm).detach()
    if accelerator.scaler is None:  # the scaler sets the same flag itself
        optimizer.optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad()
    return norm


def require_sound(
    accelerator: Accelerator, guard: Guard, weights: Iterable[Tensor], where: str, kept: str
) -> None:
    """Raises `UserError` if the weights, or the losses of late, are not finite; a collective.

    Weights that have gone astray by one huge step may be finite, with losses that never are.

    Args:
        accelerator: of the training.
        guard: of its losses.
        weights: all that is kept of it.
        where: the training stands, for the sentence.
        kept: what stays as it was.
    """
    broken = ~torch.stack([weight.detach().isfinite().all() for weight in weights]).all()
    # One loss alone may be a bad picture's.
    lost = torch.tensor(guard.look()[0] > 1, device=broken.device)
    signs: Any = accelerator.reduce(torch.stack([broken, lost]).float())
    if signs.any():
        what = "weights" if signs[0] else "losses"
        raise UserError(
            f"the training has diverged: at {where} its {what} are not finite, so the last "
            f"checkpoint in {kept} stay as they were; start again with a lower --learning-rate"
        )


def write_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Writes beside the last checkpoint, then takes its place."""
    aside = file.with_suffix(".tmp")
    with aside.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)


def check_parent(output: Path) -> None:
    """Raises `UserError` unless a folder can be made there."""
    folder = output.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{output} would lie in {folder}, in which nothing can be made")


def app_of(
    train: Callable[..., Any],
    config: type[BaseModel],
    panels: dict[str, str],
    words: str,
    *,
    output: str,
    paths: Mapping[str, str],
    optional: Mapping[str, type],
) -> typer.Typer:
    """A script's command: LATENTS, OUTPUT, and the keys of its config as options.

    Args:
        train: called with `latents`, `output`, a config, and the other paths by keyword.
        config: whose keys become options; their docstrings are the help.
        panels: the first key of each group, and the group's title.
        words: what the command does.
        output: the help of OUTPUT.
        paths: further options that are paths, with their help.
        optional: keys that may be None, and their type without it.
    """

    def command(latents: Path, output: Path, **given: Any) -> None:
        folders = {name: given.pop(name) for name in paths}
        try:
            train(latents, output, config(**given), **folders)
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
        parameter("output", Path, typer.Argument(help=output), empty),
        *(parameter(name, Path, where(help=said), None) for name, said in paths.items()),
    ]
    panel = ""
    for name, field in config.model_fields.items():
        is_list = isinstance(field.default, tuple)
        default = ",".join(map(str, field.default)) if is_list else field.default
        # typer knows no pydantic type inside `| None`.
        kind: Any = str if is_list else optional.get(name, field.annotation)
        panel = panels.get(name, panel)
        info = where(help=field.description, rich_help_panel=panel)
        parameters.append(parameter(name, kind, info, default))
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore
    command.__doc__ = words
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return app


def _sentence(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(_sentence_of(item) for item in error.errors())


def _sentence_of(item: Any) -> str:
    if not item["loc"]:  # of keys that do not fit together
        return item["msg"].removeprefix("Value error, ")
    return f"--{str(item['loc'][0]).replace('_', '-')}: {item['msg']}, not {item['input']!r}"
