"""An autoencoder on the Hugging Face hub, with a card made of what was measured."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from latent_ae.autoencoder import (
    WEIGHTS_FILE,
    load_network,
    only_variant,
    stored_variants,
    weights_sha256,
)
from latent_ae.errors import UserError
from latent_ae.evaluation import Evaluation
from latent_ae.export.card import model_card, without_paths
from latent_ae.folders import require_free, whole_folder
from latent_ae.stock_vq import CODE_FILE

__all__ = ["prepare_upload", "push_to_hub"]

_STEM = WEIGHTS_FILE.removesuffix(".safetensors")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_UNREACHABLE = (ConnectionError, TimeoutError, OfflineModeIsEnabled)


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    evaluation: str | Path | None = None,
    license_name: str | None = None,
    pictures: int = 4,
    private: bool | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Uploads an autoencoder with its card; what was made ready stays where the hub fails.

    Args:
        folder: an exported folder, or any of diffusers' that `load_network` loads.
        repo_id: `name` or `user/name`; made where it does not exist.
        evaluation: see `prepare_upload`, as are the next two.
        license_name: for the card.
        pictures: how many to show.
        private: whether a new repository is.
        token: of the hub; the one of `hf auth login` when left out.
        endpoint: another hub.

    Returns:
        The address of the commit.

    Raises:
        UserError: something does not fit, or the hub does not take it.
    """
    folder = Path(folder).resolve()
    ready = folder.with_name(f"{folder.name}-upload")
    if (ready / "README.md").is_file() and (ready / "config.json").is_file():
        shutil.rmtree(ready)  # an earlier attempt's
    prepare_upload(
        folder,
        ready,
        repo_id,
        evaluation=evaluation,
        license_name=license_name,
        pictures=pictures,
    )
    hint = f"it is ready in {ready}; later: hf upload {repo_id} {ready}"
    api = HfApi(endpoint=endpoint, token=token)
    try:
        full = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        card = ready / "README.md"  # a bare name has got its owner only now
        card.write_text(card.read_text().replace(f'("{repo_id}")', f'("{full}")'))
        commit = api.upload_folder(
            repo_id=full, folder_path=ready, commit_message="Upload an autoencoder of latent_ae"
        )
    except HfHubHTTPError as error:
        raise UserError(f"the hub refused it: {str(error).splitlines()[0]}; {hint}") from error
    except Exception as error:
        # Those of huggingface_hub's HTTP library, whichever it is, share no class with Python's.
        foreign = type(error).__module__.startswith(("httpx", "requests"))
        if not foreign and not isinstance(error, _UNREACHABLE):
            raise
        raise UserError(f"the hub cannot be reached ({type(error).__name__}); {hint}") from error
    shutil.rmtree(ready)
    return str(commit.commit_url)


def prepare_upload(
    folder: str | Path,
    out: str | Path,
    repo_id: str,
    *,
    evaluation: str | Path | None = None,
    license_name: str | None = None,
    pictures: int = 4,
) -> Path:
    """Writes a folder that can be uploaded as it is: weights, config, card, pictures.

    Args:
        folder: an exported folder, or any of diffusers' that `load_network` loads.
        out: the folder to make; must not exist yet.
        repo_id: what the card tells people to load.
        evaluation: what `latent-ae evaluate --out` wrote of the same weights; its numbers, protocol
            and first pictures go into the card.
        license_name: the hub's identifier, such as `apache-2.0`; left out, the one of the export.
        pictures: how many of the evaluation's pictures the card shows.

    Returns:
        `out`.

    Raises:
        UserError: the folder is no autoencoder, the evaluation is of other weights, `out` exists.
    """
    folder, out = Path(folder).resolve(), Path(out).absolute()
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} cannot be a repository's name: {error}") from error
    require_free(out)
    config, record = _read(folder)
    load_network(folder)  # whoever downloads it must be able to
    license_id = (license_name or str(record.get("license", "unknown"))).lower()
    if not _LICENSE.fullmatch(license_id):
        raise UserError(
            f"license {license_id!r} is no identifier of the hub's, such as apache-2.0 or mit"
        )
    record = without_paths(record)
    measured = _evaluation_of(folder, evaluation)
    with whole_folder(out) as aside:
        for file in _files(folder):
            shutil.copyfile(file, aside / file.name)
        if record:
            (aside / "latent_ae.json").write_text(json.dumps(record, indent=2) + "\n")
        shown = _copy_pictures(evaluation, aside, pictures)
        card = model_card(
            config,
            record,
            license_id,
            name=repo_id,
            variants=[] if only_variant(folder) else stored_variants(folder),
            evaluation=measured,
            pictures=shown,
        )
        (aside / "README.md").write_text(card, encoding="utf-8")
    return out


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and latent_ae.json, which other people's folders do not have."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        record = folder / "latent_ae.json"
        content = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no exported autoencoder: {error}") from error
    if not isinstance(config, dict) or not isinstance(content, dict):
        raise UserError(f"{folder} has a config.json or latent_ae.json that is no JSON object")
    return config, content


def _evaluation_of(folder: Path, evaluation: str | Path | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    content = Evaluation.load(evaluation).to_json()
    if content["model"]["weights_sha256"] != weights_sha256(folder):
        raise UserError(
            f"the evaluation in {evaluation} is of other weights than those in {folder}: run "
            "`latent-ae evaluate` on this folder"
        )
    return content


def _files(folder: Path) -> list[Path]:
    """What diffusers reads, with the code of a quantiser, and the discriminator."""
    weights = [*folder.glob(f"{_STEM}*.safetensors"), *folder.glob(f"{_STEM}*.index*.json")]
    extra = [folder / "discriminator.safetensors", folder / CODE_FILE]
    return [folder / "config.json", *weights, *(file for file in extra if file.is_file())]


def _copy_pictures(
    evaluation: str | Path | None, out: Path, count: int
) -> Sequence[tuple[str, str]]:
    if evaluation is None:
        return ()
    pairs = []
    for before in sorted((Path(evaluation) / "pictures").glob("shown-*-input.*"))[:count]:
        after = before.with_name(before.name.replace("-input", "-reconstruction"))
        (out / "pictures").mkdir(exist_ok=True)
        for file in (before, after):
            shutil.copyfile(file, out / "pictures" / file.name)
        pairs.append((f"pictures/{before.name}", f"pictures/{after.name}"))
    return pairs
