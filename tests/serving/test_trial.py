"""One rollout at a time, and the end of interrupted ones; with the real document, store and registry."""

import json
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.registry.mlflow_registry import champion_version, open_registry
from forge.registry.promotion import promote, promotions
from forge.serving import trial as trials
from forge.serving.desired import Desired, RolloutState, Trial
from forge.serving.local_target import FileDocument
from forge.serving.trial import FAILED, INTERRUPTED, Recovery, TrialLost, active_rollout
from forge.storage import DirectoryStore
from forge.storage import lease as leases
from tests.serving.crashes import change_document, crash
from tests.serving.place import Reader
from tests.serving.states import count_up, desired, serving, version

BEFORE, AFTER = serving(version(1)), serving(version(1), version(2))


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two registered versions; the first is the champion and serves. Shared, so not to be changed."""
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


def tag(settings: Settings) -> str | None:
    """Why the rollout of version 2 failed."""
    return open_registry(settings).get_model_version("dates", "2").tags.get(FAILED)


def test_a_rollout_changes_the_document_and_ends(settings: Settings) -> None:
    document = FileDocument(settings)
    with active_rollout(document, version(2), "1", recovery_of(settings), 1) as rollout:
        started, _ = document.read()
        assert started.trial is not None
        assert (started.trial.before, started.serving, started.generation) == (BEFORE, BEFORE, 2)
        rollout.change(AFTER)
        rollout.renew()
        assert document.read()[0].generation == 3, "a renewal does not count as a change"
        rollout.finish()
    assert document.read()[0] == Desired(generation=4, serving=AFTER)


def test_the_document_shows_the_state_from_the_next_write_on(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    document = FileDocument(settings)
    caplog.set_level("INFO")

    def shown() -> RolloutState | None:
        trial = document.read()[0].trial
        return trial and trial.state

    with active_rollout(document, version(2), "1", recovery_of(settings), 1) as rollout:
        assert shown() == RolloutState.STARTED
        rollout.reached(RolloutState.LOADED)
        assert shown() == RolloutState.STARTED, "no round trip of its own"
        rollout.renew()
        assert shown() == RolloutState.LOADED
        rollout.reached(RolloutState.PROVED)
        rollout.change(AFTER)
        assert shown() == RolloutState.PROVED
        rollout.finish()
    versioned = version(2).versioned
    assert caplog.messages == [f"{versioned}: started", f"{versioned}: loaded", f"{versioned}: proved"]


@pytest.mark.parametrize(("error", "reason"), [(ForgeError("no"), "no"), (KeyboardInterrupt(), INTERRUPTED)])
def test_an_error_restores_what_served_before(settings: Settings, error: BaseException, reason: str) -> None:
    document = FileDocument(settings)
    with (
        pytest.raises(type(error)),
        active_rollout(document, version(2), "1", recovery_of(settings), 1) as rollout,
    ):
        rollout.change(AFTER)
        raise error
    assert document.read()[0] == Desired(generation=4, serving=BEFORE)
    assert tag(settings) == reason


def test_the_version_is_tagged_before_the_document_changes(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed between the two leaves a trial, which recovery ends."""
    document = FileDocument(settings)
    in_document: list[Trial | None] = []
    monkeypatch.setattr(trials, "tag_failed", lambda *arguments: in_document.append(document.read()[0].trial))
    with pytest.raises(ForgeError), active_rollout(document, version(2), "1", recovery_of(settings), 1):
        raise ForgeError("no")
    assert len(in_document) == 1
    assert in_document[0] is not None


def test_one_rollout_at_a_time(settings: Settings) -> None:
    document = FileDocument(settings)
    other = r"another rollout, of dates-222222222222 \(started\), started by .*, has been in progress"
    with active_rollout(document, version(2), "1", recovery_of(settings), 1) as rollout:
        with (
            pytest.raises(ForgeError, match=other),
            active_rollout(document, version(3), "1", recovery_of(settings), 0.1),
        ):
            raise AssertionError("two at the same time")
        rollout.finish()


def test_the_next_rollout_waits_for_its_turn(settings: Settings) -> None:
    document = FileDocument(settings)
    seen = []

    def second() -> None:
        with active_rollout(document, version(3), "1", recovery_of(settings), 60) as rollout:
            seen.append(document.read()[0].serving)
            rollout.finish()

    with active_rollout(document, version(2), "1", recovery_of(settings), 1) as rollout:
        thread = threading.Thread(target=second)
        thread.start()
        rollout.change(AFTER)
        rollout.finish()
    thread.join(60)
    assert seen == [AFTER]


