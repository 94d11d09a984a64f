"""The summary says what was run and what came from the cache."""

import io
import json
from pathlib import Path

from rich.console import Console

from tasks.contracts import Dataset, Deployment, Evaluation, Result
from tasks.settings import Settings
from tasks.summary.summary import facts_of, released, show, show_held_back, write_facts

DATASET = Dataset(uri="file:///d", digest="d", store="s", train_rows=950, heldout_rows=50)
EVALUATION = Evaluation(
    uri="file:///e",
    digest="e",
    store="s",
    items=500,
    score=0.912,
    score_base=0.0,
    score_champion=0.9,
    exact_match=0.905,
    nll=0.01,
    nll_base=5.5,
    json_validity=None,
    champion="2",
    verdict="pass",
    reason="passed: score 91.2% against 90.0%",
    report="/somewhere/report.html",
)
DEPLOYMENT = Deployment(
    endpoint="http://127.0.0.1:8000/v1",
    name="dates",
    version="3",
    digest="abc",
    agreement="16 of 16",
    how="adapter",
    previous="2",
    previous_digest="def",
    swap_seconds=0.31,
    latency_before=0.21,
    latency_after=0.2,
    started=120,
    seconds=30,
)
STAGES: dict[str, Result] = {"train_model": Result(started=50, seconds=70.04), "roll_out": DEPLOYMENT}
FACTS = facts_of(DATASET, EVALUATION, STAGES, started=100) | released(DEPLOYMENT)


def test_facts_are_flat_and_complete(tmp_path: Path) -> None:
    write_facts(FACTS, Settings(home=tmp_path))
    facts = json.loads((tmp_path / "last-run.json").read_text())
    assert all(not isinstance(value, dict | list) for value in facts.values())
    assert (facts["score"], facts["score_base"], facts["score_champion"]) == (0.912, 0.0, 0.9)
    assert (facts["verdict"], facts["reason"]) == ("pass", "passed: score 91.2% against 90.0%")
    assert (facts["version"], facts["digest"], facts["report"]) == ("3", "abc", "/somewhere/report.html")
    assert facts["endpoint"] == "http://127.0.0.1:8000/v1"
    assert (facts["seconds_train_model"], facts["seconds_roll_out"], facts["cached"]) == (0.0, 30.0, "train_model")


def test_the_terminal_shows_them() -> None:
    output = io.StringIO()
    show(FACTS, STAGES, 100, Console(file=output, width=40))
    text = output.getvalue()
    for part in (
        "0.0% → 91.2% on 500",
        "version 2 scored 90.0%",
        "dates version 3",
        "/somewhere/report.html\n",
        "train_model cached",
        "roll_out 30 s",
        "make ui",
    ):
        assert part in text


def test_the_terminal_shows_why_a_model_was_held_back() -> None:
    output = io.StringIO()
    refused = EVALUATION.model_copy(update={"verdict": "refuse", "reason": "refused by slice [/b]: 3.0%", "nll": None})
    show_held_back(facts_of(DATASET, refused, STAGES, started=100), STAGES, 100, Console(file=output, width=40))
    text = output.getvalue()
    for part in ("refused by slice [/b]: 3.0%", "version 2 stays the champion", "/somewhere/report.html", "5.5000 → –"):
        assert part in text
    assert "serves at" not in text
