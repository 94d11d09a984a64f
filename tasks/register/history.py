"""What the registry tells of a name: its versions, and what each was made from and when it served."""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.registry.mlflow_registry import PACKAGE_DIGEST, open_registry, translate_mlflow_errors
from forge.registry.packages import find_registered_version, resolve, version_named
from forge.registry.promotion import Promotion, promotions
from forge.storage import Store
from tasks.register.register import EVALUATION

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

SHOWN = 8  # digits of a digest


class Entry(NamedTuple):
    """A version, and when it served: from and until, the last one until now where it is the champion."""

    version: str
    aliases: tuple[str, ...]
    digest: str
    dataset: str
    score: float | None
    verdict: str
    created: datetime
    served: tuple[tuple[datetime, datetime | None], ...]


def history(name: str, settings: Settings, store: Store) -> list[Entry]:
    """The versions of a name, the newest first; ForgeError where it is not registered."""
    client = open_registry(settings)
    with translate_mlflow_errors(f"the history of {name} could not be read", settings):
        aliases = aliases_of(client, name)
        moved = promotions(store, name)
        found = versions_of(client, name)
        runs = {version.version: client.get_run(version.run_id) for version in found if version.run_id}
    entries = []
    for version in found:
        number = str(version.version)
        figures = runs[version.version].data.metrics if version.version in runs else {}
        entries.append(
            Entry(
                number,
                aliases.get(number, ()),
                version.tags.get(PACKAGE_DIGEST, ""),
                version.tags.get("dataset_digest", ""),
                figures.get("score"),
                version.tags.get("verdict", ""),
                datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
                tuple(served(number, moved)),
            )
        )
    return entries


def versions_of(client: "MlflowClient", name: str) -> "list[ModelVersion]":
    """The versions of a name, the newest first."""
    found = pages(lambda token: client.search_model_versions(f"name = '{name}'", max_results=200, page_token=token))
    return sorted(found, key=lambda version: -int(version.version))


def names_of(client: "MlflowClient") -> set[str]:
    """The names of all registered models."""
    return {model.name for model in pages(lambda token: client.search_registered_models(page_token=token))}


def pages(search: Callable[[str | None], Any]) -> list[Any]:
    """All that MLflow finds, which it gives by pages."""
    found, page = [], search(None)
    while True:
        found += page
        if not page.token:
            return found
        page = search(page.token)


def aliases_of(client: "MlflowClient", name: str) -> dict[str, tuple[str, ...]]:
    """The aliases of each version of a name that has some; ForgeError where the name is not registered."""
    found = client.search_registered_models(f"name = '{name}'")
    if not found:
        known = ", ".join(sorted(names_of(client))) or "none yet"
        raise ForgeError(f"{name}: no such registered model; there are: {known}")
    aliases: dict[str, tuple[str, ...]] = {}
    for alias, version in sorted(client.get_registered_model(name).aliases.items()):
        aliases[str(version)] = (*aliases.get(str(version), ()), alias)
    return aliases


def served(version: str, moved: Sequence[Promotion]) -> list[tuple[datetime, datetime | None]]:
    """When a version was the champion, by the record of promotions."""
    ends = [datetime.fromtimestamp(promotion.when, UTC) for promotion in moved[1:]]
    times = zip(moved, [*ends, None], strict=True) if moved else ()
    return [(datetime.fromtimestamp(one.when, UTC), end) for one, end in times if one.version == version]


def history_table(name: str, entries: Sequence[Entry]) -> Table:
    """The versions of a name, for the terminal."""
    # As narrow as a terminal of 80 columns.
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
    """What a model was made from, by its version in MLflow and the manifest of its package.

    ForgeError where there is no such version, or its package is gone.
    """
    version = find_registered_version(model_uri, settings)
    uri, digest = resolve(f"models:/{version.name}/{version.version}", settings)
    manifest = store.manifest(uri)
    base = {**manifest["base"], "location": version_named(manifest["base"]["location"], settings)}
    card = store.part(store.uri(f"datasets/sha256-{manifest['dataset']}"), "dataset.json")
    source = json.loads(card)["source"] if card else {}
    moved = [one for one in promotions(store, version.name) if one.version == str(version.version)]
    return {
        "model": f"{version.name} version {version.version}",
        "promoted": [f"{_time(datetime.fromtimestamp(one.when, UTC))} by {one.who}: {one.why}" for one in moved],
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
    """What a model was made from, for the terminal."""
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