def crash_rollout(settings: Settings, when: str) -> None:
    """Start a rollout of version 2 in a process that is killed."""
    crash(change_document, settings.home, when)
    assert FileDocument(settings).read()[0].trial is not None


def test_a_killed_rollout_is_undone_and_its_version_tagged(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    crash_rollout(settings, "before")
    document = FileDocument(settings)
    assert recovery_of(settings)(document)
    assert document.read()[0] == Desired(generation=4, serving=BEFORE)
    assert tag(settings) == INTERRUPTED
    assert champion_version(open_registry(settings), "dates") == "1"
    assert f"{version(2).versioned}: undone, from the state proved" in caplog.messages
    assert not recovery_of(settings)(document)


@pytest.mark.parametrize("when", ["promoted", "recorded"])
def test_a_killed_rollout_with_a_recorded_promotion_is_finished_with_only_a_lease_written_to_the_store(
    settings: Settings, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "ABANDONED", 0.6)  # the killed process has left its claim
    crash_rollout(settings, when)
    document = FileDocument(settings)
    assert Recovery(lambda: Reader(settings.store_root), settings)(document)
    assert document.read()[0] == Desired(generation=4, serving=AFTER)
    assert tag(settings) is None
    assert champion_version(open_registry(settings), "dates") == "2"
    assert [past.version for past in promotions(store_of(settings), "dates")] == ["1", "2"]


def test_a_rollout_on_another_machine_is_undone_when_its_renewals_stop(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_rollout(settings, "before")
    document = FileDocument(settings)
    left, _ = document.read()
    assert left.trial is not None

    def renewed(renewals: int) -> None:
        elsewhere = left.trial.model_copy(update={"process": "elsewhere.1.1.1", "renewals": renewals})
        document.write(left.model_copy(update={"trial": elsewhere}), document.read()[1])

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


def test_a_rollout_that_fails_after_its_promotion_was_recorded_is_finished_by_recovery(settings: Settings) -> None:
    document, store, client = FileDocument(settings), store_of(settings), open_registry(settings)
    with (
        pytest.raises(KeyboardInterrupt),
        active_rollout(document, version(2), "1", recovery_of(settings), 1) as rollout,
    ):
        rollout.change(AFTER)
        promote(client, store, "dates", "2", "1", "passed", rollout.trial.id)
        raise KeyboardInterrupt
    assert rollout.not_undone == "its promotion is recorded, and the reconciler finishes the rollout"
    left, _ = document.read()
    assert left.trial is not None
    assert left.serving == AFTER
    assert trials.recover(document, store, settings, left.trial.id)
    assert document.read()[0] == Desired(generation=left.generation + 1, serving=AFTER)


def test_a_rollout_that_fails_while_the_store_cannot_be_read_is_left_to_recovery(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = FileDocument(settings)

    def away(*arguments: object) -> bool:
        raise ForgeError("the store does not answer")

    monkeypatch.setattr(trials, "is_promoted", away)
    with (
        pytest.raises(ForgeError, match="no"),
        active_rollout(document, version(2), "1", recovery_of(settings), 1) as rollout,
    ):
        rollout.change(AFTER)
        raise ForgeError("no")
    assert "the store does not answer" in rollout.not_undone
    left, _ = document.read()
    assert left.trial is not None
    assert left.serving == AFTER


def test_an_earlier_promotion_of_the_version_does_not_count(settings: Settings) -> None:
    """Version 2 was the champion once, and the alias was moved back by hand."""
    client, store = open_registry(settings), store_of(settings)
    promote(client, store, "dates", "2", "1", "passed", "an earlier trial")
    client.set_registered_model_alias("dates", "champion", "1")
    crash_rollout(settings, "before")
    document = FileDocument(settings)
    assert recovery_of(settings)(document)
    assert document.read()[0].serving == BEFORE
    assert champion_version(client, "dates") == "1"


def test_an_alias_that_was_moved_in_the_meantime_stays(settings: Settings) -> None:
    crash_rollout(settings, "promoted")
    client = open_registry(settings)
    other = client.create_model_version("dates", source=version(3).uri)
    client.set_registered_model_alias("dates", "champion", other.version)
    document = FileDocument(settings)
    assert recovery_of(settings)(document)
    assert document.read()[0].serving == BEFORE
    assert champion_version(client, "dates") == "3"


def test_a_later_promotion_is_not_overruled(settings: Settings) -> None:
    crash_rollout(settings, "promoted")
    client = open_registry(settings)
    other = client.create_model_version("dates", source=version(3).uri)
    promote(client, store_of(settings), "dates", str(other.version), "2", "by hand")
    client.set_registered_model_alias("dates", "champion", "1")
    document = FileDocument(settings)
    assert Recovery(lambda: Reader(settings.store_root), settings)(document)
    assert document.read()[0].serving == BEFORE
    assert champion_version(client, "dates") == "1"


def test_a_champion_whose_repeated_rollout_is_interrupted_is_not_tagged(settings: Settings) -> None:
    promote(open_registry(settings), store_of(settings), "dates", "2", "1", "passed")
    crash_rollout(settings, "before")
    assert recovery_of(settings)(FileDocument(settings))
    assert tag(settings) is None


def test_an_error_after_another_process_has_ended_the_trial_is_attributed_to_that(settings: Settings) -> None:
    document = FileDocument(settings)
    with (
        pytest.raises(TrialLost, match="another process has ended") as lost,
        active_rollout(document, version(2), "1", recovery_of(settings), 1),
    ):
        now, revision = document.read()
        document.write(desired(BEFORE, now.generation + 1), revision)
        raise ForgeError("the model does not answer any more")
    assert isinstance(lost.value.__cause__, ForgeError)
    assert tag(settings) is None, "the process that ended the trial tags the version"


def test_an_unreadable_document_does_not_mean_that_the_trial_is_lost(settings: Settings) -> None:
    document = FileDocument(settings)
    with active_rollout(document, version(2), "1", recovery_of(settings), 1) as rollout:
        text = document.path.read_text()
        document.path.write_text("{")
        with pytest.raises(ForgeError, match="not a valid description"):
            rollout.renew()
        assert rollout.lost() is None
        rollout.check()
        document.path.write_text(text)
        rollout.finish()


def test_a_rollout_that_was_taken_for_dead_writes_nothing_more(settings: Settings) -> None:
    document = FileDocument(settings)
    with (
        pytest.raises(ForgeError, match="another process has ended"),
        active_rollout(document, version(2), "1", recovery_of(settings), 1) as rollout,
    ):
        now, revision = document.read()
        document.write(desired(serving(version(3)), now.generation + 1), revision)
        rollout.change(AFTER)
    assert document.read()[0].serving == serving(version(3))


def test_a_trial_is_renewed_until_it_ends(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "RENEWAL", 0.02)
    document = FileDocument(settings)
    with active_rollout(document, version(2), "1", recovery_of(settings), 1) as rollout:
        while (trial := document.read()[0].trial) is None or trial.renewals < 3:
            time.sleep(0.01)
        rollout.finish()


def test_concurrent_writers_lose_no_change(settings: Settings) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=count_up, args=(str(settings.home), 20)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert FileDocument(settings).read()[0].generation == 1 + 60


def test_a_document_of_an_older_release_is_read(settings: Settings) -> None:
    document = FileDocument(settings)
    base = {"name": "llama", "version": "", "uri": "/data/llama", "digest": "e" * 64}
    old = {"serving": {"base": base}}
    trial = {"id": "t", "name": "llama", "of": base, "champion": "", "owner": "me", "process": "h.1.1.1", "before": {}}
    document.path.write_text(json.dumps(old | {"trial": trial}))
    read, _ = document.read()
    assert read.serving.base is not None
    assert read.serving.base.uri == "file:///data/llama"
    assert read.trial is not None
    assert read.trial.state == RolloutState.STARTED


def test_a_trial_of_a_later_release_is_read(settings: Settings) -> None:
    document = FileDocument(settings)
    with active_rollout(document, version(2), "1", recovery_of(settings), 1) as rollout:
        content = json.loads(document.path.read_text())
        content["trial"]["added later"] = 1
        document.path.write_text(json.dumps(content))
        rollout.finish()


def test_the_error_for_an_invalid_document_names_the_file_and_the_field(settings: Settings) -> None:
    document = FileDocument(settings)
    document.path.write_text(json.dumps({"serving": {"base": 3}}))
    with pytest.raises(ForgeError, match=r"desired\.json: not a valid description of what to serve \(serving\.base"):
        document.read()
    assert os.path.exists(document.path)
