"""The packaged workflows on a cluster whose pods share only the store, MLflow and the API server."""

import json
import re
import shutil

import pytest
from openai import OpenAI

from forge.core.settings import Settings
from forge.registry.mlflow_registry import CHALLENGER, open_registry, version_of
from tests.apart.conftest import FIRST_SERVED, PIPELINE, Cluster, recipe
from tests.apart.flyte import Flyte
from tests.apart.pods import Pods

pytestmark = pytest.mark.long
CACHED = {"preprocess", "train/n0/n1", "evaluate"}


def registry(cluster: Cluster):
    return open_registry(Settings(mlflow_uri=cluster.services.urls["http://mlflow.ml-platform:5000"]))


def test_the_first_model_replaces_what_a_new_cluster_serves(used_cluster: Cluster) -> None:
    first = used_cluster.executions["first"]
    assert first.phase == "SUCCEEDED", first.error
    assert first.value() == f"{used_cluster.services.urls['http://vllm.ml-inference:8000']}/v1"
    assert set(first.cache_status()) == CACHED
    assert set(first.cache_status().values()) == {"POPULATED"}
    deployment = first.node("roll_out").value()
    assert (deployment["name"], deployment["version"], deployment["how"]) == ("dates", "1", "weights")
    assert FIRST_SERVED not in used_cluster.services.desired()["serving"]["names"]


def test_a_repeated_run_computes_nothing(used_cluster: Cluster) -> None:
    repeated = used_cluster.executions["repeated"]
    assert repeated.phase == "SUCCEEDED", repeated.error
    assert repeated.cache_status() == dict.fromkeys(CACHED, "HIT")
    assert repeated.node("roll_out").value()["how"] == "unchanged"
    assert "evaluate_model cached" in repeated.node("summarise").log


def test_training_resumes_after_a_drain_and_its_adapter_is_swapped_in(used_cluster: Cluster) -> None:
    execution = used_cluster.executions["adapter"]
    assert execution.phase == "SUCCEEDED", execution.error
    training = execution.node("train_on_1x2")
    assert training.attempts == 2
    assert re.search(r"resuming after step \d+", training.log)
    tasks = [run.task for run in execution.nodes.values()]
    assert len([task for task in tasks if task.endswith("read_shard") or "map_read_shard" in task]) >= 2
    deployment = execution.node("roll_out").value()
    assert (deployment["version"], deployment["how"], deployment["previous"]) == ("2", "adapter", "1")


def test_a_worse_model_is_rejected(used_cluster: Cluster) -> None:
    rejected = used_cluster.executions["rejected"]
    assert rejected.phase == "SUCCEEDED", rejected.error
    assert rejected.value().startswith("rejected")
    announcement = rejected.node("announce_rejection")
    assert announcement.phase == "SUCCEEDED"
    assert "nothing was registered or rolled out; version 2 stays the champion" in announcement.log


def test_the_champion_is_checked_rolled_back_and_kept(used_cluster: Cluster) -> None:
    check, rollback, retention = (used_cluster.executions[title] for title in ("check", "rollback", "retention"))
    for execution in (check, rollback, retention):
        assert execution.phase == "SUCCEEDED", execution.error
    assert "dates version 2 scores" in check.value()
    assert check.cache_status() == {"n1": "HIT"}
    assert rollback.value()["version"] == "1"
    assert retention.value() == [], "an adapter's base, the champion and the last version are kept"


def test_a_failed_execution_is_reported_and_recovered(used_cluster: Cluster) -> None:
    executions = used_cluster.executions
    failed, failed_again, recovered = (executions[title] for title in ("failed", "failed again", "recovered"))
    for execution in (failed, failed_again):
        assert execution.phase == "FAILED"
        assert "did not serve within 10 s (the reconciler does not answer)" in execution.error
    report = failed.node("report_failure").log
    assert f"--recover {failed.name}" in report
    assert "did not serve within 10 s" in report
    assert failed_again.node("report_failure").phase == "RECOVERED", "Flyte does not run it again"
    assert "did not serve within 10 s" in failed_again.node("roll_out").log
    assert failed_again.node("train_on_1x2").phase == "RECOVERED"
    assert recovered.phase == "SUCCEEDED", recovered.error
    client = registry(used_cluster)
    assert version_of(client, "dates", CHALLENGER) is None, "a failed rollout drops the alias"
    assert "rollout_failed" not in client.get_model_version("dates", "3").tags


