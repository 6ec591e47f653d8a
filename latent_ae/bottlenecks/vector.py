"""Codebooks while they learn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_ae.bottlenecks.base import Bottleneck
from latent_ae.bottlenecks.gradients import GRADIENTS
from latent_ae.bottlenecks.kmeans import kmeans
from latent_ae.bottlenecks.usage import UsageMeter, perplexity, place, summed
from latent_ae.config import VQConfig
from latent_ae.outputs import Code
from latent_ae.quantized import VectorQuantizer

__all__ = ["VQBottleneck"]

_SMOOTHING = 1e-5  # of the sizes of clusters
_VECTORS = 16  # of an entry, that k-means sees


class VQBottleneck(Bottleneck):
    """Latents replaced by the nearest entries, and entries that follow their latents.

    With latent z and its entry e, means over the latent values (van den Oord et al. 2017, eq. 3):

        ‖sg[z] − e‖² + β ‖z − sg[e]‖²

    The first term is left out where entries are moving averages of their latents (appendix A.1
    there; Razavi et al. 2019). Both are means over the levels of residual quantisation, where z is
    what the levels before have left. Entries move after the optimizer, once an update, by what all
    processes have seen in all its micro-steps: so a batch may be cut in any way.

    Args:
        quantizer: of the network; its codebooks are what learns.
        config: how.
        learns: false where the encoder is frozen: then the codebooks are too.
    """

    idle: Tensor
    sizes: Tensor
    sums: Tensor

    def __init__(self, quantizer: VectorQuantizer, config: VQConfig, learns: bool = True) -> None:
        super().__init__()
        self.quantizer, self.config, self.learns = quantizer, config, learns
        books = quantizer.codebooks
        books.requires_grad_(learns and config.update == "gradient")
        self.averages = learns and config.update == "ema"
        self.meter = UsageMeter(*books.shape[:2])
        # Updates since an entry was last used, or moved.
        self.register_buffer("idle", torch.zeros(books.shape[:2], dtype=torch.int32))
        if self.averages:
            self.register_buffer("sizes", torch.ones(books.shape[:2]))
            self.register_buffer("sums", books.detach().clone())
        self.revived: Tensor | None = None  # entries that the last update has moved
        self._forget()

    def _forget(self) -> None:
        """Empties what is gathered between two updates; no buffers, which DDP would overwrite."""
        self._totals: Tensor | None = None
        self._left: Tensor | None = None

    def forward(self, encoded: Tensor) -> Code:
        """Maps latents of shape (B, c, h, w) to a `Code` of their entries, in fp32 or more."""
        with torch.autocast(encoded.device.type, enabled=False):
            return self._quantized(encoded)

    def _quantized(self, encoded: Tensor) -> Code:
        quantizer, config = self.quantizer, self.config
        latents = quantizer.bounded(encoded)
        residual, codebook, commitment = latents, [], []
        entries, numbers, left = torch.zeros_like(latents), [], []
        for level in range(quantizer.depth):
            found = quantizer.nearest(residual.detach(), level)
            chosen = quantizer.look_up(found, level)
            codebook.append((residual.detach() - chosen).square().flatten(1).mean(1))
            commitment.append((residual - chosen.detach()).square().flatten(1).mean(1))
            numbers.append(found)
            left.append(residual.detach())
            entries, residual = entries + chosen.detach(), residual - chosen.detach()
        counts = self._gather(torch.cat(numbers, 1), torch.cat(left, 1))
        terms = {"commitment": config.commitment * torch.stack(commitment).mean(0)}
        if config.update == "gradient":
            terms["codebook"] = torch.stack(codebook).mean(0)
        parts = [v.unflatten(1, (quantizer.heads, -1)) for v in (latents, entries)]
        passed = GRADIENTS[config.gradient](*parts).flatten(1, 2)
        statistics = {
            "latent_std": latents.detach().std(),
            "quantization_error": commitment[-1].detach().mean(),
            "perplexity": perplexity(counts).mean(),
        }
        return Code(passed, statistics=statistics, penalties=terms)

    @torch.no_grad()
    def _gather(self, numbers: Tensor, left: Tensor) -> Tensor:
        """Counts entries, and keeps their latents for when the update is done.

        Args:
            numbers: of all codes, of shape (B, codes, h, w).
            left: of all levels, of shape (B, depth · c, h, w).

        Returns:
            How often each entry was taken, of shape (codes, size).
        """
        flat = numbers.transpose(0, 1).flatten(1)  # (codes, positions)
        counts = self.meter.count(flat)
        if not self.training:
            return counts
        if self.averages:
            totals = torch.zeros_like(self.sums)
            for book, (rows, found) in enumerate(zip(self._vectors(left), flat, strict=True)):
                totals[book].index_add_(0, found, rows.to(totals))
            self._totals = totals if self._totals is None else self._totals + totals
        self._left = left
        return counts

    def _vectors(self, left: Tensor) -> Tensor:
        """What each code stands for, of shape (codes, positions, c / heads)."""
        parts = left.unflatten(1, (self.quantizer.codes, -1))
        return parts.permute(1, 0, 3, 4, 2).flatten(1, 3)

    @torch.no_grad()
    def after_update(self, skipped: Tensor, step: int) -> dict[str, Tensor]:
        """As of any `Bottleneck`: averages, and dead entries moved onto latents."""
        counts, terms = self.meter.after_update(skipped, step)
        if counts is None or self._left is None:
            return terms
        if self._totals is not None:
            self._average(counts, summed(self._totals), skipped)
        if self.learns and self.config.revive_after:
            idle = torch.where(counts > 0, 0, self.idle + 1)
            self.idle.copy_(torch.where(skipped, self.idle, idle))
            if (step + 1) % self.config.revive_after == 0:
                dead = (self.idle >= self.config.revive_after) & ~skipped
                terms["codes_revived"] = self._revive(dead, self._vectors(self._left), step)
        self._forget()
        return terms

    def _average(self, counts: Tensor, totals: Tensor, skipped: Tensor) -> None:
        """N ← γ N + (1 − γ) n, m ← γ m + (1 − γ) Σ z, e = m / N (van den Oord et al. 2017, A.1).

        Sizes are smoothed as in Sonnet's `VectorQuantizerEMA`, so that none is 0.
        """
        share = 1 - self.config.decay
        sizes = torch.where(skipped, self.sizes, self.sizes.lerp(counts.to(self.sizes), share))
        sums = torch.where(skipped, self.sums, self.sums.lerp(totals, share))
        self.sizes.copy_(sizes)
        self.sums.copy_(sums)
        whole = sizes.sum(1, keepdim=True)
        smooth = (sizes + _SMOOTHING) / (whole + self.quantizer.size * _SMOOTHING) * whole
        entries = sums / smooth[..., None]
        if self.config.normalized:
            entries = F.normalize(entries, dim=-1)
        books = self.quantizer.codebooks
        books.copy_(torch.where(skipped, books, entries))

    def _revive(self, dead: Tensor, vectors: Tensor, step: int) -> Tensor:
        """Puts dead entries onto latents of the last micro-step; returns how many.

        The processes take turns, and each gives a latent once: where there are fewer latents than
        dead entries, the rest wait for the next time.
        """
        rank, world = place()
        draws = torch.Generator().manual_seed(step * world + rank)
        order = torch.randperm(vectors.shape[1], generator=draws).to(vectors.device)
        turn = dead.cumsum(1) - 1  # a number for each dead entry of a book
        own = turn // world
        mine = dead & (turn % world == rank) & (own < len(order))
        rows = order[own.clamp(0, len(order) - 1)]
        picked = vectors.gather(1, rows[..., None].expand(-1, -1, vectors.shape[-1]))
        picked = summed(torch.where(mine[..., None], picked, 0.0))
        self.revived = dead & (summed(mine.float()) > 0) & picked.isfinite().all(-1)
        books = self.quantizer.codebooks
        books.copy_(torch.where(self.revived[..., None], picked.to(books), books))
        self.idle.masked_fill_(self.revived, 0)
        if self.averages:
            self.sizes.masked_fill_(self.revived, 1.0)
            self.sums.copy_(torch.where(self.revived[..., None], books, self.sums))
        return self.revived.sum().float()

    @torch.no_grad()
    def correct_averages(self, averaged: dict[str, Tensor]) -> None:
        """As of any `Bottleneck`: an entry that has been moved begins its average anew."""
        if self.revived is not None and (average := averaged.get("quantize.codebooks")) is not None:
            moved = self.revived[..., None]
            average.copy_(torch.where(moved, self.quantizer.codebooks.to(average), average))
        self.revived = None

    def starts_on(self) -> int:
        """As of any `Bottleneck`."""
        return _VECTORS * self.quantizer.size if self.config.kmeans and self.learns else 0

    @torch.no_grad()
    def start(self, latents: Tensor, seed: int) -> None:
        """As of any `Bottleneck`: entries start at the centres of clusters of latents."""
        quantizer, draws = self.quantizer, torch.Generator().manual_seed(seed)
        residual = quantizer.bounded(latents)
        for level in range(quantizer.depth):
            for head, part in enumerate(residual.chunk(quantizer.heads, 1)):
                vectors = part.permute(0, 2, 3, 1).flatten(0, 2)
                centres = kmeans(vectors, quantizer.size, draws, normalized=quantizer.normalized)
                quantizer.codebooks[level * quantizer.heads + head] = centres
            found = quantizer.nearest(residual, level)
            residual = residual - quantizer.look_up(found, level)
        if self.averages:
            self.sums.copy_(quantizer.codebooks)
