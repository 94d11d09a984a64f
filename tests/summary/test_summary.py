"""The summary of a run: its facts, and what the terminal shows."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from forge.core.contracts import Dataset, Deployment, Evaluation, Result, Version
from forge.core.settings import Settings
from tasks.summary.summary import (
    Place,
    deployment_facts,
    facts_of,
    show,
    show_challenger,
    show_rejected,
    version_facts,
    write_facts,
)

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
    verdict="passed",
    reason="passed: score 91.2% against 90.0%",
    report="file:///somewhere/report.html",
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
VERSION = Version(uri="file:///v", digest="abc", store="s", name="dates", version="3", run_id="r7")
FACTS = facts_of(DATASET, EVALUATION, STAGES, started=100) | deployment_facts(DEPLOYMENT, VERSION)
HERE = Place(Settings(), cluster=False)
CLUSTER = Place(Settings(mlflow_uri="http://mlflow.ml-platform:5000"), cluster=True)


def test_facts_are_flat_and_complete(tmp_path: Path) -> None:
    write_facts(FACTS, Settings(home=tmp_path))
    facts = json.loads((tmp_path / "last-run.json").read_text())
    assert all(not isinstance(value, dict | list) for value in facts.values())
    assert (facts["score"], facts["score_base"], facts["score_champion"]) == (0.912, 0.0, 0.9)
    assert (facts["verdict"], facts["reason"]) == ("passed", "passed: score 91.2% against 90.0%")
    assert (facts["version"], facts["digest"], facts["report"]) == ("3", "abc", "/somewhere/report.html")
    assert facts["endpoint"] == "http://127.0.0.1:8000/v1"
    assert (facts["seconds_train_model"], facts["seconds_roll_out"], facts["cached"]) == (0.0, 30.0, "train_model")


def test_the_terminal_shows_the_facts() -> None:
    output = io.StringIO()
    show(FACTS, STAGES, 100, HERE, Console(file=output, width=40))
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


def test_the_terminal_shows_why_a_model_was_rejected() -> None:
    output = io.StringIO()
    rejected = EVALUATION.model_copy(
        update={"verdict": "rejected", "reason": "rejected by slice [/b]: 3.0%", "nll": None}
    )
    facts = facts_of(DATASET, rejected, STAGES, started=100)
    show_rejected(facts, STAGES, 100, HERE, Console(file=output, width=40))
    text = output.getvalue()
    for part in (
        "rejected by slice [/b]: 3.0%",
        "version 2 stays the champion",
        "/somewhere/report.html",
        "5.5000 → –",
    ):
        assert part in text
    assert "serves at" not in text


def test_on_a_cluster_it_names_services_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for part, value in {"ID": "f0123", "PROJECT": "homelab", "DOMAIN": "production"}.items():
        monkeypatch.setenv(f"FLYTE_INTERNAL_EXECUTION_{part}", value)
    facts = FACTS | {"endpoint": "http://vllm.ml-inference:8000/v1", "report": "s3://models/forge/e/report.html"}
    output = io.StringIO()
    show(facts, STAGES, 100, CLUSTER, Console(file=output, width=400))
    text = output.getvalue()
    for part in (
        "curl http://vllm.ml-inference:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{\"model\":",
        "http://mlflow.ml-platform:5000/#/models/dates/versions/3 (run r7)",
        "flytectl get execution -p homelab -d production f0123",
        "s3://models/forge/e/report.html",
    ):
        assert part in text
    assert "make " not in text


def test_a_model_that_is_only_registered_is_a_challenger() -> None:
    output = io.StringIO()
    facts = facts_of(DATASET, EVALUATION, STAGES, started=100) | version_facts(VERSION)
    show_challenger(facts, STAGES, 100, CLUSTER, Console(file=output, width=400))
    text = output.getvalue()
    assert "dates version 3, challenger, sha256 abc" in text
    assert "rolled out   no: serving.rollout or FORGE_ROLLOUT is false" in text
    assert "serves at" not in text