def test_the_model_answers_under_its_public_name(used_cluster: Cluster) -> None:
    client = OpenAI(base_url=f"{used_cluster.services.urls['http://vllm.ml-inference:8000']}/v1", api_key="EMPTY")
    answer = client.chat.completions.create(
        model="dates", messages=[{"role": "user", "content": "NL: 20 juni 1969"}], max_tokens=32
    )
    assert answer.model == f"dates-{registry(used_cluster).get_model_version('dates', '3').tags['package_digest'][:12]}"


def test_no_request_was_denied(used_cluster: Cluster) -> None:
    assert used_cluster.services.denied == []


def test_successful_tasks_log_no_errors(used_cluster: Cluster) -> None:
    for title, execution in used_cluster.executions.items():
        for path, run in execution.nodes.items():
            if run.phase == "SUCCEEDED" and run.attempts == 1:
                lines = [line for line in run.log.splitlines() if re.search(r"\bERROR\b|Unclosed|Traceback", line)]
                assert lines == [], f"{title}: {path}"


def test_the_summary_has_links_and_commands_for_a_cluster(used_cluster: Cluster) -> None:
    summary = used_cluster.executions["first"].node("summarise").log
    for part in (
        "curl http://",
        "/#/models/dates/versions/1 (run ",
        "flytectl get execution -p homelab",
        "s3://models/",
    ):
        assert part in summary
    assert "make " not in summary
    assert "/var/lib/forge" not in summary


def test_a_run_in_development_ends_with_its_own_challenger(used_cluster: Cluster) -> None:
    pods = Pods(used_cluster.project, used_cluster.services, used_cluster.folder / "development-pods")
    flyte = Flyte(used_cluster.package, pods, domain="development")
    execution = flyte.run(PIPELINE, {"data_path": "", "recipe": recipe()})
    assert execution.phase == "SUCCEEDED", execution.error
    assert execution.value() == "dates-development version 1"
    assert version_of(registry(used_cluster), "dates-development", CHALLENGER) == "1"
    assert "dates-development" not in json.dumps(used_cluster.services.desired())
    experiments = {experiment.name for experiment in registry(used_cluster).search_experiments()}
    assert {"dates-development", "forge-evaluation-development"} <= experiments


def test_uploaded_code_runs_and_its_recipes_are_found(used_cluster: Cluster) -> None:
    copy, flyte = used_cluster.changed_copy(
        "uploaded",
        ("tasks/preflight/checks.py", "problems: list[str] = []", 'problems: list[str] = []; print("uploaded code")'),
    )
    (copy / "recipes" / "mine.yaml").write_text(recipe(name="mine", serving={"rollout": False}))
    shutil.copy(used_cluster.project / ".dockerignore", copy)
    flyte = Flyte(flyte.package, used_cluster.flyte.pods)  # with images that lack the change
    execution = flyte.run(PIPELINE, {"data_path": "", "recipe": "mine"}, upload=copy, until="preprocess_data")
    assert execution.phase == "STOPPED", execution.error
    assert "uploaded code" in execution.node("preflight").log
    assert execution.node("preflight").value("name") == "mine"


def test_a_training_without_its_requested_gpus_fails(used_cluster: Cluster) -> None:
    pods = Pods(used_cluster.project, used_cluster.services, used_cluster.folder / "gpu-pods", gpus=True)
    flyte = Flyte(used_cluster.package, pods)
    flyte.catalog = {key: outputs for key, outputs in used_cluster.flyte.catalog.items() if "o0" in outputs}
    text = recipe(training={"seed": 7}, serving={"rollout": False})
    execution = flyte.run(PIPELINE, {"data_path": "", "recipe": text})
    assert execution.phase == "FAILED"
    assert execution.node("train_on_1x2").phase == "FAILED"
    assert "this pod requested 2, and torch sees 0" in execution.error


def test_all_executions_are_timed(used_cluster: Cluster) -> None:
    """No limit is asserted, since machines differ. `pytest -s` shows the durations."""
    print({title: round(seconds) for title, seconds in used_cluster.seconds.items()})
    assert set(used_cluster.seconds) == set(used_cluster.executions)
