"""A model's history in the registry: its versions, when each served, and their lineage."""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.registry.mlflow_registry import EVALUATION, PACKAGE_DIGEST, open_registry, translate_mlflow_errors
from forge.registry.mlflow_runs import SCORE
from forge.registry.packages import find_registered_version, resolve, version_named
from forge.registry.promotion import Promotion, promotions
from forge.storage import Store
from tasks.register.register import DATASET_DIGEST, VERDICT

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

SHOWN = 8  # digits of a digest in tables


class Entry(NamedTuple):
    """A version, and the periods in which it served; the end of the champion's last period is None."""

    version: str
    aliases: tuple[str, ...]
    digest: str
    dataset: str
    score: float | None
    verdict: str
    created: datetime
    served: tuple[tuple[datetime, datetime | None], ...]


def history(name: str, settings: Settings, store: Store) -> list[Entry]:
    """The versions of a model, newest first; ForgeError if the model is not registered."""
    client = open_registry(settings)
    with translate_mlflow_errors(f"the history of {name} could not be read", settings):
        aliases = aliases_of(client, name)
        promoted = promotions(store, name)
        versions = versions_of(client, name)
        runs = {version.version: client.get_run(version.run_id) for version in versions if version.run_id}
    entries = []
    for version in versions:
        number = str(version.version)
        metrics = runs[version.version].data.metrics if version.version in runs else {}
        entries.append(
            Entry(
                number,
                aliases.get(number, ()),
                version.tags.get(PACKAGE_DIGEST, ""),
                version.tags.get(DATASET_DIGEST, ""),
                metrics.get(SCORE),
                version.tags.get(VERDICT, ""),
                datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
                tuple(served(number, promoted)),
            )
        )
    return entries


def versions_of(client: "MlflowClient", name: str) -> "list[ModelVersion]":
    """The versions of a model, newest first."""
    found = pages(lambda token: client.search_model_versions(f"name = '{name}'", max_results=200, page_token=token))
    return sorted(found, key=lambda version: -int(version.version))


def names_of(client: "MlflowClient") -> set[str]:
    """The names of all registered models."""
    return {model.name for model in pages(lambda token: client.search_registered_models(page_token=token))}


def pages(search: Callable[[str | None], Any]) -> list[Any]:
    """All results of a paginated search in MLflow."""
    found, page = [], search(None)
    while True:
        found += page
        if not page.token:
            return found
        page = search(page.token)


def aliases_of(client: "MlflowClient", name: str) -> dict[str, tuple[str, ...]]:
    """The aliases of those versions of a model that have any; ForgeError if the model is not registered."""
    found = client.search_registered_models(f"name = '{name}'")
    if not found:
        known = ", ".join(sorted(names_of(client))) or "none yet"
        raise ForgeError("no such registered model", where=name, fix=f"there are: {known}")
    aliases: dict[str, tuple[str, ...]] = {}
    for alias, version in sorted(client.get_registered_model(name).aliases.items()):
        aliases[str(version)] = (*aliases.get(str(version), ()), alias)
    return aliases


def served(version: str, promoted: Sequence[Promotion]) -> list[tuple[datetime, datetime | None]]:
    """The periods in which a version was the champion, from all promotions of the model."""
    ends = [datetime.fromtimestamp(promotion.when, UTC) for promotion in promoted[1:]]
    times = zip(promoted, [*ends, None], strict=True) if promoted else ()
    return [(datetime.fromtimestamp(one.when, UTC), end) for one, end in times if one.version == version]


def history_table(name: str, entries: Sequence[Entry]) -> Table:
    """The versions of a model as a table that fits 80 columns."""
    table = Table(title=f"{name}: {len(entries)} versions", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("version", "alias", "digest", "data set", "score", "gate", "registered"):
        table.add_column(column, no_wrap=True)
    table.add_column("served (UTC)", overflow="fold")
    for entry in entries:
        spans = [f"{_time(begin)} to {_time(end) if end else 'now'}" for begin, end in entry.served]
        table.add_row(
            entry.version, ", ".join(entry.aliases), entry.digest[:SHOWN], entry.dataset[:SHOWN],
            "" if entry.score is None else f"{entry.score:.1%}", entry.verdict.partition(":")[0],
            f"{entry.created:%Y-%m-%d}", "\n".join(spans),
        )  # fmt: skip
    return table


def lineage(model_uri: str, settings: Settings, store: Store) -> dict[str, Any]:
    """A version's lineage, from MLflow and the manifest of its package.

    Raises ForgeError if there is no such version, or its package is missing.
    """
    version = find_registered_version(model_uri, settings)
    uri, digest = resolve(f"models:/{version.name}/{version.version}", settings)
    manifest = store.manifest(uri)
    base = {**manifest["base"], "location": version_named(manifest["base"]["location"], settings)}
    card = store.part(store.uri(f"datasets/sha256-{manifest['dataset']}"), "dataset.json")
    source = json.loads(card)["source"] if card else {}
    promoted = [one for one in promotions(store, version.name) if one.version == str(version.version)]
    return {
        "model": f"{version.name} version {version.version}",
        "promoted": [f"{_time(datetime.fromtimestamp(one.when, UTC))} by {one.who}: {one.why}" for one in promoted],
        "package": {
            "kind": manifest.get("kind", "model"),
            "uri": uri,
            "digest": digest,
            "files": len(manifest["files"]),
            "model": manifest["model_digest"],
        },
        "evaluation": {
            "digest": version.tags.get(EVALUATION, ""),
            "verdict": manifest["verdict"],
            **manifest["metrics"],
        },
        "data set": {"digest": manifest["dataset"], "rows from": source.get("uri", "no longer in the store")},
        "base": {name: value for name, value in base.items() if value},
        "recipe": {"digest": manifest["recipe"], "in MLflow": f"parameters of run {version.run_id}"},
        "trained by": manifest["made_by"],
        "versions": manifest["versions"],
    }


def lineage_tree(facts: dict[str, Any]) -> Tree:
    """A version's lineage as a tree, for the terminal."""
    tree = Tree(str(facts["model"]))
    for name, value in facts.items():
        if name == "model" or not value:
            continue
        if isinstance(value, str):
            tree.add(Text(f"{name}: {value}", overflow="fold"))
            continue
        branch = tree.add(name)
        lines = value if isinstance(value, list) else [f"{key}: {part}" for key, part in value.items()]
        for line in lines:
            branch.add(Text(line, overflow="fold"))
    return tree


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"
