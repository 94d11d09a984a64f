"""The champion for a comparison: found in the registry, and its package verified file by file."""

import json
import logging
from pathlib import Path
from typing import Any

from forge.core.contracts import Base, Champion, Model
from forge.core.digest import digest_json, digest_model
from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.registry.mlflow_registry import (
    EVALUATION,
    MODEL_DIGEST,
    find_champion,
    open_registry,
    translate_mlflow_errors,
)
from forge.registry.packages import ADAPTER, LocalBase, directory_of, is_registered, local_base, open_package
from forge.storage import Store
from forge.storage.local_copies import Copies
from forge.storage.manifest import MANIFEST, read_manifest, verify, write_manifest

log = logging.getLogger(__name__)

FIX = "restore it, or remove the alias champion from the version in MLflow to start without a champion"


def champion_to_compare(name: str, model: Model, store: Store, settings: Settings) -> Champion:
    """The champion that a model is compared with, `Champion()` if there is none.

    A model that is the champion itself is compared with the champion it was compared with when it was registered, if
    that still exists. So its evaluation has the same inputs before and after its promotion, and is not repeated.
    """
    client = open_registry(settings)
    with translate_mlflow_errors(f"the champion of {name} cannot be read", settings):
        champion = find_champion(client, name)
        if champion is None:
            return Champion()
        tags = client.get_model_version(name, champion.version).tags
    if tags.get(MODEL_DIGEST) != model_digest(model, store):
        return champion
    previous = _champion_at_registration(tags.get(EVALUATION, ""), store)
    if previous is None or (previous.version and not _exists(name, previous, store)):
        return champion
    return previous


def _champion_at_registration(evaluation: str, store: Store) -> Champion | None:
    """The champion in the card of an evaluation, `Champion()` if it had none; None if the evaluation is missing."""
    card = store.part(store.uri(f"evaluations/sha256-{evaluation}"), "evaluation.json")
    return None if card is None else Champion(**(json.loads(card)["champion"] or {}))


def _exists(name: str, champion: Champion, store: Store) -> bool:
    try:
        find_package(name, champion, store)
    except ForgeError:  # pruned since
        return False
    return True


def model_digest(model: Model, store: Store) -> str:
    """The digest of a trained model's files alone, from its manifest."""
    files = {entry["path"]: entry["sha256"] for entry in store.manifest(model.uri)["files"]}
    inside = {path.removeprefix("model/"): digest for path, digest in files.items() if path.startswith("model/")}
    return digest_json(dict(sorted(inside.items())))


def find_package(name: str, champion: Champion, store: Store) -> str:
    """The digest of the champion's package. ForgeError if the package, or the base of an adapter, is missing."""
    try:
        manifest = store.manifest(champion.uri)
        location = manifest["base"]["location"] if manifest.get("kind") == ADAPTER else ""
        if is_registered(location):
            store.manifest(location)
        elif (folder := directory_of(location)) and not folder.is_dir():
            raise ForgeError(f"its base {folder} is missing")
    except ForgeError as error:
        raise _champion_error(name, champion, error) from None
    return champion.digest or str(manifest["digest"])


def champion_model(
    name: str, champion: Champion, candidate: str, store: Store, settings: Settings
) -> tuple[LocalBase, str] | None:
    """The champion as a whole model on this machine, and that model's digest; None if it is the candidate itself.

    `candidate` is the candidate's digest. Raises ForgeError if the package is missing or damaged.
    """
    digest = find_package(name, champion, store)
    try:
        package, manifest = open_package(champion.uri, digest, settings, store)
        registered = str(manifest.get("model_digest", digest))
        if registered == candidate:
            return None
        if manifest.get("kind") != ADAPTER:
            return LocalBase(str(package)), registered
        merged = merged_champion(package, manifest, settings, store)
    except ForgeError as error:
        raise _champion_error(name, champion, error) from None
    return LocalBase(str(merged)), _merged_digest(merged, champion, registered)


def _merged_digest(directory: Path, champion: Champion, registered: str) -> str:
    """The digest of a merged model, verified against its manifest. Logs a warning if it was registered with another."""
    digest = str(read_manifest(str(directory), (directory / MANIFEST).read_bytes())["digest"])
    verify(directory, digest)
    if digest != registered:
        # The adapter and its base are verified; rounding depends on the processor, and the files on library releases.
        log.warning(
            f"version {champion.version}, merged on this machine, is not identical to the registered model (sha256 "
            f"{digest[:12]} instead of {registered[:12]}); its answers are cached separately"
        )
    return digest


def merged_champion(package: Path, manifest: dict[str, Any], settings: Settings, store: Store) -> Path:
    """An adapter's package merged into its base, as a directory that is kept on this machine.

    Raises ForgeError if the base is missing or has changed.
    """
    location, revision = manifest["base"]["location"], manifest["base"]["revision"]
    folder = None if is_registered(location) else directory_of(location)

    def build(staged: Path) -> None:
        import torch  # preflight imports this module, and needs neither of these

        from forge.models.weights import merge

        if folder is None:
            base = local_base(Base(location=location, revision=revision), settings, store)
        elif digest_model(folder) == revision:
            base = LocalBase(str(folder))
        else:
            raise ForgeError(f"its base {folder} is missing or has changed, its digest is no longer {revision}")
        merge(base, package, getattr(torch, manifest["dtype"]), staged)
        write_manifest(staged, {})

    copies = Copies(settings.home / "merged", int(settings.copies_gb * 1e9))
    return copies.get(f"sha256-{manifest['digest']}", build)


def _champion_error(name: str, champion: Champion, error: ForgeError) -> ForgeError:
    where = f"champion {name} version {champion.version}" + (f": {error.where}" if error.where else "")
    return ForgeError(error.what, where=where, fix=FIX)
