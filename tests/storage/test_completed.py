"""Results of stages are found again by their inputs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.core.contracts import Artifact, Model
from forge.storage import DirectoryStore, Store, open_store
from forge.storage.completed import find_completed, record_completed
from tests.register.packages import machine

INPUTS = ["rows", {"epochs": 1}]


@pytest.fixture(params=["directory", "moto"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store of each kind."""
    with machine(request.param, tmp_path) as settings:
        yield open_store(settings)


def publish(store: Store) -> Artifact:
    with store.stage() as staged:
        (staged / "file").write_text("content")
        return Artifact(uri=store.publish(staged, "things"), digest="d", store=store.identity, seconds=3.0)


def test_a_result_is_found_by_its_inputs(store: Store) -> None:
    result = publish(store)
    assert find_completed(store, "finetune", INPUTS, Artifact) is None
    record_completed(store, "finetune", INPUTS, result)
    assert find_completed(store, "finetune", INPUTS, Artifact) == result
    assert find_completed(store, "evaluate", INPUTS, Artifact) is None
    assert find_completed(store, "finetune", ["rows", {"epochs": 2}], Artifact) is None


def test_other_code_has_no_result_yet(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    record_completed(store, "finetune", INPUTS, publish(store))
    monkeypatch.setattr("forge.storage.completed.code_version", lambda stage: "another")
    assert find_completed(store, "finetune", INPUTS, Artifact) is None


def test_a_record_without_its_artifact_does_not_count(store: Store) -> None:
    result = publish(store)
    record_completed(store, "finetune", INPUTS, result)
    assert find_completed(store, "finetune", INPUTS, Model) is None, "another class"
    record_completed(store, "finetune", INPUTS, result.model_copy(update={"store": "another"}))
    assert find_completed(store, "finetune", INPUTS, Artifact) is None
    record_completed(store, "finetune", INPUTS, result)
    store.remove(result.uri)
    assert find_completed(store, "finetune", INPUTS, Artifact) is None


def test_a_record_of_another_place_does_not_count(tmp_path: Path) -> None:
    store, other = DirectoryStore(tmp_path / "a"), DirectoryStore(tmp_path / "b")
    result = publish(other).model_copy(update={"store": store.identity})
    record_completed(store, "finetune", INPUTS, result)
    assert find_completed(store, "finetune", INPUTS, Artifact) is None
