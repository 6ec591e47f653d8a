"""One process's share of an evaluation, which can be added to another's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from latent_ae.bottlenecks import gaussian_kl
from latent_ae.config import Protocol
from latent_ae.data import Batch, Sample, Skipped, normalize, to_uint8
from latent_ae.evaluation.code_usage import CodeUsage
from latent_ae.evaluation.frechet import FrechetDistance
from latent_ae.evaluation.gallery import Gallery, Shown
from latent_ae.evaluation.latent_space import LatentSpace
from latent_ae.evaluation.references import CODECS, codec_reference, lanczos_reduction
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.metrics import ReconstructionMetrics

__all__ = ["MODEL", "REFERENCES", "Gathered", "Measurement"]

MODEL = "autoencoder"
REFERENCES = ("Lanczos", *CODECS)


@dataclass
class Gathered:
    """What was measured so far, without any network: it travels between processes.

    Attributes:
        rows: a dict for each picture: position, key, size, metrics, bits, `finite`, `pixels`.
        references: the metrics of each picture by reference, and its bits.
        skipped: pictures that could not be read.
        latents: the codes together, or None where nobody asks.
        codes: their numbers, or None where latents are not quantised.
        gallery: pictures to show.
        frechet: the state of the Fréchet distances, or None.
        model_seconds: spent in the network.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    references: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    latents: LatentSpace | None = None
    codes: CodeUsage | None = None
    gallery: Gallery = field(default_factory=lambda: Gallery(0, 0))
    frechet: dict[str, Any] | None = None
    model_seconds: float = 0.0

    def merge(self, other: Gathered) -> None:
        """Adds another process's share (its Fréchet state is merged by `FrechetDistance`)."""
        self.rows = sorted(self.rows + other.rows, key=lambda row: row["position"])
        for name, values in other.references.items():
            mine = self.references.setdefault(name, [])
            mine += values
            mine.sort(key=lambda row: row["position"])
        self.skipped += other.skipped
        if self.latents is not None and other.latents is not None:
            self.latents.merge(other.latents)
        if self.codes is not None and other.codes is not None:
            self.codes.merge(other.codes)
        self.gallery.merge(other.gallery)
        self.model_seconds = max(self.model_seconds, other.model_seconds)


