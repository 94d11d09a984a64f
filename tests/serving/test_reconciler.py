"""The reconciler's steps, with a fake vLLM that can be put into any state.

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

    return Reconciler(document, stand, lambda one: tmp_path, released.append, nothing_to_recover, stand.names_file)


def declare(document: FileDocument, state: Serving, trial: Trial | None = None) -> None:
    before, revision = document.read()
    document.write(Desired(generation=before.generation + 1, serving=state, trial=trial), revision)


def names_of(stand: Stand) -> dict:
    return json.loads(stand.names_file.read_text())["names"]


def test_base_adapter_and_name_take_one_step(reconciler: Reconciler, document: FileDocument, stand: Stand) -> None:
    declare(document, serving(ONE, TWO))
    actual = reconciler.step()
    assert actual == Actual(generation=1, base=ONE.versioned, loaded=(TWO.versioned,), names={"dates": TWO.versioned})
    assert reconciler.step() == actual


def test_a_name_moves_only_once_the_new_version_is_loaded(
    reconciler: Reconciler, document: FileDocument, stand: Stand
) -> None:
    declare(document, serving(ONE, TWO))
    reconciler.step()
    stand.refuses = {THREE.versioned}
    declare(document, serving(ONE, THREE))
    actual = reconciler.step()
    assert actual.names == names_of(stand) == {"dates": TWO.versioned}
    assert actual.loaded == (TWO.versioned,)
    assert "no such rank" in actual.failed[THREE.versioned]
    assert "no such rank" in actual.waiting


def test_a_failed_load_is_retried_after_a_while(
    reconciler: Reconciler, document: FileDocument, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand.refuses = {TWO.versioned}
    declare(document, serving(ONE, TWO))
    assert TWO.versioned in reconciler.step().failed
    stand.refuses = set()
    assert TWO.versioned in reconciler.step().failed, "not immediately"
    reconciler.failures[TWO.versioned].retry_at = 0.0
    assert reconciler.step().failed == {}
    assert stand.adapters == [TWO.versioned]


def test_an_old_version_is_unloaded_once_it_has_no_requests_in_flight(
    reconciler: Reconciler, document: FileDocument, stand: Stand, released: list[Served]
) -> None:
    declare(document, serving(ONE, TWO))
    reconciler.step()
    stand.in_flight = {TWO.versioned: 1}
    declare(document, serving(ONE, THREE))
    for _ in range(3):
        assert reconciler.step().loaded == (TWO.versioned, THREE.versioned)
    assert names_of(stand) == {"dates": THREE.versioned}
    stand.in_flight = {TWO.versioned: 0}
    assert reconciler.step().loaded == (THREE.versioned,)
    assert released == [TWO]


def test_the_version_that_a_rollout_would_go_back_to_stays_loaded(
    reconciler: Reconciler, document: FileDocument, stand: Stand
) -> None:
    trial = Trial(id="t", name="dates", of=THREE, before=serving(ONE, TWO), champion="2", owner="me", process="h/1/1")
    declare(document, serving(ONE, TWO))
    reconciler.step()
    declare(document, serving(ONE, THREE), trial)
    assert reconciler.step().loaded == (TWO.versioned, THREE.versioned)
    declare(document, serving(ONE, THREE))
    assert reconciler.step().loaded == (THREE.versioned,)


def test_during_a_change_of_the_base_names_point_to_nothing_until_the_rollout_switches_them(
    reconciler: Reconciler, document: FileDocument, stand: Stand
) -> None:
    declare(document, serving(ONE))
    reconciler.step()
    trial = Trial(id="t", name="dates", of=TWO, before=serving(ONE), champion="1", owner="me", process="h/1/1")
    stand.waiting = "vLLM is starting"
    declare(document, Serving(base=TWO), trial)
    assert reconciler.step().waiting == "vLLM is starting"
    assert names_of(stand) == {"dates": None}
    stand.waiting = ""
    actual = reconciler.step()
    assert (actual.base, actual.names, names_of(stand)) == (TWO.versioned, {}, {"dates": None})
    declare(document, serving(TWO), trial)
    assert reconciler.step().names == names_of(stand) == {"dates": TWO.versioned}


@pytest.mark.parametrize("how", ["silent", "nonsense"])
def test_names_survive_a_moment_without_an_answer(
    reconciler: Reconciler, document: FileDocument, stand: Stand, how: str
) -> None:
    declare(document, serving(ONE, TWO))
    reconciler.step()
    setattr(stand, how, True)
    assert reconciler.step().waiting == "vLLM does not answer at the moment"
    assert names_of(stand) == {"dates": TWO.versioned}


def test_a_base_that_cannot_be_served_is_reported(reconciler: Reconciler, document: FileDocument, stand: Stand) -> None:
    stand.refuses = {ONE.versioned}
    declare(document, serving(ONE))
    actual = reconciler.step()
    assert actual.failed == {ONE.versioned: "it exits immediately"}
    assert names_of(stand) == {"dates": None}
    reconciler.step()
    assert len(stand.ensured) == 1, "it is not retried immediately"


def test_serving_continues_while_an_interrupted_rollout_cannot_be_ended(
    reconciler: Reconciler, document: FileDocument, stand: Stand
) -> None:
    calls = []

    def away(document: DesiredStore) -> bool:
        calls.append(1)
        raise ForgeError("MLflow does not answer")

    reconciler.recover = away
    trial = Trial(id="t", name="dates", of=TWO, before=serving(ONE), champion="1", owner="me", process="h/1/1")
    declare(document, serving(ONE, TWO), trial)
    for _ in range(3):
        assert reconciler.step().names == {"dates": TWO.versioned}
    assert len(calls) == 1, "it is retried after a while"


def test_with_nothing_to_serve_vllm_is_stopped_and_the_loop_ends(
    reconciler: Reconciler, document: FileDocument, stand: Stand
) -> None:
    declare(document, serving(ONE, TWO))
    reconciler.step()
    declare(document, Serving())
    run(reconciler, 0, lambda: False, lambda: None, forever=False)
    assert (reconciler.actual.waiting, stand.base, names_of(stand)) == (NOTHING, "", {})


def test_an_error_in_a_step_is_logged_once_and_the_step_repeated(
    reconciler: Reconciler, document: FileDocument, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    declare(document, Serving())
    broken = iter([True, True, False])
    step = reconciler.step

    def sometimes() -> Actual:
        if next(broken):
            raise RuntimeError("the disk is full")
        return step()

    monkeypatch.setattr(reconciler, "step", sometimes)
    run(reconciler, 0, lambda: False, lambda: None, forever=False)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["will be tried again: RuntimeError: the disk is full"]


def test_the_start_and_the_end_of_a_fetch_are_logged(
    reconciler: Reconciler, document: FileDocument, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def fetch(one: Served) -> Path:
        assert caplog.messages == [f"fetching {one.uri}"]
        assert reconciler.actual.waiting == f"fetching {one.uri}"
        return tmp_path

    reconciler.fetch = fetch
    declare(document, serving(ONE))
    reconciler.step()
    assert caplog.messages[:2] == [f"fetching {ONE.uri}", f"{ONE.uri} is fetched and verified"]


def test_the_state_over_http(
    reconciler: Reconciler, document: FileDocument, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(document, serving(ONE, TWO))
    stand.in_flight = {TWO.versioned: 3}
    status = Status(reconciler, "127.0.0.1", 0)
    cluster = Settings(serving_target="kubernetes", reconciler_url=f"http://127.0.0.1:{status.port}")

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{status.port}{path}") as answer:
            return answer.read().decode()

    try:
        with pytest.raises(ForgeError, match="/desired: answers 503: the reconciler hasn't read the desired state"):
            read_serving(cluster)
        reconciler.step()
        assert Desired.model_validate_json(get("/desired")) == document.read()[0]
        assert read_serving(cluster) == serving(ONE, TWO)
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
        read_serving(cluster)
    with pytest.raises(ForgeError, match="set FORGE_RECONCILER_URL"):
        read_serving(Settings(serving_target="kubernetes"))


def test_a_rollout_in_progress_is_left_out_of_what_should_be_served(document: FileDocument, tmp_path: Path) -> None:
    trial = Trial(id="t", name="dates", of=TWO, before=serving(ONE), champion="1", owner="me", process="h/1/1")
    declare(document, serving(ONE, TWO), trial)
    assert read_serving(Settings(home=tmp_path)) == serving(ONE)
    declare(document, serving(ONE, TWO))
    assert read_serving(Settings(home=tmp_path)) == serving(ONE, TWO)


def test_waiting_ends_when_the_document_changes(tmp_path: Path) -> None:
    document, other = (FileDocument(Settings(home=tmp_path)) for _ in range(2))
    for generation in (1, 2):
        _, revision = document.read()
        waiting = threading.Thread(target=document.wait, args=(3600,), daemon=True)
        waiting.start()
        other.write(Desired(generation=generation), revision)
        waiting.join(timeout=60)
        assert not waiting.is_alive()
    _, revision = document.read()
    other.write(Desired(generation=3), revision)  # between the read and the wait
    waiting = threading.Thread(target=document.wait, args=(3600,), daemon=True)
    waiting.start()
    waiting.join(timeout=60)
    assert not waiting.is_alive()
