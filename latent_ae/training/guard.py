"""What a run of weeks watches: numbers that are none, and an adversary that wins or gives up."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_ae.config import AdversaryConfig, AnyBottleneck

__all__ = ["Alarms", "Guard", "poison"]

# A discriminator that is nearly always right teaches nothing (its hinge loss is flat there); one
# that is right less often than a coin judges noise.
_ACCURACY = (0.4, 0.97)
# The adaptive weight says how much steeper the reconstruction's loss is than the verdict, in LDM's
# units: below 1e-2 the adversary is about to drive the autoencoder; at its maximum it is mute.
_SMALLEST_ADAPTIVE = 1e-2
_LEAST_USAGE = 0.1  # of the codes in the last updates; below, a codebook has collapsed
_ROWS = 3  # rows of the log in a row before an alarm is given


def poison(loss: Tensor) -> Tensor:
    """The loss, with gradients that are NaN if it is not finite.

    A loss may be infinite on one process and its gradients finite: averaged with the others'
    gradients, NaN tells every process, at the cost of no communication.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class Guard:
    """Counts the updates that were skipped because their gradients were not finite.

    The skip happens on the device (the fused optimizer reads a flag), so a step never waits for the
    host; `look` is where it does.
    """

    def __init__(self, device: torch.device) -> None:
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._all = torch.zeros_like(self._in_a_row)

    def count(self, bad: Tensor) -> None:
        """Takes note of one update; `bad` is a scalar of bool on the device."""
        self._in_a_row = (self._in_a_row + 1) * bad
        self._all += bad

    def look(self) -> tuple[int, int]:
        """Updates skipped in a row up to now, and in all; waits for the device."""
        in_a_row, skipped = torch.stack([self._in_a_row, self._all]).tolist()
        return in_a_row, skipped

    def begin(self, skipped: int) -> None:
        """Goes on with a count of all skips."""
        self._all = torch.full_like(self._all, skipped)

    def forgive(self) -> None:
        """Begins a new row of skips, after a rollback."""
        self._in_a_row = torch.zeros_like(self._in_a_row)


class Alarms:
    """Sentences about an adversary or a codebook that has stopped being of use.

    Each is told once until it mends.

    Args:
        config: of the adversary, if there is one.
        bottleneck: of the run.
    """

    def __init__(self, config: AdversaryConfig | None, bottleneck: AnyBottleneck) -> None:
        self.config, self.bottleneck = config, bottleneck
        self._rows: dict[str, int] = {}

    def check(self, row: dict[str, float], step: int) -> list[str]:
        """The alarms that a row of the log gives; none of the adversary before it is heard.

        Args:
            step: of the row.
            row: means of the terms since the last row; `d_accuracy` and `code_usage` in [0, 1],
                `adaptive_weight` in LDM's units.
        """
        return self._of_codes(row) + self._of_adversary(row, step)

    def _of_codes(self, row: dict[str, float]) -> list[str]:
        usage = row.get("code_usage")
        if usage is None:
            return []
        kind, remedy = self.bottleneck.kind, "try fewer levels or a larger batch"
        if kind == "lfq":
            remedy = "try a larger bottleneck.entropy or fewer bits"
        elif kind == "vq":
            remedy = "try bottleneck.kmeans=true, bottleneck.normalized=true or a smaller codebook"
            if not self.bottleneck.revive_after:  # pyright: ignore[reportAttributeAccessIssue]
                remedy = "set bottleneck.revive_after=100, which moves unused entries onto latents"
        told = f"only {usage:.1%} of the codes were used lately: {remedy}"
        return self._told("usage", usage < _LEAST_USAGE, told)

    def _of_adversary(self, row: dict[str, float], step: int) -> list[str]:
        if self.config is None or step <= self.config.start:
            return []
        accuracy, weight = row.get("d_accuracy"), row.get("adaptive_weight")
        sentences = []
        if accuracy is not None:
            sentences += self._told(
                "accuracy high",
                accuracy > _ACCURACY[1],
                f"the discriminator is right in {accuracy:.0%} of its verdicts and teaches little: "
                "try adversary.lecam=0.001, adversary.r1=1 or a lower adversary.learning_rate",
            )
            sentences += self._told(
                "accuracy low",
                accuracy < _ACCURACY[0],
                f"the discriminator is right in {accuracy:.0%} of its verdicts, worse than guessing"
                ": try a higher adversary.learning_rate or more adversary.warmup_steps",
            )
        if weight is not None:
            sentences += self._told(
                "weight high",
                weight >= 0.99 * self.config.adaptive_max,
                f"the adaptive weight stands at its maximum of {self.config.adaptive_max:g}: the "
                "discriminator's gradient has vanished",
            )
            sentences += self._told(
                "weight low",
                weight < _SMALLEST_ADAPTIVE,
                f"the adaptive weight is {weight:.2g}: the discriminator's gradient is far steeper "
                "than the reconstruction's; try adversary.spectral_norm=true or adversary.r1=1",
            )
        return sentences

    def _told(self, name: str, on: bool, sentence: str) -> list[str]:
        self._rows[name] = self._rows.get(name, 0) + 1 if on else 0
        return [sentence] if self._rows[name] == _ROWS else []
