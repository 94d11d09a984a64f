"""A whole rollout, with a stand-in for vLLM: what it gives back when it fails, and how it ends when it may not go on.

With a real vLLM: tests/integration/test_serving.py and test_kills.py.
"""

import contextlib
import logging
import shutil
import subprocess
import sys
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
from forge.serving.desired import Conflict
from forge.serving.trial import BROKEN_OFF, TrialLost, active_rollout
from tasks.rollout.rollout import roll_out
from tests.serving.place import QUICK, Place, rollout_place

LONG = QUICK.model_copy(update={"watch_seconds": 20})  # forty questions


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an empty registry: its tables take seconds to make."""
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


KILLED = """
import os, signal, sys
from pathlib import Path
from forge.serving import trial
from tasks.rollout import rollout
from forge.core.settings import Settings
from forge.storage import DirectoryStore
from tests.serving.place import QUICK, Candidate, Served

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

home, port, where, uri = sys.argv[1:]
if where == "before the promotion":
    rollout.promote = die
else:
    trial.Trying.finish = die
settings = Settings(home=Path(home), serving_port=int(port))
store = DirectoryStore(settings.store_root)
served = Served(name="dates", version="2", uri=uri, digest=uri.rpartition("sha256-")[2])
rollout.serve(Candidate(served, store.path(uri), store.manifest(uri), None, "1", "a test"), QUICK, settings, store)
"""


@pytest.mark.parametrize(
    ("where", "how", "failed"), [("before the promotion", "adapter", BROKEN_OFF), ("after it", "unchanged", "")]
)
def test_a_rollout_that_was_killed_is_ended_by_the_reader_and_goes_well_the_second_time(
    place: Place, where: str, how: str, failed: str
) -> None:
    place.challenge("2")
    home, port = str(place.settings.home), str(place.settings.serving_port)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, home, port, where, place.versions["2"].uri], cwd=Path(__file__).parents[2]
    )
    assert killed.returncode == -9
    while place.document.read()[0].trial is not None:
        place.document.wait(1)
    assert place.failed("2") == failed
    assert "challenger" not in place.aliases()
    deployment = place.serve("2", "1")
    assert (deployment.version, deployment.how, place.aliases()) == ("2", how, {"champion": "2"})
    assert [past.version for past in promotions(place.store, "dates")] == ["1", "2"]
    assert place.failed("2") == ""


def end_trial(place: Place) -> None:
    """End the trial under way, and leave what serves, so that nothing but the trial's end ends the rollout."""
    while True:
        desired, revision = place.document.read()
        assert desired.trial is not None
        with contextlib.suppress(Conflict):  # it is being renewed
            return place.document.write(desired.model_copy(update={"trial": None}), revision)


def when_asked(place: Place, times: int) -> list[str]:
    """End the trial when so many questions were asked; returns all that are asked."""
    asked: list[str] = []

    def count() -> None:
        asked.append("a question")
        if len(asked) == times:
            end_trial(place)

    place.stand.asked = count
    return asked


@pytest.mark.parametrize("during", ["the wait", "the proof", "the watch"])
def test_a_rollout_whose_trial_somebody_has_ended_ends_with_that_reason(
    place: Place, during: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "RENEWED", 0.05)
    place.challenge("2")
    asked: list[str] = []
    if during == "the wait":
        place.stand.waiting = "vLLM is starting"
        begun = place.document.read()[0].generation
        ending = threading.Thread(target=lambda: (wait_beyond(place, begun + 1), end_trial(place)))
        ending.start()
    else:  # four questions measure what serves, and one is the proof
        asked = when_asked(place, 5 if during == "the proof" else 7)
    with pytest.raises(TrialLost, match=r"somebody else has ended the rollout of dates-.*; run again") as ended:
        place.serve("2", "1", LONG)
    assert ended.value.__cause__ is None, "nothing else had to go wrong first"
    assert len(asked) < 20, "nor had the watch to end"
    assert place.document.read()[0].trial is None
    assert place.failed("2") == "", "that is for whoever ended it to say"
    assert place.aliases() == {"champion": "1", "challenger": "2"}


def wait_beyond(place: Place, generation: int) -> None:
    while place.document.read()[0].generation <= generation:
        place.document.wait(1)


def test_a_failed_version_is_no_challenger_any_more(place: Place) -> None:
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


def test_a_version_that_has_no_place_beside_what_serves_is_no_challenger_any_more(place: Place) -> None:
    place.challenge("2")
    desired, revision = place.document.read()
    serving = desired.serving.model_copy(update={"engine": Engine(max_loras=0)})
    place.document.write(desired.model_copy(update={"serving": serving}), revision)
    with pytest.raises(ForgeError, match="max_loras 0: 1 adapters are loaded at once"):
        place.serve("2", "1", QUICK.model_copy(update={"max_loras": 0}))
    assert "max_loras 0" in place.failed("2")
    assert place.aliases() == {"champion": "1"}


def test_a_version_whose_turn_does_not_come_is_no_challenger_any_more(place: Place) -> None:
    place.challenge("2")
    impatient = ServingRecipe.model_construct(**{**QUICK.model_dump(), "startup_timeout": 0.1})
    with (
        active_rollout(
            place.document, place.versions["3"], "1", lambda _: False, lambda trial, error: True, 1
        ) as other,
        pytest.raises(ForgeError, match="another rollout"),
    ):
        place.serve("2", "1", impatient)
    other.ended.set()
    assert "another rollout" in place.failed("2")
    assert place.aliases() == {"champion": "1"}


def test_a_version_whose_package_is_damaged_is_no_challenger_any_more(place: Place) -> None:
    place.challenge("2")
    served = place.versions["2"]
    (place.store.path(served.uri) / "version").write_text("9")
    version = Version(
        uri=served.uri, digest=served.digest, store=place.store.identity, name="dates", version="2", run_id=""
    )
    evaluation = Evaluation(
        uri="file:///nowhere", digest="", store="", items=1, score=1, score_base=0, exact_match=1, nll=0, nll_base=1,
        json_validity=None, verdict="pass", reason="better", report="",
    )  # fmt: skip
    with pytest.raises(ForgeError, match="version"):
        roll_out(version, evaluation, QUICK, place.settings, place.store)
    assert place.failed("2") != ""
    assert place.aliases() == {"champion": "1"}
