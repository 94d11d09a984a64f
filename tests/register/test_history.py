"""History, lineage and pruning of the registry, on stores of every kind."""

import io
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from forge.core.errors import ForgeError
from forge.core.recipe import Recipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import champion_version, open_registry
from forge.registry.promotion import promote
from forge.storage import open_store
from tasks.register import pruning
from tasks.register.history import history, history_table, lineage, lineage_tree
from tasks.register.pruning import prune, pruning_table
from tests.register.packages import Inputs, inputs, settings
from tests.storage.servers import client_of

__all__ = ["settings"]


def text_of(shown: object) -> str:
    """The text that a terminal shows."""
    console = Console(width=200, file=io.StringIO())
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined]


def versions(settings: Settings, recipe: Recipe, tmp_path: Path, count: int) -> list[Inputs]:
    """Register different models; returns their inputs."""
    registered = []
    for number in range(1, count + 1):
        registered.append(inputs(tmp_path, settings, recipe, seed=bytes([number])))
        registered[-1].register(settings)
    return registered


def test_history_has_the_facts_of_each_version_and_when_it_served(tmp_path: Path, recipe: Recipe) -> None:
    settings = Settings(home=tmp_path)
    store, client = open_store(settings), open_registry(settings)
    before = datetime.now(UTC)
    versions(settings, recipe, tmp_path, 3)
    for version, instead in (("1", ""), ("2", "1"), ("1", "2")):
        promote(client, store, "dates", version, instead, "better")
    third, second, first = history("dates", settings, store)
    assert [entry.version for entry in (third, second, first)] == ["3", "2", "1"]
    assert (third.aliases, second.aliases, first.aliases) == (("challenger",), (), ("champion",))
    assert (third.served, len(second.served), len(first.served)) == ((), 1, 2)
    assert first.served[0][1] == second.served[0][0]
    assert first.served[1][1] is None
    assert before <= first.served[0][0] <= first.served[1][0] <= datetime.now(UTC)
    assert (first.score, first.verdict, first.dataset) == (0.75, "passed: better", "d" * 64)
    table = text_of(history_table("dates", [third, second, first]))
    assert "champion" in table
    assert first.digest[:8] in table
    with pytest.raises(ForgeError, match="words: no such registered model; there are: dates"):
        history("words", settings, store)


def test_lineage_of_the_champion_goes_back_to_its_rows(settings: Settings, tmp_path: Path, recipe: Recipe) -> None:
    store, client = open_store(settings), open_registry(settings)
    versions(settings, recipe, tmp_path, 2)
    with pytest.raises(ForgeError, match="no such version"):
        lineage("models:/dates@champion", settings, store)
    promote(client, store, "dates", "2", "", "passed: better")
    facts = lineage("models:/dates@champion", settings, store)
    assert facts["model"] == "dates version 2"
    assert facts["data set"] == {"digest": "d" * 64, "rows from": "s3://team/raw"}
    assert facts["evaluation"]["score"] == 0.75
    assert facts["package"]["uri"] == client.get_model_version("dates", "2").source
    assert "passed: better" in facts["promoted"][0]
    assert lineage("models:/dates/1", settings, store)["promoted"] == []
    assert "rows from: s3://team/raw" in text_of(lineage_tree(facts))