class Measurement:
    """Runs batches through an autoencoder and gathers everything that takes one pass.

    Args:
        frozen: the autoencoder.
        protocol: how to measure.
        metrics: of reconstructions.
        frechet: None where the protocol wants none.
        references: which of `REFERENCES` to measure too.
        latents: whether to gather the latent space.
        gallery: how many first and how many worst pictures to keep.
    """

    def __init__(
        self,
        frozen: FrozenAutoencoder,
        protocol: Protocol,
        metrics: ReconstructionMetrics,
        frechet: FrechetDistance | None,
        *,
        references: Sequence[str] = (),
        latents: bool = True,
        gallery: tuple[int, int] = (0, 0),
    ) -> None:
        self.frozen, self.protocol, self.metrics = frozen, protocol, metrics
        self.frechet, self.references = frechet, references
        space = (
            LatentSpace(frozen.channels, protocol.seed, frozen.image_channels) if latents else None
        )
        codes = None
        if frozen.quantizes:
            codes = CodeUsage(frozen.codebook_size, getattr(frozen.network.quantize, "heads", 1))
        self.gathered = Gathered(latents=space, codes=codes, gallery=Gallery(*gallery))

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Adds a batch; pictures whose reconstruction is not finite are noted and left out."""
        self.gathered.skipped += batch.skipped
        if not batch.samples:
            return
        images = batch.images.to(self.frozen.device, non_blocking=True)
        began = time.perf_counter()
        mean, logvar = self.frozen.encode(normalize(images))
        code = self._code(mean, logvar, batch.samples)
        size, numbers = (images.shape[-2], images.shape[-1]), None
        if self.frozen.quantizes:
            numbers = self.frozen.indices(code)
            decoded = self.frozen.decode_indices(numbers, size)
        else:
            decoded = self.frozen.decode(code, size)
        finite = torch.isfinite(decoded).flatten(1).all(1) & torch.isfinite(mean).flatten(1).all(1)
        good = finite.nonzero().flatten().tolist()  # the host waits for the device here
        self.gathered.model_seconds += time.perf_counter() - began
        for i in set(range(len(batch.samples))) - set(good):
            self.gathered.rows.append(_row(batch.samples[i], batch.images[i], finite=False))
        if not good:
            return
        samples = [batch.samples[i] for i in good]
        images, mean = images[good], mean[good]
        logvar = None if logvar is None else logvar[good]
        self._add(samples, images, to_uint8(decoded[good]), mean, logvar)
        if self.gathered.codes is not None and numbers is not None:
            positions = [sample.position for sample in samples]
            self.gathered.codes.update(numbers[good], images[0, 0].numel(), positions)

    def finish(self) -> Gathered:
        """The share in the data's order, with its Fréchet state in it."""
        self.gathered.rows.sort(key=lambda row: row["position"])
        self.gathered.frechet = self.frechet.state() if self.frechet else None
        return self.gathered

    def _code(self, mean: Tensor, logvar: Tensor | None, samples: list[Sample]) -> Tensor:
        if self.protocol.code == "mode" or logvar is None:
            return mean
        noise = []
        for sample in samples:  # whatever the batch and the number of processes
            generator = torch.Generator().manual_seed((self.protocol.seed << 32) + sample.position)
            noise.append(torch.randn(mean.shape[1:], generator=generator))
        return mean + (0.5 * logvar).exp() * torch.stack(noise).to(mean.device)

    def _add(
        self,
        samples: list[Sample],
        images: Tensor,
        decoded: Tensor,
        mean: Tensor,
        logvar: Tensor | None,
    ) -> None:
        gathered, bits = self.gathered, self.frozen.bits(mean, logvar).tolist()
        kl = [None] * len(samples)
        if logvar is not None:
            kl = gaussian_kl(mean, logvar).flatten(1).sum(1).tolist()
        metrics = _by_picture(self.metrics.measure(images, decoded))
        pixels = images.cpu()
        for i, sample in enumerate(samples):
            extra = {"kl_nats": kl[i], "bits": bits[i], "values": mean[i].numel()}
            gathered.rows.append({**_row(sample, pixels[i], finite=True), **metrics[i], **extra})
            shown = (pixels[i].clone(), decoded[i].cpu().clone(), metrics[i])
            gathered.gallery.add(Shown(sample.position, sample.key, *shown))
        positions = [sample.position for sample in samples]
        if gathered.latents is not None:
            gathered.latents.update(mean, logvar, pixels, positions)
        compared = {MODEL: decoded}
        for name in self.references:
            compared[name] = self._reference(name, samples, images, mean[0].numel(), bits)
        if self.frechet is not None:
            self.frechet.update(images, compared)

    def _reference(
        self, name: str, samples: list[Sample], images: Tensor, values: int, bits: list[float]
    ) -> Tensor:
        extra: list[dict[str, Any]] = [{} for _ in samples]
        if name == "Lanczos":
            result = lanczos_reduction(images.cpu(), values).to(images.device)
        else:
            coded = codec_reference(images, bits, name)
            result = coded.images.to(images.device)
            pairs = zip(coded.bits, coded.too_large, strict=True)
            extra = [{"bits": taken, "too_large": large} for taken, large in pairs]
        rows = self.gathered.references.setdefault(name, [])
        metrics = _by_picture(self.metrics.measure(images, result))
        for sample, row, more in zip(samples, metrics, extra, strict=True):
            rows.append({"position": sample.position, **row, **more})
        return result


def _row(sample: Sample, image: Tensor, *, finite: bool) -> dict[str, Any]:
    digest = blake2b(str(tuple(image.shape)).encode(), digest_size=16)
    digest.update(image.numpy().tobytes())
    return {
        "position": sample.position,
        "key": sample.key,
        "width": sample.width,
        "height": sample.height,
        "finite": finite,
        "pixels": digest.hexdigest(),
    }


def _by_picture(metrics: dict[str, Tensor]) -> list[dict[str, float]]:
    columns = {name: values.flatten().tolist() for name, values in metrics.items()}
    count = len(next(iter(columns.values())))
    return [{name: values[i] for name, values in columns.items()} for i in range(count)]
