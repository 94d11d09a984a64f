"""Pruning of the registry: old versions, packages without a version, and the remains of interrupted uploads."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from rich.table import Table

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.registry.mlflow_registry import open_registry, translate_mlflow_errors
from forge.registry.packages import ADAPTER, DIGEST
from forge.registry.promotion import promotions
from forge.storage import Store
from forge.storage.artifacts import StoredArtifact
from forge.storage.lease import lease
from tasks.register.history import aliases_of, names_of, versions_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

ABANDONED = timedelta(days=1)  # an upload that began earlier is no longer in progress


class Removal(NamedTuple):
    """A package to remove, the versions that refer to it, and why."""

    name: str
    versions: tuple[str, ...]
    package: StoredArtifact
    why: str


def prune(name: str, keep: int, days: float, apply: bool, settings: Settings, store: Store) -> list[Removal]:
    """Find packages that can be pruned, of one model or (if `name` is "") of all, and remove them with `apply`.

    These are kept: versions with an alias, the previous champion (the target of a rollback), the last `keep` versions,
    anything younger than `days`, and the bases of adapters that are kept. Can be repeated safely: a version is deleted
    before its package, so an interruption never leaves a version without a package.
    """
    client = open_registry(settings)
    with translate_mlflow_errors("pruning was interrupted", settings):
        registered = names_of(client)
        removals: list[Removal] = []
        for model in _models_to_prune(name, registered, store):
            # The leases keep others from registering or promoting a version of this model meanwhile.
            with lease(store, f"registration-{model}"), lease(store, f"promotion-{model}"):
                found = _find(client, model, model in registered, keep, timedelta(days=days), store)
                found = _without_bases(found, removals, store)
                removals += found
                if apply:
                    _remove(client, found, store)
        if apply:
            store.sweep("models", ABANDONED)
    return removals


def _models_to_prune(name: str, registered: set[str], store: Store) -> list[str]:
    """The model of this name, or all that are registered or have packages."""
    known = sorted(registered | {uri.split("/")[-2] for uri, *_ in store.artifacts("models")})
    if name and name not in known:
        raise ForgeError(f"there is no model {name}", where="prune", fix=f"there are: {', '.join(known)}")
    return [name] if name else known


def _find(
    client: "MlflowClient", name: str, registered: bool, keep: int, young: timedelta, store: Store
) -> list[Removal]:
    now = datetime.now(UTC)
    kept, prunable = _split_versions(client, name, registered, keep, now - young, store)
    removals = []
    for package in store.artifacts(f"models/{name}"):
        age, versions = now - package.modified, tuple(prunable.get(package.uri, ()))
        if package.uri in kept:
            continue
        if not package.whole:
            if age > max(young, ABANDONED):
                removals.append(Removal(name, versions, package, "incomplete upload"))
        elif versions:
            why = f"older than {young.days} days, not among the last {keep}"
            removals.append(Removal(name, versions, package, why))
        elif age > young:
            removals.append(Removal(name, (), package, "no version refers to it"))
    return removals


def _split_versions(
    client: "MlflowClient", name: str, registered: bool, keep: int, oldest: datetime, store: Store
) -> tuple[set[str], dict[str, list[str]]]:
    """The packages of versions that are kept, and those of other versions with the versions' numbers."""
    versions = versions_of(client, name) if registered else []
    history = promotions(store, name)
    if history and not versions:
        raise ForgeError(
            f"MLflow has no version of {name}, although {len(history)} promotions are recorded; nothing was removed",
            where="prune",
            fix="check FORGE_MLFLOW_URI, or delete the packages and the records of the promotions by hand",
        )
    named = aliases_of(client, name) if registered else {}
    previous = {history[-1].previous} if history else set()
    kept: set[str] = set()
    prunable: dict[str, list[str]] = {}
    for position, version in enumerate(versions):
        created = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC)
        number, source = str(version.version), version.source or ""
        if position < keep or number in named or number in previous or created > oldest:
            kept.add(source)
        else:
            prunable.setdefault(source, []).append(number)
    return kept, prunable


def _without_bases(found: list[Removal], earlier: list[Removal], store: Store) -> list[Removal]:
    """The removals without packages that are bases of adapters which are kept."""
    if not found:
        return []
    removed = {removal.package.uri for removal in [*earlier, *found]}
    kept = [store.manifest(one.uri) for one in store.artifacts("models") if one.whole and one.uri not in removed]
    bases = {_key(manifest["base"]["location"]) for manifest in kept if manifest.get("kind") == ADAPTER}
    return [removal for removal in found if _key(removal.package.uri) not in bases]


def _remove(client: "MlflowClient", removals: list[Removal], store: Store) -> None:
    for removal in removals:
        for version in removal.versions:
            client.delete_model_version(removal.name, version)
        store.remove(removal.package.uri)


def _key(uri: str) -> str:
    return "/".join(uri.split("/")[-2:])  # does not depend on where the store is


def pruning_table(removals: Sequence[Removal], apply: bool) -> Table:
    """The removals, for the terminal."""
    total = sum(removal.package.size for removal in removals)
    verb = "freed" if apply else "would be freed; run with --apply to free it"
    title = f"{len(removals)} packages, {total / 1e6:,.1f} MB {verb}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("model", "versions", "package", "MB", "written"):
        table.add_column(column, no_wrap=True, justify="right" if column == "MB" else "left")
    table.add_column("why", overflow="fold")
    for removal in removals:
        package = removal.package
        table.add_row(
            removal.name, ", ".join(removal.versions), DIGEST.sub(r"\1", package.uri.rpartition("/")[2])[:8],
            f"{package.size / 1e6:,.1f}", f"{package.modified:%Y-%m-%d}", removal.why,
        )  # fmt: skip
    return table
