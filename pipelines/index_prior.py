"""Pictures from a prior over codes: sampling, and the folder of prior and autoencoder.

prior = IndexPrior.from_pretrained("runs/prior")
pictures = prior([3, 3, 7], guidance_scale=1.5, seed=0)  # uint8 of shape (3, C, H, W)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from denoiser_examples import mix
from index_prior_config import llama
from index_prior_tokens import Vocabulary, require_known
from latent_ae.data import to_uint8
from latent_ae.errors import UserError
from latent_ae.frozen import FrozenAutoencoder

__all__ = ["RECORD", "IndexPrior", "noise_of", "sample"]

RECORD = "index_prior.json"  # in the saved folder
FORMAT = "latent_ae/index_prior"


def noise_of(vocabulary: Vocabulary, count: int, seed: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), float64 of shape (count, length): each row makes one picture.

    Row i is the same for every count, device and batch.
    """
    rows = [
        torch.rand(
            vocabulary.length,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(mix(seed, row)),
        )
        for row in range(count)
    ]
    return torch.stack(rows) if rows else torch.empty(0, vocabulary.length, dtype=torch.float64)


@torch.no_grad()
def sample(
    prior: Any,
    vocabulary: Vocabulary,
    labels: Tensor,
    noise: Tensor,
    *,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Codes of shape (B, codes, h, w), one after another, with transformers' `generate`.

    Guidance (Ho & Salimans 2022) comes first: u + scale · (c − u) of the log-probabilities with and
    without the class; then temperature, top-k and top-p.

    Args:
        prior: a `LlamaForCausalLM`.
        vocabulary: its tokens.
        labels: of shape (B,); −1 for no class.
        noise: what `noise_of` gives, (B, length); it decides the codes.
        guidance_scale: 1 for none.
        temperature: divides the logits; 0 takes the likeliest code.
        top_k: draw among as many; 0 for all.
        top_p: draw among the likeliest that together have this probability.
    """
    from transformers import GenerationConfig, LogitsProcessorList
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    begin = vocabulary.class_tokens(labels).to(prior.device)
    # `generate` guides before it calls these.
    steps: list[Any] = [_Slot(vocabulary)]
    if temperature > 0:
        steps += [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
        steps += [TopKLogitsWarper(min(top_k, vocabulary.size))] if top_k else []
        steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        steps.append(_Draw(noise.to(prior.device)))
    config = GenerationConfig(
        max_new_tokens=vocabulary.length,
        do_sample=False,  # `_Draw` leaves one
        guidance_scale=guidance_scale,
        pad_token_id=vocabulary.null,
    )
    guiding: dict[str, Any] = {}
    if guidance_scale != 1:
        guiding["negative_prompt_ids"] = torch.full_like(begin, vocabulary.null)
        guiding["negative_prompt_attention_mask"] = torch.ones_like(begin)
    found = prior.generate(
        begin,
        attention_mask=torch.ones_like(begin),
        generation_config=config,
        logits_processor=LogitsProcessorList(steps),
        **guiding,
    )
    return vocabulary.indices(found[:, 1:])


class _Slot:
    """Leaves the codes that can stand at a place."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        size = self.vocabulary.size
        first = size * ((input_ids.shape[1] - 1) % self.vocabulary.codes)
        kept = torch.full_like(scores, -torch.inf)
        kept[:, first : first + size] = scores[:, first : first + size]
        return kept


class _Draw:
    """Leaves the code at which the distribution function passes a picture's uniform number.

    `generate` would draw from torch's global generator, for the whole batch at once.
    """

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        below = scores.double().softmax(-1).cumsum(-1)
        below = below / below[:, -1:]  # 1 at the end, which no noise reaches
        number = self.noise[:, input_ids.shape[1] - 1, None]
        drawn = torch.searchsorted(below, number.contiguous(), right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars that transformers draws for a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class IndexPrior:
    """A prior and the autoencoder whose codes it knows.

    Args:
        prior: a `LlamaForCausalLM`.
        autoencoder: with the codebook of the latents that the prior has learned from.
        vocabulary: the prior's tokens.
        label_names: of the classes, or none.
        null_class: whether the prior has learned pictures without their class, too.
    """

    def __init__(
        self,
        prior: Any,
        autoencoder: FrozenAutoencoder,
        vocabulary: Vocabulary,
        label_names: Sequence[str] = (),
        null_class: bool = True,
    ) -> None:
        self.prior, self.autoencoder, self.vocabulary = prior.eval(), autoencoder, vocabulary
        self.label_names, self.null_class = list(label_names), null_class

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | None = None) -> IndexPrior:
        """Loads a folder that `save` wrote.

        Raises:
            UserError: there is none, or its parts do not belong together.
        """
        folder, (_, network) = Path(folder), llama()
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise UserError(f"{folder / RECORD} has the format {record['format']!r}")
            vocabulary = Vocabulary(**record["vocabulary"])
            names, codebook = record["label_names"], record["codebook_sha256"]
            null_class = bool(record["null_class"])
        except FileNotFoundError as error:
            raise UserError(f"{folder} holds no prior over codes: it has no {RECORD}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / RECORD} is damaged: {error}") from error
        autoencoder = FrozenAutoencoder(folder / "autoencoder", device)
        if autoencoder.codebook_sha256 != codebook:
            raise UserError(
                f"the autoencoder in {folder / 'autoencoder'} has another codebook than the prior "
                "has learned from"
            )
        try:
            with _quiet():
                prior, told = network.from_pretrained(
                    folder / "prior", use_safetensors=True, output_loading_info=True
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"transformers cannot load {folder / 'prior'}: {error}") from error
        if missing := sorted(told["missing_keys"]):  # transformers would leave it random
            raise UserError(f"{folder / 'prior'} is damaged: it has no {missing[0]}")
        if prior.config.vocab_size != vocabulary.entries:
            raise UserError(
                f"the prior in {folder / 'prior'} has {prior.config.vocab_size} tokens, but "
                f"{RECORD} wants {vocabulary.entries}"
            )
        return cls(prior.to(autoencoder.device), autoencoder, vocabulary, names, null_class)

    def save(self, output: Path, facts: dict[str, Any]) -> None:
        """Writes the folder beside `output`, then takes its place.

        Args:
            output: where to; what is there gives way.
            facts: what else `index_prior.json` shall say.
        """
        output = output.absolute()
        aside, old = (
            output.with_name(f".{output.name}.{os.getpid()}.{end}") for end in ("tmp", "old")
        )
        with _quiet():
            self.prior.save_pretrained(aside / "prior")
        shutil.copytree(self.autoencoder.path, aside / "autoencoder")
        record = {
            "format": FORMAT,
            "vocabulary": asdict(self.vocabulary),
            "label_names": self.label_names,
            "null_class": self.null_class,
            "codebook_sha256": self.autoencoder.codebook_sha256,
        }
        (aside / RECORD).write_text(json.dumps(record | facts, indent=2) + "\n", encoding="utf-8")
        if output.exists():
            output.rename(old)
        aside.rename(output)
        shutil.rmtree(old, ignore_errors=True)

    def label_of(self, name: str) -> int:
        """The number of a class by its name or its number.

        Raises:
            UserError: there is no such class.
        """
        if name in self.label_names:
            return self.label_names.index(name)
        try:
            label = int(name)
        except ValueError:
            label = -1
        if label < 0:
            known = ", ".join(self.label_names[:20]) or "the classes have no names"
            raise UserError(f"class {name!r} is unknown: {known}")
        require_known([label], self.vocabulary)
        return label

    def __call__(
        self, labels: Sequence[int], *, seed: int = 0, batch_size: int = 64, **options: float
    ) -> Tensor:
        """Pictures, uint8 of shape (B, C, H, W).

        Args:
            labels: the class of each; −1 for none.
            seed: the same gives the same pictures, whatever the batch.
            batch_size: pictures drawn at once.
            options: of `sample`.

        Raises:
            UserError: a class that there is not.
        """
        codes = self.codes(labels, seed=seed, batch_size=batch_size, **options)
        return torch.cat([self.decode(some) for some in codes.split(batch_size)])

    def codes(
        self, labels: Sequence[int], *, seed: int = 0, batch_size: int = 64, **options: Any
    ) -> Tensor:
        """Codes of shape (B, codes, h, w); the arguments are those of a call."""
        require_known(list(labels), self.vocabulary)
        guided = options.get("guidance_scale", 1) != 1
        if guided and not self.vocabulary.classes:
            raise UserError("a guidance scale takes classes, and this prior knows none")
        if not self.null_class and (guided or -1 in labels):
            raise UserError(
                "guidance, and pictures of no class, take a prior that was trained with a "
                "--label-dropout above 0"
            )
        noise = noise_of(self.vocabulary, len(labels), seed)
        parts = zip(torch.tensor(labels).split(batch_size), noise.split(batch_size), strict=True)
        return torch.cat([sample(self.prior, self.vocabulary, *part, **options) for part in parts])

    def decode(self, indices: Tensor) -> Tensor:
        """Pictures, uint8 of shape (B, C, H, W), of codes of shape (B, codes, h, w)."""
        return to_uint8(self.autoencoder.decode_indices(indices)).cpu()
