"""One rollout at a time, and what becomes of one that was broken off; the real document, store and registry."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.registry.mlflow_registry import champion_version, open_registry
from forge.registry.promotion import promote, promotions
from forge.serving import trial as trials
from forge.serving.desired import Conflict, Desired, DesiredStore, Trial
from forge.serving.local_target import FileDocument
from forge.serving.trial import BROKEN_OFF, FAILED, Recovery, TrialLost, active_rollout
from forge.storage import DirectoryStore
from forge.storage import lease as leases
from tests.serving.place import Reader
from tests.serving.states import desired, serving, version

BEFORE, AFTER = serving(version(1)), serving(version(1), version(2))


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two registered versions, of which the first is the champion and serves; not to be changed."""
    settings = Settings(home=tmp_path_factory.mktemp("registered"))
    client = open_registry(settings)
    client.create_registered_model("dates")
    for number in (1, 2):
        client.create_model_version("dates", source=version(number).uri)
    promote(client, DirectoryStore(settings.store_root), "dates", "1", "", "the first")
    document = FileDocument(settings)
    document.write(desired(BEFORE), document.read()[1])
    return settings.home


@pytest.fixture
def settings(registered: Path, tmp_path: Path) -> Settings:
    """A copy of that home."""
    shutil.copytree(registered, tmp_path / "home")
    return Settings(home=tmp_path / "home")


def store_of(settings: Settings) -> DirectoryStore:
    return DirectoryStore(settings.store_root)


def recovery_of(settings: Settings) -> Recovery:
    return Recovery(lambda: store_of(settings), settings)


def nobody(document: DesiredStore) -> bool:
    """Recovers nothing."""
    return False


def undo(trial: Trial, error: BaseException) -> bool:
    """Every error is to be undone."""
    return True


def tag(settings: Settings) -> str | None:
    return open_registry(settings).get_model_version("dates", "2").tags.get(FAILED)


def test_a_trial_changes_the_document_and_ends(settings: Settings) -> None:
    document = FileDocument(settings)
    with active_rollout(document, version(2), "1", nobody, undo, 1) as trial:
        begun, _ = document.read()
        assert begun.trial is not None
        assert (begun.trial.before, begun.serving, begun.generation) == (BEFORE, BEFORE, 2)
        trial.change(AFTER)
        trial.renew()
        assert document.read()[0].generation == 3, "a renewal is no change"
        trial.finish()
    assert document.read()[0] == Desired(generation=4, serving=AFTER)


@pytest.mark.parametrize("error", [ForgeError("no"), KeyboardInterrupt()])
def test_what_goes_wrong_brings_back_what_served_before(settings: Settings, error: BaseException) -> None:
    document = FileDocument(settings)
    with pytest.raises(type(error)), active_rollout(document, version(2), "1", nobody, undo, 1) as trial:
        trial.change(AFTER)
        raise error
    assert document.read()[0] == Desired(generation=4, serving=BEFORE)


def test_one_rollout_at_a_time(settings: Settings) -> None:
    document = FileDocument(settings)
    with active_rollout(document, version(2), "1", nobody, undo, 1):  # noqa: SIM117
        with pytest.raises(ForgeError, match=r"another rollout, of dates-222222222222 by .*, has gone on"):
            with active_rollout(document, version(3), "1", recovery_of(settings), undo, 0.1):
                raise AssertionError("two at once")


def test_the_next_one_waits_for_its_turn(settings: Settings) -> None:
    document = FileDocument(settings)
    seen = []

    def second() -> None:
        with active_rollout(document, version(3), "1", nobody, undo, 60) as trial:
            seen.append(document.read()[0].serving)
            trial.finish()

    with active_rollout(document, version(2), "1", nobody, undo, 1) as trial:
        thread = threading.Thread(target=second)
        thread.start()
        trial.change(AFTER)
        trial.finish()
    thread.join(60)
    assert seen == [AFTER]


