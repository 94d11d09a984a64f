"""What may go: old versions, packages that no version names, and what attempts left that were broken off."""

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

ABANDONED = timedelta(days=1)  # an attempt that began before is not going on any more


class Removal(NamedTuple):
    """A package that goes, with the versions that named it, and why."""

    name: str
    versions: tuple[str, ...]
    package: StoredArtifact
    why: str


def retain(name: str, keep: int, days: float, apply: bool, settings: Settings, store: Store) -> list[Removal]:
    """Find what is neither a champion nor young nor among the last versions, and with `apply` remove it; returns it.

    Kept are, of each name (or of `name` alone): versions with an alias, the champion before the present one, to which
    a rollback leads, the last `keep` versions, all that is younger than so many days, and what an adapter that stays
    stands on, of whatever name. A version goes before its package, so that one that is broken off leaves no version
    without a package. Safe to run again.
    """
    client = open_registry(settings)
    with translate_mlflow_errors("retention did not end", settings):
        registered = names_of(client)
        there = {uri.split("/")[-2] for uri, *_ in store.artifacts("models")}
        names = sorted(registered | there) if not name else [name]
        if name and name not in registered | there:
            raise ForgeError(f"retention: there is no model {name}; there are {', '.join(sorted(registered | there))}")
        removals: list[Removal] = []
        for one in names:
            # Nobody registers or promotes a version of it meanwhile.
            with lease(store, f"registration-{one}"), lease(store, f"promotion-{one}"):
                found = _find(client, one, one in registered, keep, timedelta(days=days), store)
                going = {removal.package.uri for removal in [*removals, *found]}
                needed = _bases(store, going) if found else set()
                found = [removal for removal in found if _key(removal.package.uri) not in needed]
                removals += found
                if apply:
                    for removal in found:
                        for version in removal.versions:
                            client.delete_model_version(one, version)
                        store.remove(removal.package.uri)
        if apply:
            store.sweep("models", ABANDONED)
    return removals


def _find(
    client: "MlflowClient", name: str, registered: bool, keep: int, young: timedelta, store: Store
) -> list[Removal]:
    versions = versions_of(client, name) if registered else []
    history = promotions(store, name)
    if history and not versions:
        raise ForgeError(
            f"retention: MLflow knows no version of {name}, though {len(history)} promotions are recorded; nothing was "
            "removed. Check FORGE_MLFLOW_URI, or remove the promotions' records with the packages by hand"
        )
    aliased = aliases_of(client, name) if registered else {}
    before = {history[-1].previous} if history else set()
    now = datetime.now(UTC)
    kept: set[str] = set()
    going: dict[str, list[str]] = {}
    for place, version in enumerate(versions):
        age = now - datetime.fromtimestamp(version.creation_timestamp / 1000, UTC)
        number, source = str(version.version), version.source or ""
        if place < keep or number in aliased or number in before or age < young:
            kept.add(source)
        else:
            going.setdefault(source, []).append(number)
    removals = []
    for package in store.artifacts(f"models/{name}"):
        age, named = now - package.modified, tuple(going.get(package.uri, ()))
        if package.uri in kept:
            continue
        if not package.whole:
            if age > max(young, ABANDONED):
                removals.append(Removal(name, named, package, "never became whole"))
        elif named:
            removals.append(Removal(name, named, package, f"older than {young.days} days, not among the last {keep}"))
        elif age > young:
            removals.append(Removal(name, (), package, "no version names it"))
    return removals


def _bases(store: Store, going: set[str]) -> set[str]:
    """The keys of the packages that adapters stand on which do not go."""
    manifests = [store.manifest(one.uri) for one in store.artifacts("models") if one.whole and one.uri not in going]
    return {_key(manifest["base"]["location"]) for manifest in manifests if manifest.get("kind") == ADAPTER}


def _key(uri: str) -> str:
    return "/".join(uri.split("/")[-2:])  # the same wherever the store is


def retention_table(removals: Sequence[Removal], apply: bool) -> Table:
    """What goes, for the terminal."""
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
