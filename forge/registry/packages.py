"""Packages: a model's files, its card, and a manifest that lists them. Found by name, and verified when read."""

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
ADAPTER = "adapter"  # the kind of a package that needs its base; the kind of any other is "model"


def fetch_package(model_uri: str, settings: Settings, store: Store) -> Path:
    """The verified local directory of a package. Many processes may call this concurrently.

    `model_uri` is models:/name@alias, models:/name/version, or the package's own URI. Raises ForgeError if it is not a
    package, or if a file differs from the published one, which the error names.
    """
    uri, digest = resolve(model_uri, settings)
    return open_package(uri, digest, settings, store)[0]


def resolve(model_uri: str, settings: Settings) -> tuple[str, str]:
    """The URI and the digest of the package of a model URI; raises ForgeError if there is none."""
    if model_uri.startswith("models:/"):
        found = find_registered_version(model_uri, settings)
        uri = found.source or ""
        digest = found.tags.get(PACKAGE_DIGEST, "")
    else:
        uri, digest = model_uri.rstrip("/"), ""
    named = DIGEST.fullmatch(uri.rpartition("/")[2])
    if named is None or digest not in ("", named.group(1)):
        raise ForgeError(
            f"{uri or 'nothing'} is not a package of this digest", where=model_uri, fix="register the model again"
        )
    return uri, named.group(1)


def find_registered_version(model_uri: str, settings: Settings) -> "ModelVersion":
    """The registered version of models:/name@alias or models:/name/version; raises ForgeError if there is none."""
    from mlflow.exceptions import MlflowException

    parts = MODEL_URI.fullmatch(model_uri)
    if parts is None:
        raise ForgeError(
            "is not the URI of a model",
            where=model_uri,
            fix="write it as models:/name@champion, models:/name/3, or a package's own URI",
        )
    client = open_registry(settings)
    try:
        if parts["alias"]:
            return client.get_model_version_by_alias(parts["name"], parts["alias"])
        return client.get_model_version(parts["name"], parts["version"])
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise ForgeError(
            f"no such version ({reason})", where=model_uri, fix=f"see forge history --name {parts['name']}"
        ) from None


def signature_of(uri: str, store: Store) -> bytes | None:
    """A package's signature, or None."""
    return store.read("/".join([*uri.split("/")[-3:], SIGNATURE]))


def open_package(uri: str, digest: str, settings: Settings, store: Store) -> tuple[Path, dict[str, Any]]:
    """A package's local directory and manifest. All files are verified, and the signature if there is a verify key."""
    directory = store.path(uri)
    manifest = verify(directory, digest)
    name = uri.split("/")[-2]
    if manifest.get("name", name) != name:
        raise ForgeError(
            f"its manifest is that of {manifest['name']}", where=f"package {uri}", fix="delete it and register again"
        )
    if settings.verify_key is not None:
        check_signature(directory, signature_of(uri, store), settings)  # a copy may be older than the signature
    return directory, manifest


def is_registered(location: str) -> bool:
    """Whether a base model is one of the registry: models:/..., or a package's URI."""
    return location.startswith("models:/") or PACKAGE.fullmatch(location) is not None


def registered_base(model_uri: str, revision: str, settings: Settings, store: Store) -> Base:
    """The URI and digest of a registered model to start training from, verified.

    Raises ForgeError if there is none, if it is damaged or an adapter, or if its digest is not `revision` ("": any).
    """
    where = f"base model {model_uri}"
    parts = MODEL_URI.fullmatch(model_uri)
    if parts and parts["alias"] == CHAMPION and find_champion(open_registry(settings), parts["name"]) is None:
        raise ForgeError(
            f"{parts['name']} has no champion yet",
            where=where,
            fix="train one first, with model.architecture or with a model.base that is a directory or a Hub model ID",
        )
    try:
        uri, digest = resolve(model_uri, settings)
        _, manifest = open_package(uri, digest, settings, store)
    except ForgeError as error:
        what = error.what if error.where in ("", model_uri) else f"{error.where}: {error.what}"
        raise ForgeError(what, where=where, fix=error.fix) from None
    if manifest.get("kind") == ADAPTER:
        instead = version_named(manifest["base"]["location"], settings)
        raise ForgeError(
            f"{version_named(uri, settings)} is an adapter, and training starts from complete weights",
            where=where,
            fix=f"use its base instead: {instead}",
        )
    if revision not in ("", digest):
        raise ForgeError(f"its digest is {digest}, and model.revision is {revision}", where=where)
    return Base(location=uri, revision=digest)


@dataclass(frozen=True)
class LocalBase:
    """A base as this machine opens it: a directory, or a Hub model ID and its revision."""

    location: str = ""
    revision: str = ""


def local_base(base: Base, settings: Settings, store: Store) -> LocalBase:
    """A base that can be opened: a package is fetched and verified. Raises ForgeError if it is gone or damaged."""
    if PACKAGE.fullmatch(base.location):
        directory = open_package(base.location, base.revision, settings, store)[0]
    elif found := directory_of(base.location):
        directory = found
    elif "://" in base.location:  # in the store
        directory = store.path(base.location)
    else:
        return LocalBase(base.location, base.revision)
    return LocalBase(str(directory))  # the digest is not a revision of the Hub


def directory_of(location: str) -> Path | None:
    """The directory of a base's location, which is a file:// URI or, in older manifests, a path; else None."""
    if location.startswith("file://"):
        return path_of(location)
    return Path(location) if location.startswith("/") else None


def portable_name(base: Base) -> str:
    """A name for a base on every machine: a Hub model ID, a package's key in the store, or "" for a directory."""
    if PACKAGE.fullmatch(base.location):
        return "/".join(base.location.split("/")[-3:])
    return "" if directory_of(base.location) or Path(base.location).is_dir() else base.location


def version_named(location: str, settings: Settings) -> str:
    """A base's location for people: models:/name/3 for the package of a registered version, else the location."""
    if PACKAGE.fullmatch(location) is None:
        return location
    name, digest = location.split("/")[-2:]
    query = f"name = '{name}' and tags.{PACKAGE_DIGEST} = '{digest.removeprefix('sha256-')}'"
    found = open_registry(settings).search_model_versions(query)
    return f"models:/{name}/{found[0].version}" if found else location
