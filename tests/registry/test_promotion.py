"""Promotion: one champion, moved by one process at a time, and a history without gaps; on every kind of store."""

import atexit
import functools
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.registry.mlflow_registry import champion_version, open_registry, version_of
from forge.registry.promotion import drop_challenger, promote, promotions
from forge.storage import Store, open_store
from forge.storage.lease import current_owner
from tests.register.packages import KINDS, machine


@pytest.fixture(params=KINDS)
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Settings with a store of each kind, and a registry with 8 versions of the name dates."""
    with machine(request.param, tmp_path) as settings:
        _register(settings)
        yield settings


@functools.cache
def _empty_registry() -> Path:
    """The directory of a new registry, to copy: MLflow takes seconds to create one."""
    directory = tempfile.TemporaryDirectory(prefix="forge-registry-")
    atexit.register(directory.cleanup)
    open_registry(Settings(home=Path(directory.name)))
    return Path(directory.name) / "mlflow"


def _register(settings: Settings) -> None:
    shutil.copytree(_empty_registry(), settings.home / "mlflow")
    client = open_registry(settings)
    client.create_registered_model("dates")
    for number in range(8):
        client.create_model_version("dates", source=f"file:///packages/{number}")


def chain(store: Store) -> list[tuple[str, str]]:
    """From which version to which, in order."""
    return [(promotion.previous, promotion.version) for promotion in promotions(store, "dates")]


def test_a_promotion_moves_the_champion_and_records_who_and_why(settings: Settings) -> None:
    client, store = open_registry(settings), open_store(settings)
    client.set_registered_model_alias("dates", "challenger", "2")
    assert champion_version(client, "dates") is None
    for instead_of, version in (("", "1"), ("1", "2"), ("1", "2"), ("2", "1")):
        promote(client, store, "dates", version, instead_of, f"better than {instead_of}")
        assert champion_version(client, "dates") == version
        assert "challenger" not in client.get_registered_model("dates").aliases or version == "1"
    assert chain(store) == [("", "1"), ("1", "2"), ("2", "1")]
    assert client.get_model_version("dates", "2").tags["previous_champion"] == "1"
    second = promotions(store, "dates")[1]
    assert (second.who, second.why) == (current_owner(), "better than 1")
    assert promotions(store, "dates")[0].when <= second.when
    assert store.names("leases/promotion-dates") == [], "the lease is released"


def test_a_version_compared_with_a_former_champion_is_not_promoted(settings: Settings) -> None:
    client, store = open_registry(settings), open_store(settings)
    promote(client, store, "dates", "1", "", "first")
    with pytest.raises(ForgeError, match="version 3 was compared with version 2, but the champion is version 1 now"):
        promote(client, store, "dates", "3", "2", "better than 2")
    assert champion_version(client, "dates") == "1"
    assert chain(store) == [("", "1")]


def _promote(settings: Settings, version: str) -> int:
    """Promote until it succeeds; returns how often another process was faster."""
    client, store = open_registry(settings), open_store(settings)
    refused = 0
    while True:
        now = champion_version(client, "dates") or ""
        try:
            promote(client, store, "dates", version, now, f"better than {now}")
        except ForgeError as error:
            assert "but the champion is version" in error.message
            refused += 1
        else:
            return refused


@pytest.mark.long
def test_concurrent_promotions_follow_one_another(settings: Settings) -> None:
    versions = [str(number) for number in range(1, 9)]
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        pool.starmap(_promote, [(settings, version) for version in versions])
    store = open_store(settings)
    history = chain(store)
    assert sorted(version for _, version in history) == versions
    assert [previous for previous, _ in history] == ["", *(version for _, version in history[:-1])]
    assert champion_version(open_registry(settings), "dates") == history[-1][1]
    assert store.names("leases/promotion-dates") == []


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("dies_in", ["set_model_version_tag", "set_registered_model_alias"])
def test_an_interrupted_promotion_is_finished(dies_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path)
    _register(settings)
    client, store = open_registry(settings), open_store(settings)
    promote(client, store, "dates", "1", "", "first")

    def die(*arguments: object) -> None:
        raise PowerCut

    with monkeypatch.context() as patched:
        patched.setattr(client, dies_in, die)
        with pytest.raises(PowerCut):
            promote(client, store, "dates", "2", "1", "better")
    assert champion_version(client, "dates") == "1"
    promote(client, store, "dates", "2", "1", "better")
    assert champion_version(client, "dates") == "2"
    assert chain(store) == [("", "1"), ("1", "2")]


def test_only_its_own_version_loses_the_alias_challenger(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    _register(settings)
    client = open_registry(settings)
    client.set_registered_model_alias("dates", "challenger", "3")
    drop_challenger(client, "dates", "2")
    assert version_of(client, "dates", "challenger") == "3"
    for _ in range(2):
        drop_challenger(client, "dates", "3")
        assert version_of(client, "dates", "challenger") is None


def test_an_alias_moved_by_hand_is_recorded(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    _register(settings)
    client, store = open_registry(settings), open_store(settings)
    promote(client, store, "dates", "1", "", "first")
    client.set_registered_model_alias("dates", "champion", "5")
    promote(client, store, "dates", "6", "5", "better")
    assert chain(store) == [("", "1"), ("1", "5"), ("5", "6")]
    assert "moved by hand" in promotions(store, "dates")[1].why


@pytest.mark.parametrize(
    ("damage", "message"), [("gap", "record 1 is missing"), ("broken", "is not a valid promotion record")]
)
def test_an_incomplete_history_is_an_error(tmp_path: Path, damage: str, message: str) -> None:
    settings = Settings(home=tmp_path)
    _register(settings)
    client, store = open_registry(settings), open_store(settings)
    for previous, version in (("", "1"), ("1", "2")):
        promote(client, store, "dates", version, previous, "better")
    first = "promotions/dates/00000001.json"
    if damage == "gap":
        store.delete(first)
    else:
        store.put(first, b"{")
    with pytest.raises(ForgeError, match=message):
        promote(client, store, "dates", "3", "2", "better")
    assert champion_version(client, "dates") == "2"
