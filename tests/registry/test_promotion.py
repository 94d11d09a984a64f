"""Promotion: one champion, moved by one at a time, and a history without gaps; on a directory and on S3 servers."""

import json
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.registry.mlflow_registry import champion_version, open_registry, version_of
from forge.registry.promotion import drop_challenger, promote, promotions
from forge.storage import Store, open_store
from forge.storage import lease as module
from forge.storage.lease import current_owner, lease
from tests.register.packages import KINDS, machine


@pytest.fixture(params=KINDS)
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Settings of a home with a store of some make, in which the name dates has 8 versions."""
    with machine(request.param, tmp_path) as settings:
        _register(settings)
        yield settings


def _register(settings: Settings) -> None:
    client = open_registry(settings)
    client.create_registered_model("dates")
    for number in range(8):
        client.create_model_version("dates", source=f"file:///packages/{number}")


def chain(store: Store) -> list[tuple[str, str]]:
    """From which version to which, in order."""
    return [(promotion.previous, promotion.version) for promotion in promotions(store, "dates")]


def test_the_champion_moves_and_it_is_recorded_who_moved_it_and_why(settings: Settings) -> None:
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
    assert store.names("leases/promotion-dates") == [], "nothing is held afterwards"


def test_a_verdict_on_another_champion_promotes_nothing(settings: Settings) -> None:
    client, store = open_registry(settings), open_store(settings)
    promote(client, store, "dates", "1", "", "first")
    with pytest.raises(ForgeError, match="version 3 was compared with version 2, but the champion is version 1 now"):
        promote(client, store, "dates", "3", "2", "better than 2")
    assert champion_version(client, "dates") == "1"
    assert chain(store) == [("", "1")]


def _promote(settings: Settings, version: str) -> int:
    """Promote until it is done; returns how often somebody else was first."""
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
def test_of_eight_that_promote_at_once_each_follows_another(settings: Settings) -> None:
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
def test_a_promotion_that_was_cut_off_is_finished(
    dies_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_only_the_version_itself_loses_the_alias_challenger(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    _register(settings)
    client = open_registry(settings)
    client.set_registered_model_alias("dates", "challenger", "3")
    drop_challenger(client, "dates", "2")
    assert version_of(client, "dates", "challenger") == "3"
    for _ in range(2):
        drop_challenger(client, "dates", "3")
        assert version_of(client, "dates", "challenger") is None


def test_an_alias_that_was_moved_by_hand_is_recorded(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    _register(settings)
    client, store = open_registry(settings), open_store(settings)
    promote(client, store, "dates", "1", "", "first")
    client.set_registered_model_alias("dates", "champion", "5")
    promote(client, store, "dates", "6", "5", "better")
    assert chain(store) == [("", "1"), ("1", "5"), ("5", "6")]
    assert "moved by hand" in promotions(store, "dates")[1].why


@pytest.mark.parametrize(("damage", "says"), [("gap", "record 1 is missing"), ("broken", "not a promotion's record")])
def test_a_history_that_is_not_whole_is_told(tmp_path: Path, damage: str, says: str) -> None:
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
    with pytest.raises(ForgeError, match=says):
        promote(client, store, "dates", "3", "2", "better")
    assert champion_version(client, "dates") == "2"


def test_the_lease_of_a_process_that_died_is_taken_over(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ABANDONED", 0.6)
    store = open_store(settings)
    for name, claim in (("a", b'{"owner": "x", "number": null}'), ("b", b"{"), ("c", b'{"owner": "x", "number": 7}')):
        store.put(f"leases/dates/{name}", claim)
    with lease(store, "dates") as check:
        check()
        assert len(store.names("leases/dates")) == 1
    assert store.names("leases/dates") == []


def test_an_earlier_attempt_of_the_same_execution_holds_nobody_up(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(settings)
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "f0123")
    store.put("leases/dates/ours", json.dumps({"owner": current_owner(), "number": 1, "renewals": 1}).encode())
    with lease(store, "dates"):
        assert "ours" not in store.names("leases/dates")
    monkeypatch.setattr(module, "ABANDONED", 0.5)
    store.put("leases/dates/theirs", json.dumps({"owner": "somebody", "number": 1, "renewals": 1}).encode())
    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text, **_: said.append(text))
    with lease(store, "dates"):
        assert said, "another's is waited for until it is abandoned"


def test_a_lease_is_kept_while_its_holder_works_and_one_that_was_lost_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEWED", 0.05)
    monkeypatch.setattr(module, "ABANDONED", 1.0)
    store = open_store(Settings(home=tmp_path))
    order: list[str] = []

    def second() -> None:
        with lease(store, "dates"):
            order.append("second")

    other = threading.Thread(target=second)
    with lease(store, "dates") as check:
        other.start()
        other.join(2.5)  # long after an unrenewed claim would have been taken away
        order.append("first")
        check()
    other.join()
    assert order == ["first", "second"]
    with lease(store, "dates") as check:
        for name in store.names("leases/dates"):
            store.delete(f"leases/dates/{name}")
        with pytest.raises(ForgeError, match="the lease was lost"):
            check()
