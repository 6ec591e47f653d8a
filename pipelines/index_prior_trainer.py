"""One update of a prior over codes, its measure on held-out codes, and its checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from denoiser_examples import mix, order_of
from index_prior_config import PriorConfig, build_prior
from index_prior_tokens import Vocabulary, cross_entropy, entropies
from latent_ae.errors import UserError
from latent_ae.latents import LatentDataset
from latent_ae.training.guard import Guard, poison
from training_parts import (
    accelerator_of,
    learning_rate,
    move_weights,
    require_sound,
    share_done,
    write_checkpoint,
)

__all__ = ["Examples", "Trainer"]

# These decide what a checkpoint's tensors mean; everything else may change between two starts.
FIXED = "width depth heads labels"


class Examples(Dataset[Tensor]):
    """Batches of sequences, int64 of shape (B, 1 + length), the class first.

    Which pictures, and whose classes are dropped, follows from seed, process and number alone.

    Args:
        data: a latents folder of indices.
        vocabulary: their tokens.
        config: the batch size, the dropped classes and the seed.
        process: the index and the number of processes.
    """

    def __init__(
        self,
        data: LatentDataset,
        vocabulary: Vocabulary,
        config: PriorConfig,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        self.data, self.vocabulary, self.config, self.process = data, vocabulary, config, process

    def __getitem__(self, number: int) -> Tensor:
        config, (rank, world) = self.config, self.process
        first = (number * world + rank) * config.batch_size
        places = (divmod(first + i, len(self.data)) for i in range(config.batch_size))
        positions = [
            int(order_of(len(self.data), config.seed, epoch)[place]) for epoch, place in places
        ]
        generator = torch.Generator().manual_seed(mix(config.seed, rank, number))
        drop = torch.rand(len(positions), generator=generator) < config.label_dropout
        return sequences(self.data, self.vocabulary, positions, drop)


def sequences(
    data: LatentDataset, vocabulary: Vocabulary, positions: Sequence[int], drop: Tensor
) -> Tensor:
    """Sequences of shape (B, 1 + length).

    Args:
        data: a latents folder of indices.
        vocabulary: their tokens.
        positions: of the pictures.
        drop: of shape (B,), whose class gives way to the null class.
    """
    items = [data[position] for position in positions]
    tokens = vocabulary.tokens(torch.stack([item["indices"] for item in items]))
    labels = torch.tensor([item["label"] for item in items]).masked_fill(drop, -1)
    return torch.cat([vocabulary.class_tokens(labels), tokens], 1)


class Trainer:
    """The prior and its optimizer, restored from the checkpoint in `folder`."""

    def __init__(
        self,
        config: PriorConfig,
        data: LatentDataset,
        vocabulary: Vocabulary,
        codebook: str,
        folder: Path,
    ) -> None:
        self.config, self.folder, self.file = config, folder, folder / "checkpoint.pt"
        self.vocabulary = vocabulary
        self.step, self.seconds = 0, 0.0
        self.identity: dict[str, Any] = {
            **{name: getattr(config, name) for name in FIXED.split()},
            "vocabulary": asdict(vocabulary),
            "codebook": codebook,
            "label_names": list(data.manifest.label_names) if vocabulary.classes else [],
        }
        torch.manual_seed(config.seed)
        self.prior = build_prior(config, vocabulary)
        self.accelerator = accelerator_of(config.precision, config.accumulation)
        matrices = [p for p in self.prior.parameters() if p.ndim > 1]
        others = [p for p in self.prior.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        # From here on only the wrapped forward may be called, or gradients are not shared.
        self.wrapped, self.optimizer = self.accelerator.prepare(self.prior, optimizer)
        if self.file.is_file():
            self._restore()
        self.started = time.monotonic() - self.seconds
        self.guard = Guard(self.accelerator.device)  # of losses; the optimizer skips by itself
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be made: {error.strerror}") from error

    def progress(self) -> float:
        """The share of the training that is done, by steps or by the clock, the same everywhere."""
        steps, by_clock = self.step / self.config.steps, None
        if self.config.seconds is not None:
            self.seconds = time.monotonic() - self.started
            by_clock = self.seconds / self.config.seconds
        return share_done(self.accelerator, steps, by_clock)

    def update(self, batches: Sequence[Tensor], progress: float) -> dict[str, Tensor]:
        """One step on `accumulation` batches; `loss`, `bits_per_code` and `gradient_norm`.

        Gradients that are not finite move no weight; the host does not wait to learn of it.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step, progress)
        if config.dropout:  # what it drops is a function of the step, too
            torch.manual_seed(mix(config.seed, self.accelerator.process_index, self.step))
        losses = []
        for batch in batches[:-1]:
            with self.accelerator.no_sync(self.wrapped):  # gradients travel with the last batch
                losses.append(self._backward(batch))
        losses.append(self._backward(batches[-1]))
        loss, weights = torch.stack(losses).mean(), self.prior.parameters()
        norm = move_weights(self.accelerator, self.optimizer, weights, config.clip_norm)
        self.guard.count(~loss.isfinite())
        self.step += 1
        return {"loss": loss, "bits_per_code": loss / math.log(2), "gradient_norm": norm}

    def _backward(self, batch: Tensor) -> Tensor:
        """Adds the gradients of a batch's mean cross-entropy, in nats a code, which it returns."""
        batch = batch.to(self.accelerator.device, non_blocking=True)
        logits = self.wrapped(batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(self.vocabulary, logits, batch[:, 1:]).mean()
        self.accelerator.backward(poison(loss))  # divides by the accumulation
        return loss.detach()

    @torch.no_grad()
    def measure(self, data: LatentDataset) -> dict[str, float | int]:
        """What held-out codes cost, in bits a code; a collective.

        Returns:
            `bits_per_code` given the class; with classes also `bits_per_code_without_class`; the
            held-out codes' own `order_0_entropy`, which no prior that looks at no other code goes
            below; and how many `pictures`.
        """
        accelerator, size = self.accelerator, self.config.batch_size
        mine = range(accelerator.process_index, len(data), accelerator.num_processes)
        device, vocabulary = accelerator.device, self.vocabulary
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        counts = torch.zeros(vocabulary.entries, dtype=torch.float64, device=device)
        self.prior.eval()
        for first in range(0, len(mine), size):
            positions = mine[first : first + size]
            known = torch.zeros(len(positions), dtype=torch.bool)
            asked = sequences(data, vocabulary, positions, known).to(device)
            counts += asked[:, 1:].flatten().bincount(minlength=vocabulary.entries)
            costs = [self._nats(asked)]
            if vocabulary.classes:
                asked[:, 0] = vocabulary.null
                costs.append(self._nats(asked))
            sums += torch.stack([*costs[:1], costs[-1], torch.full_like(costs[0], len(positions))])
        self.prior.train()
        nats, without, pictures = accelerator.reduce(sums).tolist()  # pyright: ignore
        counts = accelerator.reduce(counts)
        per_code = math.log(2) * pictures * vocabulary.length
        row: dict[str, float | int] = {"bits_per_code": nats / per_code}
        if vocabulary.classes:
            row["bits_per_code_without_class"] = without / per_code
        codes = counts[: vocabulary.codes * vocabulary.size]  # pyright: ignore
        return row | {"order_0_entropy": entropies(vocabulary, codes), "pictures": int(pictures)}

    def _nats(self, batch: Tensor) -> Tensor:
        logits = self.prior(batch[:, :-1], use_cache=False).logits
        return cross_entropy(self.vocabulary, logits, batch[:, 1:]).double().sum()

    def require_sound(self) -> None:
        """Raises `UserError` if weights, or the losses of late, are not finite; a collective."""
        weights = self.prior.parameters()
        where, kept = f"step {self.step}", f"{self.folder} and the prior"
        require_sound(self.accelerator, self.guard, weights, where, kept)

    def save(self) -> None:
        """Writes the checkpoint beside the last one, then takes its place.

        Raises:
            UserError: there is nothing worth keeping; see `require_sound`.
        """
        self.require_sound()
        self.seconds = time.monotonic() - self.started
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "identity": self.identity,
                "step": self.step,
                "seconds": self.seconds,
                "prior": self.prior.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
            }
            write_checkpoint(self.file, state)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            known, prior, optimizer, scaler = (
                state[name] for name in ("identity", "prior", "optimizer", "scaler")
            )
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
        except Exception as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"the checkpoint {self.file} cannot be read: {why}") from error
        for name, value in self.identity.items():
            if known.get(name) != value:
                before = f", or {name} {known.get(name)}" if name in FIXED.split() else ""
                raise UserError(
                    f"{self.folder} holds a run with another {name}: choose another --run{before}"
                )
        try:
            self.prior.load_state_dict(prior)
            self.optimizer.load_state_dict(optimizer)
            if self.accelerator.scaler and scaler:
                self.accelerator.scaler.load_state_dict(scaler)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint {self.file} is of another network") from error
