"""The folders around a prior's training: latents of codes, their autoencoder, and the output."""

from __future__ import annotations

from pathlib import Path

from index_prior import RECORD
from index_prior_tokens import Vocabulary
from latent_ae.errors import UserError
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.latents import LatentDataset, LatentsManifest
from latent_ae.latents.entries import check_codebook
from training_parts import check_parent

__all__ = ["check_output", "open_autoencoder", "open_codes", "require_alike", "vocabulary_of"]


def open_codes(folder: str | Path) -> LatentDataset:
    """A latents folder of indices.

    Raises:
        UserError: it cannot be read, holds something else, or codes of several sizes, or none.
    """
    data = LatentDataset(folder, columns=("label",))
    kind = data.manifest.storage.kind
    if kind != "indices":
        raise UserError(
            f"{folder} holds {kind}, and a prior over codes takes indices: encode with "
            "--store indices, by an autoencoder that has a codebook"
        )
    if len(data.manifest.latent_shapes) != 1:
        raise UserError(
            f"{folder} holds codes of {len(data.manifest.latent_shapes)} sizes (buckets), and a "
            "prior learns pictures of one: encode with one --resolution"
        )
    if not len(data):
        raise UserError(f"{folder} holds no codes")
    return data


def open_autoencoder(folder: Path, data: LatentDataset) -> FrozenAutoencoder:
    """The autoencoder that made the codes, on the CPU, or one with its codebook.

    Raises:
        UserError: it is not there, has no codebook, or another one.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"the latents' autoencoder is not at {folder}: say where by --autoencoder")
    autoencoder = FrozenAutoencoder(folder, "cpu")
    if not autoencoder.quantizes:
        raise UserError(f"{folder} holds a {autoencoder.class_name}, which has no codebook")
    check_codebook(autoencoder.codebook_sha256, folder, data.folder, data.manifest)
    return autoencoder


def vocabulary_of(
    data: LatentDataset, autoencoder: FrozenAutoencoder, *, labels: bool
) -> Vocabulary:
    """The tokens of a folder's codes and, if asked for, classes.

    Raises:
        UserError: there are too many.
    """
    height, width = data.manifest.latent_shape[-2:]
    classes = data.manifest.num_classes if labels else 0
    return Vocabulary(autoencoder.codebook_size, autoencoder.codes, height, width, classes)


def require_alike(held_out: LatentDataset, data: LatentDataset) -> None:
    """Raises `UserError` unless two folders hold codes of one codebook, size and set of classes."""
    made_by = [folder.manifest.autoencoder for folder in (held_out, data)]
    # Latents of an older version name the whole autoencoder alone.
    by = "codebook_sha256" if all(one.codebook_sha256 for one in made_by) else "weights_sha256"

    def facts(manifest: LatentsManifest) -> dict[str, object]:
        return {
            "codebook": getattr(manifest.autoencoder, by),
            "size": manifest.latent_shape[-2:],
            "set of classes": (manifest.num_classes, tuple(manifest.label_names)),
        }

    theirs, ours = facts(held_out.manifest), facts(data.manifest)
    for name, value in ours.items():
        if theirs[name] != value:
            raise UserError(
                f"the held-out codes in {held_out.folder} have another {name} than those in "
                f"{data.folder}"
            )


def check_output(output: Path) -> None:
    """Raises `UserError` unless a prior can be written there, or over one that is there."""
    check_parent(output)
    if output.exists() and not (output / RECORD).is_file():
        raise UserError(
            f"{output} is there already and is no prior over codes: choose another output"
        )
