"""The whole pipeline with `pyflyte run`, a real MLflow and a real vLLM.

The tests share one home in this order; those that change it restore it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from forge.registry.mlflow_registry import CHALLENGER, champion_version, open_registry, version_of
from tests.conftest import chat, write_jsonl
from tests.integration.harness import Home, stopped_afterwards


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home in which the pipeline has run once."""
    with stopped_afterwards(Home(tmp_path_factory.mktemp("pipeline"))) as home:
        status, home.first_output = home.run()  # type: ignore[attr-defined]
        assert status == 0, home.first_output  # type: ignore[attr-defined]
        yield home


def versions(home: Home) -> list[str]:
    return sorted(
        str(version.version) for version in open_registry(home.settings).search_model_versions("name = 'dates'")
    )


def test_model_is_trained_registered_and_served(home: Home) -> None:
    facts = home.facts()
    assert facts["nll"] < facts["nll_base"] / 4
    assert facts["items"] == 64
    assert Path(facts["report"]).read_text().startswith("<!doctype html>")
    assert versions(home) == [facts["version"]] == [champion_version(open_registry(home.settings), "dates")]
    for part in ("score", "dates version 1", facts["digest"], facts["endpoint"], facts["report"], "make ui"):
        assert part in home.first_output  # type: ignore[attr-defined]
    served = home.served()
    assert served is not None
    assert home.desired().serving.names == {"dates": served.spec.base} == {"dates": f"dates-{facts['digest'][:12]}"}
    client = OpenAI(base_url=facts["endpoint"], api_key="EMPTY")
    assert {model.id for model in client.models.list()} == {"dates", served.spec.base}
    answer = client.chat.completions.create(
        model="dates", messages=[{"role": "user", "content": "NL: 20 juni 1969"}], temperature=0, max_tokens=32
    )
    assert answer.choices[0].message.content.startswith('{"date":')
    # Only the server and its reconciler outlive the run.
    assert served.pid in home.serving()
    assert {process.pid for process in home.processes()} <= home.serving()


def test_second_run_computes_nothing(home: Home) -> None:
    before, server = home.facts(), home.served()
    status, output = home.run()
    assert status == 0, output
    facts = home.facts()
    assert facts["cached"] == "preprocess_data, train_model, evaluate_model"
    assert (facts["version"], facts["digest"], versions(home)) == (before["version"], before["digest"], ["1"])
    assert home.served() == server, "the server was not restarted"


def test_changed_recipe_runs_only_what_depends_on_it(home: Home) -> None:
    server = home.served()
    home.write_recipe(evaluation={"items": 48})
    try:
        status, output = home.run()
    finally:
        home.write_recipe()
    assert status == 0, output
    assert home.facts()["cached"] == "preprocess_data, train_model"
    assert home.facts()["items"] == 48
    assert versions(home) == ["1"]
    assert home.served() == server


def test_a_model_that_is_not_to_be_rolled_out_is_registered_as_challenger(home: Home) -> None:
    server, desired = home.served(), home.desired()
    home.write_recipe(serving={"rollout": False})
    path = home.directory / "recipe.yaml"
    path.write_text(path.read_text().replace("name: dates", "name: waiting"))
    try:
        status, output = home.run()
    finally:
        home.write_recipe()
    assert status == 0, output
    assert "serving.rollout or FORGE_ROLLOUT is false" in output
    assert "serves at" not in output
    client = open_registry(home.settings)
    assert version_of(client, "waiting", CHALLENGER) == "1"
    assert champion_version(client, "waiting") is None
    assert (home.served(), home.desired()) == (server, desired)


def test_bad_input_is_one_message_and_changes_nothing(home: Home) -> None:
    server = home.served()
    rows = [chat(f"question {number}", "answer") for number in range(1500)]
    path = write_jsonl(home.directory / "bad.jsonl", [*rows, *[{"question": "no answer"}] * 20])
    status, output = home.run("--data_path", str(path))
    assert status == 1
    assert "20 of 1520 rows cannot be used" in " ".join(output.replace("│", " ").split())
    assert "Traceback" not in output
    assert versions(home) == ["1"]
    assert home.served() == server


@pytest.mark.long
def test_model_ruined_by_wrong_answers_is_rejected(home: Home) -> None:
    rows = [json.loads(line) for line in (dataset(home) / "heldout.jsonl").read_text().splitlines()]
    clean = write_jsonl(home.directory / "clean.jsonl", rows[:150])
    answers = [row["messages"][1] for row in rows]
    shuffled = [
        {**row, "messages": [row["messages"][0], answers[(at + 7) % len(answers)]]}
        for at, row in enumerate(rows[150:] * 12)
    ]
    bad = write_jsonl(home.directory / "ruined.jsonl", shuffled)
    assert_rejected(home, data={"source": str(bad), "heldout_source": str(clean)})


def assert_rejected(home: Home, **sections: dict) -> None:
    """Run a recipe that gives a bad model: the gate rejects it with a reason, and the champion keeps serving."""
    server, first = home.served(), versions(home)
    home.write_recipe(**sections)
    try:
        status, output = home.run()
    finally:
        home.write_recipe()
    assert status == 0, output
    facts = home.facts()
    assert facts["verdict"] == "rejected"
    assert facts["reason"].startswith("rejected by champion: NLL ")
    assert facts["reason"] in " ".join(output.split())
    assert "version 1 stays the champion" in output
    assert facts["report"] in output
    assert "register:" not in output
    assert "roll_out:" not in output
    assert "dates: rejected" in Path(facts["report"]).read_text()
    assert versions(home) == first
    assert home.served() == server


def dataset(home: Home) -> Path:
    """The directory of the pipeline's data set."""
    (directory,) = (home.settings.store_root / "datasets").iterdir()
    return directory


def test_champion_check_detects_a_lower_score(home: Home) -> None:
    status, output = home.run(workflow="champion_check")
    assert status == 0, output
    assert re.search(
        r"dates version 1 scores [\d.]+% on 64 held-out prompts \(95% bounds .*when it was promoted", output
    )
    client = open_registry(home.settings)
    run_id = client.get_model_version("dates", "1").run_id
    promoted = client.get_run(run_id).data.metrics["score"]
    client.log_metric(run_id, "score", 0.99)
    try:
        status, output = home.run(workflow="champion_check")
    finally:
        client.log_metric(run_id, "score", promoted)
    assert status == 1
    text = " ".join(output.replace("│", " ").split())
    assert "99.0% when it was promoted: it fell by more than gate.non_inferiority_margin" in text
    assert "Traceback" not in output
    checks = client.search_runs(
        [client.get_experiment_by_name("forge-evaluation").experiment_id],
        "tags.fallen LIKE '%'",
        order_by=["start_time"],
    )
    assert [run.data.tags["fallen"] for run in checks] == ["false", "true"]
    assert checks[0].data.metrics["drift"] == pytest.approx(0, abs=0.05), "serving gives the score of the evaluation"
