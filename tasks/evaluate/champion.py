"""The champion's package: found, and verified before anything is compared with it."""

import json
import logging
from pathlib import Path
from typing import Any

from forge.core.contracts import Base, Champion, Model
from forge.core.digest import digest_directory, digest_json
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

MEND = "put it back, or take the alias champion from the version in MLflow, to start without one"


def champion_to_compare(name: str, model: Model, store: Store, settings: Settings) -> Champion:
    """The champion that a model is compared with, `Champion()` where there is none.

    A model that is the champion already is compared with the one that it was compared with when it was registered, if
    that is still there: so its evaluation is the same one before and after its promotion, and is not made again.
    """
    client = open_registry(settings)
    with translate_mlflow_errors(f"the champion of {name} cannot be read", settings):
        champion = find_champion(client, name)
        if champion is None:
            return Champion()
        tags = client.get_model_version(name, champion.version).tags
    if tags.get(MODEL_DIGEST) != model_digest(model, store):
        return champion
    card = store.part(store.uri(f"evaluations/sha256-{tags.get(EVALUATION, '')}"), "evaluation.json")
    if card is None:
        return champion
    before = Champion(**(json.loads(card)["champion"] or {}))
    try:
        if before.version:
            find_package(name, before, store)
    except ForgeError:  # removed by retention since
        return champion
    return before


def model_digest(model: Model, store: Store) -> str:
    """The digest of a trained model's files alone, by its manifest."""
    files = {entry["path"]: entry["sha256"] for entry in store.manifest(model.uri)["files"]}
    inside = {path.removeprefix("model/"): digest for path, digest in files.items() if path.startswith("model/")}
    return digest_json(dict(sorted(inside.items())))


def find_package(name: str, champion: Champion, store: Store) -> str:
    """The digest of the champion's package; ForgeError where it, or the package that it stands on, is not there."""
    try:
        manifest = store.manifest(champion.uri)
        if manifest.get("kind") == ADAPTER and is_registered(manifest["base"]["location"]):
            store.manifest(manifest["base"]["location"])
    except ForgeError as error:
        raise _told(name, champion, error) from None
    return champion.digest or str(manifest["digest"])


def champion_model(
    name: str, champion: Champion, candidate: str, store: Store, settings: Settings
) -> tuple[LocalBase, str] | None:
    """The champion as a whole model on this machine, its package verified file by file, and that model's digest.

    None where it is the candidate, which has the digest `candidate`.
    """
    digest = find_package(name, champion, store)
    try:
        package, manifest = open_package(champion.uri, digest, settings, store)
        model_digest = str(manifest.get("model_digest", digest))
        if model_digest == candidate:
            return None
        if manifest.get("kind") != ADAPTER:
            return LocalBase(str(package)), model_digest
        directory = merged_champion(package, manifest, settings, store)
    except ForgeError as error:
        raise _told(name, champion, error) from None
    its_digest = str(read_manifest(str(directory), (directory / MANIFEST).read_bytes())["digest"])
    verify(directory, its_digest)  # whose message says to delete it, which makes it again
    if its_digest != model_digest:
        # What went into it is verified: other processors round, and other releases save, in another way.
        log.warning(
            f"version {champion.version}, merged on this machine, is not to the byte the model that was "
            f"registered (sha256 {its_digest[:12]} and not {model_digest[:12]}); its answers are kept apart"
        )
    return LocalBase(str(directory)), its_digest


def merged_champion(package: Path, manifest: dict[str, Any], settings: Settings, store: Store) -> Path:
    """An adapter's package as a whole model, made once on this machine and kept as copies of the store are.

    Raises ForgeError where its base is gone, or is not what it was.
    """
    location, revision = manifest["base"]["location"], manifest["base"]["revision"]
    folder = None if is_registered(location) else directory_of(location)

    def make(staged: Path) -> None:
        import torch  # preflight has no need of these

        from forge.models.weights import merge

        if folder is None:
            local = local_base(Base(location=location, revision=revision), settings, store)
        elif digest_directory(folder)[0] == revision:
            local = LocalBase(str(folder))
        else:
            raise ForgeError(f"its base {folder} is gone or was changed, and is not {revision} any more")
        merge(local, package, getattr(torch, manifest["dtype"]), staged)
        write_manifest(staged, {})

    copies = Copies(settings.home / "merged", int(settings.copies_gb * 1e9))
    return copies.get(f"sha256-{manifest['digest']}", make)


def _told(name: str, champion: Champion, error: ForgeError) -> ForgeError:
    reason, _, _ = error.message.partition("; ")
    return ForgeError(f"champion {name} version {champion.version}: {reason}; {MEND}")
