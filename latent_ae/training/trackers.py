"""TensorBoard, and the services that Accelerate knows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich.console import Console

from latent_ae.config_file import plain

if TYPE_CHECKING:
    from latent_ae.training.run import Run

__all__ = ["Trackers"]


class Trackers:
    """Where rows and validation sheets go beside log.jsonl; for the main process.

    TensorBoard is written by itself: its own writer can forget the rows after a step, which a
    resumed run needs.
    """

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console = run, console
        self.board = self._open_board()
        if not run.config.training.trackers:
            return
        # Trackers take numbers and strings; lists make some of them fail.
        config = {key: _simple(value) for key, value in _flat(plain(run.config)).items()}
        name = str(run.folder.path)
        # The same folder is the same run, also after a restart.
        identity = hashlib.sha256(str(run.folder.path.absolute()).encode()).hexdigest()[:16]
        wandb = {"name": name, "id": identity, "resume": "allow", "dir": name}
        run.accelerator.init_trackers("latent_ae", config, {"wandb": wandb})

    def _open_board(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.run.folder.path / "tensorboard"
        return SummaryWriter(str(folder), purge_step=self.run.step + 1)

    def log(self, group: str, row: dict[str, float], sheet: Path | None = None) -> None:
        """Writes a row, and a sheet of pictures where there is one."""
        step, named = self.run.step, {f"{group}/{name}": value for name, value in row.items()}
        for name, value in named.items():
            self.board.add_scalar(name, value, step)
        pixels = None
        if sheet is not None:
            with Image.open(sheet) as picture:
                pixels = np.asarray(picture)
            self.board.add_image(f"{group}/sheet", pixels, step, dataformats="HWC")
        for tracker in list(self.run.accelerator.trackers):
            try:
                tracker.log(named, step=step)
                if pixels is not None and hasattr(tracker, "log_images"):  # not every service has
                    tracker.log_images({f"{group}/sheet": pixels[None]}, step=step)
            except Exception as error:  # a service that is down must not end a run of weeks
                self.run.accelerator.trackers.remove(tracker)
                self.console.print(
                    f"the tracker {tracker.name} has failed and is left out from here: {error}",
                    style="yellow",
                    markup=False,
                )

    def go_back(self) -> None:
        """Begins anew after the run's step."""
        self.board.close()
        self.board = self._open_board()

    def close(self) -> None:
        """Writes what is left."""
        self.board.close()
        for tracker in self.run.accelerator.trackers:
            tracker.finish()


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _simple(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)
