"""Packages: a model's files, its card, and the manifest that names each of them. Read by their name, and verified."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.core.contracts import Base
from forge.core.errors import ForgeError
from forge.core.settings import Settings, path_of
from forge.registry.mlflow_registry import CHAMPION, PACKAGE_DIGEST, find_champion, open_registry
from forge.registry.signature import check_signature
from forge.storage import Store
from forge.storage.manifest import SIGNATURE, verify

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
DIGEST = re.compile(r"sha256-([0-9a-f]{64})")
PACKAGE = re.compile(r".+://.+/models/[^/]+/sha256-[0-9a-f]{64}")
ADAPTER = "adapter"  # the kind of a package that stands on its base; of any other, the kind is model


def fetch_package(model_uri: str, settings: Settings, store: Store) -> Path:
    """The verified local directory of a package; safe to call from many processes at once.

    `model_uri` is models:/name@alias, models:/name/version, or the package's own URI. ForgeError, naming the file,
    where anything differs from what was published, or the URI leads to no package.
    """
    uri, digest = resolve(model_uri, settings)
    return open_package(uri, digest, settings, store)[0]


def resolve(model_uri: str, settings: Settings) -> tuple[str, str]:
    """The URI and the digest of the package that a model's URI names; ForgeError where there is none."""
    if model_uri.startswith("models:/"):
        found = find_registered_version(model_uri, settings)
        uri = found.source or ""
        digest = found.tags.get(PACKAGE_DIGEST, "")
    else:
        uri, digest = model_uri.rstrip("/"), ""
    named = DIGEST.fullmatch(uri.rpartition("/")[2])
    if named is None or digest not in ("", named.group(1)):
        raise ForgeError(f"{model_uri}: {uri or 'nothing'} is not a package of this digest; register the model again")
    return uri, named.group(1)


def find_registered_version(model_uri: str, settings: Settings) -> "ModelVersion":
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


def is_registered(location: str) -> bool:
    """Whether a base model is named as one of the registry: models:/..., or a package's URI."""
    return location.startswith("models:/") or PACKAGE.fullmatch(location) is not None


def registered_base(model_uri: str, revision: str, settings: Settings, store: Store) -> Base:
    """A registered model to start training from, verified: its package's URI and digest.

    ForgeError where there is none, it is damaged or an adapter, or its digest is not `revision` ("" for any).
    """
    parts = MODEL_URI.fullmatch(model_uri)
    if parts and parts["alias"] == CHAMPION and find_champion(open_registry(settings), parts["name"]) is None:
        raise ForgeError(
            f"base model {model_uri}: {parts['name']} has no champion yet; train one first, with model.architecture or "
            "with a model.base that is a directory or a model id of the hub"
        )
    try:
        uri, digest = resolve(model_uri, settings)
        _, manifest = open_package(uri, digest, settings, store)
    except ForgeError as error:
        raise ForgeError(f"base model {model_uri}: {error.message.removeprefix(f'{model_uri}: ')}") from None
    if manifest.get("kind") == ADAPTER:
        instead = version_named(manifest["base"]["location"], settings)
        raise ForgeError(
            f"base model {model_uri}: {version_named(uri, settings)} is an adapter, and training starts from whole "
            f"weights; name its base instead: {instead}"
        )
    if revision not in ("", digest):
        raise ForgeError(f"base model {model_uri}: its digest is {digest}, and model.revision is {revision}")
    return Base(location=uri, revision=digest)


@dataclass(frozen=True)
class LocalBase:
    """A base as this machine opens it: a directory, or a model id of the hub and its revision."""

    location: str = ""
    revision: str = ""


def local_base(base: Base, settings: Settings, store: Store) -> LocalBase:
    """A base as it can be opened: a package is fetched and verified. ForgeError where it is gone or damaged."""
    if PACKAGE.fullmatch(base.location):
        directory = open_package(base.location, base.revision, settings, store)[0]
    elif found := directory_of(base.location):
        directory = found
    elif "://" in base.location:  # in the store
        directory = store.path(base.location)
    else:
        return LocalBase(base.location, base.revision)
    return LocalBase(str(directory))  # without the digest, which is no revision that the hub knows


def directory_of(location: str) -> Path | None:
    """The directory that a base's location names by a file:// URI, or by its path as older manifests do; else None."""
    if location.startswith("file://"):
        return path_of(location)
    return Path(location) if location.startswith("/") else None


def portable_name(base: Base) -> str:
    """What names a base on every machine: the hub's id, a package's key in the store, or "" for a directory."""
    if PACKAGE.fullmatch(base.location):
        return "/".join(base.location.split("/")[-3:])
    return "" if directory_of(base.location) or Path(base.location).is_dir() else base.location


def version_named(location: str, settings: Settings) -> str:
    """A base's location as people name it: models:/name/3 for a package of a registered version, any other as it is."""
    if PACKAGE.fullmatch(location) is None:
        return location
    name, digest = location.split("/")[-2:]
    wanted = f"name = '{name}' and tags.{PACKAGE_DIGEST} = '{digest.removeprefix('sha256-')}'"
    found = open_registry(settings).search_model_versions(wanted)
    return f"models:/{name}/{found[0].version}" if found else location
