"""Several processes of one launcher: who one is, and what the main one sees."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list

from latent_ae.autoencoder import default_device

__all__ = ["from_main", "place", "wait_for_everyone"]

T = TypeVar("T")
# Who has finished its share waits for the others: days are no hang.
_PATIENCE = timedelta(days=7)


def place(device: torch.device | str | None = None) -> tuple[int, int, torch.device]:
    """This process's number, how many there are, and its device.

    Args:
        device: in place of the launcher's, or of the first CUDA device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Without `cpu` it would take processes on CPUs for so many single ones.
        state: Any = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
        return state.process_index, state.num_processes, torch.device(device or state.device)
    return 0, 1, torch.device(device or default_device())


def from_main(look: Callable[[], T]) -> T:
    """What the main process sees, on every process; a collective."""
    found = [look() if PartialState().is_main_process else None]
    return broadcast_object_list(found)[0]  # pyright: ignore[reportReturnType]


def wait_for_everyone() -> None:
    """Returns when all processes of the launcher have come here; a collective."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState().wait_for_everyone()
