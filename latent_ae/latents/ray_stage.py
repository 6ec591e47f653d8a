"""The same encoder as a stage of Ray Data, for a cluster that already runs one (extra `ray`).

pip install "latent_ae[ray]"
latent-ae encode MODEL DATA OUT --ray 8
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from latent_ae.config import EncodingSource, Preprocessing, SourceConfig
from latent_ae.data import source_of
from latent_ae.errors import UserError
from latent_ae.frozen import fast_precision
from latent_ae.latents.encode import Job, claim, require_outside
from latent_ae.latents.format import LatentsManifest, read_manifest
from latent_ae.latents.plan import Plan, Unit, describe_difference
from latent_ae.latents.progress import EncodeProgress

__all__ = ["ShardStage", "encode_on_ray"]


class ShardStage:
    """For `map_batches`: takes the numbers of shards, encodes and writes each, says how many codes.

    A stage that returned latents would leave it to Ray in which order and files they end. Shards
    are fixed by the plan; so a folder that Ray has made is byte for byte the one that `encode`
    makes with the same batch size, and each can go on with the other's.

    Args:
        model: the autoencoder's folder, to be found on every node; so is the next.
        config: the source.
        out: the latents folder, on a disk that all nodes share.
        plan: as JSON, what the driver has fixed; a node that sees other pictures or weights stops.
        options: `preprocessing` and the rest of `Job.of`'s.

    Raises:
        UserError: model or data of this node are not those of the plan.
    """

    def __init__(
        self, model: str, config: dict[str, Any], out: str, plan: str, **options: Any
    ) -> None:
        preprocessing = Preprocessing(**options.pop("preprocessing"))
        source = EncodingSource.model_validate(config)
        self.job = Job.of(model, source, preprocessing, **options)
        self.out = Path(out)
        if difference := describe_difference(Plan.model_validate_json(plan), self.job.plan):
            raise UserError(f"this node was to encode with {difference}")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Maps `unit`, of shape (N,), to itself and `codes`, of shape (N,)."""
        units = [Unit(int(number)) for number in batch["unit"]]
        with EncodeProgress(None, None) as progress:
            self.job.run(self.out, units, progress)
        return {"unit": batch["unit"], "codes": np.array([progress.codes] * len(units))}


def encode_on_ray(
    model: str | Path,
    data: str | Path | SourceConfig,
    out: str | Path,
    *,
    actors: int = 1,
    gpus_per_actor: float | None = None,
    preprocessing: Preprocessing | None = None,
    **options: Any,
) -> LatentsManifest:
    """What `encode` does, on the Ray cluster that is connected, or on one started here.

    Args:
        model: as `encode`'s; paths must be seen alike by every node.
        data: with random access; a stream has no shards to hand out.
        out: the latents folder.
        actors: encoders at work.
        gpus_per_actor: one where the cluster has any, when left out.
        preprocessing: as `encode`'s.
        options: `batch_size`, `workers`, `store`, `dtype`, `precision`, `shard_bytes`, `limit`.

    Raises:
        UserError: as `encode`; Ray is not installed; the source is a stream.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError('Ray is not installed: pip install "latent_ae[ray]"') from error
    config = data if isinstance(data, SourceConfig) else source_of(data)
    limit = {"limit": options.pop("limit")} if options.get("limit") else {}
    config = EncodingSource.model_validate(config.model_dump() | limit)
    cut = preprocessing or Preprocessing()
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    if gpus_per_actor is None:
        gpus_per_actor = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    # What depends on the device is chosen here, once for all: for GPUs, whatever the driver has.
    precision = "bf16" if gpus_per_actor else fast_precision(torch.device("cpu"))
    options["precision"] = options.get("precision") or precision
    options["batch_size"] = options.get("batch_size") or (32 if gpus_per_actor else 2)
    job = Job.of(model, config, cut, device="cpu", **options)  # the driver only plans
    units = job.plan.units()
    if units is None:
        raise UserError("Ray encodes sources with random access: leave out streaming")
    out = Path(out).resolve()
    require_outside(out, config)
    folder, found = claim(out, job.plan)
    if isinstance(found, LatentsManifest):
        return found
    assert folder is not None
    try:
        if left := [{"unit": unit.number} for unit in units if unit not in found.units]:
            places = (str(model), config.model_dump(), str(out), job.plan.model_dump_json())
            arguments = {"preprocessing": cut.model_dump(), **options}
            arguments["device"] = None if gpus_per_actor else torch.device("cpu")
            _run(left, places, arguments, actors, gpus_per_actor)
        folder.finish()
    finally:
        folder.release()
    return read_manifest(out)


def _run(
    left: list[dict[str, int]],
    places: tuple[Any, ...],
    arguments: dict[str, Any],
    actors: int,
    gpus: float,
) -> None:
    import ray.data
    import ray.exceptions

    rows = ray.data.from_items(left, override_num_blocks=len(left))
    done = rows.map_batches(
        ShardStage,
        fn_constructor_args=places,
        fn_constructor_kwargs=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(left))),
        num_gpus=gpus or None,
    )
    try:
        done.materialize()
    except ray.exceptions.RayError as error:
        # An actor's own sentence is the last line of what Ray makes of it.
        last = str(error).strip().splitlines()[-1]
        name, _, sentence = last.partition(": ")
        if name.endswith("UserError"):
            raise UserError(sentence) from error
        raise
