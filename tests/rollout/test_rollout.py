"""Whole rollouts with a fake vLLM: their states, how they are undone from each, and how they end when interrupted.

With a real vLLM: tests/integration/test_serving.py and test_kills.py.
"""

import contextlib
import logging
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.core.contracts import Engine, Evaluation, Version
from forge.core.errors import ForgeError
from forge.core.recipe import ServingRecipe
from forge.core.settings import Settings
from forge.registry.mlflow_registry import open_registry
from forge.registry.promotion import promotions
from forge.serving import trial as trials
from forge.serving.desired import Conflict, RolloutState
from forge.serving.trial import INTERRUPTED, ActiveRollout, Recovery, TrialLost, active_rollout
from tasks.rollout import rollout as steps
from tasks.rollout.rollout import TRANSITIONS, Rollout, roll_out
from tests.serving import crashes
from tests.serving.crashes import crash
from tests.serving.place import QUICK, Place, rollout_place

LONG = QUICK.model_copy(update={"watch_seconds": 20})  # forty questions


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an empty registry, shared because creating its tables takes seconds. Not to be changed."""
    home = tmp_path_factory.mktemp("registry")
    open_registry(Settings(home=home))
    return home


@pytest.fixture
def place(registry: Path, tmp_path: Path) -> Iterator[Place]:
    """A place that serves version 1, the champion."""
    shutil.copytree(registry, tmp_path / "home")
    with rollout_place(tmp_path / "home") as one:
        one.serve("1", "")
        yield one


def test_a_version_becomes_the_champion_and_rolling_it_out_again_changes_nothing(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.challenge("2")
    first = place.serve("2", "1")
    assert (first.how, first.version, first.previous, place.aliases()) == ("adapter", "2", "1", {"champion": "2"})
    again = place.serve("2", "1")
    assert (again.how, again.version, again.digest, again.endpoint) == ("unchanged", "2", first.digest, first.endpoint)
    assert [past.version for past in promotions(place.store, "dates")] == ["1", "2"]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_the_table_of_transitions_reaches_all_states_in_order() -> None:
    assert [RolloutState.STARTED, *(state for _, state in TRANSITIONS)] == list(RolloutState)


def test_the_document_and_the_log_show_each_state(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trials, "RENEWAL", 0.02)
    caplog.set_level("INFO")
    place.challenge("2")
    shown: list[RolloutState] = []
    reached = ActiveRollout.reached

    def reached_and_shown(self: ActiveRollout, state: RolloutState) -> None:
        reached(self, state)
        shown.append(wait_for_state(place, state))

    monkeypatch.setattr(ActiveRollout, "reached", reached_and_shown)
    place.serve("2", "1")
    assert shown == list(RolloutState)
    versioned = place.versions["2"].versioned
    lines = [line for line in caplog.messages if line.startswith(f"{versioned}: ")]
    assert lines == [f"{versioned}: {state}" for state in RolloutState], "each state is logged once"


def wait_for_state(place: Place, state: RolloutState) -> RolloutState:
    """Wait until a renewal has written a state into the document."""
    while (trial := place.document.read()[0].trial) is None or trial.state != state:
        place.document.wait(1)
    return trial.state


def fail_after(state: RolloutState, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise an error, or send SIGTERM to this process, as soon as a rollout has reached a state."""

    def fail(rollout: Rollout) -> None:
        if how == "SIGTERM":
            signal.raise_signal(signal.SIGTERM)
        raise ForgeError("the disk is full")

    at = list(RolloutState).index(state)
    transitions = (*TRANSITIONS[:at], (fail, RolloutState.PROMOTED), *TRANSITIONS[at:])
    monkeypatch.setattr(steps, "TRANSITIONS", transitions)