CRASH = """
import os, signal, sys
from pathlib import Path
from forge.registry.promotion import promote
from forge.registry.mlflow_registry import open_registry
from forge.serving.local_target import FileDocument
from forge.serving.trial import trying
from forge.core.settings import Settings
from forge.storage import DirectoryStore
from tests.serving.states import serving, version
settings = Settings(home=Path(sys.argv[1]))
store = DirectoryStore(settings.store_root)
with trying(FileDocument(settings), version(2), "1", lambda document: False, lambda trial, error: True, 1) as trial:
    trial.change(serving(version(1), version(2)))
    if sys.argv[2] == "promoted":
        promote(open_registry(settings), store, "dates", "2", "1", "passed", trial.trial.id)
    if sys.argv[2] == "recorded":
        from forge.registry import promotion
        from mlflow import MlflowClient
        MlflowClient.set_registered_model_alias = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
        promote(open_registry(settings), store, "dates", "2", "1", "passed", trial.trial.id)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def crash(settings: Settings, when: str) -> None:
    """A rollout whose process is killed."""
    done = subprocess.run([sys.executable, "-c", CRASH, str(settings.home), when], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert FileDocument(settings).read()[0].trial is not None


def test_a_rollout_whose_process_was_killed_is_undone_and_the_registry_says_so(settings: Settings) -> None:
    crash(settings, "before")
    document = FileDocument(settings)
    assert recovery_of(settings)(document)
    assert document.read()[0] == Desired(generation=4, serving=BEFORE)
    assert tag(settings) == BROKEN_OFF
    assert champion_version(open_registry(settings), "dates") == "1"
    assert not recovery_of(settings)(document)


@pytest.mark.parametrize("when", ["promoted", "recorded"])
def test_one_that_had_promoted_its_version_is_finished_by_who_may_only_read_and_lease(
    settings: Settings, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "ABANDONED", 0.6)  # the killed process has left its claim
    crash(settings, when)
    document = FileDocument(settings)
    assert Recovery(lambda: Reader(settings.store_root), settings)(document)
    assert document.read()[0] == Desired(generation=4, serving=AFTER)
    assert tag(settings) is None
    assert champion_version(open_registry(settings), "dates") == "2"
    assert [past.version for past in promotions(store_of(settings), "dates")] == ["1", "2"]


def test_one_of_another_machine_is_undone_when_it_is_not_renewed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash(settings, "before")
    document = FileDocument(settings)
    there, _ = document.read()
    assert there.trial is not None

    def renewed(renewals: int) -> None:
        moved = there.trial.model_copy(update={"process": "elsewhere.1.1.1", "renewals": renewals})
        document.write(there.model_copy(update={"trial": moved}), document.read()[1])

    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    recovery = recovery_of(settings)
    renewed(1)
    for _ in range(10):
        assert not recovery(document)
        now += trials.ABANDONED - 1
        renewed(int(now))
    assert not recovery(document)
    now += trials.ABANDONED + 1
    monkeypatch.undo()
    monkeypatch.setattr(recovery, "_since", time.monotonic() - trials.ABANDONED - 1)
    assert recovery(document)


def test_what_fails_after_the_promotion_was_recorded_is_made_whole_and_not_undone(settings: Settings) -> None:
    """Its process lives on for a while: it is ended by it, or by whoever finds the trial later."""
    document, store, client = FileDocument(settings), store_of(settings), open_registry(settings)
    with (
        pytest.raises(KeyboardInterrupt),
        active_rollout(
            document, version(2), "1", nobody, lambda trial, error: not trials.is_promoted(store, trial), 1
        ) as trial,
    ):
        trial.change(AFTER)
        promote(client, store, "dates", "2", "1", "passed", trial.trial.id)
        raise KeyboardInterrupt
    left, _ = document.read()
    assert left.trial is not None
    assert left.serving == AFTER
    assert trials.recover(document, store, settings, left.trial.id)
    assert document.read()[0] == Desired(generation=left.generation + 1, serving=AFTER)


def test_an_old_promotion_of_the_version_makes_no_new_trial_whole(settings: Settings) -> None:
    """Version 2 was the champion once, and the alias was moved back by hand: a new trial of it proves nothing yet."""
    client, store = open_registry(settings), store_of(settings)
    promote(client, store, "dates", "2", "1", "passed", "an earlier trial")
    client.set_registered_model_alias("dates", "champion", "1")
    crash(settings, "before")
    document = FileDocument(settings)
    assert recovery_of(settings)(document)
    assert document.read()[0].serving == BEFORE
    assert champion_version(client, "dates") == "1"


def test_an_alias_that_somebody_moved_meanwhile_is_left_there(settings: Settings) -> None:
    crash(settings, "promoted")
    client = open_registry(settings)
    other = client.create_model_version("dates", source=version(3).uri)
    client.set_registered_model_alias("dates", "champion", other.version)
    document = FileDocument(settings)
    assert recovery_of(settings)(document)
    assert document.read()[0].serving == BEFORE
    assert champion_version(client, "dates") == "3"


def test_nothing_is_recorded_where_another_promotion_came_after_the_one_to_finish(settings: Settings) -> None:
    crash(settings, "promoted")
    client = open_registry(settings)
    other = client.create_model_version("dates", source=version(3).uri)
    promote(client, store_of(settings), "dates", str(other.version), "2", "by hand")
    client.set_registered_model_alias("dates", "champion", "1")
    document = FileDocument(settings)
    assert Recovery(lambda: Reader(settings.store_root), settings)(document)
    assert document.read()[0].serving == BEFORE
    assert champion_version(client, "dates") == "1"


def test_the_champion_is_not_tagged_as_failed_where_serving_it_again_is_broken_off(settings: Settings) -> None:
    promote(open_registry(settings), store_of(settings), "dates", "2", "1", "passed")
    crash(settings, "before")
    assert recovery_of(settings)(FileDocument(settings))
    assert tag(settings) is None


def test_what_fails_once_somebody_has_ended_the_trial_is_laid_to_that(settings: Settings) -> None:
    document, undone = FileDocument(settings), []

    def saw(trial: Trial, error: BaseException) -> bool:
        undone.append(error)
        return True

    with (
        pytest.raises(TrialLost, match="somebody else has ended") as ended,
        active_rollout(document, version(2), "1", nobody, saw, 1),
    ):
        there, revision = document.read()
        document.write(desired(BEFORE, there.generation + 1), revision)
        raise ForgeError("the model is not there any more")
    assert isinstance(ended.value.__cause__, ForgeError)
    assert undone == []


def test_a_document_that_cannot_be_read_now_is_no_end(settings: Settings) -> None:
    document = FileDocument(settings)
    with active_rollout(document, version(2), "1", nobody, undo, 1) as trial:
        text = document.path.read_text()
        document.path.write_text("{")
        with pytest.raises(ForgeError, match="not a description"):
            trial.renew()
        assert trial.gone() is None
        trial.check()
        document.path.write_text(text)
        trial.finish()


def test_a_rollout_that_was_taken_for_dead_does_not_go_on(settings: Settings) -> None:
    document = FileDocument(settings)
    with (
        pytest.raises(ForgeError, match="somebody else has ended"),
        active_rollout(document, version(2), "1", nobody, undo, 1) as ours,
    ):
        there, revision = document.read()
        document.write(desired(serving(version(3)), there.generation + 1), revision)
        ours.change(AFTER)
    assert document.read()[0].serving == serving(version(3))


def test_a_trial_is_renewed_while_it_lasts(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "RENEWED", 0.02)
    document = FileDocument(settings)
    with active_rollout(document, version(2), "1", nobody, undo, 1) as trial:
        first = document.read()[0].trial
        assert first is not None
        while (now := document.read()[0].trial) is None or now.renewals < 3:
            time.sleep(0.01)
        trial.finish()


def count_up(home: str, times: int) -> None:
    document = FileDocument(Settings(home=Path(home)))
    for _ in range(times):
        while True:
            there, revision = document.read()
            try:
                document.write(there.model_copy(update={"generation": there.generation + 1}), revision)
                break
            except Conflict:
                continue


def test_no_change_of_several_writers_is_lost(settings: Settings) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=count_up, args=(str(settings.home), 20)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert FileDocument(settings).read()[0].generation == 1 + 80


def test_a_document_of_an_older_release_is_read(settings: Settings) -> None:
    document = FileDocument(settings)
    base = {"name": "llama", "version": "", "uri": "/data/llama", "digest": "e" * 64}
    document.path.write_text(json.dumps({"serving": {"base": base}}))
    there, _ = document.read()
    assert there.serving.base is not None
    assert there.serving.base.uri == "file:///data/llama"


def test_a_broken_document_is_named(settings: Settings) -> None:
    document = FileDocument(settings)
    document.path.write_text(json.dumps({"serving": {"base": 3}}))
    with pytest.raises(ForgeError, match=r"desired\.json: not a description of what to serve \(serving\.base"):
        document.read()
    assert os.path.exists(document.path)
