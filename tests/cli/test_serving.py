"""`forge status|ask|start|stop|remove` where nothing serves, or not what should. Real servers: tests/integration."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from cli.serving import names_table, state_lines
from forge.core.settings import Settings
from forge.serving.desired import Actual, Desired, Served, Serving, Trial
from forge.serving.local_target import FileDocument
from tests.cli.command import error_of, forge

BASE = Served(name="dates", version="1", uri="file:///models/dates", digest="a" * 64)
ADAPTER = Served(name="times", version="3", uri="file:///models/times", digest="b" * 64)
SERVING = Serving(base=BASE, adapters=(ADAPTER,), names={"dates": BASE.versioned, "times": ADAPTER.versioned})


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home in which two names should be served."""
    FileDocument(Settings(home=tmp_path / "home")).write(Desired(generation=4, serving=SERVING), "")
    return tmp_path / "home"


def test_where_nothing_serves(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert forge("status", home=home).stdout == "Nothing is serving. Train a model with: forge run\n"
    assert "nothing is serving; train a model first: forge run" in error_of(forge("ask", "Hello", home=home))
    assert "there is nothing to serve yet" in error_of(forge("start", home=home))
    assert "dates is not served" in error_of(forge("remove", "dates", home=home))
    assert forge("stop", home=home).stdout == "Nothing is serving.\n"


def test_status_where_no_reconciler_runs(home: Path) -> None:
    done = forge("status", home=home)
    assert done.returncode == 0
    for part in ("dates", "times", "adapter", "does not answer; start it with: forge start"):
        assert part in done.stdout
    report = json.loads(forge("status", "--json", home=home).stdout)
    assert report["desired"]["generation"] == 4
    assert report["actual"] is None


def test_status_of_a_rollout_and_a_failure() -> None:
    trial = Trial(id="1", name="times", of=ADAPTER, before=Serving(), champion="", owner="me@here", process="p")
    desired = Desired(generation=5, serving=SERVING, trial=trial)
    actual = Actual(
        generation=4,
        names={"dates": BASE.versioned},
        failed={ADAPTER.versioned: "does not load"},
        waiting="adapter is loading",
    )
    assert state_lines(desired, actual) == [
        "rollout     times version 3 by me@here: started",
        "generation  4 of 5",
        "waiting     adapter is loading",
        f"failed      {ADAPTER.versioned}: does not load",
    ]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(names_table(desired, actual, "http://here/v1"))
    rows = {line.split()[0]: line.split()[1:] for line in capture.get().splitlines()}
    assert rows["dates"] == ["1", "base", "a" * 12, "yes"]
    assert rows["times"] == ["3", "adapter", "b" * 12, "no"]


def test_ask_needs_a_served_name_and_a_server(home: Path) -> None:
    assert "--name: is needed, since several names are served; choose one of dates, times" in error_of(
        forge("ask", "Hello", home=home)
    )
    assert "--name words: is not served" in error_of(forge("ask", "Hello", "--name", "words", home=home))
    message = error_of(forge("ask", "Hello", "--name", "dates", home=home, serving_port="1025"))
    assert "http://127.0.0.1:1025/v1: did not answer" in message
    assert "forge start" in message


def test_remove_takes_a_name_out_of_the_desired_state(home: Path) -> None:
    assert forge("remove", "times", home=home).stdout == "times is no longer served.\n"
    desired, _ = FileDocument(Settings(home=home)).read()
    assert (desired.generation, desired.serving.names) == (5, {"dates": BASE.versioned})
    assert desired.serving.adapters == ()


@pytest.mark.parametrize("command", ["start", "stop"])
def test_kubernetes_starts_and_stops_the_cluster_s_server(command: str, home: Path) -> None:
    message = error_of(forge(command, home=home, serving_target="kubernetes"))
    assert "FORGE_SERVING_TARGET: is kubernetes" in message
    assert "scale" in message