@pytest.mark.parametrize("state", [one for one in RolloutState if one != RolloutState.PROMOTED])
def test_an_error_in_any_state_is_undone(
    place: Place, state: RolloutState, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    place.challenge("2")
    before = place.document.read()[0].serving
    fail_after(state, "error", monkeypatch)
    with pytest.raises(ForgeError, match=r"^the disk is full\ndates \(dates-.*\) serves again; the champion is unch"):
        place.serve("2", "1")
    desired = place.document.read()[0]
    assert (desired.trial, desired.serving) == (None, before)
    assert place.stand.names() == before.names
    assert place.aliases() == {"champion": "1"}
    assert place.failed("2") == "the disk is full"
    assert f"{place.versions['2'].versioned}: undone, from the state {state}" in caplog.messages


@pytest.mark.parametrize("state", [one for one in RolloutState if one != RolloutState.PROMOTED])
def test_sigterm_in_any_state_undoes_the_rollout(
    place: Place, state: RolloutState, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.challenge("2")
    before = place.document.read()[0].serving
    fail_after(state, "SIGTERM", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        place.serve("2", "1")
    desired = place.document.read()[0]
    assert (desired.trial, desired.serving) == (None, before)
    assert place.aliases() == {"champion": "1"}
    assert place.failed("2") == INTERRUPTED


@pytest.mark.parametrize("how", ["error", "SIGTERM"])
def test_after_the_promotion_nothing_is_undone(place: Place, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial stays, and the reconciler finishes the rollout once its process has exited."""
    place.challenge("2")
    fail_after(RolloutState.PROMOTED, how, monkeypatch)
    with pytest.raises((ForgeError, KeyboardInterrupt)) as raised:
        place.serve("2", "1")
    desired = place.document.read()[0]
    assert desired.trial is not None
    assert desired.serving.names == {"dates": place.versions["2"].versioned}
    assert place.aliases() == {"champion": "2"}
    assert place.failed("2") == ""
    if how == "error":
        assert "its promotion is recorded, and the reconciler finishes the rollout" in str(raised.value)


@pytest.mark.parametrize(
    ("when", "how", "failed"),
    [("before the promotion", "adapter", INTERRUPTED), ("after the promotion", "unchanged", "")],
    ids=["before", "after"],
)
def test_a_killed_rollout_is_ended_by_the_reconciler_and_succeeds_when_repeated(
    place: Place, when: str, how: str, failed: str
) -> None:
    place.challenge("2")
    crash(crashes.roll_out, place.settings, place.versions["2"], when)
    while place.document.read()[0].trial is not None:
        place.document.wait(1)
    assert place.failed("2") == failed
    assert "challenger" not in place.aliases()
    deployment = place.serve("2", "1")
    assert (deployment.version, deployment.how, place.aliases()) == ("2", how, {"champion": "2"})
    assert [past.version for past in promotions(place.store, "dates")] == ["1", "2"]
    assert place.failed("2") == ""


def end_trial(place: Place) -> None:
    """End the trial, but leave what serves, so that only the end of the trial can end the rollout."""
    while True:
        desired, revision = place.document.read()
        assert desired.trial is not None
        with contextlib.suppress(Conflict):  # it is being renewed
            return place.document.write(desired.model_copy(update={"trial": None}), revision)


def end_trial_at_question(place: Place, number: int) -> list[str]:
    """End the trial at the question with this number; returns the list of questions, which keeps growing."""
    questions: list[str] = []

    def count() -> None:
        questions.append("a question")
        if len(questions) == number:
            end_trial(place)

    place.stand.asked = count
    return questions


@pytest.mark.parametrize("during", ["loading", "the proof", "the watch"])
def test_a_rollout_stops_once_another_process_has_ended_its_trial(
    place: Place, during: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "RENEWAL", 0.05)
    place.challenge("2")
    questions: list[str] = []
    if during == "loading":
        place.stand.waiting = "vLLM is starting"
        generation = place.document.read()[0].generation
        ending = threading.Thread(target=lambda: (wait_beyond(place, generation + 1), end_trial(place)))
        ending.start()
    else:  # four questions measure what serves, and one is the proof
        questions = end_trial_at_question(place, 5 if during == "the proof" else 7)
    with pytest.raises(TrialLost, match=r"another process has ended the rollout of dates-.*; run again") as lost:
        place.serve("2", "1", LONG)
    assert lost.value.__cause__ is None, "no other error came first"
    assert len(questions) < 20, "the watch did not run to its end"
    assert place.document.read()[0].trial is None
    assert place.failed("2") == "", "the process that ended the trial tags the version"
    assert place.aliases() == {"champion": "1", "challenger": "2"}


def wait_beyond(place: Place, generation: int) -> None:
    while place.document.read()[0].generation <= generation:
        place.document.wait(1)


@pytest.mark.parametrize(
    ("compared", "champion", "message"),
    [
        ("", "2", "compared with no champion, but the champion is version 2 now"),
        ("1", "2", "compared with version 1, but the champion is version 2 now"),
        ("1", None, "compared with version 1, but the champion is gone now"),
    ],
)
def test_a_version_that_was_compared_with_another_champion_is_not_rolled_out(
    place: Place, compared: str, champion: str | None, message: str
) -> None:
    before = place.document.read()[0].serving
    if champion:
        place.client.set_registered_model_alias("dates", "champion", champion)
    else:
        place.client.delete_registered_model_alias("dates", "champion")
    with pytest.raises(ForgeError, match=message):
        place.serve("3", compared)
    desired, _ = place.document.read()
    assert (desired.trial, desired.serving) == (None, before)
    assert message in place.failed("3")
    assert place.aliases() == ({"champion": champion} if champion else {})


def test_a_version_that_cannot_be_loaded_is_no_longer_the_challenger(place: Place) -> None:
    place.challenge("2")
    place.stand.refuses = {place.versions["2"].versioned}
    with pytest.raises(ForgeError, match=r"no such rank[\s\S]*serves again; the champion is unchanged"):
        place.serve("2", "1")
    assert "no such rank" in place.failed("2")
    assert place.aliases() == {"champion": "1"}


def test_another_version_stays_the_challenger(place: Place) -> None:
    place.challenge("3")
    place.stand.refuses = {place.versions["2"].versioned}
    with pytest.raises(ForgeError, match="no such rank"):
        place.serve("2", "1")
    assert place.aliases() == {"champion": "1", "challenger": "3"}


def test_a_version_that_does_not_fit_next_to_what_serves_is_no_longer_the_challenger(place: Place) -> None:
    place.challenge("2")
    desired, revision = place.document.read()
    serving = desired.serving.model_copy(update={"engine": Engine(max_loras=0)})
    place.document.write(desired.model_copy(update={"serving": serving}), revision)
    with pytest.raises(ForgeError, match="max_loras 0: 1 adapters are loaded together"):
        place.serve("2", "1", QUICK.model_copy(update={"max_loras": 0}))
    assert "max_loras 0" in place.failed("2")
    assert place.aliases() == {"champion": "1"}


def test_a_version_that_waits_too_long_for_another_rollout_is_no_longer_the_challenger(place: Place) -> None:
    place.challenge("2")
    impatient = ServingRecipe.model_construct(**{**QUICK.model_dump(), "startup_timeout": 0.1})
    with (
        active_rollout(
            place.document, place.versions["3"], "1", Recovery(lambda: place.store, place.settings), 1
        ) as other,
        pytest.raises(ForgeError, match="another rollout"),
    ):
        place.serve("2", "1", impatient)
    other.ended.set()
    assert "another rollout" in place.failed("2")
    assert place.aliases() == {"champion": "1"}


def test_a_version_with_a_damaged_package_is_no_longer_the_challenger(place: Place) -> None:
    place.challenge("2")
    served = place.versions["2"]
    (place.store.path(served.uri) / "version").write_text("9")
    version = Version(
        uri=served.uri, digest=served.digest, store=place.store.identity, name="dates", version="2", run_id=""
    )
    evaluation = Evaluation(
        uri="file:///nowhere", digest="", store="", items=1, score=1, score_base=0, exact_match=1, nll=0, nll_base=1,
        json_validity=None, verdict="passed", reason="better", report="",
    )  # fmt: skip
    with pytest.raises(ForgeError, match="version"):
        roll_out(version, evaluation, QUICK, place.settings, place.store)
    assert place.failed("2") != ""
    assert place.aliases() == {"champion": "1"}
