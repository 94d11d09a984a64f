"""Packages: a model's files, its card, and the manifest that names each of them. Read by their name, and verified."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import ForgeError
from tasks.registry import PACKAGE_DIGEST, open_registry
from tasks.settings import Settings
from tasks.signature import check_signature
from tasks.storage import Store
from tasks.storage.manifest import SIGNATURE, verify

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
DIGEST = re.compile(r"sha256-([0-9a-f]{64})")


def fetch(model_uri: str, settings: Settings, store: Store) -> Path:
    """The verified local directory of a package; safe to call from many processes at once.

    `model_uri` is models:/name@alias, models:/name/version, or the package's own URI. ForgeError, naming the file,
    where anything differs from what was published, or the URI leads to no package.
    """
    uri, digest = resolve(model_uri, settings)
    return open_package(uri, digest, settings, store)[0]


def resolve(model_uri: str, settings: Settings) -> tuple[str, str]:
    """The URI and the digest of the package that a model's URI names; ForgeError where there is none."""
    if model_uri.startswith("models:/"):
        found = find_version(model_uri, settings)
        uri = found.source or ""
        digest = found.tags.get(PACKAGE_DIGEST, "")
    else:
        uri, digest = model_uri.rstrip("/"), ""
    named = DIGEST.fullmatch(uri.rpartition("/")[2])
    if named is None or digest not in ("", named.group(1)):
        raise ForgeError(f"{model_uri}: {uri or 'nothing'} is not a package of this digest; register the model again")
    return uri, named.group(1)


def find_version(model_uri: str, settings: Settings) -> "ModelVersion":
    """The registered version that models:/name@alias or models:/name/version names; ForgeError where there is none."""
    from mlflow.exceptions import MlflowException

    parts = MODEL_URI.fullmatch(model_uri)
    if parts is None:
        raise ForgeError(f"{model_uri}: write it as models:/name@champion, models:/name/3, or a package's own URI")
    client = open_registry(settings)
    try:
        if parts["alias"]:
            return client.get_model_version_by_alias(parts["name"], parts["alias"])
        return client.get_model_version(parts["name"], parts["version"])
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise ForgeError(f"{model_uri}: no such version ({reason}); see history --name {parts['name']}") from None


def signature_of(uri: str, store: Store) -> bytes | None:
    """A package's signature, or None where it has none."""
    return store.read("/".join([*uri.split("/")[-3:], SIGNATURE]))


def open_package(uri: str, digest: str, settings: Settings, store: Store) -> tuple[Path, dict[str, Any]]:
    """A package's local directory and its manifest, every file verified, and the signature where a key is set."""
    directory = store.path(uri)
    manifest = verify(directory, digest)
    name = uri.split("/")[-2]
    if manifest.get("name", name) != name:
        raise ForgeError(f"package {uri}: its manifest is that of {manifest['name']}; remove it and register again")
    if settings.verify_key is not None:
        check_signature(directory, signature_of(uri, store), settings)  # the store's: it may be younger than a copy
    return directory, manifest
