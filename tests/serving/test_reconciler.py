"""The reconciler's steps in states that a real vLLM does not get into at will; a small server stands in for it.

With a real one: tests/integration/test_serving.py and test_kills.py.
"""

import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import pytest

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.serving import reconciler as module
from forge.serving.desired import Actual, Desired, DesiredStore, Served, Serving, Trial
from forge.serving.local_target import FileDocument
from forge.serving.reconciler import NOTHING, Reconciler, run
from forge.serving.reconciler_status import Status
from forge.serving.targets import read_serving
from tests.serving.stand import Stand
from tests.serving.states import serving, version

ONE, TWO, THREE = version(1), version(2), version(3)


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    stand = Stand(tmp_path / "names.json")
    yield stand
    stand.http.shutdown()
    stand.http.server_close()


@pytest.fixture
def document(tmp_path: Path) -> FileDocument:
    return FileDocument(Settings(home=tmp_path))


@pytest.fixture
def released() -> list[Served]:
    return []


@pytest.fixture
def reconciler(stand: Stand, document: FileDocument, tmp_path: Path, released: list[Served]) -> Reconciler:
    def nothing_to_recover(document: DesiredStore) -> bool:
        return False

    return Reconciler(
        document, stand, lambda one: tmp_path, released.append, nothing_to_recover, stand.names_file, lambda line: None
    )


def declare(document: FileDocument, state: Serving, trial: Trial | None = None) -> None:
    there, revision = document.read()
    document.write(Desired(generation=there.generation + 1, serving=state, trial=trial), revision)


def leads(stand: Stand) -> dict:
    return json.loads(stand.names_file.read_text())["names"]


def test_base_adapter_and_name_in_one_step(reconciler: Reconciler, document: FileDocument, stand: Stand) -> None:
    declare(document, serving(ONE, TWO))
    actual = reconciler.step()
    assert actual == Actual(generation=1, base=ONE.versioned, loaded=(TWO.versioned,), names={"dates": TWO.versioned})
    assert reconciler.step() == actual


def test_a_name_stays_where_it_leads_until_the_new_version_is_there(
    reconciler: Reconciler, document: FileDocument, stand: Stand
) -> None:
    declare(document, serving(ONE, TWO))
    reconciler.step()
    stand.refuses = {THREE.versioned}
    declare(document, serving(ONE, THREE))
    actual = reconciler.step()
    assert actual.names == leads(stand) == {"dates": TWO.versioned}
    assert actual.loaded == (TWO.versioned,)
    assert "no such rank" in actual.failed[THREE.versioned]
    assert "no such rank" in actual.waiting


