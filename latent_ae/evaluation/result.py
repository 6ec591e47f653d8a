"""The numbers of one autoencoder under one protocol, and the folder that keeps them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import scipy.stats

from latent_ae.config import Protocol, SourceConfig
from latent_ae.errors import UserError
from latent_ae.evaluation.measurement import REFERENCES, Gathered
from latent_ae.run_folder import write_whole

__all__ = [
    "Evaluation",
    "intervals_of",
    "means_of",
    "per_image_table",
    "pixels_digest",
    "reference_rows",
    "what_is_asked",
]

_RESAMPLES = 2000
_NOT_METRICS = {"position", "key", "width", "height", "finite", "pixels", "kl_nats", "bits"} | {
    "values",
    "too_large",
}


@dataclass
class Evaluation:
    """An autoencoder's measurements, and exactly how they were taken.

    Attributes:
        name: a short title.
        protocol: the way they were taken.
        content: what evaluation.json holds (docs/evaluation.md).
        per_image: a row a picture: key, original size, metrics, nats of KL, bits.
    """

    name: str
    protocol: Protocol
    content: dict[str, Any]
    per_image: pa.Table

    @property
    def metrics(self) -> dict[str, float]:
        """Means over the pictures: `psnr` (dB), `ssim`, `ms_ssim`, `lpips` (AlexNet's), ..."""
        return self.content["metrics"]

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Bootstrap 95 % intervals of the means."""
        return self.content["intervals"]

    def reference(self, name: str) -> dict[str, float]:
        """The metrics of `Lanczos`, `JPEG` or `WebP`; empty where it was not measured."""
        found = [row["metrics"] for row in self.content["references"] if row["name"] == name]
        return found[0] if found else {}

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values, without NaN."""
        return _plain(self.content)

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """Reads what `save` wrote.

        Raises:
            UserError: the folder has no result, or a damaged one.
        """
        file = Path(folder) / "evaluation.json"
        if not file.is_file():
            raise UserError(f"{folder} is no result of an evaluation: it has no {file.name}")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            protocol = Protocol.model_validate(content["protocol"])
            table = pyarrow.parquet.read_table(Path(folder) / "per_image.parquet")
            return cls(content["name"], protocol, content, table)
        except Exception as error:  # json's, pydantic's and arrow's
            reason = str(error).splitlines()[0]
            raise UserError(f"the result in {folder} is damaged: {reason}") from error

    def save(self, folder: Path) -> None:
        """Writes evaluation.json and per_image.parquet, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / ".per_image.tmp"
        pyarrow.parquet.write_table(self.per_image, aside)
        aside.replace(folder / "per_image.parquet")
        write_whole(folder / "evaluation.json", json.dumps(self.to_json(), indent=1) + "\n")


def means_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of each metric over pictures that have it; metrics that none has are left out."""
    return {name: float(np.mean(values)) for name, values in _columns(rows).items()}


def intervals_of(rows: list[dict[str, Any]], seed: int = 0) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap 95 % intervals of the means (Efron 1979), of 2,000 resamples.

    Pictures are resampled, not crops or pixels: the interval is for other pictures of their kind.
    """
    result = {}
    for name, values in _columns(rows).items():
        if len(values) < 2:
            continue
        found = scipy.stats.bootstrap(
            (np.asarray(values),),
            np.mean,
            n_resamples=_RESAMPLES,
            batch=max(1, 2_000_000 // len(values)),
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        result[name] = (float(found.low), float(found.high))
    return result


def pixels_digest(rows: list[dict[str, Any]]) -> str:
    """The sha256 (hex) of all pictures as the network saw them, whatever their order and names."""
    return sha256("".join(sorted(row["pixels"] for row in rows)).encode()).hexdigest()


def per_image_table(rows: list[dict[str, Any]]) -> pa.Table:
    """The rows as parquet wants them; pictures that were not finite have no metrics."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "position"))
    return pa.table({name: [_plain(row.get(name)) for row in rows] for name in names})


def reference_rows(gathered: Gathered, seed: int) -> list[dict[str, Any]]:
    """Mean metrics of each reference, in their order."""
    details = dict.fromkeys(REFERENCES, "at most as many bits, each picture its own")
    details["Lanczos"] = "as many values"
    result = []
    for name in REFERENCES:
        rows = gathered.references.get(name)
        if not rows:
            continue
        bits = [row["bits"] for row in rows if "bits" in row]
        result.append(
            {
                "name": name,
                "detail": details[name],
                "metrics": means_of(rows),
                "intervals": intervals_of(rows, seed),
                "frechet": None,
                "bits_per_image": float(np.mean(bits)) if bits else None,
                "too_small": sum(row.get("too_large", False) for row in rows),
            }
        )
    return result


def what_is_asked(
    data: SourceConfig,
    quick: bool,
    references: Sequence[str],
    frechet_weights: str | None,
    lpips_weights: str | None,
) -> dict[str, Any]:
    """Everything beside model and protocol that decides what a result holds."""
    weights = {"frechet": frechet_weights, "lpips": lpips_weights}
    return {
        "source": data.model_dump(mode="json"),
        "quick": quick,
        "references": list(references),
        "weights": {
            name: sha256(Path(file).read_bytes()).hexdigest() if file else None
            for name, file in weights.items()
        },
    }


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in _NOT_METRICS and value is not None and math.isfinite(value):
                columns.setdefault(name, []).append(value)
    return columns


def _plain(value: Any) -> Any:
    """NaN and infinity become null, which JSON and parquet have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