def age(settings: Settings, monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """Let this many days pass for pruning."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime.fromtimestamp(time.time(), UTC) + timedelta(days=days)

    monkeypatch.setattr(pruning, "datetime", Later)


def test_pruning_keeps_champions_and_recent_versions(
    settings: Settings, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, client = open_store(settings), open_registry(settings)
    versions(settings, recipe, tmp_path, 6)
    for version, instead in (("1", ""), ("3", "1"), ("4", "3")):
        promote(client, store, "dates", version, instead, "better")
    uris = {number: client.get_model_version("dates", str(number)).source for number in range(1, 7)}

    def left() -> set[int]:
        return {number for number, uri in uris.items() if store.exists("/".join(uri.split("/")[-3:]))}

    assert prune("dates", 1, 30, True, settings, store) == [], "all are young"
    age(settings, monkeypatch, 31)
    would = prune("", 1, 30, False, settings, store)
    assert {removal.versions for removal in would} == {("1",), ("2",), ("5",)}, (
        "not the last version, the champion, and the previous champion"
    )
    assert left() == {1, 2, 3, 4, 5, 6}, "nothing is removed without apply"
    table = text_of(pruning_table(would, False))
    assert "3 packages, 0.3 MB would be freed" in table
    assert [removal.package.uri for removal in prune("", 1, 30, True, settings, store)] == [
        removal.package.uri for removal in would
    ]
    assert left() == {3, 4, 6}
    assert {version.version for version in client.search_model_versions("name = 'dates'")} == {3, 4, 6}
    assert champion_version(client, "dates") == "4"
    assert prune("", 1, 30, True, settings, store) == []
    assert store.names("leases/registration-dates") == []


@pytest.mark.parametrize("settings", ["directory", "rclone"], indirect=True)
def test_the_base_of_an_adapter_is_kept_as_long_as_the_adapter(
    settings: Settings, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, client = open_store(settings), open_registry(settings)
    words = recipe.model_copy(update={"name": "words"})
    first, second = (inputs(tmp_path, settings, recipe, seed=seed).register(settings) for seed in (b"1", b"2"))
    mine = inputs(tmp_path, settings, recipe, seed=b"3", base=first).register(settings)
    theirs = inputs(tmp_path, settings, words, seed=b"4", base=second).register(settings)
    for name, version in (("dates", mine), ("words", theirs)):
        promote(client, store, name, version.version, "", "better")
        inputs(tmp_path, settings, recipe.model_copy(update={"name": name}), seed=name.encode()).register(settings)
    age(settings, monkeypatch, 31)
    for name in ("", "dates"):
        assert prune(name, 1, 30, True, settings, store) == [], "bases of adapters of the same and of another model"
    promote(client, store, "words", "2", "1", "better")
    inputs(tmp_path, settings, words, seed=b"5").register(settings)
    promote(client, store, "words", "3", "2", "better")
    pruned = [removal.package.uri for removal in prune("words", 1, 30, True, settings, store)]
    assert pruned == [theirs.uri]
    assert [removal.package.uri for removal in prune("", 1, 30, False, settings, store)] == [second.uri]
    assert [removal.package.uri for removal in prune("", 1, 30, True, settings, store)] == [second.uri]
    assert client.get_model_version("dates", first.version).source == first.uri
    with pytest.raises(ForgeError, match=r"register: words is an adapter of .*, which is missing; restore it"):
        inputs(tmp_path, settings, words, seed=b"6", base=second).register(settings)
    assert store.names("leases/registration-dates") == store.names("leases/registration-words") == []


def test_packages_without_a_version_are_pruned_and_an_interrupted_pruning_is_completed(
    settings: Settings, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, client = open_store(settings), open_registry(settings)
    registered = versions(settings, recipe, tmp_path, 2)
    age(settings, monkeypatch, 31)

    def cut(uri: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store, "remove", cut)
        with pytest.raises(KeyboardInterrupt):
            prune("dates", 1, 30, True, settings, store)
    (removal,) = prune("dates", 1, 30, True, settings, store)
    assert (removal.versions, removal.why) == ((), "no version refers to it")
    assert len(store.artifacts("models")) == 1
    assert registered[0].register(settings).version == "3", "a pruned model can be registered again"
    client.delete_registered_model("dates")
    with monkeypatch.context() as patched:
        patched.setattr(pruning, "promotions", lambda store, name: ["recorded"])
        with pytest.raises(ForgeError, match="MLflow has no version of dates"):
            prune("", 1, 30, True, settings, store)
    assert len(store.artifacts("models")) == 2
    assert len(prune("", 1, 30, True, settings, store)) == 2


def test_incomplete_uploads_are_pruned_after_a_day(
    settings: Settings, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not settings.store:
        pytest.skip("a directory never has incomplete artifacts")
    store = open_store(settings)
    versions(settings, recipe, tmp_path, 1)
    client, bucket = client_of(settings.s3_endpoint), settings.store.split("/")[2]
    half = f"models/dates/sha256-{'0' * 64}"
    client.put_object(bucket, f"forge/{half}/model.safetensors", io.BytesIO(b"half"), 4)
    client._create_multipart_upload(bucket, f"forge/{half}/more", {})
    assert prune("", 1, 0, True, settings, store) == []
    age(settings, monkeypatch, 2)
    (removal,) = prune("", 1, 0, True, settings, store)
    assert (removal.package.size, removal.why) == (4, "incomplete upload")
    store.sweep("models", timedelta(0))
    assert client._list_multipart_uploads(bucket).uploads == []
    assert [found.whole for found in store.artifacts("models")] == [True]


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    with pytest.raises(ForgeError, match="there is no model words"):
        prune("words", 1, 30, False, settings, open_store(settings))