def test_what_failed_is_tried_again_after_a_while_and_when_it_is_asked_for_anew(
    reconciler: Reconciler, document: FileDocument, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand.refuses = {TWO.versioned}
    declare(document, serving(ONE, TWO))
    assert TWO.versioned in reconciler.step().failed
    stand.refuses = set()
    assert TWO.versioned in reconciler.step().failed, "not at once"
    reconciler.failures[TWO.versioned].again = 0.0
    assert reconciler.step().failed == {}
    assert stand.adapters == [TWO.versioned]


def test_an_old_version_is_unloaded_when_it_is_at_rest(
    reconciler: Reconciler, document: FileDocument, stand: Stand, released: list[Served]
) -> None:
    declare(document, serving(ONE, TWO))
    reconciler.step()
    stand.in_flight = {TWO.versioned: 1}
    declare(document, serving(ONE, THREE))
    for _ in range(3):
        assert reconciler.step().loaded == (TWO.versioned, THREE.versioned)
    assert leads(stand) == {"dates": THREE.versioned}
    stand.in_flight = {TWO.versioned: 0}
    assert reconciler.step().loaded == (THREE.versioned,)
    assert released == [TWO]


def test_what_a_rollout_would_go_back_to_stays_loaded(
    reconciler: Reconciler, document: FileDocument, stand: Stand
) -> None:
    trial = Trial(id="t", name="dates", of=THREE, before=serving(ONE, TWO), champion="2", owner="me", process="h/1/1")
    declare(document, serving(ONE, TWO))
    reconciler.step()
    declare(document, serving(ONE, THREE), trial)
    assert reconciler.step().loaded == (TWO.versioned, THREE.versioned)
    declare(document, serving(ONE, THREE))
    assert reconciler.step().loaded == (THREE.versioned,)


def test_while_another_base_starts_names_lead_nowhere_and_then_not_before_they_should(
    reconciler: Reconciler, document: FileDocument, stand: Stand
) -> None:
    declare(document, serving(ONE))
    reconciler.step()
    trial = Trial(id="t", name="dates", of=TWO, before=serving(ONE), champion="1", owner="me", process="h/1/1")
    stand.waiting = "vLLM is starting"
    declare(document, Serving(base=TWO), trial)
    assert reconciler.step().waiting == "vLLM is starting"
    assert leads(stand) == {"dates": None}
    stand.waiting = ""
    actual = reconciler.step()
    assert (actual.base, actual.names, leads(stand)) == (TWO.versioned, {}, {"dates": None})
    declare(document, serving(TWO), trial)
    assert reconciler.step().names == leads(stand) == {"dates": TWO.versioned}


@pytest.mark.parametrize("how", ["silent", "nonsense"])
def test_one_look_without_an_answer_takes_no_name_down(
    reconciler: Reconciler, document: FileDocument, stand: Stand, how: str
) -> None:
    declare(document, serving(ONE, TWO))
    reconciler.step()
    setattr(stand, how, True)
    assert reconciler.step().waiting == "vLLM does not answer at the moment"
    assert leads(stand) == {"dates": TWO.versioned}


def test_a_base_that_cannot_be_served_is_told(reconciler: Reconciler, document: FileDocument, stand: Stand) -> None:
    stand.refuses = {ONE.versioned}
    declare(document, serving(ONE))
    actual = reconciler.step()
    assert actual.failed == {ONE.versioned: "it ends at once"}
    assert leads(stand) == {"dates": None}
    reconciler.step()
    assert len(stand.ensured) == 1, "it is not tried again at once"


def test_what_serves_is_seen_to_while_a_broken_off_rollout_cannot_be_ended(
    reconciler: Reconciler, document: FileDocument, stand: Stand
) -> None:
    calls = []

    def away(document: DesiredStore) -> bool:
        calls.append(1)
        raise ForgeError("MLflow is away")

    reconciler.recover = away
    trial = Trial(id="t", name="dates", of=TWO, before=serving(ONE), champion="1", owner="me", process="h/1/1")
    declare(document, serving(ONE, TWO), trial)
    for _ in range(3):
        assert reconciler.step().names == {"dates": TWO.versioned}
    assert len(calls) == 1, "it is tried again after a while"


def test_with_nothing_to_serve_all_is_stopped_and_it_ends(
    reconciler: Reconciler, document: FileDocument, stand: Stand
) -> None:
    declare(document, serving(ONE, TWO))
    reconciler.step()
    declare(document, Serving())
    run(reconciler, 0, lambda: False, lambda: None, forever=False)
    assert (reconciler.actual.waiting, stand.base, leads(stand)) == (NOTHING, "", {})


def test_whatever_a_step_raises_is_told_once_and_tried_again(
    reconciler: Reconciler, document: FileDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    told: list[str] = []
    reconciler.tell = told.append
    declare(document, Serving())
    broken = iter([True, True, False])
    step = reconciler.step

    def sometimes() -> Actual:
        if next(broken):
            raise RuntimeError("the disk is full")
        return step()

    monkeypatch.setattr(reconciler, "step", sometimes)
    run(reconciler, 0, lambda: False, lambda: None, forever=False)
    assert told[0] == "will be tried again: RuntimeError: the disk is full"
    assert told.count(told[0]) == 1


def test_it_says_what_it_fetches_and_afterwards_that_it_has(
    reconciler: Reconciler, document: FileDocument, tmp_path: Path
) -> None:
    lines: list[str] = []

    def fetch(one: Served) -> Path:
        lines.append("the fetch itself")
        assert reconciler.actual.waiting == f"fetching {one.uri}"
        return tmp_path

    reconciler.fetch, reconciler.tell = fetch, lines.append
    declare(document, serving(ONE))
    reconciler.step()
    assert lines[:3] == [f"fetching {ONE.uri}", "the fetch itself", f"{ONE.uri} is fetched and verified"]


def test_its_state_is_told_over_http(
    reconciler: Reconciler, document: FileDocument, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(document, serving(ONE, TWO))
    stand.in_flight = {TWO.versioned: 3}
    status = Status(reconciler, "127.0.0.1", 0)
    place = Settings(serving_target="kubernetes", reconciler_url=f"http://127.0.0.1:{status.port}")

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{status.port}{path}") as answer:
            return answer.read().decode()

    try:
        with pytest.raises(ForgeError, match="/desired: answers 503: the reconciler has yet to read what"):
            read_serving(place)
        reconciler.step()
        assert Desired.model_validate_json(get("/desired")) == document.read()[0]
        assert read_serving(place) == serving(ONE, TWO)
        assert get("/healthz") == "ok"
        assert Actual.model_validate_json(get("/status")) == reconciler.actual
        metrics = get("/metrics").splitlines()
        assert "forge_serving_as_desired 1.0" in metrics
        assert f'forge_requests_in_flight{{version="{TWO.versioned}"}} 3.0' in metrics
        assert f'forge_public_name{{name="dates",version="{TWO.versioned}"}} 1.0' in metrics
        assert "forge_adapter_loads_total 1.0" in metrics
        status.stepped -= 1e6
        with pytest.raises(HTTPError, match="503"):
            get("/healthz")
        status.touch()
        assert get("/healthz") == "ok"
    finally:
        status.http.shutdown()
        status.http.server_close()
    with pytest.raises(ForgeError, match=r"/desired: no answer .*; start the reconciler, or fix FORGE_RECONCILER_URL"):
        read_serving(place)
    with pytest.raises(ForgeError, match="set FORGE_RECONCILER_URL"):
        read_serving(Settings(serving_target="kubernetes"))


def test_what_serves_is_what_served_before_a_rollout_that_is_under_way(document: FileDocument, tmp_path: Path) -> None:
    trial = Trial(id="t", name="dates", of=TWO, before=serving(ONE), champion="1", owner="me", process="h/1/1")
    declare(document, serving(ONE, TWO), trial)
    assert read_serving(Settings(home=tmp_path)) == serving(ONE)
    declare(document, serving(ONE, TWO))
    assert read_serving(Settings(home=tmp_path)) == serving(ONE, TWO)


def test_a_document_that_has_changed_is_not_waited_for(tmp_path: Path) -> None:
    document, other = (FileDocument(Settings(home=tmp_path)) for _ in range(2))
    for generation in (1, 2):
        _, revision = document.read()
        waiting = threading.Thread(target=document.wait, args=(3600,), daemon=True)
        waiting.start()
        other.write(Desired(generation=generation), revision)
        waiting.join(timeout=60)
        assert not waiting.is_alive()
    _, revision = document.read()
    other.write(Desired(generation=3), revision)  # after it was read, and before it is waited for
    waiting = threading.Thread(target=document.wait, args=(3600,), daemon=True)
    waiting.start()
    waiting.join(timeout=60)
    assert not waiting.is_alive()
